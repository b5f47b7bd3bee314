#!/usr/bin/env python3
"""This engine beside the others, on one machine, in one interleaved run.

    python tools/compare.py --cpu --json compare.json     # ONNX Runtime, OpenVINO, PyTorch
    python tools/compare.py --json compare.json           # on the GPU: PyTorch, ONNX Runtime, TensorRT
    python tools/compare.py --cpu --train                 # training steps
    python tools/compare.py --peers                       # the paper's Table 7, its networks in PyTorch
    python tools/compare.py --self-check                  # the script's own arithmetic; seconds

All engines get the same weights, and on a CPU the same number of threads. Outputs are compared first.
Then the engines take turns in short rounds, so that a slow spell of the machine hits all of them, and
figures are over the samples of all rounds. Once to the logits, once to the labels (ArgMax appended to
everybody's network; here it is one pass with the last resize). On a GPU the forward pass alone is
timed, by the GPU's clock. What is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

import engines
import peers
from checking import parse_size
from comparing import (
    Engine, Fpenet, Size, Unavailable, Worker, bench, compare_outputs, cpu_name, interleave, make_model,
    summarise, table,
)
from fpenet_torch import Config, fold_batch_norm, save_model

ROOT = Path(__file__).resolve().parent.parent
SIZES = ((768, 384), (1024, 512), (1536, 768))
TRAIN_SIZE, TRAIN_BATCH, TRAIN_CLASSES = (480, 360), 8, 11

CPU_ENGINES = ("fpenet", "onnxruntime", "openvino-f32", "openvino-default", "pytorch",
               "pytorch-channels-last", "pytorch-compiled")
PRECISIONS = ("f32", "tf32", "f16")
GPU_ENGINES = (
    "fpenet-f32", "fpenet-f16",
    *(f"pytorch-{kind}-{precision}" for precision in PRECISIONS for kind in ("eager", "graph", "compiled",
                                                                             "compiled-graph")),
    "onnxruntime-f32", "onnxruntime-tf32",
    *(f"tensorrt-{precision}" for precision in PRECISIONS),
)
TRAIN_ENGINES = {
    "cpu": ("fpenet", "pytorch", "pytorch-channels-last"),
    "cuda": ("fpenet-f32", "fpenet-f16", "pytorch-f32", "pytorch-tf32", "pytorch-amp"),
}


def limits(name: str) -> tuple[float, float]:
    """Largest relative L2 of the logits and smallest label agreement, by the precision in an engine's name.

    f32: sums in another order. Others round operands: TF32 to 10 bits of mantissa, f16 storage as well,
    bf16 (which OpenVINO takes by itself where the processor has it) to 7.
    """
    if name.endswith("default"):
        return 1e-1, 0.95
    if name.endswith("f16"):
        return 5e-2, 0.97
    if name.endswith("tf32"):
        return 1e-2, 0.99
    return 1e-4, 0.999


def open_engines(makers: dict[str, Callable[[], Engine]]) -> dict[str, Engine]:
    """What this machine has of them; the rest is named on stderr."""
    started, found = {}, {}

    def left_out(name: str, problem: Unavailable) -> None:
        print(f"left out: {name}: {problem}", file=sys.stderr)

    for name, make in makers.items():
        try:
            started[name] = make()
        except Unavailable as problem:
            left_out(name, problem)
    for name, engine in started.items():
        try:
            engine.ready()
            found[name] = engine
        except Unavailable as problem:
            left_out(name, problem)
    return found


def cpu_makers(arguments: argparse.Namespace, stack: ExitStack, x: np.ndarray, folder: Path, labels: bool
               ) -> dict[str, Callable[[], Engine]]:
    model, onnx, threads = folder / "model.safetensors", folder / "model.onnx", arguments.threads
    worker = partial(Worker, stack, patience=arguments.patience)

    def pytorch(channels_last: bool, compiled: bool) -> Engine:
        return worker(engines.torch_cpu, model, x, threads, labels, channels_last, compiled)

    return {
        "fpenet": lambda: Fpenet(arguments.binary, model, x, folder, labels=labels, threads=threads),
        "onnxruntime": lambda: worker(engines.onnxruntime_cpu, onnx, x, threads),
        "openvino-f32": lambda: worker(engines.openvino_cpu, onnx, x, threads, True),
        "openvino-default": lambda: worker(engines.openvino_cpu, onnx, x, threads, False),
        "pytorch": lambda: pytorch(False, False),
        "pytorch-channels-last": lambda: pytorch(True, False),
        "pytorch-compiled": lambda: pytorch(False, True),
    }


def gpu_makers(arguments: argparse.Namespace, stack: ExitStack, x: np.ndarray, folder: Path, labels: bool
               ) -> dict[str, Callable[[], Engine]]:
    model, onnx = folder / "model.safetensors", folder / "model.onnx"
    worker = partial(Worker, stack, patience=arguments.patience)

    def fpenet(precision: str) -> Engine:
        return Fpenet(arguments.binary, model, x, folder, labels=labels, device="cuda",
                      precision=precision)

    def pytorch(name: str) -> Engine:
        kind, precision = name.removeprefix("pytorch-").rsplit("-", 1)
        return worker(engines.torch_cuda, model, x, labels, precision, "compiled" in kind,
                      "graph" in kind, arguments.autotune)

    def make(name: str) -> Engine:
        family, precision = name.split("-", 1)[0], name.rsplit("-", 1)[1]
        if family == "fpenet":
            return fpenet(precision)
        if family == "pytorch":
            return pytorch(name)
        build = engines.onnxruntime_cuda if family == "onnxruntime" else engines.tensorrt_cuda
        return worker(build, onnx, x, precision)

    return {name: lambda name=name: make(name) for name in GPU_ENGINES}


def compare_inference(arguments: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    model = make_model(Config().classes)
    save_model(folder / "model.safetensors", model)
    makers_of = cpu_makers if arguments.cpu else gpu_makers
    results: list[dict[str, object]] = []
    for width, height in arguments.sizes:
        batch = torch.randn(1, 3, height, width)
        with torch.inference_mode():
            expected = model(batch).numpy()
        for output in arguments.outputs:
            labels = output == "labels"
            # PyTorch gets its batch norms folded before, so everybody else does as well.
            engines.export_onnx(fold_batch_norm(model), batch, folder / "model.onnx", labels)
            with ExitStack() as stack:
                makers = makers_of(arguments, stack, batch.numpy(), folder, labels)
                opened = open_engines({name: makers[name] for name in arguments.engines})
                outputs = compare_outputs(opened, expected, limits)
                rounds = {name: engine.round for name, engine in opened.items()}
                samples = interleave(rounds, arguments.rounds, arguments.iterations)
            size = f"{width}x{height} to {output}"
            results += [{"size": size, "engine": name} | summarise(values) | outputs[name]
                        for name, values in samples.items()]
    return results


def compare_training(arguments: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    device = "cpu" if arguments.cpu else "cuda"
    size = "{}x{}".format(*TRAIN_SIZE)

    def fpenet_round(precision: str) -> Callable[[int], list[float]]:
        options = ["--train", "--size", size, "--batch", TRAIN_BATCH, "--device", device]
        options += ["--precision", precision]
        options += ["--threads", arguments.threads] if arguments.cpu else []
        return lambda iterations: bench(arguments.binary, folder, iterations, *options, warmup=1)

    with ExitStack() as stack:

        def torch_round(mode: str) -> Callable[[int], list[float]]:
            worker = Worker(stack, engines.torch_training, device, TRAIN_SIZE, TRAIN_BATCH, TRAIN_CLASSES,
                            arguments.threads, mode, patience=arguments.patience)
            worker.ready()
            return lambda iterations: worker.round(iterations, warmup=1)

        def make(name: str) -> Callable[[int], list[float]]:
            family, _, mode = name.partition("-")
            return fpenet_round(mode or "f32") if family == "fpenet" else torch_round(mode or "f32")

        rounds = {name: make(name) for name in arguments.engines}
        samples = interleave(rounds, arguments.rounds, arguments.iterations)
    return [{"size": f"{TRAIN_BATCH} x {size}", "engine": name, "batch": TRAIN_BATCH} | summarise(values)
            for name, values in samples.items()]


def compare_peers(arguments: argparse.Namespace, _folder: Path) -> list[dict[str, object]]:
    """The networks of the paper's Table 7 in plain PyTorch, randomly initialised, one after the other."""
    device = "cpu" if arguments.cpu else "cuda"
    results = []
    for width, height in arguments.sizes:
        for name in arguments.engines:
            with ExitStack() as stack:
                try:
                    worker = Worker(stack, peers.build, name, (width, height), device, arguments.threads,
                                    patience=arguments.patience)
                    worker.ready()
                except Unavailable as problem:
                    print(f"left out: {name}: {problem}", file=sys.stderr)
                    continue
                samples = worker.round(arguments.iterations)
                classes, out_height, out_width = worker.output().shape[1:]
            if (classes, out_height, out_width) != (peers.CLASSES, height, width):
                raise RuntimeError(f"{name}: expected logits of {peers.CLASSES} x {height} x {width}, found "
                                   f"{classes} x {out_height} x {out_width}")
            figures = summarise(samples)
            results.append({"size": f"{width}x{height}", "engine": name, "parameters": peers.parameters(name),
                            "paper_fps": peers.PAPER_FPS.get(name, {}).get((width, height))} | figures)
            print(f"{width}x{height} {name}: {figures['median_ms']:.2f} ms", file=sys.stderr)
    return results


def peers_table(results: list[dict[str, object]]) -> str:
    rows = [["size", "network", "parameters", "paper FPS (TITAN V, 2019)", "FPS here", "median ms", "p99 ms"]]
    rows.append(["---"] * len(rows[0]))
    for result in results:
        paper = result["paper_fps"]
        rows.append([str(result["size"]), str(result["engine"]), f"{result['parameters'] / 1e6:.2f} M",
                     "-" if paper is None else f"{paper}", f"{1e3 / result['median_ms']:.1f}",
                     f"{result['median_ms']:.2f}", f"{result['p99_ms']:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def versions() -> dict[str, str]:
    """Of what is installed among the engines."""
    found = {"torch": torch.__version__}
    for package in ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(arguments: argparse.Namespace) -> str:
    if arguments.cpu:
        return f"{cpu_name()}, {arguments.threads} threads"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def self_check() -> None:
    """The script's own arithmetic, without any engine."""
    rounds = {name: (lambda n, name=name: [float(ord(name))] * n) for name in "abc"}
    samples = interleave(rounds, 2, 3)
    assert samples == {name: [float(ord(name))] * 6 for name in "abc"}, samples
    order: list[str] = []
    interleave({name: (lambda n, name=name: order.append(name) or [1.0]) for name in "ab"}, 3, 1)
    assert order == ["a", "b", "b", "a", "a", "b"], order
    figures = summarise([3.0, 1.0, 2.0])
    assert (figures["median_ms"], figures["min_ms"]) == (2.0, 1.0), figures
    rows = [{"size": "1x1", "engine": name} | summarise([value]) for name, value in (("a", 1.0), ("b", 4.0))]
    lines = table(rows, ["b", "missing"]).splitlines()
    assert lines[2] == "| 1x1 | a | 1 | 1 | 1 | 1000.0 | 0.250 | - |", lines[2]

    class Fixed(Engine):
        def __init__(self, value: np.ndarray) -> None:
            self.value = value

        def output(self) -> np.ndarray:
            return self.value

        def round(self, iterations: int) -> list[float]:
            return [0.0] * iterations

    expected = np.random.default_rng(0).normal(size=(1, 5, 8, 9))
    labels = expected.argmax(1)
    found = compare_outputs({"exact": Fixed(expected), "labels": Fixed(labels)}, expected, limits)
    assert found["exact"] == {"relative_l2": 0.0, "label_agreement": 1.0}, found
    assert found["labels"]["label_agreement"] == 1.0, found
    for wrong in (expected * 1.001, (labels + 1) % 5):
        try:
            compare_outputs({"wrong": Fixed(wrong)}, expected, limits)
        except RuntimeError:
            continue
        raise AssertionError("a wrong output passed")
    assert limits("tensorrt-tf32")[0] < limits("fpenet-f16")[0] < limits("openvino-default")[0]
    assert limits("onnxruntime")[0] == limits("fpenet-f32")[0] == 1e-4
    for name in peers.NETWORKS:
        peers.check(name)
    print(f"self-check passed; networks: {', '.join(peers.NETWORKS)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="compare on the CPU instead of the GPU")
    parser.add_argument("--train", action="store_true", help="compare training steps")
    parser.add_argument("--peers", action="store_true", help="time the paper's Table 7 in PyTorch")
    parser.add_argument("--self-check", action="store_true", help="check this script and its networks")
    parser.add_argument("--engines", nargs="+", metavar="NAME", help="some of them (default: all)")
    parser.add_argument("--list", action="store_true", help="print the engines' names and end")
    parser.add_argument("--sizes", nargs="+", type=parse_size, metavar="WxH",
                        help="default: 768x384 1024x512 1536x768; peers on a CPU: 1024x512")
    parser.add_argument("--outputs", nargs="+", choices=("logits", "labels"), default=["logits", "labels"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU (default: all)")
    parser.add_argument("--rounds", type=int, help="rounds per engine (default 5; 3 with --train)")
    parser.add_argument("--iterations", type=int,
                        help="runs per round (default 8, on a GPU 40; with --train 2 and 10; peers 100)")
    parser.add_argument("--autotune", action=argparse.BooleanOptionalAction, default=True,
                        help="torch.compile on a GPU searches for its fastest kernels: minutes per engine")
    parser.add_argument("--patience", type=float, metavar="SECONDS",
                        help="leave out an engine that takes longer to be built (default: wait)")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/fpenet", metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and raw samples")
    arguments = parser.parse_args()
    kind = "peers" if arguments.peers else "train" if arguments.train else "inference"
    device = "cpu" if arguments.cpu else "cuda"
    if arguments.peers and arguments.train:
        parser.error("--peers and --train: expected one of them")
    known = {"peers": tuple(peers.NETWORKS), "train": TRAIN_ENGINES[device],
             "inference": CPU_ENGINES if arguments.cpu else GPU_ENGINES}[kind]
    if arguments.list:
        print("\n".join(known))
        sys.exit(0)
    unknown = [name for name in arguments.engines or [] if name not in known]
    if unknown:
        parser.error(f"--engines: expected some of {', '.join(known)}, found {unknown[0]}")
    arguments.kind, arguments.engines = kind, arguments.engines or list(known)
    arguments.sizes = arguments.sizes or ([(1024, 512)] if arguments.peers and arguments.cpu else list(SIZES))
    default = {"peers": (1, 100), "train": (3, 2 if arguments.cpu else 10),
               "inference": (5, 8 if arguments.cpu else 40)}[kind]
    arguments.rounds = arguments.rounds or default[0]
    arguments.iterations = arguments.iterations or default[1]
    ours = any(name.startswith("fpenet") for name in arguments.engines) and kind != "peers"
    if ours and not arguments.self_check and not arguments.binary.is_file():
        parser.error(f"{arguments.binary}: expected the release binary, found none "
                     "(cargo build --release, or leave fpenet out of --engines)")
    if not arguments.cpu and not arguments.self_check and not torch.cuda.is_available():
        parser.error("expected a CUDA GPU that PyTorch can use, found none (--cpu compares on the CPU)")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.self_check:
        self_check()
        return 0
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: load average {load:.1f} before the start: figures will be noisy", file=sys.stderr)
    compare = {
        "peers": compare_peers, "train": compare_training, "inference": compare_inference,
    }[arguments.kind]
    try:
        with tempfile.TemporaryDirectory(prefix="fpenet-compare-") as folder:
            results = compare(arguments, Path(folder))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not results:
        print("error: none of the engines could be opened", file=sys.stderr)
        return 1
    device, found = device_name(arguments), versions()
    words = ", ".join(f"{package} {version}" for package, version in found.items())
    print(f"{device}; {arguments.rounds} rounds of {arguments.iterations}; {words}\n")
    if arguments.kind == "peers":
        print(peers_table(results))
    else:
        names = {result["engine"] for result in results}
        preferred = (("onnxruntime", "openvino-f32", "pytorch") if arguments.cpu else
                     ("tensorrt-f16", "pytorch-compiled-graph-f16", "pytorch-eager-f32", "pytorch-amp"))
        print(table(results, [name for name in preferred if name in names]))
    if arguments.json:
        environment = {"device": device, "load_average_at_start": load, "threads": arguments.threads,
                       "rounds": arguments.rounds, "iterations": arguments.iterations,
                       "autotune": arguments.autotune, "versions": found}
        document = {"kind": arguments.kind, "environment": environment, "results": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
