//! Launches whose blocks wait for each other, and parameters that are structs, on the emulated device.

use fpenet::backend::gpu::emulated::{Emulated, Order};
use fpenet::backend::gpu::{Arg, Buffer, GpuDevice, Launch};

use super::ORDERS;

const RESIDENT: usize = 5;
const THREADS: usize = 64;
/// Nothing wrong.
const FAULTLESS: i32 = 0;

/// Blocks that exchange values `rounds` times.
struct Exchange {
    device: Emulated,
    between: Buffer,
    result: Buffer,
    barrier: Buffer,
}

impl Exchange {
    fn new(order: Order) -> Exchange {
        let mut device = Emulated::new(order, 4096).with_resident_blocks(RESIDENT);
        let between = device.alloc(2 * 4 * RESIDENT, "between").unwrap();
        let result = device.alloc(4 * RESIDENT * THREADS, "result").unwrap();
        let barrier = device.alloc(4, "barrier").unwrap();
        device.zero(barrier.into(), 4).unwrap();
        Exchange { device, between, result, barrier }
    }

    fn run(&mut self, rounds: i32, fault: i32, cooperative: bool) -> fpenet::Result<Vec<f32>> {
        let args = vec![
            self.between.into(),
            self.result.into(),
            self.barrier.into(),
            Arg::I32(rounds),
            Arg::I32(fault),
        ];
        // More than there is room for: the launch gets as many blocks as there is.
        let grid = [if cooperative { 100 } else { RESIDENT as u32 }, 1, 1];
        let block = [THREADS as u32, 1, 1];
        let (kernel, shared_bytes) = ("faulty_neighbours", 4 * THREADS as u32);
        self.device.launch(&Launch { kernel, grid, block, shared_bytes, args, cooperative })?;
        let mut values = vec![0.0f32; RESIDENT * THREADS];
        self.device.download(self.result.into(), bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}

/// What the exchange should give, by hand.
fn expected(rounds: usize) -> Vec<f32> {
    let mut sums: Vec<f32> = (0..RESIDENT).map(|block| block as f32).collect();
    for _ in 0..rounds {
        sums = (0..RESIDENT).map(|block| sums[block] + sums[(block + 1) % RESIDENT]).collect();
    }
    sums.iter().flat_map(|sum| [*sum; THREADS]).collect()
}

#[test]
fn blocks_that_wait_for_each_other_see_what_the_others_wrote() {
    for order in ORDERS {
        let mut exchange = Exchange::new(order);
        // The same barrier again and again, after odd and even numbers of turns.
        for rounds in [1, 3, 4, 1] {
            let found = exchange.run(rounds, FAULTLESS, true).unwrap();
            assert_eq!(found, expected(rounds as usize), "{order:?}, {rounds} rounds");
        }
    }
}

#[test]
fn a_missing_grid_barrier_shows_as_poison_or_as_another_result() {
    for order in ORDERS {
        let found = Exchange::new(order).run(2, 1, true).unwrap();
        let same = found.iter().zip(expected(2)).all(|(found, expected)| *found == expected);
        assert!(!same, "{order:?}");
    }
}

#[test]
fn a_grid_barrier_that_a_block_passes_by_is_an_error() {
    for order in ORDERS {
        let mut exchange = Exchange::new(order);
        let message = exchange.run(3, 2, true).unwrap_err().to_string();
        assert!(
            message.contains("faulty_neighbours: grid barrier not reached by all"),
            "{message}"
        );
        assert!(message.contains("1 of 5 blocks that run side by side are finished"), "{message}");
        // The device is usable afterwards, with a barrier that is whole.
        exchange.device.zero(exchange.barrier.into(), 4).unwrap();
        assert_eq!(exchange.run(2, FAULTLESS, true).unwrap(), expected(2));
    }
}

#[test]
fn blocks_that_wait_for_each_other_without_running_side_by_side_are_an_error() {
    let message = Exchange::new(Order::Forward).run(1, FAULTLESS, false).unwrap_err().to_string();
    assert!(message.contains("0 of 1 blocks that run side by side are finished"), "{message}");
}

#[test]
fn structs_arrive_as_the_kernel_reads_them() {
    let mut device = Emulated::new(Order::Forward, 4096);
    let [from, to] = ["from", "to"].map(|purpose| device.alloc(4 * 32, purpose).unwrap());
    let values: Vec<f32> = (0..32).map(|i| i as f32).collect();
    device.upload(from.into(), bytemuck::cast_slice(&values)).unwrap();
    let pair = |a, b| Arg::Struct(vec![Arg::I32(a), Arg::I32(b)]);
    let members = vec![from.into(), Arg::I32(7), Arg::F32(0.5), pair(1, 2), pair(3, 4), to.into()];
    let mut run = |members: Vec<Arg>| -> fpenet::Result<f32> {
        let args = vec![Arg::I32(1000), Arg::Struct(members)];
        let (kernel, grid, block) = ("struct_parameter", [1; 3], [32, 1, 1]);
        device.launch(&Launch {
            kernel,
            grid,
            block,
            shared_bytes: 0,
            args,
            cooperative: false,
        })?;
        let mut found = [0.0f32; 32];
        device.download(to.into(), bytemuck::cast_slice_mut(&mut found))?;
        Ok(found[31])
    };
    assert_eq!(run(members.clone()).unwrap(), 3.5 + 1000.0 + 20.0 + 300.0);
    let message = run(members[..5].to_vec()).unwrap_err().to_string();
    assert!(message.contains("arguments of [4, 32] bytes for parameters of [4, 40]"), "{message}");
}
