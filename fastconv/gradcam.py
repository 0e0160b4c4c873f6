"""Grad-CAM: which places of the input speak for a class (Selvaraju et al., ICCV 2017)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastconv.arrays import Array
from fastconv.nn.layer import Backward, Layer
from fastconv.nn.pool import _AdaptiveAvgPool, _AdaptiveMaxPool, _AvgPool, _LPPool, _MaxPool
from fastconv.resize import resize
from fastconv.summary import summarize
from fastconv.watch import inference_copy, watch

__all__ = ["gradcam", "gradcam_layer"]


def gradcam(model: Layer, x: Any, target: Any = None, layer: str | None = None, *, normalise: bool = True) -> Array:
    """Grad-CAM of a classifier, for images and volumes alike.

    With A^k the channels of a layer, Z their number of positions and y^c the logit of class c, equation 1 is
    ``alpha_k = 1 / Z * sum over positions of dy^c / dA^k``, equation 2 ``L = relu(sum over k of alpha_k * A^k)``. The
    network computes as in inference: dropout drops nothing, batch normalisation takes its running statistics. It is
    not changed: no gradient is left in its parameters, and other threads may use it.

    Parameters
    ----------
    model : Layer
        Any network from (N, C, \\*spatial) to logits (N, classes). Of several outputs the first counts, of several
        inputs the first is the image.
    x : ndarray
        Batch (N, C, \\*spatial), or the tuple that the network takes.
    target : int or array of int, optional
        Class c, or one for each image; the predicted ones if left out.
    layer : str, optional
        Name of the layer that gives A, as in ``model.named_layers()``; see `gradcam_layer` for the default.
    normalise : bool
        Whether each map is divided by its maximum, so that it goes from 0 to 1; a map of zeros stays as it is.

    Returns
    -------
    ndarray
        (N, \\*spatial): L, resized to the size of the input by linear interpolation; then normalised.

    Raises
    ------
    ValueError
        For a layer that is not there or whose output has no positions, or a class that is not there.

    Examples
    --------
    >>> heat = gradcam(net, images)                # of the predicted classes
    >>> heat = gradcam(net, images, 3, "layer3")   # of class 3, at a finer layer
    """
    image = x[0] if isinstance(x, tuple) else x
    size = image.shape[2:]
    if layer is None:
        layer = gradcam_layer(model, tuple(a.shape[1:] for a in x) if isinstance(x, tuple) else image.shape[1:])
    copied = inference_copy(model)
    maps = _Maps()
    watch(copied, layer, maps.see, "gradcam")
    y, backward = copied.forward(x)
    several = isinstance(y, tuple)
    logits = y[0] if several else y
    if maps.values is None or maps.values.ndim < 3:
        shape = None if maps.values is None else maps.values.shape
        raise ValueError(f"gradcam: layer is {layer!r}, whose output has shape {shape}, but (N, channels, *spatial) is "
                         "needed. Hint: layer=None takes the last one with positions")
    gradient = np.zeros_like(logits)
    gradient[np.arange(len(logits)), _classes(target, logits)] = 1
    backward((gradient, *(None for _ in y[1:])) if several else gradient)
    assert maps.weights is not None
    heat = np.maximum(np.einsum("nk,nk...->n...", maps.weights, maps.values), 0)
    heat = resize(heat[:, None], size)[:, 0]
    if normalise:
        peak = heat.max(axis=tuple(range(1, heat.ndim)), keepdims=True)
        heat = np.divide(heat, peak, out=np.zeros_like(heat), where=peak > 0)
    return heat


def gradcam_layer(model: Layer, input_shape: tuple[Any, ...]) -> str:
    """Name of the layer that `gradcam` looks at: the last one with several positions, pools aside.

    A pool has the same channels as the layer before it, at fewer positions.

    Parameters
    ----------
    model : Layer
        Any network.
    input_shape : tuple of int
        (C, \\*spatial) without the batch, or a tuple of such shapes; see `summarize`.

    Raises
    ------
    ValueError
        If no layer has several positions.
    """
    layers = dict(model.named_layers())
    for row in reversed(summarize(model, input_shape).rows):
        # A sum or a concatenation is what the layer above it gives.
        name = row.name if row.name in layers else row.name.rpartition(".")[0]
        if name and math.prod(row.shape[1:]) > 1 and not isinstance(layers[name], _POOLS):
            return name
    raise ValueError(f"gradcam: no layer of {type(model).__name__} has several positions for inputs of "
                     f"{input_shape}. Hint: larger images, or a network with convolutions")


_POOLS = (_MaxPool, _AvgPool, _LPPool, _AdaptiveAvgPool, _AdaptiveMaxPool)


class _Maps:
    """Output of a layer and, after backward, the mean over positions of its gradient (equation 1)."""

    values: Any = None
    weights: Array | None = None

    def see(self, y: Any, backward: Backward) -> Backward:
        """Note the output; see `watch`."""
        self.values = y

        def watched(dy: Array) -> Any:
            self.weights = dy.mean(axis=tuple(range(2, dy.ndim)))
            return backward(dy)

        return watched


def _classes(target: Any, logits: Array) -> Array:
    if target is None:
        classes: Array = logits.argmax(axis=1)
        return classes
    classes = np.asarray(target)
    count = logits.shape[1]
    if classes.dtype.kind not in "iu" or classes.shape not in ((), logits.shape[:1]):
        raise ValueError(f"gradcam: target is {target!r}, but an int or one for each of {len(logits)} images is "
                         "needed. Hint: target=None takes the predicted classes")
    if classes.size and not 0 <= classes.min() <= classes.max() < count:
        raise ValueError(f"gradcam: target is {target!r}, but classes are 0 <= c < {count}. "
                         "Hint: target=None takes the predicted classes")
    return classes
