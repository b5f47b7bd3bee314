//! How long a card should take for the commands of a plan: a model's prediction, never a measurement.
//!
//! The time of a command is the longest of its arithmetic, its bytes at the card's bandwidths (from L2 as far
//! as they fit in there, the rest from memory) and its bytes at what its threads have under way, plus the
//! cost of a dependency between kernels.
//!
//! What the arithmetic of the CUDA cores takes is a matter of issue slots: of the instructions of a stencil few
//! compute. How few is fitted to the choices that `fpenet tune` timed on an H100, kernel by kernel with its
//! profiles there (benches/results/tune-2026-11-26-h100.json, profile-2026-11-26-h100-*.txt); the tests hold
//! the model to them. On other cards the same shares are assumed.

use super::cards::Card;
use super::cost::{CommandCost, Unit};
use super::kernel_report;

/// Shares of a peak that kernels reach.
pub mod efficiency {
    /// Of the memory bandwidth; assumed.
    pub const DRAM: f64 = 0.85;
    /// Of the L2 bandwidth; assumed.
    pub const L2: f64 = 0.70;
    /// Of the tensor cores, on matrices of this network's sizes; assumed.
    pub const TENSOR: f64 = 0.45;
    /// Of the f32 units, in a BLAS's matrix products of this network's sizes; fitted.
    pub const FP32_GEMM: f64 = 0.41;
    /// Of the f32 units, in this program's own products; fitted.
    pub const FP32_TILE: f64 = 0.19;
    /// Of the issue slots, in products by mma.sync where the tensor cores do not have it and lanes ask each
    /// other (kernels/mma.cuh): three slots per multiply-add, half of them used; assumed.
    pub const SHUFFLED: f64 = 0.16;
    /// Of the issue slots, in elementwise kernels: bytes bound them.
    pub const ELEMENTWISE: f64 = 0.50;
    /// Of the issue slots, in what kernels do beside their products on tensor cores; fitted.
    pub const BESIDE: f64 = 0.042;

    /// Of the issue slots, in kernels of this class that compute on CUDA cores, by blocks of 512 threads
    /// with a multiprocessor of their own; fitted, but for what no card has run yet.
    /// None for elementwise kernels.
    pub fn of_slots(class: &str) -> Option<f64> {
        let share = match class {
            "cascade_ahead" => 0.117,
            // Not run yet: as many more than those as its inner loops have fewer instructions.
            "cascade_mma" => 0.26,
            // The persistent stage's cascades walk, too.
            "cascade_walk" | "stage_blocks" => 0.073,
            "cascade_forward" => 0.024,
            "stem_block" | "stem_block_rgb" => 0.159,
            "decoder_labels" => 0.156,
            "decoder_sums" => 0.047,
            "meu_scores" => 0.051,
            "scores_argmax" => 0.068,
            _ => return None,
        };
        Some(share)
    }
}

/// Registers of a thread of a kernel that the compiler's report does not know (cuBLAS's, or one newer
/// than the report). An assumption; it is also the most that a block of 1024 threads can have.
pub const ASSUMED_REGISTERS: usize = 64;
/// Bytes that a thread has under way to or from memory; fitted.
const BYTES_IN_FLIGHT: f64 = 13.5;
/// Seconds from a load's issue to its data, from L2 and from memory; assumed, about what
/// microbenchmarks find.
const LATENCY: (f64, f64) = (250e-9, 500e-9);
/// Bytes per clock that L2 gives a multiprocessor that is alone with it; assumed for all cards, what
/// microbenchmarks find on a V100.
const LINE: f64 = 64.0;
/// Resident threads of a multiprocessor for which [`efficiency::of_slots`] holds.
const THREADS: f64 = 512.0;
/// More of them hide more latency, by this power of their number and up to twice of it; fitted.
const HIDING: f64 = 0.61;

/// Seconds of one command or of several.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Prediction {
    /// At the card's peaks, without any cost per kernel.
    pub roofline: f64,
    /// With the efficiencies above, waves, occupancy and cost per kernel.
    pub expected: f64,
}

impl std::ops::AddAssign for Prediction {
    fn add_assign(&mut self, other: Prediction) {
        self.roofline += other.roofline;
        self.expected += other.expected;
    }
}

impl CommandCost {
    /// Registers of a thread, from the compiler's report or assumed.
    pub fn registers(&self, card: &Card) -> usize {
        kernel_report::registers(self.kernel, card.arch).unwrap_or(ASSUMED_REGISTERS)
    }

    /// Share of a multiprocessor's threads that can be resident.
    pub fn occupancy(&self, card: &Card) -> f64 {
        card.occupancy(self.threads, self.registers(card), self.shared_bytes)
    }

    /// Time on a card, with the cost of a dependency inside a graph, or of a launch by itself.
    pub fn predict(&self, card: &Card, graph: bool) -> Prediction {
        let bytes = self.bytes as f64;
        let cached = (card.l2_bytes / bytes.max(1.0)).min(1.0);
        let again = self.again as f64;
        let move_at =
            |dram: f64, l2: f64| bytes * (cached / l2 + (1.0 - cached) / dram) + again / l2;
        let (main, beside) = (self.flops.saturating_sub(self.beside) as f64, self.beside as f64);
        let peak = if self.unit == Unit::Tensor { card.tensor } else { card.fp32 };
        let roofline = (main / peak).max(beside / card.fp32).max(move_at(card.dram, card.l2));

        // The busiest multiprocessor decides: it has ceil(blocks / SMs) of the blocks.
        let per_sm = self.blocks.div_ceil(card.sms).max(1);
        let fill = self.blocks.max(1) as f64 / (per_sm * card.sms) as f64;
        let resident = card.resident_blocks(self.threads, self.registers(card), self.shared_bytes);
        let resident = (resident.clamp(1, per_sm) * self.threads) as f64;
        let from_l2 = (bytes * cached + again) / (bytes + again).max(1.0);
        let latency = from_l2 * LATENCY.0 + (1.0 - from_l2) * LATENCY.1;
        let busy = card.sms.min(self.blocks.max(1)) as f64;
        let in_flight = busy * resident * BYTES_IN_FLIGHT / latency;
        let moved = move_at(card.dram * efficiency::DRAM, card.l2 * efficiency::L2 * fill.max(0.5));

        let hiding = (resident / THREADS).clamp(0.5, 2.0).powf(HIDING);
        let rate = match self.unit {
            Unit::Fp32Gemm => card.fp32 * efficiency::FP32_GEMM,
            Unit::Fp32Tile => card.fp32 * efficiency::FP32_TILE,
            Unit::Tensor if card.arch < 75 && by_mma_sync(self.class()) => {
                card.slots() * efficiency::SHUFFLED
            }
            Unit::Tensor => card.tensor * efficiency::TENSOR,
            Unit::Fp32 => match efficiency::of_slots(self.class()) {
                Some(share) => card.slots() * share * hiding,
                None => card.slots() * efficiency::ELEMENTWISE,
            },
        };
        let beside = beside / (card.slots() * efficiency::BESIDE * hiding);
        let work = ((main / rate + beside) / fill).max(moved).max((bytes + again) / in_flight);

        let (last_bytes, last_flops) = (self.last.0 as f64, self.last.1 as f64);
        let one = (
            LINE * card.clock * efficiency::L2,
            card.slots() * efficiency::ELEMENTWISE / card.sms as f64,
        );
        let alone = last_bytes / one.0 + last_flops / one.1;
        let cost = match (self.behind_barrier, graph) {
            (true, _) => card.barrier,
            (false, true) => card.dependency,
            (false, false) => card.launch,
        };
        Prediction { roofline, expected: work + alone + cost }
    }
}

/// Whether a kernel for halves multiplies by mma.sync, which sm_75 and later have, and not by wmma.
fn by_mma_sync(class: &str) -> bool {
    ["stem_block", "stem_block_rgb", "strided_block", "strided_pair"].contains(&class)
}

/// Seconds of all commands on a card.
pub fn total(costs: &[CommandCost], card: &Card, graph: bool) -> Prediction {
    let mut sum = Prediction::default();
    costs.iter().for_each(|cost| sum += cost.predict(card, graph));
    sum
}

#[cfg(test)]
#[path = "predict_tests.rs"]
mod tests;
