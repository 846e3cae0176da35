"""What a layer keeps between steps, on one device or in a replica of each of several."""

from typing import Any

import keras

from keras_bn.types import Shape


def kept_variable(
    layer: keras.layers.Layer,
    name: str,
    shape: Shape,
    initializer: Any,
    dtype: str,
    aggregation: str | None,
) -> Any:
    """Return a variable that is not trained; the layer tracks it once it is its attribute.

    Under `tf.distribute` each replica moves its own, without communication; only who reads from
    outside, to save it, gets one value for all. Other engines have one value anyway.

    Args:
        layer: Whose variable it is.
        name: Its name.
        shape: Its shape.
        initializer: Gives its first value.
        dtype: Its dtype.
        aggregation: How one value is made of those of all replicas: "mean", "sum" or
            "only_first_replica"; None where they are equal by construction.

    Returns:
        The variable.
    """
    # Keras 3.15.1: `add_weight` lacks `synchronization`; with "mean" alone TensorFlow would reduce
    # each statistic over all replicas at every step.
    with keras.name_scope(layer.name, caller=layer):
        return keras.Variable(
            initializer,
            shape,
            dtype,
            trainable=False,
            autocast=False,
            aggregation=aggregation,
            synchronization="auto" if aggregation is None else "on_read",
            name=name,
        )
