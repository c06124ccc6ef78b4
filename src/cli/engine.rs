//! Engines of the commands: loading with progress, joint samplers, and running to the end.
#![forbid(unsafe_code)]

use std::path::Path;

use crate::backend::Backend;
use crate::cli::terminal::{Progress, note_warnings};
use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::input_file;
use crate::request::SubmittedRequest;
use crate::schedule::Schedule;
use crate::sequence::EventKind;

/// [`Engine::load`] with its progress on a terminal.
pub(crate) fn load<B: Backend>(dir: &Path, backend: B, options: EngineOptions) -> Result<Engine<B>> {
    let mut progress = Progress::on_terminal("loading");
    let engine = Engine::load_with_progress(dir, backend, options, &mut |done, total| {
        progress.show(|| format!("{}: {:.2} of {:.2} GB", dir.display(), done as f64 / 1e9, total as f64 / 1e9));
    })?;
    drop(progress);
    note_warnings(engine.config());
    Ok(engine)
}

/// [`Engine::attach_joint`] of the sampler that was named, or of the model's own where one of its
/// schedules needs it.
pub(crate) fn attach_joint<'a, B: Backend>(
    engine: &mut Engine<B>,
    named: Option<&Path>,
    model: &Path,
    schedules: impl IntoIterator<Item = &'a Schedule>,
) -> Result<()> {
    let own = model.join("joint");
    let wanted = || schedules.into_iter().any(|schedule| schedule.stages().iter().any(|stage| stage.is_joint() && stage.weights == 0));
    let config = own.join("config.json");
    match named {
        Some(dir) => engine.attach_joint(dir, &mut |_, _| {}),
        None if wanted() && input_file::exists(&config).map_err(|e| Error::io(&config, &e))? => engine.attach_joint(&own, &mut |_, _| {}),
        None => Ok(()),
    }
}

/// Runs the engine to the end, showing progress, for callers that want the outputs alone.
pub(crate) fn drain<B: Backend>(engine: &mut Engine<B>, handles: &[SubmittedRequest]) -> Result<()> {
    let mut progress = Progress::new("generating");
    let mut revealed = 0;
    loop {
        let busy = engine.tick()?;
        for event in handles.iter().flat_map(SubmittedRequest::events) {
            if event.kind == EventKind::Unmask {
                revealed += event.positions.len();
            }
        }
        progress.show(|| format!("{revealed} tokens revealed"));
        if !busy {
            return Ok(());
        }
    }
}
