//! Forward dispatch: from a planned step to the operator's CPU function.

use std::ops::Range;

use super::backend::CpuBackend;
use super::{View, ViewMut};
use crate::graph::{ParamId, Plan, Step};
use crate::ops::batch_norm::{self, TrainingParams};
use crate::ops::conv1x1::Pointwise;
use crate::ops::meu_scores::MeuScoresParams;
use crate::ops::{
    BatchNorm, BnParams, Cascade, Conv1x1, Norm, Op, activation, add, channel_mean, concat,
    conv1x1, global_pool, resize, subsample, weighted_pool,
};

/// A copy of a batch norm's running statistics, to be written back after the step: the flat
/// parameter vector is read meanwhile.
struct Running {
    mean: Vec<f32>,
    var: Vec<f32>,
}

impl Running {
    fn of(cpu: &CpuBackend, plan: &Plan, bn: &BnParams) -> Self {
        let values = |id: ParamId| cpu.params[plan.param(id)].to_vec();
        Running { mean: values(bn.running_mean), var: values(bn.running_var) }
    }

    fn store(self, cpu: &mut CpuBackend, plan: &Plan, bn: &BnParams) {
        cpu.params[plan.param(bn.running_mean)].copy_from_slice(&self.mean);
        cpu.params[plan.param(bn.running_var)].copy_from_slice(&self.var);
    }
}

/// Runs one operator. The plan's lifetimes guarantee that a step's output and saved tensors
/// overlap none of its inputs, but for the operators that [`Op::in_place`] allows to.
fn step(cpu: &mut CpuBackend, plan: &Plan, step: &Step) {
    let (isa, base) = (cpu.isa, cpu.arena.base());
    let input = |i: usize| unsafe { View::of(base, &step.inputs[i]) };
    let residual = || (step.inputs.len() > 1).then(|| input(1));
    let output = unsafe { ViewMut::of(base, &step.output) };
    let param = |id: ParamId| &cpu.params[plan.param(id)];
    match &step.op {
        Op::Input { .. } => {}
        Op::Conv3x3(op) => {
            op.forward(isa, input(0), param(op.weight), op.bias.map(param), output);
        }
        Op::Conv1x1(op) => {
            let (w, b) = (param(op.weight), op.bias.map(param));
            conv1x1::forward(isa, input(0), w, b, residual(), op.act, output);
        }
        Op::BatchNorm(op) => batch_norm(cpu, plan, step, op, input(0), residual(), output),
        Op::Cascade(op) => cascade(cpu, plan, step, op, input(0), output),
        Op::Activation(op) => activation::forward(isa, input(0), op.act, output),
        Op::Add => add::forward(isa, input(0), input(1), output),
        Op::Concat => {
            let mut channel = 0;
            for tensor in &step.inputs {
                let place = step.output.channels(channel, tensor.shape.c);
                if *tensor != place {
                    concat::forward(isa, unsafe { View::of(base, tensor) }, channel, output);
                }
                channel += tensor.shape.c;
            }
        }
        Op::GlobalAvgPool => global_pool::forward(isa, input(0), output),
        Op::ChannelMean => channel_mean::forward(isa, input(0), output),
        Op::MeuFuse(op) => {
            let sa = op.spatial.then(|| input(3));
            op.forward(isa, input(0), input(1), input(2), sa, output);
        }
        Op::Resize => resize::forward(isa, input(0), output),
        Op::Subsample => subsample::forward(isa, input(0), output),
        Op::WeightedPool => weighted_pool::forward(isa, input(0), input(1), output),
        Op::MeuScores(op) => {
            let params = MeuScoresParams {
                mix: param(op.mix),
                low: param(op.low),
                low_bias: param(op.low_bias),
                bias: param(op.bias),
            };
            op.forward(isa, params, (input(0), input(1), input(2), input(3)), output);
        }
    }
}

/// Runs steps of the forward pass; a joined one runs with the one before it.
pub(super) fn run(cpu: &mut CpuBackend, plan: &Plan, range: Range<usize>) {
    for index in range {
        match &plan.steps[index..] {
            [one, ..] if one.joined => {}
            [first, second, ..] if second.joined => pair(cpu, plan, first, second),
            [one, ..] => step(cpu, plan, one),
            [] => {}
        }
    }
}

/// Two 1x1 convolutions, the second of which reads what the first one writes, at once.
fn pair(cpu: &mut CpuBackend, plan: &Plan, first: &Step, second: &Step) {
    let (isa, base) = (cpu.isa, cpu.arena.base());
    let param = |id: ParamId| &cpu.params[plan.param(id)];
    let pointwise = |step: &Step, op: &Conv1x1| Pointwise {
        weight: param(op.weight),
        bias: op.bias.map(param),
        residual: step.inputs.get(1).map(|r| unsafe { View::of(base, r) }),
        act: op.act,
        y: unsafe { ViewMut::of(base, &step.output) },
    };
    match (&first.op, &second.op) {
        (Op::Conv1x1(a), Op::Conv1x1(b)) => {
            let x = unsafe { View::of(base, &first.inputs[0]) };
            conv1x1::forward_pair(isa, x, pointwise(first, a), pointwise(second, b));
        }
        _ => [first, second].into_iter().for_each(|one| step(cpu, plan, one)),
    }
}

fn batch_norm(
    cpu: &mut CpuBackend,
    plan: &Plan,
    step: &Step,
    op: &BatchNorm,
    x: View,
    residual: Option<View>,
    y: ViewMut,
) {
    let (isa, base) = (cpu.isa, cpu.arena.base());
    let mut running = Running::of(cpu, plan, &op.params);
    let params = TrainingParams {
        weight: &cpu.params[plan.param(op.params.weight)],
        bias: &cpu.params[plan.param(op.params.bias)],
        running_mean: &mut running.mean,
        running_var: &mut running.var,
    };
    let saved = unsafe { ViewMut::of(base, &step.saved[0]) };
    let (mean, invstd) = unsafe { (saved.plane_mut(0, 0), saved.plane_mut(0, 1)) };
    batch_norm::forward(isa, x, params, residual, op.act, y, mean, invstd);
    running.store(cpu, plan, &op.params);
}

fn cascade(cpu: &mut CpuBackend, plan: &Plan, step: &Step, op: &Cascade, x: View, y: ViewMut) {
    let (isa, base) = (cpu.isa, cpu.arena.base());
    let norms = match &op.norm {
        Norm::Folded(biases) => {
            let weights: Vec<&[f32]> =
                op.weights.iter().map(|&w| &cpu.params[plan.param(w)]).collect();
            let biases: Vec<&[f32]> = biases.iter().map(|&b| &cpu.params[plan.param(b)]).collect();
            return op.forward(isa, x, &weights, &biases, y);
        }
        Norm::Batch(norms) => norms,
    };
    let mut running: Vec<Running> = norms.iter().map(|bn| Running::of(cpu, plan, bn)).collect();
    let weights: Vec<&[f32]> = op.weights.iter().map(|&w| &cpu.params[plan.param(w)]).collect();
    let mut params: Vec<TrainingParams> = norms
        .iter()
        .zip(&mut running)
        .map(|(bn, running)| TrainingParams {
            weight: &cpu.params[plan.param(bn.weight)],
            bias: &cpu.params[plan.param(bn.bias)],
            running_mean: &mut running.mean,
            running_var: &mut running.var,
        })
        .collect();
    let u = unsafe { ViewMut::of(base, &step.saved[0]) };
    let saved = unsafe { ViewMut::of(base, &step.saved[1]) };
    let (mean, invstd) = unsafe { (saved.plane_mut(0, 0), saved.plane_mut(0, 1)) };
    op.forward_training(isa, x, &weights, &mut params, y, u, mean, invstd);
    for (running, bn) in running.into_iter().zip(norms) {
        running.store(cpu, plan, bn);
    }
}
