"""The layers."""

from keras_bn.layers.batch_normalization import BatchNormalization
from keras_bn.layers.batch_renormalization import BatchRenormalization
from keras_bn.layers.feature_scaling import FeatureScaling
from keras_bn.layers.group_normalization import GroupNormalization

__all__ = ["BatchNormalization", "BatchRenormalization", "FeatureScaling", "GroupNormalization"]
