#!/usr/bin/env python3
"""Compares `fpenet eval` with cityscapesScripts on the same predictions.

Generates a small data set in Cityscapes' layout (random rectangles of all 34 label ids), makes a
model with `fpenet init`, writes its predictions with `fpenet export-predictions`, lets
cityscapesScripts' evalPixelLevelSemanticLabeling judge the PNGs, and compares IoU per class and
the mean with `fpenet eval --json`. Exit code 0 when all agree to 1e-6.

    pip install cityscapesScripts
    cargo build --release
    tools/check_cityscapes.py [--fpenet target/release/fpenet] [--model FILE] [--frames N]
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

TOLERANCE = 1e-6
SIZE = (256, 128)  # width, height
CITIES = ["aachen", "bremen", "ulm"]


def generate(root, frames, seed):
    """Frames with rectangles of every label id; the image's colours follow the labels."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (34, 3))
    for i in range(frames):
        city = CITIES[i % len(CITIES)]
        name = f"{city}_{i:06d}_000019"
        labels = np.full((SIZE[1], SIZE[0]), rng.integers(34), np.uint8)
        for _ in range(60):
            x, y = rng.integers(SIZE[0]), rng.integers(SIZE[1])
            w, h = rng.integers(8, 80), rng.integers(8, 60)
            labels[y : y + h, x : x + w] = rng.integers(34)
        noise = rng.integers(-20, 21, (*labels.shape, 3))
        image = np.clip(colours[labels] + noise, 0, 255).astype(np.uint8)
        for part, suffix, pixels in (
            ("leftImg8bit", "_leftImg8bit.png", image),
            ("gtFine", "_gtFine_labelIds.png", labels),
        ):
            folder = root / part / "val" / city
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / (name + suffix))


def by_cityscapes_scripts(root, predictions):
    """IoU per class name and the mean, of cityscapesScripts."""
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as judge

    judge.args.evalInstLevelScore = False
    judge.args.JSONOutput = False
    judge.args.quiet = True
    judge.args.predictionPath = str(predictions)
    judge.args.predictionWalk = None
    truths = sorted(str(p) for p in (root / "gtFine/val").glob("*/*_gtFine_labelIds.png"))
    found = [judge.getPrediction(judge.args, truth) for truth in truths]
    result = judge.evaluateImgLists(found, truths, judge.args)
    return result["classScores"], result["averageScoreClasses"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fpenet", default="target/release/fpenet")
    parser.add_argument("--model", help="19-class model file [default: initial weights]")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def fpenet(*words):
        subprocess.run([args.fpenet, *map(str, words)], check=True, stdout=subprocess.DEVNULL)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "cityscapes"
        generate(root, args.frames, args.seed)
        model = args.model or Path(folder) / "model.safetensors"
        if not args.model:
            fpenet("init", "--out", model, "--seed", args.seed)
        predictions, figures = Path(folder) / "predictions", Path(folder) / "eval.json"
        common = ["--data", root, "--split", "val", "--model", model, "--device", "cpu"]
        fpenet("export-predictions", *common, "--out", predictions)
        fpenet("eval", *common, "--json", figures)
        ours = json.loads(figures.read_text())
        scores, mean = by_cityscapes_scripts(root, predictions)

    worst, compared = 0.0, 0
    print(f"{'class':15}  {'fpenet':>10}  {'cityscapesScripts':>17}")
    for name, iou in [*ours["per_class_iou"].items(), ("mean", ours["miou"])]:
        theirs = mean if name == "mean" else scores[name]
        if iou is None or math.isnan(theirs):
            if not (iou is None and math.isnan(theirs)):
                sys.exit(f"error: {name}: absent for one of the two: {iou}, {theirs}")
            continue
        print(f"{name:15}  {iou:10.7f}  {theirs:17.7f}")
        worst, compared = max(worst, abs(iou - theirs)), compared + 1
    # An all-zero score would agree whatever the mapping of the ids.
    if compared < 10 or not ours["miou"] > 0:
        sys.exit(f"error: only {compared} figures to compare, mIoU {ours['miou']}")
    print(f"{compared} figures, largest difference {worst:.1e} (tolerance {TOLERANCE:.0e})")
    sys.exit(0 if worst <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
