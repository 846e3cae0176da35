"""How a step gets its derivative in TensorFlow."""

from typing import Any

import tensorflow as tf

from keras_bn.kernels.steps import Step
from keras_bn.kernels.tensorflow.tracing import is_for_export, is_for_values_alone, plainly
from keras_bn.types import Tensor


def run(step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the step's outputs, with its derivative, and its further results.

    Of the inputs' size, only the inputs are kept.
    """
    if is_for_values_alone():  # a custom gradient takes longer than a small step
        outputs, others, _ = step.forward(*inputs)
        return (*outputs, *others)
    # Not through the custom gradient: TensorFlow 2.21 joins all its outputs in one IdentityN, and
    # its optimizer then drops edges that order reading a variable before its update.
    further: list[Tensor] = []
    is_exported = is_for_export()

    @tf.custom_gradient
    def forward(*inputs: Tensor) -> Any:
        outputs, others, constants = step.forward(*inputs)
        further.extend(others)

        def gradient(*grads: Tensor) -> Any:
            # What was looked up by index afterwards has a sparse gradient.
            dense = tuple(tf.convert_to_tensor(part) for part in grads)
            # A SavedModel holds the gradients of its functions, too, and traces them when it is
            # written: as plain as what they are of.
            with plainly(is_exported):
                return _gradient(step, constants, inputs, dense)

        return outputs, gradient

    return (*forward(*inputs), *map(tf.stop_gradient, further))


def _gradient(step: Step, constants: Any, inputs: Any, grads: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs, themselves differentiable, through the plain step."""
    if is_for_values_alone():
        return step.backward(inputs, constants, grads)

    @tf.custom_gradient
    def backward(*given: Tensor) -> Any:
        inputs, grads = given[:count], given[count:]

        def second(*tangents: Tensor) -> Any:
            with tf.GradientTape() as outer:
                outer.watch(given)
                with tf.GradientTape() as inner:
                    inner.watch(given[:count])
                    outputs, _ = step.plain(given[:count], constants)
                found = inner.gradient(outputs, given[:count], given[count:])
            return outer.gradient(found, given, tangents, unconnected_gradients="zero")

        return step.backward(inputs, constants, grads), second

    count = len(inputs)
    return tuple(backward(*inputs, *grads))
