"""Runs in numpy the network that TensorRT's parser has made of a file: what NVIDIA read, without a GPU.

One function per kind of layer, for the kinds that our files come to; any other is refused. Values are
rounded to the type that TensorRT gives the tensor, sums within a layer are kept in f64: what comes out
is the network as read, not the arithmetic of any card.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorrt_rtx as trt

Array = np.ndarray
Kernel = Callable[[object, list[Array]], list[Array]]


class Unknown(Exception):
    """A layer or an attribute that these functions do not cover."""


def expect(layer: trt.ILayer, what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Unknown(f"layer {layer.name}: expected {what} {wanted}, found {found}")


def convolution(layer: trt.IConvolutionLayer, inputs: list[Array]) -> list[Array]:
    expect(layer, "constant weights, inputs", len(inputs), 1)
    expect(layer, "padding", layer.padding_mode, trt.PaddingMode.EXPLICIT_ROUND_DOWN)
    x, groups, (kh, kw) = inputs[0], layer.num_groups, tuple(layer.kernel_size_nd)
    (top, left), (bottom, right) = layer.pre_padding, layer.post_padding
    (sh, sw), (dh, dw) = layer.stride_nd, layer.dilation_nd
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    n, channels, height, width = x.shape
    oh, ow = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    out = layer.num_output_maps
    kernel = np.asarray(layer.kernel).reshape(groups, out // groups, channels // groups, kh, kw)
    y = np.zeros((n, groups, out // groups, oh * ow))
    for i in range(kh):
        for j in range(kw):
            taps = x[:, :, i * dh:i * dh + (oh - 1) * sh + 1:sh, j * dw:j * dw + (ow - 1) * sw + 1:sw]
            taps = taps.reshape(n, groups, channels // groups, oh * ow).astype(np.float64)
            y += kernel[..., i, j].astype(np.float64) @ taps
    y = y.reshape(n, out, oh, ow)
    bias = np.asarray(layer.bias)
    return [y + bias.reshape(1, -1, 1, 1) if bias.size else y]


def activation(layer: trt.IActivationLayer, inputs: list[Array]) -> list[Array]:
    x = inputs[0].astype(np.float64)
    match layer.type:
        case trt.ActivationType.RELU:
            return [np.maximum(x, 0)]
        case trt.ActivationType.SIGMOID:
            return [1 / (1 + np.exp(-x))]
    raise Unknown(f"layer {layer.name}: expected RELU or SIGMOID, found {layer.type}")


def elementwise(layer: trt.IElementWiseLayer, inputs: list[Array]) -> list[Array]:
    a, b = inputs
    match layer.op:
        case trt.ElementWiseOperation.SUM:
            return [a + b]
        case trt.ElementWiseOperation.PROD:
            return [a * b]
    raise Unknown(f"layer {layer.name}: expected SUM or PROD, found {layer.op}")


def slice_(layer: trt.ISliceLayer, inputs: list[Array | None]) -> list[Array]:
    expect(layer, "mode", layer.mode, trt.SampleMode.STRICT_BOUNDS)
    tensors = [*inputs[1:], None, None, None][:3]
    start, shape, stride = (
        tuple(map(int, fixed if tensor is None else tensor))
        for tensor, fixed in zip(tensors, (layer.start, layer.shape, layer.stride)))
    window = tuple(slice(s, s + n * d, d) for s, n, d in zip(start, shape, stride))
    return [inputs[0][window]]


def gather(layer: trt.IGatherLayer, inputs: list[Array]) -> list[Array]:
    expect(layer, "mode", layer.mode, trt.GatherMode.DEFAULT)
    return [np.take(inputs[0], inputs[1], axis=layer.axis)]


def reduce(layer: trt.IReduceLayer, inputs: list[Array]) -> list[Array]:
    expect(layer, "operation", layer.op, trt.ReduceOperation.AVG)
    axes = tuple(axis for axis in range(inputs[0].ndim) if layer.axes >> axis & 1)
    return [inputs[0].mean(axis=axes, keepdims=layer.keep_dims, dtype=np.float64)]


def resize(layer: trt.IResizeLayer, inputs: list[Array]) -> list[Array]:
    expect(layer, "interpolation", layer.resize_mode, trt.InterpolationMode.LINEAR)
    expect(layer, "coordinates", layer.coordinate_transformation,
           trt.ResizeCoordinateTransformation.HALF_PIXEL)
    expect(layer, "inputs (the second is the size)", len(inputs), 2)
    y = inputs[0].astype(np.float64)
    for axis, size in enumerate(map(int, inputs[1])):
        held = y.shape[axis]
        if size == held:
            continue
        at = np.clip((np.arange(size) + 0.5) * (held / size) - 0.5, 0, held - 1)
        below = np.floor(at).astype(np.int64)
        share = (at - below).reshape([-1 if i == axis else 1 for i in range(y.ndim)])
        above = np.minimum(below + 1, held - 1)
        y = np.take(y, below, axis) * (1 - share) + np.take(y, above, axis) * share
    return [y]


def top_k(layer: trt.ITopKLayer, inputs: list[Array]) -> list[Array]:
    expect(layer, "operation", layer.op, trt.TopKOperation.MAX)
    expect(layer, "k", layer.k, 1)
    axis = layer.axes.bit_length() - 1
    index = inputs[0].argmax(axis=axis, keepdims=True)
    return [np.take_along_axis(inputs[0], index, axis), index]


def constant(layer: trt.IConstantLayer, _: list[Array]) -> list[Array]:
    return [np.asarray(layer.weights).reshape(tuple(layer.shape))]


def concatenation(layer: trt.IConcatenationLayer, inputs: list[Array]) -> list[Array]:
    return [np.concatenate(inputs, axis=layer.axis)]


def squeeze(_: trt.ISqueezeLayer, inputs: list[Array]) -> list[Array]:
    return [inputs[0].squeeze(tuple(map(int, inputs[1])))]


def shape(_: trt.IShapeLayer, inputs: list[Array]) -> list[Array]:
    return [np.array(inputs[0].shape)]


def same(_: trt.ILayer, inputs: list[Array]) -> list[Array]:
    return [inputs[0]]  # the rounding to the output's type is the cast


# The binding hands every layer out as ILayer; the class beside the function is what it is.
KINDS: dict[trt.LayerType, tuple[type, Kernel]] = {
    trt.LayerType.ACTIVATION: (trt.IActivationLayer, activation),
    trt.LayerType.CAST: (trt.ICastLayer, same),
    trt.LayerType.CONCATENATION: (trt.IConcatenationLayer, concatenation),
    trt.LayerType.CONSTANT: (trt.IConstantLayer, constant),
    trt.LayerType.CONVOLUTION: (trt.IConvolutionLayer, convolution),
    trt.LayerType.ELEMENTWISE: (trt.IElementWiseLayer, elementwise),
    trt.LayerType.GATHER: (trt.IGatherLayer, gather),
    trt.LayerType.REDUCE: (trt.IReduceLayer, reduce),
    trt.LayerType.RESIZE: (trt.IResizeLayer, resize),
    trt.LayerType.SHAPE: (trt.IShapeLayer, shape),
    trt.LayerType.SLICE: (trt.ISliceLayer, slice_),
    trt.LayerType.SQUEEZE: (trt.ISqueezeLayer, squeeze),
    trt.LayerType.TOPK: (trt.ITopKLayer, top_k),
}


def run(network: trt.INetworkDefinition, image: Array) -> Array:
    """The only output for this input; every tensor must have the shape that TensorRT foresees."""
    values = {network.get_input(0).name: image}
    for layer in map(network.get_layer, range(network.num_layers)):
        # Not layer.type: an activation layer that was seen before has one of its own by that name.
        found = trt.ILayer.type.__get__(layer)
        if found not in KINDS:
            raise Unknown(f"layer {layer.name}: {found} is not among those that our files come to")
        kind, compute = KINDS[found]
        tensors = map(layer.get_input, range(layer.num_inputs))
        inputs = [None if tensor is None else values[tensor.name] for tensor in tensors]
        layer.__class__ = kind
        for index, value in enumerate(compute(layer, inputs)):
            tensor = layer.get_output(index)
            foreseen = tuple(tensor.shape)
            if len(foreseen) != value.ndim or any(f not in (-1, v) for f, v in zip(foreseen, value.shape)):
                raise Unknown(f"layer {layer.name}: expected shape {foreseen}, found {value.shape}")
            values[tensor.name] = value.astype(trt.nptype(tensor.dtype))
    return values[network.get_output(0).name]
