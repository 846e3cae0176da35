"""PyTorch: eager, and torch.compile."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

MODES = ("eager", "compile")
EPSILON = 1e-3


def tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """Return an input."""
    return torch.from_numpy(array).to(getattr(torch, dtype))


def stream(x: torch.Tensor) -> Callable[[], object]:
    """Return a pass that reads and writes as much as x."""
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


def layer_step(layer: Any, options: dict, x: torch.Tensor, dy: Any, mode: str) -> Callable:
    """Return a step of a Keras layer."""
    parameters = [variable.value for variable in layer.trainable_variables]
    return _step(lambda x: layer(x, **options), parameters, x, dy, mode)


def native_step(kind: str, x: torch.Tensor, dy: Any, mode: str, axis: int) -> Callable | None:
    """Return a step of torch.nn's layer, on a view of the same memory."""
    channels = x.shape[axis]
    if kind == "BN":
        # Rows of channels where these are last: the fastest view there is.
        view = _rows if axis == -1 and x.ndim != 4 else _channels_first(axis)
        make = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}
        native = make[view(x).ndim](channels, eps=EPSILON, momentum=0.01)
    elif kind in ("GN", "IN"):
        view = _channels_first(axis)
        native = torch.nn.GroupNorm(32 if kind == "GN" else channels, channels, eps=EPSILON)
    elif kind in ("LN", "RMS") and axis == -1:
        view = lambda x: x  # noqa: E731
        make = torch.nn.LayerNorm if kind == "LN" else torch.nn.RMSNorm
        native = make(channels, eps=EPSILON if kind == "LN" else 1e-6)
    else:
        return None
    native.train(dy is not None)
    function = lambda x: native(view(x))  # noqa: E731 (a view is made in the step, as in a model)
    dy = None if dy is None else view(dy)
    return _step(function, list(native.parameters()), x, dy, mode)


def saved_bytes(layer: Any, options: dict, x: torch.Tensor) -> int:
    """Return the bytes that are kept for the backward pass, each memory counted once."""
    memories = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        memory = saved.untyped_storage()
        memories[memory.data_ptr()] = memory.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(x.detach().requires_grad_(), **options)
    return sum(memories.values())


def _step(function: Callable, parameters: list, x: torch.Tensor, dy: Any, mode: str) -> Callable:
    x = x.detach().requires_grad_(dy is not None)
    if mode == "compile":
        torch.compiler.reset()
        function = torch.compile(function)  # keras.layers break the graph

    def train() -> object:
        return torch.autograd.grad(function(x), [x, *parameters], dy)

    return torch.no_grad()(lambda: function(x)) if dy is None else train


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _channels_first(axis: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.movedim(axis, 1)
