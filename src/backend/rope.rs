//! Rotary positions: frequencies of the pairs of a head, and tables of their cosines and sines.
#![forbid(unsafe_code)]

/// How positions become angles: of the first R elements of a head, pair (i, i + R / 2) turns by
/// `position * frequency(i)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Pair i turns by `base^(-2i/R)` a position, before scaling.
    pub base: f32,
    pub scaling: RopeScaling,
    /// R; `None` is the whole head, 0 leaves it as it is.
    pub width: Option<usize>,
}

/// How frequencies are stretched for longer texts than the first training saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// All of them divided by `factor` (arXiv 2306.15595).
    Linear {
        factor: f32,
    },
    /// Llama 3.1: a frequency that turns fewer than `low_freq_factor` times over `original_len`
    /// positions is divided by `factor`, one that turns more than `high_freq_factor` times is kept,
    /// and between the two the divided and the kept are mixed linearly in the turns.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_len: f32,
    },
}

impl Rope {
    /// Rotary positions without scaling.
    pub const fn plain(base: f32) -> Rope {
        Rope { base, scaling: RopeScaling::None, width: None }
    }

    /// Leading elements of a head of `head_dim` that are rotated.
    pub fn rotary_dim(&self, head_dim: usize) -> usize {
        self.width.unwrap_or(head_dim)
    }

    /// Radians that pair `i` of a head of `head_dim` turns in one position, rounded to f32 once.
    pub fn frequency(&self, i: usize, head_dim: usize) -> f32 {
        let frequency = 1.0 / f64::from(self.base).powf(2.0 * i as f64 / self.rotary_dim(head_dim) as f64);
        let scaled = match self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / f64::from(factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
                let [factor, low, high, len] = [factor, low_freq_factor, high_freq_factor, original_len].map(f64::from);
                let turns = len * frequency / std::f64::consts::TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - kept) * frequency / factor + kept * frequency
            }
        };
        scaled as f32
    }

    /// The same bits for the same frequencies.
    pub fn bits(&self) -> [u32; 7] {
        let [kind, a, b, c, d] = match self.scaling {
            RopeScaling::None => [0.0; 5],
            RopeScaling::Linear { factor } => [1.0, factor, 0.0, 0.0, 0.0],
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
                [2.0, factor, low_freq_factor, high_freq_factor, original_len]
            }
        };
        let [base, kind, a, b, c, d] = [self.base, kind, a, b, c, d].map(f32::to_bits);
        [base, kind, a, b, c, d, self.width.map_or(u32::MAX, |width| width as u32)]
    }
}

/// cos and sin by position for one (rope, head_dim): computed once per position, kept between
/// forwards. 4 KiB per 8 positions at R = 64.
#[derive(Default)]
pub(crate) struct Rotations {
    rope: Option<Rope>,
    head_dim: usize,
    /// (positions, R): R/2 cosines, then R/2 sines.
    table: Vec<f32>,
}

impl Rotations {
    /// The table with at least `positions` rows.
    pub(crate) fn table(&mut self, rope: Rope, head_dim: usize, positions: usize) -> &[f32] {
        if self.rope.map(|known| known.bits()) != Some(rope.bits()) || self.head_dim != head_dim {
            *self = Rotations { rope: Some(rope), head_dim, table: Vec::new() };
        }
        extend_rotations(rope, head_dim, positions, &mut self.table);
        &self.table
    }
}

/// Grows a table of rotations to at least `positions` rows: R/2 cosines, then R/2 sines, each
/// computed in f64 from the f32 angle.
pub fn extend_rotations(rope: Rope, head_dim: usize, positions: usize, table: &mut Vec<f32>) {
    let half = rope.rotary_dim(head_dim) / 2;
    if table.len() >= positions * 2 * half {
        return;
    }
    let frequencies: Vec<f32> = (0..half).map(|i| rope.frequency(i, head_dim)).collect();
    for position in table.len() / (2 * half).max(1)..positions {
        let angles = || frequencies.iter().map(|f| f64::from(position as f32 * f));
        table.extend(angles().map(|angle| angle.cos() as f32));
        table.extend(angles().map(|angle| angle.sin() as f32));
    }
}
