use std::sync::Mutex;
use std::sync::mpsc;

use super::*;
use crate::config::ModelConfig;
use crate::device::{DeviceChoice, Precision};
use crate::model::Model;
use crate::segment::Settings;
use crate::segment::input::network_size;
use crate::segment::input::normalise;
use crate::stream::colour::Matrix;
use crate::stream::sink::{Container, Format, Show};

const SIZE: (u32, u32) = (24, 16);
const FORMAT: Format =
    Format { show: Show::Labels, container: Container::Raw, fps: (25, 1), matrix: Matrix::Bt601 };

fn model() -> Model {
    let config = ModelConfig { classes: 5, p: 1, q: 1, ..Default::default() };
    Model::init(config, 11).unwrap()
}

fn segmenter(model: &Model) -> Segmenter<'_> {
    let settings = Settings {
        device: DeviceChoice::Cpu,
        precision: Precision::F32,
        threads: Some(1),
        expanded: None,
    };
    Segmenter::new(model, settings).unwrap()
}

fn options(drop_frames: bool) -> Options {
    Options { network: network_size(SIZE, None, None), drop_frames }
}

fn picture(number: u64) -> RgbImage {
    RgbImage::from_fn(SIZE.0, SIZE.1, |x, y| {
        image::Rgb([(x * 10) as u8, (y * 16) as u8, (number * 37) as u8])
    })
}

/// Gives `count` pictures, then the error if there is one.
struct Pictures {
    next: u64,
    count: u64,
    error: Option<Error>,
    /// Told before each picture; the source waits until it answers.
    gate: Option<mpsc::Receiver<()>>,
}

impl Source for Pictures {
    fn size(&self) -> (u32, u32) {
        SIZE
    }

    fn next(&mut self, frame: &mut RgbImage) -> Result<bool> {
        if let Some(gate) = &self.gate {
            let _ = gate.recv();
        }
        if self.next == self.count {
            return self.error.take().map_or(Ok(false), Err);
        }
        *frame = picture(self.next);
        self.next += 1;
        Ok(true)
    }
}

fn pictures(count: u64) -> Pictures {
    Pictures { next: 0, count, error: None, gate: None }
}

fn expected(model: &Model, number: u64) -> Vec<u8> {
    let mut input = Vec::new();
    normalise(&picture(number), model.mean, model.std, &mut input);
    segmenter(model).labels(&input, options(false).network, SIZE).unwrap().into_raw()
}

#[test]
fn every_frame_comes_out_in_order_with_its_labels() {
    let model = model();
    let mut out = Vec::new();
    let sink = Sink::new(&mut out, FORMAT, &model.palette, SIZE).unwrap();
    let mut seen = Vec::new();
    let (status, result) =
        run(Box::new(pictures(40)), &mut segmenter(&model), sink, options(false), |status| {
            seen.push(status.frames)
        });
    result.unwrap();
    assert_eq!((status.frames, status.dropped), (40, 0));
    assert_eq!(seen, (1..=40).collect::<Vec<_>>());
    let frames: Vec<_> = out.chunks_exact((SIZE.0 * SIZE.1) as usize).collect();
    assert_eq!(frames.len(), 40);
    for number in [0, 1, 20, 39] {
        assert_eq!(frames[number as usize], expected(&model, number), "frame {number}");
    }
}

#[test]
fn an_error_of_the_source_comes_after_the_frames_before_it() {
    let model = model();
    let mut out = Vec::new();
    let sink = Sink::new(&mut out, FORMAT, &model.palette, SIZE).unwrap();
    let source = Pictures { error: Some(Error::Failed("cut off".into())), ..pictures(9) };
    let (status, result) =
        run(Box::new(source), &mut segmenter(&model), sink, options(false), |_| {});
    assert_eq!(result.unwrap_err().to_string(), "cut off");
    assert_eq!(status.frames, 9);
    assert_eq!(out.len(), 9 * (SIZE.0 * SIZE.1) as usize);
}

/// An output that takes `room` bytes and then fails.
struct Closing {
    room: usize,
    kind: io::ErrorKind,
}

impl Write for Closing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.room < bytes.len() {
            return Err(self.kind.into());
        }
        self.room -= bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_closed_output_ends_the_stream_even_while_the_source_is_silent() {
    let model = model();
    let frame = (SIZE.0 * SIZE.1) as usize;
    for drop_frames in [false, true] {
        for (kind, fails) in
            [(io::ErrorKind::BrokenPipe, false), (io::ErrorKind::StorageFull, true)]
        {
            let output = Closing { room: frame, kind };
            let sink = Sink::new(output, FORMAT, &model.palette, SIZE).unwrap();
            // Two pictures pass, then the gate stays shut.
            let (open, gate) = mpsc::channel();
            open.send(()).unwrap();
            open.send(()).unwrap();
            let source = Pictures { gate: Some(gate), ..pictures(1000) };
            let (status, result) =
                run(Box::new(source), &mut segmenter(&model), sink, options(drop_frames), |_| {});
            assert_eq!(result.is_err(), fails);
            assert!(status.frames <= 1);
            drop(open);
        }
    }
}

/// An output that waits before each frame until it is told to go on.
struct Slow(Mutex<mpsc::Receiver<()>>);

impl Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.lock().unwrap().recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lets the output write a frame as soon as the one after the next is being read.
struct Ahead(Pictures, mpsc::Sender<()>);

impl Source for Ahead {
    fn size(&self) -> (u32, u32) {
        SIZE
    }

    fn next(&mut self, frame: &mut RgbImage) -> Result<bool> {
        let last = self.0.next == self.0.count;
        for _ in 0..if last { 2 } else { u64::from(self.0.next >= 2) } {
            let _ = self.1.send(());
        }
        self.0.next(frame)
    }
}

/// [`Slow`], but it gives up.
struct Impatient(Mutex<mpsc::Receiver<()>>);

impl Write for Impatient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let told = self.0.lock().unwrap().recv_timeout(Duration::from_secs(20));
        told.map(|()| bytes.len()).map_err(io::Error::other)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn the_next_frames_are_read_while_one_is_being_written() {
    let model = model();
    let (go, wait) = mpsc::channel();
    let sink = Sink::new(Impatient(Mutex::new(wait)), FORMAT, &model.palette, SIZE).unwrap();
    let source = Box::new(Ahead(pictures(12), go));
    let (status, result) = run(source, &mut segmenter(&model), sink, options(false), |_| {});
    result.unwrap();
    assert_eq!(status.frames, 12);
}

#[test]
fn a_live_source_never_waits_and_loses_the_oldest_frames() {
    let model = model();
    let (go, wait) = mpsc::channel();
    let sink = Sink::new(Slow(Mutex::new(wait)), FORMAT, &model.palette, SIZE).unwrap();
    let (asked, asks) = mpsc::channel();

    /// Says when it is asked for a picture.
    struct Live(Pictures, mpsc::Sender<u64>);
    impl Source for Live {
        fn size(&self) -> (u32, u32) {
            SIZE
        }
        fn next(&mut self, frame: &mut RgbImage) -> Result<bool> {
            let _ = self.1.send(self.0.next);
            self.0.next(frame)
        }
    }

    let all = 200;
    let source = Box::new(Live(pictures(all), asked));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The output is stuck until the source has been read to its end.
            while asks.recv().unwrap() < all {}
            drop(go);
        });
        let (status, result) = run(source, &mut segmenter(&model), sink, options(true), |_| {});
        result.unwrap();
        assert_eq!(status.frames + status.dropped, all);
        // What waits in the queues and in the hands of the threads is all that is left.
        assert!(status.frames <= BUFFERS as u64, "{} written", status.frames);
        assert!(status.frames > 0);
    });
}
