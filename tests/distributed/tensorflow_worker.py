"""One of two workers under MultiWorkerMirroredStrategy; `tensorflow_workers.py` starts it.

    python tests/distributed/tensorflow_worker.py TASK FOLDER

Writes what it found to FOLDER; `test_tensorflow.py` says what it must be.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from tests.distributed import tensorflow_replicas as replicas
from tests.distributed.tensorflow_workers import DIED, WORKERS
from tests.oracle import Arrays

TIMEOUT = 10  # of a collective [s]


def agreeing(strategy: Any, index: int) -> dict[str, Any]:
    """Return what all that must work gives; then worker 1 stops a step before the other."""
    return {
        "shards": replicas.on_pairs(strategy, synchronized=True),
        "trained": trained(strategy, index),
        "uneven": uneven(strategy),
        "read": read(strategy),
        "short": end(strategy, steps=3 - index, pause=TIMEOUT + 1),
    }


def dying(strategy: Any, index: int) -> dict[str, Any]:
    """Return how training ends where worker 1 dies between two steps."""
    if index == 1:
        end(strategy, steps=2)
        os._exit(DIED)
    return {"dead": end(strategy, steps=3)}


def normalization(strategy: Any, **options: Any) -> keras_bn.BatchNormalization:
    with strategy.scope():
        layer = keras_bn.BatchNormalization(**options)
        layer.build((None, replicas.FEATURES))
    return layer


def trained(strategy: Any, index: int) -> list[np.ndarray]:
    """Return the weights of a network after a custom loop over global batches.

    The first worker saves them, without the other, and returns those of the file.
    """
    with strategy.scope():
        model = replicas.network(synchronized=True)
        optimizer = replicas.optimizer()
        optimizer.build(model.trainable_variables)

    def step(x: Any, y: Any) -> None:
        replicas.step(model, optimizer, x, y)

    @tf.function
    def train(x: Any, y: Any) -> None:
        strategy.run(step, (x, y))

    for batch in replicas.batches():
        train(*(replicas.cut_to_replicas(strategy, np.split(part, WORKERS)) for part in batch))
    if index == 0:
        with tempfile.TemporaryDirectory() as folder:
            model.save(f"{folder}/model.keras")
            model = keras.models.load_model(f"{folder}/model.keras")
    return model.get_weights()


def uneven(strategy: Any) -> Arrays:
    """Return what a layer keeps of data sets of uneven lengths; TensorFlow fills up the shorter."""
    layer = normalization(strategy, synchronized=True)

    def own(context: Any) -> tf.data.Dataset:
        x = replicas.UNEVEN.cut(replicas.data()[0])[context.input_pipeline_id]
        return tf.data.Dataset.from_tensor_slices(x).batch(replicas.BATCH // WORKERS)

    def step(x: Any) -> None:
        layer(x, training=True)

    @tf.function
    def train(x: Any) -> None:
        strategy.run(step, (x,))

    for x in strategy.distribute_datasets_from_function(own):
        train(x)
    return replicas.by_name(layer)


def read(strategy: Any) -> dict[str, Arrays]:
    """Return what a worker keeps that is not synchronized, and what all of them read together."""
    layer = normalization(strategy)
    x = replicas.cut_to_replicas(strategy, np.split(replicas.data()[0], WORKERS))

    def step(x: Any) -> None:
        layer(x, training=True)

    strategy.run(step, (x,))
    (own,) = replicas.by_replica(strategy, layer.weights)
    return {"own": own, "together": replicas.by_name(layer)}


def end(strategy: Any, steps: int, pause: float = 0) -> tuple[str, str, float]:
    """Return the error that steps of a synchronized layer end with, and after how long [s].

    Args:
        strategy: A strategy.
        steps: How many.
        pause: How long to stay after steps without an error [s].
    """
    layer = normalization(strategy, synchronized=True)
    start = time.monotonic()

    def step() -> None:
        layer(tf.ones((2, replicas.FEATURES)), training=True)

    @tf.function
    def train() -> None:
        strategy.run(step)

    try:
        for _ in range(steps):
            start = time.monotonic()
            train()
            keras.ops.convert_to_numpy(layer.moving_mean)
    except tf.errors.OpError as error:
        return type(error).__name__, error.message, time.monotonic() - start
    time.sleep(pause)
    return "", "", 0.0


def main() -> None:
    """Do a task and write what is found."""
    task, folder = sys.argv[1:]
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=TIMEOUT)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    found = {"agreeing": agreeing, "dying": dying}[task](strategy, index)
    replicas.hand_over(found, f"{folder}/{index}.pickle")


if __name__ == "__main__":
    main()
