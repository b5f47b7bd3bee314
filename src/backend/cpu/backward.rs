//! Backward dispatch: from a planned step to the operator's CPU function.

use super::backend::CpuBackend;
use super::{View, ViewMut};
use crate::graph::{ParamId, Plan, Step};
use crate::ops::cascade::CascadeBackward;
use crate::ops::meu_fuse::MeuBackward;
use crate::ops::{
    BatchNorm, Cascade, Norm, Op, activation, add, batch_norm, channel_mean, concat, conv1x1,
    global_pool, resize,
};

/// Runs the backward of one operator: gradients of its operands and of its parameters. Every
/// parameter belongs to one operator, so its gradient is overwritten, never added to.
pub(super) fn step(cpu: &mut CpuBackend, plan: &Plan, step: &Step) {
    let (isa, base) = (cpu.isa, cpu.arena.base());
    let input = |i: usize| unsafe { View::of(base, &step.inputs[i]) };
    let output = unsafe { View::of(base, &step.output) };
    let Some(dy) = step.grad_output else { return };
    let dy = unsafe { View::of(base, &dy) };
    let dx = |i: usize| {
        let slot = step.grad_inputs.get(i).copied().flatten()?;
        Some((unsafe { ViewMut::of(base, &slot.tensor) }, slot.accumulate))
    };
    match &step.op {
        // The last three are refused in training plans.
        Op::Input { .. } | Op::Subsample | Op::WeightedPool | Op::MeuScores(_) => {}
        Op::Conv3x3(op) => {
            let mut dw = vec![0.0; plan.param(op.weight).len()];
            let mut db = op.bias.map(|b| vec![0.0; plan.param(b).len()]);
            op.backward(isa, input(0), dy, &mut dw, db.as_deref_mut());
            store(cpu, plan, op.weight, &dw);
            if let Some((id, db)) = op.bias.zip(db) {
                store(cpu, plan, id, &db);
            }
        }
        Op::Conv1x1(op) => {
            let mut dw = vec![0.0; plan.param(op.weight).len()];
            let mut db = op.bias.map(|b| vec![0.0; plan.param(b).len()]);
            let w = &cpu.params[plan.param(op.weight)];
            conv1x1::backward(isa, input(0), dy, w, dx(0), &mut dw, db.as_deref_mut());
            store(cpu, plan, op.weight, &dw);
            if let Some((id, db)) = op.bias.zip(db) {
                store(cpu, plan, id, &db);
            }
        }
        Op::BatchNorm(op) => {
            let dx0 = dx(0).expect("the graph builder puts batch norms behind convolutions");
            batch_norm(cpu, plan, step, op, (input(0), output, dy), dx0, dx(1));
        }
        Op::Cascade(op) => {
            let dx0 = dx(0).expect("the graph builder puts cascades behind convolutions");
            cascade(cpu, plan, step, op, (input(0), output, dy), dx0);
        }
        Op::Activation(op) => {
            if let Some((dx, accumulate)) = dx(0) {
                activation::backward(isa, output, dy, op.act, dx, accumulate);
            }
        }
        Op::Add => {
            for (dx, accumulate) in [dx(0), dx(1)].into_iter().flatten() {
                add::backward(isa, dy, dx, accumulate);
            }
        }
        Op::Concat => {
            let mut channel = 0;
            for (i, tensor) in step.inputs.iter().enumerate() {
                if let Some((dx, accumulate)) = dx(i) {
                    concat::backward(isa, dy, channel, dx, accumulate);
                }
                channel += tensor.shape.c;
            }
        }
        Op::GlobalAvgPool => {
            if let Some((dx, accumulate)) = dx(0) {
                global_pool::backward(dy, dx, accumulate);
            }
        }
        Op::ChannelMean => {
            if let Some((dx, accumulate)) = dx(0) {
                channel_mean::backward(isa, dy, dx, accumulate);
            }
        }
        Op::MeuFuse(op) => {
            let grad = |i: usize| dx(i).expect("the operands of a fusion are computed");
            op.backward(
                isa,
                MeuBackward {
                    h: input(0),
                    l: input(1),
                    ca: input(2),
                    sa: op.spatial.then(|| input(3)),
                    dy,
                    dh: grad(0),
                    dl: grad(1),
                    dca: grad(2),
                    dsa: op.spatial.then(|| grad(3)),
                },
            );
        }
        Op::Resize => {
            if let Some((dx, accumulate)) = dx(0) {
                resize::backward(isa, dy, dx, accumulate);
            }
        }
    }
}

fn store(cpu: &mut CpuBackend, plan: &Plan, id: ParamId, gradient: &[f32]) {
    cpu.grads[plan.param(id)].copy_from_slice(gradient);
}

fn batch_norm(
    cpu: &mut CpuBackend,
    plan: &Plan,
    step: &Step,
    op: &BatchNorm,
    (x, y, dy): (View, View, View),
    dx: (ViewMut, bool),
    dresidual: Option<(ViewMut, bool)>,
) {
    let saved = unsafe { View::of(cpu.arena.base(), &step.saved[0]) };
    let weight = &cpu.params[plan.param(op.params.weight)];
    let mut dweight = vec![0.0; op.channels];
    let mut dbias = vec![0.0; op.channels];
    batch_norm::backward(
        cpu.isa,
        x,
        y,
        dy,
        weight,
        saved.plane(0, 0),
        saved.plane(0, 1),
        op.act,
        dx,
        dresidual,
        &mut dweight,
        &mut dbias,
    );
    store(cpu, plan, op.params.weight, &dweight);
    store(cpu, plan, op.params.bias, &dbias);
}

fn cascade(
    cpu: &mut CpuBackend,
    plan: &Plan,
    step: &Step,
    op: &Cascade,
    (x, y, dy): (View, View, View),
    dx: (ViewMut, bool),
) {
    let Norm::Batch(norms) = &op.norm else { return };
    let base = cpu.arena.base();
    let saved = unsafe { View::of(base, &step.saved[1]) };
    let weights: Vec<&[f32]> = op.weights.iter().map(|&w| &cpu.params[plan.param(w)]).collect();
    let scales: Vec<&[f32]> = norms.iter().map(|bn| &cpu.params[plan.param(bn.weight)]).collect();
    let io = CascadeBackward {
        x,
        y,
        u: unsafe { View::of(base, &step.saved[0]) },
        dy,
        dx,
        weights: &weights,
        scales: &scales,
        saved_mean: saved.plane(0, 0),
        saved_invstd: saved.plane(0, 1),
    };
    let gradients = op.backward(cpu.isa, io);
    for ((gradient, &weight), bn) in gradients.iter().zip(&op.weights).zip(norms) {
        store(cpu, plan, weight, &gradient.weight);
        store(cpu, plan, bn.weight, &gradient.scale);
        store(cpu, plan, bn.bias, &gradient.shift);
    }
}
