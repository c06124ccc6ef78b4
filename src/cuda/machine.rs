//! What every launcher stands on: a driver, the functions loaded so far, and the workspace that ops share.
//!
//! Ops run one after the other on one stream, so one workspace serves them all; whoever needs more makes it grow, which moves it and so
//! outdates every recorded graph (see [`Machine::generation`]).
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use super::driver::{Address, Build, Driver, Function, Launch};
use super::params::Params;
use crate::error::Result;

/// 32-bit counters that are zero before and after every op, for CTAs that agree on who comes last.
pub const COUNTERS: usize = 1 << 16;

/// A driver with its loaded functions and shared memory areas.
pub struct Machine {
    pub driver: Box<dyn Driver>,
    functions: RefCell<HashMap<(Build, &'static str), Function>>,
    workspace: Cell<(Address, usize)>,
    counters: Cell<Address>,
    generation: Cell<u64>,
}

impl Machine {
    pub fn new(driver: Box<dyn Driver>) -> Result<Machine> {
        let counters = driver.alloc(4 * COUNTERS)?;
        driver.fill(counters, 0, COUNTERS)?;
        Ok(Machine {
            driver,
            functions: RefCell::new(HashMap::new()),
            workspace: Cell::new((0, 0)),
            counters: Cell::new(counters),
            generation: Cell::new(0),
        })
    }

    /// Memory for the inside of one op, at least `bytes`, of undefined content; the next op may overwrite it.
    pub fn workspace(&self, bytes: usize) -> Result<Address> {
        let (address, size) = self.workspace.get();
        if bytes <= size {
            return Ok(address);
        }
        // Freed first, so that old and new never exist together. Half as much again: lengths grow a little at a time.
        if size > 0 {
            self.driver.free(address);
        }
        self.workspace.set((0, 0));
        self.generation.set(self.generation.get() + 1);
        let size = bytes.max(1 << 20).next_multiple_of(1 << 20);
        let address = self.driver.alloc(size)?;
        self.workspace.set((address, size));
        Ok(address)
    }

    /// [`COUNTERS`] zeros. A kernel that counts in them leaves zeros behind.
    pub fn counters(&self) -> Address {
        self.counters.get()
    }

    /// Changes whenever an address that recorded launches may hold has moved.
    pub fn generation(&self) -> u64 {
        self.generation.get()
    }

    /// Launches `entry` of a build with its params struct; compiles and loads it at its first use. An empty grid is no launch.
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
        self.driver.launch(function, launch, params.bytes())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.workspace.get().1 > 0 {
            self.driver.free(self.workspace.get().0);
        }
        self.driver.free(self.counters.get());
    }
}
