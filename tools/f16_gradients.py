#!/usr/bin/env python3
"""How far f16 storage by itself takes the gradients from f64: a simulation in PyTorch, no engine involved.

The model of tools/fpenet_torch.py runs in f64; chosen tensors are rounded to f16 where a mixed-precision
engine would store them, and the gradient of all parameters is compared with that of the f64 run:

    python tools/f16_gradients.py --folders tests/data/full_default tests/data/ca_decoder
    python tools/f16_gradients.py --sizes 64x48 128x96 --batch 2 --seeds 3 --out FILE.md

A folder gives weights, input and labels; a size draws them anew (default network, 11 classes). Groups:

- weights: every parameter as the kernels read it
- stream: what a block, a stage or a decoder leaves, the tensors that the residual sums run through
- inner: what lies inside a block, before and after each batch norm
- gradients: the gradient of each of these tensors
"""

from __future__ import annotations

import argparse
import shlex
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checking import parse_size
from fpenet_torch import MEU, Config, ConvBN, FPEBlock, FPENet, Stage, load_model

VOID = 255
LOSS_SCALE = 2.0**10  # keeps rounded gradients out of the subnormals of f16, as loss scaling does
COLUMNS: dict[str, frozenset[str]] = {
    "gradients": frozenset({"gradients"}),
    "weights": frozenset({"weights"}),
    "stream": frozenset({"stream"}),
    "inner": frozenset({"inner"}),
    "stream + inner": frozenset({"stream", "inner"}),
    "all": frozenset({"weights", "stream", "inner", "gradients"}),
}


def rounded(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(x.dtype)


class Store(torch.autograd.Function):
    """Rounds a tensor on its way forward, its gradient on the way back, or both."""

    @staticmethod
    def forward(ctx, x: Tensor, value: bool, gradient: bool) -> Tensor:
        ctx.gradient = gradient
        return rounded(x) if value else x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.gradient:
            return grad, None, None
        return rounded(grad * LOSS_SCALE) / LOSS_SCALE, None, None


def gradient(model: FPENet, x: Tensor, labels: Tensor, groups: frozenset[str]) -> Tensor:
    """Gradient of the mean cross-entropy by all parameters in one vector, batch statistics, f64."""
    exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    handles = []

    def store(module: nn.Module, group: str) -> None:
        hook = lambda _m, _i, y: Store.apply(y, group in groups, "gradients" in groups)  # noqa: E731
        handles.append(module.register_forward_hook(hook))

    for name, module in model.named_modules():
        if isinstance(module, ConvBN):
            store(module.conv, "inner")
            store(module, "stream" if name == "stem" else "inner")
        elif isinstance(module, (FPEBlock, Stage, MEU)):
            store(module, "stream")
    with torch.no_grad():
        for parameter in model.parameters():
            if "weights" in groups:
                parameter.copy_(rounded(parameter))
    model.train().zero_grad()
    F.cross_entropy(model(x), labels, ignore_index=VOID).backward()
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(exact[name])
    for handle in handles:
        handle.remove()
    return found


def errors(model: FPENet, x: Tensor, labels: Tensor) -> list[float]:
    """Relative L2 error of the whole gradient for each of COLUMNS."""
    true = gradient(model, x, labels, frozenset())
    return [
        float((gradient(model, x, labels, groups) - true).norm() / true.norm())
        for groups in COLUMNS.values()
    ]


def of_folder(folder: Path) -> list[float]:
    model, _ = load_model(folder / "model.safetensors")
    x = torch.from_numpy(np.load(folder / "input.npy")).double()
    labels = torch.from_numpy(np.load(folder / "labels.npy").astype(np.int64))
    return errors(unshared(model), x, labels)


def of_size(size: tuple[int, int], batch: int, seed: int) -> list[float]:
    torch.manual_seed(seed)
    model = FPENet(Config(classes=11))
    x = torch.randn(batch, 3, size[1], size[0], dtype=torch.float64)
    labels = torch.randint(0, 11, (batch, size[1], size[0]))
    return errors(unshared(model), x, labels)


def unshared(model: FPENet) -> FPENet:
    """f64, with ReLUs that do not overwrite the stored tensor before them."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model.double()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folders", type=Path, nargs="*", default=[], metavar="DIR")
    parser.add_argument("--sizes", type=parse_size, nargs="*", default=[], metavar="WxH")
    parser.add_argument("--batch", type=int, default=2, metavar="N")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 .. N-1 for each size")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the table as Markdown")
    arguments = parser.parse_args()
    lines = [
        f"`python tools/f16_gradients.py {shlex.join(sys.argv[1:])}`, {date.today()}, "
        f"PyTorch {torch.__version__}",
        "",
        "| rounded to f16 | " + " | ".join(COLUMNS) + " |",
        "| --- |" + " --- |" * len(COLUMNS),
    ]

    def row(name: str, found: list[float]) -> None:
        lines.append(f"| {name} | " + " | ".join(f"{error:.1e}" for error in found) + " |")
        print(lines[-1], flush=True)

    print("\n".join(lines), flush=True)
    for folder in arguments.folders:
        row(folder.name, of_folder(folder))
    for size in arguments.sizes:
        for seed in range(arguments.seeds):
            name = "default, {} x {}x{}, seed {}".format(arguments.batch, *size, seed)
            row(name, of_size(size, arguments.batch, seed))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write("\n".join(lines) + "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
