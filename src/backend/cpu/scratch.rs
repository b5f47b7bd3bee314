//! Scratch memory of the worker threads: packed tiles, padded planes. Kept per thread between
//! calls, so that a steady stream of frames causes no allocation and no page fault.

use std::cell::RefCell;

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Hands `work` a buffer of `len` elements with arbitrary contents, aligned to 64 bytes.
/// Calls may nest: each level gets memory of its own.
pub fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    const ALIGN: usize = 16;
    let mut buffer = SCRATCH.with_borrow_mut(|free| free.pop()).unwrap_or_default();
    if buffer.len() < len + ALIGN {
        buffer.resize(len + ALIGN, 0.0);
    }
    let skip = buffer.as_ptr().align_offset(64);
    let result = work(&mut buffer[skip..skip + len]);
    SCRATCH.with_borrow_mut(|free| free.push(buffer));
    result
}
