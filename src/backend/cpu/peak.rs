//! What the processor can do at most: multiply-adds on registers alone, on all threads at once. The
//! yardstick beside which the time of a network means something.

use std::hint::black_box;
use std::time::Instant;

use rayon::ThreadPool;

use super::simd::{Isa, Kernel, Simd};

/// Independent sums: two units with a latency of four cycles need eight.
const CHAINS: usize = 12;
/// Rounds of a trial: some milliseconds.
const ROUNDS: usize = 1_000_000;
/// Trials, of which the fastest counts: whatever else runs only takes away.
const TRIALS: usize = 8;

struct MultiplyAdds<'a> {
    result: &'a mut f32,
    flops: &'a mut u64,
}

impl Kernel for MultiplyAdds<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            let (a, b) = (S::splat(black_box(0.5)), S::splat(black_box(1.0)));
            let mut sums = [S::splat(black_box(0.0)); CHAINS];
            for _ in 0..ROUNDS {
                for sum in &mut sums {
                    *sum = sum.mul_add(a, b);
                }
            }
            *self.result = sums.into_iter().fold(S::zero(), |all, sum| all.add(sum)).sum();
            *self.flops = 2 * (ROUNDS * CHAINS * S::LANES) as u64;
        }
    }
}

/// Floating-point operations per second of all threads of a pool, a multiply-add counting as two:
/// measured, in less than a second.
pub fn flops_per_second(isa: Isa, pool: &ThreadPool) -> f64 {
    let trial = || {
        let begun = Instant::now();
        let work = pool.broadcast(|_| {
            let (mut result, mut flops) = (0.0, 0);
            unsafe { isa.run(MultiplyAdds { result: &mut result, flops: &mut flops }) }
            black_box(result);
            flops
        });
        work.iter().sum::<u64>() as f64 / begun.elapsed().as_secs_f64()
    };
    (0..TRIALS).map(|_| trial()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_are_made_and_counted() {
        for isa in Isa::available() {
            let (mut result, mut flops) = (0.0, 0);
            unsafe { isa.run(MultiplyAdds { result: &mut result, flops: &mut flops }) }
            // Every sum converges to 2.
            let lanes = flops / (2 * ROUNDS * CHAINS) as u64;
            assert_eq!(result, (2 * CHAINS as u64 * lanes) as f32, "{isa:?}");
        }
    }

    #[test]
    fn a_rate_is_that_of_a_processor() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        for isa in Isa::available() {
            let rate = flops_per_second(isa, &pool);
            // From an old core that shares its time to a cluster's worth.
            assert!((1e7..1e14).contains(&rate), "{isa:?}: {rate:e}");
        }
    }
}
