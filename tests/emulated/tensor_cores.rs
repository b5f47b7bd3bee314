//! Products by tensor cores on the emulated device: right, and strict about how they are asked for.

use fpenet::backend::gpu::emulated::{Emulated, Order};
use fpenet::backend::gpu::{Arg, GpuDevice, Launch};

use super::ORDERS;
use super::harness::Random;

const FAULTLESS: i32 = 0;

/// A warp and a product of 16 x 16 matrices: what it gives and what it should.
fn product(order: Order, columns: bool, fault: i32) -> fpenet::Result<(Vec<f32>, Vec<f32>)> {
    let mut device = Emulated::new(order, 8192);
    let mut random = Random(3);
    // Eighths: exact in half precision, and so are their products' sums in f32.
    let mut values =
        || -> Vec<f32> { (0..256).map(|_| (random.next() % 33) as f32 / 8.0 - 2.0).collect() };
    let [a, b, c] = [values(), values(), values()];
    let mut expected = c.clone();
    for (i, sum) in expected.iter_mut().enumerate() {
        let right = |k: usize| if columns { b[i % 16 * 16 + k] } else { b[k * 16 + i % 16] };
        *sum += (0..16).map(|k| a[i / 16 * 16 + k] * right(k)).sum::<f32>();
    }
    let mut buffer = |values: &[f32]| {
        let buffer = device.alloc(1024, "matrix").unwrap();
        device.upload(buffer.into(), bytemuck::cast_slice(values)).unwrap();
        buffer
    };
    let (a, b, c) = (buffer(&a), buffer(&b), buffer(&c));
    let args = vec![a.into(), b.into(), c.into(), Arg::from(columns), Arg::I32(fault)];
    let launch = Launch {
        kernel: "warp_product",
        grid: [1, 1, 1],
        block: [32, 1, 1],
        shared_bytes: 2048,
        args,
        cooperative: false,
    };
    device.launch(&launch)?;
    let mut found = vec![0.0f32; 256];
    device.download(c.into(), bytemuck::cast_slice_mut(&mut found))?;
    Ok((found, expected))
}

#[test]
fn tensor_core_products_are_exact() {
    for order in ORDERS {
        for columns in [false, true] {
            let (found, expected) = product(order, columns, FAULTLESS).unwrap();
            assert_eq!(found, expected, "{order:?}, columns {columns}");
        }
    }
}

#[test]
fn a_product_that_a_lane_stays_away_from_is_an_error() {
    for order in ORDERS {
        let message = product(order, false, 1).unwrap_err().to_string();
        assert!(message.contains("warp_product: barrier not reached by all"), "{message}");
    }
}

#[test]
fn lanes_that_ask_for_different_or_misaligned_matrices_are_errors() {
    for (fault, expected) in [(2, "differs between lanes"), (3, "not aligned to 32 bytes")] {
        let message = product(Order::Forward, false, fault).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_matrix_read_before_the_warp_has_written_it_shows_as_poison() {
    for order in ORDERS {
        let (found, _) = product(order, true, 4).unwrap();
        assert!(found.iter().any(|v| v.is_nan()), "{order:?}");
    }
}
