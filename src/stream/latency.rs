//! Quantiles of any number of durations in constant memory.

use std::time::Duration;

/// Ratio of neighbouring bounds: how exact a quantile is.
const STEP: f64 = 1.01;
/// Bounds from a microsecond to over an hour.
const BUCKETS: usize = 2300;

/// A histogram with logarithmic buckets of 1 %.
#[derive(Debug, Clone)]
pub struct Latency {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Latency { counts: vec![0; BUCKETS], total: 0 }
    }
}

impl Latency {
    /// Adds a duration.
    pub fn record(&mut self, duration: Duration) {
        let micros = duration.as_secs_f64() * 1e6;
        let bucket = micros.max(1.0).ln() / STEP.ln();
        self.counts[(bucket as usize).min(BUCKETS - 1)] += 1;
        self.total += 1;
    }

    /// The duration that a fraction `q` (0 to 1) of all lie at or under, up to 1 % above it;
    /// zero without any.
    pub fn quantile(&self, q: f64) -> Duration {
        let rank = (q * self.total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                let micros = STEP.powi(bucket as i32 + 1);
                return Duration::from_secs_f64(micros * 1e-6);
            }
        }
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_step_of_the_exact_ones() {
        let mut latency = Latency::default();
        assert_eq!(latency.quantile(0.99), Duration::ZERO);
        (1..=1000).for_each(|ms| latency.record(Duration::from_millis(ms)));
        for (q, exact) in [(0.5, 0.5), (0.99, 0.99), (1.0, 1.0), (0.0, 0.001)] {
            let found = latency.quantile(q).as_secs_f64();
            assert!(found >= exact && found <= exact * STEP * STEP, "{q}: {found}");
        }
        latency.record(Duration::from_secs(1 << 40));
        latency.record(Duration::ZERO);
        assert!(latency.quantile(1.0) > Duration::from_secs(3600));
    }
}
