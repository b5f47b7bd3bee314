//! The collapsed decoder (`graph/passes/collapse.rs`) in few launches: its gates by kernels/decoder.cu
//! instead of an operator each, and in plans for labels its scores with resize and argmax; or, in
//! plans for labels, all of it in two (kernels/decoder_sums.cu, kernels/decoder_labels.cu).

use super::scores::{gather, map_len, scores};
use super::{Lowering, Typed, act_code, args, forward};
use crate::backend::gpu::device::Place;
use crate::backend::gpu::launch::{self, Arg, DecoderShape, DecoderTiling};
use crate::backend::gpu::variants::Decoder;
use crate::graph::{Mode, Plan, Step};
use crate::ops::{Act, Conv1x1, MeuScores, Op};

/// The decoder's steps in a plan, in its order.
pub(super) struct Steps<'a> {
    first: usize,
    pool: &'a Step,
    ca2: (&'a Step, &'a Conv1x1),
    sa2: (&'a Step, &'a Conv1x1),
    low_pool: &'a Step,
    low: &'a Conv1x1,
    high: &'a Conv1x1,
    ca1: (&'a Step, &'a Conv1x1),
    sa1: (&'a Step, &'a Conv1x1),
    t: &'a Step,
    z: (&'a Step, &'a MeuScores),
    scores: (&'a Step, &'a MeuScores),
    /// What the launches hand on in scratch.
    maps: Option<[Place; 2]>,
    /// Where it runs in two launches: their shapes, and what the first one hands on.
    fused: Option<Fused>,
}

/// The decoder in two launches.
struct Fused {
    shape: DecoderShape,
    tiling: DecoderTiling,
    t: Place,
    /// Elements of an image's maps.
    lens: [usize; 2],
}

/// Steps of the decoder.
const COUNT: usize = 13;

/// Finds the decoder where it is to run in few launches.
pub(super) fn find<'a>(plan: &'a Plan, variant: Decoder) -> Option<Steps<'a>> {
    if variant == Decoder::Separate {
        return None;
    }
    let pool = plan.steps.iter().position(|step| matches!(step.op, Op::WeightedPool))?;
    let first = pool.checked_sub(5)?;
    let steps: &[Step; COUNT] = plan.steps.get(first..first + COUNT)?.try_into().ok()?;
    let conv = |step: &'a Step| match &step.op {
        Op::Conv1x1(op) if step.inputs.len() == 1 && op.bias.is_some() => Some(op),
        _ => None,
    };
    let module = |step: &'a Step| match &step.op {
        Op::MeuScores(op) => Some(op),
        _ => None,
    };
    let [pool, ca2, sa2, low_pool, low, high_pool, high, mean, ca1, sa1, t, z, scores] = steps;
    let ops = matches!(pool.op, Op::GlobalAvgPool)
        && matches!(low_pool.op, Op::GlobalAvgPool)
        && matches!(&mean.op, Op::MeuFuse(fuse) if !fuse.spatial);
    let reads = |step: &Step, inputs: &[&Step]| {
        step.inputs.iter().copied().eq(inputs.iter().map(|input| input.output))
    };
    let (s3, x2, x1) = (pool.inputs[0], sa2.inputs[0], sa1.inputs[0]);
    let linked = reads(ca2, &[pool])
        && low_pool.inputs == [x2]
        && reads(low, &[low_pool])
        && high_pool.inputs == [s3, sa2.output]
        && reads(high, &[high_pool])
        && reads(mean, &[high, low, ca2])
        && reads(ca1, &[mean])
        && t.inputs == [s3]
        && z.inputs == [t.output, x2, ca2.output, sa2.output]
        && scores.inputs == [z.output, x1, ca1.output, sa1.output];
    (ops && linked).then_some(Steps {
        first,
        pool,
        ca2: (ca2, conv(ca2)?),
        sa2: (sa2, conv(sa2)?),
        low_pool,
        low: conv(low)?,
        high: conv(high)?,
        ca1: (ca1, conv(ca1)?),
        sa1: (sa1, conv(sa1)?),
        t,
        z: (z, module(z)?),
        scores: (scores, module(scores)?),
        maps: None,
        fused: None,
    })
}

impl Steps<'_> {
    /// Whether a step is one of the decoder's.
    pub(super) fn contain(&self, index: usize) -> bool {
        (self.first..self.first + COUNT).contains(&index)
    }

    /// Commands of one of the decoder's steps: all gates come with the first one, and the small
    /// tensors between them are not written. Tensors in the arena are written no earlier than the
    /// plan has it, except sa1, beside which everything that is read later lives already.
    pub(super) fn step(&mut self, low: &mut Lowering, index: usize) {
        match index - self.first {
            0 => self.begin(low),
            12 if self.fused.is_some() => self.fused_labels(low),
            _ if self.fused.is_some() => {}
            10 => forward::step(low, self.t),
            11 => {
                let [map, _] = self.maps.expect("the gates come first");
                scores(low, self.z.1, self.z.0, map);
            }
            12 => {
                let [_, map] = self.maps.expect("the gates come first");
                if !self.labels(low, map) {
                    scores(low, self.scores.1, self.scores.0, map);
                }
            }
            _ => {}
        }
    }

    /// What all pixels have to wait for, in one launch where it can be.
    fn begin(&mut self, low: &mut Lowering) {
        if !self.sums(low) {
            self.gates(low);
        }
    }

    fn gates(&mut self, low: &mut Lowering) {
        self.spatial(low);
        let (s3, x2, sa2) = (&self.pool.inputs[0], &self.low_pool.inputs[0], &self.sa2.0.output);
        let (n, c3, c2) = (s3.shape.n, s3.shape.c, x2.shape.c);
        let (z, scores) = (self.z.1, self.scores.1);
        let maps = [z, scores].map(|op| low.scratch(n * map_len(op)));
        low.hold_scratch();
        self.maps = Some(maps);

        let gathered = gather(low, s3.shape, sa2);
        let means = low.scratch(n * (2 * c3 + c2 + 1));
        let name = low.name(Typed { f32: "decoder_means_f32", f16: "decoder_means_f16" });
        let args = args![
            low.at(s3),
            low.at(x2),
            low.at(sa2),
            gathered,
            means,
            c3,
            c2,
            s3.shape.plane(),
            x2.shape.plane(),
            s3.batch_stride,
            s3.plane_stride,
            x2.batch_stride,
            x2.plane_stride,
            sa2.batch_stride,
        ];
        low.launch(launch::block_per_plane(name, s3.shape.with_channels(c3 + c2 + 1), args));

        let mut args = args![means];
        for op in [self.ca2.1, self.low, self.high, self.ca1.1] {
            args.extend(args![low.param(op.weight), op.bias.map(|b| low.param(b))]);
        }
        for op in [z, scores] {
            let params = [op.mix, op.low, op.low_bias, op.bias];
            args.extend(params.map(|id| Arg::from(low.param(id))));
        }
        let (width2, width1) = (z.width, scores.width);
        args.extend(args![maps[0], maps[1], act_code(self.ca2.1.act), act_code(self.ca1.1.act)]);
        args.extend(args![c3, c2, width2, width1, scores.in_channels, z.classes]);
        let floats = 2 * c3 + c2 + 1 + 3 * width2 + width1;
        let elements = map_len(z) + map_len(scores);
        low.launch(launch::decoder_gates(elements, n, floats, args));
    }

    /// Both spatial attentions.
    fn spatial(&self, low: &mut Lowering) {
        let ((step1, op1), (step2, op2)) = (self.sa1, self.sa2);
        let (x1, x2, y1, y2) = (&step1.inputs[0], &step2.inputs[0], &step1.output, &step2.output);
        let name = low.name(Typed { f32: "decoder_spatial_f32", f16: "decoder_spatial_f16" });
        let mut args = args![low.at(x1), low.at(x2)];
        for op in [op1, op2] {
            args.extend(args![low.param(op.weight), op.bias.map(|b| low.param(b))]);
        }
        args.extend(args![
            low.at(y1),
            low.at(y2),
            act_code(op1.act),
            act_code(op2.act),
            x1.shape.c,
            x2.shape.c,
            x1.shape.plane(),
            x2.shape.plane(),
            x1.batch_stride,
            x1.plane_stride,
            x2.batch_stride,
            x2.plane_stride,
            y1.batch_stride,
            y2.batch_stride,
        ]);
        low.launch(launch::decoder_spatial(name, x1.shape, x2.shape, args));
    }

    /// Scores, resize and argmax in one launch, in a plan for labels whose tiles fit.
    fn labels(&self, low: &mut Lowering, map: Place) -> bool {
        let (step, op) = self.scores;
        let (t, x, sa, size) =
            (&step.inputs[0], &step.inputs[1], &step.inputs[3], low.plan.input.shape);
        let whole = low.plan.mode == Mode::Labels && low.plan.logits == step.output;
        let tiling = launch::labels_tiling(x.shape, size, op.in_channels, low.shared_limit);
        let Some(tiling) = tiling.filter(|_| whole) else { return false };
        let name = low.name(Typed { f32: "scores_argmax_f32", f16: "scores_argmax_f16" });
        let args = args![
            low.at(t),
            low.at(x),
            low.at(sa),
            map,
            low.memory.labels,
            op.classes,
            op.in_channels,
            t.shape.h,
            t.shape.w,
            x.shape.h,
            x.shape.w,
            size.h,
            size.w,
            tiling.pitch,
            t.batch_stride,
            t.plane_stride,
            x.batch_stride,
            x.plane_stride,
            sa.batch_stride,
        ];
        low.launch(launch::scores_argmax(name, tiling, size, args));
        low.labelled = true;
        true
    }

    /// The first of two launches for the whole decoder, where the plan ends with its labels and the
    /// kernels have its shapes; false where they have not.
    fn sums(&mut self, low: &mut Lowering) -> bool {
        let (z, scores) = (self.z.1, self.scores.1);
        let (s3, x2, x1) =
            (&self.pool.inputs[0], &self.low_pool.inputs[0], &self.scores.0.inputs[1]);
        let wanted = low.variants.decoder == Decoder::Fused
            && low.plan.mode == Mode::Labels
            && low.plan.logits == self.scores.0.output;
        let Op::Conv1x1(t_op) = &self.t.op else { return false };
        let shape = DecoderShape {
            s3: s3.shape,
            x2: x2.shape,
            x1: x1.shape,
            size: low.plan.input.shape,
            classes: z.classes,
            width2: z.width,
            width1: scores.width,
        };
        let plain = t_op.act == Act::None;
        let tiling = shape.tiling(low.element, low.shared_limit).filter(|_| wanted && plain);
        let (Some(tiling), Some(t_bias)) = (tiling, t_op.bias) else { return false };

        let n = s3.shape.n;
        let lens = [x2, x1].map(|x| DecoderShape::map_len(low.element, x.shape.c));
        let maps = lens.map(|len| low.scratch_stored(n * len));
        let t = low.scratch_stored(n * launch::MAP_ROWS * s3.shape.plane());
        low.hold_scratch();
        self.maps = Some(maps);
        let partial = low.scratch(n * shape.sum_blocks() * shape.sums_pitch());
        let counters = low.counters(n);

        let mut args = args![low.at(s3), low.at(x2), low.param_stored(t_op.weight)];
        args.extend(args![low.param(t_bias), t, partial, counters]);
        for op in [self.sa2.1, self.ca2.1, self.low, self.high, self.ca1.1] {
            args.extend(args![low.param(op.weight), op.bias.map(|b| low.param(b))]);
        }
        for op in [z, scores] {
            let params = [op.mix, op.low, op.low_bias, op.bias];
            args.extend(params.map(|id| Arg::from(low.param(id))));
        }
        let sa1 = self.sa1.1;
        args.extend(args![low.param(sa1.weight), sa1.bias.map(|b| low.param(b)), maps[0], maps[1]]);
        args.extend([self.sa2.1, self.ca2.1, self.ca1.1].map(|op| act_code(op.act)));
        args.extend(args![
            s3.shape.c,
            x2.shape.c,
            z.width,
            scores.width,
            x1.shape.c,
            z.classes,
            s3.shape.h,
            s3.shape.w,
            x2.shape.h,
            x2.shape.w,
            tiling.own_pitch,
            tiling.own_len,
            tiling.products,
            tiling.room,
            lens[0],
            lens[1],
            s3.batch_stride,
            s3.plane_stride,
            x2.batch_stride,
            x2.plane_stride,
        ]);
        let name = low.name(Typed { f32: "decoder_sums_f32", f16: "decoder_sums_f16" });
        low.launch(launch::decoder_sums(name, tiling, &shape, args));
        self.fused = Some(Fused { shape, tiling, t, lens });
        true
    }

    /// The second one: labels.
    fn fused_labels(&self, low: &mut Lowering) {
        let (Some(fused), Some(maps)) = (&self.fused, self.maps) else { return };
        let DecoderShape { s3, size, classes, .. } = fused.shape;
        let (x2, x1) = (&self.low_pool.inputs[0], &self.scores.0.inputs[1]);
        let mut args = args![fused.t, low.at(x2), low.at(x1), maps[0], maps[1], low.memory.labels];
        args.extend([self.sa2.1, self.sa1.1].map(|op| act_code(op.act)));
        args.extend(args![
            classes,
            x2.shape.c,
            x1.shape.c,
            s3.h,
            s3.w,
            x2.shape.h,
            x2.shape.w,
            x1.shape.h,
            x1.shape.w,
            size.h,
            size.w,
            fused.tiling.slots,
            fused.lens[0],
            fused.lens[1],
            x2.batch_stride,
            x2.plane_stride,
            x1.batch_stride,
            x1.plane_stride,
        ]);
        let name = low.name(Typed { f32: "decoder_labels_f32", f16: "decoder_labels_f16" });
        low.launch(launch::decoder_labels(name, fused.tiling, size, args));
        low.labelled = true;
    }
}
