"""Layers and `fit` under MirroredStrategy on logical CPU devices.

    python tests/distributed/tensorflow_mirrored.py FILE

Writes what it found to FILE; `test_tensorflow.py` says what it must be.
"""

import functools
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from tests.distributed import tensorflow_replicas as replicas
from tests.distributed.shards import PAIRS, Shards

DEVICES = 4

# Layers that keep statistics, which differ from replica to replica where not synchronized.
KEPT = {
    "batch": keras_bn.BatchNormalization,
    "renorm": keras_bn.BatchRenormalization,
    "counted": functools.partial(keras_bn.BatchRenormalization, debias=True),
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


def shards() -> dict[Any, list[replicas.Replica]]:
    """Return what the layers give on each replica, synchronized or not."""
    two = strategy_of(2)
    return {
        (kind, name, is_synchronized): replicas.on_shards(
            two, PAIRS[name], kind, eager=not is_synchronized, synchronized=is_synchronized
        )
        for kind, name in replicas.CASES
        for is_synchronized in (True, False)
    }


def others() -> dict[str, list[replicas.Replica]]:
    """Return further ways to be synchronized: eager, in ghosts, on four devices."""
    uneven = PAIRS["7 and 1"]
    return {
        "eager": replicas.on_shards(strategy_of(2), uneven, "batch", True, synchronized=True),
        "four": replicas.on_shards(
            strategy_of(4), Shards((3, 0, 4, 1)), "batch", synchronized=True
        ),
        **{
            f"ghosts, {kind}": replicas.on_shards(
                strategy_of(2), PAIRS["equal"], kind, synchronized=True, virtual_batch_size=3
            )
            for kind in replicas.KINDS
        },
    }


def fitted(strategy: Any, normalization: Callable[[], Any]) -> list[np.ndarray]:
    """Return the weights of a network after two epochs of `fit`, its batches in order."""
    with strategy.scope():
        model = replicas.network(normalization)
        model.compile(replicas.optimizer(), "mse", jit_compile=False)
    model.fit(*replicas.data(), batch_size=replicas.BATCH, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()


def fits() -> dict[Any, list[np.ndarray]]:
    """Return the weights that `fit` ends with on one, two and four devices."""
    one, two, four = tf.distribute.get_strategy(), strategy_of(2), strategy_of(4)
    renorm = keras_bn.BatchRenormalization
    return {
        ("batch", 1): fitted(one, keras_bn.BatchNormalization),
        ("batch", 2): fitted(two, synchronized),
        ("batch", 4): fitted(four, synchronized),
        ("renorm", 1): fitted(one, renorm),
        ("renorm", 2): fitted(two, functools.partial(renorm, synchronized=True)),
        ("not synchronized", 2): fitted(two, keras_bn.BatchNormalization),
    }


def last_batch_of_one() -> dict[int, list[np.ndarray]]:
    """Return what a layer of inputs keeps where the last batch has 1 sample, on 1 and 2 devices."""

    def trained(strategy: Any) -> list[np.ndarray]:
        x, _ = replicas.data(replicas.BATCH * 2 + 1)
        with strategy.scope():
            model = keras.Sequential([keras.Input((replicas.FEATURES,)), synchronized()])
            model.compile(keras.optimizers.SGD(0.0), "mse")
        model.fit(x, x, batch_size=replicas.BATCH, verbose=0)
        return model.get_weights()

    return {1: trained(tf.distribute.get_strategy()), 2: trained(strategy_of(2))}


def saved() -> dict[str, Any]:
    """Return what each replica keeps in `fit`, and what file, checkpoint and export have of it."""
    two = strategy_of(2)
    x, _ = replicas.data()
    with two.scope():
        model = beside_each_other()
        model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, [x] * len(KEPT), batch_size=replicas.BATCH, verbose=0)
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
    parts = (shards, others, fits, last_batch_of_one, saved, communication)
    replicas.hand_over({part.__name__: part() for part in parts}, path)


if __name__ == "__main__":
    main()
