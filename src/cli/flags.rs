//! Values of flags that several commands have.
#![forbid(unsafe_code)]

use clap::ValueEnum;

use crate::backend::{DType, WeightFormat};
use crate::sampling::TopPRule;

/// `--format`.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

/// `--dtype`.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum DTypeFlag {
    F32,
    Bf16,
}

impl From<DTypeFlag> for DType {
    fn from(flag: DTypeFlag) -> DType {
        match flag {
            DTypeFlag::F32 => DType::F32,
            DTypeFlag::Bf16 => DType::Bf16,
        }
    }
}

/// `--weights`.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum WeightsFlag {
    F32,
    Bf16,
    Q8,
    Q4,
}

impl From<WeightsFlag> for WeightFormat {
    fn from(flag: WeightsFlag) -> WeightFormat {
        match flag {
            WeightsFlag::F32 => WeightFormat::F32,
            WeightsFlag::Bf16 => WeightFormat::Bf16,
            WeightsFlag::Q8 => WeightFormat::Q8,
            WeightsFlag::Q4 => WeightFormat::Q4,
        }
    }
}

/// `--top-p-rule`.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum TopPRuleFlag {
    /// Keep tokens while the cumulative probability including the token is at most p (BD3-LM)
    Within,
    /// Also keep the token that crosses p (Hugging Face)
    Crossing,
}

impl From<TopPRuleFlag> for TopPRule {
    fn from(flag: TopPRuleFlag) -> Self {
        match flag {
            TopPRuleFlag::Within => TopPRule::Within,
            TopPRuleFlag::Crossing => TopPRule::Crossing,
        }
    }
}
