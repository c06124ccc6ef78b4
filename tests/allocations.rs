//! Allocations of the steady state: what a step of a draft asks of the allocator, once its buffers
//! have grown.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use redraft::{Device, Engine, Options, WeightFormat};

/// The system's allocator, which counts.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is the system allocator's condition.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the system allocator's condition.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is the system allocator's condition.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What the host asks for in a step that neither begins nor ends a block: lists of its rows and
/// draws, what sampling keeps of a row, and messages, which leave with the client. Layers add
/// nothing: the model that ships has ten, and one list a layer would exceed this.
const HOST: usize = 88;

#[test]
fn layers_allocate_nothing() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/redraft-stories-10m");
    for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Q4] {
        let mut engine = Engine::builder(&model).device(Device::Cpu).threads(1).weights(format).open().expect("the model that ships");
        let handle = engine.submit("Once upon a time", Options::default().length(96).preset("draft")).expect("a request");
        let mut counts = Vec::new();
        loop {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            let more = engine.tick().expect("a step");
            counts.push(ALLOCATIONS.load(Ordering::Relaxed) - before);
            if !more {
                break;
            }
        }
        assert_eq!(handle.wait().expect("a text").output.tokens.len(), 96);
        // Tables of rotations and lists grow in the first blocks.
        let steady = &counts[40..];
        assert!(steady.len() > 40, "{} steps", counts.len());
        assert!(*steady.iter().min().expect("not empty") <= HOST, "{format:?}: {steady:?}");
    }
}
