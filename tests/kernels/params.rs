//! The params structs have the same fields at the same offsets on both sides. Each compiler asserts its own numbers; here the two
//! lists of numbers are compared.

use redraft::cuda::kernels;
use redraft::cuda::params::{EmbedParams, LayerNormParams, RemaskParams};

#[test]
fn both_sides_state_the_same_layout() {
    let twins = [
        ("embed", "EmbedParams", EmbedParams::FIELDS, size_of::<EmbedParams>()),
        ("layer_norm", "LayerNormParams", LayerNormParams::FIELDS, size_of::<LayerNormParams>()),
        ("remask", "RemaskParams", RemaskParams::FIELDS, size_of::<RemaskParams>()),
    ];
    let kernels = kernels();
    assert_eq!(kernels.iter().map(|k| k.stem).collect::<Vec<_>>(), twins.map(|(stem, ..)| stem), "a kernel without a twin");
    for (kernel, (stem, name, fields, size)) in kernels.iter().zip(twins) {
        let stated: Vec<&str> = kernel.source.lines().filter(|l| l.starts_with("FIELD(") || l.starts_with("LAYOUT(")).collect();
        let mut expected: Vec<String> = fields.iter().map(|(field, offset)| format!("FIELD({name}, {field}, {offset});")).collect();
        expected.push(format!("LAYOUT({name}, {size});"));
        assert_eq!(stated, expected, "{stem}");
    }
}
