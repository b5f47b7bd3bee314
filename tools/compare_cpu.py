#!/usr/bin/env python3
"""Compares this engine's CPU backend with ONNX Runtime and PyTorch, in one interleaved run.

    python tools/compare_cpu.py --json compare.json
    python tools/compare_cpu.py --train

All engines get the same weights and the same number of threads. Outputs are compared first. Then the
engines take turns in short rounds, so that a slow spell of the machine hits all of them, and figures
are over the samples of all rounds. Every engine has a process of its own: in one process with PyTorch,
ONNX Runtime measured a quarter slower than alone. This engine is driven through `fpenet run` and
`fpenet bench`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor

from dump_reference import randomise
from fpenet_torch import Config, FPENet, fold_batch_norm, load_model, parse_size, save_model

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("fpenet", "onnxruntime", "pytorch", "pytorch-channels-last")
BASELINE = {"inference": "onnxruntime", "train": "pytorch"}
SIZES = ((768, 384), (1024, 512), (1536, 768))
TRAIN_SIZE, TRAIN_BATCH, TRAIN_CLASSES = (480, 360), 8, 11
OPSET = 17
WARMUP = 2
RELATIVE_L2_LIMIT = 1e-4
LABEL_AGREEMENT_LIMIT = 0.999

Size = tuple[int, int]


class Engine(ABC):
    """One competitor at one size."""

    @abstractmethod
    def logits(self) -> np.ndarray:
        """The logits of the common input: 1 x C x H x W."""

    @abstractmethod
    def round(self, iterations: int) -> list[float]:
        """Latencies in milliseconds of that many runs, after a short warm-up."""


class Worker(Engine):
    """An engine that is called from Python, in a process of its own that sleeps between its turns."""

    def __init__(
        self, stack: ExitStack, build: Callable[..., Callable[[], object]], *arguments: object
    ) -> None:
        self.executor = stack.enter_context(ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(build, arguments),
        ))

    def logits(self) -> np.ndarray:
        return self.executor.submit(_call_worker).result()

    def round(self, iterations: int, warmup: int = WARMUP) -> list[float]:
        return self.executor.submit(_time_worker, iterations, warmup).result()


_worker_call: Callable[[], object]  # in a worker process: one run of its engine


def _start_worker(build: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> None:
    global _worker_call
    _worker_call = build(*arguments)


def _call_worker() -> object:
    return _worker_call()


def _time_worker(iterations: int, warmup: int) -> list[float]:
    return timed(_worker_call, iterations, warmup)


class Fpenet(Engine):
    """This engine's CPU backend, as a subprocess."""

    def __init__(self, binary: Path, model: Path, x: np.ndarray, threads: int, folder: Path) -> None:
        self.binary, self.model, self.threads, self.folder = binary, model, threads, folder
        self.size = f"{x.shape[3]}x{x.shape[2]}"
        self.input = folder / f"input_{self.size}.npy"
        np.save(self.input, x)

    def logits(self) -> np.ndarray:
        output = self.folder / f"logits_{self.size}.npy"
        execute(self.binary, "run", "--model", self.model, "--input", self.input,
                "--output", output, "--device", "cpu")
        return np.load(output)

    def round(self, iterations: int) -> list[float]:
        return bench(self.binary, self.folder, iterations, "--model", self.model, "--size", self.size,
                     "--batch", 1, "--device", "cpu", "--threads", self.threads)


def timed(call: Callable[[], object], iterations: int, warmup: int = WARMUP) -> list[float]:
    """Milliseconds of each of `iterations` calls, after `warmup` untimed ones."""
    for _ in range(warmup):
        call()
    samples = []
    for _ in range(iterations):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def execute(*words: object) -> None:
    """Runs a command; a failure carries its error output."""
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")


def bench(binary: Path, folder: Path, iterations: int, *options: object, warmup: int = WARMUP) -> list[float]:
    """`fpenet bench` with these options: its raw samples in milliseconds."""
    path = folder / "bench.json"
    path.unlink(missing_ok=True)
    execute(binary, "bench", *options, "--iterations", iterations, "--warmup", warmup, "--json", path)
    samples = json.loads(path.read_text()).get("samples_ms")
    if not isinstance(samples, list) or len(samples) != iterations:
        raise RuntimeError(f"{path}: samples_ms: expected {iterations} numbers, found {samples!r}")
    return samples


def export_onnx(model: FPENet, x: Tensor, path: Path) -> None:
    """Fixed shapes, so that ONNX Runtime can fold all it is able to (batch norms among it)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the input's shape check
        torch.onnx.export(model, (x,), str(path), input_names=["input"], output_names=["logits"],
                          opset_version=OPSET, dynamo=False)


def onnx_call(path: Path, x: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"input": x}
    return lambda: session.run(["logits"], feed)[0]


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def torch_call(path: Path, x: np.ndarray, threads: int, channels_last: bool) -> Callable[[], np.ndarray]:
    torch.set_num_threads(threads)
    model = fold_batch_norm(load_model(path)[0]).to(memory_format=memory_format(channels_last))
    batch = torch.from_numpy(x).to(memory_format=memory_format(channels_last))

    def call() -> np.ndarray:
        with torch.inference_mode():
            return model(batch).numpy()

    return call


def make_model(classes: int) -> FPENet:
    """Random weights whose running statistics fit random input, so that logits keep their scale."""
    torch.manual_seed(0)
    model = FPENet(Config(classes=classes))
    randomise(model)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(1, 3, 192, 384))
    return model.eval()


def compare_outputs(engines: dict[str, Engine], expected: np.ndarray) -> dict[str, dict[str, float]]:
    """Each engine's logits against unfused PyTorch's, both 1 x C x H x W; raises where they differ."""
    figures = {}
    for name, engine in engines.items():
        found = engine.logits()
        if found.shape != expected.shape:
            raise RuntimeError(f"{name}: logits: expected {expected.shape}, found {found.shape}")
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        agreement = float((found.argmax(1) == expected.argmax(1)).mean())
        if not (error <= RELATIVE_L2_LIMIT and agreement >= LABEL_AGREEMENT_LIMIT):
            raise RuntimeError(
                f"{name}: logits: expected relative L2 at most {RELATIVE_L2_LIMIT:.0e} and label agreement "
                f"at least {LABEL_AGREEMENT_LIMIT}, found {error:.2e} and {agreement:.5f}"
            )
        figures[name] = {"relative_l2": error, "label_agreement": agreement}
    return figures


def interleave(
    rounds: dict[str, Callable[[int], list[float]]], count: int, iterations: int
) -> dict[str, list[float]]:
    """Lets every engine run `count` short rounds in turn; the order turns round by round."""
    samples: dict[str, list[float]] = {name: [] for name in rounds}
    names = list(rounds)
    for turn in range(count):
        for name in names[turn % len(names):] + names[: turn % len(names)]:
            samples[name] += rounds[name](iterations)
    return samples


def summarise(samples: dict[str, list[float]], baseline: str) -> dict[str, dict[str, object]]:
    """Per engine: median, min, p99 in milliseconds, and median over the baseline's median."""
    base = statistics.median(samples[baseline]) if baseline in samples else None
    return {
        name: {
            "median_ms": statistics.median(values),
            "min_ms": min(values),
            "p99_ms": float(np.percentile(values, 99)),
            "ratio": statistics.median(values) / base if base else None,
            "samples_ms": values,
        }
        for name, values in samples.items()
    }


def compare_inference(arguments: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    model, threads = make_model(Config().classes), arguments.threads
    model_path, onnx_path = folder / "model.safetensors", folder / "model.onnx"
    save_model(model_path, model)
    results: list[dict[str, object]] = []
    for width, height in arguments.sizes:
        batch = torch.randn(1, 3, height, width)
        export_onnx(model, batch, onnx_path)
        x = batch.numpy()
        with torch.inference_mode():
            expected = model(batch).numpy()
        with ExitStack() as stack:
            makers: dict[str, Callable[[], Engine]] = {
                "fpenet": lambda: Fpenet(arguments.binary, model_path, x, threads, folder),
                "onnxruntime": lambda: Worker(stack, onnx_call, onnx_path, x, threads),
                "pytorch": lambda: Worker(stack, torch_call, model_path, x, threads, False),
                "pytorch-channels-last": lambda: Worker(stack, torch_call, model_path, x, threads, True),
            }
            engines = {name: makers[name]() for name in arguments.engines}
            outputs = compare_outputs(engines, expected)
            rounds = {name: engine.round for name, engine in engines.items()}
            samples = interleave(rounds, arguments.rounds, arguments.iterations)
        for name, figures in summarise(samples, BASELINE["inference"]).items():
            results.append({"size": f"{width}x{height}", "engine": name} | figures | outputs[name])
    return results


def torch_training_call(threads: int, channels_last: bool) -> Callable[[], float]:
    """One f32 training step (forward, backward, Adam) on random images; returns the loss."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    width, height = TRAIN_SIZE
    model = FPENet(Config(classes=TRAIN_CLASSES)).train().to(memory_format=memory_format(channels_last))
    x = torch.randn(TRAIN_BATCH, 3, height, width).to(memory_format=memory_format(channels_last))
    labels = torch.randint(0, TRAIN_CLASSES, (TRAIN_BATCH, height, width))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-4, weight_decay=1e-4)

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), labels, ignore_index=255)
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


def compare_training(arguments: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    size = "{}x{}".format(*TRAIN_SIZE)

    def fpenet_round(iterations: int) -> list[float]:
        return bench(arguments.binary, folder, iterations, "--train", "--size", size, "--batch", TRAIN_BATCH,
                     "--device", "cpu", "--threads", arguments.threads, warmup=1)

    with ExitStack() as stack:

        def torch_round(channels_last: bool) -> Callable[[int], list[float]]:
            worker = Worker(stack, torch_training_call, arguments.threads, channels_last)
            return lambda iterations: worker.round(iterations, warmup=1)

        makers: dict[str, Callable[[], Callable[[int], list[float]]]] = {
            "fpenet": lambda: fpenet_round,
            "pytorch": lambda: torch_round(False),
            "pytorch-channels-last": lambda: torch_round(True),
        }
        rounds = {name: makers[name]() for name in arguments.engines if name in makers}
        samples = interleave(rounds, arguments.rounds, arguments.iterations)
    return [
        {"size": f"{TRAIN_BATCH} x {size}", "engine": name} | figures
        for name, figures in summarise(samples, BASELINE["train"]).items()
    ]


def table(results: list[dict[str, object]], baseline: str) -> str:
    """Markdown; a ratio under 1 is faster than the baseline."""
    with_outputs = "relative_l2" in results[0]
    header = ["size", "engine", "median ms", "min ms", "p99 ms", f"time / {baseline}"]
    header += ["logits relative L2", "label agreement"] if with_outputs else []
    rows = [header, ["---"] * len(header)]
    for result in results:
        ratio = result["ratio"]
        row = [str(result["size"]), str(result["engine"])]
        row += [f"{result[key]:.1f}" for key in ("median_ms", "min_ms", "p99_ms")]
        row.append("-" if ratio is None else f"{ratio:.3f}")
        if with_outputs:
            row += [f"{result['relative_l2']:.1e}", f"{100 * result['label_agreement']:.3f} %"]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="compare training steps instead of inference")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="NAME",
                        help=f"of {', '.join(ENGINES)} (default: all)")
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=list(SIZES), metavar="WxH")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="rounds per engine (default 5; 3 with --train)")
    parser.add_argument("--iterations", type=int, help="runs per round (default 8; 2 with --train)")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/fpenet", metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and raw samples")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.train else 5)
    arguments.iterations = arguments.iterations or (2 if arguments.train else 8)
    if "fpenet" in arguments.engines and not arguments.binary.is_file():
        parser.error(f"{arguments.binary}: expected the release binary, found none "
                     "(cargo build --release, or leave fpenet out of --engines)")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: load average {load:.1f} before the start: figures will be noisy", file=sys.stderr)
    kind = "train" if arguments.train else "inference"
    try:
        with tempfile.TemporaryDirectory(prefix="fpenet-compare-") as folder:
            compare = compare_training if arguments.train else compare_inference
            results = compare(arguments, Path(folder))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    environment = {
        "cpu": cpu_name(), "load_average_at_start": load, "threads": arguments.threads,
        "rounds": arguments.rounds,
        "iterations": arguments.iterations, "onnxruntime": ort.__version__, "torch": torch.__version__,
    }
    print(f"{environment['cpu']}, {arguments.threads} threads, f32, {arguments.rounds} rounds of "
          f"{arguments.iterations}; ONNX Runtime {ort.__version__}, PyTorch {torch.__version__}\n")
    print(table(results, BASELINE[kind]))
    if arguments.json:
        document = {"kind": kind, "environment": environment, "results": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
