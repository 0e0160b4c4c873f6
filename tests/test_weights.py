"""Weights of other libraries: their names, their files, hostile files, and what a report says."""

import functools
import json
import math
import os
import struct
import sys
from collections import OrderedDict

import numpy as np
import pytest
from tolerance import assert_close

from fastconv import models, nn
from fastconv.gradient_check import gradcheck
from fastconv.nn.names import renamed
from fastconv.serialize import load_arrays, save_arrays

COUNTS = {10: ((1, 1, 1, 1), (3, 3)), 18: ((2, 2, 2, 2), (3, 3)), 34: ((3, 4, 6, 3), (3, 3)),
          50: ((3, 4, 6, 3), (1, 3, 1))}
CHANNELS = (4, 8, 16, 32)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def randomised(net):
    """PyTorch's network in double precision with weights that keep values at size one, and no zeros or ones."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, value in net.double().eval().state_dict().items():
        if value.ndim > 1:
            value.normal_(0, math.sqrt(2 / value[0].numel()), generator=generator)
        elif value.is_floating_point():
            low = 0.5 if name.endswith(("weight", "var")) else -0.5
            value.uniform_(low, low + 1, generator=generator)
    return net


def check_equal(ours, theirs, in_channels, size=(33, 20, 32), prefix=""):
    state = {prefix + name: value for name, value in randomised(theirs).state_dict().items()}
    assert not any(ours.load_state_dict(state))
    import torch

    x = np.random.default_rng(0).standard_normal((2, in_channels, *size))
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    # a sum of 34 layers of at most 900 products
    assert_close(ours(x), expected, 34**2 * 900)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", COUNTS)
def test_monai_resnet_by_name(depth, torch):
    import torch_nets

    ours = models.resnet(depth, 2, 5, variant="monai", ndim=3, width=1 / 16, dtype=np.float64)
    check_equal(ours, torch_nets.monai_resnet(*COUNTS[depth], CHANNELS, 2, 5), 2, size=(17, 10, 16))


@pytest.mark.parametrize("depth", COUNTS)
def test_medicalnet_by_name(depth, torch):
    """Without the linear layer, which its files lack, and with the prefix that they have."""
    import torch_nets

    padding = depth in (18, 34)
    theirs = torch_nets.monai_resnet(*COUNTS[depth], CHANNELS, 1, None, stride=2, bias=False, padding=padding)
    ours = models.resnet(depth, 1, 2, variant="medicalnet", ndim=3, width=1 / 16, dtype=np.float64)
    check_equal(ours[:-1], theirs, 1, prefix="module.")


def test_monai_densenet_by_name(torch):
    import torch_nets

    theirs = torch_nets.DenseNet((6, 12, 24, 16), 4, 8, 1, 3, 3, monai=True)
    assert "features.denseblock1.denselayer1.layers.norm1.weight" in theirs.state_dict()
    assert "class_layers.out.weight" in theirs.state_dict()
    check_equal(models.densenet121(in_channels=1, num_classes=3, ndim=3, width=1 / 8, dtype=np.float64), theirs, 1,
                size=(33, 40, 48))


def test_torchvisions_old_densenet_files(torch):
    """Their names have a dot that the code lost, and there are no counters of batches."""
    import torch_nets

    theirs = torch_nets.DenseNet((6, 12, 24, 16), 4, 8, 1, 3, 2)
    state = {name.replace(".norm1.", ".norm.1.").replace(".norm2.", ".norm.2.").replace(".conv1.", ".conv.1.")
             .replace(".conv2.", ".conv.2."): value for name, value in theirs.state_dict().items()
             if "num_batches" not in name}
    assert "features.denseblock2.denselayer1.conv.2.weight" in state
    ours = models.densenet121(in_channels=1, num_classes=3, width=1 / 8)
    assert not any(ours.load_state_dict(state))
    for name, value in theirs.state_dict().items():
        if "num_batches" not in name:
            np.testing.assert_array_equal(ours.state_dict()[name], value.numpy())


def test_names_that_fit_are_left_alone():
    assert renamed({"module.a": 1, "b": 2}, {"module.a", "b"}) == {"module.a": 1, "b": 2}
    assert renamed({"module.a": 1, "a": 2}, {"a"}) == {"module.a": 1, "a": 2}
    assert renamed({"module.a": 1, "model.a": 2}, {"a"}) == {"a": 1, "model.a": 2}
    assert renamed({"module.c": 1}, {"a"}) == {"module.c": 1}


def test_counters_may_be_missing_and_are_kept():
    net = nn.BatchNorm1d(2)
    net.forward(np.ones((3, 2), np.float32))
    state = {name: value + 1 for name, value in net.state_dict().items() if name != "num_batches_tracked"}
    assert not any(net.load_state_dict(state))
    assert net.state_dict()["num_batches_tracked"] == 1
    np.testing.assert_array_equal(net.weight.value, state["weight"])
    del state["running_mean"]
    with pytest.raises(ValueError, match=r"missing \(1\): running_mean$"):
        net.load_state_dict(state)


def test_report_in_words():
    net, other = (models.resnet18(in_channels=1, num_classes=n, width=1 / 16, rng=0) for n in (2, 10))
    report = net.load_state_dict({**other.state_dict(), "extra.weight": np.ones(1)}, strict=False)
    assert str(report) == (
        "unexpected (1): extra.weight\n"
        "mismatched (2): fc.weight has shape (10, 32) and dtype float32, but (2, 32) and float32 are needed; "
        "fc.bias has shape (10,) and dtype float32, but (2,) and float32 are needed")
    assert str(net.load_state_dict(net.state_dict())) == "everything fits"


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_padded_shortcut(ndim):
    x = np.random.default_rng(0).standard_normal((2, 3, *(5, 4, 6)[:ndim]))
    layer = nn.blocks.PaddedShortcut(5, 2)
    y = layer(x)
    for index in np.ndindex(*y.shape):
        n, c, *position = index
        assert y[index] == (x[(n, c, *(2 * i for i in position))] if c < 3 else 0)
    gradcheck(layer, x)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: models.resnet18(variant="keras"),
     "variant is 'keras', but one of 'paper', 'torchvision', 'monai', 'medicalnet'"),
    (lambda: nn.blocks.basic_block(2, 2, shortcut="none"), "shortcut is 'none', but one of 'projection'"),
    (lambda: nn.blocks.PaddedShortcut(2, 1)(np.zeros((1, 3, 4), np.float32)), "input has 3 channels, but at most"),
])
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- files ---------------------------------------------------------------------------------------------------------

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(7, np.int64), "c": np.zeros((0, 4), np.float64),
    "half": np.array([1.5, -2], np.float16), "flags": np.array([[True, False]]), "small": np.array([3, 255], np.uint8),
    **{f"{kind}{size}": np.array([1, 2, 3], f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)},
}


def test_files_agree_with_the_package(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    reader = pytest.importorskip("safetensors")
    save_arrays(tmp_path / "ours.safetensors", ARRAYS, {"note": "ä"})
    package.save_file(ARRAYS, tmp_path / "theirs.safetensors", {"note": "ä"})
    with reader.safe_open(tmp_path / "ours.safetensors", "np") as file:
        assert file.metadata() == {"note": "ä"}
    for arrays in (package.load_file(tmp_path / "ours.safetensors"), load_arrays(tmp_path / "theirs.safetensors"),
                   load_arrays(tmp_path / "ours.safetensors")):
        assert arrays.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], array)
            assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
            assert arrays[name].flags.writeable


def test_bfloat16_files(tmp_path, torch):
    safetensors = pytest.importorskip("safetensors.torch")
    value = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    value[0, 0], value[0, 1] = math.inf, math.nan
    safetensors.save_file({"x": value}, tmp_path / "x.safetensors")
    torch.save({"x": value}, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        x = load_arrays(tmp_path / name)["x"]
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, value.float().numpy())


def test_byte_order_of_the_file_is_little_endian(tmp_path):
    save_arrays(tmp_path / "x.safetensors", {"x": np.array([1, 2], ">i4")})
    assert (tmp_path / "x.safetensors").read_bytes().endswith(b"\1\0\0\0\2\0\0\0")
    assert load_arrays(tmp_path / "x.safetensors")["x"].dtype.isnative


@pytest.mark.parametrize(("arrays", "message"), [
    ({"x": np.ones(2, complex)}, "x has dtype complex128"),
    ({"x": np.array([None])}, "x has dtype object"),
    ({1: np.ones(2)}, "must be strings"),
    ({"__metadata__": np.ones(2)}, "no array is called '__metadata__'"),
])
def test_what_files_cannot_hold(arrays, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        save_arrays(tmp_path / "x.safetensors", arrays)
    assert os.listdir(tmp_path) == []


def one(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def packed(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = one()["x"]
HOSTILE = {
    "empty": (b"", "the file has 0"),
    "only a length": (struct.pack("<Q", 0), "Expecting value"),
    "header longer than the file": (struct.pack("<Q", 2**63) + b"{}", "header would have 9223372036854775808 bytes"),
    "no JSON": (packed(b"{]"), "Expecting property name"),
    "no UTF-8": (packed(b'{"\xff": 1}'), "utf-8"),
    "a list": (packed(b"[]", b""), "no mapping of names"),
    "nested without end": (packed(b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "recursion"),
    "a number of a million digits": (packed(b'{"x": ' + b"9" * 1_000_000 + b"}"), "digits"),
    "name twice": (packed(b'{"x": %s, "x": %s}' % ((json.dumps(GOOD).encode(),) * 2)), "twice"),
    "entry that is no mapping": (packed({"x": 5}), "x lacks dtype"),
    "entry without shape": (packed({"x": {"dtype": "F32", "data_offsets": [0, 8]}}), "x lacks dtype, shape"),
    "unknown dtype": (packed(one("F8_E4M3", (8,))), "dtype 'F8_E4M3'"),
    "dtype that is no text": (packed(one(["F32"])), r"dtype \['F32'\]"),
    "negative size": (packed(one(shape=(-2,))), "no lists of sizes"),
    "fractional size": (packed(one(shape=(2.0,))), "no lists of sizes"),
    "true as a size": (packed(one(shape=(True, 2))), "no lists of sizes"),
    "huge size": (packed(one(shape=(2**62, 0, 2**62), offsets=(0, 0)), b""), "maximum|Maximum|too big|cannot reshape"),
    "size of 80 bits": (packed(one(shape=(2**80,))), "no lists of sizes"),
    "65 axes": (packed(one(shape=(1,) * 64 + (2,))), "no lists of sizes"),
    "three offsets": (packed(one(offsets=(0, 4, 8))), "no lists of sizes"),
    "fewer bytes than the shape": (packed(one(offsets=(0, 4)), b"\0" * 4), r"4 bytes, but shape \(2,\) of F32 takes 8"),
    "offsets backwards": (packed(one(shape=(0,), offsets=(8, 0))), "-8 bytes"),
    "behind the end": (packed(one(), b"\0" * 4), "its arrays have 8 bytes, but 4 follow"),
    "more than memory": (packed(one(shape=(2**50,), offsets=(0, 2**52))), "its arrays have 4503599627370496 bytes"),
    "bytes that nobody names": (packed(one(), b"\0" * 9), "8 bytes, but 9 follow"),
    "a gap": (packed(one(offsets=(4, 12)), b"\0" * 12), "x starts at byte 4, but the data before end at 0"),
    "overlap": (packed({"x": GOOD, "y": {**GOOD, "data_offsets": [4, 12]}}, b"\0" * 12), "starts at byte 4"),
    "a pickle with another header": (b"\x80\2c" + b"os\nsystem\n" * 3, "weights of PyTorch"),
    "a zip file that is none": (b"PK\3\4" + b"\0" * 40, "weights of PyTorch"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case, tmp_path):
    content, message = HOSTILE[case]
    if "PyTorch" in message:
        pytest.importorskip("torch")
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"load: .*bad\.safetensors cannot be read as (?s:.*)({message})"):
        load_arrays(path)


def test_damaged_files_never_crash(tmp_path):
    """Every byte of a header changed in turn: what is read then still fits the file."""
    path = tmp_path / "x.safetensors"
    save_arrays(path, {"x": np.arange(4, dtype=np.float32), "y": np.ones((2, 3), np.int16)})
    content = bytearray(path.read_bytes())
    rng, failed = np.random.default_rng(0), 0
    for position in range(len(content) - 28):
        damaged = bytearray(content)
        damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert sum(a.nbytes for a in load_arrays(path).values()) <= 2 * 28
        except ValueError:
            failed += 1
    assert failed > 100
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="its arrays have 28 bytes, but 27 follow"):
        load_arrays(path)


def small():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
    lambda state: {"model": OrderedDict(state), "optimizer": {}},
], ids=["state", "MedicalNet", "checkpoint"])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_pytorch_files(wrap, options, tmp_path, torch):
    theirs = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    torch.save(wrap(theirs.state_dict()), tmp_path / "weights.pth", **options)
    ours = small()
    assert not any(ours.load(tmp_path / "weights.pth"))
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(ours.state_dict()[name], value.numpy())


class Evil:
    def __reduce__(self):
        return exec, ("import sys; sys.evil = True",)


def test_pytorch_files_run_no_code(tmp_path, torch):
    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read as weights of PyTorch"):
        load_arrays(tmp_path / "evil.pth")
    assert not hasattr(sys, "evil")


def test_pytorch_files_without_a_state(tmp_path, torch):
    torch.save({"x": 5}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds a dict, but a state_dict is needed"):
        load_arrays(tmp_path / "x.pth")


def test_missing_pytorch_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.pth").write_bytes(b"PK\3\4" + b"\0" * 40)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r'pip install "fastconv\[torch\]"'):
        load_arrays(tmp_path / "x.pth")


def test_states_of_other_networks_are_refused_with_every_name():
    net = models.resnet18(in_channels=1, num_classes=2, width=1 / 16)
    with pytest.raises(ValueError) as error:
        net.load_state_dict(functools.partial(models.densenet121, in_channels=1, width=1 / 16)().state_dict())
    text = str(error.value)
    assert "layer4.1.bn2.running_var" in text
    assert "features.denseblock4.denselayer16.conv2.weight" in text
    assert "does not fit Sequential. Hint: strict=False" in text
