#!/usr/bin/env python3
"""Dumps reference folders for `fpenet check --reference DIR`, computed in double precision.

    python tools/dump_reference.py --out DIR --seed 3 --size 67x45 --classes 5 --p 2 --q 1
    python tools/dump_reference.py --suite tests/data

Weights and input are rounded to f32 before anything is computed, so both sides start from the same
numbers and what is stored is the truth rounded once. Two things could still make a correct f32 engine
miss it, and both are kept away from:

- A ReLU whose input is within rounding of zero has a gradient that rounding decides. `settle` shifts
  the bias before each ReLU by a little, per channel, so that zero falls in the widest gap of its inputs.
- Adam's first step is close to lr * sign(g), so an element of g within rounding of zero moves by
  rounding's choice. There the seed is chosen (`--seeds` tries many) so that none is.

The same network is then run in f32, and a dump whose f32 twin comes close to a tolerance is refused.
"""

from __future__ import annotations

import argparse
import copy
import math
import shlex
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checking import parse_size
from fpenet_torch import (
    BN_MOMENTUM, MEU, Config, ConvBN, FPEBlock, FPENet, add_config_arguments, config_from_arguments,
    parameter_count, save_model, save_tensors, tensors,
)

VOID = 255
TOLERANCES = {"inference": 1e-5, "loss": 1e-5, "grads": 1e-4, "after_step": 1e-4}
HEADROOM = 4.0  # an f32 run must stay this factor under each tolerance, and above it in sign margin
TINY_GRADIENT = 1e-6  # a whole tensor's gradient below this is closer to noise than to a reference,
ZERO_GRADIENT = 1e-10  # but below this it is zero in exact arithmetic, and compared absolutely: a shift
# (project.bn.bias) that only reaches convolutions into a batch norm, as all do before "bilinear"
SETTLE_WINDOW = 0.15  # furthest that `settle` moves a bias; batch-normed values have deviation 1
ADAM = {"lr": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}


@dataclass(frozen=True)
class Case:
    """One reference folder. Size is (width, height)."""

    name: str
    config: Config
    size: tuple[int, int]
    batch: int = 1
    seed: int = 0
    intermediates: bool = True
    grads: bool = True
    after_step: bool = True

    def command(self) -> str:
        """The command line that dumps this folder alone."""
        words = ["python", "tools/dump_reference.py", "--out", f"tests/data/{self.name}",
                 "--seed", str(self.seed), "--batch", str(self.batch), "--size", "{}x{}".format(*self.size)]
        default = Config()
        for option in fields(Config):
            value = getattr(self.config, option.name)
            flag = "--" + option.name.replace("_", "-")
            if value == getattr(default, option.name):
                continue
            if isinstance(value, bool):
                words.append("--no-" + flag.removeprefix("--"))
            else:
                words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        words += [f"--no-{part.replace('_', '-')}" for part in ("intermediates", "grads", "after_step")
                  if not getattr(self, part)]
        return shlex.join(words)


def _small(**switches: object) -> Config:
    return Config(**{"classes": 5, "p": 1, "q": 1, **switches})


# The widths are fixed, so a network's file is 0.1 to 0.4 MB at its smallest, 1.5 MB at full depth, and
# its gradients as much again. To stay under 6 MB, switches that do not meet share a folder, one small
# folder has after_step, and one has intermediates. Branch addition needs a second block (stride 1) in
# some stage, hence p = 2. A depthwise filter of which one tap alone sees the image has no gradient to
# speak of (batch norm undoes its scale), so maps must be wider than 8, the largest dilation.
SUITE = (
    Case("meu_odd_size", _small(p=2), (43, 33), seed=2, after_step=False),
    Case("batch2_no_long_skip", _small(p=2, long_skip=False), (35, 26), batch=2, seed=80,
         intermediates=False),
    Case("two_branches_bilinear_decoder", _small(p=2, branches=2, long_skip=False, decoder="bilinear"),
         (37, 24), intermediates=False, after_step=False),
    Case("ca_decoder", _small(classes=7, long_skip=False, decoder="ca"), (33, 24), seed=3,
         intermediates=False, after_step=False),
    Case("sigmoid_attention_one_branch", _small(branches=1, long_skip=False, attention="sigmoid"),
         (34, 25), intermediates=False, after_step=False),
    Case("relu_blocks_no_branch_addition_bilinear_decoder",
         _small(p=2, branch_addition=False, long_skip=False, decoder="bilinear", block_activation="relu"),
         (36, 27), intermediates=False, after_step=False),
    Case("full_default", Config(), (75, 17), intermediates=False, after_step=False),
)


@dataclass
class Reference:
    """What one precision computes for a case; `inference` holds logits and intermediates."""

    inference: dict[str, Tensor]
    loss: Tensor
    grads: dict[str, Tensor]
    after_step: dict[str, Tensor]


@dataclass
class Report:
    """How an f32 run compares with the dump: worst relative L2 per part, and the margins."""

    case: Case
    parameters: int
    errors: dict[str, float]
    smallest_gradient: tuple[float, str]  # of those that are not zero
    zero_gradients: int
    kink: float
    sign: float
    gates: dict[str, float]
    megabytes: float = 0.0
    problems: list[str] = field(default_factory=list)


@torch.no_grad()
def randomise(model: FPENet) -> None:
    """Fills the parameters so that ignoring or misplacing any of them shows in the outputs.

    Draws from torch's global generator; running statistics are left to `settle`. Gates are partly open:
    the attention biases are around 1, and the spatial attention's weight is large because a mean over
    channels is small.
    """
    model.initialise()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0.0, 0.2)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.normal_(0.0, 0.2)
        if isinstance(module, MEU):
            module.channel_attention.bias.normal_(1.0, 0.5)
            if module.spatial_attention is not None:
                module.spatial_attention.weight.uniform_(4.0, 8.0)
                module.spatial_attention.bias.fill_(1.0)


def make_batch(case: Case) -> tuple[Tensor, Tensor]:
    """Input N x 3 x H x W in f32 and labels N x H x W in u8: blocks of classes, and void as a block of
    its own and as scattered pixels."""
    width, height = case.size
    x = torch.randn(case.batch, 3, height, width)
    coarse = torch.randint(0, case.config.classes, (case.batch, 1, -(-height // 6), -(-width // 6)))
    coarse[:, :, 0, 0] = VOID
    labels = F.interpolate(coarse.float(), size=(height, width), mode="nearest")[:, 0].to(torch.uint8)
    labels[torch.rand(labels.shape) < 0.05] = VOID
    return x, labels


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled pixels: N x C x H x W and N x H x W -> scalar."""
    return F.cross_entropy(logits, labels.long(), ignore_index=VOID)


def rectified(model: FPENet) -> list[tuple[nn.Module, nn.Parameter]]:
    """Each ReLU of the network with the per-channel bias that is added just before it."""
    found: list[tuple[nn.Module, nn.Parameter]] = []
    for module in model.modules():
        if isinstance(module, ConvBN):
            found.append((module.act, module.bn.bias))
        elif isinstance(module, FPEBlock):
            found.append((module.act, module.project.bn.bias))
        elif isinstance(module, MEU):
            found.append((module.channel_gate, module.channel_attention.bias))
            if module.spatial_attention is not None:
                found.append((module.spatial_gate, module.spatial_attention.bias))
    return [(act, bias) for act, bias in found if isinstance(act, nn.ReLU)]


def widest_gap(values: Tensor) -> float:
    """The shift, within SETTLE_WINDOW, that puts zero as far as possible from all values (any shape)."""
    reach = torch.tensor([-2 * SETTLE_WINDOW, 2 * SETTLE_WINDOW], dtype=values.dtype)
    inside = values[(values > reach[0]) & (values < reach[1])].flatten()
    edges = torch.cat((inside, reach)).sort().values
    middles, gaps = (edges[1:] + edges[:-1]) / 2, edges.diff()
    gaps[middles.abs() > SETTLE_WINDOW] = 0.0
    return -middles[gaps.argmax()].item()


@torch.no_grad()
def settle(model: FPENet, x: Tensor) -> float:
    """Adapts a randomised network to its input; what it sets stays a f32 value.

    - Biases move so that no ReLU of the training forward has an input near zero.
    - Running statistics become the batch's, then well away from them: an engine that takes one for the
      other fails, and yet inference keeps sensible magnitudes.
    - The classifier is scaled by a power of two until logits have a deviation between 1 and 2.

    `model` is in double precision and training mode. Returns the smallest distance of a ReLU's input
    from zero that remains.
    """
    distances: list[float] = []

    def shift(bias: nn.Parameter):
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            (values,) = inputs
            shifts = torch.tensor([widest_gap(channel) for channel in values.transpose(0, 1)])
            before = bias.clone()
            bias.copy_((bias + shifts.to(bias)).float())
            values = values + (bias - before).view(1, -1, 1, 1)
            distances.append(values.abs().min().item())
            return (values,)

        return hook

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the running statistics become the batch's
    hooks = [act.register_forward_pre_hook(shift(bias)) for act, bias in rectified(model)]
    logits = model(x)
    for hook in hooks:
        hook.remove()
    for norm in norms:
        norm.momentum = BN_MOMENTUM
        noise = torch.randn(norm.num_features).to(x) * norm.running_var.sqrt()
        norm.running_mean.copy_((norm.running_mean + 0.3 * noise).float())
        norm.running_var.copy_((norm.running_var * (0.5 + 1.5 * torch.rand(norm.num_features))).float())
    model.classifier.weight.mul_(2.0 ** -math.floor(math.log2(logits.std().item())))
    return min(distances)


def compute(model: FPENet, x: Tensor, labels: Tensor) -> Reference:
    """Runs inference, one training forward and backward, and one Adam step; `model` is left as it was."""
    model = copy.deepcopy(model).eval()
    x = x.to(next(model.parameters()).dtype)
    with torch.no_grad():
        inference = model.intermediates(x)
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), **ADAM)
    loss = loss_of(model(x), labels)
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimiser.step()
    return Reference(inference, loss.detach(), grads, tensors(model))


@torch.no_grad()
def open_gates(model: FPENet, x: Tensor) -> dict[str, float]:
    """The fraction of each attention's gates that is open in the training forward."""
    model = copy.deepcopy(model).train()
    fractions: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, MEU):
            for part in ("channel", "spatial"):
                getattr(module, f"{part}_gate").register_forward_hook(
                    lambda _, __, y, key=f"{name}.{part}":
                        fractions.update({key: (y > 1e-3).double().mean().item()})
                )
    model(x)
    return fractions


def relative_l2(found: Tensor, reference: Tensor) -> float:
    difference = (found.double() - reference).norm().item()
    norm = reference.norm().item()
    return difference / norm if norm > 1e-7 else difference


def worst(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    return max(relative_l2(found[name], tensor) for name, tensor in reference.items())


def sign_margin(truth: Reference, single: Reference, weights: dict[str, Tensor]) -> float:
    """Smallest |gradient + weight decay| over the f32 run's largest error in the same tensor.

    Elements whose gradient is exactly 0 (shut gates, taps that only see padding) carry no error and are
    left out.
    """
    margin = float("inf")
    for name, grad in truth.grads.items():
        alive = grad != 0
        error = (single.grads[name].double() - grad).abs().max()
        if alive.any() and error > 0:
            total = (grad + ADAM["weight_decay"] * weights[name])[alive]
            margin = min(margin, (total.abs().min() / error).item())
    return margin


def build(case: Case) -> tuple[FPENet, Tensor, Tensor, Reference, Report]:
    """The case's model (double), input, labels, truth, and how an f32 run compares with it."""
    torch.manual_seed(case.seed)
    single = FPENet(case.config)
    randomise(single)
    x, labels = make_batch(case)
    model = copy.deepcopy(single).double().train()
    kink = settle(model, x.double())
    single.load_state_dict(model.state_dict())  # exact: the shifted biases are f32 values

    truth, twin = compute(model, x, labels), compute(single, x, labels)
    norms = [(grad.norm().item(), name) for name, grad in truth.grads.items()]
    alive = [entry for entry in norms if entry[0] > ZERO_GRADIENT]
    report = Report(
        case=case,
        parameters=parameter_count(model),
        errors={
            "inference": worst(twin.inference, truth.inference),
            "loss": abs(twin.loss.item() / truth.loss.item() - 1.0),
            "grads": worst(twin.grads, truth.grads),
            "after_step": worst(twin.after_step, truth.after_step),
        },
        smallest_gradient=min(alive),
        zero_gradients=len(norms) - len(alive),
        kink=kink,
        sign=sign_margin(truth, twin, tensors(model)),
        gates=open_gates(model, x.double()),
    )
    for part, error in report.errors.items():
        if getattr(case, part, True) and error > TOLERANCES[part] / HEADROOM:
            report.problems.append(f"f32 {part} are off by {error:.1e}, tolerance {TOLERANCES[part]:.0e}")
    if case.after_step and report.sign < HEADROOM:
        report.problems.append(f"Adam's sign margin is {report.sign:.1f}, at least {HEADROOM:.0f} wanted")
    if case.grads and report.smallest_gradient[0] < TINY_GRADIENT:
        report.problems.append("gradient of {1} has norm {0:.1e}".format(*report.smallest_gradient))
    if case.config.attention == "relu":
        report.problems += [f"gate {name} is shut" for name, share in report.gates.items() if share == 0]
    return model, x, labels, truth, report


def dump(case: Case, folder: Path) -> Report:
    """Writes one reference folder; raises if an f32 engine could not be told right from wrong by it."""
    model, x, labels, truth, report = build(case)
    if report.problems:
        raise RuntimeError(f"{folder}: seed {case.seed}: {'; '.join(report.problems)}")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("*.npy"), *folder.glob("*.safetensors")):
        stale.unlink()

    save_model(folder / "model.safetensors", model)
    arrays: dict[str, Tensor] = {"input": x, "labels": labels, "loss": truth.loss.float()}
    arrays |= {
        name: tensor.float() for name, tensor in truth.inference.items()
        if case.intermediates or name == "logits"
    }
    for name, tensor in arrays.items():
        np.save(folder / f"{name}.npy", tensor.contiguous().numpy())
    if case.grads:
        save_tensors(folder / "grads.safetensors", truth.grads)
    if case.after_step:
        save_tensors(folder / "after_step.safetensors", truth.after_step)
    report.megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return report


def table(reports: list[Report]) -> str:
    """Markdown: the worst relative L2 of an f32 PyTorch run per part, and the margins."""
    rows = [
        "| folder | MB | parameters | inference | loss | grads | after_step | smallest grad norm "
        "| zero grads | nearest ReLU kink | Adam sign margin |",
        "| --- " * 11 + "|",
    ]
    for report in reports:
        errors = [
            f"{error:.1e}" if getattr(report.case, part, True) else "-"
            for part, error in report.errors.items()
        ]
        sign = f"{report.sign:.0f}x" if report.case.after_step else "-"
        rows.append(
            f"| {report.case.name} | {report.megabytes:.2f} | {report.parameters:,} | "
            + " | ".join(errors)
            + f" | {report.smallest_gradient[0]:.1e} | {report.zero_gradients} | {report.kink:.1e} | {sign} |"
        )
    return "\n".join(rows)


def readme(reports: list[Report]) -> str:
    commands = "\n".join(report.case.command() for report in reports)
    return f"""\
# Reference folders

Written by `python tools/dump_reference.py --suite tests/data` with PyTorch {torch.__version__}
and NumPy {np.__version__} (`tools/requirements.txt`); do not edit by hand. Read by
`fpenet check --reference DIR`.

Weights, input and labels are random; everything is computed in double precision and stored as f32.

Below, what an f32 run of PyTorch on the CPU makes of each folder: worst relative L2 over its tensors
(tolerances: inference and loss 1e-5, grads and after_step 1e-4). "Zero grads" counts the tensors whose
gradient is zero in exact arithmetic (a shift that only reaches convolutions into a batch norm), which are
compared absolutely; "smallest grad norm" is among the others. "Nearest ReLU kink" is the smallest
distance from zero of any ReLU's input in the training forward; "Adam sign margin" the smallest
|gradient + weight decay| over the f32 error of its tensor, which decides whether a first Adam step is
well defined.

{table(reports)}

Each folder alone:

```
{commands}
```
"""


def best_seed(case: Case, count: int) -> None:
    """Prints the seeds 0..count that pass, best last: by sign margin where Adam's step is dumped."""
    found = []
    for seed in range(count):
        report = build(replace(case, seed=seed))[-1]
        if not report.problems:
            score = report.sign if case.after_step else TOLERANCES["grads"] / report.errors["grads"]
            found.append((score, seed, report))
    for score, seed, report in sorted(found, key=lambda entry: entry[0])[-10:]:
        gates = " ".join(f"{name} {share:.2f}" for name, share in report.gates.items())
        print(f"seed {seed:4}: margin {score:6.1f}  grads {report.errors['grads']:.1e}  "
              f"kink {report.kink:.1e}  smallest grad {report.smallest_gradient[0]:.1e}  gates: {gates}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="DIR", help="write one folder")
    target.add_argument("--suite", type=Path, metavar="DIR", help="write the standard suite under DIR")
    target.add_argument("--seeds", type=int, metavar="N",
                        help="try seeds 0..N, print the best, write nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=parse_size, default=(67, 45), metavar="WxH")
    for part in ("intermediates", "grads", "after_step"):
        parser.add_argument(f"--no-{part.replace('_', '-')}", dest=part, action="store_false")
    add_config_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # summation order, and so the last bit, must not depend on the machine

    try:
        if arguments.suite:
            reports = [dump(case, arguments.suite / case.name) for case in SUITE]
            (arguments.suite / "README.md").write_text(readme(reports))
        else:
            case = Case(
                name=arguments.out.name if arguments.out else "", config=config_from_arguments(arguments),
                **{key: getattr(arguments, key) for key in
                   ("size", "batch", "seed", "intermediates", "grads", "after_step")},
            )
            if arguments.seeds:
                best_seed(case, arguments.seeds)
                return 0
            reports = [dump(case, arguments.out)]
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
