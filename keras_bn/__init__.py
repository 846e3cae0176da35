"""Normalization for Keras 3: batch normalization and its family on every backend."""

from keras_bn import layers
from keras_bn.layers import (
    BatchNormalization,
    BatchRenormalization,
    FeatureScaling,
    FixupBias,
    FixupBranch,
    FixupInitializer,
    FixupScale,
    GroupNormalization,
    InstanceNormalization,
    LayerNormalization,
    RMSNormalization,
    WeightNormalization,
)

__all__ = [
    "BatchNormalization",
    "BatchRenormalization",
    "FeatureScaling",
    "FixupBias",
    "FixupBranch",
    "FixupInitializer",
    "FixupScale",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "WeightNormalization",
    "layers",
]

__version__ = "0.1.0"
