//! Values of tensors: block types against llama.cpp's own package, rows in a directory's order,
//! groups as they are stored.

use redraft::gguf::blocks::{BlockType, GROUP, Group4, Group8};
use redraft::gguf::container::{Container, TensorType};
use redraft::weights::Weights;

use crate::build::File;
use crate::file;

/// The golden file says the layout of its records (`write_gguf.py`).
#[test]
fn values_of_blocks_are_those_of_the_official_package() {
    let bytes = std::fs::read(file("blocks.bin")).expect("a file");
    let mut rest = bytes.as_slice();
    let mut take = |count: usize| rest.split_off(..count).expect("a whole file");
    let mut number = || u32::from_le_bytes(take(4).try_into().expect("four bytes")) as usize;
    let kinds = [
        (2, BlockType::Q4_0),
        (3, BlockType::Q4_1),
        (6, BlockType::Q5_0),
        (7, BlockType::Q5_1),
        (8, BlockType::Q8_0),
        (12, BlockType::Q4K),
        (13, BlockType::Q5K),
        (14, BlockType::Q6K),
    ];
    assert_eq!(number(), kinds.len());
    for (code, kind) in kinds {
        let mut number = || u32::from_le_bytes(take(4).try_into().expect("four bytes")) as usize;
        let [found, count, size, len] = std::array::from_fn(|_| number());
        assert_eq!((found, size, len), (code, kind.num_bytes(), kind.num_values()), "{}", kind.name());
        let (blocks, expected) = (take(count * size), take(count * len * 4));
        let mut values = vec![0.0; count * len];
        kind.decode(blocks, &mut values);
        for (i, (value, expected)) in values.iter().zip(expected.as_chunks::<4>().0).enumerate() {
            let expected = f32::from_le_bytes(*expected);
            assert!(*value == expected, "{} value {i}: {value}, expected {expected}", kind.name());
        }
    }
    assert!(rest.is_empty());
}

/// Rows of q and k of the llama layout, wherever a read begins and ends.
#[test]
fn rows_come_back_in_the_order_of_a_directory() {
    let path = file("llama-q8_0.gguf");
    let (weights, container) = (Weights::open(&path).expect("opens"), Container::open(&path).expect("opens"));
    let bytes = std::fs::read(&path).expect("a file");
    let (rows, width, head_dim) = (32, 32, 16);
    for (name, stored) in [("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v")] {
        let info = container.tensor(&format!("blk.0.{stored}.weight")).expect("a tensor");
        assert_eq!(info.kind, TensorType::Blocks(BlockType::Q8_0));
        let mut values = vec![0.0; rows * width];
        BlockType::Q8_0.decode(&bytes[info.bytes.clone()], &mut values);
        // As the converter permutes: heads of two halves of rows become heads of pairs of rows.
        let from = |row: usize| match name {
            "v" => row,
            _ => row / head_dim * head_dim + row % (head_dim / 2) * 2 + row % head_dim / (head_dim / 2),
        };
        let expected: Vec<f32> = (0..rows).flat_map(|row| values[from(row) * width..][..width].to_vec()).collect();
        let tensor = weights.tensor(&format!("model.layers.0.self_attn.{name}_proj.weight"), &[rows, width]).expect("a tensor");
        assert_eq!(tensor.to_vec().expect("values"), expected, "{name}");
        for (first, len) in [(0, 1), (31, 2), (5, 60), (32, 64), (7 * 32, 64), (100, 500), (1023, 1), (480, 544), (3, 1021), (64, 0)] {
            let mut part = vec![0.0; len];
            tensor.read(first, &mut part).expect("values");
            assert_eq!(part, expected[first..first + len], "{name}: {len} values from {first} on");
        }
        let blocks = tensor.blocks().expect("groups of 32");
        assert_eq!((blocks.kind(), blocks.groups_per_row()), (BlockType::Q8_0, width / GROUP));
        for (first, count) in [(0, rows), (3, 2), (7, 3), (20, 12)] {
            let mut groups = vec![Group8::ZERO; count];
            blocks.read8(first, &mut groups).expect("groups");
            let values: Vec<f32> = groups.iter().flat_map(|g| g.codes.map(|code| g.scale.to_f32() * f32::from(code))).collect();
            assert_eq!(values, expected[first * width..(first + count) * width], "{name}: {count} rows from {first} on");
        }
    }
    // Rows of 48 are no whole blocks: the converter leaves them in 16 bits.
    let down = weights.tensor("model.layers.0.mlp.down_proj.weight", &[32, 48]).expect("a tensor");
    assert!(down.blocks().is_none());
    assert_eq!(weights.dtypes(), ["F16", "F32", "Q8_0"]);
}

/// The llama of `build` with all matrices in one type of 4-bit groups.
#[test]
fn groups_of_four_bits_have_the_values_of_their_rows() {
    for (code, kind) in [(2, BlockType::Q4_0), (3, BlockType::Q4_1), (12, BlockType::Q4K)] {
        let mut llama = File::llama();
        llama.set("llama.embedding_length", crate::build::u32_value(256));
        llama.set("llama.attention.key_length", crate::build::u32_value(16));
        llama.set("llama.attention.value_length", crate::build::u32_value(16));
        for tensor in llama.tensors.iter_mut().filter(|tensor| tensor.dims.len() == 2) {
            (tensor.dims[0], tensor.kind) = (256, code);
            let count = (tensor.dims[1] as usize) * (256 / kind.num_values()) * kind.num_bytes();
            tensor.bytes = (0..count).map(|i| (i * 37 % 251) as u8).collect();
            for block in tensor.bytes.chunks_exact_mut(kind.num_bytes()) {
                (block[1], block[3]) = (0x2c, 0xa8);
            }
        }
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.gguf");
        std::fs::write(&path, llama.bytes()).expect("a file");
        let weights = Weights::open(&path).expect("opens");
        for (name, rows) in [("q_proj", 32), ("v_proj", 16)] {
            let tensor = weights.tensor(&format!("model.layers.0.self_attn.{name}.weight"), &[rows, 256]).expect("a tensor");
            let expected = tensor.to_vec().expect("values");
            let mut groups = vec![Group4::ZERO; rows * 8];
            tensor.blocks().expect("groups").read4(0, &mut groups).expect("groups");
            let values: Vec<f32> = groups.iter().flat_map(|g| g.codes.map(|code| g.scale * f32::from(code) + g.min)).collect();
            assert_eq!(values, expected, "{} {name}", kind.name());
        }
    }
}

/// 16 bits are those of the converter: f32 rounded to nearest, even where it is a tie.
#[test]
fn sixteen_bits_are_rounded_weights() {
    let (narrow, wide) = (Weights::open(&file("qwen3-bf16.gguf")).expect("opens"), Weights::open(&file("qwen3-f32.gguf")).expect("opens"));
    for (name, shape) in [("model.embed_tokens.weight", [67, 32]), ("model.layers.1.self_attn.q_proj.weight", [48, 32])] {
        let [rounded, exact] = [&narrow, &wide].map(|from| from.tensor(name, &shape).expect("a tensor").to_vec().expect("values"));
        let expected: Vec<f32> = exact.iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect();
        assert_eq!(rounded, expected, "{name}");
    }
}
