#!/usr/bin/env python3
"""Checks `fpenet export` from the outside: onnx.checker, ONNX Runtime and, on request, OpenVINO.

    python tools/check_onnx.py
    python tools/check_onnx.py --openvino
    python tools/check_onnx.py --model models/fpenet-camvid.safetensors --size 480x360

Every model (by default those of tests/data, which between them use every switch) is exported with a
dynamic and with a fixed size, with and without argmax, in several operator sets. Each file must pass
the checker with full_check (shape inference included), and its logits must be those of `fpenet run`
to a relative L2 of 1e-5. Inputs are the folder's own (odd sizes among them) and random ones of other
sizes and batches. Labels must be the largest logit's index, but where the two largest lie within 1e-4
of each other. Last, the recipe of docs/EXCHANGE.md runs on the example photo: its labels must be those
of `fpenet segment` but for one pixel in a thousand, since a photo leaves near ties.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from PIL import Image

from checking import OPSETS, ROOT, TOLERANCE, fpenet, parse_size, reference, relative_l2, wrong_labels

Runner = Callable[[np.ndarray], np.ndarray]


def onnx_runtime(path: Path) -> Runner:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"input": image})[0]


def openvino(path: Path) -> Runner:
    import openvino as ov

    # Without the hint OpenVINO may compute in half precision where the CPU has it.
    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(str(path), "CPU", hints)
    return lambda image: compiled([image])[0]


def check_recipe(binary: Path, runtime: str, folder: Path) -> bool:
    """The example script against `fpenet segment`, with the bundled model on the example photo."""
    photo, size = folder / "street.png", (353, 264)
    Image.open(ROOT / "assets/example/street.jpg").convert("RGB").resize(size).save(photo)
    fpenet(binary, "segment", photo, "--device", "cpu", "--out", folder)
    fpenet(binary, "export", "--onnx", folder / "recipe.onnx", "--argmax")
    script = [sys.executable, str(ROOT / "examples/python/segment.py"), str(folder / "recipe.onnx")]
    script += [str(photo), str(folder / "labels.png"), "--runtime", runtime]
    subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
    found = np.asarray(Image.open(folder / "labels.png"))
    expected = np.asarray(Image.open(folder / "street.labels.png"))
    share = float((found != expected).mean()) if found.shape == expected.shape else 1.0
    print(f"{'ok  ' if share <= 1e-3 else 'FAIL'} examples/python/segment.py, {runtime}: "
          f"{100 * share:.3f} % of the labels differ")
    return share <= 1e-3


def check_file(path: Path) -> onnx.ModelProto:
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    for key in ("config", "classes", "palette", "mean", "std"):
        json.loads(metadata[key])
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fpenet", type=Path, default=ROOT / "target/release/fpenet")
    parser.add_argument("--model", type=Path, action="append", help="check these instead")
    parser.add_argument("--size", type=parse_size, help="input size for --model [480x360]")
    parser.add_argument("--openvino", action="store_true", help="compare OpenVINO too")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    cases: list[tuple[str, Path, list[np.ndarray]]] = []
    if args.model:
        width, height = args.size or (480, 360)
        for model in args.model:
            image = rng.standard_normal((1, 3, height, width), dtype=np.float32)
            cases.append((model.name, model, [image]))
    else:
        for folder in sorted((ROOT / "tests/data").iterdir()):
            if (folder / "model.safetensors").is_file():
                inputs = [np.load(folder / "input.npy")]
                for shape in ((3, 3, 47, 61), (2, 3, 16, 19)):
                    inputs.append(rng.standard_normal(shape, dtype=np.float32))
                cases.append((folder.name, folder / "model.safetensors", inputs))
    runtimes: list[tuple[str, Callable[[Path], Runner]]] = [("onnxruntime", onnx_runtime)]
    if args.openvino:
        runtimes.append(("openvino", openvino))

    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, model, inputs in cases:
            logits = [reference(args.fpenet, model, image, folder) for image in inputs]
            for fixed in (False, True):
                for opset in OPSETS if not fixed else OPSETS[:1]:
                    height, width = inputs[0].shape[2:]
                    options = ["--model", model, "--opset", opset]
                    if fixed:
                        options += ["--size", f"{width}x{height}"]
                    path, argmax = folder / "logits.onnx", folder / "labels.onnx"
                    fpenet(args.fpenet, "export", "--onnx", path, *options)
                    fpenet(args.fpenet, "export", "--onnx", argmax, "--argmax", *options)
                    check_file(path)
                    check_file(argmax)
                    # A fixed size takes the folder's own input; the batch stays free.
                    images = inputs if not fixed else [np.concatenate([inputs[0]] * 2)]
                    expected = logits if not fixed else [np.concatenate([logits[0]] * 2)]
                    for runtime, load in runtimes:
                        run, label = load(path), load(argmax)
                        worst = max(map(relative_l2, map(run, images), expected))
                        wrong = sum(map(wrong_labels, map(label, images), expected))
                        passed = worst <= TOLERANCE and wrong == 0
                        failed |= not passed
                        size = f"{width}x{height}" if fixed else "dynamic"
                        print(f"{'ok  ' if passed else 'FAIL'} {name}, opset {opset}, {size}, {runtime}: "
                              f"relative L2 {worst:.1e}, {wrong} wrong labels")
        for runtime, _ in runtimes:
            failed |= not check_recipe(args.fpenet, runtime, folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
