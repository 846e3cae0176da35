"""How each backend's users run a layer: one file each, with the same names.

    MODES                                            the ways to run, the usual one first
    layer_step(layer, options, x, dy, mode)          one step of a Keras layer
    native_step(kind, x, dy, mode, axis)             one step of the backend's own layer, or None
    saved_bytes(layer, options, x)                   bytes kept for the backward pass, or None
    tensor(array, dtype)                             an input
    stream(x)                                        one pass that reads and writes x

A step returns when its work is done. With `dy`, the gradient of the output, it trains: it returns
the gradients of x, gamma and beta, and updates the statistics. With None it infers.
"""

import importlib
from typing import Any

import keras


def active() -> Any:
    """Return the active backend's file."""
    return importlib.import_module(f"engines.{keras.backend.backend()}")
