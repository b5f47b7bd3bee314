//! Segmentation metrics, all from one confusion matrix over a whole split (SPEC, "Training
//! defaults"; paper, section 4.1).

use crate::data::VOID;
use crate::error::{Error, Result};

/// Pixel counts by true and predicted class. Pixels whose truth is void (255) are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    /// Row = truth, column = prediction.
    counts: Vec<u64>,
}

impl Confusion {
    /// An empty matrix for `classes` classes.
    pub fn new(classes: usize) -> Self {
        Confusion { classes, counts: vec![0; classes * classes] }
    }

    /// Number of classes C.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// Pixels of class `truth` that were taken for class `prediction`.
    pub fn count(&self, truth: usize, prediction: usize) -> u64 {
        self.counts[truth * self.classes + prediction]
    }

    /// Counts the pixels of a prediction against the truth (any shape, both the same).
    ///
    /// # Errors
    /// [`Error::Failed`] where the lengths differ or a value is neither below the number of
    /// classes nor, in the truth, 255; nothing is counted then.
    pub fn add(&mut self, prediction: &[u8], truth: &[u8]) -> Result<()> {
        if prediction.len() != truth.len() {
            return Err(Error::Failed(format!(
                "metrics: expected as many predictions as labels ({}), found {}",
                truth.len(),
                prediction.len()
            )));
        }
        let outside = |value: &u8| usize::from(*value) >= self.classes;
        let wrong_truth = truth.iter().find(|t| **t != VOID && outside(t));
        let wrong_prediction = prediction.iter().find(|p| outside(p));
        for (what, value) in [("label", wrong_truth), ("prediction", wrong_prediction)] {
            if let Some(value) = value {
                return Err(Error::Failed(format!(
                    "metrics: expected {what}s below {}, found {value}",
                    self.classes
                )));
            }
        }
        for (&p, &t) in prediction.iter().zip(truth) {
            if t != VOID {
                self.counts[usize::from(t) * self.classes + usize::from(p)] += 1;
            }
        }
        Ok(())
    }

    /// Adds the counts of another matrix.
    ///
    /// # Errors
    /// [`Error::Failed`] where the numbers of classes differ.
    pub fn merge(&mut self, other: &Confusion) -> Result<()> {
        if other.classes != self.classes {
            return Err(Error::Failed(format!(
                "metrics: expected a confusion matrix of {} classes, found {}",
                self.classes, other.classes
            )));
        }
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        Ok(())
    }

    /// Labelled pixels counted so far.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Intersection over union of each class: TP / (TP + FP + FN). NaN for a class that occurs
    /// neither in the truth nor in the predictions.
    pub fn per_class_iou(&self) -> Vec<f64> {
        let iou = |class: usize| {
            let hit = self.count(class, class);
            let truth: u64 = (0..self.classes).map(|p| self.count(class, p)).sum();
            let predicted: u64 = (0..self.classes).map(|t| self.count(t, class)).sum();
            hit as f64 / (truth + predicted - hit) as f64
        };
        (0..self.classes).map(iou).collect()
    }

    /// Mean IoU over the classes that occur in the truth or in the predictions; absent classes
    /// have no IoU and are left out of the mean, as cityscapesScripts and mmsegmentation do.
    /// NaN where no labelled pixel was counted.
    pub fn miou(&self) -> f64 {
        let present: Vec<f64> = self.per_class_iou().into_iter().filter(|v| !v.is_nan()).collect();
        present.iter().sum::<f64>() / present.len() as f64
    }

    /// Share of the labelled pixels whose class is right. NaN where none was counted.
    pub fn global_accuracy(&self) -> f64 {
        let hits: u64 = (0..self.classes).map(|c| self.count(c, c)).sum();
        hits as f64 / self.total() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: truth 0 0 0 1 1 2 void, prediction 0 0 1 1 2 2 0.
    fn example() -> Confusion {
        let mut m = Confusion::new(4);
        m.add(&[0, 0, 1, 1, 2, 2, 0], &[0, 0, 0, 1, 1, 2, VOID]).unwrap();
        m
    }

    #[test]
    fn iou_and_accuracy_match_hand_computation() {
        let m = example();
        // Class 0: 2 hits, 3 true, 2 predicted -> 2/3. Class 1: 1 / (2 + 2 - 1). Class 2: 1 / 2.
        let iou = m.per_class_iou();
        assert_eq!(&iou[..3], [2.0 / 3.0, 1.0 / 3.0, 1.0 / 2.0]);
        assert!(iou[3].is_nan(), "class 3 occurs nowhere");
        assert_eq!(m.miou(), (2.0 / 3.0 + 1.0 / 3.0 + 1.0 / 2.0) / 3.0);
        assert_eq!(m.global_accuracy(), 4.0 / 6.0);
        assert_eq!(m.total(), 6);
    }

    #[test]
    fn a_class_that_is_only_predicted_counts_with_iou_zero() {
        let mut m = Confusion::new(3);
        m.add(&[0, 2], &[0, 0]).unwrap();
        assert_eq!(m.miou(), (0.5 + 0.0) / 2.0);
    }

    #[test]
    fn void_alone_gives_nan_not_a_figure() {
        let mut m = Confusion::new(2);
        m.add(&[0, 1], &[VOID, VOID]).unwrap();
        assert!(m.miou().is_nan() && m.global_accuracy().is_nan());
    }

    #[test]
    fn merging_equals_counting_together() {
        let mut twice = example();
        twice.merge(&example()).unwrap();
        assert_eq!(twice.total(), 12);
        assert_eq!(twice.miou(), example().miou());
        assert!(twice.merge(&Confusion::new(2)).is_err());
    }

    #[test]
    fn values_outside_the_classes_are_refused_and_nothing_is_counted() {
        let mut m = Confusion::new(2);
        assert!(m.add(&[0, 0], &[0, 2]).unwrap_err().to_string().contains("found 2"));
        assert!(m.add(&[0, 7], &[0, 1]).unwrap_err().to_string().contains("found 7"));
        assert!(m.add(&[0], &[0, 1]).is_err());
        assert_eq!(m.total(), 0);
    }
}
