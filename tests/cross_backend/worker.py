"""What one backend does in a process of its own: save trained models, or load what all saved.

python tests/cross_backend/worker.py save|load FOLDER
"""

import sys
from pathlib import Path

import keras
import numpy as np
from keras import ops

import keras_bn

BACKEND = keras.backend.backend()
SAVERS = ("tensorflow", "jax", "torch")


def layers() -> list[keras.layers.Layer]:
    """Return every layer: with an axis tuple, renorm, a ramp that has begun, a count, replicas."""
    replicas = {"synchronized": True, "axis_name": "replicas"}
    return [
        keras_bn.BatchNormalization(momentum=0.2),
        keras_bn.GroupNormalization(2),
        keras_bn.BatchRenormalization(axis=1, rmax_steps=(0, 9), dmax_steps=(2, 9)),
        keras_bn.BatchNormalization(renorm=True, renorm_clipping={"rmax": 2.0, "dmax": 1.0}),
        keras_bn.InstanceNormalization(axis=1),
        keras_bn.LayerNormalization(axis=(1, 2)),
        keras_bn.RMSNormalization(),
        keras_bn.BatchNormalization(momentum=0.2, **replicas),
        keras_bn.BatchRenormalization(rmax_steps=None, dmax_steps=None, **replicas),
        keras_bn.BatchNormalization(debias=True),
        keras_bn.BatchNormalization(axis=(1, 2), momentum=0.5),
    ]


def make_model() -> keras.Model:
    """Return a model that shows what the last normalization gives, and a matrix product of it."""
    inputs = x = keras.Input((5, 6))
    for layer in layers():
        x = layer(x)
    y = keras.layers.Dense(3, name="y")(keras.layers.Flatten()(x))
    return keras.Model(inputs, {"norms": x, "y": y})


def data() -> np.ndarray:
    """Return a batch far from 0, as real inputs are."""
    return np.random.default_rng(0).normal(100, 1, (12, 5, 6)).astype("float32")


def save(folder: Path) -> None:
    """Train for three steps, save the model, its weights, and what it predicts."""
    keras.utils.set_random_seed(0)
    model, x = make_model(), data()
    model.compile(keras.optimizers.SGD(0.01), {"y": "mse"})
    model.fit(x, {"y": np.zeros((len(x), 3), "float32")}, batch_size=4, verbose=0)
    model.save(folder / f"{BACKEND}.keras")
    model.save_weights(folder / f"{BACKEND}.weights.h5")
    np.savez(folder / f"{BACKEND}.npz", **results(model))


def load(folder: Path) -> None:
    """Predict with each saved model, and with each saved weights file in a model made here."""
    for saver in SAVERS:
        model = keras.saving.load_model(folder / f"{saver}.keras", compile=False)
        np.savez(folder / f"{BACKEND} from {saver}.keras.npz", **results(model))
        model = make_model()
        model.load_weights(folder / f"{saver}.weights.h5")
        np.savez(folder / f"{BACKEND} from {saver}.weights.h5.npz", **results(model))


def results(model: keras.Model) -> dict[str, np.ndarray]:
    """Return the predictions, and the weights by their place and name."""
    weights = {
        f"{i} {variable.name}": ops.convert_to_numpy(variable)
        for i, layer in enumerate(model.layers)
        for variable in layer.weights
    }
    return model.predict(data(), verbose=0) | weights


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]))
