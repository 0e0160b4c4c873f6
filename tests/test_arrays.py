"""Adoption of foreign arrays without a copy, memory orders, and outputs of the caller."""

import array
import ctypes

import numpy as np
import pytest

from fastconv.arrays import (
    as_array,
    as_indices,
    check_out,
    dense_strides,
    empty,
    memory_order,
    to_channels_last,
    to_contiguous,
)


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


# ---- Adoption ---------------------------------------------------------------------------------------------------


def test_ndarrays_are_taken_as_they_are() -> None:
    base = np.arange(48, dtype=np.float64).reshape(2, 4, 6)
    for x in (base, base[:, ::-2], base.T, np.broadcast_to(base, (3, 2, 4, 6)), base[:0], np.float32(base)):
        assert as_array(x, "x") is x


def test_subclasses_lose_only_their_class(tmp_path) -> None:
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(3, 4))
    x = as_array(mapped, "x")
    assert type(x) is np.ndarray
    assert address(x) == address(mapped)


def test_buffers_are_shared() -> None:
    for owner in (array.array("f", [1, 2, 3]), memoryview(np.ones(3, np.float32)), (ctypes.c_float * 3)(1, 2, 3)):
        x = as_array(owner, "x")
        assert x.dtype == np.float32
        x[1] = 7
        assert memoryview(owner).cast("B").cast("f")[1] == 7


def test_array_interface_is_shared() -> None:
    class Owner:
        def __init__(self, x: np.ndarray) -> None:
            self.x = x
            self.__array_interface__ = x.__array_interface__

    owner = Owner(np.ones((2, 3)))
    assert address(as_array(owner, "x")) == address(owner.x)


def test_dlpack_is_shared() -> None:
    class Owner:
        """Knows DLPack alone."""

        def __init__(self, x: np.ndarray) -> None:
            self.x = x

        def __dlpack__(self, **options: object) -> object:
            return self.x.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.x.__dlpack_device__()

    owner = Owner(np.ones((2, 3))[:, ::2])
    x = as_array(owner, "x")
    assert address(x) == address(owner.x)
    assert x.strides == owner.x.strides


def test_torch_tensors_are_shared() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    x = as_array(tensor, "x")
    assert memory_order(x) == "channels_last"
    check_out(tensor, (2, 3, 4, 5), np.float32)[...] = 3
    assert float(tensor.sum()) == 3 * 2 * 3 * 4 * 5
    parameter = torch.nn.Parameter(tensor)
    with pytest.raises(TypeError, match=r"input.*requires a gradient.*input\.detach\(\)"):
        as_array(parameter, "input")
    as_array(parameter.detach(), "input")
    for wrong in (tensor.bfloat16(), tensor.half(), tensor.to_sparse(), tensor.to("meta")):
        with pytest.raises(TypeError, match="conv2d: input"):
            as_array(wrong, "input", "conv2d")


class OnGpu:
    """A tensor on an NVIDIA GPU, as DLPack presents it (device type 2)."""

    device = "cuda:0"

    def __dlpack__(self, **options: object) -> object:
        raise AssertionError("must not be asked for")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


class NoCopyWanted:
    """Converts itself to an array, which would copy."""

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        raise AssertionError("must not be asked for")


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        ([1.0, 2.0], r"list.*np\.asarray\(x, dtype=np\.float32\)"),
        (1.0, "float"),
        (None, "NoneType"),
        ("abc", "str"),
        (np.float32(1), r"numpy\.float32"),
        (NoCopyWanted(), "NoCopyWanted"),
        (OnGpu(), "device cuda:0.*host memory.*copy it to the CPU"),
        (np.ma.masked_array(np.ones(3), [0, 1, 0]), r"masked array.*filled"),
        (np.ones(3, np.float16), r"float16.*astype\(np\.float32\)"),
        (np.ones(3, np.longdouble), "float32 or float64"),
        (np.ones(3, np.int32), "int32"),
        (np.ones(3, bool), "bool"),
        (np.ones(3, np.complex64), r"complex.*x\.real"),
        (np.ones(3, object), "object"),
        (np.ones(3, ">f4"), r"byte order.*newbyteorder"),
        (np.ones(3, [("a", "f4")]), "float32 or float64"),
        (b"12345678", "uint8"),
    ],
)
def test_nothing_is_converted_in_silence(value: object, pattern: str) -> None:
    with pytest.raises(TypeError, match=f"conv2d: x .*{pattern}"):
        as_array(value, "x", "conv2d")


def test_misaligned_data_are_refused() -> None:
    raw = np.zeros(25, np.uint8)
    shifted = raw[1:].view(np.float32)
    assert not shifted.flags.aligned
    packed = np.zeros(3, [("a", "i1"), ("b", "f4")])["b"]
    for x in (shifted, packed):
        with pytest.raises(ValueError, match=r"aligned.*np\.ascontiguousarray"):
            as_array(x, "x")


def test_indices() -> None:
    x = np.arange(6)
    assert as_indices(x, "indices") is x
    for wrong in (np.arange(6, dtype=np.int32), np.arange(6.0), np.arange(6, dtype=">i8")):
        with pytest.raises(TypeError, match=r"indices.*int64.*astype\(np\.int64\)"):
            as_indices(wrong, "indices")


# ---- Memory order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_memory_order(shape: tuple[int, ...]) -> None:
    x = np.zeros(shape)
    last = to_channels_last(x)
    assert memory_order(x) == "contiguous"
    assert memory_order(last) == "channels_last"
    # A channel slice, a crop and a mirror image keep the order.
    for view in (last[:, 1:], last[..., 1:-1], last[..., ::-1], last[:, ::-1], last[1:]):
        assert memory_order(view) == "channels_last"
    for view in (x[:, 1:], x[..., 1:-1], x[..., ::-1], x[:1], last[:, :1], np.broadcast_to(np.zeros(()), shape)):
        assert memory_order(view) == "contiguous"
    # One pixel, or one channel: both orders are the same memory, and it is called contiguous.
    assert memory_order(to_channels_last(np.zeros((2, 3, *(1,) * (len(shape) - 2))))) == "contiguous"
    assert memory_order(to_channels_last(np.zeros((2, 1, *shape[2:])))) == "contiguous"


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 6), (1, 2, 1, 7)])
def test_empty(shape: tuple[int, ...], order: str) -> None:
    x = empty(shape, np.float32, order)
    assert x.shape == shape
    assert memory_order(x) == order
    assert x.strides == tuple(4 * s for s in dense_strides(shape, order))
    assert x.flags.writeable


def test_conversion_copies_only_if_needed() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    last = to_channels_last(x)
    assert last.shape == x.shape
    assert last.strides == (480, 8, 120, 24)
    np.testing.assert_array_equal(last, x)
    assert to_channels_last(last) is last
    assert to_contiguous(x) is x
    assert to_contiguous(last).strides == x.strides
    sliced = last[:, 1:]
    assert to_channels_last(sliced).strides == (320, 8, 80, 16)
    with pytest.raises(ValueError, match=r"\(N, C, \*spatial\)"):
        to_channels_last(x[0, 0])
    with pytest.raises(TypeError, match=r"to_contiguous: x.*int64"):
        to_contiguous(np.arange(3))


# ---- Outputs ----------------------------------------------------------------------------------------------------


def test_outputs_may_be_any_view() -> None:
    buffer = np.zeros((2, 8, 4, 5), np.float32)
    shape = (2, 4, 4, 5)
    # Dense and inception blocks write beside what they read.
    for out, x in ((buffer[:, 4:], buffer[:, :4]), (buffer[:, ::2], buffer[:, 1::2]),
                   (buffer[:, 3::-1], buffer[:, 4:]), (to_channels_last(buffer)[:, :4], buffer)):
        assert check_out(out, shape, np.float32, inputs=[x]) is out
    check_out(np.zeros((0, 4, 4, 5), np.float32), (0, 4, 4, 5), np.float32)


def overlapping(shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(np.zeros(1000, np.float32), shape, strides)


READ_ONLY = np.zeros((2, 3, 4), np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("out", "error", "pattern"),
    [
        (np.zeros((2, 3, 5), np.float32), ValueError, r"shape \(2, 3, 5\).*\(2, 3, 4\).*np\.empty"),
        (np.zeros((2, 3, 4)), TypeError, "float64.*float32"),
        (np.zeros((2, 3, 4), np.int32), TypeError, "int32"),
        ([0.0], TypeError, "list"),
        (READ_ONLY, ValueError, "read-only"),
        (overlapping((2, 3, 4), (0, 16, 4)), ValueError, "share memory"),
        (overlapping((2, 3, 4), (48, 8, 4)), ValueError, "share memory"),
    ],
)
def test_bad_outputs(out: object, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=f"conv1d: out .*{pattern}"):
        check_out(out, (2, 3, 4), np.float32, "out", "conv1d")


def test_outputs_may_not_be_inputs() -> None:
    buffer = np.zeros((2, 8, 4, 5), np.float32)
    for out, x in ((buffer[:, :4], buffer[:, 3:7]), (buffer[:, :4], buffer), (buffer[:, :4], buffer[:, :4]),
                   (buffer[:, ::2], buffer[:, ::-3]), (buffer[:, :4], np.broadcast_to(buffer[:, :1], (2, 9, 4, 5)))):
        with pytest.raises(ValueError, match="shares memory with an input"):
            check_out(out, out.shape, np.float32, inputs=[np.zeros(3, np.float32), x])
