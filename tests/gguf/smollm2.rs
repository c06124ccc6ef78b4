//! SmolLM2-135M-Instruct in Q4_1, as published: its likelihoods and logits against transformers in
//! f32 over the weights that llama.cpp's package dequantises (`tools/fixtures/write_smollm2.py`).

use redraft::backend::WeightFormat;
use redraft::engine::Engine;
use redraft::gguf::blocks::{BlockType, Groups};
use redraft::weights::Weights;
use redraft::{Cpu, DType, EngineOptions};
use serde_json::Value;

use crate::{file, smollm2};

/// Nats, and logits relative to the largest: both sides sum in f32 over 30 layers, in different
/// orders.
const BOUND: f64 = 2e-4;

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

#[test]
fn likelihoods_and_logits_are_those_of_transformers() {
    let Some(path) = smollm2() else { return };
    let golden: Value = serde_json::from_slice(&std::fs::read(file("smollm2.json")).expect("a file")).expect("JSON");
    let every = golden["every"].as_u64().expect("a stride") as usize;
    // Not the groups as they are stored, whose products round what they are multiplied with.
    let cpu = Cpu::new(2, DType::F32).expect("the CPU is always there").with_weights(Some(WeightFormat::F32));
    let mut engine = Engine::load(&path, cpu, EngineOptions::default()).expect("a model");
    let visibility = engine.config().attention.visibility();
    let (mut sum, mut count, mut worst, mut worst_logit) = (0.0, 0, 0.0f64, 0.0f64);
    for case in golden["cases"].as_array().expect("cases") {
        let text = case["text"].as_str().expect("a text");
        let ids: Vec<u32> = numbers(&case["ids"]).into_iter().map(|id| id as u32).collect();
        assert_eq!(engine.tokenizer().expect("a tokenizer").encode(text).expect("ids"), ids, "{text}");
        let tokens = [&[golden["bos"].as_u64().expect("an id") as u32], &ids[..]].concat();
        let expected = numbers(&case["nll"]);
        let found = engine.causal_nll(&tokens).expect("likelihoods");
        assert_eq!(found.len(), expected.len());
        worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(worst, f64::max);
        (sum, count) = (sum + found.iter().sum::<f64>(), count + found.len());
        if let Some(expected) = case.get("last_logits").map(numbers) {
            let mut all = Vec::new();
            let mut keep = |_: usize, logits: &[f32]| {
                all.extend_from_slice(logits);
                Ok(())
            };
            engine.logits(&tokens, visibility, &mut keep).expect("logits");
            let last = &all[all.len() - engine.config().vocab_size..];
            let last: Vec<f64> = last.iter().step_by(every).map(|value| f64::from(*value)).collect();
            let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
            assert_eq!(last.len(), expected.len());
            worst_logit = last.iter().zip(&expected).map(|(a, b)| (a - b).abs() / largest).fold(worst_logit, f64::max);
        }
    }
    let mean = sum / count as f64;
    println!("{count} tokens, {mean:.6} nats, perplexity {:.4}; worst token {worst:.1e} nats, logit {worst_logit:.1e}", mean.exp());
    assert!(worst < BOUND && worst_logit < BOUND, "a token {worst} nats off, a logit {worst_logit}");
    assert!((mean - golden["nll"].as_f64().expect("a number")).abs() < 1e-5, "mean {mean}");
}

#[test]
fn its_types_are_those_that_it_is_published_in() {
    let Some(path) = smollm2() else { return };
    let weights = Weights::open(&path).expect("opens");
    assert_eq!(weights.dtypes(), ["F32", "Q4_1", "Q8_0"]);
    assert_eq!(weights.num_elements(), 134_515_008);
    assert!(weights.are_narrow());
    for (name, shape, kind, groups) in [
        ("model.embed_tokens.weight", [49152, 576], BlockType::Q8_0, Groups::Eight),
        ("model.layers.29.self_attn.k_proj.weight", [192, 576], BlockType::Q4_1, Groups::Four),
    ] {
        let tensor = weights.tensor(name, &shape).expect("a tensor");
        let blocks = tensor.blocks().expect("groups");
        assert_eq!((blocks.kind(), blocks.kind().groups(), blocks.groups_per_row()), (kind, Some(groups), 18), "{name}");
    }
}
