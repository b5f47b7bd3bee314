#!/usr/bin/env python3
"""Checks `fpenet import` against PyTorch: weights go over in every way, logits must agree.

    python tools/check_import.py

For several configurations, `fpenet_torch.FPENet` gets random weights and running statistics. Its state
dict is saved as safetensors, as npz (plain and compressed), in f64 and f16, behind the prefix of
`DataParallel`, and under other names with a mapping file. Each file is imported and `fpenet run` must
give PyTorch's logits to a relative L2 of 1e-5 (f16: those of the PyTorch model with rounded weights).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from checking import ROOT, TOLERANCE, fpenet
from dump_reference import randomise
from fpenet_torch import Config, FPENet

CONFIGS = {
    "paper": Config(),
    "no long skip, ca decoder": Config(classes=7, p=1, q=2, long_skip=False, decoder="ca"),
    "bilinear decoder, two branches": Config(classes=5, p=2, q=1, branches=2, decoder="bilinear"),
    "sigmoid, ReLU blocks, no addition": Config(
        classes=3, p=1, q=1, attention="sigmoid", block_activation="relu", branch_addition=False
    ),
}


def switches(config: Config) -> list[str]:
    """The config switches of a configuration; `--classes` is left to the file."""
    values = asdict(config)
    given = []
    for key in ("p", "q", "branches", "decoder", "attention", "block_activation"):
        given += ["--" + key.replace("_", "-"), str(values[key])]
    for key in ("branch_addition", "long_skip"):
        if not values[key]:
            given.append("--no-" + key.replace("_", "-"))
    return given


def npz(path: Path, state: dict[str, Tensor], *, compressed: bool) -> None:
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    (np.savez_compressed if compressed else np.savez)(path, **arrays)


def floats(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


def files(state: dict[str, Tensor], folder: Path) -> Iterator[tuple[str, Path, list[str], bool]]:
    """Every way to save a state dict: label, file, options of the import, whether it is rounded."""
    path = folder / "weights.safetensors"
    save_file(state, path)
    yield "safetensors", path, [], False
    save_file(floats(state, torch.float64), path)
    yield "safetensors f64", path, [], False
    save_file(floats(state, torch.float16), path)
    yield "safetensors f16", path, [], True
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, path)
    yield "safetensors, prefix", path, [], False

    # Another project's names: stages called layers, the classifier called head.
    mapping = {f"net.layer{i}.": f"stage{i}." for i in (1, 2, 3)} | {"aux.": None}
    renamed = {"aux.weight": torch.zeros(3)}
    for name, tensor in state.items():
        theirs = name.replace("classifier.", "head.")
        if name.startswith("stage"):
            theirs = "net.layer" + name.removeprefix("stage")
        elif theirs != name:
            mapping[theirs] = name
        renamed[theirs] = tensor
    save_file(renamed, path)
    table = folder / "map.json"
    table.write_text(json.dumps(mapping))
    yield "safetensors, mapping", path, ["--map", str(table)], False

    path = folder / "weights.npz"
    npz(path, state, compressed=False)
    yield "npz", path, [], False
    npz(path, floats(state, torch.float64), compressed=True)
    yield "npz f64, compressed", path, [], False


@torch.no_grad()
def logits(model: FPENet, image: Tensor) -> np.ndarray:
    """In double precision, so that the difference is the engine's alone."""
    return copy.deepcopy(model).double().eval()(image.double()).numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fpenet", type=Path, default=ROOT / "target/release/fpenet")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for label, config in CONFIGS.items():
            torch.manual_seed(0)
            model = FPENet(config)
            with torch.no_grad():
                randomise(model)
                image = torch.randn(1, 3, 33, 47)
                # A forward with batch statistics gives the running ones values of their own.
                model.train()(torch.randn(4, 3, 32, 32))
            model.eval()
            np.save(folder / "input.npy", image.numpy())
            rounded = copy.deepcopy(model)
            rounded.load_state_dict(floats(model.state_dict(), torch.float16))
            expected = logits(model, image), logits(rounded, image)
            for kind, path, options, is_rounded in files(model.state_dict(), folder):
                imported, out = folder / "imported.safetensors", folder / "logits.npy"
                fpenet(args.fpenet, "import", "--from", path, "--out", imported,
                       *switches(config), *options)
                fpenet(args.fpenet, "run", "--device", "cpu", "--model", imported,
                       "--input", folder / "input.npy", "--output", out)
                want = expected[is_rounded]
                error = np.linalg.norm(np.load(out) - want) / np.linalg.norm(want)
                failed |= not error <= TOLERANCE
                print(f"{'ok  ' if error <= TOLERANCE else 'FAIL'} {label}, {kind}: relative L2 {error:.1e}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
