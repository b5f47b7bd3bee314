//! The depthwise dilated cascade, the core of an FPE block (paper, section 3.1, Fig. 2).
//!
//! The C input channels are B consecutive subsets x_1 .. x_B of C / B channels:
//!   u_i = D_i(s_i),  s_1 = x_1,  s_i = x_i + y_{i-1} (or x_i without branch addition)
//!   y_i = ReLU(BN_i(u_i))
//! D_i is a depthwise 3x3 convolution of dilation d_i, padding d_i. Channel j of all branches
//! forms a chain that no other channel touches: the unit of parallel work on every backend.

use rayon::prelude::*;

use super::Cost;
use super::batch_norm::{BnParams, TrainingParams, batch_statistics, channel_gradient};
use crate::backend::cpu::depthwise::{Onward, Padded};
use crate::backend::cpu::planes::{self, Gated};
use crate::backend::cpu::scratch::with_scratch;
use crate::backend::cpu::{Isa, View, ViewMut};
use crate::graph::{ParamId, Shape};

/// How a branch is normalised.
#[derive(Debug, Clone)]
pub enum Norm {
    /// Batch norm with batch statistics, one per branch.
    Batch(Vec<BnParams>),
    /// Batch norm folded into the weights; what is left is a bias per branch (C / B values).
    Folded(Vec<ParamId>),
}

/// All branches of an FPE block.
#[derive(Debug, Clone)]
pub struct Cascade {
    /// Channels C of input and output.
    pub channels: usize,
    /// Stride of every branch, 1 or 2.
    pub stride: usize,
    /// Dilation of each branch; their number is B.
    pub dilations: Vec<usize>,
    /// Whether branch i takes in y_{i-1}; never with stride 2, where sizes differ.
    pub addition: bool,
    /// Weights of each branch, C / B x 1 x 3 x 3.
    pub weights: Vec<ParamId>,
    /// Normalisation.
    pub norm: Norm,
}

impl Cascade {
    /// Channels of one branch, C / B; also the number of chains.
    pub fn width(&self) -> usize {
        self.channels / self.dilations.len()
    }

    pub(super) fn shape(&self, inputs: &[Shape]) -> Result<Shape, String> {
        match inputs {
            [x] if x.c == self.channels => {
                Ok(Shape { h: x.h.div_ceil(self.stride), w: x.w.div_ceil(self.stride), ..*x })
            }
            _ => Err(format!("one operand of {} channels", self.channels)),
        }
    }

    /// u of every branch (shape of the output), then mean and 1 / sqrt(var + eps) per channel.
    pub(super) fn saved(&self, _inputs: &[Shape], output: Shape) -> Vec<Shape> {
        vec![output, Shape::new(1, 2, 1, self.channels)]
    }

    pub(super) fn map_params(&mut self, f: &mut impl FnMut(ParamId) -> ParamId) {
        self.weights.iter_mut().for_each(|id| *id = f(*id));
        match &mut self.norm {
            Norm::Batch(norms) => norms.iter_mut().for_each(|norm| *norm = norm.map(&mut *f)),
            Norm::Folded(biases) => biases.iter_mut().for_each(|id| *id = f(*id)),
        }
    }

    /// 9 MACs, a batch norm (2) and a ReLU (1) per output; a folded one has a bias (1) instead.
    pub(super) fn cost(&self, output: Shape) -> Cost {
        let outputs = output.len() as u64;
        let norm = match self.norm {
            Norm::Batch(_) => 2,
            Norm::Folded(_) => 1,
        };
        Cost { macs: 9 * outputs, flops: (9 + norm + 1) * outputs }
    }
}

/// Up to here two copies and three planes leave room in a level-2 cache of 1 MiB. Above it (128 x 256
/// and more) one copy and two planes are faster: measured on a Zen 4.
const HANDED_ON_BYTES: usize = 512 << 10;

impl Cascade {
    fn padded(&self, x: Shape, branch: usize) -> Padded {
        Padded::new(x.h, x.w, self.dilations[branch], self.stride)
    }

    /// Elements of the largest padded plane over all branches.
    fn scratch_len(&self, x: Shape) -> usize {
        (0..self.dilations.len()).map(|i| self.padded(x, i).len()).max().unwrap_or(0)
    }

    /// Channel of x, u and y that branch i of a chain owns.
    fn channel(&self, branch: usize, chain: usize) -> usize {
        branch * self.width() + chain
    }

    /// Forward with batch norm folded into weights and biases (one pair per branch):
    /// N x C x H x W -> N x C x ceil(H / stride) x ceil(W / stride). y may be x with stride 1.
    ///
    /// With stride 1 all chains of a task share their padded copies, whose border is as wide as the
    /// largest dilation and cleared once. Where two copies fit the cache, a branch writes y_i and, while
    /// it has it in registers, s_{i+1} = x_{i+1} + y_i into the copy that the next one reads.
    pub fn forward(&self, isa: Isa, x: View, weights: &[&[f32]], biases: &[&[f32]], y: ViewMut) {
        if self.stride == 2 {
            return self.forward_strided(isa, x, weights, biases, y);
        }
        let (width, branches) = (self.width(), self.dilations.len());
        let margin = self.dilations.iter().copied().max().unwrap_or(1);
        let shared = Padded::new(x.shape().h, x.shape().w, margin, 1);
        // Copies start on cache lines.
        let len = shared.len().next_multiple_of(16);
        let live = (2 * len + 3 * x.shape().plane()) * size_of::<f32>();
        let handed_on = self.addition && live <= HANDED_ON_BYTES;
        let copies = if handed_on { 2 } else { 1 };
        let chains = x.shape().n * width;
        let run = chains.div_ceil(8 * rayon::current_num_threads());
        // Operands in the order in which they are read: branch by branch, chain by chain.
        let place = |link: usize| {
            let (branch, chain) = (link % branches, link / branches);
            (chain / width, self.channel(branch, chain % width))
        };
        let operand = |link: usize| {
            let (n, c) = place(link);
            x.plane(n, c)
        };
        (0..chains.div_ceil(run)).into_par_iter().with_max_len(1).for_each(|task| {
            let links = task * run * branches..((task + 1) * run).min(chains) * branches;
            with_scratch(copies * len, |scratch| {
                let (mut copy, mut next_copy) = scratch.split_at_mut(len);
                shared.clear_border(copy);
                if handed_on {
                    shared.clear_border(next_copy);
                }
                for link in links.clone() {
                    let (branch, chain) = (link % branches, link / branches % width);
                    if branch == 0 || !handed_on {
                        let before = (self.addition && branch > 0).then(|| {
                            let (n, c) = place(link - 1);
                            y.as_view().plane(n, c)
                        });
                        shared.fill(isa, operand(link), before, copy);
                    }
                    let next = (handed_on && branch + 1 < branches)
                        .then(|| (operand(link + 1), &mut *next_copy));
                    let soon = if handed_on { link + 2 } else { link + 1 };
                    let ahead = if links.contains(&soon) { operand(soon) } else { &[] };
                    let (w, bias) = (&weights[branch][9 * chain..][..9], biases[branch][chain]);
                    let (n, c) = place(link);
                    // One task per chain; x of this branch has been copied, so y may overwrite it.
                    let y = unsafe { y.plane_mut(n, c) };
                    let convolution = shared.with_dilation(self.dilations[branch]);
                    convolution.convolve_onward(isa, copy, w, bias, y, Onward { next, ahead });
                    if handed_on {
                        std::mem::swap(&mut copy, &mut next_copy);
                    }
                }
            });
        });
    }

    /// [`Cascade::forward`] with stride 2, where nothing is added.
    fn forward_strided(
        &self,
        isa: Isa,
        x: View,
        weights: &[&[f32]],
        biases: &[&[f32]],
        y: ViewMut,
    ) {
        let width = self.width();
        (0..x.shape().n * width).into_par_iter().for_each(|task| {
            let (n, chain) = (task / width, task % width);
            with_scratch(self.scratch_len(x.shape()), |copy| {
                for branch in 0..self.dilations.len() {
                    let c = self.channel(branch, chain);
                    let padded = self.padded(x.shape(), branch);
                    padded.clear_border(copy);
                    padded.fill(isa, x.plane(n, c), None, copy);
                    // One task per chain.
                    let y = unsafe { y.plane_mut(n, c) };
                    let w = &weights[branch][9 * chain..][..9];
                    padded.convolve(isa, copy, w, biases[branch][chain], y);
                }
            });
        });
    }

    /// Training forward with batch statistics. Keeps u (like y) and, per channel of x, mean and
    /// 1 / sqrt(var + eps) in `saved_mean` and `saved_invstd`; updates the running statistics.
    #[allow(clippy::too_many_arguments)]
    pub fn forward_training(
        &self,
        isa: Isa,
        x: View,
        weights: &[&[f32]],
        norms: &mut [TrainingParams],
        y: ViewMut,
        u: ViewMut,
        saved_mean: &mut [f32],
        saved_invstd: &mut [f32],
    ) {
        let norms_before: &[TrainingParams] = norms;
        let statistics: Vec<Vec<ChannelStatistics>> = (0..self.width())
            .into_par_iter()
            .map(|chain| self.forward_chain(isa, x, weights, norms_before, y, u, chain))
            .collect();
        for (chain, branches) in statistics.into_iter().enumerate() {
            for (branch, s) in branches.into_iter().enumerate() {
                norms[branch].running_mean[chain] = s.running_mean;
                norms[branch].running_var[chain] = s.running_var;
                saved_mean[self.channel(branch, chain)] = s.mean;
                saved_invstd[self.channel(branch, chain)] = s.invstd;
            }
        }
    }

    /// One chain over the whole batch: its planes stay in cache from branch to branch.
    #[allow(clippy::too_many_arguments)]
    fn forward_chain(
        &self,
        isa: Isa,
        x: View,
        weights: &[&[f32]],
        norms: &[TrainingParams],
        y: ViewMut,
        u: ViewMut,
        chain: usize,
    ) -> Vec<ChannelStatistics> {
        let batch = x.shape().n;
        let branches = 0..self.dilations.len();
        with_scratch(self.scratch_len(x.shape()), |copy| {
            branches
                .map(|branch| {
                    let c = self.channel(branch, chain);
                    let padded = self.padded(x.shape(), branch);
                    let w = &weights[branch][9 * chain..][..9];
                    padded.clear_border(copy);
                    for n in 0..batch {
                        self.fill_input(isa, x, y.as_view(), n, branch, chain, copy);
                        // One task per chain.
                        padded.correlate(isa, copy, w, false, unsafe { u.plane_mut(n, c) });
                    }
                    let norm = &norms[branch];
                    let mut s = ChannelStatistics {
                        running_mean: norm.running_mean[chain],
                        running_var: norm.running_var[chain],
                        ..Default::default()
                    };
                    let images = (0..batch).map(|n| u.as_view().plane(n, c));
                    (s.mean, s.invstd) =
                        batch_statistics(isa, images, &mut s.running_mean, &mut s.running_var);
                    let scale = norm.weight[chain] * s.invstd;
                    let shift = norm.bias[chain] - s.mean * scale;
                    for n in 0..batch {
                        let y = unsafe { y.plane_mut(n, c) };
                        planes::affine(isa, u.as_view().plane(n, c), (scale, shift), None, true, y);
                    }
                    s
                })
                .collect()
        })
    }

    /// Padded copy of s_i = x_i + y_{i-1}.
    #[allow(clippy::too_many_arguments)]
    fn fill_input(
        &self,
        isa: Isa,
        x: View,
        y: View,
        n: usize,
        branch: usize,
        chain: usize,
        copy: &mut [f32],
    ) {
        let before =
            (self.addition && branch > 0).then(|| y.plane(n, self.channel(branch - 1, chain)));
        let x_i = x.plane(n, self.channel(branch, chain));
        self.padded(x.shape(), branch).fill(isa, x_i, before, copy);
    }

    /// Backward of [`Cascade::forward_training`], from the last branch to the first:
    /// ```text
    /// g_i  = dy_i + ds_{i+1}        (y_i feeds s_{i+1} with branch addition)
    /// du_i = BN backward of g_i where y_i > 0
    /// dD_i[t] = sum_p du_i[p] s_i[p + t],   ds_i = D_i^T du_i,   dx_i = ds_i
    /// ```
    /// D^T is the correlation with the flipped kernel; with stride 2, of du spread over the even
    /// positions of the input grid.
    pub fn backward(&self, isa: Isa, io: CascadeBackward) -> Vec<BranchGradient> {
        let chains: Vec<Vec<ChainGradient>> = (0..self.width())
            .into_par_iter()
            .map(|chain| self.backward_chain(isa, &io, chain))
            .collect();
        (0..self.dilations.len())
            .map(|branch| BranchGradient {
                weight: chains.iter().flat_map(|c| c[branch].weight).collect(),
                scale: chains.iter().map(|c| c[branch].scale).collect(),
                shift: chains.iter().map(|c| c[branch].shift).collect(),
            })
            .collect()
    }

    fn backward_chain(&self, isa: Isa, io: &CascadeBackward, chain: usize) -> Vec<ChainGradient> {
        let (input, output) = (io.x.shape(), io.y.shape());
        let (fine, coarse, batch) = (input.plane(), output.plane(), input.n);
        // Two padded planes, g and du of the batch, ds of the batch, and du spread out.
        let copy_len = self.scratch_len(input).max(self.transposed_len(input));
        let total = copy_len + batch * (2 * coarse + fine) + fine;
        let mut gradients = vec![ChainGradient::default(); self.dilations.len()];
        with_scratch(total, |scratch| {
            let (copy, rest) = scratch.split_at_mut(copy_len);
            let (g, rest) = rest.split_at_mut(batch * coarse);
            let (du, rest) = rest.split_at_mut(batch * coarse);
            let (ds, spread) = rest.split_at_mut(batch * fine);
            for branch in (0..self.dilations.len()).rev() {
                let c = self.channel(branch, chain);
                let carried = self.addition && branch + 1 < self.dilations.len();
                for (n, g) in g.chunks_mut(coarse).enumerate() {
                    let dy = io.dy.plane(n, c);
                    if carried {
                        planes::add(isa, dy, &ds[n * fine..][..fine], g);
                    } else {
                        g.copy_from_slice(dy);
                    }
                }
                gradients[branch] = self.normalise_backward(isa, io, branch, chain, g, du);

                let padded = self.padded(input, branch);
                let mut dw = [0.0f64; 9];
                padded.clear_border(copy);
                for n in 0..batch {
                    self.fill_input(isa, io.x, io.y, n, branch, chain, copy);
                    padded.weight_gradient(isa, copy, &du[n * coarse..][..coarse], &mut dw);
                }
                gradients[branch].weight = dw.map(|v| v as f32);

                let w = &io.weights[branch][9 * chain..][..9];
                let flipped: [f32; 9] = std::array::from_fn(|t| w[8 - t]);
                let transposed = Padded::new(input.h, input.w, self.dilations[branch], 1);
                transposed.clear_border(copy);
                for n in 0..batch {
                    let du = &du[n * coarse..][..coarse];
                    let du = if self.stride == 1 { du } else { spread_out(du, input, spread) };
                    transposed.fill(isa, du, None, copy);
                    let ds = &mut ds[n * fine..][..fine];
                    transposed.correlate(isa, copy, &flipped, false, ds);
                    let (dx, accumulate) = io.dx;
                    // One task per chain.
                    let dx = unsafe { dx.plane_mut(n, c) };
                    planes::pass_gated(isa, Gated { grad: ds, gate: None }, dx, accumulate);
                }
            }
        });
        gradients
    }

    fn transposed_len(&self, x: Shape) -> usize {
        self.dilations.iter().map(|&d| Padded::new(x.h, x.w, d, 1).len()).max().unwrap_or(0)
    }

    /// du of one branch of a chain for the whole batch, and the gradients of its batch norm.
    fn normalise_backward(
        &self,
        isa: Isa,
        io: &CascadeBackward,
        branch: usize,
        chain: usize,
        g: &[f32],
        du: &mut [f32],
    ) -> ChainGradient {
        let c = self.channel(branch, chain);
        let pixels = io.y.shape().plane();
        let gated =
            |n: usize| Gated { grad: &g[n * pixels..][..pixels], gate: Some(io.y.plane(n, c)) };
        let (mean, invstd) = (io.saved_mean[c], io.saved_invstd[c]);
        let batch = io.y.shape().n;
        let sums = (0..batch)
            .map(|n| planes::norm_backward_sums(isa, gated(n), io.u.plane(n, c), mean))
            .fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        let scale = io.scales[branch][chain];
        let (dscale, dshift, apply) = channel_gradient(sums, batch * pixels, scale, mean, invstd);
        for (n, du) in du.chunks_mut(pixels).enumerate() {
            planes::norm_backward(isa, gated(n), io.u.plane(n, c), apply, du, false);
        }
        ChainGradient { weight: [0.0; 9], scale: dscale, shift: dshift }
    }
}

/// Operands of [`Cascade::backward`].
pub struct CascadeBackward<'a> {
    /// Input of the forward.
    pub x: View<'a>,
    /// Output of the forward.
    pub y: View<'a>,
    /// Convolution outputs before batch norm.
    pub u: View<'a>,
    /// Gradient of y.
    pub dy: View<'a>,
    /// Gradient of x, and whether to add to it.
    pub dx: (ViewMut<'a>, bool),
    /// Weights of each branch.
    pub weights: &'a [&'a [f32]],
    /// Batch-norm scale of each branch.
    pub scales: &'a [&'a [f32]],
    /// Batch means, C values.
    pub saved_mean: &'a [f32],
    /// 1 / sqrt(var + eps), C values.
    pub saved_invstd: &'a [f32],
}

/// Parameter gradients of one branch.
pub struct BranchGradient {
    /// C / B x 9.
    pub weight: Vec<f32>,
    /// C / B.
    pub scale: Vec<f32>,
    /// C / B.
    pub shift: Vec<f32>,
}

#[derive(Clone, Default)]
struct ChainGradient {
    weight: [f32; 9],
    scale: f32,
    shift: f32,
}

#[derive(Default)]
struct ChannelStatistics {
    mean: f32,
    invstd: f32,
    running_mean: f32,
    running_var: f32,
}

/// Puts the coarse plane on the even positions of an otherwise zero plane of `fine`'s size.
fn spread_out<'a>(coarse: &[f32], fine: Shape, spread: &'a mut [f32]) -> &'a [f32] {
    spread.fill(0.0);
    for (row, values) in coarse.chunks(fine.w.div_ceil(2)).enumerate() {
        let target = &mut spread[2 * row * fine.w..][..fine.w];
        for (t, v) in target.iter_mut().step_by(2).zip(values) {
            *t = *v;
        }
    }
    spread
}

#[cfg(test)]
#[path = "cascade_tests.rs"]
mod tests;
