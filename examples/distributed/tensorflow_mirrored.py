"""Batches of two per replica under `tf.distribute`, with and without synchronized statistics.

    KERAS_BACKEND=tensorflow python examples/distributed/tensorflow_mirrored.py [--replicas 4]

Makes logical devices of this machine's CPU and trains the same small network on scikit-learn's
digits with `fit`: on one device with the whole batch, then under MirroredStrategy with two samples
of it on each replica, once with `synchronized=True` and once without. Prints a line per epoch, and
at the end the accuracy on the test images of what a save of each would keep. About a minute.

What to look for: synchronized, the replicas train as one device does on the whole batch. Without,
each normalizes by its own two images.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import tensorflow as tf
from task import load_data, network

# Beside `task`, which tells where it lies.
from reporting import table, versions  # isort: skip

PER_REPLICA = 2
OPTIMIZER = {"learning_rate": 0.01, "momentum": 0.9}


def strategy_of(count: int) -> tf.distribute.Strategy:
    """Return a strategy of replicas on logical devices of the CPU."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )
    return tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(count)])


def accuracy(
    strategy: tf.distribute.Strategy, batch: int, epochs: int, synchronized: bool
) -> tuple[float, float]:
    """Train once.

    Args:
        strategy: Where.
        batch: Samples of all replicas together in a step.
        epochs: How often all images are seen.
        synchronized: Whether the replicas share their statistics.

    Returns:
        Loss and accuracy on the test images, on one device.
    """
    train, digits, test, test_digits = load_data()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with strategy.scope():
        model = network(synchronized=synchronized)
        # Keras 3.15.1 does not compile by XLA under MirroredStrategy.
        model.compile(
            keras.optimizers.SGD(**OPTIMIZER), loss, metrics=["accuracy"], jit_compile=False
        )
    model.fit(train, digits, batch_size=batch, epochs=epochs, verbose=2)
    alone = network()
    # The mean over the replicas, where they have statistics of their own.
    alone.set_weights(model.get_weights())
    alone.compile(loss=loss, metrics=["accuracy"])
    found: list[float] = alone.evaluate(test, test_digits, verbose=0)
    return found[0], found[1]


def main() -> None:
    """Train in all three ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", type=int, choices=(2, 3, 4), default=4)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    count = options.replicas
    mirrored, batch = strategy_of(count), count * PER_REPLICA
    where = f"{count} replicas x {PER_REPLICA}"
    ways = {
        f"one device x {batch}": (tf.distribute.get_strategy(), False),
        f"{where}, synchronized": (mirrored, True),
        f"{where}, each for itself": (mirrored, False),
    }
    rows = []
    for name, (strategy, synchronized) in ways.items():
        print(f"\n{name}", flush=True)
        loss, share = accuracy(strategy, batch, options.epochs, synchronized)
        rows.append([name, f"{loss:.3f}", f"{share:.1%}"])
    print(f"\n{versions()}; {options.epochs} epochs of 1200 images")
    print(table(["replicas x batch of each", "test loss", "test accuracy"], rows))


if __name__ == "__main__":
    main()
