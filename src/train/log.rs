//! `log.csv`: one line per finished epoch.
//!
//! The file is always rewritten as a whole from the checkpoint's history, so it never holds an
//! epoch twice nor one that a killed run has to repeat.

use std::fmt::Write as _;
use std::path::Path;

use super::history::EpochRecord;
use crate::error::Result;
use crate::files::write_atomic;

/// Writes the log of a run. Columns: epoch, step, lr, train_loss, images_per_second, seconds,
/// miou, global_accuracy, then `iou_CLASS` per class; empty cells where nothing was measured.
///
/// # Errors
/// An unwritable file.
pub fn write_csv(path: &Path, classes: &[String], history: &[EpochRecord]) -> Result<()> {
    let text = csv(classes, history);
    write_atomic(path, |file| file.write_all(text.as_bytes()))
}

fn csv(classes: &[String], history: &[EpochRecord]) -> String {
    let mut text =
        String::from("epoch,step,lr,train_loss,images_per_second,seconds,miou,global_accuracy");
    for class in classes {
        text.push_str(",iou_");
        // A class name is data: a comma or quote in it must not shift the columns.
        text.extend(class.chars().map(|c| if ",\"\r\n".contains(c) { '_' } else { c }));
    }
    text.push('\n');
    for r in history {
        let _ = write!(
            text,
            "{},{},{:.9},{:.6},{:.3},{:.1}",
            r.epoch, r.step, r.lr, r.loss, r.images_per_second, r.seconds
        );
        match &r.validation {
            Some(v) => {
                let _ = write!(text, ",{:.6},{:.6}", v.miou, v.global_accuracy);
                for iou in &v.per_class_iou {
                    text.push(',');
                    if let Some(iou) = iou {
                        let _ = write!(text, "{iou:.6}");
                    }
                }
            }
            None => text.extend(std::iter::repeat_n(',', 2 + classes.len())),
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::history::Validation;

    #[test]
    fn every_line_has_as_many_cells_as_the_header() {
        let classes = vec!["road".to_string(), "pole, thin".to_string()];
        let record = |epoch, validation| EpochRecord {
            epoch,
            step: 45,
            lr: 5e-4,
            loss: 1.25,
            images_per_second: 3.5,
            seconds: 100.0,
            validation,
        };
        let validation =
            Validation { miou: 0.5, global_accuracy: 0.75, per_class_iou: vec![Some(0.5), None] };
        let text = csv(&classes, &[record(1, None), record(2, Some(validation))]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|l| l.split(',').count() == 10), "{text}");
        assert_eq!(lines[2], "2,45,0.000500000,1.250000,3.500,100.0,0.500000,0.750000,0.500000,");
    }
}
