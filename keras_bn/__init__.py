"""Normalization for Keras 3: batch normalization and its family on every backend."""

from keras_bn import layers
from keras_bn.layers import (
    BatchNormalization,
    BatchRenormalization,
    GroupNormalization,
    WeightNormalization,
)

__all__ = [
    "BatchNormalization",
    "BatchRenormalization",
    "GroupNormalization",
    "WeightNormalization",
    "layers",
]

__version__ = "0.1.0"
