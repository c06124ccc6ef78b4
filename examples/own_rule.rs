//! An unmask rule and a remask rule of the caller's own.

use redraft::sampling::{BlockProgress, Candidate, GeneratedToken, RemaskRule, UnmaskRule};
use redraft::{Engine, Options, StageSpec};

/// Unmasks the most confident position of each half of a block.
#[derive(Debug)]
struct BothHalves;

impl UnmaskRule for BothHalves {
    fn value(&self) -> String {
        "both-halves".into()
    }

    fn select(&self, _: BlockProgress, candidates: &[Candidate]) -> Vec<usize> {
        let middle = candidates.len() / 2;
        let best = |range: std::ops::Range<usize>| {
            range.max_by(|a, b| candidates[*a].sampled.confidence.total_cmp(&candidates[*b].sampled.confidence))
        };
        [best(0..middle), best(middle..candidates.len())].into_iter().flatten().collect()
    }
}

/// Masks the least confident tokens of the second half of a text again.
#[derive(Debug)]
struct SecondHalf {
    from: usize,
}

impl RemaskRule for SecondHalf {
    fn value(&self) -> String {
        format!("second-half:{}", self.from)
    }

    fn score(&self, token: &GeneratedToken, _: &dyn Fn() -> f64) -> f64 {
        f64::from(token.snapshot) + if token.position < self.from { 1.0 } else { 0.0 }
    }
}

fn main() -> redraft::Result<()> {
    let mut engine = Engine::open("models/redraft-stories-10m")?;
    let stages = [
        "block=8".parse::<StageSpec>()?.with_unmask(BothHalves),
        "block=full,unmask=linear:4".parse::<StageSpec>()?.with_remask(0.2, SecondHalf { from: 32 }),
    ];
    let generation = engine.generate("Once upon a time", Options::default().stages(stages).length(60).seed(3))?;
    println!("{}", generation.text);
    println!("{} tokens masked again", generation.output.stages[1].remasked.len());
    Ok(())
}
