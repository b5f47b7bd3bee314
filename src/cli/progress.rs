//! Progress of a training run on stderr: a bar on a terminal, else a line now and then, so that
//! the log of a background run stays readable.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use fpenet::train::{EpochRecord, Observer, RunState, Start, StepReport};
use indicatif::{ProgressBar, ProgressStyle};

/// Distance of the lines without a terminal.
const LINE_EVERY: Duration = Duration::from_secs(30);
/// Weight of the newest step in the running averages of loss and speed.
const SMOOTHING: f64 = 0.1;

/// Shows a run's events.
pub struct Progress {
    bar: Option<ProgressBar>,
    epochs: usize,
    batches: usize,
    batch_size: usize,
    /// Updates of all epochs, and of those the ones done before this session.
    total: u64,
    before: u64,
    begun: Instant,
    last_step: Option<Instant>,
    last_line: Instant,
    loss: Option<f64>,
    step_seconds: Option<f64>,
}

impl Progress {
    /// Shows nothing before the run has started.
    pub fn new() -> Self {
        Progress {
            bar: None,
            epochs: 0,
            batches: 0,
            batch_size: 0,
            total: 0,
            before: 0,
            begun: Instant::now(),
            last_step: None,
            last_line: Instant::now(),
            loss: None,
            step_seconds: None,
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            // Where stderr is closed there is nobody to tell.
            None => {
                let _ = writeln!(std::io::stderr(), "{text}");
            }
        }
    }

    /// Time left by the session's mean time per update, validations and checkpoints included.
    fn left(&self, step: u64) -> String {
        let done = step.saturating_sub(self.before);
        if done == 0 {
            return "?".into();
        }
        let per_step = self.begun.elapsed().as_secs_f64() / done as f64;
        clock(per_step * self.total.saturating_sub(step) as f64)
    }
}

/// `2h05m`, `5m10s`, `10s`.
fn clock(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        _ => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
    }
}

fn smooth(average: &mut Option<f64>, value: f64) -> f64 {
    let next = average.map_or(value, |old| old + SMOOTHING * (value - old));
    *average = Some(next);
    next
}

impl Observer for Progress {
    fn started(&mut self, start: &Start) {
        let protocol = &start.state.protocol;
        let (width, height) = protocol.size;
        let config = serde_json::to_string(&protocol.config).unwrap_or_default();
        self.line(&format!("device {}, config {config}", start.device));
        self.line(&format!(
            "{} {}: {} images at {width}x{height}, {} to validate on; {} parameters, {} epochs of \
             {} updates of {} images, lr {}, seed {}",
            protocol.dataset,
            protocol.splits.join("+"),
            start.state.images,
            start.val_images,
            start.parameters,
            protocol.epochs,
            start.batches,
            protocol.batch,
            protocol.lr,
            protocol.seed,
        ));
        let [r, g, b] = start.state.mean;
        let [sr, sg, sb] = start.state.std;
        self.line(&format!(
            "normalisation: mean {r:.4} {g:.4} {b:.4}, deviation {sr:.4} {sg:.4} {sb:.4}"
        ));
        if !start.state.class_weights.is_empty() {
            let named = start.state.classes.iter().zip(&start.state.class_weights);
            let named: Vec<String> = named.map(|(name, w)| format!("{name} {w:.2}")).collect();
            self.line(&format!("class weights: {}", named.join(", ")));
        }
        if start.state.step > 0 {
            self.line(&format!(
                "resuming after {} epochs and {} updates of the next",
                start.state.epoch, start.state.batch
            ));
        }
        self.epochs = protocol.epochs;
        self.batches = start.batches;
        self.batch_size = protocol.batch;
        self.total = (protocol.epochs * start.batches) as u64;
        self.before = start.state.step;
        self.begun = Instant::now();
        self.last_step = Some(self.begun);
        self.last_line = self.begun;
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(self.total).with_position(self.before);
            if let Ok(style) = ProgressStyle::with_template("{wide_bar} {percent}% {msg}") {
                bar.set_style(style);
            }
            self.bar = Some(bar);
        }
    }

    fn step(&mut self, report: &StepReport) {
        let now = Instant::now();
        let elapsed = self.last_step.map_or(0.0, |t| (now - t).as_secs_f64());
        self.last_step = Some(now);
        if let Some(loss) = report.loss {
            smooth(&mut self.loss, f64::from(loss));
        }
        let step_seconds = smooth(&mut self.step_seconds, elapsed);
        if self.bar.is_none() && now - self.last_line < LINE_EVERY {
            return;
        }
        self.last_line = now;
        let text = format!(
            "epoch {}/{} batch {}/{} loss {} lr {:.3e} {:.2} images/s {} left",
            report.epoch,
            self.epochs,
            report.batch,
            self.batches,
            self.loss.map_or("?".into(), |loss| format!("{loss:.4}")),
            report.lr,
            self.batch_size as f64 / step_seconds.max(1e-9),
            self.left(report.step),
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(report.step);
                bar.set_message(text);
            }
            None => self.line(&text),
        }
    }

    fn validating(&mut self, images: usize) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("validating on {images} images"));
        }
    }

    fn epoch(&mut self, record: &EpochRecord, state: &RunState, best: bool) {
        // The next step's time must not include validation.
        self.last_step = Some(Instant::now());
        let mut text = format!(
            "epoch {}/{} done: loss {:.4}, lr {:.3e}, {:.2} images/s, {}",
            record.epoch,
            self.epochs,
            record.loss,
            record.lr,
            record.images_per_second,
            clock(record.seconds),
        );
        if let Some(v) = &record.validation {
            let _ = write!(
                text,
                "; mIoU {:.4}{}, global accuracy {:.4}\n  IoU:",
                v.miou,
                if best { " (best)" } else { "" },
                v.global_accuracy
            );
            for (class, iou) in state.classes.iter().zip(&v.per_class_iou) {
                let _ = match iou {
                    Some(iou) => write!(text, " {class} {iou:.3}"),
                    None => write!(text, " {class} -"),
                };
            }
        }
        self.line(&text);
    }

    fn checkpoint(&mut self, path: &Path, state: &RunState) {
        if self.bar.is_none() {
            self.line(&format!("checkpoint {} at update {}", path.display(), state.step));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::clock;

    #[test]
    fn times_read_well() {
        assert_eq!(clock(9.6), "10s");
        assert_eq!(clock(310.0), "5m10s");
        assert_eq!(clock(7500.0), "2h05m");
    }
}
