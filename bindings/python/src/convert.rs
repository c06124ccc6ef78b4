//! Events and results as what Python builds its objects from: texts, lists, and numbers as bytes.
//!
//! Bytes and not arrays: the stable ABI has no buffer protocol before Python 3.11, and numpy's own
//! C interface would tie the wheel to its versions. `numpy.frombuffer` makes an array of bytes
//! without another copy, and one that cannot be written to.
#![forbid(unsafe_code)]

use engine::{Generation, Snapshot, TextEvent};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::errors::exception;

fn bytes<'py, T: bytemuck::NoUninit>(py: Python<'py>, numbers: &[T]) -> Bound<'py, PyBytes> {
    PyBytes::new(py, bytemuck::cast_slice(numbers))
}

/// As i64, which is what numpy indexes with.
fn indices(numbers: &[usize]) -> Vec<i64> {
    numbers.iter().map(|number| i64::try_from(*number).unwrap_or(i64::MAX)).collect()
}

/// `(kind, payload)`: `("delta", str)`, `("snapshot", dict)`, `("done", dict)`.
///
/// Errors: the request's own.
pub(crate) fn event(py: Python<'_>, event: TextEvent) -> PyResult<Option<(&'static str, Py<PyAny>)>> {
    Ok(Some(match event {
        TextEvent::Delta(text) => ("delta", text.into_pyobject(py)?.into_any().unbind()),
        TextEvent::Snapshot(snapshot) => ("snapshot", self::snapshot(py, &snapshot)?.into_any().unbind()),
        TextEvent::Done(result) => ("done", self::result(py, &result)?.into_any().unbind()),
        // A kind that the engine has and this package does not.
        _ => return Ok(None),
    }))
}

fn snapshot<'py>(py: Python<'py>, snapshot: &Snapshot) -> PyResult<Bound<'py, PyDict>> {
    let fields = PyDict::new(py);
    fields.set_item("stage", snapshot.stage)?;
    fields.set_item("step", snapshot.step)?;
    fields.set_item("text", &snapshot.text)?;
    fields.set_item("positions", bytes(py, &indices(&snapshot.positions)))?;
    fields.set_item("tokens", &snapshot.tokens)?;
    fields.set_item("pieces", &snapshot.pieces)?;
    fields.set_item("confidence", bytes(py, &snapshot.confidence))?;
    fields.set_item("remasked", bytes(py, &indices(&snapshot.remasked)))?;
    Ok(fields)
}

/// A finished text.
///
/// Errors: the request's own.
pub(crate) fn result<'py>(py: Python<'py>, result: &engine::Result<Generation>) -> PyResult<Bound<'py, PyDict>> {
    let generation = result.as_ref().map_err(exception)?;
    let output = &generation.output;
    let revealed_at: Vec<[u32; 2]> = output.revealed_at.iter().map(|(stage, step)| [u32::from(*stage), *step]).collect();
    let fields = PyDict::new(py);
    fields.set_item("text", &generation.text)?;
    fields.set_item("draft", &generation.draft)?;
    fields.set_item("finish", output.finish.name())?;
    fields.set_item("pieces", generation.pieces())?;
    fields.set_item("tokens", bytes(py, &output.tokens))?;
    fields.set_item("draft_tokens", bytes(py, &output.draft))?;
    fields.set_item("positions", bytes(py, &indices(&output.positions)))?;
    fields.set_item("canvas", bytes(py, &output.canvas))?;
    fields.set_item("confidence", bytes(py, &output.confidence))?;
    fields.set_item("log_prob", bytes(py, &output.log_prob))?;
    fields.set_item("revealed_at", bytes(py, &revealed_at))?;
    fields.set_item("as_json", serde_json::to_string(generation).unwrap_or_default())?;
    Ok(fields)
}
