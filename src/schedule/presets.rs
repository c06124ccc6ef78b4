//! Schedules: checked lists of stages, from stages as typed or from a preset's name.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::schedule::spec::StageSpec;
use crate::schedule::stage::{Defaults, Stage};

/// Maximum number of stages: an event holds the index of its stage in 8 bits.
const MAX_STAGES: usize = 255;

/// A checked list of stages: the first drafts, every later one remasks and regenerates.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    stages: Vec<Stage>,
}

/// A named schedule.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// What `--preset` names.
    pub name: &'static str,
    /// The stages it expands to.
    pub stages: &'static [&'static str],
    /// What it is, with its source.
    pub doc: &'static str,
}

const DRAFT: &str = "block=trained,unmask=uniform:1";

/// Every preset.
pub static PRESETS: [Preset; 16] = [
    Preset { name: "draft", stages: &[DRAFT], doc: "a draft alone: blocks of the trained length, one token a forward (BD3-LM)" },
    Preset {
        name: "did",
        stages: &[DRAFT, "block=full,remask=0.35,by=snapshot,unmask=linear:12,order=uniform,kv=exact"],
        doc: "draft-then-refine as published (Diffusion in Diffusion), in the fewest forwards that lose little",
    },
    Preset {
        name: "did-fast",
        stages: &[DRAFT, "block=full,remask=0.35,by=snapshot,unmask=linear:12,order=uniform,kv=refresh:12"],
        doc: "`did` with one full pass, then rows masked or just unmasked alone (approximate)",
    },
    Preset {
        name: "did-lift",
        stages: &[DRAFT, "block=full,remask=0.1,by=held-out:4,score=lift,unmask=linear:4,order=uniform,kv=refresh:12"],
        doc: "the default: what [lowers perplexity at equal diversity](evidence.md), for fewer rows than `did`",
    },
    Preset {
        name: "did-joint",
        stages: &[
            "block=trained,sampler=joint:4",
            "block=full,remask=0.1,by=held-out:4,score=lift,unmask=linear:4,order=uniform,kv=refresh:12",
        ],
        doc: "the same over a draft of one or few forwards a block, for models with a [joint sampler](#joint-sampling); [what it is \
              worth](joint.md)",
    },
    Preset {
        name: "three",
        stages: &[
            DRAFT,
            "block=64,remask=0.35,by=snapshot,unmask=linear:6,order=uniform",
            "block=full,remask=0.2,by=snapshot,unmask=linear:12,order=uniform",
        ],
        doc: "a draft refined twice, by blocks of 64 and by the whole text",
    },
    Preset {
        name: "ar",
        stages: &["block=1,visible=block,unmask=left:1"],
        doc: "autoregression: each token from those before it, one a forward; what autoregressive checkpoints follow, and their default",
    },
    Preset { name: "global", stages: &["block=full,unmask=uniform:1"], doc: "plain masked diffusion, one token a forward (MDLM)" },
    Preset {
        name: "semi-ar",
        stages: &["block=32,visible=canvas,unmask=linear:32"],
        doc: "semi-autoregressive: blocks of 32 under full attention (LLaDA)",
    },
    Preset {
        name: "llada",
        stages: &["block=32,visible=canvas,from=prompt,unmask=linear:32,order=confidence,temperature=0,top_p=1,top_k=all"],
        doc: "LLaDA as its authors run it",
    },
    Preset {
        name: "dream",
        stages: &[
            "block=full,visible=canvas,unmask=timestep:512,order=entropy,temperature=0.2,top_p=0.95,top_p_rule=crossing,top_k=all,confidence=truncated",
        ],
        doc: "Dream as its authors run it",
    },
    Preset {
        name: "sdar",
        stages: &["block=trained,visible=block,unmask=above:0.85,steps=4,last=fill,temperature=1,top_p=1,top_k=all,confidence=truncated"],
        doc: "SDAR as its authors run it",
    },
    Preset {
        name: "llada2",
        stages: &["block=trained,visible=block,unmask=above:0.95,steps=32,last=fill,temperature=0,top_p=1,top_k=all"],
        doc: "LLaDA2.0 as its authors run it",
    },
    Preset {
        name: "llada21",
        stages: &["block=trained,visible=block,unmask=above:0.95,edit=0.9,passes=16,last=fill,temperature=0,top_p=1,top_k=all"],
        doc: "LLaDA2.1 as its authors run it",
    },
    Preset {
        name: "fast-dllm-v1",
        stages: &["block=32,visible=canvas,from=prompt,unmask=threshold:0.9,temperature=0,top_p=1,top_k=all,kv=dual"],
        doc: "Fast-dLLM as its authors run it, over LLaDA and Dream",
    },
    Preset {
        name: "fast-dllm-v2",
        stages: &["block=32,visible=block,sub=8,unmask=above:0.95,temperature=0,top_p=1,top_k=all"],
        doc: "Fast-dLLM v2 as its authors run it",
    },
];

impl Schedule {
    /// A schedule of stages made by hand.
    ///
    /// Errors: [`Error::Request`] that names the first stage which is not sound in its place, and
    /// what was expected.
    pub fn new(stages: Vec<Stage>) -> Result<Schedule> {
        let schedule = Schedule { stages };
        schedule.check()?;
        Ok(schedule)
    }

    /// The stages, at least one.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    fn check(&self) -> Result<()> {
        match self.stages.len() {
            0 => return Err(Error::request("a schedule needs at least one stage")),
            n if n > MAX_STAGES => return Err(Error::request(format!("a schedule holds at most {MAX_STAGES} stages, found {n}"))),
            _ => {}
        }
        let previous = std::iter::once(None).chain(self.stages.iter().map(Some));
        self.stages.iter().zip(previous).enumerate().try_for_each(|(index, (stage, previous))| stage.check(index, previous))
    }

    /// Resolves typed stages against the request's defaults. Errors name the stage and what it may
    /// hold.
    pub fn resolve(specs: &[StageSpec], defaults: &Defaults) -> Result<Schedule> {
        let mut stages: Vec<Stage> = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            stages.push(spec.resolve(index, defaults, stages.last())?);
        }
        Schedule::new(stages)
    }

    /// Expands a preset. Errors list the names.
    pub fn preset(name: &str, defaults: &Defaults) -> Result<Schedule> {
        let Some(preset) = PRESETS.iter().find(|preset| preset.name == name) else {
            let names: Vec<_> = PRESETS.iter().map(|preset| preset.name).collect();
            return Err(Error::request(format!("unknown preset `{name}`; presets: {}", names.join(", "))));
        };
        Schedule::resolve(&preset.stages.iter().map(|s| s.parse()).collect::<Result<Vec<_>>>()?, defaults)
    }
}
