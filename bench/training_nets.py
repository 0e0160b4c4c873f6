"""Networks whose training steps are compared, and the same in PyTorch: made from fastconv's layers, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Net:
    """A row: how to build the network, and the shape of a batch."""

    name: str
    build: Callable[[], Any]
    shape: tuple[int, ...]
    classes: int


def _vgg10() -> Any:
    from fastconv import nn

    layers: list[Any] = []
    before = 3
    for channels, count in ((64, 2), (128, 2), (256, 2), (512, 4)):
        for _ in range(count):
            layers += [nn.Conv2d(before, channels, 3, padding=1, rng=0), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.GlobalAvgPool(), nn.Flatten(), nn.Linear(512, 10, rng=0))


def _model(name: str, ndim: int, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        from fastconv import models

        return getattr(models, name)(ndim=ndim, rng=0, **options)
    return build


def _lenet() -> Any:
    from fastconv import models

    return models.lenet5(rng=0)


NETS = [
    Net("lenet5", _lenet, (64, 1, 28, 28), 10),
    Net("vgg10", _vgg10, (8, 3, 64, 64), 10),
    Net("resnet18", _model("resnet18", 2), (8, 3, 128, 128), 1000),
    Net("densenet121", _model("densenet121", 2), (4, 3, 64, 64), 1000),
    Net("googlenet", _model("googlenet", 2, variant="torchvision", dropout=0.0), (8, 3, 96, 96), 1000),
    Net("resnet10_3d", _model("resnet10", 3, in_channels=1, num_classes=2), (2, 1, 48, 48, 48), 2),
    Net("resnet18_3d", _model("resnet18", 3, in_channels=1, num_classes=2), (2, 1, 64, 64, 64), 2),
]


def batch(net: Net, order: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and classes, the same for everybody."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(net.shape, dtype=np.float32)
    if order == "channels_last":
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    return x, rng.integers(0, net.classes, net.shape[0])


def fastconv_step(net: Net, order: str, threads: int) -> Callable[[], float]:
    """A step of SGD with momentum in fastconv; returns the loss."""
    import fastconv
    from fastconv import nn, training

    fastconv.set_num_threads(threads)
    model = net.build()
    nn.skip_input_gradients(model)
    if order == "channels_last":
        nn.use_channels_last(model)
    x, target = batch(net, order)
    optimizer = training.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        logits, backward = model.forward(x)
        loss, gradient = nn.cross_entropy(logits, target)
        backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)
    return step


def torch_step(net: Net, order: str, threads: int) -> Callable[[], float]:
    """The same step of the same network in PyTorch."""
    import torch

    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    model = torch_of(net.build()).train()
    x, target = (torch.from_numpy(array) for array in batch(net, order))
    if order == "channels_last":
        form = {4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim]
        model, x = model.to(memory_format=form), x.contiguous(memory_format=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        loss = torch.nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())
    return step


STEPS = {
    "fastconv": (fastconv_step, "contiguous"),
    "fastconv_cl": (fastconv_step, "channels_last"),
    "torch": (torch_step, "contiguous"),
    "torch_cl": (torch_step, "channels_last"),
}


# ---- From fastconv's layers to PyTorch's -------------------------------------------------------------------------

def torch_of(layer: Any) -> Any:
    """PyTorch's module for a layer of fastconv, with the same weights.

    Raises
    ------
    TypeError
        For a layer that no row needs.
    """
    import torch
    from torch import nn as torch_nn

    from fastconv import nn
    from fastconv.models import WithHeads

    class Sum(torch_nn.Module):
        def __init__(self, branch: Any, shortcut: Any, activation: Any) -> None:
            super().__init__()
            self.branch, self.shortcut, self.activation = branch, shortcut, activation

        def forward(self, x: Any) -> Any:
            return self.activation(self.branch(x) + self.shortcut(x))

    class Cat(torch_nn.Module):
        def __init__(self, branches: Sequence[Any], dense: bool = False) -> None:
            super().__init__()
            self.branches, self.dense = torch_nn.ModuleList(branches), dense

        def forward(self, x: Any) -> Any:
            if not self.dense:
                return torch.cat([branch(x) for branch in self.branches], 1)
            for branch in self.branches:
                x = torch.cat([x, branch(x)], 1)
            return x

    kind, ndim = type(layer).__name__, getattr(layer, "ndim", 0)
    if isinstance(layer, nn.ReLU):
        return torch_nn.ReLU(inplace=True)
    if isinstance(layer, nn.blocks.DenseBlock):
        entry = [] if layer.entry is None else [torch_of(layer.entry)]
        return torch_nn.Sequential(*entry, Cat([torch_of(inner) for inner in layer.layers], dense=True))
    if isinstance(layer, nn.Concat):
        return Cat([torch_of(branch) for branch in layer])
    if isinstance(layer, nn.Sequential):
        return torch_nn.Sequential(*(torch_of(inner) for inner in layer))
    if isinstance(layer, nn.Residual):
        return Sum(torch_of(layer.branch), torch_of(layer.shortcut), torch_of(layer.activation))
    if isinstance(layer, WithHeads):
        return torch_nn.Sequential(*(torch_of(inner) for _, inner in layer.children()))
    if kind.startswith("Conv") and ndim:
        module = getattr(torch_nn, kind)(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
                                         layer.padding, layer.dilation, layer.groups, layer.bias is not None)
        return _with_weights(module, layer)
    if kind.startswith("BatchNorm"):
        return _with_weights(getattr(torch_nn, kind)(layer.num_features, layer.eps, layer.momentum), layer)
    if kind == "Linear":
        return _with_weights(torch_nn.Linear(layer.in_features, layer.out_features, layer.bias is not None), layer)
    if kind.startswith("MaxPool"):
        return getattr(torch_nn, kind)(layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                                       ceil_mode=layer.ceil_mode)
    if kind.startswith("AvgPool"):
        return getattr(torch_nn, kind)(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)
    if kind == "GlobalAvgPool":
        class Mean(torch_nn.Module):
            def forward(self, x: Any) -> Any:
                return x.mean(tuple(range(2, x.ndim)), keepdim=True)
        return Mean()
    if kind == "Flatten":
        return torch_nn.Flatten()
    if (kind == "Dropout" and layer.p == 0) or kind == "Identity":
        return torch_nn.Identity()
    raise TypeError(f"training_nets: {kind} has no module here")


def _with_weights(module: Any, layer: Any) -> Any:
    import torch

    with torch.no_grad():
        for name in ("weight", "bias"):
            parameter = getattr(layer, name)
            if parameter is not None:
                getattr(module, name).copy_(torch.from_numpy(parameter.value.copy()))
    return module
