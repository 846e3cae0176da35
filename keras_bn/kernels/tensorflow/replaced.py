"""Functions of a graph that TensorFlow replaces where the graph runs, by what is faster there.

What is saved of the graph holds the plain function alone, which runs wherever TensorFlow does.
TensorFlow's implementation selector, a part of its optimizer, looks among the functions that the
process knows for another one of the same `api_implements`, made for the device of the call.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any
from uuid import uuid4

import tensorflow as tf

from keras_bn.kernels.normalization import How
from keras_bn.kernels.tensorflow.tracing import plainly
from keras_bn.types import Tensor

# Gives results from how to do it, and tensors.
Function = Callable[..., Any]


def call(plain: Function, passes: Function, how: How, *inputs: Tensor) -> Any:
    """Return what `plain` gives, or, on a CPU of this process, what `passes` gives.

    Args:
        plain: What to do with TensorFlow's own operations.
        passes: The same with any operations.
        how: The first argument of both.
        *inputs: The others.
    """
    signature = tuple(tf.TensorSpec(part.shape, part.dtype) for part in inputs)
    function, _ = _both(plain, passes, how, signature)
    return function(*inputs)


# TensorFlow forgets a function that nobody holds, and one for all layers alike is traced once.
@lru_cache(maxsize=4096)
def _both(
    plain: Function, passes: Function, how: How, signature: tuple[tf.TensorSpec, ...]
) -> tuple[Any, Any]:
    """Return the function to call, and the one that TensorFlow may put in its place."""
    # A name of its own in each process: a saved model is not to meet what another one has made.
    name = f"keras_bn_{uuid4().hex}"

    def function(what: Function, **attributes: str) -> Any:
        given = {"api_implements": name, **attributes}
        return tf.function(
            partial(what, how),
            input_signature=signature,
            autograph=False,
            experimental_attributes=given,
        )

    def plainly_traced(*inputs: Any) -> Any:
        with plainly():
            return plain(*inputs)

    with tf.init_scope():  # among the functions of the process, not of the graph that is traced
        replacement = function(passes, api_preferred_device="CPU").get_concrete_function()
    return function(plainly_traced), replacement
