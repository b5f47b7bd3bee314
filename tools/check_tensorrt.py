#!/usr/bin/env python3
"""Checks `fpenet export` with TensorRT for RTX, as far as that goes without a GPU.

    python3 -m venv target/trt && target/trt/bin/pip install -r tools/requirements-tensorrt.txt
    target/trt/bin/python tools/check_tensorrt.py
    target/trt/bin/python tools/check_tensorrt.py --model models/fpenet-camvid.safetensors --size 480x360

1. Every model (by default those of tests/data, which between them use every switch) is exported in
   several operator sets, with a dynamic and with a fixed size, with and without argmax. NVIDIA's ONNX
   parser reads each file, and the network that it made of it, run layer by layer in numpy (see
   trt_network.py), must give the logits of `fpenet run` to a relative L2 of 1e-5 (sums in another
   order) and the labels but for near ties. Inputs are the folder's own (odd sizes among them) and
   random ones of other sizes and batches.
2. Each of these files and the bundled model is built into an engine; the bundled one for every compute
   capability that this TensorRT knows, in f32 and f16. The f16 network, its values rounded to f16 in
   numpy, may differ from f32 in one label of a hundred on the example photo.
3. The recipe of docs/EXCHANGE.md, examples/python/build_tensorrt.py, runs as a program.
4. Files and sizes that are wrong must be refused or noticed, else the checks above would mean nothing.

No engine is run: what a card makes of it, and how fast, is not tested here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples/python"))
try:
    import numpy as np
    import onnx
    from PIL import Image

    import build_tensorrt as recipe
    import trt_network
    from checking import OPSETS, ROOT, TOLERANCE, fpenet, parse_size, reference, relative_l2, wrong_labels
except ImportError as missing:
    sys.exit(f"{missing}: pip install -r tools/requirements-tensorrt.txt")

BUNDLED = ROOT / "models/fpenet-camvid.safetensors"
HALF_LABELS = 0.01


class Report:
    """One line per check, and the exit code."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def line(self, good: bool, text: str) -> None:
        self.passed, self.failed = self.passed + good, self.failed + (not good)
        print(f"{'ok  ' if good else 'FAIL'} {text}", flush=True)


def export(binary: Path, path: Path, *options: object) -> bytes:
    fpenet(binary, "export", "--onnx", path, *options)
    return path.read_bytes()


def check_files(report: Report, binary: Path, name: str, model: Path, images: list[np.ndarray],
                folder: Path) -> None:
    """Parsed, run in numpy and built: every form in which this model can be exported."""
    logits = [reference(binary, model, image, folder) for image in images]
    height, width = images[0].shape[2:]
    for fixed in (False, True):
        for opset in OPSETS:
            options = ["--model", model, "--opset", opset]
            options += ["--size", f"{width}x{height}"] if fixed else []
            size = f"{width}x{height}" if fixed else "dynamic"
            # A fixed size takes the folder's own input; the batch stays free.
            inputs = images if not fixed else [np.concatenate([images[0]] * 2)]
            expected = logits if not fixed else [np.concatenate([logits[0]] * 2)]
            text = f"{name}, opset {opset}, {size}"
            try:
                plain = recipe.Model(export(binary, folder / "m.onnx", *options), "logits")
                argmax = recipe.Model(export(binary, folder / "m.onnx", "--argmax", *options), "labels")
                found = [trt_network.run(plain.network, image) for image in inputs]
                labels = [trt_network.run(argmax.network, image) for image in inputs]
                engines = [m.build((width, height), 2, []).nbytes for m in (plain, argmax)]
            except (recipe.Failed, trt_network.Unknown) as error:
                report.line(False, f"{text}: {error}")
                continue
            worst = max(map(relative_l2, found, expected))
            wrong = sum(map(wrong_labels, labels, expected))
            report.line(worst <= TOLERANCE and wrong == 0,
                        f"{text}: relative L2 {worst:.1e}, {wrong} wrong labels, engines of "
                        f"{engines[0] / 1e6:.1f} and {engines[1] / 1e6:.1f} MB")


def photo(content: bytes) -> np.ndarray:
    """The example photo as the network's input, odd sizes on purpose."""
    metadata = {entry.key: entry.value for entry in onnx.load_model_from_string(content).metadata_props}
    mean, std = (np.array(json.loads(metadata[key]), np.float32) for key in ("mean", "std"))
    rgb = Image.open(ROOT / "assets/example/street.jpg").convert("RGB").resize((353, 265))
    return ((np.asarray(rgb, np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]


def check_half_types(report: Report, binary: Path, folder: Path) -> None:
    """f16 inside, the types of the file outside: buffers of a caller fit both."""
    trt = recipe.trt
    for option, output in ([], trt.float32), (["--argmax"], trt.int64):
        network = recipe.Model(recipe.half(export(binary, folder / "half.onnx", *option)), "f16").network
        layers = map(network.get_layer, range(network.num_layers))
        inside = {layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.CONVOLUTION}
        found = (network.get_input(0).dtype, *inside, network.get_output(0).dtype)
        report.line(found == (trt.float32, trt.float16, output),
                    f"f16 file, {network.get_output(0).name}: types {', '.join(t.name for t in found)}")


def check_bundled(report: Report, binary: Path, folder: Path) -> None:
    """The bundled weights: engines for every card this TensorRT knows, f16 against f32."""
    content = export(binary, folder / "bundled.onnx", "--model", BUNDLED, "--argmax")
    image = photo(content)
    logits = reference(binary, BUNDLED, image, folder)
    labels: dict[str, np.ndarray] = {}
    for precision in ("f32", "f16"):
        try:
            model = recipe.Model(content if precision == "f32" else recipe.half(content), precision)
            labels[precision] = trt_network.run(model.network, image)
        except (recipe.Failed, trt_network.Unknown) as error:
            report.line(False, f"bundled model, {precision}: {error}")
            return
        for target in [[], *([name] for name in recipe.capabilities())]:
            text = f"bundled model, {precision}, 1024x512, batch 1 to 8, {' '.join(target) or 'default cards'}"
            start = time.monotonic()
            try:
                engine = model.build((1024, 512), 8, target)
            except recipe.Failed as error:
                report.line(False, f"{text}: {error}")
                continue
            report.line(True, f"{text}: engine of {engine.nbytes / 1e6:.1f} MB in "
                              f"{time.monotonic() - start:.1f} s")
    wrong = wrong_labels(labels["f32"], logits)
    report.line(wrong == 0, f"bundled model, f32, example photo: {wrong} wrong labels")
    share = float((labels["f16"] != labels["f32"]).mean())
    report.line(share <= HALF_LABELS, f"bundled model, f16 as rounded in numpy: {100 * share:.2f} % of the "
                                      "labels differ from f32")


def check_recipe(report: Report, binary: Path, folder: Path) -> None:
    script = [sys.executable, str(ROOT / "examples/python/build_tensorrt.py")]
    export(binary, folder / "fpenet.onnx", "--argmax")
    files = [str(folder / "fpenet.onnx"), str(folder / "fpenet.engine")]
    for options in ([], ["--half"], ["--target", "7.5"]):
        (folder / "fpenet.engine").unlink(missing_ok=True)
        result = subprocess.run([*script, *files, "--size", "1024x512", "--batch", "8", *options],
                                capture_output=True, text=True)
        written = (folder / "fpenet.engine").is_file()
        output = (result.stdout or result.stderr).strip().replace(f"{folder}/", "")
        report.line(result.returncode == 0 and written,
                    f"build_tensorrt.py {' '.join(options)}: {output}".replace(" :", ":"))


def check_refusals(report: Report, binary: Path, folder: Path) -> None:
    """What is wrong on purpose: each must be refused with a message, or change the numbers."""
    model = ROOT / "tests/data/meu_odd_size/model.safetensors"
    content = export(binary, folder / "m.onnx", "--model", model, "--size", "43x33")

    def refused(what: str, attempt) -> None:
        try:
            attempt()
        except recipe.Failed as error:
            report.line(True, f"refused, {what}: {str(error)[:110]}")
        else:
            report.line(False, f"{what}: expected a refusal, found none")

    unknown = onnx.load_model_from_string(content)
    next(node for node in unknown.graph.node if node.op_type == "Relu").op_type = "NoSuchOperator"
    refused("an unknown operator", lambda: recipe.Model(unknown.SerializeToString(), "unknown.onnx"))
    refused("half a file", lambda: recipe.Model(content[:len(content) // 2], "cut.onnx"))
    refused("a size other than the file's",
            lambda: recipe.Model(content, "fixed.onnx").build((64, 64), 1, []))
    refused("f16 of half a file", lambda: recipe.half(content[:len(content) // 2]))
    refused("an unknown card", lambda: recipe.Model(content, "fixed.onnx").build((43, 33), 1, ["1.0"]))

    # A dilation that is read wrong keeps every shape: only numbers tell.
    image = np.load(model.parent / "input.npy")
    expected = reference(binary, model, image, folder)
    altered = onnx.load_model_from_string(content)
    for node in altered.graph.node:
        fields = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Conv" and list(fields["dilations"].ints) == [8, 8]:
            fields["dilations"].ints[:] = [4, 4]
            fields["pads"].ints[:] = [4] * 4
    found = trt_network.run(recipe.Model(altered.SerializeToString(), "altered.onnx").network, image)
    error = relative_l2(found, expected)
    report.line(error > TOLERANCE, f"noticed, dilations 4 for 8: relative L2 {error:.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fpenet", type=Path, default=ROOT / "target/release/fpenet")
    parser.add_argument("--model", type=Path, action="append", help="check these models' files alone")
    parser.add_argument("--size", type=parse_size, default=(480, 360), help="input size for --model [480x360]")
    args = parser.parse_args()

    report = Report()
    rng = np.random.default_rng(0)
    print(f"TensorRT for RTX {recipe.trt.__version__}, no engine is run")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.model:
            width, height = args.size
            for model in args.model:
                image = rng.standard_normal((1, 3, height, width), dtype=np.float32)
                check_files(report, args.fpenet, model.name, model, [image], folder)
        else:
            cases = sorted((ROOT / "tests/data").glob("*/model.safetensors"))
            if not cases:
                sys.exit(f"{ROOT / 'tests/data'}: expected folders with model.safetensors, found none")
            for model in cases:
                images = [np.load(model.parent / "input.npy")]
                for size in ((3, 3, 47, 61), (2, 3, 16, 19)):
                    images.append(rng.standard_normal(size, dtype=np.float32))
                check_files(report, args.fpenet, model.parent.name, model, images, folder)
            check_bundled(report, args.fpenet, folder)
            check_half_types(report, args.fpenet, folder)
            check_recipe(report, args.fpenet, folder)
            check_refusals(report, args.fpenet, folder)
    print(f"{report.passed} checks passed, {report.failed} failed")
    return int(report.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
