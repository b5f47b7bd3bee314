//! Whole networks by the choice of kernels, and the operators of the inference rewrites.

use std::path::Path;

use fpenet::backend::cpu::CpuBackend;
use fpenet::backend::gpu::emulated::Order;
use fpenet::backend::gpu::variants::{
    CascadePlanes, Decoder, Pairs, Products, Stage3, Stem, Strided,
};
use fpenet::backend::gpu::{Element, Variants};
use fpenet::backend::{Backend, Precision, State};
use fpenet::config::{BlockActivation, ModelConfig};
use fpenet::exec::Inference;
use fpenet::graph::passes::{self, Rewrites};
use fpenet::graph::{Graph, Mode, ParamRole, ParamStore, Plan, PlaneLayout, Shape, Step, Tensor};
use fpenet::model::Model;
use fpenet::ops::{Act, Cascade, MeuScores, Norm, Op};

use super::harness::{Case, Params, Random, SHARED, check, check_half, distance, with_variants};
use super::products::{conv, kernels};
use super::{RESIZES, WEIGHT};

#[test]
fn subsampling_agrees_with_the_cpu() {
    for (n, h, w) in [(2, 1, 1), (1, 5, 8), (2, 9, 33), (1, 35, 62)] {
        let case = Case::inference(Op::Subsample, &[Shape::new(n, 3, h, w)], Params::default());
        check(&case, SHARED);
        check_half(&case, SHARED);
    }
}

#[test]
fn weighted_means_agree_with_the_cpu() {
    for [h, w, out_h, out_w] in RESIZES {
        for n in [1, 3] {
            let inputs = [Shape::new(n, 5, h, w), Shape::new(n, 1, out_h, out_w)];
            let case = Case::inference(Op::WeightedPool, &inputs, Params::default());
            check(&case, SHARED);
            check_half(&case, SHARED);
        }
    }
}

#[test]
fn scores_of_a_module_agree_with_the_cpu() {
    for [h, w, out_h, out_w] in RESIZES {
        // One group of classes with room, and more than two.
        for (n, classes) in [(2, 7), (1, 43)] {
            let (in_channels, width) = (9, 6);
            let mut params = Params::default();
            let op = MeuScores {
                in_channels,
                width,
                classes,
                mix: params.add(&[classes, width], WEIGHT),
                low: params.add(&[width, in_channels], WEIGHT),
                low_bias: params.add(&[width], ParamRole::Bias),
                bias: params.add(&[classes], ParamRole::Bias),
            };
            let inputs = [
                Shape::new(n, classes, h, w),
                Shape::new(n, in_channels, out_h, out_w),
                Shape::new(n, width, 1, 1),
                Shape::new(n, 1, out_h, out_w),
            ];
            let case = Case::inference(Op::MeuScores(op), &inputs, params);
            check(&case, SHARED);
            check_half(&case, SHARED);
        }
    }
}

fn model(folder: &str) -> Model {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    Model::load(&data.join(folder).join("model.safetensors")).unwrap()
}

/// Logits and labels of one network on a random image.
pub(super) fn outputs(
    model: &Model,
    backend: impl Fn() -> Box<dyn Backend>,
    (n, h, w): (usize, usize, usize),
) -> (Vec<f32>, Vec<u8>) {
    let image = Random(21).values(n * 3 * h * w);
    let infer = |mode| {
        let mut inference = Inference::new(model, backend(), n, h, w, mode).unwrap();
        inference.run(&image).unwrap();
        inference
    };
    let logits = infer(Mode::Logits).logits().unwrap();
    (logits, labels(model, backend(), (n, h, w)))
}

/// Labels of the same image.
fn labels(model: &Model, backend: Box<dyn Backend>, (n, h, w): (usize, usize, usize)) -> Vec<u8> {
    let mut inference = Inference::new(model, backend, n, h, w, Mode::Labels).unwrap();
    inference.run(&Random(21).values(n * 3 * h * w)).unwrap();
    let mut labels = vec![0; n * h * w];
    inference.labels(&mut labels).unwrap();
    labels
}

/// Pixels at which the labels are not the largest logit's, ties and near ties aside.
fn wrong_labels(logits: &[f32], labels: &[u8], pixels: usize, margin: f32) -> usize {
    let classes = logits.len() / labels.len();
    let at = |i: usize, c: usize| logits[(i / pixels * classes + c) * pixels + i % pixels];
    let wrong = |&i: &usize| {
        let best = (0..classes).map(|c| at(i, c)).fold(f32::MIN, f32::max);
        at(i, usize::from(labels[i])) < best - margin
    };
    (0..labels.len()).filter(wrong).count()
}

#[test]
fn networks_agree_with_the_cpu_whatever_the_kernels() {
    let alone = [
        Variants { products: Products::Fused, ..Variants::PLAIN },
        Variants { pairs: Pairs::Fused, ..Variants::PLAIN },
        Variants { cascade: CascadePlanes::Stored, ..Variants::PLAIN },
        Variants { stem: Stem::Fused, ..Variants::PLAIN },
        Variants { rewrites: true, ..Variants::PLAIN },
        Variants { rewrites: true, decoder: Decoder::Grouped, ..Variants::PLAIN },
        Variants { rewrites: true, decoder: Decoder::Fused, ..Variants::PLAIN },
        Variants { rewrites: true, strided: Strided::Fused, ..Variants::PLAIN },
        Variants { rewrites: true, strided: Strided::Paired, ..Variants::PLAIN },
    ];
    // Odd sides, sides whose halves are odd, images.
    for (folder, size) in [("full_default", (1, 32, 48)), ("meu_odd_size", (2, 27, 37))] {
        let model = model(folder);
        let cpu = || -> Box<dyn Backend> { Box::new(CpuBackend::new(Some(1)).unwrap()) };
        let (reference, _) = outputs(&model, cpu, size);
        let largest = reference.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let all = alone.into_iter().chain([Variants::PLAIN, Variants::default()]);
        for (variants, half) in all.flat_map(|v| [(v, false), (v, true)]) {
            let (precision, tolerance) =
                if half { (Precision::F16, 1e-2) } else { (Precision::F32, 1e-5) };
            let gpu = || -> Box<dyn Backend> {
                Box::new(with_variants(Order::Forward, SHARED, precision, variants))
            };
            let (logits, labels) = outputs(&model, gpu, size);
            let error = distance(&logits, &reference);
            assert!(error <= tolerance, "{folder}, {precision:?}, {variants}: {error:e}");
            let margin = tolerance as f32 * largest;
            let wrong = wrong_labels(&reference, &labels, size.1 * size.2, margin);
            assert_eq!(wrong, 0, "{folder}, {precision:?}, {variants}: labels");
        }
    }
}

/// The kernels that a network takes for labels.
fn network_kernels(
    config: &ModelConfig,
    size: (usize, usize, usize),
    element: Element,
    variants: Variants,
) -> Vec<&'static str> {
    let rewrites = if variants.rewrites { Rewrites::ALL } else { Rewrites::NONE };
    let graph = Graph::fpenet(config).unwrap();
    let params = ParamStore::init(&graph.params, 1);
    let (graph, _) = passes::for_inference_with(&graph, &params, rewrites);
    let plan = Plan::new(&graph, size, Mode::Labels, PlaneLayout::Dense).unwrap();
    kernels(&plan, element, SHARED, variants)
}

/// How many of them begin so.
fn count(kernels: &[&str], prefix: &str) -> usize {
    kernels.iter().filter(|name| name.starts_with(prefix)).count()
}

#[test]
fn the_default_network_takes_few_launches() {
    for (element, launches, pairs) in [(Element::F16, 27, 12), (Element::F32, 33, 10)] {
        let kernels =
            |variants| network_kernels(&ModelConfig::default(), (1, 512, 1024), element, variants);
        let used = kernels(Variants::default());
        assert_eq!(count(&used, "gemm"), 0, "{used:?}");
        assert_eq!(count(&used, "pair_"), pairs, "{used:?}");
        assert_eq!(count(&used, "copy_"), 0, "{used:?}");
        assert_eq!(used.len(), launches, "{used:?}");
        // Eight blocks of two launches each become one, with the strided block's projection; in f32,
        // where strided blocks are not fused, with a cascade of theirs, too.
        let persistent = Variants { stage3: Stage3::Persistent, ..Variants::default() };
        let fewer = if element == Element::F16 { 16 } else { 17 };
        assert_eq!(kernels(persistent).len(), launches - fewer);
        let mma = kernels(Variants { cascade: CascadePlanes::Mma, ..Variants::default() });
        let on_tensor_cores = if element == Element::F16 { 10 } else { 0 };
        assert_eq!(count(&mma, "cascade_mma_f16"), on_tensor_cores, "{mma:?}");
        let plain = kernels(Variants::PLAIN);
        assert!(plain.len() > 80, "{}: {plain:?}", plain.len());
    }
}

/// A network of one block per stage, three images of a size at which every kernel of the decoder has
/// more than one tile with a rest, and sides that are odd at every stage; then sides that are twice
/// those of the scores, in rows that can be moved eight pixels at a time and in others.
#[test]
fn a_decoder_in_two_launches_agrees_with_the_cpu() {
    let odd = [(19, (3, 75, 141)), (11, (3, 21, 139))];
    let doubled = [(2, (2, 16, 16)), (19, (2, 64, 192)), (7, (1, 88, 200))];
    for (classes, size) in odd.into_iter().chain(doubled) {
        let config = ModelConfig { classes, p: 1, q: 1, ..ModelConfig::default() };
        for element in [Element::F32, Element::F16] {
            let used = network_kernels(&config, size, element, Variants::default());
            assert_eq!(count(&used, "decoder_"), 2, "{used:?}");
        }
        let model = Model::init(config, 5).unwrap();
        let cpu = || -> Box<dyn Backend> { Box::new(CpuBackend::new(Some(1)).unwrap()) };
        let (reference, _) = outputs(&model, cpu, size);
        let largest = reference.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::F16, 1e-2)] {
            let labels = |order| {
                let gpu = || -> Box<dyn Backend> {
                    Box::new(with_variants(order, SHARED, precision, Variants::default()))
                };
                labels(&model, gpu(), size)
            };
            let found = labels(Order::Forward);
            let wrong = wrong_labels(&reference, &found, size.1 * size.2, tolerance * largest);
            assert_eq!(wrong, 0, "{classes} classes, {size:?}, {precision:?}");
            // Another block comes last then.
            assert!(labels(Order::Reverse) == found, "{size:?}, {precision:?}");
            assert!(labels(Order::Shuffled(3)) == found, "{size:?}, {precision:?}");
        }
    }
}

/// Sides that are odd, tiles with a rest, more than one tile, images; rows of 16 bytes; blocks whose
/// projection has another non-linearity; dilations that no kernel is made for, with
/// which only the narrower pair fits.
#[test]
fn strided_blocks_in_one_launch_agree_with_the_cpu() {
    let usual = ModelConfig::default().dilations;
    for (block_activation, dilations, pairs, size) in [
        (BlockActivation::Linear, usual.clone(), 2, (3, 75, 141)),
        (BlockActivation::Relu, usual, 2, (1, 64, 128)),
        (BlockActivation::Relu, vec![3, 6, 1, 2], 1, (1, 36, 72)),
    ] {
        let config =
            ModelConfig { p: 2, q: 2, block_activation, dilations, ..ModelConfig::default() };
        let paired = Variants { strided: Strided::Paired, ..Variants::default() };
        let used = network_kernels(&config, size, Element::F16, paired);
        assert_eq!(count(&used, "strided_pair_"), pairs, "{used:?}");
        let model = Model::init(config, 8).unwrap();
        let cpu = || -> Box<dyn Backend> { Box::new(CpuBackend::new(Some(1)).unwrap()) };
        let (reference, _) = outputs(&model, cpu, size);
        let logits = |strided, order| {
            let variants = Variants { strided, ..Variants::default() };
            let gpu = with_variants(order, SHARED, Precision::F16, variants);
            let (n, h, w) = size;
            let mut inference =
                Inference::new(&model, Box::new(gpu), n, h, w, Mode::Logits).unwrap();
            inference.run(&Random(21).values(n * 3 * h * w)).unwrap();
            inference.logits().unwrap()
        };
        let found = logits(Strided::Paired, Order::Forward);
        let error = distance(&found, &reference);
        assert!(error <= 1e-2, "{size:?}: {error:e}");
        // The same roundings in the same places.
        assert!(logits(Strided::Fused, Order::Shuffled(1)) == found, "{size:?}");
        assert!(logits(Strided::Paired, Order::Shuffled(4)) == found, "{size:?}");
    }
}

/// What a launch counts its blocks with is at zero again behind it.
#[test]
fn a_decoder_in_two_launches_can_be_replayed() {
    let config = ModelConfig { p: 1, q: 1, ..ModelConfig::default() };
    let (model, size) = (Model::init(config, 6).unwrap(), (2, 40, 75));
    let gpu = with_variants(Order::Forward, SHARED, Precision::F32, Variants::default());
    let mut inference =
        Inference::new(&model, Box::new(gpu), size.0, size.1, size.2, Mode::Labels).unwrap();
    let mut run = |seed| {
        let mut labels = vec![0; size.0 * size.1 * size.2];
        inference.run(&Random(seed).values(3 * labels.len())).unwrap();
        inference.labels(&mut labels).unwrap();
        labels
    };
    let (first, other) = (run(1), run(2));
    assert!(first != other && run(1) == first);
}

/// Cascades over their own input that do not fit into shared memory as a whole, and what reads them.
#[test]
fn tiled_cascades_in_place_change_sides() {
    let shape = Shape::new(2, 8, 80, 130);
    let mut params = Params::default();
    let mut next = 0;
    let mut place = |shape: Shape| {
        let plane_stride = shape.plane();
        let batch_stride = shape.c * plane_stride;
        let tensor = Tensor { offset: next, shape, batch_stride, plane_stride };
        next = (next + shape.len()).next_multiple_of(16);
        tensor
    };
    let (x, y) = (place(shape), place(shape.with_channels(5)));
    let step = |op: Op, output: Tensor| Step {
        name: "test".into(),
        op,
        joined: false,
        byte_scale: None,
        grad_inputs: vec![None],
        inputs: vec![x],
        output,
        saved: Vec::new(),
        grad_output: None,
    };
    let mut steps = Vec::new();
    for _ in 0..3 {
        let weights = (0..4).map(|_| params.add(&[2, 1, 3, 3], WEIGHT)).collect();
        let biases = (0..4).map(|_| params.add(&[2], ParamRole::Bias)).collect();
        let dilations = vec![1, 2, 4, 8];
        let norm = Norm::Folded(biases);
        let op = Cascade { channels: 8, stride: 1, dilations, addition: true, weights, norm };
        steps.push(step(Op::Cascade(op), x));
    }
    steps.push(step(Op::Conv1x1(conv(&mut params, 8, 5, Act::None)), y));
    let params = params.specs();
    let end = params.last().map_or(0, |p| p.offset + p.len()).next_multiple_of(16);
    let plan = Plan {
        mode: Mode::Logits,
        steps,
        input: x,
        logits: y,
        grad_logits: None,
        named: Vec::new(),
        params,
        param_len: end,
        trainable_len: end,
        arena_len: next,
    };
    let run = |backend: &mut dyn Backend| {
        let mut random = Random(4);
        backend.prepare(&plan).unwrap();
        backend.write(&x, &random.values(shape.len())).unwrap();
        backend.write_state(State::Params, &random.values(end)).unwrap();
        backend.forward(&plan).unwrap();
        let mut out = vec![0.0; y.shape.len()];
        backend.read(&y, &mut out).unwrap();
        out
    };
    let reference = run(&mut CpuBackend::new(Some(1)).unwrap());
    for cascade in [CascadePlanes::Wide, CascadePlanes::Stored] {
        let variants = Variants { cascade, ..Variants::default() };
        for (precision, element, limit, tolerance) in [
            (Precision::F32, Element::F32, 32 << 10, 1e-5),
            (Precision::F16, Element::F16, 32 << 10, 1e-2),
        ] {
            let used = kernels(&plan, element, limit, variants);
            assert!(used.len() == 4, "{used:?}");
            let order = Order::Shuffled(2);
            let found = run(&mut with_variants(order, limit, precision, variants));
            let error = distance(&found, &reference);
            assert!(error <= tolerance, "{precision:?}, {variants}: {error:e}");
        }
    }
}
