"""The other engines of tools/compare.py. Each function runs in a process of its own and returns the call
that is timed and its clock; it raises Unavailable or ImportError where this machine has no such engine.

All of them take the same model file or the ONNX file made from it, and the same input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparing import Call, Timer, Unavailable, timed, timed_by_gpu
from fpenet_torch import Config, FPENet, fold_batch_norm, load_model

OPSET = 17


class Labelled(nn.Module):
    """A network with ArgMax appended: N x H x W, as small an integer as the exporter allows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).argmax(1)


def export_onnx(model: FPENet, x: Tensor, path: Path, labels: bool) -> None:
    """Fixed shapes, so that a runtime can fold all it is able to (batch norms among it)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the input's shape check
        torch.onnx.export(Labelled(model) if labels else model, (x,), str(path), input_names=["input"],
                          output_names=["output"], opset_version=OPSET, dynamo=False)


def onnxruntime_cpu(path: Path, x: np.ndarray, threads: int) -> tuple[Call, Timer]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"input": x}
    return lambda: session.run(None, feed)[0], timed


def openvino_cpu(path: Path, x: np.ndarray, threads: int, forced: bool) -> tuple[Call, Timer]:
    """`forced`: f32 throughout; else what OpenVINO takes by itself (bf16 on processors that have it)."""
    import openvino

    options: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if forced:
        options["INFERENCE_PRECISION_HINT"] = "f32"
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def call() -> np.ndarray:
        outputs = request.infer([x], share_inputs=True, share_outputs=True)
        return next(iter(outputs.values()))

    return call, timed


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def torch_cpu(path: Path, x: np.ndarray, threads: int, labels: bool, channels_last: bool, compiled: bool
              ) -> tuple[Call, Timer]:
    torch.set_num_threads(threads)
    layout = memory_format(channels_last)
    model: nn.Module = fold_batch_norm(load_model(path)[0])
    model = (Labelled(model) if labels else model).to(memory_format=layout)
    batch = torch.from_numpy(x).to(memory_format=layout)
    run = compile_or_skip(model, batch) if compiled else model

    def call() -> np.ndarray:
        with torch.inference_mode():
            return run(batch).numpy()

    return call, timed


def compile_or_skip(model: nn.Module, batch: Tensor, search: bool = False
                    ) -> Callable[[Tensor], Tensor]:
    """torch.compile for this input; `search` for the fastest kernels, which takes minutes."""
    options = {"mode": "max-autotune-no-cudagraphs"} if search else {}
    run = torch.compile(model, fullgraph=True, dynamic=False, **options)
    try:
        with torch.inference_mode():
            run(batch)
    except Exception as error:  # inductor's errors have no common base
        raise Unavailable(f"torch.compile: {str(error).strip().splitlines()[0]}") from error
    return run


def require_cuda() -> None:
    if not torch.cuda.is_available():
        raise Unavailable("PyTorch finds no CUDA GPU")


def set_precision(precision: str) -> torch.dtype:
    """`f32`, `tf32` or `f16`; returns the storage type."""
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    return torch.float16 if precision == "f16" else torch.float32


def torch_cuda(path: Path, x: np.ndarray, labels: bool, precision: str, compiled: bool, graph: bool,
               search: bool) -> tuple[Call, Timer]:
    """f16 in channels-last, where cuDNN has its tensor-core kernels. `graph` replays a CUDA graph."""
    require_cuda()
    dtype, layout = set_precision(precision), memory_format(precision == "f16")
    model: nn.Module = fold_batch_norm(load_model(path)[0])
    model = (Labelled(model) if labels else model).to("cuda", dtype, memory_format=layout)
    batch = torch.from_numpy(x).to("cuda", dtype, memory_format=layout)
    run: Callable[[Tensor], Tensor] = compile_or_skip(model, batch, search) if compiled else model

    def eager() -> Tensor:
        with torch.inference_mode():
            return run(batch)

    if not graph:
        return Device(eager), timed_by_gpu
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up on first use must be before the capture
        for _ in range(3):
            eager()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        output = eager()

    def replay() -> Tensor:
        recorded.replay()
        return output

    return Device(replay), timed_by_gpu


class Device:
    """A call whose result stays on the GPU while it is timed, and comes to the host where it is looked at."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self.call = call

    def __call__(self) -> np.ndarray | Tensor:
        return self.call()

    def output(self) -> np.ndarray:
        result = self.call()
        return (result.float() if result.is_floating_point() else result).cpu().numpy()


def onnxruntime_cuda(path: Path, x: np.ndarray, precision: str) -> tuple[Call, Timer]:
    """Input and output bound to GPU memory, and a CUDA graph; weights in f32."""
    require_cuda()
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Unavailable("this ONNX Runtime has no CUDA provider (pip install onnxruntime-gpu)")
    stream = torch.cuda.current_stream()
    options = {"use_tf32": int(precision == "tf32"), "enable_cuda_graph": 1,
               "cudnn_conv_algo_search": "EXHAUSTIVE", "user_compute_stream": str(stream.cuda_stream)}
    session = ort.InferenceSession(path, providers=[("CUDAExecutionProvider", options)])
    batch = torch.from_numpy(x).cuda()
    shape, kind = session.get_outputs()[0].shape, session.get_outputs()[0].type
    output = torch.empty(shape, device="cuda", dtype=torch.float32 if "float" in kind else torch.int64)
    binding = session.io_binding()
    binding.bind_input("input", "cuda", 0, np.float32, batch.shape, batch.data_ptr())
    element = np.float32 if "float" in kind else np.int64
    binding.bind_output("output", "cuda", 0, element, output.shape, output.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return output

    return Device(call), timed_by_gpu


def tensorrt_cuda(path: Path, x: np.ndarray, precision: str) -> tuple[Call, Timer]:
    """TensorRT's own ONNX parser and builder, replayed as a CUDA graph."""
    require_cuda()
    try:
        import tensorrt as trt
    except ImportError as error:
        raise Unavailable("TensorRT is not installed (pip install tensorrt)") from error
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise Unavailable(f"TensorRT does not read the network: {parser.get_error(0)}")
    config = builder.create_builder_config()
    if precision == "f16":
        if not hasattr(trt.BuilderFlag, "FP16"):
            raise Unavailable("this TensorRT takes f16 from strongly typed networks alone")
        config.set_flag(trt.BuilderFlag.FP16)
    if precision != "tf32":
        config.clear_flag(trt.BuilderFlag.TF32)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Unavailable("TensorRT does not build the network for this GPU")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    batch = torch.from_numpy(x).cuda()
    kinds = {trt.float32: torch.float32, trt.int32: torch.int32, trt.int64: torch.int64}
    output = torch.empty(tuple(engine.get_tensor_shape("output")), device="cuda",
                         dtype=kinds[engine.get_tensor_dtype("output")])
    context.set_tensor_address("input", batch.data_ptr())
    context.set_tensor_address("output", output.data_ptr())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        context.execute_async_v3(side.cuda_stream)
    side.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded, stream=side):
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)

    def call() -> Tensor:
        recorded.replay()
        return output

    call.keep = (engine, context)  # the recorded kernels use their memory
    return Device(call), timed_by_gpu


def torch_training(device: str, size: tuple[int, int], batch: int, classes: int, threads: int, mode: str
                   ) -> tuple[Callable[[], object], Timer]:
    """One training step (forward, backward, Adam) on random images up to the loss in host memory.

    `mode`: f32, channels-last, tf32 or amp (f16 autocast with a gradient scaler, channels-last).
    """
    if device == "cuda":
        require_cuda()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    set_precision("tf32" if mode in ("tf32", "amp") else "f32")
    width, height = size
    layout = memory_format(mode in ("channels-last", "amp"))
    model = FPENet(Config(classes=classes)).train().to(device, memory_format=layout)
    x = torch.randn(batch, 3, height, width).to(device, memory_format=layout)
    labels = torch.randint(0, classes, (batch, height, width), device=device)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-4, weight_decay=1e-4, fused=device == "cuda")
    scaler = torch.amp.GradScaler(device, enabled=mode == "amp")

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.float16, enabled=mode == "amp"):
            loss = F.cross_entropy(model(x), labels, ignore_index=255)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        return loss.item()

    return step, timed

