//! Threads. One call runs numbered tasks on the calling thread and the workers and returns
//! when all are done.
//!
//! Each thread starts on its own share of the tasks, so repeated calls find the same weights in the
//! same core's cache, and steals from the others when it is through. A worker that is asleep or
//! descheduled is not waited for: the caller takes its share and closes the job. Which thread runs
//! a task never shows in a result: tasks write disjoint places.
//!
//! Why not rayon: on quiet cores entering it costs 16 us a loop, here about 1 us, and a draft step
//! of a small model has some fifty loops, since every op enters the pool by itself. Entered once
//! for a whole step rayon still takes 1.3 times as long on a small model, and as long on a large
//! one (benches/pool.rs, and benches/reports/2026-11-27-pool-rayon.md).
//!
//! Also contains the safe ways to write disjoint parts of one buffer: [`Pool::chunks`],
//! [`Pool::chunks_of_two`] and [`Pool::tiles`].

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker polls before it sleeps. Waking a sleeper costs the caller a few
/// microseconds and the worker some tens, so it should stay awake between the ops of a forward, and
/// no longer: the core may be wanted by others.
const POLL: Duration = Duration::from_micros(100);

/// Jobs are numbered in the bits above this; below lie the open bit and the count of workers
/// inside.
const JOB_SHIFT: u32 = 16;
const OPEN: u64 = 1 << 15;
const INSIDE: u64 = OPEN - 1;

type Task<'a> = dyn Fn(usize) + Sync + 'a;
type TwoChunks<'a, T> = dyn Fn(usize, &mut [T], &mut [T]) + Sync + 'a;

/// A value alone on its cache line pair (adjacent-line prefetch).
#[repr(align(128))]
struct Padded<T>(T);

/// One thread's share of the tasks of the current job.
struct Share {
    next: AtomicUsize,
    end: AtomicUsize,
}

struct Shared {
    /// `job << JOB_SHIFT | OPEN | workers inside`.
    state: Padded<AtomicU64>,
    /// Written by the caller while the job is closed and empty, read by workers inside.
    task: UnsafeCell<Option<*const Task<'static>>>,
    shares: Vec<Padded<Share>>,
    sleeping: Vec<Padded<AtomicBool>>,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `task` is the only field that is not already Send and Sync. It is written in `Pool::run`
// under the `caller` lock before the job opens (release) and read by workers after they entered an
// open job (acquire); `run` does not return, and so the closure that the pointer refers to (itself
// Sync) does not end, until the job is closed and empty.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Runs tasks until none are left, own share first.
    fn work(&self, thread: usize, task: &Task) {
        let num = self.shares.len();
        for i in 0..num {
            let share = &self.shares[(thread + i) % num].0;
            let end = share.end.load(Ordering::Relaxed);
            // The load keeps threads from writing a line that has nothing left.
            while share.next.load(Ordering::Relaxed) < end {
                let index = share.next.fetch_add(1, Ordering::Relaxed);
                if index < end {
                    task(index);
                }
            }
        }
    }

    fn work_catching(&self, thread: usize, task: &Task) {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.work(thread, task))) {
            // The other tasks are pointless now.
            for share in &self.shares {
                share.0.next.store(usize::MAX / 2, Ordering::Relaxed);
            }
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }

    fn worker(&self, thread: usize) {
        let mut last_job = 0;
        loop {
            let state = self.wait_for_job(thread, last_job);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            last_job = state >> JOB_SHIFT;
            if self.state.0.compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
                // The job closed, or another worker entered: look again.
                last_job -= 1;
                continue;
            }
            // SAFETY: inside an open job; see `Shared`.
            let task = unsafe { (*self.task.get()).map(|task| &*task) };
            if let Some(task) = task {
                self.work_catching(thread, task);
            }
            self.state.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Polls, then sleeps, until a job after `last_job` is open or the pool stops.
    fn wait_for_job(&self, thread: usize, last_job: u64) -> u64 {
        let ready = |state: u64| state & OPEN != 0 && state >> JOB_SHIFT > last_job;
        let sleeping = &self.sleeping[thread].0;
        loop {
            let start = Instant::now();
            while start.elapsed() < POLL {
                for _ in 0..64 {
                    let state = self.state.0.load(Ordering::Relaxed);
                    if ready(state) || self.stop.load(Ordering::Relaxed) {
                        return state;
                    }
                    std::hint::spin_loop();
                }
            }
            // SeqCst on both sides: either the caller sees the flag, or this thread sees the job.
            sleeping.store(true, Ordering::SeqCst);
            while sleeping.load(Ordering::SeqCst) {
                let state = self.state.0.load(Ordering::SeqCst);
                if ready(state) || self.stop.load(Ordering::SeqCst) {
                    sleeping.store(false, Ordering::SeqCst);
                    return state;
                }
                std::thread::park();
            }
        }
    }
}

/// The calling thread and its workers.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the thread whose job runs. A call of another thread, or one from inside a task, runs
    /// its tasks alone.
    caller: Mutex<()>,
}

impl Pool {
    /// `threads` counts the calling thread. Fails where the system refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Pool> {
        let shared = Arc::new(Shared {
            state: Padded(AtomicU64::new(0)),
            task: UnsafeCell::new(None),
            shares: (0..threads).map(|_| Padded(Share { next: AtomicUsize::new(0), end: AtomicUsize::new(0) })).collect(),
            sleeping: (0..threads).map(|_| Padded(AtomicBool::new(false))).collect(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut pool = Pool { shared, workers: Vec::new(), caller: Mutex::new(()) };
        for thread in 1..threads {
            let shared = pool.shared.clone();
            let worker = std::thread::Builder::new().name(format!("redraft-{thread}")).spawn(move || shared.worker(thread))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads, the calling one included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0)` .. `task(num - 1)`, each once, in any order and on any thread. A panic in a
    /// task comes out here after every thread has left the job; tasks not yet begun are then
    /// skipped.
    pub fn run(&self, num: usize, task: &Task) {
        let guard = if num > 1 && !self.workers.is_empty() { self.caller.try_lock().ok() } else { None };
        let Some(_guard) = guard else {
            (0..num).for_each(task);
            return;
        };
        let shared = &*self.shared;
        let threads = self.threads();
        for (thread, share) in shared.shares.iter().enumerate() {
            share.0.next.store(thread * num / threads, Ordering::Relaxed);
            share.0.end.store((thread + 1) * num / threads, Ordering::Relaxed);
        }
        // SAFETY: only the lifetime changes; this call outlives every use, see `Shared`.
        let erased = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        // SAFETY: the job is closed and empty, and the lock is held: no thread reads.
        unsafe { *shared.task.get() = Some(erased) };
        let job = (shared.state.0.load(Ordering::Relaxed) >> JOB_SHIFT) + 1;
        shared.state.0.store(job << JOB_SHIFT | OPEN, Ordering::SeqCst);
        for (sleeping, worker) in shared.sleeping[1..].iter().zip(&self.workers) {
            if sleeping.0.load(Ordering::SeqCst) && sleeping.0.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        shared.work_catching(0, task);
        shared.state.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut polls = 0u32;
        while shared.state.0.load(Ordering::Acquire) & INSIDE != 0 {
            polls += 1;
            // A worker that holds a task may have lost its core: give way instead of burning this
            // one.
            if polls.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let payload = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = payload {
            drop(_guard);
            resume_unwind(payload);
        }
    }

    /// Runs `body(i, chunk)` for the chunks of `chunk_len` elements of `data`.
    pub fn chunks<T: Send>(&self, data: &mut [T], chunk_len: usize, body: &(dyn Fn(usize, &mut [T]) + Sync)) {
        let len = data.len();
        let base = SendPtr(data.as_mut_ptr());
        self.run(len.div_ceil(chunk_len), &|i| {
            let first = i * chunk_len;
            let base = &base;
            // SAFETY: chunk i covers [first, first + chunk_len) cut at the end; chunks do not
            // overlap, each index runs once and `data` is borrowed mutably for the whole call.
            let chunk = unsafe { std::slice::from_raw_parts_mut(base.0.add(first), chunk_len.min(len - first)) };
            body(i, chunk);
        });
    }

    /// Runs `body(i, chunk, chunk)` for the chunks of two buffers of as many chunks, each given
    /// with the elements of its chunks.
    pub fn chunks_of_two<T: Send>(&self, one: (&mut [T], usize), two: (&mut [T], usize), body: &TwoChunks<'_, T>) {
        let ((one, one_len), (two, two_len)) = (one, two);
        let num = one.len() / one_len;
        assert!(one.len() == num * one_len && two.len() == num * two_len, "{} x {one_len} beside {} x {two_len}", one.len(), two.len());
        let bases = (SendPtr(one.as_mut_ptr()), SendPtr(two.as_mut_ptr()));
        self.run(num, &|i| {
            let bases = &bases;
            // SAFETY: by the assertion chunk i lies in its buffer; chunks do not overlap, each
            // index runs once and both buffers are borrowed mutably for the whole call.
            let (one, two) = unsafe {
                let one = std::slice::from_raw_parts_mut(bases.0.0.add(i * one_len), one_len);
                (one, std::slice::from_raw_parts_mut(bases.1.0.add(i * two_len), two_len))
            };
            body(i, one, two);
        });
    }

    /// Cuts the row-major `data` of `width` columns into tiles at the ascending `row_bounds` and
    /// every `col_step` columns, and runs `body` once for each.
    pub fn tiles<T: Send>(
        &self,
        data: &mut [T],
        width: usize,
        row_bounds: &[usize],
        col_step: usize,
        order: Order,
        body: &(dyn Fn(Tile<'_, T>) + Sync),
    ) {
        assert!(row_bounds.is_sorted(), "row bounds {row_bounds:?} must ascend");
        let Some(last) = row_bounds.last() else { return };
        assert!(last * width <= data.len(), "tiles of {last} rows of {width} exceed {} elements", data.len());
        let num_rows = row_bounds.len() - 1;
        let base = SendPtr(data.as_mut_ptr());
        let num_cols = width.div_ceil(col_step);
        self.run(num_rows * num_cols, &|i| {
            let (row, col) = match order {
                Order::RowsFirst => (i % num_rows, i / num_rows),
                Order::ColumnsFirst => (i / num_cols, i % num_cols),
            };
            let col = col * col_step;
            let base = &base;
            body(Tile {
                base: base.0,
                width,
                rows: row_bounds[row]..row_bounds[row + 1],
                cols: col..(col + col_step).min(width),
                borrow: PhantomData,
            });
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for (sleeping, worker) in self.shared.sleeping[1..].iter().zip(self.workers.drain(..)) {
            sleeping.0.store(false, Ordering::SeqCst);
            worker.thread().unpark();
            // A worker catches the panics of its tasks; there is nothing to report from here.
            let _ = worker.join();
        }
    }
}

struct SendPtr<T>(*mut T);
// SAFETY: threads use it only for the disjoint ranges that `chunks`, `chunks_of_two` and `tiles`
// hand out, of elements that are Send.
unsafe impl<T: Send> Sync for SendPtr<T> {}

/// Which tiles a thread meets one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Those of one column range.
    RowsFirst,
    /// Those of one row range.
    ColumnsFirst,
}

/// An exclusive rectangle of a row-major buffer.
pub struct Tile<'a, T> {
    base: *mut T,
    width: usize,
    /// Rows and columns of the whole buffer that this tile covers.
    pub rows: Range<usize>,
    pub cols: Range<usize>,
    borrow: PhantomData<&'a mut T>,
}

impl<T> Tile<'_, T> {
    /// The tile's part of `row`, a row of the whole buffer.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(self.rows.contains(&row), "row {row} outside the tile's {:?}", self.rows);
        // SAFETY: `Pool::tiles` checked that its rows of `width` lie in the buffer and that tiles
        // do not overlap; `row` is one of this tile's by the assertion, and `&mut self` keeps the
        // result unique.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(row * self.width + self.cols.start), self.cols.len()) }
    }
}
