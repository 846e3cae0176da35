"""Layers and `fit` under MirroredStrategy on logical CPU devices.

    python tests/distributed/tensorflow_mirrored.py FILE

Writes what it found to FILE; `test_tensorflow.py` says what it must be.
"""

import functools
import sys
import tempfile
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from tests.distributed import tensorflow_replicas as replicas
from tests.distributed.shards import PAIRS

DEVICES = 4

# Layers that keep statistics, which differ from replica to replica where not synchronized.
KEPT = {
    "batch": keras_bn.BatchNormalization,
    "renorm": functools.partial(keras_bn.BatchRenormalization, debias=True),
    "cumulative": functools.partial(keras_bn.BatchNormalization, momentum=None),
    "synchronized": functools.partial(keras_bn.BatchNormalization, synchronized=True),
    "Keras": keras.layers.BatchNormalization,
}
synchronized = functools.partial(keras_bn.BatchNormalization, synchronized=True)


@functools.cache
def strategy_of(count: int) -> tf.distribute.Strategy:
    # TensorFlow 2.21: collectives of a second strategy in one process clash with the first's.
    devices = [f"CPU:{index}" for index in range(count)]
    others = None if count == 2 else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=others)


def shards() -> dict[bool, dict[Any, list[replicas.Replica]]]:
    """Return what the layers give on each replica, synchronized or not."""
    two = strategy_of(2)
    return {
        True: replicas.on_pairs(two, synchronized=True),
        False: replicas.on_pairs(two, eager=True),
    }


def others() -> dict[str, list[replicas.Replica]]:
    """Return further ways to be synchronized: eager, on four devices, in ghosts."""
    two, four = strategy_of(2), strategy_of(4)
    options = {"synchronized": True, "virtual_batch_size": 3}
    ghosts = {kind: replicas.Replicated(two, kind, **options) for kind in replicas.KINDS}
    eager = replicas.Replicated(two, "batch", eager=True, synchronized=True)
    return {
        "eager": eager(PAIRS["7 and 1"]),
        "four": replicas.Replicated(four, "batch", synchronized=True)(replicas.FOUR),
        **{f"ghosts, {kind}": layer(PAIRS["equal"]) for kind, layer in ghosts.items()},
    }


def fits() -> dict[Any, list[np.ndarray]]:
    """Return the weights that `fit` ends with on one, two and four devices."""
    one, two, four = tf.distribute.get_strategy(), strategy_of(2), strategy_of(4)
    return {
        1: fitted(one),
        2: fitted(two, synchronized=True),
        4: fitted(four, synchronized=True),
        "not synchronized": fitted(two),
    }


def fitted(strategy: Any, **options: Any) -> list[np.ndarray]:
    """Return the weights of a network after two epochs of `fit`, its batches in order."""
    with strategy.scope():
        model = replicas.network(**options)
        model.compile(replicas.optimizer(), "mse", jit_compile=False)
    model.fit(*replicas.data(), batch_size=replicas.BATCH, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()


def saved() -> dict[str, Any]:
    """Return what each replica keeps in `fit`, and what file, checkpoint and export have of it."""
    two = strategy_of(2)
    x, _ = replicas.data(replicas.SAMPLES + 1)
    with two.scope():
        model = beside_each_other()
        model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, [x] * len(KEPT), batch_size=replicas.BATCH, shuffle=False, verbose=0)
    each = kept(two, model)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        loaded = keras.models.load_model(f"{folder}/model.keras")
        with two.scope():
            loaded_there = keras.models.load_model(f"{folder}/model.keras")
        tf.train.Checkpoint(model=model).write(f"{folder}/checkpoint")
        restored = beside_each_other()
        tf.train.Checkpoint(model=restored).restore(f"{folder}/checkpoint").expect_partial()
        model.export(f"{folder}/exported", verbose=False)
        exported = tf.saved_model.load(f"{folder}/exported")
        served = [y.numpy() for y in exported.serve(x)]
    model.set_weights(model.get_weights())
    one = tf.distribute.get_strategy()
    return {
        "each": each,
        "file": kept(one, loaded),
        "file, loaded by replicas": kept(two, loaded_there),
        "checkpoint": kept(one, restored),
        "set": kept(two, model),
        "served": dict(zip(KEPT, served, strict=True)),
        "predicted": dict(zip(KEPT, loaded.predict(x, verbose=0), strict=True)),
    }


def beside_each_other() -> keras.Model:
    """Return a model of the layers in `KEPT`, each on the inputs."""
    x = keras.Input((replicas.FEATURES,))
    return keras.Model(x, [layer(name=name)(x) for name, layer in KEPT.items()])


def kept(strategy: Any, model: keras.Model) -> dict[str, list[dict[str, np.ndarray]]]:
    """Return the weights of each replica's layers."""
    return {name: replicas.by_replica(strategy, model.get_layer(name).weights) for name in KEPT}


class Subclassed(keras.Model):
    """A model that Keras builds by a call of its own, where it is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.normalization = synchronized()

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.normalization(x, training=training)


def communication() -> dict[str, list[Any]]:
    """Return the replica of each sum over replicas that a graph holds."""
    x = tf.ones((4, replicas.FEATURES))

    def traced(strategy: Any, layer: Any, gradient: bool = False, **call: Any) -> list[Any]:
        def step(x: Any) -> Any:
            y = layer(x, **call)
            return tf.gradients(y, x)[0] if gradient else y

        with replicas.counted() as found:
            tf.function(lambda: strategy.run(step, (x,))).get_concrete_function()
        return found

    def made(strategy: Any, **options: Any) -> Any:
        with strategy.scope():
            layer = keras_bn.BatchNormalization(**{"synchronized": True} | options)
            layer.build((None, replicas.FEATURES))
        return layer

    one, two, none = strategy_of(1), strategy_of(2), tf.distribute.get_strategy()
    with two.scope():
        subclassed, eager = Subclassed(), Subclassed()
    with replicas.counted() as in_eager:
        two.run(lambda: eager(x, training=True))
    with replicas.counted() as symbolic, two.scope():
        synchronized()(keras.Input((replicas.FEATURES,)), training=True)
    found = {
        "training": traced(two, made(two), training=True),
        "training, with gradient": traced(two, made(two), True, training=True),
        "inference": traced(two, made(two), training=False),
        "frozen": traced(two, made(two, trainable=False), training=True),
        "not synchronized": traced(two, made(two, synchronized=False), training=True),
        "one replica": traced(one, made(one), training=True),
        "no strategy": traced(none, made(none), training=True),
        "symbolic": symbolic,
        "shapes inferred in a replica, eager": in_eager,
    }
    # The first trace creates variables, so TensorFlow traces again.
    traced(two, subclassed, training=True)
    return found | {"built in a replica": traced(two, subclassed, training=True)}


def main() -> None:
    """Write all that is found here."""
    (path,) = sys.argv[1:]
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES
    )
    parts = (shards, others, fits, saved, communication)
    replicas.hand_over({part.__name__: part() for part in parts}, path)


if __name__ == "__main__":
    main()
