//! Data sheets of the cards that the cost model knows, and how many blocks fit on a
//! multiprocessor.
//!
//! What a vendor publishes carries its source. L2 bandwidths are published by nobody: they are
//! scaled from microbenchmarks of a sibling, or assumed, as their comments say. Costs of a launch are
//! assumptions of the same kind. Everything computed from them is a model's prediction.

/// A card, in bytes, seconds and operations per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Card {
    /// Name on the command line ("titan-v").
    pub id: &'static str,
    /// Words that the driver's name of the card holds.
    pub name: &'static str,
    /// Compute capability times 10.
    pub arch: u32,
    /// Multiprocessors.
    pub sms: usize,
    /// Boost clock, Hz.
    pub clock: f64,
    /// Memory bandwidth, bytes/s.
    pub dram: f64,
    /// L2 bandwidth, bytes/s: measured on a sibling or assumed.
    pub l2: f64,
    /// L2 size, bytes.
    pub l2_bytes: f64,
    /// f32 operations of the CUDA cores per second, two per multiply-add.
    pub fp32: f64,
    /// f16 operations of the tensor cores with f32 sums per second, dense.
    pub tensor: f64,
    /// Shared memory of a multiprocessor, bytes.
    pub shared_per_sm: usize,
    /// Most shared memory of a block (opt-in), bytes.
    pub shared_per_block: usize,
    /// 32-bit registers of a multiprocessor.
    pub registers: usize,
    /// Resident threads of a multiprocessor.
    pub threads: usize,
    /// Resident blocks of a multiprocessor.
    pub blocks: usize,
    /// Seconds from a kernel to one that depends on it inside a CUDA graph: assumed, or fitted to what a
    /// card did.
    pub dependency: f64,
    /// Seconds of a barrier of all blocks of a launch: assumed.
    pub barrier: f64,
    /// Seconds per launch where commands are launched one by one: assumed, or fitted.
    pub launch: f64,
}

/// All cards of which there is a data sheet.
// Multiprocessor limits: CUDA C++ Programming Guide, "Technical Specifications per Compute
// Capability" (7.0: 96 KB shared, 2048 threads, 32 blocks; 7.5: 64 KB, 1024, 16; 9.0: 228 KB, 227 KB
// per block, 2048, 32; 64 K registers each).
// dependency, barrier, launch: before Hopper nothing measured; the study's 2.5 us, its 1.6 us per barrier, and
// 4 us per launch from a host that does nothing else. On Hopper fitted to an H100 (predict.rs), but for the
// study's 1 us per barrier.
pub static CARDS: [Card; 4] = [
    Card {
        // AnandTech, "The NVIDIA Titan V Deep Learning Deep Dive", 2018, its table of specifications:
        // 5120 cores, 1455 MHz boost, 653 GB/s (3072 bits at 1.7 Gbit/s: 652.8), 4.5 MB L2; geektopia.es,
        // 8 December 2017, after NVIDIA's page: 80 SMs, 110 TFLOPS tensor.
        // FP32: 5120 cores * 2 * 1.455 GHz. Both give NVIDIA's 13.8 TFLOPS, which is 1.35 GHz: a bound
        // must not be lower than what the boost clock allows.
        // L2: V100 2155 GB/s (Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via
        // Microbenchmarking", 2018), times 3/4 of its slices and 1455/1380 of its clock.
        id: "titan-v",
        name: "TITAN V",
        arch: 70,
        sms: 80,
        clock: 1.455e9,
        dram: 652.8e9,
        l2: 1704e9,
        l2_bytes: 4.5 * MIB,
        fp32: 14.9e12,
        tensor: 110e12,
        shared_per_sm: 96 << 10,
        shared_per_block: 96 << 10,
        registers: 65536,
        threads: 2048,
        blocks: 32,
        dependency: 2.5e-6,
        barrier: 1.6e-6,
        launch: 4e-6,
    },
    Card {
        // Tom's Hardware, "Nvidia Titan RTX" (news 38184), 3 December 2018: 4608 cores, 1770 MHz boost,
        // 672 GB/s, 6 MB L2, 16.3 TFLOPS FP32, 130 TFLOPS tensor; 64 cores per SM: 72 SMs. 130.5: the
        // sheet of the Quadro RTX 8000, the same chip at the same clock (Leadtek), f32 sums included.
        // L2: T4 1270 GB/s (Jia et al., "Dissecting the NVidia Turing T4 GPU via Microbenchmarking",
        // 2019), times 6 MB / 4 MB of its slices and 1770/1590 of its clock.
        id: "titan-rtx",
        name: "TITAN RTX",
        arch: 75,
        sms: 72,
        clock: 1.77e9,
        dram: 672e9,
        l2: 2120e9,
        l2_bytes: 6.0 * MIB,
        fp32: 16.3e12,
        tensor: 130.5e12,
        shared_per_sm: 64 << 10,
        shared_per_block: 64 << 10,
        registers: 65536,
        threads: 1024,
        blocks: 16,
        dependency: 2.5e-6,
        barrier: 1.6e-6,
        launch: 4e-6,
    },
    Card {
        // NVIDIA, "H100 Tensor Core GPU Architecture", 2022, and its figures at glennklockwood.com/garden/
        // processors/h100: SXM5 with 132 SMs, 1980 MHz boost (1830 MHz for the tensor peaks), 3.35 TB/s,
        // 66.9 TFLOPS FP32, 989.4 TFLOPS f16 tensor without sparsity. 50 MB L2: Chips and Cheese,
        // "Nvidia's H100: Funny L2, and Tons of Bandwidth", 2 July 2023.
        // L2: assumed, 5.5 TB/s; a third of 64 bytes per clock and SM.
        id: "h100",
        name: "H100",
        arch: 90,
        sms: 132,
        clock: 1.98e9,
        dram: 3350e9,
        l2: 5500e9,
        l2_bytes: 50.0 * MIB,
        fp32: 66.9e12,
        tensor: 989e12,
        shared_per_sm: 228 << 10,
        shared_per_block: 227 << 10,
        registers: 65536,
        threads: 2048,
        blocks: 32,
        dependency: 2.1e-6,
        barrier: 1.0e-6,
        launch: 2.6e-6,
    },
    Card {
        // The H100's chip with 4.8 TB/s of HBM3e: itkb.uw.cz, "NVIDIA H200 vs B300", 22 June 2026 (132
        // SMs, 989 TFLOPS f16 without sparsity), after NVIDIA's data sheet of the SXM module, 2024;
        // hmc-tech.com's comparison: 16896 cores, 1980 MHz, 66.9 TFLOPS FP32.
        id: "h200",
        name: "H200",
        arch: 90,
        sms: 132,
        clock: 1.98e9,
        dram: 4800e9,
        l2: 5500e9,
        l2_bytes: 50.0 * MIB,
        fp32: 66.9e12,
        tensor: 989e12,
        shared_per_sm: 228 << 10,
        shared_per_block: 227 << 10,
        registers: 65536,
        threads: 2048,
        blocks: 32,
        dependency: 2.1e-6,
        barrier: 1.0e-6,
        launch: 2.6e-6,
    },
];

const MIB: f64 = 1048576.0;

/// The sheet of the card that the driver calls `name` ("NVIDIA TITAN V").
pub fn find(name: &str) -> Option<&'static Card> {
    // A PCIe or NVL card of the same family has other clocks and memory: no sheet, no figure.
    let other = ["PCIe", "NVL", "GH200", "MIG"].iter().any(|word| name.contains(word));
    CARDS.iter().find(|card| !other && name.contains(card.name))
}

/// The sheet with this name on the command line.
pub fn by_id(id: &str) -> Option<&'static Card> {
    CARDS.iter().find(|card| card.id == id)
}

/// The sheet that stands for a card that has none, by compute capability: the closest architecture
/// that is not newer, else the oldest.
pub fn nearest(arch: u32) -> &'static Card {
    CARDS.iter().rev().find(|card| card.arch <= arch).unwrap_or(&CARDS[0])
}

impl Card {
    /// Operations per second if every issue slot did one multiply-add of 32 lanes: four slots per clock
    /// and multiprocessor on all of these cards, whose f32 units take them all (sm_90) or every second.
    pub fn slots(&self) -> f64 {
        (2 * 4 * 32 * self.sms) as f64 * self.clock
    }

    /// Blocks of a kernel that are resident on a multiprocessor at a time, by threads, registers and
    /// shared memory; 0 where not even one fits.
    pub fn resident_blocks(&self, threads: usize, registers: usize, shared_bytes: usize) -> usize {
        let warps = threads.div_ceil(32).max(1);
        // Registers are handed out 256 at a time per warp.
        let per_warp = (registers.max(1) * 32).next_multiple_of(256);
        // The system keeps 1 KB per block from sm_80 on.
        let reserved = if self.arch >= 80 { 1024 } else { 0 };
        let by_shared = match shared_bytes + reserved {
            0 => self.blocks,
            bytes => self.shared_per_sm / bytes,
        };
        let by_registers = self.registers / per_warp / warps;
        self.blocks.min(self.threads / (warps * 32)).min(by_registers).min(by_shared)
    }

    /// Share of a multiprocessor's threads that are resident.
    pub fn occupancy(&self, threads: usize, registers: usize, shared_bytes: usize) -> f64 {
        let blocks = self.resident_blocks(threads, registers, shared_bytes);
        (blocks * threads.div_ceil(32) * 32) as f64 / self.threads as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_found_by_the_drivers_name() {
        let id = |name| find(name).map(|card| card.id);
        assert_eq!(id("NVIDIA TITAN V"), Some("titan-v"));
        assert_eq!(id("NVIDIA TITAN RTX"), Some("titan-rtx"));
        assert_eq!(id("NVIDIA H100 80GB HBM3"), Some("h100"));
        assert_eq!(id("NVIDIA H200"), Some("h200"));
        for unknown in ["NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090", "NVIDIA GH200 480GB", ""] {
            assert_eq!(id(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn a_card_without_a_sheet_borrows_one_that_is_not_newer() {
        let id = |arch| nearest(arch).id;
        assert_eq!(
            (id(61), id(70), id(75), id(89)),
            ("titan-v", "titan-v", "titan-rtx", "titan-rtx")
        );
        assert_eq!((id(90), id(120)), ("h200", "h200"));
    }

    #[test]
    fn published_peaks_agree_with_cores_and_clocks() {
        for card in &CARDS {
            let cores = if card.arch == 90 { 128.0 } else { 64.0 };
            let peak = card.sms as f64 * cores * 2.0 * card.clock;
            assert!((card.fp32 / peak - 1.0).abs() < 0.01, "{}: {peak:e}", card.id);
        }
    }

    /// Against the occupancy calculator's rules, by hand.
    #[test]
    fn occupancy_is_what_the_scarcest_resource_allows() {
        let [volta, turing, _, hopper] = &CARDS;
        // Nothing scarce: all threads.
        assert_eq!(volta.occupancy(256, 32, 0), 1.0);
        // 64 registers * 32 = 2048 per warp: 32 warps of 64.
        assert_eq!(volta.occupancy(256, 64, 0), 0.5);
        assert_eq!(turing.occupancy(256, 64, 0), 1.0);
        // 33 registers are rounded up to 40 per thread: 1280 per warp, 51 warps, 6 blocks of 8.
        assert_eq!(volta.resident_blocks(256, 33, 0), 6);
        // Shared memory: two blocks of 48 KB on Volta, one on Turing, 4 on Hopper (49 KB each).
        assert_eq!(volta.resident_blocks(256, 32, 48 << 10), 2);
        assert_eq!(turing.resident_blocks(256, 32, 48 << 10), 1);
        assert_eq!(hopper.resident_blocks(256, 32, 48 << 10), 4);
        // What does not fit is not resident at all.
        assert_eq!(turing.resident_blocks(256, 32, 96 << 10), 0);
    }
}
