//! Parts of a layer: norms, products with a bias, dense MLPs.
#![forbid(unsafe_code)]

use crate::backend::{self, Backend, Epilogue};
use crate::config::ModelConfig;
use crate::error::Result;

pub(super) struct NormWeights<B: Backend> {
    pub(super) weight: B::Buffer,
    pub(super) bias: Option<B::Buffer>,
}

impl<B: Backend> NormWeights<B> {
    /// `out (rows, C) = norm(x)` as the config has it.
    pub(super) fn apply(&self, backend: &B, config: &ModelConfig, rows: usize, x: &mut B::Buffer, out: &mut B::Buffer) -> Result<()> {
        let (kind, eps) = (config.switches.norm, config.norm_eps);
        backend.norm(rows, x, None, &backend::Norm { kind, eps, weight: &self.weight, bias: self.bias.as_ref() }, out)
    }
}

pub(super) struct Linear<B: Backend> {
    pub(super) weight: B::Weight,
    pub(super) bias: Option<B::Buffer>,
}

impl<B: Backend> Linear<B> {
    pub(super) fn apply(&self, backend: &B, rows: usize, x: &B::Buffer, epilogue: Epilogue, out: &mut B::Buffer) -> Result<()> {
        backend.linear(rows, x, &self.weight, self.bias.as_ref(), epilogue, out)
    }
}

/// An MLP.
pub(super) struct Dense<B: Backend> {
    /// (F, C), or (2F, C) with gate and up in turn.
    pub(super) up: Linear<B>,
    /// (C, F).
    pub(super) down: Linear<B>,
}

impl<B: Backend> Dense<B> {
    /// `out (rows, C) += down(activation(up x))`; `inner` is scratch of (rows, F).
    pub(super) fn apply(
        &self,
        backend: &B,
        rows: usize,
        activation: Epilogue,
        x: &B::Buffer,
        inner: &mut B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<()> {
        self.up.apply(backend, rows, x, activation, inner)?;
        self.down.apply(backend, rows, inner, Epilogue::Add, out)
    }
}
