#!/usr/bin/env python3
"""Builds an engine of TensorRT for RTX from an exported model. The machine that builds needs no GPU.

    fpenet export --onnx fpenet.onnx --argmax
    python examples/python/build_tensorrt.py fpenet.onnx fpenet.engine --size 1024x512 --batch 8
    python examples/python/build_tensorrt.py fpenet.onnx turing.engine --size 1024x512 --target 7.5

Needs tensorrt-rtx-cu12 (or -cu13) of PyPI; --half needs onnx and onnxconverter-common too. Without
--target the engine serves NVIDIA's default, the cards from Ampere on; Turing takes one of its own.
Networks keep the types that the file has, so --half rewrites the file to f16 first, input and output
excepted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import tensorrt_rtx as trt
except ImportError as error:
    sys.exit(f"TensorRT for RTX does not load ({error}): pip install tensorrt-rtx-cu12==1.7.1.116")


class Failed(Exception):
    """What TensorRT refused, with its own words."""


class Log(trt.ILogger):
    """Keeps TensorRT's errors, for the message of a failure."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)


class Model:
    """A file as TensorRT's ONNX parser reads it."""

    def __init__(self, content: bytes, name: str) -> None:
        self.name, self.log = name, Log()
        self.builder = trt.Builder(self.log)
        self.network = self.builder.create_network()
        # The network reads the weights where the parser holds them: both live as long as this object.
        self.parser = trt.OnnxParser(self.network, self.log)
        if not self.parser.parse(content):
            found = [f"{e.node_name() or 'file'} ({e.node_operator() or '-'}): {e.desc()}" for e in
                     map(self.parser.get_error, range(self.parser.num_errors))]
            raise Failed(f"{name}: TensorRT's ONNX parser refuses it: {'; '.join(found)}")

    def build(self, size: tuple[int, int], batch: int, targets: list[str]) -> trt.IHostMemory:
        """An engine for batches from 1 to `batch` of this width and height."""
        config = self.builder.create_builder_config()
        profile = self.builder.create_optimization_profile()
        width, height = size
        profile.set_shape("input", (1, 3, height, width), (1, 3, height, width), (batch, 3, height, width))
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(capability(target), index)
        self.log.errors.clear()
        engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            raise Failed(f"{self.name}: TensorRT does not build it at {width}x{height}, batch {batch}, for "
                         f"{', '.join(targets) or 'the default cards'}: {'; '.join(self.log.errors)}")
        return engine


def capabilities() -> list[str]:
    """Compute capabilities that this release builds for: 7.5, 8.0, ..."""
    names = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return [f"{name[:-1]}.{name[-1]}" for name in names]


def capability(target: str) -> trt.ComputeCapability:
    try:
        return trt.ComputeCapability.__members__[f"SM{target.replace('.', '')}"]
    except KeyError:
        raise Failed(f"--target: expected one of {', '.join(capabilities())} (TensorRT for RTX "
                     f"{trt.__version__}), found {target}") from None


def half(content: bytes) -> bytes:
    """The file in f16, input and output excepted."""
    try:
        import onnx
        from onnxconverter_common.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    except ImportError as error:
        raise Failed(f"--half: {error}: pip install onnx onnxconverter-common") from error
    # By default the converter leaves resizes in f32, and then loses the cast that brings logits back to it.
    in_f32 = [kind for kind in DEFAULT_OP_BLOCK_LIST if kind != "Resize"]
    try:
        model = onnx.load_model_from_string(content)
        model = convert_float_to_float16(model, keep_io_types=True, op_block_list=in_f32)
        return model.SerializeToString()
    except Exception as error:  # protobuf's for what is no ONNX, ValueError for what is in f16 already
        raise Failed(f"--half: the file does not convert: {' '.join(str(error).split())}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="ONNX file")
    parser.add_argument("engine", type=Path, help="where the engine goes")
    parser.add_argument("--size", required=True, help="WxH of the pictures")
    parser.add_argument("--batch", type=int, default=1, help="largest batch [1]")
    parser.add_argument("--target", action="append", default=[],
                        help=f"compute capability of the card, may be repeated: {', '.join(capabilities())}")
    parser.add_argument("--half", action="store_true", help="compute in f16")
    args = parser.parse_args()
    try:
        width, height = map(int, args.size.lower().split("x"))
    except ValueError:
        parser.error(f"--size: expected WxH, for instance 1024x512, found {args.size}")
    # TensorRT builds smaller ones, even empty ones, without a word.
    if min(width, height) < 16:
        parser.error(f"--size: expected at least 16 pixels a side, found {args.size}")
    if args.batch < 1:
        parser.error(f"--batch: expected at least 1, found {args.batch}")
    try:
        content = args.model.read_bytes()
        model = Model(half(content) if args.half else content, str(args.model))
        engine = bytes(model.build((width, height), args.batch, args.target))
        args.engine.write_bytes(engine)
    except Failed as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
    print(f"{args.engine}: {len(engine) / 1e6:.1f} MB, {width}x{height}, batch 1 to {args.batch}, "
          f"TensorRT for RTX {trt.__version__}, for {', '.join(args.target) or 'the default cards'}")


if __name__ == "__main__":
    main()
