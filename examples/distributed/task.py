"""What the examples here train: a small convolutional network on the digits of scikit-learn."""

import sys
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_bn

# `reporting`, which all examples share, lies one folder up.
sys.path.append(str(Path(__file__).parents[1]))

CLASSES = 10
SHAPE = (8, 8, 1)
TRAIN = 1_200


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return images and digits to train with, then those to test with, always split alike."""
    digits = load_digits()
    images = (digits.images / digits.images.max()).astype("float32").reshape(-1, *SHAPE)
    train, test, train_digits, test_digits = train_test_split(
        images, digits.target.astype("int32"), train_size=TRAIN, random_state=0
    )
    return train, train_digits, test, test_digits


def network(seed: int = 0, **options: object) -> keras.Model:
    """Return the network, its weights drawn from a seed; it gives logits.

    Args:
        seed: For the initial weights: the same on every replica.
        **options: For each BatchNormalization, such as `synchronized=True`.
    """
    keras.utils.set_random_seed(seed)
    parts = [keras.Input(SHAPE)]
    for filters, strides in ((16, 1), (32, 2)):
        parts += [
            keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False),
            keras_bn.BatchNormalization(momentum=0.9, **options),
            keras.layers.Activation("relu"),
        ]
    parts += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(CLASSES)]
    return keras.Sequential(parts)
