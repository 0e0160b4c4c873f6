"""Layer, Parameter and Buffer: what every layer is made of.

A layer has two ways to run:

``y, backward = layer.forward(x)``
    The training path: dropout drops, batch normalisation uses (and tracks) the statistics of the batch.
    ``dx = backward(dy)`` adds the gradients of the parameters into `Parameter.grad` and returns that of the input.
    `backward` is a closure that holds what it needs: it may be called later, again, or never, and several forward
    passes may be pending at once. Dropping it frees the activations.
``y = layer(x)``
    Inference: dropout is off, batch normalisation uses its running statistics, nothing is stored on the layer, and
    any number of threads may share it.

So there is no mode to set and none to forget. A new layer is a class with these two methods; parameters, buffers and
child layers are plain attributes and are found by walking them in order of assignment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from fastconv.arrays import FLOAT32, FLOAT64, Array, empty, on_device, to_host
from fastconv.nn.names import OPTIONAL_NAMES, renamed

Backward = Callable[[Any], Any]
L = TypeVar("L", bound="Layer")


def float_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return `dtype` as the NumPy dtype float32 or float64; others raise TypeError."""
    result = np.dtype(dtype)
    if result not in (FLOAT32, FLOAT64):
        raise TypeError(f"layer: dtype is {result}, but layers compute in float32 or float64. Hint: dtype=np.float32; "
                        "on a GPU functions on convolutions and pools, and prepare_conv, take 16 bits")
    return result


def allocator(x: Array) -> Callable[[], Array]:
    """Return a function that makes dense uninitialised arrays with the shape, dtype and order of axes of `x`.

    What a `backward` keeps of an input whose values it does not need.
    """
    shape, dtype = x.shape, x.dtype
    # Axes from the longest stride to the shortest; of equal ones the first is the outer one.
    axes = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    places = tuple(axes.index(axis) for axis in range(x.ndim))
    memory_shape = tuple(shape[axis] for axis in axes)
    if on_device(x):
        from fastconv.backends.cuda.device import provider

        return lambda: provider().empty(memory_shape, dtype).transpose(places)
    return lambda: empty(memory_shape, dtype).transpose(places)


class Buffer:
    """An array that belongs to a layer and to its state, but is not trained: running statistics, fixed codes.

    `value` is a read-only view. Writing goes through `assign` or `write`, which bump `version`: whatever is computed
    from an array and kept (packed weights, folded scales) is kept with the version that it came from, so that it can
    never be stale in silence. A thread that writes while others run inference must keep them out itself.

    Parameters
    ----------
    value : array_like
        Copied.
    """

    __slots__ = ("_array", "_version")

    def __init__(self, value: Any) -> None:
        self._array: Array = np.array(value, order="C")
        self._version = 0

    @property
    def value(self) -> Array:
        """The array as a view, which shows later writes; read-only, but on a GPU, where nothing is.

        A view on a GPU must not be written: what is kept under `version` would be stale.
        """
        view = self._array.view()
        _set_writeable(view, False)
        return view

    @property
    def version(self) -> int:
        """Number that grows with each write."""
        return self._version

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array, which never changes."""
        return self._array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the array, which never changes."""
        return self._array.dtype

    def write(self) -> _Writing:
        """Context that lends a writable view; it turns read-only at the end.

        Examples
        --------
        >>> with parameter.write() as value:
        ...     value *= 0.5
        """
        return _Writing(self)

    def assign(self, array: Any) -> None:
        """Copy `array` into the value.

        Raises
        ------
        ValueError
            If the shape is another one.
        TypeError
            If the values would change their kind (float to int, complex to float).
        """
        source = np.asarray(to_host(array), like=self._array)
        if source.shape != self.shape:
            raise ValueError(f"assign: array has shape {source.shape}, but the value has shape {self.shape}. "
                             "Hint: shapes are fixed; make a new layer for another size")
        with self.write() as value:
            np.copyto(value, source, casting="same_kind")

    def to(self, place: str) -> None:
        """Move the array to a GPU (``"cuda"``, CuPy's current one) or to host memory (``"cpu"``).

        Arrays of integers, which count, stay in host memory, so that nobody has to wait to read them.
        """
        if place not in ("cuda", "cpu"):
            raise ValueError(f"to: place is {place!r}, but 'cuda' or 'cpu' is needed. "
                             "Hint: with cupy.cuda.Device(1): net.to('cuda') chooses among GPUs")
        if self.dtype.kind != "f" or on_device(self._array) == (place == "cuda"):
            return
        if place == "cuda":
            from fastconv.backends.cuda.device import provider

            self._array = provider().upload(self._array)
        else:
            self._array = to_host(self._array)
        self._version += 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, version={self.version})"


class _Writing:
    """What `Buffer.write` returns; a class, since each step of training enters one for each parameter."""

    __slots__ = ("_buffer", "_view")

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    def __enter__(self) -> Array:
        self._view = self._buffer._array.view()
        self._buffer._version += 1
        return self._view

    def __exit__(self, *raised: object) -> None:
        # Again, for what was computed from the array in the middle of the writing.
        self._buffer._version += 1
        _set_writeable(self._view, False)


def _set_writeable(view: Array, writeable: bool) -> None:
    if not on_device(view):  # CuPy's arrays have no such flag
        view.flags.writeable = writeable


class Parameter(Buffer):
    """A trained array with its gradient.

    Parameters
    ----------
    value : array_like
        Copied.
    requires_grad : bool
        False freezes the parameter: layers do not compute its gradient and optimisers leave it alone.

    Attributes
    ----------
    grad : ndarray or None
        Sum of the gradients since `zero_grad`, with shape and dtype of the value; None if there was none.
    """

    __slots__ = ("grad", "requires_grad")

    def __init__(self, value: Any, requires_grad: bool = True) -> None:
        super().__init__(value)
        float_dtype(self.dtype)
        self.grad: Array | None = None
        self.requires_grad = requires_grad

    def add_grad(self, grad: Array) -> None:
        """Add `grad`, an array that nobody else writes to, into `self.grad`; a frozen parameter takes none."""
        if not self.requires_grad:
            return
        if self.grad is None:
            self.grad = grad
        else:
            self.grad += grad

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.grad = None

    def to(self, place: str) -> None:
        """Move the value, see `Buffer.to`, and forget the gradient if that changes anything."""
        version = self._version
        super().to(place)
        if self._version != version:
            self.grad = None

    def check_version(self, version: int, name: str) -> None:
        """Check that nothing was written since `version`; backward calls it for the values that it reads again.

        Raises
        ------
        RuntimeError
            If the value was written, so that the gradient would be that of no function.
        """
        if self._version != version:
            raise RuntimeError(f"backward: {name} was written after the forward pass (version {version} then, "
                               f"{self._version} now), so that its gradient is lost. "
                               "Hint: call backward before the optimiser's step")


def inherit_doc(cls: type[L]) -> type[L]:
    """Class decorator for the variants of a layer: the rest of the base class's docstring follows their own line."""
    base = cls.__mro__[1].__doc__
    if cls.__doc__ and base:
        cls.__doc__ += "\n" + base.partition("\n")[2]
    return cls


class LoadReport(NamedTuple):
    """What `Layer.load_state_dict` could not match: ``any(report)`` says if there is any, `str` says it in words."""

    missing: list[str]
    """Names of the layer that the state lacks."""
    unexpected: list[str]
    """Names of the state that the layer lacks."""
    mismatched: list[str]
    """Sentences on arrays of another shape or kind."""

    def __str__(self) -> str:
        lines = [f"{field} ({len(names)}): {'; '.join(names)}" for field, names in self._asdict().items() if names]
        return "\n".join(lines) or "everything fits"


class Layer:
    """Base class of all layers; see the module's docstring.

    Subclasses set parameters, buffers and child layers as attributes and define `forward` and `__call__`. Layers
    can be copied with `copy.deepcopy` and pickled.
    """

    def forward(self, x: Any) -> tuple[Any, Backward]:
        """Run the training path.

        Parameters
        ----------
        x : ndarray
            The input; a few layers take a tuple of arrays and say so.

        Returns
        -------
        y : ndarray
            The output.
        backward : callable
            ``backward(dy) -> dx`` takes the gradient of the loss with respect to `y`, adds into `Parameter.grad`, and
            returns the gradient with respect to `x`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(x) -> (y, backward)")

    def __call__(self, x: Any) -> Any:
        """Run inference: no randomness, no statistics of the batch, nothing stored."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(x) -> y")

    def children(self) -> Iterator[tuple[str, Layer]]:
        """Yield name and layer of each direct child."""
        for name, value in vars(self).items():
            if isinstance(value, Layer):
                yield name, value

    def named_layers(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """Yield dotted name and layer of this layer (name ``""``) and of all below, parents first."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_layers(f"{prefix}.{name}" if prefix else name)

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """Yield dotted name and each `Buffer` that is no `Parameter`."""
        return ((name, item) for name, item in self._state() if not isinstance(item, Parameter))

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield dotted name and `Parameter`, each parameter once, even if layers share it."""
        seen: set[int] = set()
        for name, item in self._state():
            if isinstance(item, Parameter) and id(item) not in seen:
                seen.add(id(item))
                yield name, item

    def parameters(self) -> list[Parameter]:
        """Return all parameters, each once; what an optimiser takes."""
        return [parameter for _, parameter in self.named_parameters()]

    def num_parameters(self) -> int:
        """Return the number of trained values, shared ones counted once."""
        return sum(p.value.size for p in self.parameters() if p.requires_grad)

    def _state(self) -> Iterator[tuple[str, Buffer]]:
        for prefix, layer in self.named_layers():
            for name, value in vars(layer).items():
                if isinstance(value, Buffer):
                    yield f"{prefix}.{name}" if prefix else name, value

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.zero_grad()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze (False) or free (True) all parameters; returns the layer."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def to(self, place: str) -> Self:
        """Move parameters and buffers to a GPU (``"cuda"``) or to host memory (``"cpu"``); returns the layer.

        Do so before making an optimiser: its state is made where the parameters lie.

        Raises
        ------
        ValueError
            For another place.
        RuntimeError
            For ``"cuda"`` without CuPy or a GPU.
        """
        for _, item in self._state():
            item.to(place)
        return self

    @property
    def place(self) -> str:
        """Where parameters and buffers lie, "cuda" or "cpu", as `to` takes it; "cpu" if there are none."""
        return "cuda" if any(on_device(item.value) for _, item in self._state()) else "cpu"

    def state_dict(self) -> dict[str, Array]:
        """Return a copy of each parameter and buffer under PyTorch's name (``"0.weight"``, ``"bn.running_mean"``).

        Copies lie in host memory, wherever the layer does.
        """
        return {name: np.array(to_host(item.value)) for name, item in self._state()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Set parameters and buffers by name.

        Names are PyTorch's and torchvision's. MONAI's, MedicalNet's and those of torchvision's older files are taken
        too, see `fastconv.nn.names`.

        Parameters
        ----------
        state : mapping of str to array
            NumPy arrays or anything that `np.asarray` takes, such as CPU tensors of PyTorch. Floating-point values
            are converted to the layer's dtype. ``num_batches_tracked`` may be missing, and is left as it is then.
        strict : bool
            Whether every name and shape must match. Otherwise what matches is loaded, and the report says the rest.

        Returns
        -------
        LoadReport
            Missing, unexpected and mismatched names; all empty with ``strict=True``.

        Raises
        ------
        ValueError
            With ``strict=True``, naming everything that does not match; nothing is loaded then.
        TypeError
            If a value is no array.

        Examples
        --------
        Weights for 1000 classes as the start for two:

        >>> net = resnet18(num_classes=2)
        >>> print(net.load("resnet18.safetensors", strict=False))
        mismatched (2): fc.weight has shape (1000, 512) and dtype float32, but (2, 512) and float32 are needed; ...
        """
        own = dict(self._state())
        state = renamed(state, own)
        arrays = {name: _state_array(value, name) for name, value in state.items() if name in own}
        report = LoadReport(
            missing=[name for name in own if name not in state and name.rpartition(".")[2] not in OPTIONAL_NAMES],
            unexpected=[name for name in state if name not in own],
            mismatched=[f"{name} has shape {array.shape} and dtype {array.dtype}, but {own[name].shape} and "
                        f"{own[name].dtype} are needed"
                        for name, array in arrays.items() if not _fits(array, own[name])])
        if strict and any(report):
            raise ValueError(f"load_state_dict: the state does not fit {type(self).__name__}. "
                             f"Hint: strict=False loads what fits and returns this report\n{report}")
        for name, array in arrays.items():
            if _fits(array, own[name]):
                own[name].assign(array)
        return report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to a safetensors file, atomically."""
        from fastconv.serialize import save_arrays

        save_arrays(path, self.state_dict())

    def load(self, path: str | os.PathLike[str], strict: bool = True) -> LoadReport:
        """`load_state_dict` what `fastconv.serialize.load_arrays` reads: safetensors, or PyTorch's files through it."""
        from fastconv.serialize import load_arrays

        return self.load_state_dict(load_arrays(path), strict)

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows, in PyTorch's words."""
        return ""

    def __repr__(self) -> str:
        name = type(self).__name__
        lines = [f"({key}): " + repr(child).replace("\n", "\n  ") for key, child in self.children()]
        if not lines:
            return f"{name}({self.extra_repr()})"
        return f"{name}(\n  " + "\n  ".join(([self.extra_repr()] if self.extra_repr() else []) + lines) + "\n)"


class Leaf(Layer):
    """A layer without children that does the same in training and in inference."""

    def __call__(self, x: Any) -> Any:
        """Run inference, which is the training path without its `backward`."""
        return self.forward(x)[0]


def _state_array(value: Any, name: str) -> Array:
    # A parameter of PyTorch outside of state_dict() refuses __array__ because it requires a gradient.
    if hasattr(value, "detach"):
        value = value.detach()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"load_state_dict: {name} is a {type(value).__module__}.{type(value).__qualname__} that NumPy "
                        f"cannot read ({error}). Hint: copy it to the CPU as float32 first") from error
    if array.dtype == object:
        raise TypeError(f"load_state_dict: {name} is a {type(value).__qualname__}, but an array is needed. "
                        "Hint: state_dict() of fastconv or PyTorch gives such a mapping")
    return array


def _fits(array: Array, item: Buffer) -> bool:
    return array.shape == item.shape and np.can_cast(array.dtype, item.dtype, "same_kind")
