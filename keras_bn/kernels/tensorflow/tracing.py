"""What is being traced, and for whom: nothing public says so (TensorFlow 2.21)."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import tensorflow as tf
from tensorflow.python.eager import record
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext


def is_for_xla() -> bool:
    """Say whether the graph that is being traced goes to XLA as a whole."""
    return bool(GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def is_for_gradients() -> bool:
    """Say whether a tape may be recording: then the graph is not one that somebody exports."""
    return bool(record.could_possibly_record())


def is_for_export() -> bool:
    """Say whether what is being traced may be exported, to where only TensorFlow is known."""
    # What Keras exports has no tape, and is not compiled as a whole.
    return not (tf.executing_eagerly() or is_for_gradients() or is_for_xla())


# A SavedModel holds the gradients of its functions, too, and traces them when it is written.
_is_gradient_of_export = ContextVar("is_gradient_of_export", default=False)


@contextmanager
def gradient_of(is_exported: bool) -> Iterator[None]:
    """Trace the gradient of what was, or was not, for export when it was traced."""
    token = _is_gradient_of_export.set(is_exported)
    try:
        yield
    finally:
        _is_gradient_of_export.reset(token)


def is_gradient_of_export() -> bool:
    """Say whether the gradient is traced of what may be exported."""
    return _is_gradient_of_export.get()


def is_for_each_of_many() -> bool:
    """Say whether `tf.vectorized_map`, or a Jacobian, will make one for many of what is traced."""
    return "loop_body" in tf.get_current_name_scope()


def is_for_values_alone() -> bool:
    """Say whether no derivative can be asked for later: eager, without a tape."""
    return bool(tf.executing_eagerly()) and not is_for_gradients()
