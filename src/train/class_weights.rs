//! Weights of the classes in the loss, from how often they occur. Street scenes are mostly road, building
//! and sky; a mean over pixels hardly sees a pole.

use clap::ValueEnum;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::data::{Dataset, decode};
use crate::error::Result;

/// How the weight of a class follows from its frequency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ClassWeights {
    /// All alike: the mean over labelled pixels (FPENet, section 4.1).
    #[default]
    None,
    /// 1 / ln(1.02 + share of the pixels) (ENet, Paszke et al. 2016, section 5.2).
    Log,
    /// Median of the frequencies over the class's own, a frequency being the class's share of the
    /// pixels of the images that hold it (SegNet, Badrinarayanan et al. 2017, section 3.2).
    MedianFrequency,
}

/// What was counted of one class.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Count {
    /// Its pixels.
    own: u64,
    /// Labelled pixels of the images that hold it.
    around: u64,
}

impl ClassWeights {
    /// The weights for a data set, one per class, scaled so that the mean over its labelled pixels is 1:
    /// the learning rate keeps its meaning. A class that does not occur gets 1, which nothing ever
    /// multiplies. Empty for [`ClassWeights::None`].
    ///
    /// The counts are integers, so the result does not depend on the number of threads.
    ///
    /// # Errors
    /// An unreadable label image, or labels that are all void.
    pub fn of(self, dataset: &Dataset) -> Result<Vec<f32>> {
        if self == ClassWeights::None {
            return Ok(Vec::new());
        }
        let counts = count(dataset)?;
        if counts.iter().all(|count| count.own == 0) {
            return Err(dataset.only_void());
        }
        Ok(self.of_counts(&counts))
    }

    fn of_counts(self, counts: &[Count]) -> Vec<f32> {
        let total = counts.iter().map(|count| count.own).sum::<u64>() as f64;
        let frequency = |count: &Count| count.own as f64 / count.around as f64;
        let mut sorted: Vec<f64> = counts.iter().filter(|c| c.own > 0).map(frequency).collect();
        sorted.sort_by(f64::total_cmp);
        let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
        let raw = |count: &Count| match self {
            ClassWeights::None => 1.0,
            ClassWeights::Log => 1.0 / (1.02 + count.own as f64 / total).ln(),
            ClassWeights::MedianFrequency => median / frequency(count),
        };
        let present = || counts.iter().filter(|count| count.own > 0);
        let mean = present().map(|count| raw(count) * count.own as f64).sum::<f64>() / total;
        let weight = |count: &Count| if count.own > 0 { raw(count) / mean } else { 1.0 };
        counts.iter().map(|count| weight(count) as f32).collect()
    }
}

fn count(dataset: &Dataset) -> Result<Vec<Count>> {
    let classes = dataset.classes.len();
    let zero = || vec![Count::default(); classes];
    dataset
        .samples
        .par_iter()
        .map(|sample| {
            let labels = decode::label(&sample.label, sample.encoding)?;
            let mut counts = zero();
            for &label in labels.as_raw() {
                if let Some(count) = counts.get_mut(usize::from(label)) {
                    count.own += 1;
                }
            }
            let labelled = counts.iter().map(|count| count.own).sum();
            for count in counts.iter_mut().filter(|count| count.own > 0) {
                count.around = labelled;
            }
            Ok(counts)
        })
        .try_reduce(zero, |a, b| {
            let add = |(a, b): (&Count, &Count)| Count {
                own: a.own + b.own,
                around: a.around + b.around,
            };
            Ok(a.iter().zip(&b).map(add).collect())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 900, 90 and 10 of 1000 pixels, a class that never occurs, the last in half of the images.
    fn counts() -> Vec<Count> {
        let count = |own, around| Count { own, around };
        vec![count(900, 1000), count(90, 1000), count(0, 0), count(10, 500)]
    }

    fn mean(weights: &[f32]) -> f64 {
        let pixels = counts().into_iter().map(|count| count.own as f64);
        pixels.zip(weights).map(|(own, &w)| own * f64::from(w)).sum::<f64>() / 1000.0
    }

    #[test]
    fn rare_classes_weigh_more_and_the_mean_over_pixels_is_one() {
        for way in [ClassWeights::Log, ClassWeights::MedianFrequency] {
            let weights = way.of_counts(&counts());
            assert!(weights[0] < weights[1] && weights[1] < weights[3], "{way:?} {weights:?}");
            assert_eq!(weights[2], 1.0, "{way:?}");
            assert!((mean(&weights) - 1.0).abs() < 1e-6, "{way:?} {weights:?}");
        }
    }

    #[test]
    fn weights_are_in_the_papers_proportions() {
        let weights = ClassWeights::Log.of_counts(&counts());
        let expected = (1.02f64 + 0.9).ln() / (1.02f64 + 0.01).ln();
        assert!((f64::from(weights[3] / weights[0]) - expected).abs() < 1e-4, "{weights:?}");
        // Frequencies 0.9, 0.09 and 0.02; their median is 0.09.
        let weights = ClassWeights::MedianFrequency.of_counts(&counts());
        assert!((weights[1] / weights[0] - 10.0).abs() < 1e-4, "{weights:?}");
        assert!((weights[3] / weights[0] - 45.0).abs() < 1e-3, "{weights:?}");
    }
}
