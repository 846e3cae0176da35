"""The layers."""

from keras_bn.layers.batch_normalization import BatchNormalization
from keras_bn.layers.batch_renormalization import BatchRenormalization
from keras_bn.layers.feature_scaling import FeatureScaling
from keras_bn.layers.fixup import FixupBias, FixupInitializer, FixupScale
from keras_bn.layers.fixup_branch import FixupBranch
from keras_bn.layers.group_normalization import GroupNormalization
from keras_bn.layers.instance_normalization import InstanceNormalization
from keras_bn.layers.layer_normalization import LayerNormalization, RMSNormalization
from keras_bn.layers.weight_normalization import WeightNormalization

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
]
