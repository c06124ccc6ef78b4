//! Randomness: a counter-based generator keyed by what a draw is *for*, so that a result never
//! depends on the order in which draws are made, on neighbours in a batch, or on threads
//! (docs/architecture.md, determinism).
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Key: the
//! request's seed. Counter: position, step, stage and block, sample. One call yields two 53-bit
//! uniforms.
#![forbid(unsafe_code)]

/// What a draw is for. `step` counts the denoising forwards of the stage for this sequence, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrawKey {
    pub seed: u64,
    pub sample: u32,
    pub stage: u8,
    /// Block index within the stage, below 2^24.
    pub block: u32,
    pub step: u32,
    pub position: u32,
}

/// The step number of draws that belong to a whole stage (random remasking) rather than to one of
/// its forwards.
pub const STAGE_STEP: u32 = u32::MAX;

/// The step number of the time at which a position is revealed by
/// [`crate::sampling::Unmask::Ancestral`].
pub const TIME_STEP: u32 = u32::MAX - 1;

/// Two independent uniforms in [0, 1) with 53 random bits each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Uniforms {
    /// Chooses the token.
    pub token: f64,
    /// Ranks the position wherever an order is random.
    pub order: f64,
}

/// The uniforms of one key.
pub fn uniforms(key: DrawKey) -> Uniforms {
    debug_assert!(key.block < 1 << 24);
    let counter = [key.position, key.step, u32::from(key.stage) << 24 | key.block, key.sample];
    let words = philox4x32_10(counter, [key.seed as u32, (key.seed >> 32) as u32]);
    let unit = |high: u32, low: u32| ((u64::from(high) << 32 | u64::from(low)) >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
    Uniforms { token: unit(words[0], words[1]), order: unit(words[2], words[3]) }
}

/// Ten rounds of Philox4x32.
fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with Random123 (kat_vectors).
    #[test]
    fn philox_known_answers() {
        let ones = u32::MAX;
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32_10([ones; 4], [ones; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox4x32_10([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn every_part_of_the_key_matters_and_values_are_uniform() {
        let base = DrawKey { seed: 7, sample: 1, stage: 1, block: 2, step: 3, position: 4 };
        let others = [
            DrawKey { seed: 7 | 1 << 40, ..base },
            DrawKey { sample: 2, ..base },
            DrawKey { stage: 2, ..base },
            DrawKey { block: 3, ..base },
            DrawKey { step: 4, ..base },
            DrawKey { position: 5, ..base },
        ];
        assert!(others.iter().all(|k| uniforms(*k) != uniforms(base)));
        // Mean of n uniforms: 1/2 with standard deviation 1/sqrt(12 n); 5 sigma.
        let n = 20_000u32;
        let draws: Vec<_> = (0..n).map(|position| uniforms(DrawKey { position, ..base })).collect();
        for values in [draws.iter().map(|d| d.token).sum::<f64>(), draws.iter().map(|d| d.order).sum::<f64>()] {
            assert!((values / f64::from(n) - 0.5).abs() < 5.0 / (12.0 * f64::from(n)).sqrt());
        }
        assert!(draws.iter().all(|d| (0.0..1.0).contains(&d.token) && (0.0..1.0).contains(&d.order)));
    }
}
