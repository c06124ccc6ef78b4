//! MoeLayer in the place of an MLP: which layers have them, what their tensors are called, and how
//! rows go through them.
//!
//! `out += sum over the row's experts of weight * down(silu(gate x) * up x)`, and where there is a
//! shared expert, `+ shared(x)` for every row. The products of all experts are grouped by
//! [`crate::backend::Backend::moe`]; the shared one is a dense MLP like any other.
#![forbid(unsafe_code)]

use crate::backend::{Backend, Epilogue, ExpertShape, Router};
use crate::config::{ModelConfig, Moe};
use crate::error::Result;
use crate::model::layers::{Dense, Linear};
use crate::model::weight_loader::{WeightLoader, WeightRole};

/// Names in a layer, projections without `.weight`. All published layouts share them but for the
/// shared expert, which few have.
const ROUTER: &str = "mlp.gate";
const ROUTER_BIAS: &str = "mlp.gate.expert_bias";
const EXPERTS: &str = "mlp.experts";
const SHARED: &str = "mlp.shared_experts";
const GATE: &str = "gate_proj";
const UP: &str = "up_proj";
const DOWN: &str = "down_proj";

/// One layer's experts.
pub(super) struct MoeLayer<B: Backend> {
    /// (E, C).
    router: Linear<B>,
    /// (E), for the choice alone.
    bias: Option<B::Buffer>,
    /// E of (2F, C), gate and up in turn.
    up: B::Weight,
    /// E of (C, F).
    down: B::Weight,
    shared: Option<Dense<B>>,
}

/// What rows need on their way: scratch of (rows, E) for the router's logits, and of (rows, shared
/// F).
pub(super) struct MoeScratch<'a, B: Backend> {
    pub logits: &'a mut B::Buffer,
    pub mlp: &'a mut B::Buffer,
    pub routing: &'a mut B::Routing,
}

impl<B: Backend> MoeLayer<B> {
    /// `out (rows, C) += experts(x)`.
    pub fn apply(&self, backend: &B, moe: &Moe, rows: usize, x: &B::Buffer, scratch: MoeScratch<B>, out: &mut B::Buffer) -> Result<()> {
        self.router.apply(backend, rows, x, Epilogue::Store, scratch.logits)?;
        backend.route(rows, scratch.logits, &Router { score: moe.score, bias: self.bias.as_ref() }, scratch.routing)?;
        backend.moe(scratch.routing, x, &self.up, &self.down, out)?;
        match &self.shared {
            Some(shared) => shared.apply(backend, rows, Epilogue::SwiGlu, x, scratch.mlp, out),
            None => Ok(()),
        }
    }
}

/// Names and shapes of the experts of the layer whose tensors begin with `layer`.
pub(super) fn tensors(config: &ModelConfig, moe: &Moe, layer: &str) -> Vec<(String, Vec<usize>)> {
    let (c, ExpertShape { num_experts, expert_dim, .. }) = (config.hidden_dim, moe.shape);
    let mut list = vec![(format!("{layer}.{ROUTER}.weight"), vec![num_experts, c])];
    if moe.router_bias {
        list.push((format!("{layer}.{ROUTER_BIAS}"), vec![num_experts]));
    }
    let mut dense = |name: String, width: usize| {
        for (leaf, shape) in [(GATE, [width, c]), (UP, [width, c]), (DOWN, [c, width])] {
            list.push((format!("{name}.{leaf}.weight"), shape.to_vec()));
        }
    };
    (0..num_experts).for_each(|expert| dense(format!("{layer}.{EXPERTS}.{expert}"), expert_dim));
    if let Some(width) = moe.shared_dim {
        dense(format!("{layer}.{SHARED}"), width);
    }
    list
}

/// Packs them.
pub(super) fn load<B: Backend>(r: &mut WeightLoader<B>, moe: &Moe, layer: &str) -> Result<MoeLayer<B>> {
    let ExpertShape { num_experts, hidden_dim: c, expert_dim: f, .. } = moe.shape;
    let router = r.linear(WeightRole::Router, &format!("{layer}.{ROUTER}"), num_experts, c, false)?;
    let bias = if moe.router_bias { Some(r.vector(&format!("{layer}.{ROUTER_BIAS}"), num_experts)?) } else { None };
    let names = |leaf: &str| (0..num_experts).map(|expert| format!("{layer}.{EXPERTS}.{expert}.{leaf}.weight")).collect::<Vec<_>>();
    let up = r.interleaved_stack(&names(GATE), &names(UP), f, c)?;
    let down = r.stack(&names(DOWN), c, f)?;
    let shared = match moe.shared_dim {
        Some(width) => Some(Dense {
            up: r.interleaved_linear(&format!("{layer}.{SHARED}.{GATE}"), &format!("{layer}.{SHARED}.{UP}"), width, c, false)?,
            down: r.linear(WeightRole::Layer, &format!("{layer}.{SHARED}.{DOWN}"), c, width, false)?,
        }),
        None => None,
    };
    Ok(MoeLayer { router, bias, up, down, shared })
}
