//! The 1x1 convolutions in all their kernels: cuBLAS's way, one kernel each, and a projection with
//! the next expansion in one launch.

use fpenet::backend::cpu::CpuBackend;
use fpenet::backend::gpu::emulated::Order;
use fpenet::backend::gpu::lower::{Memory, Target, lower};
use fpenet::backend::gpu::variants::{Pairs, Products};
use fpenet::backend::gpu::{Buffer, Command, Element, Variants};
use fpenet::backend::{Backend, Precision, State};
use fpenet::graph::{Mode, ParamRole, Plan, Shape, Step, Tensor};
use fpenet::ops::{Act, Conv1x1, Op};

use super::WEIGHT;
use super::harness::{
    Case, Params, Random, SHARED, check_half_variants, check_variants, distance, with_variants,
};

const BLAS: Variants = Variants { products: Products::Blas, ..Variants::PLAIN };
const KERNELS: Variants = Variants { products: Products::Fused, ..Variants::PLAIN };

pub(super) fn conv(params: &mut Params, inp: usize, out: usize, act: Act) -> Conv1x1 {
    Conv1x1 {
        in_channels: inp,
        out_channels: out,
        weight: params.add(&[out, inp, 1, 1], WEIGHT),
        bias: Some(params.add(&[out], ParamRole::Bias)),
        act,
    }
}

#[test]
fn convolutions_1x1_of_every_kernel_agree_with_the_cpu() {
    // Gates, vectors, the tiles of 16, 32 and 64 outputs, more than one tile and more than one step
    // of 64 inputs; planes that are odd and planes whose rows can be moved 16 bytes at a time.
    let channels = [(1, 1), (16, 16), (24, 32), (70, 33), (64, 130), (130, 64), (5, 70)];
    for (n, h, w) in [(2, 1, 1), (1, 9, 33), (2, 8, 24), (1, 7, 40)] {
        for (inp, out) in channels {
            for (residual, act) in [(true, Act::None), (false, Act::Relu)] {
                let mut params = Params::default();
                let op = Op::Conv1x1(conv(&mut params, inp, out, act));
                let inputs = [Shape::new(n, inp, h, w), Shape::new(n, out, h, w)];
                let case = Case::inference(op, &inputs[..1 + usize::from(residual)], params);
                for variants in [BLAS, KERNELS] {
                    check_variants(&case, SHARED, variants);
                    check_half_variants(&case, SHARED, variants);
                }
            }
        }
    }
}

/// A projection of 4 c channels to c with a residual, and an expansion of its result.
struct Pair {
    plan: Plan,
    residual: Tensor,
    between: Tensor,
}

/// Tensors with gaps between them; `in_place` expands over the projection's input.
fn pair(c: usize, (n, h, w): (usize, usize, usize), in_place: bool, project_act: Act) -> Pair {
    let mut params = Params::default();
    let project = conv(&mut params, 4 * c, c, project_act);
    let expand = conv(&mut params, c, 4 * c, Act::Relu);
    let mut next = 0;
    let mut place = |c: usize, gap: usize| {
        let plane_stride = h * w;
        let batch_stride = (c + gap) * plane_stride;
        let tensor =
            Tensor { offset: next, shape: Shape::new(n, c, h, w), batch_stride, plane_stride };
        next = (next + n * batch_stride).next_multiple_of(16) + 16;
        tensor
    };
    // The residual and the result live in the halves of a concatenation, as in the network.
    let (x, residual, y) = (place(4 * c, 0), place(c, c), place(c, c));
    let z = if in_place { x } else { place(4 * c, 0) };
    let step = |op: Conv1x1, inputs: Vec<Tensor>, output: Tensor| Step {
        name: "test".into(),
        op: Op::Conv1x1(op),
        joined: false,
        byte_scale: None,
        grad_inputs: vec![None; inputs.len()],
        inputs,
        output,
        saved: Vec::new(),
        grad_output: None,
    };
    let params = params.specs();
    let end = params.last().map_or(0, |p| p.offset + p.len()).next_multiple_of(16);
    let plan = Plan {
        mode: Mode::Logits,
        steps: vec![step(project, vec![x, residual], y), step(expand, vec![y], z)],
        input: x,
        logits: z,
        grad_logits: None,
        named: Vec::new(),
        params,
        param_len: end,
        trainable_len: end,
        arena_len: next,
    };
    Pair { plan, residual, between: y }
}

/// The projection's result and the expansion's.
fn run(pair: &Pair, backend: &mut dyn Backend) -> [Vec<f32>; 2] {
    let plan = &pair.plan;
    let mut random = Random(11);
    // Weights as small as keep the sums near one.
    let mut values = |len: usize, scale: f32| -> Vec<f32> {
        random.values(len).iter().map(|v| v * scale).collect()
    };
    backend.prepare(plan).unwrap();
    backend.write(&plan.input, &values(plan.input.shape.len(), 1.0)).unwrap();
    backend.write(&pair.residual, &values(pair.residual.shape.len(), 1.0)).unwrap();
    backend.write_state(State::Params, &values(plan.param_len, 0.2)).unwrap();
    backend.forward(plan).unwrap();
    [pair.between, plan.logits].map(|tensor| {
        let mut out = vec![0.0; tensor.shape.len()];
        backend.read(&tensor, &mut out).unwrap();
        out
    })
}

/// Names of a plan's kernels.
pub(super) fn kernels(
    plan: &Plan,
    element: Element,
    shared_limit: usize,
    variants: Variants,
) -> Vec<&'static str> {
    let buffer = Buffer(0);
    let memory = Memory {
        arena: buffer,
        params: buffer,
        params_half: Some(buffer),
        grads: None,
        scratch: buffer,
        labels: buffer,
        moments: None,
        statistics: buffer,
        rgb: None,
        control: buffer,
        counters: buffer,
    };
    let program = lower(plan, &memory, Target { element, shared_limit, variants }).unwrap();
    let name = |command: &Command| match command {
        Command::Launch(launch) => launch.kernel,
        Command::Gemm(_) => "gemm",
    };
    program.forward.iter().map(name).collect()
}

#[test]
fn a_projection_and_an_expansion_in_one_launch_agree_with_the_cpu() {
    // Rows of 16 bytes and odd planes, less than a tile, several tiles with a rest, images.
    let sizes = [(1, 1, 1), (2, 5, 7), (1, 8, 16), (2, 8, 24), (1, 11, 13)];
    // A TITAN V and a TITAN RTX; weights staged where they fit.
    for (c, size) in [32, 64].into_iter().flat_map(|c| sizes.map(|size| (c, size))) {
        for (in_place, act) in [(false, Act::None), (true, Act::Relu)] {
            let pair = pair(c, size, in_place, act);
            let reference = run(&pair, &mut CpuBackend::new(Some(1)).unwrap());
            for (limit, pair_pixels, stage_weights) in [
                (SHARED, 128, true),
                (SHARED, 32, true),
                (64 << 10, 64, false),
                (228 << 10, 64, true),
            ] {
                let variants = Variants { pair_pixels, stage_weights, ..Variants::default() };
                for (precision, element, tolerance) in
                    [(Precision::F32, Element::F32, 1e-5), (Precision::F16, Element::F16, 1e-2)]
                {
                    let used = kernels(&pair.plan, element, limit, variants);
                    assert!(used.len() == 1 && used[0].starts_with("pair_"), "{used:?}");
                    let on =
                        |order| run(&pair, &mut with_variants(order, limit, precision, variants));
                    let found = on(Order::Forward);
                    for (found, reference) in found.iter().zip(&reference) {
                        let error = distance(found, reference);
                        let what = format!("{used:?} {size:?} {in_place} {variants:?}");
                        assert!(error <= tolerance, "{what}: relative L2 {error:e}");
                    }
                    assert!(on(Order::Shuffled(5)) == found, "{used:?}: order of threads");
                }
            }
        }
    }
}

#[test]
fn pairs_run_one_by_one_where_a_launch_for_both_would_not_be_safe_or_is_not_wanted() {
    let separate = Variants { pairs: Pairs::Separate, ..Variants::default() };
    let count =
        |pair: &Pair, limit, variants| kernels(&pair.plan, Element::F16, limit, variants).len();
    let plain = pair(32, (1, 4, 8), false, Act::None);
    assert_eq!(count(&plain, SHARED, Variants::default()), 1);
    assert_eq!(count(&plain, SHARED, separate), 2);
    assert_eq!(count(&plain, 16 << 10, Variants::default()), 2, "no tile fits");
    assert_eq!(count(&pair(16, (1, 4, 8), false, Act::None), SHARED, Variants::default()), 2);
    // The expansion over the residual, which other blocks still read.
    let mut over = pair(32, (1, 4, 8), false, Act::None);
    over.plan.steps[1].output.offset = over.residual.offset;
    assert_eq!(count(&over, SHARED, Variants::default()), 2);
}
