"""One small network with every layer of the family."""

import keras
import numpy as np

import keras_bn

LAYERS = {
    "batch": keras_bn.BatchNormalization,
    "renorm": lambda **options: keras_bn.BatchNormalization(
        renorm=True, renorm_clipping={"rmin": 1.0, "rmax": 1.0, "dmax": 0.0}, **options
    ),
    "renormalization": keras_bn.BatchRenormalization,
    "group": lambda **options: keras_bn.GroupNormalization(2, **options),
}


def network(width: int = 4) -> keras.Model:
    """Return a network of images with each layer between others, and statistics that have moved."""
    x = inputs = keras.Input((5, 5, 3))
    for name, layer in LAYERS.items():
        x = keras.layers.Conv2D(width, 3, padding="same", name=f"conv_{name}")(x)
        x = keras.layers.Activation("tanh")(layer(name=name)(x))
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    for variable in model.weights:
        if variable.name == "moving_variance":
            variable.assign(np.linspace(0.5, 2, *variable.shape))
    return model


def images(count: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(1, 2, (count, 5, 5, 3)).astype("float32")


def layer_like(layer):
    """Return a layer of the same options, built for 4 channels."""
    other = type(layer).from_config(layer.get_config())
    other.build((None, None, None, 4))
    return other


def called(layer, values):
    """Return the output in training, as a function of the input, gamma and beta."""
    x, *trainable = values
    fixed = [v.value for v in layer.non_trainable_variables]
    options = {} if isinstance(layer, keras_bn.GroupNormalization) else {"training": True}
    return layer.stateless_call(trainable, fixed, x, **options)[0]


def assert_close(found, wanted):
    """Compare lists of arrays."""
    for a, b in zip(found, wanted, strict=True):
        # Two orders of the same float32 sums, through four layers and back.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
