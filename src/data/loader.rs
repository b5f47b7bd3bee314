//! Batches from worker threads, in an order that depends on the seed alone.
//!
//! A job is one batch. [`Loader`] keeps a bounded queue of jobs, each with its own reply channel,
//! and hands the replies out in the order of asking: whatever the number of workers, and wherever
//! a run resumes, batch k of epoch e is the same bytes. Workers are plain threads: the compute's
//! rayon pool is left alone.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use image::{GrayImage, RgbImage};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::augment::{Augment, Normalise, Warp};
use super::{Dataset, VOID};
use crate::error::{Error, Result};

/// How samples become batches.
#[derive(Debug, Clone, PartialEq)]
pub struct LoaderOptions {
    /// Samples of a batch, N.
    pub batch: usize,
    /// Width and height of the network's input.
    pub size: (usize, usize),
    /// Random warps, to `size`; `None` resizes where the size differs and does nothing else.
    pub augment: Option<Augment>,
    /// Whether each epoch draws a new order; else the data set's own.
    pub shuffle: bool,
    /// Whether an epoch's last batch is left out where it is incomplete (training: batch norm
    /// must see whole batches) or kept as it is (evaluation).
    pub drop_last: bool,
    /// First epoch that is not delivered any more.
    pub epochs: u64,
    /// Seed of order and augmentation.
    pub seed: u64,
    /// Normalisation: mean and standard deviation, RGB, on the 0..1 scale.
    pub mean: [f32; 3],
    /// See `mean`.
    pub std: [f32; 3],
    /// Worker threads, at least 1.
    pub workers: usize,
    /// Batches made ahead of the consumer, at least 1; each takes 13 bytes a pixel.
    pub prefetch: usize,
    /// Decoded samples are kept in memory up to this many bytes (4 a pixel).
    pub cache_bytes: usize,
}

impl LoaderOptions {
    /// Training as the paper does it: shuffled, augmented, whole batches only.
    pub fn training(
        batch: usize,
        size: (usize, usize),
        seed: u64,
        (mean, std): ([f32; 3], [f32; 3]),
    ) -> Self {
        LoaderOptions {
            batch,
            size,
            augment: Some(Augment::paper(size)),
            shuffle: true,
            drop_last: true,
            epochs: u64::MAX,
            seed,
            mean,
            std,
            workers: 1,
            prefetch: 2,
            cache_bytes: 2 << 30,
        }
    }

    /// One pass in the data set's order, no augmentation, every sample.
    pub fn evaluation(
        batch: usize,
        size: (usize, usize),
        normalisation: ([f32; 3], [f32; 3]),
    ) -> Self {
        LoaderOptions {
            augment: None,
            shuffle: false,
            drop_last: false,
            epochs: 1,
            cache_bytes: 0,
            ..LoaderOptions::training(batch, size, 0, normalisation)
        }
    }

    fn validate(&self) -> Result<()> {
        let wrong = |what: &str, found: String| {
            Err(Error::Usage(format!("loader: expected {what}, found {found}")))
        };
        if self.batch == 0 || self.workers == 0 || self.prefetch == 0 {
            let found = format!("{}, {}, {}", self.batch, self.workers, self.prefetch);
            return wrong("batch, workers and prefetch of at least 1", found);
        }
        if self.size.0 == 0 || self.size.1 == 0 {
            return wrong("a size", format!("{}x{}", self.size.0, self.size.1));
        }
        if !self.std.iter().all(|s| s.is_finite() && *s > 0.0) {
            return wrong("a standard deviation above 0 per channel", format!("{:?}", self.std));
        }
        if !self.mean.iter().all(|m| m.is_finite()) {
            return wrong("a finite mean per channel", format!("{:?}", self.mean));
        }
        match &self.augment {
            Some(augment) if augment.size != self.size => {
                wrong("an augmentation to the batch's size", format!("{:?}", augment.size))
            }
            Some(augment) => augment.validate(),
            None => Ok(()),
        }
    }
}

/// A place in the stream of batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Batch within the epoch, from 0.
    pub batch: usize,
}

/// Network input and labels of N samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Normalised images, N x 3 x H x W.
    pub input: Vec<f32>,
    /// Train ids, N x H x W; 255 is void.
    pub labels: Vec<u8>,
    /// Where in the stream the batch stands.
    pub position: Position,
    /// Index of each sample in the data set.
    pub samples: Vec<usize>,
    /// Width and height.
    pub size: (usize, usize),
}

impl Batch {
    /// Number of samples, N.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there is no sample; never so for a batch of a [`Loader`].
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }
}

/// An iterator over batches, made ahead of time on worker threads. Ends after the last epoch
/// asked for, or after the first error; dropping it stops and joins the threads.
pub struct Loader {
    shared: Arc<Shared>,
    jobs: Option<Sender<Job>>,
    replies: VecDeque<Receiver<Result<Batch>>>,
    workers: Vec<JoinHandle<()>>,
    next: Position,
    /// Order of epoch `next.epoch`.
    order: Vec<usize>,
}

struct Shared {
    dataset: Arc<Dataset>,
    options: LoaderOptions,
    normalise: Normalise,
    cache: Vec<OnceLock<(RgbImage, GrayImage)>>,
    cached_bytes: AtomicUsize,
    stop: AtomicBool,
}

struct Job {
    position: Position,
    samples: Vec<usize>,
    reply: Sender<Result<Batch>>,
}

impl Loader {
    /// Starts the workers; the first batch is that at `start` (epoch and batch from 0; a batch
    /// past the epoch's end means the next epoch's first).
    ///
    /// # Errors
    /// [`Error::Usage`] for options that make no sense, and where `drop_last` would leave no
    /// batch: fewer samples than a batch holds. Failing samples show when their batch is due.
    pub fn new(dataset: Arc<Dataset>, options: LoaderOptions, start: Position) -> Result<Loader> {
        options.validate()?;
        if dataset.is_empty() || (options.drop_last && dataset.len() < options.batch) {
            return Err(Error::Usage(format!(
                "{}: expected at least {} images for a batch, found {}; use a smaller --batch",
                dataset.root.display(),
                if options.drop_last { options.batch } else { 1 },
                dataset.len()
            )));
        }
        let shared = Arc::new(Shared {
            normalise: Normalise::new(options.mean, options.std),
            cache: (0..dataset.len()).map(|_| OnceLock::new()).collect(),
            cached_bytes: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            dataset,
            options,
        });
        let (jobs, queue) = unbounded::<Job>();
        let mut loader = Loader {
            order: shared.order(start.epoch),
            jobs: Some(jobs),
            replies: VecDeque::new(),
            workers: Vec::new(),
            next: start,
            shared,
        };
        for i in 0..loader.shared.options.workers {
            let (shared, queue) = (Arc::clone(&loader.shared), queue.clone());
            let worker = std::thread::Builder::new()
                .name(format!("loader-{i}"))
                .spawn(move || shared.work(&queue))
                .map_err(|e| Error::Failed(format!("loader: cannot start a thread: {e}")))?;
            loader.workers.push(worker);
        }
        (0..loader.shared.options.prefetch).for_each(|_| loader.request());
        Ok(loader)
    }

    /// Batches of an epoch.
    pub fn batches_per_epoch(&self) -> usize {
        self.shared.batches_per_epoch()
    }

    /// Asks for the next batch, unless the last epoch is over.
    fn request(&mut self) {
        let options = &self.shared.options;
        if self.next.batch >= self.shared.batches_per_epoch() {
            self.next = Position { epoch: self.next.epoch + 1, batch: 0 };
            self.order = self.shared.order(self.next.epoch);
        }
        if self.next.epoch >= options.epochs {
            return;
        }
        let from = self.next.batch * options.batch;
        let to = (from + options.batch).min(self.order.len());
        let (reply, receiver) = bounded(1);
        let job = Job { position: self.next, samples: self.order[from..to].to_vec(), reply };
        // With every worker gone the job, and its reply channel, are dropped: the receiver tells.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(job));
        self.replies.push_back(receiver);
        self.next.batch += 1;
    }

    fn shut_down(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.jobs = None;
        self.replies.clear();
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so; its batch was reported as failed.
            let _ = worker.join();
        }
    }
}

impl Iterator for Loader {
    type Item = Result<Batch>;

    /// The next batch; waits for it. An error names the file at fault and ends the stream.
    fn next(&mut self) -> Option<Result<Batch>> {
        let receiver = self.replies.pop_front()?;
        let batch = receiver.recv().unwrap_or_else(|_| {
            Err(Error::Failed("loader: a worker thread died; this is a bug of fpenet".into()))
        });
        match &batch {
            Ok(_) => self.request(),
            Err(_) => self.shut_down(),
        }
        Some(batch)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl Shared {
    fn batches_per_epoch(&self) -> usize {
        match self.options.drop_last {
            true => self.dataset.len() / self.options.batch,
            false => self.dataset.len().div_ceil(self.options.batch),
        }
    }

    fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.dataset.len()).collect();
        if self.options.shuffle {
            order.shuffle(&mut stream(self.options.seed, epoch, ORDER));
        }
        order
    }

    fn work(&self, queue: &Receiver<Job>) {
        for job in queue {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // The consumer may have gone meanwhile; then nobody misses the batch.
            let _ = job.reply.send(self.batch(job.position, job.samples));
        }
    }

    fn batch(&self, position: Position, samples: Vec<usize>) -> Result<Batch> {
        let (w, h) = self.options.size;
        let plane = w * h;
        let mut input = vec![0.0; samples.len() * 3 * plane];
        let mut labels = vec![VOID; samples.len() * plane];
        let places = input.chunks_exact_mut(3 * plane).zip(labels.chunks_exact_mut(plane));
        for (&index, (input, labels)) in samples.iter().zip(places) {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Failed("loader: stopped".into()));
            }
            self.with_sample(index, |image, label| {
                let source = (image.width() as usize, image.height() as usize);
                let (warp, normalise) = match &self.options.augment {
                    Some(augment) => {
                        let mut rng = stream(self.options.seed, position.epoch, index as u64);
                        let warp = augment.draw(source, &mut rng);
                        (warp, self.normalise.after(&augment.draw_colour(&mut rng)))
                    }
                    None => (Warp::resize(source, self.options.size), self.normalise),
                };
                warp.image(image, &normalise, input);
                warp.labels(label, labels);
            })?;
        }
        Ok(Batch { input, labels, position, samples, size: self.options.size })
    }

    /// Runs `f` on a decoded sample, from memory where it was kept there.
    fn with_sample(&self, index: usize, f: impl FnOnce(&RgbImage, &GrayImage)) -> Result<()> {
        if let Some((image, label)) = self.cache[index].get() {
            f(image, label);
            return Ok(());
        }
        let sample = self.dataset.load_working(index)?;
        f(&sample.0, &sample.1);
        let bytes = sample.0.len() + sample.1.len();
        let before = self.cached_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > self.options.cache_bytes || self.cache[index].set(sample).is_err() {
            self.cached_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Stream number of an epoch's order; samples have their index.
const ORDER: u64 = u64::MAX;

/// The random stream of one purpose: independent of every other and of how far they were read,
/// so that nothing but (seed, epoch, sample) has to be known to resume.
fn stream(seed: u64, epoch: u64, purpose: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    key[16..24].copy_from_slice(&purpose.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}
