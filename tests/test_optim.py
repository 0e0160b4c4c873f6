"""Optimisers and schedules, step by step against PyTorch in float64; state and exact resumption."""

import json

import numpy as np
import pytest

from fastconv.nn import Linear, Parameter
from fastconv.training.optim import SGD, Adam, AdamW, CosineLR, MultiStepLR, StepLR

torch = pytest.importorskip("torch")

CASES = [
    (SGD, "SGD", {"lr": 0.1}),
    (SGD, "SGD", {"lr": 0.1, "momentum": 0.9}),
    (SGD, "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    (SGD, "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (SGD, "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    (SGD, "SGD", {"lr": 0.1, "weight_decay": 0.05}),
    (Adam, "Adam", {}),
    (Adam, "Adam", {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-4}),
    (Adam, "Adam", {"lr": 0.1, "weight_decay": 0.05}),
    (AdamW, "AdamW", {}),
    (AdamW, "AdamW", {"lr": 0.1, "weight_decay": 0.3}),
]
SHAPES = [(3, 4, 2), (5,), ()]


def parameters(dtype=np.float64):
    rng = np.random.default_rng(0)
    return [Parameter(rng.standard_normal(shape).astype(dtype)) for shape in SHAPES]


def set_gradients(params, step):
    """New gradients; the second parameter has none at every third step."""
    rng = np.random.default_rng(step)
    for index, p in enumerate(params):
        grad = rng.standard_normal(p.shape).astype(p.dtype)
        p.grad = None if index == 1 and step % 3 == 2 else np.asarray(grad)


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_ten_steps(ours, theirs, options):
    params = parameters()
    tensors = [torch.tensor(p.value.copy(), requires_grad=True) for p in params]
    optimizer, expected = ours(params, **options), getattr(torch.optim, theirs)(tensors, **options)
    for step in range(10):
        set_gradients(params, step)
        for p, tensor in zip(params, tensors, strict=True):
            tensor.grad = None if p.grad is None else torch.tensor(p.grad)
        optimizer.step()
        expected.step()
        for p, tensor in zip(params, tensors, strict=True):
            np.testing.assert_allclose(p.value, tensor.detach().numpy(), rtol=1e-12, atol=1e-14, err_msg=str(step))


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_gradients_are_left_alone_and_versions_grow(ours, theirs, options):
    params = parameters()
    optimizer = ours(params, **options)
    for step in (0, 1, 2):
        set_gradients(params, step)
        before = [None if p.grad is None else p.grad.copy() for p in params]
        versions = [p.version for p in params]
        optimizer.step()
        for p, grad, version in zip(params, before, versions, strict=True):
            np.testing.assert_array_equal(p.grad, grad)
            assert (p.version > version) == (grad is not None)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_resuming_gives_the_same_bits(ours, theirs, options, dtype):
    straight = parameters(dtype)
    optimizer = ours(straight, **options)
    for step in range(3):
        set_gradients(straight, step)
        optimizer.step()
    resumed = [Parameter(p.value) for p in straight]
    state = optimizer.state_dict()
    again = ours(resumed, **options)
    again.load_state_dict(state)
    for step in range(3, 6):
        for params, o in ((straight, optimizer), (resumed, again)):
            set_gradients(params, step)
            o.step()
    for a, b in zip(straight, resumed, strict=True):
        assert a.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(a.value, b.value)


def test_state_dict_is_a_copy_of_plain_things():
    params = parameters()
    optimizer = Adam(params)
    set_gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    text = json.dumps(state, default=lambda array: array.tolist())
    optimizer.step()
    assert json.dumps(state, default=lambda array: array.tolist()) == text


def test_state_dict_must_fit():
    params = parameters()
    optimizer = SGD(params, momentum=0.9)
    set_gradients(params, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="for 3 parameters, but there are 2"):
        SGD(params[:2], momentum=0.9).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="velocity of parameter 0 has shape"):
        SGD([params[1], params[0], params[2]], momentum=0.9).load_state_dict(optimizer.state_dict())


def test_frozen_parameters_stay():
    params = parameters()
    params[0].requires_grad = False
    before = params[0].value.copy()
    set_gradients(params, 0)
    AdamW(params, weight_decay=0.5).step()
    np.testing.assert_array_equal(params[0].value, before)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: SGD([]), ValueError, "params is empty"),
    (lambda: SGD(parameters(), lr=-1), ValueError, "lr is -1"),
    (lambda: SGD(parameters(), momentum=-0.1), ValueError, "momentum is -0.1"),
    (lambda: SGD(parameters(), nesterov=True), ValueError, "nesterov=True with momentum=0.0"),
    (lambda: SGD(parameters(), weight_decay=-1), ValueError, "weight_decay is -1"),
    (lambda: SGD([np.ones(3)]), TypeError, "params holds a ndarray"),
    (lambda: SGD(2 * Linear(2, 3).parameters()), ValueError, "given twice"),
    (lambda: Adam(parameters(), betas=(0.9, 1.0)), ValueError, r"betas is \(0.9, 1.0\)"),
    (lambda: Adam(parameters(), eps=-1), ValueError, "eps is -1"),
    (lambda: SGD(parameters(), lr=float("nan")), ValueError, "lr is nan"),
    (lambda: StepLR(SGD(parameters()), 0), ValueError, "step_size is 0"),
    (lambda: CosineLR(SGD(parameters()), 5, 5), ValueError, "warmup_steps is 5"),
    (lambda: CosineLR(SGD(parameters()), 5, min_factor=2), ValueError, "min_factor is 2"),
])
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "Hint: " in str(caught.value)


def rates(schedule, steps):
    values = [schedule.optimizer.lr]
    for _ in range(steps):
        schedule.step()
        values.append(schedule.optimizer.lr)
    return values


def their_rates(make, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
    schedule = make(optimizer)
    values = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_step_lr():
    expected = their_rates(lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5), 10)
    np.testing.assert_allclose(rates(StepLR(SGD(parameters(), 0.3), 3, 0.5), 10), expected, rtol=1e-14)


def test_multi_step_lr():
    expected = their_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5, 6], 0.1), 10)
    np.testing.assert_allclose(rates(MultiStepLR(SGD(parameters(), 0.3), [5, 2, 6], 0.1), 10), expected, rtol=1e-13)


def test_cosine_lr():
    expected = their_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10, 0.03), 10)
    np.testing.assert_allclose(rates(CosineLR(SGD(parameters(), 0.3), 10, min_factor=0.1), 10), expected, rtol=1e-12)


def test_cosine_lr_warms_up_and_stays_at_the_bottom():
    values = rates(CosineLR(SGD(parameters(), 1.0), 10, warmup_steps=4, min_factor=0.2), 12)
    np.testing.assert_allclose(values[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    np.testing.assert_allclose(values[7], 0.6)  # half way down
    np.testing.assert_allclose(values[10:], 0.2)


@pytest.mark.parametrize("make", [lambda o: StepLR(o, 2), lambda o: MultiStepLR(o, [3]), lambda o: CosineLR(o, 9, 2)])
def test_schedules_resume(make):
    schedule = make(SGD(parameters(), 0.3))
    rates(schedule, 4)
    resumed = make(SGD(parameters(), 7.0))
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert rates(resumed, 4) == rates(schedule, 4)
