//! Which way a product is computed: by our own kernel, or by a vendor's library where the caller asked for that and it was measured faster.
//!
//! The library sums in another order for another number of rows, so its use is opt-in (`REDRAFT_CUBLASLT=1`, or
//! [`Cuda::set_cublaslt`](super::Cuda::set_cublaslt)) and waives the law that a row's bits depend on its own sequence alone, for products of
//! more than [`FEW_ROWS`] rows. The first product of a kind is computed both ways on the machine itself; the times are kept on disk, so that
//! the choice is the same in the next process. Whatever goes wrong with the library ends its use, with the reason kept for reports.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::env;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::cache::Cache;
use super::driver::Blas;
use super::kernels::kernel;
use super::linear::{self, Linear};
use super::machine::Machine;
use crate::backend::{DType, Epilogue};
use crate::error::Result;

/// Up to here the weight streams through once, which our kernel does as fast as memory allows.
const FEW_ROWS: u32 = 64;

/// Runs before the clock, and under it; the best counts, since whatever disturbs a run makes it longer.
const WARM_UPS: usize = 2;
const RUNS: usize = 5;

/// Extension of the file that keeps times: JSON, and the sixteen bytes that every entry of the cache ends with.
const EXTENSION: &str = "tuned";

/// Both ways of one kind of product, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Times {
    ours_us: f64,
    /// None where the library has no such product.
    library_us: Option<f64>,
}

impl Times {
    fn library_is_faster(&self) -> bool {
        self.library_us.is_some_and(|library| library < self.ours_us)
    }
}

/// Times by kind of product, and where they are kept.
struct Record {
    cache: Cache,
    key: String,
    times: BTreeMap<String, Times>,
}

impl Record {
    /// What was measured earlier on the same device with the same library, driver and sources of ours; nothing where that is damaged.
    fn open(library: &str) -> Record {
        let key = format!("linear-or-{library}-{:016x}", kernel("linear").hash);
        let mut record = Record { cache: Cache::open(), key, times: BTreeMap::new() };
        record.times = record.kept();
        record
    }

    fn kept(&self) -> BTreeMap<String, Times> {
        let bytes = self.cache.get(&self.key, EXTENSION).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    fn keep(&mut self, kind: String, times: Times) {
        self.times.insert(kind, times);
        // Another process may have measured other kinds meanwhile. A directory that cannot be written costs a measurement per process.
        let mut all = self.kept();
        all.extend(self.times.clone());
        let text = serde_json::to_vec_pretty(&all).expect("strings and numbers");
        let _ = self.cache.put(&self.key, EXTENSION, &[&text[..], b"\n"].concat());
    }
}

/// Whether a library computes products, and what is known about it.
enum Way {
    Ours,
    /// A library is wanted and was not looked for yet.
    Asked,
    /// It is there.
    Library(Record),
    /// It is not, or failed.
    Refused(String),
}

/// The choice of a machine.
pub(super) struct Products(RefCell<Way>);

impl Products {
    /// As the environment says.
    pub(super) fn new() -> Products {
        let products = Products(RefCell::new(Way::Ours));
        products.ask(env::var_os("REDRAFT_CUBLASLT").is_some_and(|value| value == "1"));
        products
    }

    /// Whether a library is wanted. What was measured is on disk, and a failure stays one while the wish lasts.
    pub(super) fn ask(&self, wanted: bool) {
        let mut way = self.0.borrow_mut();
        match (&*way, wanted) {
            (Way::Ours, true) => *way = Way::Asked,
            (_, false) => *way = Way::Ours,
            (_, true) => {}
        }
    }

    /// For reports, behind the name of the machine.
    pub(super) fn describe(&self) -> String {
        match &*self.0.borrow() {
            Way::Ours => String::new(),
            Way::Asked | Way::Library(_) => format!(", cuBLASLt where faster above {FEW_ROWS} rows"),
            Way::Refused(reason) => format!(", no cuBLASLt: {reason}"),
        }
    }

    fn refuse(&self, reason: String) {
        *self.0.borrow_mut() = Way::Refused(reason);
    }

    fn times(&self, kind: &str) -> Option<Times> {
        match &*self.0.borrow() {
            Way::Library(record) => record.times.get(kind).copied(),
            _ => None,
        }
    }
}

/// What is timed once: products whose rows round up to the same power of two are taken to be alike.
fn kind(op: &Linear) -> String {
    let Linear { rows, n, k, out_dtype, .. } = *op;
    let epilogue = match op.epilogue {
        Epilogue::Store => "store",
        Epilogue::Gelu => "gelu",
        Epilogue::Add => "add",
        Epilogue::SwiGlu => "swiglu",
    };
    let bias = if op.bias.is_some() { ", bias" } else { "" };
    format!("rows up to {}, n {n}, k {k}, {epilogue}{bias}, {}", u64::from(rows).next_power_of_two(), out_dtype.name())
}

/// Enqueues the product by the library if that is wanted, known to be faster, and works; says whether it did.
pub(super) fn by_library(machine: &Machine, op: &Linear) -> Result<bool> {
    let (products, driver) = (&machine.products, &machine.driver);
    if op.dtype != DType::Bf16 || op.rows <= FEW_ROWS || matches!(*products.0.borrow(), Way::Ours | Way::Refused(_)) {
        return Ok(false);
    }
    let kind = kind(op);
    let known = products.times(&kind);
    // Nothing is opened or timed while launches are being recorded.
    if known.is_none() && driver.is_capturing() {
        return Ok(false);
    }
    let blas = match driver.blas() {
        Ok(blas) => blas,
        Err(reason) => {
            products.refuse(reason);
            return Ok(false);
        }
    };
    if matches!(*products.0.borrow(), Way::Asked) {
        *products.0.borrow_mut() = Way::Library(Record::open(&blas.identity()));
    }
    let times = match known.or_else(|| products.times(&kind)) {
        Some(times) => times,
        // Without room for a second output there is nothing to compare; the next product may find some.
        None => match measure(machine, op, blas)? {
            None => return Ok(false),
            Some(Err(reason)) => {
                products.refuse(reason);
                return Ok(false);
            }
            Some(Ok(times)) => {
                if let Way::Library(record) = &mut *products.0.borrow_mut() {
                    record.keep(kind, times);
                }
                times
            }
        },
    };
    if !times.library_is_faster() {
        return Ok(false);
    }
    Ok(blas.product(op).unwrap_or_else(|reason| {
        products.refuse(reason);
        false
    }))
}

/// Times both ways into an output of their own: Add would add every time. None where there is no memory for it, and the library's reason
/// where it fails.
fn measure(machine: &Machine, op: &Linear, blas: &dyn Blas) -> Result<Option<std::result::Result<Times, String>>> {
    let bytes = op.rows as usize * op.n as usize * op.out_dtype.bytes();
    let Ok(out) = machine.memory(bytes) else { return Ok(None) };
    machine.driver.fill(out.address(), 0, bytes / 4)?;
    let op = Linear { out: out.address(), ..*op };
    let mut reason = None;
    let library_us = best_us(machine, || {
        Ok(blas.product(&op).unwrap_or_else(|failed| {
            reason = Some(failed);
            false
        }))
    })?;
    if let Some(reason) = reason {
        return Ok(Some(Err(reason)));
    }
    let ours_us = best_us(machine, || linear::ours(machine, &op).map(|()| true))?.expect("our kernel computes every product");
    Ok(Some(Ok(Times { ours_us, library_us })))
}

/// The shortest of the runs of `enqueue`; None once it does not.
fn best_us(machine: &Machine, mut enqueue: impl FnMut() -> Result<bool>) -> Result<Option<f64>> {
    let mut best = f64::INFINITY;
    machine.driver.synchronize()?;
    for run in 0..WARM_UPS + RUNS {
        let start = Instant::now();
        if !enqueue()? {
            return Ok(None);
        }
        machine.driver.synchronize()?;
        if run >= WARM_UPS {
            best = best.min(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(Some(best))
}
