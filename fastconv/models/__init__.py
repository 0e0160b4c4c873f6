"""Networks from the literature, each a function that returns a layer.

All take ``in_channels``, ``num_classes``, ``dtype`` and ``rng``, and are made for images, volumes or signals by
``ndim`` (`lenet5`, `mlp` and `logistic_regression`, whose weights depend on it, by ``input_size``). Layers carry
torchvision's names where torchvision has the network, so that `load_state_dict` takes its weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from fastconv.models.alexnet import alexnet
from fastconv.models.cnn3d import cnn3d
from fastconv.models.covariates import Standardise, WithCovariates
from fastconv.models.densenet import BLOCKS as DENSENETS
from fastconv.models.densenet import densenet, densenet121, densenet161, densenet169, densenet201
from fastconv.models.googlenet import WithHeads, googlenet, googlenet_loss
from fastconv.models.lenet import lenet5
from fastconv.models.nin import nin
from fastconv.models.resnet import BLOCKS as RESNETS
from fastconv.models.resnet import resnet, resnet10, resnet18, resnet34, resnet50, resnet101, resnet152, resnet_small
from fastconv.models.simple import logistic_regression, mlp
from fastconv.models.vgg import CONVOLUTIONS as VGGS
from fastconv.models.vgg import vgg, vgg11, vgg13, vgg16, vgg19
from fastconv.nn.layer import Layer

__all__ = [
    "MODELS",
    "Model",
    "Standardise",
    "WithCovariates",
    "WithHeads",
    "alexnet",
    "cnn3d",
    "create",
    "densenet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "googlenet",
    "googlenet_loss",
    "lenet5",
    "logistic_regression",
    "mlp",
    "nin",
    "resnet",
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet_small",
    "vgg",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
]


class Model(NamedTuple):
    """A row of `MODELS`."""

    build: Callable[..., Layer]
    in_channels: int
    """Channels of the input that the network was made for."""
    size: int
    """Length of each of its spatial axes."""
    fixed_size: bool = False
    """Whether `build` takes ``input_size`` rather than ``ndim``."""
    ndims: tuple[int, ...] = (1, 2, 3)
    """Numbers of spatial axes that there are; if it is one alone, `build` takes no ``ndim``."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of what may be chosen beside the channels, the classes and the size."""
        return tuple(name for name, parameter in inspect.signature(self.build).parameters.items()
                     if name not in ("in_channels", "num_classes", "input_size", "ndim"))


MODELS: dict[str, Model] = {
    "logistic_regression": Model(logistic_regression, 1, 28, fixed_size=True),
    "mlp": Model(mlp, 1, 28, fixed_size=True),
    "lenet5": Model(lenet5, 1, 28, fixed_size=True),
    "cnn3d": Model(cnn3d, 1, 28, ndims=(3,)),
    "alexnet": Model(alexnet, 3, 224),
    "nin": Model(nin, 3, 32),
    **{f"vgg{depth}": Model(partial(vgg, depth), 3, 224) for depth in VGGS},
    "googlenet": Model(googlenet, 3, 224),
    "resnet_small": Model(resnet_small, 3, 32),
    **{f"resnet{depth}": Model(partial(resnet, depth), 3, 224) for depth in RESNETS},
    **{f"densenet{depth}": Model(partial(densenet, depth), 3, 224) for depth in DENSENETS},
}
"""Every network by the name that the command line knows."""


def create(name: str, in_channels: int, num_classes: int, input_size: tuple[int, ...], **options: Any) -> Layer:
    """Make a network by its name for images of one shape.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    in_channels, num_classes : int
        Channels of the input, number of outputs.
    input_size : tuple of int
        Spatial size of the input; its length is the number of spatial axes.
    **options
        Further arguments of the network's function, see `Model.options`.

    Returns
    -------
    Layer
        From (N, in_channels, \\*input_size) to logits (N, num_classes).

    Raises
    ------
    ValueError
        For an unknown name, or a network that there is not in so many dimensions.
    TypeError
        For an option that the network does not have.
    """
    if name not in MODELS:
        raise ValueError(f"models: {name!r} is no network, but one of {', '.join(MODELS)} is needed. "
                         "Hint: fastconv.models has a function for each")
    model, ndim = MODELS[name], len(input_size)
    if ndim not in model.ndims:
        raise ValueError(f"models: input_size is {input_size}, but {name} has {' or '.join(map(str, model.ndims))} "
                         "spatial axes. Hint: leave out the batch and the channels")
    unknown = [option for option in options if option not in model.options]
    if unknown:
        raise TypeError(f"models: {', '.join(unknown)} is given, but {name} takes {', '.join(model.options)}. "
                        f"Hint: fastconv.models says what they do")
    where = {"input_size": input_size} if model.fixed_size else {"ndim": ndim} if len(model.ndims) > 1 else {}
    return model.build(in_channels=in_channels, num_classes=num_classes, **where, **options)
