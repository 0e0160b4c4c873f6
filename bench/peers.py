"""fastconv and its peers behind one interface: given a case, return a function that runs it once.

Each peer is optional. What the function returns goes through `arrays` to be compared. All run float32, with as many
threads as the case says; weights are packed beforehand by all that can.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from shapes import POOLS, Row

PASSES = ("fwd", "dgrad", "wgrad", "fwdbwd")
MOST_NUMPY_MACS = 2_000_000  # the NumPy reference is for tiny rows

Run = Callable[[], Any]


class Unsupported(Exception):
    """The peer cannot run this case; says why."""


@dataclass(frozen=True)
class Case:
    """A row with data, float32; y is what outputs are written to. Pools have no w and b."""

    row: Row
    direction: str  # one of PASSES
    threads: int
    order: str  # of x, y and dy in memory: contiguous or channels_last
    x: np.ndarray
    w: np.ndarray
    b: np.ndarray
    y: np.ndarray
    dy: np.ndarray


def aligned(a: np.ndarray) -> np.ndarray:
    """A copy that begins at a cache line, as what these libraries allocate does, and what NumPy allocates may not."""
    memory = np.empty(a.nbytes + 64, np.uint8)
    at = -memory.ctypes.data % 64
    copy = memory[at:at + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def make_case(row: Row, direction: str = "fwd", threads: int = 1, order: str = "contiguous") -> Case:
    """Draw normal data, the same for each order; weights such that outputs have a variance of about 1."""
    if direction == "wgrad" and row.op in POOLS:
        raise Unsupported("pools have no weights")
    rng = np.random.default_rng(0)

    def normal(shape: Sequence[int]) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    w = np.asarray(normal(row.w_shape) / np.float32(math.prod(row.w_shape[1:]) ** 0.5))
    b, x, y, dy = (normal(shape) for shape in ((row.out_channels,), row.x_shape, row.y_shape, row.y_shape))
    if order == "channels_last":
        x, y, dy = (np.moveaxis(aligned(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, y, dy))
    else:
        x, y, dy = map(aligned, (x, y, dy))
    return Case(row, direction, threads, order, x, w, b, y, dy)


def arrays(result: Any) -> tuple[np.ndarray, ...]:
    """What a run returned, as arrays."""
    parts = result if isinstance(result, tuple) else (result,)
    return tuple(np.asarray(part) for part in parts)


# ---- fastconv and its reference ----------------------------------------------------------------------------------

def _fastconv(case: Case) -> Run:
    import fastconv
    import fastconv.nn
    from fastconv import functional as f

    fastconv.set_num_threads(case.threads)
    row, x, w, y, dy, arguments = case.row, case.x, case.w, case.y, case.dy, case.row.arguments
    operands = (x,) if row.op in POOLS else (x, w, case.b)
    forward = getattr(f, row.op)
    if case.direction == "fwd":
        prepare = {"conv": fastconv.prepare_conv, "conv_transpose": fastconv.prepare_conv_transpose}.get(row.op)
        if prepare:
            prepared = prepare(w, case.b, *arguments)
            return lambda: prepared(x, out=y)
        return lambda: forward(*operands, *arguments, out=y)

    if row.op == "max_pool":
        pool = getattr(fastconv.nn, f"MaxPool{len(row.size)}d")(*arguments)
        backward = pool.forward(x)[1]
    input_grad: Run = {
        "conv": lambda: f.conv_input_grad(x.shape, w, dy, *arguments),
        "conv_transpose": lambda: f.conv_transpose_input_grad(dy, w, *arguments),
        "max_pool": lambda: backward(dy),
        "avg_pool": lambda: f.avg_pool_grad(dy, x.shape, *arguments),
        "global_avg_pool": lambda: f.adaptive_avg_pool_grad(dy, x.shape),
    }[row.op]
    weight_grad = f.conv_weight_grad if row.op == "conv" else f.conv_transpose_weight_grad
    if case.direction == "dgrad":
        return input_grad
    if case.direction == "wgrad":
        return lambda: weight_grad(x, w.shape, dy, *arguments)
    if row.op == "max_pool":
        def max_pool_step() -> Any:
            y, step = pool.forward(x)
            return y, step(dy)
        return max_pool_step
    if row.op in POOLS:
        return lambda: (forward(x, *arguments), input_grad())
    return lambda: (forward(*operands, *arguments), input_grad(), weight_grad(x, w.shape, dy, *arguments),
                    f.conv_bias_grad(dy))


def algorithm(case: Case) -> str:
    """What fastconv runs: its plan's algorithm; of several passes each that differs."""
    import fastconv
    from fastconv.plan import plan_for

    row = case.row
    if row.op in POOLS:
        return "pool"
    passes = {"fwd": "conv", "dgrad": "conv_input_grad", "wgrad": "conv_weight_grad"}
    x = case.x
    if row.op == "conv_transpose":  # it and its input gradient change places
        passes["fwd"], passes["dgrad"] = passes["dgrad"], passes["fwd"]
        x = case.y
    chosen = [passes[case.direction]] if case.direction in passes else list(passes.values())
    problem = fastconv.explain(x, case.w, row.stride, row.padding, row.dilation, row.groups).problem
    packed = case.direction == "fwd"  # prepare_conv, prepare_conv_transpose
    return "+".join(dict.fromkeys(plan_for(problem, op, packed=packed).algorithm for op in chosen))


def _numpy(case: Case) -> Run:
    import fastconv

    if max(case.row.macs, case.x.size) > MOST_NUMPY_MACS:
        raise Unsupported(f"above {MOST_NUMPY_MACS / 1e6:g} MMAC")
    with fastconv.config(algorithm="reference"):
        run = _fastconv(case)

    def reference() -> Any:
        with fastconv.config(algorithm="reference"):
            return run()
    return reference


# ---- PyTorch -----------------------------------------------------------------------------------------------------

def _torch(case: Case) -> Run:
    import torch

    torch.set_num_threads(case.threads)
    torch.set_float32_matmul_precision("highest")
    name = {"global_avg_pool": "adaptive_avg_pool"}.get(case.row.op, case.row.op)
    forward = getattr(torch.nn.functional, f"{name}{case.row.ndim}d")
    arguments = case.row.arguments or (1,)  # a global pool is adaptive to one element
    x, w, b, dy = (torch.from_numpy(array) for array in (case.x, case.w, case.b, case.dy))
    if case.order == "channels_last" and w.ndim > 3:
        w = w.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[w.ndim])
    operands = (x,) if case.row.op in POOLS else (x, w, b)
    if case.direction == "fwd":
        return lambda: forward(*operands, *arguments)

    leaves = {"dgrad": operands[:1], "wgrad": operands[1:2], "fwdbwd": operands}[case.direction]
    for leaf in leaves:
        leaf.requires_grad_()
    if case.direction == "fwdbwd":
        def step() -> Any:
            y = forward(*operands, *arguments)
            return (y.detach(), *torch.autograd.grad(y, leaves, dy))
        return step
    y = forward(*operands, *arguments)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


# ---- onnxruntime and OpenVINO: one ONNX model --------------------------------------------------------------------

def _onnx_model(case: Case) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    row = case.row
    window = {"kernel_shape": row.kernel, "strides": row.stride, "pads": row.padding * 2}
    conv = {**window, "dilations": row.dilation, "group": row.groups}
    op, attributes = {
        "conv": ("Conv", conv),
        "conv_transpose": ("ConvTranspose", {**conv, "output_padding": row.output_padding}),
        "max_pool": ("MaxPool", {**window, "dilations": row.dilation}),
        "avg_pool": ("AveragePool", {**window, "count_include_pad": 1}),
        "global_avg_pool": ("GlobalAveragePool", {}),
    }[row.op]
    weights = {} if row.op in POOLS else {"w": case.w, "b": case.b}
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *weights], ["y"], **attributes)],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, row.x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, row.y_shape)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _onnxruntime(case: Case) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(_onnx_model(case), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", case.x)
    y = onnxruntime.OrtValue.ortvalue_from_numpy(case.y)
    binding.bind_ortvalue_output("y", y)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return y.numpy()  # a view
    return run


def _openvino(case: Case) -> Run:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model=_onnx_model(case)), "CPU", {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    })
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(case.x, shared_memory=True))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor().data  # a view
    return run


# ---- ncnn --------------------------------------------------------------------------------------------------------

def _ncnn_layer(row: Row) -> tuple[str, dict[int, int]]:
    """Type and parameters (by ncnn's numbers) of a 2D layer."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), (oh, ow) = (
        row.kernel, row.stride, row.padding, row.dilation, row.output_padding)
    if row.op in POOLS:
        pool = {1: kw, 11: kh, 2: sw, 12: sh, 3: pw, 13: ph, 14: pw, 15: ph, 5: 1}
        kind = {"max_pool": {0: 0}, "avg_pool": {0: 1, 6: 1}, "global_avg_pool": {0: 1, 4: 1}}[row.op]
        return "Pooling", pool | kind
    depthwise = "DepthWise" if row.groups > 1 else ""
    conv = {0: row.out_channels, 1: kw, 11: kh, 2: dw, 12: dh, 3: sw, 13: sh, 4: pw, 14: ph, 15: pw, 16: ph, 5: 1,
            6: math.prod(row.w_shape)}
    if row.groups > 1:
        conv[7] = row.groups
    if row.op == "conv_transpose":
        return "Deconvolution" + depthwise, conv | {18: ow, 19: oh}
    return "Convolution" + depthwise, conv


def _ncnn(case: Case) -> Run:
    row = case.row
    if row.ndim != 2 or row.batch != 1 or (row.op == "conv_transpose" and row.groups > 1):
        raise Unsupported("run here for one 2D image only")
    import ncnn

    net = ncnn.Net()
    options = net.opt
    options.num_threads = case.threads
    options.use_vulkan_compute = False
    options.use_winograd_convolution = options.use_sgemm_convolution = options.use_packing_layout = True
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage"):
        setattr(options, name, False)
    for name, allocator in (("blob", ncnn.UnlockedPoolAllocator()), ("workspace", ncnn.PoolAllocator())):
        setattr(options, f"{name}_allocator", allocator)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(allocator))  # kept for ever: Mats must not outlive it

    kind, parameters = _ncnn_layer(row)
    numbers = " ".join(f"{key}={value}" for key, value in sorted(parameters.items()))
    net.load_param_mem(f"7767517\n2 2\nInput x 0 1 x\n{kind} y 1 1 x y {numbers}\n")
    w = case.w.swapaxes(0, 1) if row.op == "conv_transpose" else case.w
    weights = b"" if row.op in POOLS else bytes(4) + w.tobytes() + case.b.tobytes()  # four zeros: float32 follows
    net.load_model_mem(weights)
    x = ncnn.Mat(case.x[0]).clone()  # with planes aligned as ncnn likes them

    def run(keep: Any = weights) -> Any:  # net refers to the bytes
        extractor = net.create_extractor()
        extractor.input("x", x)
        return extractor.extract("y")[1]
    return run


@dataclass(frozen=True)
class Peer:
    """How to run a peer.

    Attributes
    ----------
    package
        What pip installs.
    prepare
        Makes the function that runs a case.
    order
        Memory order of the case that it takes.
    cap
        Environment variable that caps its instruction set, if there is one.
    """

    package: str
    prepare: Callable[[Case], Run]
    order: str = "contiguous"
    gradients: bool = True
    cap: str | None = None

    def make(self, case: Case) -> Run:
        """Return what runs the case; raise Unsupported, or ImportError if the peer is not installed."""
        if case.direction != "fwd" and not self.gradients:
            raise Unsupported("no gradients")
        return self.prepare(case)


PEERS = {
    "fastconv": Peer("fastconv", _fastconv, cap="FASTCONV_CPU"),
    "fastconv_cl": Peer("fastconv", _fastconv, "channels_last", cap="FASTCONV_CPU"),
    "torch": Peer("torch", _torch, cap="ONEDNN_MAX_CPU_ISA"),
    "torch_cl": Peer("torch", _torch, "channels_last", cap="ONEDNN_MAX_CPU_ISA"),
    "onnxruntime": Peer("onnxruntime", _onnxruntime, gradients=False),
    "openvino": Peer("openvino", _openvino, gradients=False, cap="ONEDNN_MAX_CPU_ISA"),
    "ncnn": Peer("ncnn", _ncnn, gradients=False),
    "numpy": Peer("fastconv", _numpy),
}


def versions(names: Sequence[str]) -> dict[str, str | None]:
    """Version of each peer's package; None if it cannot be imported."""
    found: dict[str, str | None] = {}
    for package in dict.fromkeys(["numpy", *(PEERS[name].package for name in names)]):
        try:
            found[package] = str(importlib.import_module(package).__version__)
        except ImportError:
            found[package] = None
    return found
