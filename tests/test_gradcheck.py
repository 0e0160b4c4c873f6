"""gradcheck finds wrong gradients, and every layer of fastconv passes it, in float64 and in both memory orders."""

import copy
import inspect

import numpy as np
import pytest

from fastconv import nn
from fastconv.arrays import memory_order, to_channels_last
from fastconv.gradient_check import GradcheckError, gradcheck
from fastconv.models.lenet import RBFOutput, ScaledTanh, SparseConv, Subsampling, lenet5

F64 = {"dtype": np.float64, "rng": 0}
SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}


def normal(*shape):
    return np.random.default_rng(1).standard_normal(shape)


def distinct(*shape):
    """Values at least 0.05 apart from each other and from zero, so that no difference quotient crosses a kink."""
    values = (np.random.default_rng(2).permutation(int(np.prod(shape))) + 0.5) * 0.05
    return (values - values.mean() + 0.0125).reshape(shape)


def positive(*shape):
    return np.random.default_rng(3).uniform(0.5, 2, shape)


def trained_batch_norm(layer):
    """The layer with parameters and running statistics that are not ones and zeros."""
    rng = np.random.default_rng(4)
    for _, item in [*layer.named_parameters(), *layer.named_buffers()]:
        if item.dtype == np.float64:
            item.assign(rng.uniform(0.5, 2, item.shape))
    return layer


def cases_by_ndim(ndim):
    """Name of the class without the number of axes -> list of (layer, input)."""
    size = SIZES[ndim]
    images = normal(2, 4, *size)

    def make(name):
        return getattr(nn, f"{name}{ndim}d")

    conv, transpose, max_pool, avg_pool = make("Conv"), make("ConvTranspose"), make("MaxPool"), make("AvgPool")
    indices_of = max_pool(2, return_indices=True)
    pairs = ((1, 0),) * ndim
    return {
        "Conv": [
            (conv(4, 6, 3, padding=1, groups=2, **F64), images),
            (conv(4, 2, 2, stride=2, dilation=2, padding=pairs, bias=False, **F64), images),
            (conv(4, 3, 3, padding="same", padding_mode="reflect", **F64), images),
            (conv(4, 3, 3, padding=1, padding_mode="circular", **F64), images),
            (conv(4, 3, 3, stride=2, padding="same", padding_mode="replicate", **F64), images),
            (conv(4, 1, 1, **F64), images),
            (conv(4, 3, 3, padding=1, **F64), images[0]),
        ],
        "ConvTranspose": [
            (transpose(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, **F64), images),
            (transpose(4, 2, 2, dilation=2, bias=False, **F64), images),
            (transpose(4, 2, 2, **F64), images[0]),
        ],
        "MaxPool": [
            (max_pool(2), distinct(2, 3, *size)),
            (max_pool(3, stride=2, padding=1, ceil_mode=True), distinct(2, 3, *size)),
            (max_pool(2, stride=1, dilation=2), distinct(2, 3, *size)),
            (max_pool(2, return_indices=True), distinct(2, 3, *size)),
            (max_pool(2), distinct(3, *size)),
        ],
        "AvgPool": [
            (avg_pool(2), images),
            (avg_pool(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False), images),
            (avg_pool(2, stride=1, dilation=2), images),
            (avg_pool(2, divisor_override=3), images[0]),
        ],
        "LPPool": [(make("LPPool")(2, 2), positive(2, 3, *size)),
                   (make("LPPool")(3, 3, stride=2), positive(2, 3, *size))],
        "AdaptiveAvgPool": [(make("AdaptiveAvgPool")(3), images), (make("AdaptiveAvgPool")(1), images[0])],
        "AdaptiveMaxPool": [(make("AdaptiveMaxPool")(3), distinct(2, 3, *size)),
                            (make("AdaptiveMaxPool")((None,) * ndim), distinct(2, 3, *size))],
        "MaxUnpool": [(make("MaxUnpool")(2), indices_of(distinct(2, 3, *size)))],
        "BatchNorm": [
            (trained_batch_norm(make("BatchNorm")(4, dtype=np.float64)), images),
            (trained_batch_norm(make("BatchNorm")(4, frozen=True, dtype=np.float64)), images),
            (make("BatchNorm")(4, affine=False, track_running_stats=False, dtype=np.float64), images),
        ],
        "Dropout": [(make("Dropout")(0.4, rng=5), images), (make("Dropout")(1.0, rng=5), images)],
    }


def small_net(rng=0):
    options = {"dtype": np.float64, "rng": rng}
    return nn.Sequential(nn.Conv2d(4, 3, 3, padding=1, **options), nn.BatchNorm2d(3, dtype=np.float64), nn.Tanh())


def other_cases():
    images = normal(2, 4, 5, 6)
    conv = nn.Conv2d(4, 4, 3, padding=1, **F64)
    return {
        "Linear": [(nn.Linear(5, 3, **F64), normal(4, 5)), (nn.Linear(5, 3, bias=False, **F64), normal(2, 3, 5)),
                   (nn.Linear(5, 3, **F64), normal(5))],
        "ReLU": [(nn.ReLU(), distinct(3, 4))],
        "LeakyReLU": [(nn.LeakyReLU(0.2), distinct(3, 4))],
        # spread over the corners at 0, 3 and 6
        "ReLU6": [(nn.ReLU6(), 25 * distinct(3, 4))],
        "ELU": [(nn.ELU(0.7), distinct(3, 4))],
        "SiLU": [(nn.SiLU(), 2 * normal(3, 4))],
        "GELU": [(nn.GELU(), 2 * normal(3, 4)), (nn.GELU("tanh"), 2 * normal(3, 4))],
        "Hardsigmoid": [(nn.Hardsigmoid(), 25 * distinct(3, 4))],
        "Hardswish": [(nn.Hardswish(), 25 * distinct(3, 4))],
        "Sigmoid": [(nn.Sigmoid(), normal(3, 4))],
        "Tanh": [(nn.Tanh(), normal(3, 4))],
        "Softmax": [(nn.Softmax(), normal(3, 4, 2)), (nn.Softmax(-1), normal(3, 4))],
        "Dropout": [(nn.Dropout(0.3, rng=6), normal(3, 4, 2))],
        "Flatten": [(nn.Flatten(), images), (nn.Flatten(2), images), (nn.Flatten(0, 1), images)],
        "Identity": [(nn.Identity(), images)],
        "LocalResponseNorm": [(nn.LocalResponseNorm(size, 0.5, 0.75, 1.5), normal(2, 5, 3))
                              for size in (1, 2, 3, 4, 9)],
        "GlobalAvgPool": [(nn.GlobalAvgPool(), images), (nn.GlobalAvgPool(), normal(2, 3, 4))],
        "GlobalMaxPool": [(nn.GlobalMaxPool(), distinct(2, 3, 4, 5)), (nn.GlobalMaxPool(), distinct(2, 3, 4))],
        "Sequential": [(small_net(), images), (nn.Sequential(conv, conv), images), (nn.Sequential(), images),
                       (nn.Sequential(nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)), distinct(2, 3, 4, 6))],
        "Checkpoint": [(nn.Checkpoint(small_net()), images), (nn.Checkpoint(nn.Dropout(0.3, rng=6)), images)],
        "Residual": [(nn.Residual(conv), images),
                     (nn.Residual(small_net(), nn.Conv2d(4, 3, 1, **F64), nn.Sigmoid()), images)],
        "Concat": [(nn.Concat(small_net(), nn.Identity(), nn.AvgPool2d(3, 1, 1)), images),
                   (nn.Concat(nn.Linear(5, 3, **F64), nn.Tanh()), (normal(2, 5), normal(2, 4)))],
        "Branches": [(nn.Branches(small_net(), nn.Tanh()), images),
                     (nn.Branches(nn.Linear(5, 3, **F64), nn.Tanh()), (normal(2, 5), normal(2, 4)))],
    }


# Not layers themselves: the base classes, which have nothing to differentiate.
BASES = {"Layer", "Leaf"}


def all_cases():
    cases = {name: [*entries] for name, entries in other_cases().items()}
    for ndim in SIZES:
        for name, entries in cases_by_ndim(ndim).items():
            cases.setdefault(f"{name}{ndim}d", []).extend(entries)
    return cases


CASES = [pytest.param(layer, x, id=f"{name}-{i}")
         for name, entries in all_cases().items() for i, (layer, x) in enumerate(entries)]


def test_every_layer_has_a_case():
    layers = {name for name in nn.__all__
              if inspect.isclass(getattr(nn, name)) and issubclass(getattr(nn, name), nn.Layer)}
    assert layers - BASES == set(all_cases())


@pytest.mark.parametrize(("layer", "x"), CASES)
def test_gradients_of_every_layer(layer, x):
    report = gradcheck(layer, x)
    names = {comparison.name for comparison in report}
    assert names >= {name for name, p in layer.named_parameters() if p.requires_grad}
    assert any(name.startswith("input") for name in names)


def has_orders(layer, x):
    """Whether `x` is a batch of images of several channels, whose memory may be in two orders."""
    return (isinstance(x, np.ndarray) and x.ndim >= 3 and x.shape[1] > 1 and not isinstance(layer, nn.Linear)
            and (getattr(layer, "ndim", None) or x.ndim - 2) == x.ndim - 2)


def arrays(y):
    return y if isinstance(y, tuple) else (y,)


@pytest.mark.parametrize(("layer", "x"), [case for case in CASES if has_orders(*case.values)])
def test_outputs_and_gradients_keep_the_memory_order(layer, x):
    y, backward = copy.deepcopy(layer).forward(to_channels_last(x))
    expected, expected_backward = copy.deepcopy(layer).forward(x)
    for output, other in zip(arrays(y), arrays(expected), strict=True):
        np.testing.assert_allclose(output, other, rtol=1e-12, atol=1e-12)
        if output.ndim == x.ndim and output.shape[1] > 1 and max(output.shape[2:]) > 1:
            assert memory_order(output) == "channels_last"
    dys = tuple(np.add(normal(*output.shape), 0, out=np.empty_like(output))
                for output in arrays(y) if output.dtype == np.float64)
    dx = backward(dys if len(dys) > 1 else dys[0])
    dys = tuple(np.ascontiguousarray(dy) for dy in dys)
    other = expected_backward(dys if len(dys) > 1 else dys[0])
    np.testing.assert_allclose(dx, other, rtol=1e-10, atol=1e-12)
    assert (memory_order(dx), memory_order(other)) == ("channels_last", "contiguous")


@pytest.mark.parametrize(("layer", "x"), CASES)
def test_inference_stores_nothing_and_agrees_with_training(layer, x):
    before = layer.state_dict()
    y = layer(x)
    after = layer.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in layer.parameters())
    if not any(isinstance(child, (nn.Dropout, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
               for _, child in layer.named_layers()):
        trained, _ = layer.forward(x)
        for a, b in zip(arrays(y), arrays(trained), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layer", "x"), [
    (ScaledTanh(), normal(2, 3)),
    (Subsampling(3, 1, dtype=np.float64, rng=np.random.default_rng(0)), normal(2, 3, 6)),
    (Subsampling(3, 3, dtype=np.float64, rng=np.random.default_rng(0)), normal(2, 3, 4, 4, 2)),
    (SparseConv(((0, 2), (1,), (0, 1, 2)), (2, 3), dtype=np.float64, rng=np.random.default_rng(0)), normal(2, 3, 4, 5)),
    (RBFOutput(normal(4, 6)), normal(2, 6)),
    (lenet5(input_size=(12,), variant="paper", **F64), normal(2, 1, 12)),
    (lenet5(input_size=(16, 12), **F64), normal(2, 1, 16, 12)),
], ids=str)
def test_gradients_of_lenet_and_its_parts(layer, x):
    gradcheck(layer, x, max_entries=40)


# ---- gradcheck itself ----------------------------------------------------------------------------------------------

def test_a_wrong_entry_is_named():
    def almost_square(x):
        def backward(dy):
            dx = 2 * x * dy
            dx[1, 2] *= 1.001
            return dx
        return x * x, backward

    with pytest.raises(GradcheckError, match=r"FAIL input \(every entry\): worst at \(1, 2\)"):
        gradcheck(almost_square, normal(3, 4))


def test_a_wrong_gradient_of_a_large_array_is_found_by_directions():
    with pytest.raises(GradcheckError, match=r"FAIL input \(5 directions\)"):
        gradcheck(lambda x: (x * x, lambda dy: 2.00001 * x * dy), normal(100, 100))


@pytest.mark.parametrize("attribute", ["weight", "bias"])
def test_a_wrong_parameter_gradient_is_found(attribute):
    class Wrong(nn.Linear):
        def forward(self, x):
            y, backward = super().forward(x)

            def wrong(dy):
                dx = backward(dy)
                getattr(self, attribute).grad *= 1.01
                return dx
            return y, wrong

    with pytest.raises(GradcheckError, match=f"FAIL {attribute}"):
        gradcheck(Wrong(3, 2, **F64), normal(4, 3))


@pytest.mark.parametrize(("backward", "message"), [
    (lambda dy: None, "gave none"),
    (lambda dy: dy.sum(0), r"shape \(4,\)"),
    (lambda dy: dy.astype(np.float32), "float32"),
    (lambda dy: dy * np.nan, "FAIL input"),
])
def test_missing_and_malformed_gradients_are_found(backward, message):
    with pytest.raises(GradcheckError, match=message):
        gradcheck(lambda x: (x, backward), normal(3, 4))


def test_a_missing_parameter_gradient_is_found():
    class Forgets(nn.Linear):
        def forward(self, x):
            y, backward = super().forward(x)
            return y, lambda dy: (backward(dy), self.zero_grad())[0]

    with pytest.raises(GradcheckError, match=r"weight has shape .* gave none"):
        gradcheck(Forgets(3, 2, **F64), normal(4, 3))


def test_randomness_is_refused():
    with pytest.raises(ValueError, match="two runs of the same input"):
        gradcheck(nn.Dropout(0.5), normal(10, 10))


def test_float32_is_refused():
    with pytest.raises(TypeError, match="input has dtype float32"):
        gradcheck(nn.Tanh(), normal(3).astype(np.float32))
    with pytest.raises(TypeError, match="weight has dtype float32"):
        gradcheck(nn.Linear(3, 2), normal(3))


def test_the_layer_is_left_as_it_was():
    net = small_net()
    before = net.state_dict()
    gradcheck(net, normal(2, 4, 3, 3))
    after = net.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in net.parameters())


def test_frozen_parameters_are_not_checked():
    layer = nn.Linear(3, 2, **F64)
    layer.weight.requires_grad = False
    assert {c.name for c in gradcheck(layer, normal(4, 3))} == {"input", "bias"}


def test_the_report_is_readable():
    text = "\n".join(map(str, gradcheck(nn.Linear(3, 2, **F64), normal(4, 3))))
    assert "ok   weight (every entry): worst at (" in text
    assert "ok   input (5 directions): worst at direction" in text
