"""Whether XLA is to compile what is being traced: nothing public says so (TensorFlow 2.21)."""

import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext


def is_for_xla() -> bool:
    """Say whether the graph that is being traced goes to XLA as a whole."""
    return bool(GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))
