//! Blocks of a stage in one cooperative launch: the same as one launch after another, to the bit.

use fpenet::ModelConfig;
use fpenet::backend::cpu::CpuBackend;
use fpenet::backend::gpu::emulated::{Emulated, Order};
use fpenet::backend::gpu::launch::CascadeShape;
use fpenet::backend::gpu::variants::Stage3;
use fpenet::backend::gpu::{Element, GpuBackend, Variants};
use fpenet::backend::{Backend, Precision, State};
use fpenet::graph::{Mode, ParamRole, Plan, Shape, Step, Tensor};
use fpenet::model::Model;
use fpenet::ops::{Act, Cascade, Norm, Op};

use super::harness::{Params, Random, SHARED, distance, with_variants};
use super::network::outputs;
use super::products::{conv, kernels};
use super::{ORDERS, WEIGHT};

const PERSISTENT: Stage3 = Stage3::Persistent;

/// Projection and expansion, then `blocks` blocks over the expanded tensor, the last one without an
/// expansion; planes with gaps between images.
fn stage(blocks: usize, dilations: &[usize], (n, h, w): (usize, usize, usize)) -> Plan {
    const C: usize = 64;
    let mut params = Params::default();
    let mut next = 0;
    let mut place = |c: usize, gap: usize| {
        let (plane_stride, batch_stride) = (h * w, (c + gap) * h * w);
        let shape = Shape::new(n, c, h, w);
        let tensor = Tensor { offset: next, shape, batch_stride, plane_stride };
        next = (next + n * batch_stride).next_multiple_of(16) + 16;
        tensor
    };
    let (input, expanded) = (place(4 * C, 0), place(4 * C, 0));
    // Blocks write by turns to one of two; the first reads neither.
    let (residual, outputs) = (place(C, C), [place(C, 3), place(C, 0)]);
    let step = |op: Op, inputs: Vec<Tensor>, output: Tensor| Step {
        name: "test".into(),
        op,
        joined: false,
        byte_scale: None,
        grad_inputs: vec![None; inputs.len()],
        inputs,
        output,
        saved: Vec::new(),
        grad_output: None,
    };
    let mut steps = Vec::new();
    let mut source = input;
    let mut before = residual;
    for block in 0..=blocks {
        if block > 0 {
            let width = 4 * C / dilations.len();
            let weights = dilations.iter().map(|_| params.add(&[width, 1, 3, 3], WEIGHT)).collect();
            let biases = dilations.iter().map(|_| params.add(&[width], ParamRole::Bias)).collect();
            let op = Cascade {
                channels: 4 * C,
                stride: 1,
                dilations: dilations.to_vec(),
                addition: true,
                weights,
                norm: Norm::Folded(biases),
            };
            steps.push(step(Op::Cascade(op), vec![expanded], expanded));
        }
        let y = outputs[block % 2];
        let act = if block % 2 == 0 { Act::None } else { Act::Relu };
        let project = conv(&mut params, 4 * C, C, act);
        steps.push(step(Op::Conv1x1(project), vec![source, before], y));
        if block < blocks {
            let expand = conv(&mut params, C, 4 * C, Act::Relu);
            steps.push(step(Op::Conv1x1(expand), vec![y], expanded));
        }
        (source, before) = (expanded, y);
    }
    let params = params.specs();
    let end = params.last().map_or(0, |p| p.offset + p.len()).next_multiple_of(16);
    Plan {
        mode: Mode::Logits,
        steps,
        input,
        logits: before,
        grad_logits: None,
        named: vec![("residual".into(), residual)],
        params,
        param_len: end,
        trainable_len: end,
        arena_len: next,
    }
}

/// The last block's output, of the second of two passes.
fn run(plan: &Plan, backend: &mut dyn Backend) -> Vec<f32> {
    let mut random = Random(17);
    let mut values = |len: usize, scale: f32| -> Vec<f32> {
        random.values(len).iter().map(|v| v * scale).collect()
    };
    backend.prepare(plan).unwrap();
    // Weights as small as keep the sums near one.
    backend.write_state(State::Params, &values(plan.param_len, 0.2)).unwrap();
    let (input, residual) = (values(plan.input.shape.len(), 1.0), plan.named[0].1);
    let before = values(residual.shape.len(), 1.0);
    let mut out = vec![0.0; plan.logits.shape.len()];
    for _ in 0..2 {
        backend.write(&plan.input, &input).unwrap();
        backend.write(&residual, &before).unwrap();
        backend.forward(plan).unwrap();
        backend.read(&plan.logits, &mut out).unwrap();
    }
    out
}

const PRECISIONS: [(Precision, Element, f64); 2] =
    [(Precision::F32, Element::F32, 1e-5), (Precision::F16, Element::F16, 1e-2)];

/// Whole planes in place; tiles with halos, which change sides; planes and blocks that are odd, more
/// images than one; weights in shared memory or not.
#[test]
fn blocks_in_one_launch_are_the_same_as_one_launch_after_another() {
    let small: &[usize] = &[1, 2, 2, 2];
    for (blocks, dilations, size, tiled, limit) in [
        (2, &[1, 2, 4, 8][..], (3, 5, 7), false, SHARED),
        (1, &[1, 2], (1, 9, 16), false, 228 << 10),
        (3, small, (2, 1, 2), false, 64 << 10),
        (1, small, (1, 30, 60), true, 228 << 10),
    ] {
        let plan = stage(blocks, dilations, size);
        let reference = run(&plan, &mut CpuBackend::new(Some(1)).unwrap());
        for (precision, element, tolerance) in PRECISIONS {
            // Less than two whole planes, enough for tiles of 8 x 32.
            let cascade_kb = if tiled { if element == Element::F16 { 5 } else { 9 } } else { 0 };
            let plane = (size.1, size.2);
            let (addition, stride) = (true, 1);
            let shape = CascadeShape { dilations, addition, stride, input: plane, output: plane };
            let tiling = shape.walk_tiling(element, if tiled { cascade_kb << 10 } else { limit });
            let tile = tiling.map(|tiling| (tiling.tile_h, tiling.tile_w));
            assert_eq!(tile, Some(if tiled { (8, 32) } else { plane }));
            let separate = Variants { cascade_kb, ..Variants::default() };
            let variants = Variants { stage3: PERSISTENT, ..separate };
            let used = kernels(&plan, element, limit, variants);
            assert!(used.len() == 1 && used[0].starts_with("stage_blocks_"), "{used:?}");
            let used = kernels(&plan, element, limit, separate);
            assert_eq!(used.len(), 2 * blocks + 1, "{used:?}");
            let what = format!("{blocks} blocks of {size:?}, {precision:?}");
            let one_by_one = run(&plan, &mut with_variants(ORDERS[0], limit, precision, separate));
            let error = distance(&one_by_one, &reference);
            assert!(error <= tolerance, "{what}: relative L2 {error:e}");
            // Threads and blocks are those of either precision: one order will do in f32.
            let orders = if precision == Precision::F16 { &ORDERS[..] } else { &ORDERS[2..] };
            for &order in orders {
                let found = run(&plan, &mut with_variants(order, limit, precision, variants));
                assert!(found == one_by_one, "{what}: {order:?}");
            }
        }
    }
}

/// From one block that does everything to some that have nothing to do in every other phase.
#[test]
fn any_number_of_resident_blocks_gives_the_same_result() {
    let plan = stage(1, &[1, 2, 4, 8], (1, 6, 23));
    let variants = Variants { stage3: PERSISTENT, ..Variants::default() };
    let found = [1, 2, 7, 20].map(|resident| {
        let device = Emulated::new(Order::Shuffled(3), SHARED).with_resident_blocks(resident);
        run(&plan, &mut GpuBackend::new(device, Precision::F16).with_variants(variants))
    });
    assert!(found.iter().all(|other| *other == found[0]));
    let device = Emulated::default().with_resident_blocks(0);
    let mut none = GpuBackend::new(device, Precision::F16).with_variants(variants);
    none.prepare(&plan).unwrap();
    let message = none.forward(&plan).unwrap_err().to_string();
    assert!(message.contains("stage_blocks_f16_c64: a cooperative grid"), "{message}");
}

#[test]
fn stages_longer_than_a_launch_has_room_for_take_several() {
    let plan = stage(20, &[1, 2], (1, 1, 3));
    let variants = Variants { stage3: PERSISTENT, ..Variants::default() };
    let used = kernels(&plan, Element::F16, SHARED, variants);
    assert_eq!(used, ["stage_blocks_f16_c64"; 2]);
    let on = |variants| run(&plan, &mut with_variants(ORDERS[2], SHARED, Precision::F16, variants));
    assert!(on(variants) == on(Variants::default()));
}

#[test]
fn what_does_not_fit_into_one_launch_runs_one_by_one() {
    let plan = stage(2, &[1, 2, 4, 8], (1, 5, 7));
    let count = |limit, change: &str| {
        let text = format!("stage3=persistent,{change}");
        kernels(&plan, Element::F16, limit, text.parse().unwrap()).len()
    };
    assert_eq!(count(SHARED, "stage3=persistent"), 1);
    assert_eq!(count(SHARED, "stage3=separate"), 5);
    assert_eq!(count(32 << 10, "stage3=persistent"), 5, "its tile of 64 pixels takes 45 KB");
    assert_eq!(count(SHARED, "cascade=wide"), 5);
    assert_eq!(count(SHARED, "pairs=separate"), 7);
}

#[test]
fn networks_with_a_persistent_stage_agree_with_the_cpu() {
    let config = ModelConfig { p: 1, q: 3, ..ModelConfig::default() };
    let relu = ModelConfig {
        block_activation: fpenet::config::BlockActivation::Relu,
        long_skip: false,
        branches: 2,
        ..config.clone()
    };
    for (config, size) in [(config, (2, 43, 59)), (relu, (3, 24, 40))] {
        let model = Model::init(config, 5).unwrap();
        let cpu = || -> Box<dyn Backend> { Box::new(CpuBackend::new(Some(1)).unwrap()) };
        let (reference, _) = outputs(&model, cpu, size);
        for (precision, _, tolerance) in PRECISIONS {
            let on = |order, variants| {
                let gpu = || -> Box<dyn Backend> {
                    Box::new(with_variants(order, SHARED, precision, variants))
                };
                outputs(&model, gpu, size)
            };
            let separate = on(Order::Forward, Variants::default());
            let variants = Variants { stage3: PERSISTENT, ..Variants::default() };
            let found = on(Order::Forward, variants);
            let error = distance(&found.0, &reference);
            assert!(error <= tolerance, "{size:?}, {precision:?}: {error:e}");
            assert!(found == separate, "{size:?}, {precision:?}: another result than separate");
            if precision == Precision::F16 {
                let order = Order::Shuffled(8);
                assert!(on(order, variants) == found, "{size:?}, {precision:?}: {order:?}");
            }
        }
    }
}
