"""Networks at reduced size against their NumPy reference: values, and gradients by difference quotients."""

from functools import partial

import numpy as np
import pytest
from networks import VGG, no_dropout, outputs_of
from numpy_nets import Reference
from tolerance import assert_close, rms

from fastconv import models

# Settings, the reference's forward pass, sizes of images and volumes.
BY_REFERENCE = {
    "logistic_regression": (models.logistic_regression, lambda net, x: net.mlp(x), (7, 8), (4, 5, 6)),
    "mlp": (partial(models.mlp, hidden=(9, 11)), lambda net, x: net.mlp(x), (7, 8), (4, 5, 6)),
    "lenet5": (models.lenet5, lambda net, x: net.lenet(x), (28, 20), (12, 16, 14)),
    "lenet5-paper": (partial(models.lenet5, variant="paper"), lambda net, x: net.lenet_1998(x), (28, 20), (12, 16, 14)),
    "cnn3d": (models.cnn3d, lambda net, x: net.cnn3d(x), None, (9, 8, 17)),
    "resnet18": (partial(models.resnet, 18, width=1 / 16),
                 lambda net, x: net.resnet(x, (2, 2, 2, 2), 2), (33, 40), (20, 17, 24)),
    "resnet18-paper": (partial(models.resnet, 18, width=1 / 16, variant="paper"),
                       lambda net, x: net.resnet(x, (2, 2, 2, 2), 2, paper=True), (33, 40), (20, 17, 24)),
    "resnet50-paper": (partial(models.resnet, 50, width=1 / 16, stem="small", variant="paper"),
                       lambda net, x: net.resnet(x, (3, 4, 6, 3), 3, stem="small", paper=True), (16, 18), (9, 8, 10)),
    "resnet50": (partial(models.resnet, 50, width=1 / 16, stem="small"),
                 lambda net, x: net.resnet(x, (3, 4, 6, 3), 3, stem="small"), (16, 18), (9, 8, 10)),
    "plain18": (partial(models.resnet, 18, width=1 / 16, residual=False),
                lambda net, x: net.resnet(x, (2, 2, 2, 2), 2, residual=False), (33, 40), (20, 17, 24)),
    "resnet_small": (partial(models.resnet_small, 14, width=1 / 4),
                     lambda net, x: net.resnet(x, (2, 2, 2), 2, stem="small"), (12, 13), (8, 7, 6)),
    "densenet121": (partial(models.densenet, 121, width=1 / 16), lambda net, x: net.densenet(x), (64, 70),
                    (34, 32, 64)),
    "googlenet-paper": (partial(models.googlenet, width=1 / 16), lambda net, x: net.googlenet(x), (64, 70),
                        (40, 34, 33)),
    "googlenet": (partial(models.googlenet, width=1 / 16, variant="torchvision", auxiliary=True),
                  lambda net, x: net.googlenet(x), (64, 70), (40, 34, 33)),
    "alexnet-paper": (partial(models.alexnet, variant="paper", width=1 / 32, pool_size=1),
                      lambda net, x: net.alexnet(x, True), (67, 99), (67, 67, 83)),
    "alexnet": (partial(models.alexnet, width=1 / 32, pool_size=1), lambda net, x: net.alexnet(x, False),
                (67, 99), (67, 67, 83)),
    "vgg13": (partial(models.vgg, 13, width=1 / 16, pool_size=1), lambda net, x: net.vgg(x, VGG[13]),
              (32, 34), (32, 33, 34)),
    "vgg11-bn": (partial(models.vgg, 11, batch_norm=True, width=1 / 16, pool_size=1),
                 lambda net, x: net.vgg(x, VGG[11], True), (32, 34), (32, 33, 34)),
    "nin": (partial(models.nin, width=1 / 16), lambda net, x: net.nin(x), (20, 17), (9, 10, 11)),
}


BY_SIZE = ("logistic_regression", "mlp", "lenet5", "lenet5-paper")  # want the size of the image, not just its axes


@pytest.mark.parametrize(("name", "ndim"), [(name, ndim) for name, (*_, image, volume) in BY_REFERENCE.items()
                                            for ndim, size in ((2, image), (3, volume)) if size])
def test_values_and_gradients_by_the_numpy_reference(name, ndim):
    build, run, *sizes = BY_REFERENCE[name]
    size = sizes[ndim - 2]
    where = {"input_size": size} if name in BY_SIZE else {} if name == "cnn3d" else {"ndim": ndim}
    net = no_dropout(build(in_channels=2, num_classes=5, **where, dtype=np.float64, rng=0))
    rng = np.random.default_rng(3)
    for _, parameter in net.named_parameters():
        if len(parameter.shape) == 1:
            parameter.assign(rng.uniform(0.5, 1.5, parameter.shape))
    x = rng.standard_normal((2, 2, *size))
    state = net.state_dict()
    outputs, backward = net.forward(x)
    expected = outputs_of(run(Reference(state), x))
    for y, value in zip(outputs_of(outputs), expected, strict=True):
        assert_close(y, value, 64**2 * 2000)  # one sum of 64 layers of 2000 products

    dys = tuple(rng.standard_normal(y.shape) for y in expected)
    gradients = {"input": backward(dys if isinstance(outputs, tuple) else dys[0])}
    gradients |= {key: parameter.grad for key, parameter in net.named_parameters()}

    def loss(step, direction):
        moved = {key: state[key] + step * d for key, d in direction.items() if key != "input"}
        outputs = outputs_of(run(Reference(state | moved), x + step * direction["input"]))
        return sum(float(np.sum(dy * y)) for dy, y in zip(dys, outputs, strict=True))

    # Central differences along directions in which every array moves by a share of its size. Some of the 1e5 ReLUs and
    # maxima change sides between the two ends, each with an error as large as its own part.
    step = 1e-8
    for _ in range(3):
        direction = {key: rng.standard_normal(g.shape) * rms(x if key == "input" else state[key])
                     for key, g in gradients.items()}
        parts = [np.sum(d * gradients[key]) for key, d in direction.items()]
        quotient = (loss(step, direction) - loss(-step, direction)) / (2 * step)
        assert abs(quotient - sum(parts)) < 1e-4 * sum(map(abs, parts))
