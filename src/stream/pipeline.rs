//! Decode, compute and encode at the same time: three threads in a row with short queues. The
//! middle one submits the next frame to a GPU before it collects the labels of the one before.
//!
//! Frames live in a fixed set of buffers that go round: from the free ones to the reader, through
//! the network, to the writer and back. Memory does not depend on the length of the stream.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded, select};
use image::{GrayImage, RgbImage};

use super::STDOUT;
use super::latency::Latency;
use super::sink::Sink;
use super::source::Source;
use crate::error::{Error, Result};
use crate::segment::Segmenter;
use crate::segment::input::{NetworkSize, check_memory, resize};

/// Frames that wait in each queue.
const QUEUE: usize = 2;
/// Frames that a GPU works on at once: one, and the next one's copies.
const UNDER_WAY: usize = 2;
/// Buffers: two full queues, and what each thread has in its hands.
const BUFFERS: usize = 2 * QUEUE + UNDER_WAY + 2;

/// How the stream is run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Size at which the network runs.
    pub network: NetworkSize,
    /// For live sources: when the network does not keep up, drop the oldest frame that waits for
    /// it instead of making the source wait.
    pub drop_frames: bool,
}

/// How far the stream is.
#[derive(Debug, Clone)]
pub struct Status {
    /// Frames written.
    pub frames: u64,
    /// Frames dropped.
    pub dropped: u64,
    /// Time since the start.
    pub elapsed: Duration,
    /// From a frame read to its result written.
    pub latency: Latency,
    /// Whether the reader of the output went away.
    pub output_closed: bool,
}

/// One frame on its way, and its buffers.
struct Frame {
    photo: RgbImage,
    /// The photo at the network's size, where that is another.
    resized: Option<RgbImage>,
    labels: GrayImage,
    read: Instant,
}

/// What the reader hands on.
enum Read {
    Frame(Frame),
    /// The end of the source, or why there is no more.
    End(Result<()>),
}

/// Runs a stream to its end. `report` hears of every frame that was written, on another thread.
/// A reader of the output that goes away ends the stream without an error.
///
/// Returns the last status, and how the stream ended: all frames before an error are written.
///
/// # Errors
/// [`Error::Io`] naming the input or the output, [`Error::Format`] for a frame that is cut short or not
/// what the header promised, or what the device said.
pub fn run<W: Write + Send>(
    source: Box<dyn Source>,
    segmenter: &mut Segmenter,
    mut sink: Sink<W>,
    options: Options,
    mut report: impl FnMut(&Status) + Send,
) -> (Status, Result<()>) {
    let start = Instant::now();
    let size = source.size();
    let (to_network, from_reader) = bounded(QUEUE);
    let (to_writer, from_network) = bounded(QUEUE);
    let (to_free, from_free) = bounded(BUFFERS);
    let shared = Arc::new(Shared::default());
    let mut status = Status {
        frames: 0,
        dropped: 0,
        elapsed: Duration::ZERO,
        latency: Latency::default(),
        output_closed: false,
    };
    if let Err(error) = check_memory(options.network) {
        return (status, Err(error));
    }
    for _ in 0..BUFFERS {
        let frame = Frame {
            photo: RgbImage::new(size.0, size.1),
            resized: None,
            labels: GrayImage::new(size.0, size.1),
            read: start,
        };
        to_free.send(frame).expect("room for all buffers");
    }

    let reader = Reader {
        source,
        options,
        free: from_free,
        queue: to_network,
        oldest: options.drop_frames.then(|| from_reader.clone()),
        shared: shared.clone(),
    };
    // Not joined: it may wait for a source that sends nothing any more while the output is closed.
    std::thread::spawn(move || reader.run());

    let (computed, written) = std::thread::scope(|scope| {
        let status = &mut status;
        let shared = &shared;
        // Disconnects when the writer ends, so that nobody waits for a frame that is not wanted.
        let (writing, writer_ended) = bounded::<()>(0);
        let writer = scope.spawn(move || {
            let _writing = writing;
            let result = write_all(&from_network, &to_free, &mut sink, |frame: &Frame| {
                status.frames += 1;
                status.dropped = shared.dropped.load(Ordering::Relaxed);
                status.elapsed = start.elapsed();
                status.latency.record(frame.read.elapsed());
                report(status);
            });
            shared.stop.store(true, Ordering::Relaxed);
            result
        });
        let computing = Computing {
            segmenter,
            network: options.network,
            writer: &to_writer,
            under_way: VecDeque::new(),
        };
        let computed = computing.run(&from_reader, &writer_ended);
        shared.stop.store(true, Ordering::Relaxed);
        drop(to_writer);
        (computed, writer.join())
    });
    status.dropped = shared.dropped.load(Ordering::Relaxed);
    status.elapsed = start.elapsed();
    let written = written.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    status.output_closed = matches!(written, Ok(Written::UntilClosed));
    (status, written.and(computed))
}

/// What the threads tell each other besides the queues.
#[derive(Default)]
struct Shared {
    /// Nobody takes frames any more.
    stop: AtomicBool,
    dropped: AtomicU64,
}

struct Reader {
    source: Box<dyn Source>,
    options: Options,
    free: Receiver<Frame>,
    queue: Sender<Read>,
    /// The network's end of the queue, to take back the oldest frame.
    oldest: Option<Receiver<Read>>,
    shared: Arc<Shared>,
}

impl Reader {
    fn run(mut self) {
        // A buffer that came back from the queue.
        let mut spare = None;
        loop {
            let Some(mut frame) = spare.take().or_else(|| self.buffer()) else { return };
            let filled = match self.source.next(&mut frame.photo) {
                Ok(true) => self.prepare(&mut frame),
                Ok(false) => return self.end(Ok(())),
                Err(error) => Err(error),
            };
            if let Err(error) = filled {
                return self.end(Err(error));
            }
            match self.hand_on(frame) {
                Ok(dropped) => spare = dropped,
                Err(Gone) => return,
            }
        }
    }

    /// A free buffer; for a live source the oldest waiting frame's where none is free.
    fn buffer(&self) -> Option<Frame> {
        if let Some(oldest) = &self.oldest
            && self.free.is_empty()
            && let Ok(Read::Frame(frame)) = oldest.try_recv()
        {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return Some(frame);
        }
        self.free.recv().ok()
    }

    fn prepare(&self, frame: &mut Frame) -> Result<()> {
        frame.read = Instant::now();
        let NetworkSize { width, height, .. } = self.options.network;
        if frame.photo.dimensions() != (width as u32, height as u32) {
            frame.resized = Some(resize(&frame.photo, width, height)?);
        }
        Ok(())
    }

    /// Queues a frame; for a live source it never waits, and gives back a frame that it dropped.
    fn hand_on(&self, frame: Frame) -> Result<Option<Frame>, Gone> {
        let Some(oldest) = &self.oldest else {
            return self.queue.send(Read::Frame(frame)).map(|()| None).map_err(|_| Gone);
        };
        let (mut next, mut dropped) = (Read::Frame(frame), None);
        loop {
            // This thread holds both ends, so that the channel does not tell.
            if self.shared.stop.load(Ordering::Relaxed) {
                return Err(Gone);
            }
            match self.queue.try_send(next) {
                Ok(()) => return Ok(dropped),
                Err(TrySendError::Full(back)) => {
                    next = back;
                    if let Ok(Read::Frame(frame)) = oldest.try_recv() {
                        self.shared.dropped.fetch_add(1, Ordering::Relaxed);
                        dropped = Some(frame);
                    }
                }
                Err(TrySendError::Disconnected(_)) => return Err(Gone),
            }
        }
    }

    fn end(self, result: Result<()>) {
        // The queue empties or is gone; a live source's own end of it must not keep it open.
        drop(self.oldest);
        let _ = self.queue.send(Read::End(result));
    }
}

/// Nobody takes frames any more.
struct Gone;

/// The middle thread.
struct Computing<'a, 'm> {
    segmenter: &'a mut Segmenter<'m>,
    network: NetworkSize,
    writer: &'a Sender<Frame>,
    under_way: VecDeque<Frame>,
}

impl Computing<'_, '_> {
    /// Ends without an error where the writer does, which has its own reason.
    fn run(mut self, frames: &Receiver<Read>, writer_ended: &Receiver<()>) -> Result<()> {
        loop {
            let next = if self.under_way.is_empty() {
                select! {
                    recv(frames) -> read => read.map_err(|_| TryRecvError::Disconnected),
                    recv(writer_ended) -> _ => return Ok(()),
                }
            } else {
                // While the next frame is being read, the one under way is not kept waiting.
                frames.try_recv()
            };
            let handed_on = match next {
                Ok(Read::Frame(frame)) => self.submit(frame)?,
                Ok(Read::End(result)) => return self.finish().and(result),
                Err(TryRecvError::Empty) => self.collect()?,
                // The reader always says how it ends, unless it panics.
                Err(TryRecvError::Disconnected) => {
                    return Err(Error::Failed("the input's thread ended early".into()));
                }
            };
            if handed_on.is_err() {
                return Ok(());
            }
        }
    }

    fn submit(&mut self, frame: Frame) -> Result<Result<(), Gone>> {
        let size = frame.photo.dimensions();
        while self.under_way.len() == UNDER_WAY || !self.segmenter.has_room(self.network, size) {
            if self.collect()?.is_err() {
                return Ok(Err(Gone));
            }
        }
        let pixels = frame.resized.as_ref().unwrap_or(&frame.photo);
        self.segmenter.submit(pixels, self.network, size)?;
        self.under_way.push_back(frame);
        Ok(Ok(()))
    }

    /// Hands the frame that was submitted first to the writer.
    fn collect(&mut self) -> Result<Result<(), Gone>> {
        let Some(mut frame) = self.under_way.pop_front() else { return Ok(Ok(())) };
        self.segmenter.collect_into(&mut frame.labels)?;
        Ok(self.writer.send(frame).map_err(|_| Gone))
    }

    fn finish(&mut self) -> Result<()> {
        while !self.under_way.is_empty() && self.collect()?.is_ok() {}
        Ok(())
    }
}

/// How the output ended, where it did without an error.
enum Written {
    ToTheEnd,
    UntilClosed,
}

fn write_all<W: Write>(
    frames: &Receiver<Frame>,
    free: &Sender<Frame>,
    sink: &mut Sink<W>,
    mut written: impl FnMut(&Frame),
) -> Result<Written> {
    for frame in frames {
        match sink.write(&frame.photo, &frame.labels) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(Written::UntilClosed),
            Err(e) => return Err(Error::io("cannot write", STDOUT, e)),
        }
        written(&frame);
        let _ = free.send(frame); // fails where the reader has ended
    }
    Ok(Written::ToTheEnd)
}

#[cfg(test)]
#[path = "pipeline_tests.rs"]
mod tests;
