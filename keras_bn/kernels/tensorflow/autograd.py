"""How a step gets its derivative in TensorFlow."""

from typing import Any

import tensorflow as tf

from keras_bn.kernels.steps import Step
from keras_bn.types import Tensor


def run(step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the step's outputs, with its derivative; of its inputs' size, only these are kept."""

    @tf.custom_gradient
    def forward(*inputs: Tensor) -> Any:
        outputs, constants = step.forward(*inputs)

        def gradient(*grads: Tensor) -> Any:
            # What was looked up by index afterwards has a sparse gradient.
            dense = tuple(tf.convert_to_tensor(part) for part in grads)
            return _gradient(step, constants, inputs, dense)

        return outputs, gradient

    return tuple(forward(*inputs))


def _gradient(step: Step, constants: Any, inputs: Any, grads: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs, themselves differentiable, through the plain step."""

    @tf.custom_gradient
    def backward(*given: Tensor) -> Any:
        inputs, grads = given[:count], given[count:]

        def second(*tangents: Tensor) -> Any:
            def plain(*given: Tensor) -> Any:
                with tf.GradientTape() as tape:
                    tape.watch(given[:count])
                    outputs = step.plain(given[:count], constants)
                return tape.gradient(outputs, given[:count], given[count:])

            with tf.GradientTape() as tape:
                tape.watch(given)
                found = plain(*given)
            return tape.gradient(found, given, tangents, unconnected_gradients="zero")

        return step.backward(inputs, constants, grads), second

    count = len(inputs)
    return tuple(backward(*inputs, *grads))
