"""PyTorch's own samples and error inputs for every operation that we share with it.

``op_db`` lists for each operation the calls that PyTorch tests it with. Every float32 and float64
one must give the same results and gradients here, and every call that is wrong there must raise.
"""

import inspect
import warnings

import numpy as np
import pytest
from tolerance import assert_close, rms

from fastconv import functional

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations", exc_type=ImportError).op_db

NAMES = [
    *(
        f"{kind}{ndim}d"
        for kind in (
            "conv",
            "conv_transpose",
            "max_pool",
            "avg_pool",
            "adaptive_avg_pool",
            "adaptive_max_pool",
            "max_unpool",
        )
        for ndim in (1, 2, 3)
    ),
    "batch_norm",
    "local_response_norm",
]
OPS = {
    op.full_name.removeprefix("nn.functional."): op for op in op_db if op.name.removeprefix("nn.functional.") in NAMES
}

# Calls that PyTorch refuses and fastconv serves, on purpose: (name, what PyTorch says).
SERVED_HERE = {
    # "same" is SAME_UPPER of ONNX, which says what a stride means
    ("conv3d", "padding='same' is not supported for strided convolutions"),
}


def test_every_operation_is_there():
    assert {name.split(".")[0] for name in OPS} == set(NAMES)


# --------------------------------------------------------------------------------------------------
# Gradients: for each operation, a function of its arguments by name, its results and dy
# --------------------------------------------------------------------------------------------------


def conv_grads(a, _, dy):
    rest = [a[key] for key in ("stride", "padding", "dilation", "groups")]
    yield "input", functional.conv_input_grad(a["input"].shape, a["weight"], dy, *rest)
    yield "weight", functional.conv_weight_grad(a["input"], a["weight"].shape, dy, *rest)
    yield "bias", functional.conv_bias_grad(dy, batched=dy.ndim == a["weight"].ndim)


def conv_transpose_grads(a, _, dy):
    rest = [a[key] for key in ("stride", "padding", "output_padding", "groups", "dilation")]
    yield "input", functional.conv_transpose_input_grad(dy, a["weight"], *rest)
    yield (
        "weight",
        functional.conv_transpose_weight_grad(a["input"], a["weight"].shape, dy, *rest),
    )
    yield "bias", functional.conv_bias_grad(dy, batched=dy.ndim == a["weight"].ndim)


def max_pool_grads(a, ndim, dy):
    pool = functional.adaptive_max_pool if "output_size" in a else functional.max_pool
    _, indices = pool(**{**a, "return_indices": True}, ndim=ndim)
    yield "input", functional.max_pool_grad(dy, indices, a["input"].shape, ndim=ndim)


def avg_pool_grads(a, ndim, dy):
    keys = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    rest = [a[key] for key in (*keys, "divisor_override")]
    yield "input", functional.avg_pool_grad(dy, a["input"].shape, *rest, ndim=ndim)


def adaptive_avg_pool_grads(a, ndim, dy):
    yield "input", functional.adaptive_avg_pool_grad(dy, a["input"].shape, ndim=ndim)


def max_unpool_grads(a, ndim, dy):
    yield "input", functional.max_unpool_grad(dy, a["indices"], ndim=ndim)


def batch_norm_grads(a, _, dy):
    keys = ("input", "running_mean", "running_var", "weight", "training", "eps")
    grads = functional.batch_norm_grad(dy, *[a[key] for key in keys])
    yield from zip(("input", "weight", "bias"), grads, strict=True)


def batch_norm_terms(a, dy):
    """Return the size of the three terms of dx, which cancel if there are few values."""
    x = a["input"]
    if not a["training"] or not x.size:
        return 0.0
    deviation = np.sqrt(x.var((0, *range(2, x.ndim))) + a["eps"])
    weight = 1 if a["weight"] is None else np.abs(a["weight"])
    return rms(dy) * float(np.max(weight / deviation))


def local_response_norm_grads(a, _, dy):
    keys = ("input", "size", "alpha", "beta", "k")
    yield "input", functional.local_response_norm_grad(dy, *[a[key] for key in keys])


GRADS = {
    "conv": conv_grads,
    "conv_transpose": conv_transpose_grads,
    "max_pool": max_pool_grads,
    "adaptive_max_pool": max_pool_grads,
    "avg_pool": avg_pool_grads,
    "adaptive_avg_pool": adaptive_avg_pool_grads,
    "max_unpool": max_unpool_grads,
    "batch_norm": batch_norm_grads,
    "local_response_norm": local_response_norm_grads,
}


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


def ours(tensor, dtype):
    """Return a tensor as an array of its own, other arguments as they are."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    array = tensor.detach().numpy()
    return array.astype(dtype if array.dtype.kind == "f" else array.dtype)


def theirs(tensor):
    """Return a tensor as a float64 leaf of its own: PyTorch's result is then exact for our dtype."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    wants_grad = tensor.requires_grad
    copy = tensor.detach().clone()
    return copy.double().requires_grad_(wants_grad) if copy.is_floating_point() else copy


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPS)
def test_samples_agree(name, dtype, ran):
    op, base = OPS[name], name.split(".")[0]
    function = getattr(functional, base)
    if getattr(torch, dtype) not in op.dtypes:
        assert name == "batch_norm.without_cudnn"  # the same samples, for CUDA alone
        return
    kind, ndim = (base[:-2], int(base[-2])) if base[-2:] in ("1d", "2d", "3d") else (base, None)
    samples = list(op.sample_inputs("cpu", getattr(torch, dtype), requires_grad=True))
    assert samples
    for sample in samples:
        try:
            check_sample(op, function, GRADS[kind], ndim, sample, dtype)
        except Exception as error:
            error.add_note(described(sample))
            raise
        ran("PyTorch's samples that agree, forward and backward", f"{dtype} {name}")


def check_sample(op, function, grads, ndim, sample, dtype):
    call = [theirs(tensor) for tensor in (sample.input, *sample.args)]
    options = {key: theirs(value) for key, value in sample.kwargs.items()}
    our_call = [ours(tensor, dtype) for tensor in (sample.input, *sample.args)]
    our_options = {key: ours(value, dtype) for key, value in sample.kwargs.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # padding="same" copies
        expected = op(*call, **options)
    actual = function(*our_call, **our_options)
    both = zip(as_tuple(expected), as_tuple(actual), strict=True)
    n = max(array.size for array in our_call if isinstance(array, np.ndarray))
    for right, result in both:
        assert isinstance(result, np.ndarray)
        assert_close(result, right.detach().numpy(), n, dtype=dtype)
    # running statistics
    for tensor, array in zip(call, our_call, strict=True):
        if isinstance(array, np.ndarray):
            assert_close(array, tensor.detach().numpy(), n, dtype=dtype)

    arguments = inspect.signature(function).bind(*our_call, **our_options)
    arguments.apply_defaults()
    named = dict(arguments.arguments)
    y = as_tuple(expected)[0]
    leaves = dict(zip(inspect.signature(function).parameters, call, strict=False))
    leaves = {
        key: value
        for key, value in {**leaves, **options}.items()
        if isinstance(value, torch.Tensor) and value.requires_grad
    }
    dy = np.random.default_rng(0).standard_normal(y.shape).astype(dtype)
    right = torch.autograd.grad(y, list(leaves.values()), torch.from_numpy(dy).double())
    results = dict(grads(named, ndim, dy))
    cancels = batch_norm_terms(named, dy) if grads is batch_norm_grads else 0.0
    for key, exact in zip(leaves, right, strict=True):
        magnitude = cancels if key == "input" else 0.0
        assert_close(results[key], exact.numpy(), n, dtype=dtype, magnitude=magnitude)


def described(sample):
    def of(value):
        return tuple(value.shape) if isinstance(value, torch.Tensor) else value

    args = [of(value) for value in (sample.input, *sample.args)]
    return f"sample {args}, { {key: of(value) for key, value in sample.kwargs.items()} }"


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.error_inputs_func])
def test_error_inputs_raise(name, ran):
    function = getattr(functional, name.split(".")[0])
    errors = list(OPS[name].error_inputs("cpu"))
    assert errors
    for error in errors:
        sample = error.sample_input
        arguments = [sample.input, *sample.args]
        if (name, error.error_regex) in SERVED_HERE:
            ran("PyTorch's error inputs that fastconv serves", f"{name}: {error.error_regex}")
            continue
        try:
            function(*map(detached, arguments), **{k: detached(v) for k, v in sample.kwargs.items()})
        except (ValueError, TypeError) as raised:
            assert "Hint: " in str(raised)
            ran("PyTorch's error inputs that raise", name)
        else:
            pytest.fail(f"serves {described(sample)}: PyTorch says {error.error_regex!r}")


def detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value
