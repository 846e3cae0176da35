"""Layers and a custom loop under MultiWorkerMirroredStrategy in two processes.

    python tests/distributed/tensorflow_workers.py TASK FOLDER

Starts itself twice; each worker writes what it found to FOLDER. `test_tensorflow.py` says what it
must be.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

WORKERS = 2
TIMEOUT = 5  # of a collective [s]
TOO_LATE = 3 * TIMEOUT
ADDRESS = "127.0.0.1"


def main() -> None:
    """Start the workers, or be one of them."""
    task, folder = sys.argv[1:]
    if "TF_CONFIG" not in os.environ:
        sys.exit(start(task, folder))
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    # TensorFlow is imported by the workers alone: it takes seconds.
    from tests.distributed.tensorflow_replicas import hand_over

    hand_over(TASKS[task](strategy(), index), f"{folder}/{index}.pickle")


def start(task: str, folder: str) -> int:
    """Start the workers; return 0 once all have ended, whatever became of them."""
    addresses = [f"{ADDRESS}:{reserved_port()}" for _ in range(WORKERS)]
    processes = []
    for index in range(WORKERS):
        config = {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": index},
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, task, folder],
                env=os.environ | {"TF_CONFIG": json.dumps(config)},
            )
        )
    codes = [process.wait() for process in processes]
    print("exit codes", codes)
    return int(any(codes) and task != "dies")


def reserved_port() -> int:
    """Return a port that the system gives to nobody who does not ask for it by number.

    TensorFlow must know all ports before a worker has one. A connection that was closed here
    keeps its port out of the system's choice for a minute.
    """
    with socket.create_server((ADDRESS, 0)) as server:
        port = int(server.getsockname()[1])
        with socket.create_connection((ADDRESS, port)):
            server.accept()[0].close()
    return port


def strategy() -> Any:
    import tensorflow as tf

    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=TIMEOUT)
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def agrees(strategy: Any, index: int) -> dict[str, Any]:
    """Do all that must work; then one worker stops a step before the other."""
    from tests.distributed import tensorflow_replicas as replicas
    from tests.distributed.shards import PAIRS

    shards = {
        (kind, name): replicas.on_shards(strategy, PAIRS[name], kind, synchronized=True)
        for kind, name in replicas.CASES
    }
    results = {
        "shards": shards,
        "trained": trained(strategy),
        "uneven": uneven(strategy, index),
        "saved": saved(strategy, index),
    }
    return results | {"short": ended(strategy, steps=3 - index, stay=index == 1)}


def dies(strategy: Any, index: int) -> dict[str, Any]:
    """Let one worker die between two steps."""
    if index == 1:
        ended(strategy, steps=2)
        os._exit(9)
    return {"dead": ended(strategy, steps=3)}


def trained(strategy: Any) -> list[np.ndarray]:
    """Return the weights after a custom loop over global batches."""
    import tensorflow as tf

    import keras_bn
    from tests.distributed import tensorflow_replicas as replicas

    with strategy.scope():
        model = replicas.network(lambda: keras_bn.BatchNormalization(synchronized=True))
        optimizer = replicas.optimizer()
        optimizer.build(model.trainable_variables)

    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            # The mean over the global batch: the gradients of the replicas are added.
            loss = tf.reduce_sum((model(x, training=True) - y) ** 2) / replicas.BATCH
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    train = tf.function(lambda x, y: strategy.run(step, (x, y)))
    for batch in replicas.batches():
        train(*(replicas.cut_to_replicas(strategy, np.split(part, WORKERS)) for part in batch))
    return model.get_weights()


def uneven(strategy: Any, index: int) -> list[np.ndarray]:
    """Return what a layer keeps where one worker has a batch less and TensorFlow fills up."""
    import tensorflow as tf

    import keras_bn
    from tests.distributed import tensorflow_replicas as replicas

    with strategy.scope():
        layer = keras_bn.BatchNormalization(synchronized=True)
        layer.build((None, replicas.FEATURES))

    def own(context: Any) -> tf.data.Dataset:
        x, _ = replicas.data()
        x = np.split(x, [2 * replicas.BATCH])[context.input_pipeline_id]
        return tf.data.Dataset.from_tensor_slices(x[: (3 - index) * replicas.BATCH // 2]).batch(
            replicas.BATCH // 2
        )

    train = tf.function(lambda x: strategy.run(lambda x: layer(x, training=True), (x,)))
    for x in strategy.distribute_datasets_from_function(own):
        train(x)
    return layer.get_weights()


def saved(strategy: Any, index: int) -> dict[str, Any]:
    """Return what each worker keeps that is not synchronized, and what all read together."""
    import keras_bn
    from tests.distributed import tensorflow_replicas as replicas

    with strategy.scope():
        layer = keras_bn.BatchRenormalization()
        layer.build((None, replicas.FEATURES))
    x = replicas.cut_to_replicas(strategy, np.split(replicas.data()[0], WORKERS))
    strategy.run(lambda x: layer(x, training=True), (x,))
    (each,) = replicas.by_replica(strategy, layer.weights)
    return {"each": each, "read": replicas.by_name(layer)}


def ended(strategy: Any, steps: int, stay: bool = False) -> tuple[str, str, float]:
    """Return the error that steps of a synchronized layer end with, and after how long [s]."""
    import tensorflow as tf

    import keras_bn

    with strategy.scope():
        layer = keras_bn.BatchNormalization(synchronized=True)
        layer.build((None, 4))
    train = tf.function(lambda: strategy.run(lambda: layer(tf.ones((2, 4)), training=True)))
    start = time.monotonic()
    try:
        for _ in range(steps):
            start = time.monotonic()
            train()
    except tf.errors.OpError as error:
        return type(error).__name__, error.message, time.monotonic() - start
    if stay:
        time.sleep(TOO_LATE)
    return "", "", time.monotonic() - start


TASKS = {"agrees": agrees, "dies": dies}

if __name__ == "__main__":
    main()
