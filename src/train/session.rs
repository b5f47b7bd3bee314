//! The training loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::checkpoint::{Checkpoint, RunState};
use super::claim::Claim;
use super::history::EpochRecord;
use super::observer::{Observer, Start, StepReport};
use super::protocol::{Request, Runtime};
use super::setup::{Paths, begin, resume};
use super::validate::validate;
use super::{log, plot, schedule};
use crate::backend::{AdamStep, Counters};
use crate::data::Dataset;
use crate::data::loader::{Loader, LoaderOptions, Position};
use crate::error::{Error, Result};
use crate::exec::Training;
use crate::graph::ParamStore;
use crate::model::Model;

/// How a call of [`train`] ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Whether all epochs are done; otherwise the run was stopped and can be resumed.
    pub finished: bool,
    /// Epochs done.
    pub epochs: usize,
    /// Epoch and mIoU of the best validation.
    pub best: Option<(usize, f64)>,
}

/// Trains until the last epoch, until `stop` becomes true, or until the request's time is up; in
/// the latter two cases after the current update, with a checkpoint.
///
/// The same request gives the same weights bit for bit on the same device and number of threads,
/// however often the run was stopped, killed and resumed, and whatever the number of workers.
///
/// # Errors
/// [`Error::Usage`] for settings out of range, an existing run without `resume`, none with it, or
/// settings that contradict the run's. [`Error::Failed`] when the loss is no longer finite: the
/// checkpoint on disk is then the last good one. Unreadable data, unwritable outputs, device errors.
pub fn train(request: &Request, stop: &AtomicBool, observer: &mut dyn Observer) -> Result<Outcome> {
    let begun = Instant::now();
    let paths = Paths::new(&request.out);
    let (data, val, start, _claim);
    if paths.holds_run(request)? {
        // Before anything is read: another process may be writing it.
        _claim = Claim::new(&paths)?;
        (data, val, start) = resume(request, Checkpoint::load(&paths.checkpoint)?)?;
    } else {
        // After everything that may be wrong with the request: a folder is made only for a run.
        (data, val, start) = begin(request)?;
        _claim = Claim::new(&paths)?;
        // Another process may have begun and ended a run in the meantime.
        paths.holds_run(request)?;
    }
    paths.tidy();

    let Checkpoint { state, params, moment1, moment2 } = start;
    let protocol = &state.protocol;
    let (width, height) = protocol.size;
    let backend = request.runtime.open()?;
    let device = backend.describe();
    let mut training =
        Training::new(&protocol.config, &params, backend, protocol.batch, height, width)?;
    training.restore(&params, Some((&moment1, &moment2)))?;
    let counters =
        Counters { loss_sum: state.loss_sum, scaling: state.scaling, ..Counters::default() };
    training.set_counters(counters)?;
    if !state.class_weights.is_empty() {
        training.set_class_weights(&state.class_weights)?;
    }
    let image_size = data.working_size()?;
    let loader = Loader::new(
        Arc::new(data),
        LoaderOptions {
            augment: Some(protocol.augment()),
            epochs: protocol.epochs as u64,
            workers: request.runtime.workers(),
            ..LoaderOptions::training(
                protocol.batch,
                protocol.size,
                protocol.seed,
                (state.mean, state.std),
            )
        },
        Position { epoch: state.epoch as u64, batch: state.batch },
    )?;
    observer.started(&Start {
        device: &device,
        state: &state,
        batches: loader.batches_per_epoch(),
        val_images: val.as_ref().map_or(0, |v| v.samples.len()),
        parameters: params.trainable_count(),
    });
    let mut session = Session {
        runtime: &request.runtime,
        paths,
        val,
        training,
        loader,
        image_size,
        state,
        stop,
        observer,
        begun,
        saved: Instant::now(),
        plotted: None,
    };
    session.run()
}

struct Session<'a> {
    runtime: &'a Runtime,
    paths: Paths,
    val: Option<Dataset>,
    training: Training,
    loader: Loader,
    /// Width and height at which the network sees whole images.
    image_size: (usize, usize),
    state: RunState,
    stop: &'a AtomicBool,
    observer: &'a mut dyn Observer,
    begun: Instant,
    saved: Instant,
    plotted: Option<Instant>,
}

impl Session<'_> {
    fn run(&mut self) -> Result<Outcome> {
        // A run that was killed between its checkpoint and its log.
        self.write_log(true)?;
        while self.state.epoch < self.state.protocol.epochs {
            if !self.train_epoch()? {
                return Ok(self.outcome(false));
            }
            self.finish_epoch()?;
            if self.state.epoch < self.state.protocol.epochs && self.must_stop() {
                self.write_log(true)?;
                return Ok(self.outcome(false));
            }
        }
        self.write_log(true)?;
        Ok(self.outcome(true))
    }

    fn outcome(&self, finished: bool) -> Outcome {
        Outcome { finished, epochs: self.state.epoch, best: self.state.best }
    }

    fn must_stop(&self) -> bool {
        let late = self.runtime.stop_after.is_some_and(|limit| self.begun.elapsed() >= limit);
        late || self.stop.load(Ordering::Relaxed)
    }

    /// The rest of the current epoch's updates; false when stopped on the way, with a checkpoint.
    fn train_epoch(&mut self) -> Result<bool> {
        let epochs = self.state.protocol.epochs;
        let lr = schedule::poly(self.state.protocol.lr, self.state.epoch, epochs);
        let interval = self.training.backend().loss_interval();
        let mut clock = Instant::now();
        while self.state.batch < self.loader.batches_per_epoch() {
            let Some(batch) = self.loader.next().transpose()? else {
                return Err(Error::Failed("loader: the stream of batches ended early".into()));
            };
            let adam = AdamStep::paper(lr as f32, self.state.step + 1);
            self.training.step(&batch.input, &batch.labels, adam)?;
            self.state.step += 1;
            self.state.batch += 1;
            let due = self.saved.elapsed() >= self.runtime.checkpoint_interval
                || self.runtime.checkpoint_steps.is_some_and(|n| self.state.step.is_multiple_of(n));
            let last = self.state.batch == self.loader.batches_per_epoch();
            let look = due || last || self.state.batch.is_multiple_of(interval);
            let loss = if look { Some(self.catch_up()?) } else { None };
            self.state.seconds += clock.elapsed().as_secs_f64();
            clock = Instant::now();
            self.observer.step(&StepReport {
                epoch: self.state.epoch + 1,
                batch: self.state.batch,
                step: self.state.step,
                loss,
                lr,
            });
            let stop = self.must_stop();
            if stop || due {
                self.checkpoint()?;
                self.observer.checkpoint(&self.paths.checkpoint, &self.state);
            }
            if stop {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits for the device and takes over what it has counted. Returns the last batch's loss.
    fn catch_up(&mut self) -> Result<f32> {
        let Counters { loss, loss_sum, scaling } = self.training.counters()?;
        // The sum keeps what any of its losses was.
        if !loss_sum.is_finite() {
            return Err(self.diverged(loss_sum));
        }
        (self.state.loss_sum, self.state.scaling) = (loss_sum, scaling);
        Ok(loss)
    }

    fn diverged(&self, loss: f64) -> Error {
        let kept = if self.paths.checkpoint.exists() {
            format!("the last good checkpoint is kept in {}", self.paths.checkpoint.display())
        } else {
            "there was no checkpoint yet".into()
        };
        Error::Failed(format!(
            "epoch {} step {}: expected a finite loss, found {loss}; {kept}; try a smaller --lr",
            self.state.epoch + 1,
            self.state.step
        ))
    }

    /// Records, validates and writes everything that an epoch leaves. The checkpoint is written
    /// before log and plot, which follow from it, and after the models, which do not: killed in
    /// between, the epoch's end is repeated with the same result.
    fn finish_epoch(&mut self) -> Result<()> {
        let epoch = self.state.epoch + 1;
        let protocol = &self.state.protocol;
        let lr = schedule::poly(protocol.lr, self.state.epoch, protocol.epochs);
        let images = (self.state.batch * protocol.batch) as f64;
        let due = epoch.is_multiple_of(protocol.val_every) || epoch == protocol.epochs;
        let model = self.model()?;
        let validation = match &self.val {
            Some(val) if due => {
                self.observer.validating(val.samples.len());
                Some(validate(&model, val, self.runtime)?)
            }
            _ => None,
        };
        let best = match (&validation, self.state.best) {
            (Some(v), Some((_, miou))) => v.miou > miou,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if best {
            model.save(&self.paths.best)?;
            self.state.best = validation.as_ref().map(|v| (epoch, v.miou));
        }
        model.save(&self.paths.last)?;

        let record = EpochRecord {
            epoch,
            step: self.state.step,
            lr,
            loss: self.state.loss_sum / self.state.batch.max(1) as f64,
            images_per_second: images / self.state.seconds.max(1e-9),
            seconds: self.state.seconds,
            validation,
        };
        self.state.history.push(record.clone());
        self.state.epoch = epoch;
        self.state.batch = 0;
        self.state.loss_sum = 0.0;
        self.training
            .set_counters(Counters { scaling: self.state.scaling, ..Counters::default() })?;
        self.state.seconds = 0.0;
        self.checkpoint()?;
        self.write_log(false)?;
        self.observer.epoch(&record, &self.state, best);
        Ok(())
    }

    fn params(&mut self) -> Result<ParamStore> {
        let params = self.training.params()?;
        params.check_finite().map_err(|e| {
            Error::Failed(format!(
                "after epoch {} step {}: {e}; try a smaller --lr",
                self.state.epoch + 1,
                self.state.step
            ))
        })?;
        Ok(params)
    }

    fn model(&mut self) -> Result<Model> {
        Ok(Model {
            params: self.params()?,
            config: self.state.protocol.config.clone(),
            classes: self.state.classes.clone(),
            palette: self.state.palette.clone(),
            mean: self.state.mean,
            std: self.state.std,
            train_size: Some(self.image_size),
        })
    }

    fn checkpoint(&mut self) -> Result<()> {
        self.catch_up()?;
        let params = self.params()?;
        let (moment1, moment2) = self.training.moments()?;
        let state = self.state.clone();
        Checkpoint { state, params, moment1, moment2 }.save(&self.paths.checkpoint)?;
        self.saved = Instant::now();
        Ok(())
    }

    /// Log and plot. On a fast device an epoch takes less than a plot is worth, so the plot
    /// is drawn every so often unless `always`.
    fn write_log(&mut self, always: bool) -> Result<()> {
        const PLOT_INTERVAL: Duration = Duration::from_secs(20);
        if self.state.history.is_empty() {
            return Ok(());
        }
        log::write_csv(&self.paths.log, &self.state.classes, &self.state.history)?;
        if always || self.plotted.is_none_or(|t| t.elapsed() > PLOT_INTERVAL) {
            let name = self.paths.folder.file_name().unwrap_or_default().to_string_lossy();
            plot::write_plot(&self.paths.plot, &name, &self.state.history)?;
            self.plotted = Some(Instant::now());
        }
        Ok(())
    }
}
