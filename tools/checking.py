"""What the checks of exported and imported files share: this program's side of each comparison, and the
measures. Needs numpy alone, so that each check brings only the packages that it is about.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
TIE = 1e-4
OPSETS = (17, 18, 20, 22)


def parse_size(text: str) -> tuple[int, int]:
    """"WxH" -> (width, height)."""
    try:
        width, height = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WxH, for instance 480x360, found {text}") from None
    return width, height


def fpenet(binary: Path, *arguments: object) -> None:
    command = [str(binary), *map(str, arguments)]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"{binary}: {error.strerror}: cargo build --release, or --fpenet FILE")
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {result.returncode}: {result.stderr.strip()}")


def reference(binary: Path, model: Path, image: np.ndarray, folder: Path) -> np.ndarray:
    """Logits of `fpenet run` on the CPU."""
    np.save(folder / "input.npy", image)
    fpenet(binary, "run", "--device", "cpu", "--model", model, "--input", folder / "input.npy",
           "--output", folder / "logits.npy")
    return np.load(folder / "logits.npy")


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        sys.exit(f"expected shape {expected.shape}, found {found.shape}")
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def wrong_labels(labels: np.ndarray, logits: np.ndarray) -> int:
    """Pixels whose label is not the largest logit's index, near ties excepted."""
    expected = (logits.shape[0], *logits.shape[2:])
    if labels.dtype != np.int64 or labels.shape != expected:
        sys.exit(f"labels: expected int64 {expected}, found {labels.dtype} {labels.shape}")
    top = np.sort(logits, axis=1)[:, -2:]
    clear = top[:, 1] - top[:, 0] > TIE
    return int(((labels != logits.argmax(axis=1)) & clear).sum())
