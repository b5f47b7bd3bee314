"""What the comparisons of tools/compare.py share: engines, interleaved rounds, figures, tables.

Every engine but this one has a process of its own that sleeps between its turns: in one process with
PyTorch, ONNX Runtime measured a quarter slower than alone. This engine is driven through `fpenet run`
and `fpenet bench`.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from dump_reference import randomise
from fpenet_torch import Config, FPENet

WARMUP = 2

Size = tuple[int, int]
Call = Callable[[], np.ndarray]


class Unavailable(Exception):
    """An engine that this machine does not have, with what is missing."""


class Engine(ABC):
    """One competitor at one size."""

    def ready(self) -> None:
        """Does what has to be done before it runs; raises Unavailable where something is missing."""

    @abstractmethod
    def output(self) -> np.ndarray:
        """What it makes of the common input: logits 1 x C x H x W, or labels 1 x H x W."""

    @abstractmethod
    def round(self, iterations: int) -> list[float]:
        """Latencies in milliseconds of that many runs, after a short warm-up."""


class Worker(Engine):
    """An engine that is called from Python, in a process of its own.

    `build(*arguments)` runs in that process and returns the call that is timed, and how: `timed` by the
    host's clock, or another function with its signature (a GPU's own clock). The process starts at
    once and imports what it needs beside others; `ready` then builds, which one does at a time, since
    libraries choose their algorithms by timing them. One that takes more than `patience` seconds is
    ended there.
    """

    def __init__(
        self, stack: ExitStack, build: Callable[..., tuple[Call, Timer]], *arguments: object,
        patience: float | None = None,
    ) -> None:
        self.patience = patience
        self.executor = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        self.built = build, arguments
        # To receive the function, the process imports its module.
        self.executor.submit(_import_worker, build)

    def ready(self) -> None:
        try:
            problem = self.executor.submit(_build_worker, *self.built).result(self.patience)
        except TimeoutError:
            # Python 3.14 has kill_workers() for it.
            for process in list(self.executor._processes.values()):
                process.kill()
            problem = f"not ready within {self.patience:g} s"
        if problem is not None:
            raise Unavailable(problem)

    def output(self) -> np.ndarray:
        return self.executor.submit(_call_worker).result()

    def round(self, iterations: int, warmup: int = WARMUP) -> list[float]:
        return self.executor.submit(_time_worker, iterations, warmup).result()


Timer = Callable[[Callable[[], object], int, int], list[float]]
# In a worker process: one run of its engine and its clock.
_worker: tuple[Call, Timer]


def _import_worker(_build: Callable[..., tuple[Call, Timer]]) -> None:
    pass


def _build_worker(build: Callable[..., tuple[Call, Timer]], arguments: tuple[object, ...]) -> str | None:
    global _worker
    try:
        _worker = build(*arguments)
    except (Unavailable, ImportError) as error:
        return str(error)
    return None


def _call_worker() -> object:
    call = _worker[0]
    # What stays on a GPU while it is timed comes to the host here.
    return call.output() if hasattr(call, "output") else call()


def _time_worker(iterations: int, warmup: int) -> list[float]:
    return _worker[1](_worker[0], iterations, warmup)


class Fpenet(Engine):
    """This engine, as a subprocess. On a GPU its samples are of the forward pass, by the GPU's clock."""

    def __init__(self, binary: Path, model: Path, x: np.ndarray, folder: Path, *, labels: bool = False,
                 device: str = "cpu", precision: str = "f32", threads: int | None = None) -> None:
        self.binary, self.model, self.folder, self.labels = binary, model, folder, labels
        self.size = f"{x.shape[3]}x{x.shape[2]}"
        self.device = ["--device", device, "--precision", precision]
        self.threads = ["--threads", threads] if threads is not None else []
        self.key = "samples_ms" if device == "cpu" else "compute_samples_ms"
        self.input = folder / f"input_{self.size}.npy"
        np.save(self.input, x)

    def output(self) -> np.ndarray:
        path = self.folder / f"logits_{self.size}.npy"
        execute(self.binary, "run", "--model", self.model, "--input", self.input, "--output", path,
                *self.device)
        logits = np.load(path)
        return logits.argmax(1) if self.labels else logits

    def round(self, iterations: int) -> list[float]:
        labels = ["--argmax"] if self.labels else []
        return bench(self.binary, self.folder, iterations, "--model", self.model, "--size", self.size,
                     "--batch", 1, *self.device, *self.threads, *labels, key=self.key)


def timed(call: Callable[[], object], iterations: int, warmup: int = WARMUP) -> list[float]:
    """Milliseconds of each of `iterations` calls, after `warmup` untimed ones, by the host's clock."""
    for _ in range(warmup):
        call()
    samples = []
    for _ in range(iterations):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def timed_by_gpu(call: Callable[[], object], iterations: int, warmup: int = WARMUP) -> list[float]:
    """The same for calls that enqueue work on the current CUDA stream, by the GPU's own clock."""
    for _ in range(warmup):
        call()
    samples = []
    for _ in range(iterations):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return samples


def execute(*words: object) -> None:
    """Runs a command; a failure carries its error output."""
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")


def bench(binary: Path, folder: Path, iterations: int, *options: object, warmup: int = WARMUP,
          key: str = "samples_ms") -> list[float]:
    """`fpenet bench` with these options: its raw samples in milliseconds."""
    path = folder / "bench.json"
    path.unlink(missing_ok=True)
    execute(binary, "bench", *options, "--iterations", iterations, "--warmup", warmup, "--json", path)
    samples = json.loads(path.read_text()).get(key)
    if not isinstance(samples, list) or len(samples) != iterations:
        raise RuntimeError(f"{path}: {key}: expected {iterations} numbers, found {samples!r}")
    return samples


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


def compare_outputs(
    engines: dict[str, Engine], expected: np.ndarray, limits: Callable[[str], tuple[float, float]]
) -> dict[str, dict[str, float]]:
    """Each engine's logits (1 x C x H x W) or labels (1 x H x W) against unfused PyTorch's logits.

    `limits(name)` is the largest relative L2 and the smallest label agreement; raises where an engine is
    beyond them.
    """
    figures = {}
    for name, engine in engines.items():
        found = engine.output()
        worst, least = limits(name)
        if found.ndim == 3:
            found_labels, error = found, None
        else:
            if found.shape != expected.shape:
                raise RuntimeError(f"{name}: logits: expected {expected.shape}, found {found.shape}")
            found_labels = found.argmax(1)
            error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        agreement = float((found_labels == expected.argmax(1)).mean())
        if not (agreement >= least and (error is None or error <= worst)):
            raise RuntimeError(
                f"{name}: outputs: expected relative L2 at most {worst:.0e} and label agreement at least "
                f"{least}, found {error} and {agreement:.5f}"
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


def summarise(samples: list[float]) -> dict[str, object]:
    """Median, min and p99 in milliseconds, and the samples themselves."""
    return {
        "median_ms": statistics.median(samples),
        "min_ms": min(samples),
        "p99_ms": float(np.percentile(samples, 99)),
        "samples_ms": samples,
    }


def table(results: list[dict[str, object]], baselines: list[str]) -> str:
    """Markdown; a ratio under 1 is faster than that baseline."""
    with_outputs = "label_agreement" in results[0]
    header = ["size", "engine", "median ms", "min ms", "p99 ms", "images/s"]
    header += [f"time / {baseline}" for baseline in baselines]
    header += ["logits relative L2", "label agreement"] if with_outputs else []
    rows = [header, ["---"] * len(header)]
    medians = {(result["size"], result["engine"]): result["median_ms"] for result in results}
    for result in results:
        median = result["median_ms"]
        row = [str(result["size"]), str(result["engine"])]
        row += [f"{result[key]:.3g}" if result[key] < 10 else f"{result[key]:.1f}"
                for key in ("median_ms", "min_ms", "p99_ms")]
        row.append(f"{1e3 * result.get('batch', 1) / median:.1f}")
        for baseline in baselines:
            base = medians.get((result["size"], baseline))
            row.append("-" if base is None else f"{median / base:.3f}")
        if with_outputs:
            error = result["relative_l2"]
            row += ["-" if error is None else f"{error:.1e}", f"{100 * result['label_agreement']:.3f} %"]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"
