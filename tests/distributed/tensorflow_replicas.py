"""What the programs here run under a strategy of `tf.distribute`, on TensorFlow alone."""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from tests.distributed.shards import PAIRS, Shards, built
from tests.oracle import Arrays

KINDS = ("batch", "renorm")
CASES = [(kind, name) for kind in KINDS for name in PAIRS]

FEATURES, TARGETS, BATCH, STEPS = 6, 3, 8, 6
SAMPLES = BATCH * STEPS

FOUR = Shards((3, 0, 4, 1))

# Data sets of two workers, one of which has a batch less than the other.
UNEVEN = Shards((22, 26))


class Replica(NamedTuple):
    """What a layer gives on one replica: gradients and weights after the call by name."""

    y: np.ndarray
    dx: np.ndarray
    gradients: Arrays
    state: Arrays


class Replicated:
    """A layer on the replicas of a strategy.

    Args:
        strategy: A strategy.
        kind: Of `shards.LAYERS`.
        eager: Whether no graph is traced.
        **options: Of the layer.
    """

    def __init__(self, strategy: Any, kind: str, eager: bool = False, **options: Any) -> None:
        self.strategy = strategy
        with strategy.scope():
            self.layer = built(kind, **options)
        self.weights = self.layer.get_weights()
        # So that two sizes of a batch lead to a graph for all of them.
        self.run = self._run if eager else tf.function(self._run, reduce_retracing=True)

    def __call__(self, shards: Shards) -> list[Replica]:
        """Return what the layer gives on the replicas of this process, one shard on each."""
        self.layer.set_weights(self.weights)
        arrays = [array for array in (shards.x, shards.dy, shards.mask) if array is not None]
        found = self.run(*(cut_to_replicas(self.strategy, shards.cut(a)) for a in arrays))
        results = zip(*(local(self.strategy, value) for value in found), strict=True)
        states = by_replica(self.strategy, self.layer.weights)
        names = [variable.name for variable in self.layer.trainable_variables]
        return [
            Replica(y, dx, dict(zip(names, gradients, strict=True)), state)
            for (y, dx, *gradients), state in zip(results, states, strict=True)
        ]

    def _run(self, x: Any, dy: Any, mask: Any = None) -> Any:
        return self.strategy.run(self._step, (x, dy, mask))

    def _step(self, x: Any, dy: Any, mask: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = self.layer(x, training=True, mask=mask)
        variables = [variable.value for variable in self.layer.trainable_variables]
        return y, *tape.gradient(y, [x, *variables], dy)


def on_pairs(strategy: Any, **how: Any) -> dict[tuple[str, str], list[Replica]]:
    """Return what each layer gives on each pair of shards."""
    layers = {kind: Replicated(strategy, kind, **how) for kind in KINDS}
    return {(kind, name): layers[kind](PAIRS[name]) for kind, name in CASES}


def cut_to_replicas(strategy: Any, parts: list[np.ndarray]) -> Any:
    """Give each replica its part."""
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )


def local(strategy: Any, value: Any) -> list[np.ndarray]:
    """Return what each replica of this process has."""
    return [part.numpy() for part in strategy.experimental_local_results(value)]


def by_replica(strategy: Any, variables: list[Any]) -> list[Arrays]:
    """Return the variables of each replica of this process, by name."""
    values = zip(*(local(strategy, variable.value) for variable in variables), strict=True)
    names = [variable.name for variable in variables]
    return [dict(zip(names, replica, strict=True)) for replica in values]


def by_name(layer: Any) -> Arrays:
    """Return the weights of a layer as one reads them outside of the replicas."""
    names = [variable.name for variable in layer.weights]
    return dict(zip(names, layer.get_weights(), strict=True))


def network(**options: Any) -> keras.Model:
    """Return a network whose initial weights are always the same.

    Args:
        **options: Of its normalization layers.
    """
    keras.utils.set_random_seed(7)
    layers = [
        keras.layers.Dense(12),
        keras_bn.BatchNormalization(**options),
        keras.layers.Activation("tanh"),
        keras.layers.Dense(8),
        keras_bn.BatchRenormalization(rmax_steps=(1, 5), dmax_steps=(1, 5), **options),
        keras.layers.Dense(TARGETS),
    ]
    return keras.Sequential([keras.Input((FEATURES,)), *layers])


def optimizer() -> keras.optimizers.Optimizer:
    """Return what all networks here are trained with."""
    return keras.optimizers.SGD(0.05, momentum=0.9)


def batches() -> Iterator[tuple[np.ndarray, ...]]:
    """Return the data in batches."""
    return zip(*(np.split(part, STEPS) for part in data()), strict=True)


def step(model: keras.Model, optimizer: keras.optimizers.Optimizer, x: Any, y: Any) -> None:
    """Take a step of training with a global batch, or with a part of it on each replica."""
    with tf.GradientTape() as tape:
        # By the size of the global batch: the gradients of the replicas are added.
        loss = tf.reduce_sum((model(x, training=True) - y) ** 2) / BATCH
    variables = model.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))


def data(samples: int = SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Return what a network is trained on; the batches of each replica differ much."""
    draw = np.random.default_rng(11)
    x = draw.normal(2.0, 1.0, (samples, FEATURES)).astype("float32")
    x[1::2] *= 3.0
    return x, np.tanh(x[:, :TARGETS] - x[:, TARGETS:])


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Collect the sums over replicas that are asked for: the replica of each."""
    found: list[int] = []
    original = tf.distribute.ReplicaContext.all_reduce

    def all_reduce(context: Any, *arguments: Any, **options: Any) -> Any:
        # Within a graph it is a tensor.
        found.append(int(tf.get_static_value(context.replica_id_in_sync_group)))
        return original(context, *arguments, **options)

    tf.distribute.ReplicaContext.all_reduce = all_reduce
    try:
        yield found
    finally:
        tf.distribute.ReplicaContext.all_reduce = original


def hand_over(results: Any, path: str) -> None:
    """Write what a program found, for its test to read."""
    Path(path).write_bytes(pickle.dumps(results))
