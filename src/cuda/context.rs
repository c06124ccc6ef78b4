//! What every launcher needs: a driver, device memory that returns by itself, the functions
//! loaded so far, and the workspace that ops share.
//!
//! Ops run one after the other on one stream, so one workspace serves them all. An op that needs
//! more makes it grow, which moves it and so outdates every recorded graph (see
//! [`CudaContext::generation`]). For the same reason memory that was dropped may be handed out
//! again at once: what was enqueued before is done with it when what is enqueued next begins.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::params::Params;
use crate::cuda::driver::interface::{Address, Build, Driver, Function, Graph, Launch};
use crate::error::Result;

/// 32-bit counters that are zero before and after every op, for CTAs that agree on which of them
/// comes last.
pub const COUNTERS: usize = 1 << 16;

/// Blocks up to this size are kept for the next request of their size instead of being freed, which
/// on a GPU waits for everything.
const KEPT_BYTES: usize = 1 << 20;

/// A block on its way back: where it lies and its size.
type Returned = (Address, usize);

/// Device memory. Dropping it gives it back to its context.
#[derive(Debug)]
pub struct Memory {
    address: Address,
    bytes: usize,
    returned: Sender<Returned>,
}

impl Memory {
    pub fn address(&self) -> Address {
        self.address
    }

    /// At least what was asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A context that is gone took all of its memory with it.
        let _ = self.returned.send((self.address, self.bytes));
    }
}

/// A driver with its loaded functions and shared memory areas.
pub struct CudaContext {
    pub driver: Box<dyn Driver>,
    returned: (Sender<Returned>, Receiver<Returned>),
    kept: RefCell<HashMap<usize, Vec<Address>>>,
    functions: RefCell<HashMap<(Build, &'static str), Function>>,
    workspace: Cell<(Address, usize)>,
    counters: Cell<Address>,
    generation: Cell<u64>,
}

impl CudaContext {
    pub fn new(driver: Box<dyn Driver>) -> Result<CudaContext> {
        let counters = driver.alloc(4 * COUNTERS)?;
        driver.fill(counters, 0, COUNTERS)?;
        Ok(CudaContext {
            driver,
            returned: channel(),
            kept: RefCell::default(),
            functions: RefCell::new(HashMap::new()),
            workspace: Cell::new((0, 0)),
            counters: Cell::new(counters),
            generation: Cell::new(0),
        })
    }

    /// Memory of at least `bytes` bytes, of undefined content.
    pub fn memory(&self, bytes: usize) -> Result<Memory> {
        for (address, bytes) in self.returned.1.try_iter() {
            if bytes <= KEPT_BYTES {
                self.kept.borrow_mut().entry(bytes).or_default().push(address);
            } else {
                self.driver.free(address);
            }
        }
        let bytes = if bytes <= KEPT_BYTES { bytes.next_power_of_two().max(256) } else { bytes.next_multiple_of(256) };
        let kept = self.kept.borrow_mut().get_mut(&bytes).and_then(Vec::pop);
        let address = match kept {
            Some(address) => address,
            None => self.driver.alloc(bytes)?,
        };
        Ok(Memory { address, bytes, returned: self.returned.0.clone() })
    }

    /// Memory for the inside of one op, at least `bytes`, of undefined content; the next op may
    /// overwrite it.
    pub fn workspace(&self, bytes: usize) -> Result<Address> {
        let (address, size) = self.workspace.get();
        if bytes <= size {
            return Ok(address);
        }
        // Freed first, so that old and new never exist together; in whole megabytes, since lengths
        // grow a little at a time.
        if size > 0 {
            self.driver.free(address);
        }
        self.workspace.set((0, 0));
        self.moved();
        let size = bytes.max(1 << 20).next_multiple_of(1 << 20);
        let address = self.driver.alloc(size)?;
        self.workspace.set((address, size));
        Ok(address)
    }

    /// [`COUNTERS`] zeros. A kernel that counts in them leaves zeros.
    pub fn counters(&self) -> Address {
        self.counters.get()
    }

    /// Something that recorded launches may hold an address of has moved.
    pub fn moved(&self) {
        self.generation.set(self.generation.get() + 1);
    }

    /// Changes whenever an address that recorded launches may hold has moved.
    pub fn generation(&self) -> u64 {
        self.generation.get()
    }

    /// Records what `body` launches, to be replayed whenever it would launch the same again.
    ///
    /// Errors: those of `body` and of the driver; what was recorded until then is discarded.
    ///
    /// # Panics
    /// If `body` moves memory that recorded launches hold addresses of: a replay would read what is
    /// no longer there. Callers run a step once before they record it, so that everything has grown
    /// to its size.
    pub fn record(&self, body: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let before = self.generation();
        self.driver.begin_capture()?;
        let launched = body();
        let graph = self.driver.end_capture()?;
        if let Err(error) = launched {
            self.driver.drop_graph(graph);
            return Err(error);
        }
        assert_eq!(self.generation(), before, "memory moved while a step was recorded");
        Ok(graph)
    }

    /// Launches `entry` of a build with its params struct; compiles and loads it at its first use.
    /// An empty grid is no launch.
    pub fn launch<P: Params>(&self, build: Build, entry: &'static str, launch: Launch, params: &P) -> Result<()> {
        if launch.is_empty() {
            return Ok(());
        }
        assert!(launch.grid[1] <= 65_535 && launch.grid[2] <= 65_535, "{entry}: grid {:?}", launch.grid);
        let known = self.functions.borrow().get(&(build.clone(), entry)).copied();
        let function = match known {
            Some(function) => function,
            None => {
                let function = self.driver.function(&build, entry)?;
                self.functions.borrow_mut().insert((build, entry), function);
                function
            }
        };
        self.driver.push_range(entry);
        let outcome = self.driver.launch(function, launch, params.bytes());
        self.driver.pop_range();
        outcome
    }
}

impl Drop for CudaContext {
    fn drop(&mut self) {
        if self.workspace.get().1 > 0 {
            self.driver.free(self.workspace.get().0);
        }
        self.driver.free(self.counters.get());
        let kept = self.kept.get_mut().values().flatten().copied();
        kept.chain(self.returned.1.try_iter().map(|(address, _)| address)).for_each(|address| self.driver.free(address));
    }
}
