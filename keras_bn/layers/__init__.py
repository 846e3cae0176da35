"""The layers."""

from keras_bn.layers.batch_normalization import BatchNormalization
from keras_bn.layers.batch_renormalization import BatchRenormalization
from keras_bn.layers.group_normalization import GroupNormalization
from keras_bn.layers.weight_normalization import WeightNormalization

__all__ = [
    "BatchNormalization",
    "BatchRenormalization",
    "GroupNormalization",
    "WeightNormalization",
]
