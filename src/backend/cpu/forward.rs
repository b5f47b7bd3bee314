//! Forward dispatch: from a planned step to the operator's CPU function.

use std::ops::Range;

use super::backend::CpuBackend;
use super::{View, ViewMut};
use crate::graph::{ParamId, Plan, Step, Tensor};
use crate::ops::batch_norm::{self, TrainingParams};
use crate::ops::conv1x1::Pointwise;
use crate::ops::meu_scores::{Gate, MeuScoresParams};
use crate::ops::row_by_row::{self, Expand, Then};
use crate::ops::{
    BatchNorm, BnParams, Cascade, Conv1x1, MeuScores, Norm, Op, activation, add, channel_mean,
    concat, conv1x1, global_pool, resize, subsample, weighted_pool,
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
        // Run by [`scores`], with what computes its gate.
        Op::MeuScores(_) => {}
    }
}

/// Runs steps of the forward pass; joined ones run with the one before them, and a gate with the scores
/// that it is for.
pub(super) fn run(cpu: &mut CpuBackend, plan: &Plan, range: Range<usize>) {
    for index in range.filter(|&index| !plan.steps[index].joined) {
        if scores_of(plan, index).is_some() {
            continue;
        }
        let behind = plan.steps[index + 1..].iter().take_while(|step| step.joined).count();
        let steps = &plan.steps[index..=index + behind];
        match &steps[0].op {
            Op::MeuScores(op) => scores(cpu, plan, index, op),
            _ if behind > 0 && at_once(cpu, plan, steps) => {}
            _ => steps.iter().for_each(|one| step(cpu, plan, one)),
        }
    }
}

/// The scores for which alone a step computes the gate, from what they read as well: one pass over it
/// serves both, and the gate is not written.
fn scores_of(plan: &Plan, index: usize) -> Option<usize> {
    let gate = &plan.steps[index];
    let (Op::Conv1x1(_), [x]) = (&gate.op, &gate.inputs[..]) else { return None };
    if gate.output.shape.c != 1 {
        return None;
    }
    let mut readers =
        (index + 1..plan.steps.len()).filter(|&i| plan.steps[i].inputs.contains(&gate.output));
    let reader = readers.next().filter(|_| readers.next().is_none())?;
    let Step { op, inputs, .. } = &plan.steps[reader];
    let fits = matches!(op, Op::MeuScores(_)) && inputs[1] == *x && inputs[3] == gate.output;
    fits.then_some(reader)
}

fn scores(cpu: &mut CpuBackend, plan: &Plan, index: usize, op: &MeuScores) {
    let (isa, base) = (cpu.isa, cpu.arena.base());
    let step = &plan.steps[index];
    let param = |id: ParamId| -> &[f32] { &cpu.params[plan.param(id)] };
    let [t, x, ca, sa] = [0, 1, 2, 3].map(|i| unsafe { View::of(base, &step.inputs[i]) });
    let gate = (0..index).find(|&gate| scores_of(plan, gate) == Some(index));
    let gate = match gate.map(|gate| &plan.steps[gate].op) {
        Some(Op::Conv1x1(conv)) => {
            let (weight, bias) = (param(conv.weight), conv.bias.map(param));
            Gate::Convolution { weight, bias, act: conv.act }
        }
        _ => Gate::Plane(sa),
    };
    let params = MeuScoresParams {
        mix: param(op.mix),
        low: param(op.low),
        low_bias: param(op.low_bias),
        bias: param(op.bias),
    };
    op.forward(isa, params, (t, x, ca, gate), unsafe { ViewMut::of(base, &step.output) });
}

/// Runs operators each of which reads what the one before it yields at once, where there is a way. What
/// is in between is written only where a 1x1 convolution reads it from another, since others may.
fn at_once(cpu: &mut CpuBackend, plan: &Plan, steps: &[Step]) -> bool {
    let (isa, base) = (cpu.isa, cpu.arena.base());
    let param = |id: ParamId| -> &[f32] { &cpu.params[plan.param(id)] };
    let view = |tensor: &Tensor| unsafe { View::of(base, tensor) };
    let view_mut = |tensor: &Tensor| unsafe { ViewMut::of(base, tensor) };
    let x = view(&steps[0].inputs[0]);
    let pointwise = |step: &Step, op: &Conv1x1| Pointwise {
        weight: param(op.weight),
        bias: op.bias.map(param),
        residual: step.inputs.get(1).map(view),
        act: op.act,
        y: view_mut(&step.output),
    };
    match steps {
        [first, second] => match (&first.op, &second.op) {
            (Op::Conv1x1(a), Op::Conv1x1(b)) => {
                conv1x1::forward_pair(isa, x, pointwise(first, a), pointwise(second, b));
                return true;
            }
            (Op::Subsample, Op::Conv1x1(op)) => {
                conv1x1::forward_subsampled(isa, x, pointwise(second, op));
                return true;
            }
            _ => {}
        },
        [_, _, _] => {}
        _ => return false,
    }
    let (Op::Conv1x1(expand), Op::Cascade(cascade)) = (&steps[0].op, &steps[1].op) else {
        return false;
    };
    let then = match steps.get(2) {
        None => Then::Store(view_mut(&steps[1].output)),
        Some(last) => match &last.op {
            Op::Conv1x1(op) => Then::Project(pointwise(last, op)),
            _ => return false,
        },
    };
    let Norm::Folded(biases) = &cascade.norm else { return false };
    let suits = row_by_row::suits(cascade, x.shape().w);
    if suits {
        let weights: Vec<&[f32]> = cascade.weights.iter().map(|&w| param(w)).collect();
        let biases: Vec<&[f32]> = biases.iter().map(|&b| param(b)).collect();
        let (weight, bias) = (param(expand.weight), expand.bias.map(param));
        let expand = Expand { weight, bias, act: expand.act };
        row_by_row::forward(isa, x, expand, cascade, (&weights, &biases), then);
    }
    suits
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
