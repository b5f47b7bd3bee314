#!/usr/bin/env python3
"""What 8-bit storage of the blocks' expanded tensors does to labels and mIoU, in PyTorch.

Simulates `--expanded bytes`: in every stride-1 block of stages 2 and 3 the expansion's output and the
branches' outputs are rounded to 256 steps per channel; all arithmetic is f32. Compares ways to choose the steps, the engine's among them
(src/graph/passes/byte_scales.rs: 255 steps reach 8 deviations of the batch norm above its mean), with
the network as it is, on the frames of a CamVid split, and prints Markdown.

    python tools/expanded_bytes.py --data ../shared/data/camvid --split val

Or compares what the engine's kernels made of the same photos, two folders of `fpenet segment`:

    python tools/expanded_bytes.py --labels OUT_F16 OUT_BYTES
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import fpenet_torch
from fpenet_torch import FPEBlock, FPENet, Labels

ROOT = Path(__file__).resolve().parent.parent
# As in byte_scales.rs.
DEVIATIONS, SMALLEST = 8.0, 1e-3
# Largest values of a channel that are kept of each calibration frame, for percentiles.
KEPT = 400

Scales = dict[tuple[str, str], Tensor]
Storage = Callable[[str, str, Tensor], Tensor]


def blocks_of(model: FPENet) -> dict[str, FPEBlock]:
    """The blocks that the engine may keep in 8 bits, by name."""
    stages = {"stage2": model.stage2, "stage3": model.stage3}
    return {
        f"{name}.{i}": block
        for name, stage in stages.items() for i, block in enumerate(stage) if i > 0
    }


def hook(blocks: dict[str, FPEBlock], storage: Storage) -> None:
    """Passes each block's expanded tensors, "x" before the branches and "y" behind, to `storage`."""

    def forward(self: FPEBlock, x: Tensor, name: str) -> Tensor:
        expanded = storage(name, "x", self.expand(x))
        outputs: list[Tensor] = []
        for branch, subset in zip(
            self.branches, expanded.split(self.branch_width, dim=1), strict=True
        ):
            if outputs and self.add_previous:
                subset = subset + outputs[-1]
            outputs.append(branch(subset))
        y = self.project(storage(name, "y", torch.cat(outputs, dim=1)))
        return self.act(y + x if self.residual else y)

    for name, block in blocks.items():
        block.forward = types.MethodType(
            lambda self, x, name=name: forward(self, x, name), block
        )


def frame(path: Path, labels: Labels) -> Tensor:
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (labels.mean, labels.std))
    return ((pixels.permute(2, 0, 1).float() / 255 - mean) / std)[None]


def spread(names: list[str], count: int) -> list[str]:
    """`count` of the names, evenly spaced."""
    count = min(count, len(names))
    return [names[i * len(names) // count] for i in range(count)]


def by_batch_norm(blocks: dict[str, FPEBlock], deviations: float) -> Scales:
    """Scales without data: mean plus so many deviations of the batch norm's output, over 255."""

    def largest(bn: torch.nn.BatchNorm2d) -> Tensor:
        weight = bn.weight.detach().abs()
        return (bn.bias.detach() + deviations * weight).maximum(weight).clamp(min=SMALLEST)

    scales: Scales = {}
    for name, block in blocks.items():
        scales[name, "x"] = largest(block.expand.bn) / 255
        scales[name, "y"] = torch.cat([largest(branch.bn) for branch in block.branches]) / 255
    return scales


class Calibration:
    """The largest values of every channel over some frames."""

    def __init__(self) -> None:
        self.top: dict[tuple[str, str], Tensor] = {}
        self.count: dict[tuple[str, str], int] = {}

    def __call__(self, name: str, which: str, x: Tensor) -> Tensor:
        key, flat = (name, which), x.transpose(0, 1).flatten(1)
        top = flat.topk(min(KEPT, flat.shape[1]), dim=1).values
        if key in self.top:
            top = torch.cat((self.top[key], top), dim=1)
        self.top[key] = top.sort(dim=1, descending=True).values
        self.count[key] = self.count.get(key, 0) + flat.shape[1]
        return x

    def scales(self, above: float) -> Scales:
        """A share `above` of a channel's values is larger than 255 steps; 0 for none."""
        def at(key: tuple[str, str]) -> Tensor:
            top = self.top[key]
            return top[:, min(int(above * self.count[key]), top.shape[1] - 1)]
        return {key: at(key).clamp(min=SMALLEST) / 255 for key in self.top}


def in_bytes(scales: Scales) -> Storage:
    def storage(name: str, which: str, x: Tensor) -> Tensor:
        scale = scales[name, which].view(1, -1, 1, 1)
        return (x / scale).round().clamp(0, 255) * scale
    return storage


class Score:
    """Agreement with the plain network, and a confusion matrix."""

    def __init__(self, classes: int) -> None:
        self.agreement: list[float] = []
        self.matrix = torch.zeros(classes, classes, dtype=torch.float64)

    def add(self, found: Tensor, plain: Tensor, truth: Tensor) -> None:
        self.agreement.append((found == plain).double().mean().item())
        classes = len(self.matrix)
        known = truth < classes
        pairs = truth[known].long() * classes + found[known]
        self.matrix += torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def row(self, name: str) -> str:
        hit = self.matrix.diagonal()
        union = self.matrix.sum(0) + self.matrix.sum(1) - hit
        iou = (hit / union)[union > 0].mean().item()
        accuracy = (hit.sum() / self.matrix.sum()).item()
        mean, least = np.mean(self.agreement), min(self.agreement)
        return (f"| {name} | {100 * mean:.3f} | {100 * least:.3f} | {100 * iou:.2f} "
                f"| {100 * accuracy:.2f} |")


def compare_labels(folders: list[Path]) -> None:
    """Prints the share of equal labels of every photo that both folders have."""
    shares = []
    for path in sorted(folders[0].glob("*.labels.png")):
        other = folders[1] / path.name
        if other.exists():
            one, two = (np.asarray(Image.open(p)) for p in (path, other))
            shares.append(float((one == two).mean()))
            print(f"{path.name}: {100 * shares[-1]:.3f} %")
    if not shares:
        raise SystemExit(f"{folders[0]}, {folders[1]}: expected *.labels.png in both, found none")
    print(f"{len(shares)} photos: {100 * np.mean(shares):.3f} % of the labels agree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, nargs=2, metavar="DIR",
                        help="compare the labels in two folders instead")
    parser.add_argument("--data", type=Path, help="CamVid's folder")
    parser.add_argument("--split", default="val")
    parser.add_argument("--frames", type=int, help="evenly spaced frames of the split [all]")
    parser.add_argument("--model", type=Path, default=ROOT / "models/fpenet-camvid.safetensors")
    parser.add_argument("--calibration", type=int, default=16, metavar="N",
                        help="frames of `train` that the measured scales are taken from [16]")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.labels:
        compare_labels(arguments.labels)
        return
    if not arguments.data:
        parser.error("expected --data or --labels, found neither")
    torch.set_num_threads(arguments.threads)

    model, labels = fpenet_torch.load_model(arguments.model)
    model.eval()
    blocks = blocks_of(model)

    def names(split: str) -> list[str]:
        return (arguments.data / f"{split}.txt").read_text().split()

    def label(x: Tensor) -> Tensor:
        return model(x)[0].argmax(dim=0)

    with torch.no_grad():
        calibration = Calibration()
        hook(blocks, calibration)
        taken = spread(names("train"), arguments.calibration)
        for name in taken:
            model(frame(arguments.data / "train" / name, labels))

        largest = f"largest value on {len(taken)} training frames"
        ways: dict[str, Storage] = {
            "f32": lambda _name, _which, x: x,
            "f16": lambda _name, _which, x: x.half().float(),
        }
        for deviations in (6, DEVIATIONS, 10, 12):
            note = ": `--expanded bytes`" if deviations == DEVIATIONS else ""
            scales = by_batch_norm(blocks, deviations)
            ways[f"8 bits, mean + {deviations:.0f} deviations{note}"] = in_bytes(scales)
        ways[f"8 bits, {largest}"] = in_bytes(calibration.scales(0))
        ways["8 bits, 99.99 % of the values there"] = in_bytes(calibration.scales(1e-4))
        ways["8 bits, 99.9 % of the values there"] = in_bytes(calibration.scales(1e-3))

        chosen = names(arguments.split)
        if arguments.frames:
            chosen = spread(chosen, arguments.frames)
        scores = {way: Score(len(labels.classes)) for way in ways}
        for name in chosen:
            x = frame(arguments.data / arguments.split / name, labels)
            truth = torch.from_numpy(
                np.asarray(Image.open(arguments.data / f"{arguments.split}annot" / name)).copy()
            )
            plain: Tensor | None = None
            for way, storage in ways.items():
                hook(blocks, storage)
                found = label(x)
                plain = found if plain is None else plain
                scores[way].add(found, plain, truth)

    print(f"{arguments.model.name}, {len(chosen)} frames of CamVid's {arguments.split} split\n")
    print("| expanded tensors | labels as in f32, % | worst frame, % | mIoU, % | accuracy, % |")
    print("| --- | --- | --- | --- | --- |")
    for way, score in scores.items():
        print(score.row(way))


if __name__ == "__main__":
    main()
