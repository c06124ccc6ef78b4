//! Schedules: checked lists of stages, from stages as typed or from a preset's name.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::schedule::parse::StageSpec;
use crate::schedule::stage::{Defaults, Stage};

/// A checked list of stages: the first drafts, every later one remasks and regenerates.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    pub stages: Vec<Stage>,
}

/// Named schedules and the stages they expand to.
pub const PRESETS: [(&str, &[&str]); 15] = [
    ("draft", &["block=trained,unmask=uniform:1"]),
    // As published, in the fewest forwards that lose little.
    ("did", &["block=trained,unmask=uniform:1", "block=full,remask=0.35,by=snapshot,unmask=linear:12,order=uniform,kv=exact"]),
    ("did-fast", &["block=trained,unmask=uniform:1", "block=full,remask=0.35,by=snapshot,unmask=linear:12,order=uniform,kv=refresh:12"]),
    // What lowers perplexity at equal diversity: docs/evidence.md.
    (
        "did-lift",
        &["block=trained,unmask=uniform:1", "block=full,remask=0.1,by=held-out:4,score=lift,unmask=linear:4,order=uniform,kv=refresh:12"],
    ),
    // The same over a draft of a forward or few a block, where there is a joint sampler:
    // docs/joint.md.
    (
        "did-joint",
        &["block=trained,sampler=joint:4", "block=full,remask=0.1,by=held-out:4,score=lift,unmask=linear:4,order=uniform,kv=refresh:12"],
    ),
    ("global", &["block=full,unmask=uniform:1"]),
    ("semi-ar", &["block=32,visible=canvas,unmask=linear:32"]),
    (
        "three",
        &[
            "block=trained,unmask=uniform:1",
            "block=64,remask=0.35,by=snapshot,unmask=linear:6,order=uniform",
            "block=full,remask=0.2,by=snapshot,unmask=linear:12,order=uniform",
        ],
    ),
    // The published samplers as their authors run them; docs/schedules.md has the variants.
    ("llada", &["block=32,visible=canvas,from=prompt,unmask=linear:32,order=confidence,temperature=0,top_p=1,top_k=all"]),
    (
        "dream",
        &[
            "block=full,visible=canvas,unmask=timestep:512,order=entropy,temperature=0.2,top_p=0.95,top_p_rule=crossing,top_k=all,confidence=truncated",
        ],
    ),
    ("sdar", &["block=trained,visible=block,unmask=above:0.85,steps=4,last=fill,temperature=1,top_p=1,top_k=all,confidence=truncated"]),
    ("llada2", &["block=trained,visible=block,unmask=above:0.95,steps=32,last=fill,temperature=0,top_p=1,top_k=all"]),
    ("llada21", &["block=trained,visible=block,unmask=above:0.95,edit=0.9,passes=16,last=fill,temperature=0,top_p=1,top_k=all"]),
    ("fast-dllm-v1", &["block=32,visible=canvas,from=prompt,unmask=threshold:0.9,temperature=0,top_p=1,top_k=all,kv=dual"]),
    ("fast-dllm-v2", &["block=32,visible=block,sub=8,unmask=above:0.95,temperature=0,top_p=1,top_k=all"]),
];

impl Schedule {
    /// Resolves typed stages against the request's defaults. Errors name the stage and what it may
    /// hold.
    pub fn resolve(specs: &[StageSpec], defaults: &Defaults) -> Result<Schedule> {
        if specs.is_empty() {
            return Err(Error::request("a schedule needs at least one stage"));
        }
        if specs.len() > 255 {
            return Err(Error::request(format!("a schedule holds at most 255 stages, found {}", specs.len())));
        }
        let mut stages: Vec<Stage> = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            stages.push(spec.resolve(index, defaults, stages.last())?);
        }
        Ok(Schedule { stages })
    }

    /// Expands a preset. Errors list the names.
    pub fn preset(name: &str, defaults: &Defaults) -> Result<Schedule> {
        let Some((_, stages)) = PRESETS.iter().find(|(preset, _)| *preset == name) else {
            let names: Vec<_> = PRESETS.iter().map(|(preset, _)| *preset).collect();
            return Err(Error::request(format!("unknown preset `{name}`; presets: {}", names.join(", "))));
        };
        Schedule::resolve(&stages.iter().map(|s| s.parse()).collect::<Result<Vec<_>>>()?, defaults)
    }
}
