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


_is_plain = ContextVar("_is_plain", default=False)


@contextmanager
def plainly(is_wanted: bool = True) -> Iterator[None]:
    """Trace operations of TensorFlow alone, if that is wanted."""
    token = _is_plain.set(is_wanted)
    try:
        yield
    finally:
        _is_plain.reset(token)


def is_plain() -> bool:
    """Say whether there shall be operations of TensorFlow alone."""
    return _is_plain.get()


def is_for_each_of_many() -> bool:
    """Say whether `tf.vectorized_map`, or a Jacobian, will make one for many of what is traced."""
    return "loop_body" in tf.get_current_name_scope()


def is_for_values_alone() -> bool:
    """Say whether no derivative can be asked for later: eager, without a tape."""
    return bool(tf.executing_eagerly()) and not is_for_gradients()
