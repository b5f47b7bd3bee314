#!/usr/bin/env python3
"""Segments a photo with an exported model, in ONNX Runtime or OpenVINO.

    fpenet export --onnx fpenet.onnx --argmax
    python examples/python/segment.py fpenet.onnx photo.jpg labels.png --runtime openvino

Needs numpy, pillow and one of onnxruntime and openvino. The network runs at the photo's size; --size
WxH resizes the photo first. The labels are written as 8-bit grey.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from PIL import Image


def onnx_runtime(path: str, rgb: np.ndarray) -> tuple[np.ndarray, list[str]]:
    import onnxruntime as ort

    session = ort.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    mean, std = (np.array(json.loads(metadata[key]), np.float32) for key in ("mean", "std"))
    image = (rgb.astype(np.float32) / 255 - mean) / std
    labels = session.run(None, {"input": image.transpose(2, 0, 1)[None]})[0]
    return labels, json.loads(metadata["classes"])


def openvino(path: str, rgb: np.ndarray) -> tuple[np.ndarray, list[str]]:
    import openvino as ov
    from openvino.preprocess import PrePostProcessor

    core = ov.Core()
    model = core.read_model(path)

    def metadata(key: str) -> list:
        return json.loads(model.get_rt_info(["framework", key]).astype(str))

    # Normalisation and layout become part of the model, which then takes bytes as they are.
    steps = PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    steps.input().preprocess().convert_element_type(ov.Type.f32)
    steps.input().preprocess().mean([255 * m for m in metadata("mean")])
    steps.input().preprocess().scale([255 * s for s in metadata("std")])
    # Without the hint CPUs with half-precision units use them: faster, and other labels where two
    # classes lie close together.
    compiled = core.compile_model(steps.build(), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(rgb[None])[0], metadata("classes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="ONNX file, exported with --argmax")
    parser.add_argument("photo")
    parser.add_argument("labels", help="where the labels go (.png)")
    parser.add_argument("--size", help="WxH; the photo's own without it")
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), default="onnxruntime")
    args = parser.parse_args()

    photo = Image.open(args.photo).convert("RGB")
    if args.size:
        width, height = map(int, args.size.split("x"))
        photo = photo.resize((width, height), Image.Resampling.BILINEAR)
    run = openvino if args.runtime == "openvino" else onnx_runtime
    labels, classes = run(args.model, np.asarray(photo))
    labels = labels[0].astype(np.uint8)
    Image.fromarray(labels).save(args.labels)
    shares = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    for index in np.argsort(-shares, kind="stable"):
        if shares[index] > 0:
            print(f"{100 * shares[index]:5.1f} %  {classes[index]}")


if __name__ == "__main__":
    main()
