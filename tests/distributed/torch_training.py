"""Checks of models that are trained, each run by every process of a group at the same time."""

import functools
import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import keras_bn
from tests.distributed.torch_values import compiled

SHAPE, CLASSES, STEPS = (6, 6, 2), 3, 4
BATCH = 8
SIZES = (5, 3)  # samples of each process in every batch


def network(is_small: bool = False, **options: Any) -> keras.Model:
    """Return a model, always with the same weights; a small one is soon compiled."""
    convolution = [keras.layers.Conv2D(4, 3, use_bias=False)]
    renormalization = [keras_bn.BatchRenormalization(rmax_steps=(0, STEPS), **options)]
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            *([] if is_small else convolution),
            keras_bn.BatchNormalization(momentum=0.9, **options),
            keras.layers.Activation("relu"),
            *([] if is_small else renormalization),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES),
        ]
    )
    # Not Keras' seed: to set it imports TensorFlow, if there (Keras 3.15).
    draw = np.random.default_rng(0)
    drawn = [w if w.ndim < 2 else draw.normal(0.0, 0.3, w.shape) for w in model.get_weights()]
    model.set_weights(drawn)
    return model


def batches(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return batches of all processes: inputs whose mean depends on the process, and classes."""
    draw = np.random.default_rng(1)
    centers = (np.arange(BATCH) >= SIZES[0]).reshape(-1, 1, 1, 1)
    return [
        (
            draw.normal(centers, 1.0, (BATCH, *SHAPE)).astype("float32"),
            draw.integers(CLASSES, size=BATCH),
        )
        for _ in range(number)
    ]


def trained(
    model: keras.Model, module: Any, part: slice, replicas: int, accumulated: int = 1
) -> keras.Model:
    """Train a model on a part of every batch.

    Args:
        model: What is trained.
        module: What is called: the model, or what is wrapped around it.
        part: Which samples of every batch.
        replicas: By which the gradients will be divided.
        accumulated: Batches whose gradients are summed for a step.
    """
    weights = [v.value for v in model.trainable_variables]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    for number, (x, classes) in enumerate(batches(STEPS * accumulated), 1):
        is_last = number % accumulated == 0
        with nullcontext() if is_last or module is model else module.no_sync():
            logits = module(torch.from_numpy(x[part]), training=True)
            loss = torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(classes[part]), reduction="sum"
            )
            # The mean over the samples of all processes, whose gradients are averaged.
            (loss * replicas / BATCH).backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
    return model


@functools.cache
def replica(
    is_compiled: bool = False,
    accumulated: int = 1,
    sizes: tuple[int, int] = SIZES,
    **options: Any,
) -> keras.Model:
    """Return the model that all processes have trained together."""
    model = network(is_compiled, **options)
    module = DistributedDataParallel(model)
    if is_compiled:
        module = torch.compile(module, backend="aot_eager")
    part = (slice(0, sizes[0]), slice(sizes[0], BATCH))[distributed.get_rank()]
    return trained(model, module, part, len(sizes), accumulated)


def distance(
    folder: str, is_compiled: bool = False, accumulated: int = 1, **options: Any
) -> dict[str, Any]:
    """Return how far the weights are from those of one process, and a digest of them."""
    model = replica(is_compiled=is_compiled, accumulated=accumulated, **options)
    single = network(is_compiled)
    trained(single, single, slice(None), 1, accumulated)
    pairs = zip(model.get_weights(), single.get_weights(), strict=True)
    return {"distance": max(float(np.max(np.abs(a - b))) for a, b in pairs)} | digest(model)


def saved(folder: str) -> list[dict[str, Any]]:
    """Return digests of the trained model and of what is loaded after rank 0 has saved it."""
    path = Path(folder, "model.keras")
    model = replica(synchronized=True)
    if distributed.get_rank() == 0:
        model.save(path)
    distributed.barrier()
    return [digest(model), digest(keras.saving.load_model(path))]


def digest(model: keras.Model) -> dict[str, str]:
    """Return digests of the weights and of what the model predicts."""
    predicted = model(torch.from_numpy(batches(1)[0][0])).detach().numpy()
    weights = b"".join(weight.tobytes() for weight in model.get_weights())
    hashes = {"weights": weights, "predicted": predicted.tobytes()}
    return {name: hashlib.sha256(value).hexdigest() for name, value in hashes.items()}


CHECKS: dict[str, Callable[[str], object]] = {
    "trained": functools.partial(distance, synchronized=True),
    "trained, not synchronized": functools.partial(distance, synchronized=False),
    "trained, accumulated": functools.partial(distance, synchronized=True, accumulated=2),
    "trained, 8 and 0": functools.partial(distance, synchronized=True, sizes=(BATCH, 0)),
    "trained, compiled": functools.partial(distance, synchronized=True, is_compiled=True),
    "saved": saved,
    "compiled": compiled,
}
