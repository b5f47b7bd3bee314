//! The thread that owns the device: photos are segmented one after another.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, unbounded};
use hyper::body::Bytes;
use image::ExtendedColorType;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::error::{Error, Result};
use crate::model::Model;
use crate::segment::decode::decode_bytes;
use crate::segment::input::NetworkSize;
use crate::segment::pipeline::{Content, encode_png, network_input};
use crate::segment::{Segmenter, Settings};

/// What the worker is to make of a photo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Its label map.
    Labels,
    /// The photo itself, upright and as PNG, for formats that the browser cannot show.
    Photo,
}

/// A photo on its way through the worker.
pub struct Job {
    /// What to make of it.
    pub task: Task,
    /// The file, whole.
    pub bytes: Bytes,
    /// Its name, for messages.
    pub name: String,
    /// Held until the work is done, even where nobody waits for the answer any more.
    pub slot: OwnedSemaphorePermit,
}

/// What was made of a photo.
pub struct Done {
    /// The result as PNG.
    pub png: Vec<u8>,
    /// Size at which the network ran, for [`Task::Labels`].
    pub network: Option<NetworkSize>,
    /// Stages in order, with the time that each took.
    pub stages: Vec<(&'static str, Duration)>,
}

type Answer = oneshot::Sender<Result<Done>>;

/// Handle of the thread.
pub struct Worker {
    jobs: Sender<(Job, Answer)>,
    device: (&'static str, String),
    thread: JoinHandle<()>,
}

/// What requests hold of the worker.
#[derive(Clone)]
pub struct Queue(Sender<(Job, Answer)>);

impl Worker {
    /// Starts the thread and waits until its device is open.
    ///
    /// # Errors
    /// What opening the device reports, or [`Error::Failed`] where the system gives no thread.
    pub fn start(model: Arc<Model>, settings: Settings) -> Result<Worker> {
        // Unbounded, since every job holds one of a bounded number of slots.
        let (jobs, queue) = unbounded::<(Job, Answer)>();
        let (ready, opened) = crossbeam_channel::bounded(1);
        let thread = std::thread::Builder::new().name("segmenter".into()).spawn(move || {
            let mut segmenter = match Segmenter::new(&model, settings) {
                Ok(segmenter) => segmenter,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let _ = ready.send(Ok(segmenter.device()));
            for (job, answer) in queue {
                let done = match job.task {
                    Task::Labels => labels(&mut segmenter, &job),
                    Task::Photo => photo(&job),
                };
                drop(job.slot); // before the answer, which may bring the next photo
                let _ = answer.send(done); // nobody listens where the browser has gone away
            }
        });
        let thread = thread.map_err(|e| Error::Failed(format!("cannot start a thread: {e}")))?;
        let device = opened.recv().map_err(|_| stopped())??;
        Ok(Worker { jobs, device, thread })
    }

    /// The device: kind as on the command line, and in words.
    pub fn device(&self) -> (&'static str, &str) {
        (self.device.0, &self.device.1)
    }

    /// Where requests put their photos.
    pub fn queue(&self) -> Queue {
        Queue(self.jobs.clone())
    }

    /// Ends the thread, which closes the device. All queues must be gone.
    pub fn finish(self) {
        drop(self.jobs);
        let _ = self.thread.join(); // a panic there has been reported already
    }
}

impl Queue {
    /// Hands a photo to the worker and waits for what it makes of it.
    ///
    /// # Errors
    /// [`Error::Format`] for a file that is no complete image, whatever the device reports, and
    /// [`Error::Failed`] where the worker has ended.
    pub async fn run(&self, job: Job) -> Result<Done> {
        let (answer, done) = oneshot::channel();
        self.0.send((job, answer)).map_err(|_| stopped())?;
        done.await.map_err(|_| stopped())?
    }
}

fn stopped() -> Error {
    Error::Failed("the thread of the network has ended; start fpenet view again".into())
}

/// The labels as `fpenet segment` writes them.
fn labels(segmenter: &mut Segmenter, job: &Job) -> Result<Done> {
    let model = segmenter.model();
    let mut clock = Clock::new();
    let origin = PathBuf::from(&job.name);
    let photo = decode_bytes(&job.bytes, &origin)?;
    let size = photo.dimensions();
    let (network, input) = network_input(&photo, None, model.train_size, model.mean, model.std)?;
    drop(photo);
    clock.stage("decode");
    segmenter.prepare(network, size)?;
    clock.stage("prepare");
    let labels = segmenter.labels(&input, network, size)?;
    clock.stage("inference");
    let png = encode_png(&origin, &labels, size, ExtendedColorType::L8, Content::Flat)?;
    clock.stage("encode");
    Ok(Done { png, network: Some(network), stages: clock.stages })
}

fn photo(job: &Job) -> Result<Done> {
    let mut clock = Clock::new();
    let origin = PathBuf::from(&job.name);
    let photo = decode_bytes(&job.bytes, &origin)?;
    clock.stage("decode");
    let size = photo.dimensions();
    let png = encode_png(&origin, &photo, size, ExtendedColorType::Rgb8, Content::Photo)?;
    clock.stage("encode");
    Ok(Done { png, network: None, stages: clock.stages })
}

/// Splits time into stages.
struct Clock {
    last: Instant,
    stages: Vec<(&'static str, Duration)>,
}

impl Clock {
    fn new() -> Self {
        Clock { last: Instant::now(), stages: Vec::new() }
    }

    fn stage(&mut self, name: &'static str) {
        let now = Instant::now();
        self.stages.push((name, now - self.last));
        self.last = now;
    }
}
