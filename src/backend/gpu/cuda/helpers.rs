//! Threads that help to copy between a caller's memory and pinned memory: one alone reaches a fraction of
//! what the GPU's copy engine does, which would wait for it.

use std::cell::OnceCell;
use std::num::NonZero;
use std::ops::Range;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use cudarc::driver::result::DriverError;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Bytes of a piece: some 50 us of one thread, and long enough for the copy engine.
const PIECE: usize = 512 << 10;
/// Most threads beside the caller's; to wake one costs it some microseconds.
const MOST: usize = 5;

/// Started when first wanted, asleep between copies. A pool of their own: the one of all may be busy for
/// long.
#[derive(Default)]
pub(super) struct Helpers {
    pool: OnceCell<Option<ThreadPool>>,
}

impl Helpers {
    /// Lets `fill` write all of pinned memory, range by range on several threads, and gives every piece to
    /// `send` on this one as soon as it is full, with the number of its first byte; not again after an
    /// error.
    pub(super) fn fill(
        &self,
        host: &mut [u8],
        fill: impl Fn(Range<usize>, &mut [u8]) + Sync,
        mut send: impl FnMut(usize, &[u8]) -> Result<(), DriverError>,
    ) -> Result<(), DriverError> {
        let pool = if host.len() < 2 * PIECE { None } else { self.pool() };
        let Some(pool) = pool else {
            fill(0..host.len(), host);
            return send(0, host);
        };
        let helpers = pool.current_num_threads().min(host.len().div_ceil(PIECE) - 1);
        let pieces = Mutex::new(host.chunks_mut(PIECE).enumerate());
        let next = || {
            let next = pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
            next.map(|(index, piece)| {
                let start = index * PIECE;
                fill(start..start + piece.len(), piece);
                (start, &*piece)
            })
        };
        pool.in_place_scope(|scope| {
            let (full, ready) = mpsc::channel();
            for _ in 0..helpers {
                let (full, next) = (full.clone(), &next);
                scope.spawn(move |_| {
                    while let Some(piece) = next() {
                        // Nobody listens any more after an error.
                        let _ = full.send(piece);
                    }
                });
            }
            drop(full);
            loop {
                // What others have filled goes first: the copy engine must not wait.
                for (start, piece) in ready.try_iter() {
                    send(start, piece)?;
                }
                let Some((start, piece)) = next() else { break };
                send(start, piece)?;
            }
            ready.iter().try_for_each(|(start, piece)| send(start, piece))
        })
    }

    /// Copies out of pinned memory, as much as there is room for.
    pub(super) fn copy(&self, from: &[u8], to: &mut [u8]) {
        let from = &from[..to.len()];
        let pool = if to.len() < 2 * PIECE { None } else { self.pool() };
        let Some(pool) = pool else { return to.copy_from_slice(from) };
        let helpers = pool.current_num_threads().min(to.len().div_ceil(PIECE) - 1);
        let pieces = Mutex::new(to.chunks_mut(PIECE).zip(from.chunks(PIECE)));
        let work = || {
            let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
            while let Some((to, from)) = next() {
                to.copy_from_slice(from);
            }
        };
        pool.in_place_scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|_| work());
            }
            work();
        });
    }

    /// None where there is a single core, or no thread to be had.
    fn pool(&self) -> Option<&ThreadPool> {
        let start = || {
            let cores = thread::available_parallelism().map_or(1, NonZero::get);
            let threads = MOST.min(cores - 1);
            let name = |i| format!("fpenet-copy-{i}");
            let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(name);
            // Zero threads would be as many as there are cores.
            (threads > 0).then(|| pool.build().ok()).flatten()
        };
        self.pool.get_or_init(start).as_ref()
    }
}

#[cfg(test)]
mod tests {
    use cudarc::driver::sys::CUresult;

    use super::*;

    #[test]
    fn every_byte_is_filled_and_sent_once_whatever_the_length() {
        let helpers = Helpers::default();
        for len in [0, 1, PIECE, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 1, 9 * PIECE + 77] {
            let source: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8).collect();
            let (mut host, mut device) = (vec![0; len], vec![0; len]);
            let mut sent = 0;
            let fill = |range: Range<usize>, to: &mut [u8]| to.copy_from_slice(&source[range]);
            let send = |start: usize, piece: &[u8]| {
                device[start..start + piece.len()].copy_from_slice(piece);
                sent += piece.len();
                Ok(())
            };
            helpers.fill(&mut host, fill, send).unwrap();
            assert!(sent == len && device == source, "{len}");
            let mut back = vec![0; len];
            helpers.copy(&device, &mut back);
            assert!(back == source, "{len}");
        }
    }

    #[test]
    fn nothing_is_sent_after_an_error() {
        let mut calls = 0;
        let send = |_: usize, _: &[u8]| {
            calls += 1;
            Err(DriverError(CUresult::CUDA_ERROR_UNKNOWN))
        };
        let result = Helpers::default().fill(&mut vec![0; 20 * PIECE], |_, to| to.fill(1), send);
        assert!(result.is_err() && calls == 1);
    }
}
