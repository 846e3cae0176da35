"""The kernels in TensorFlow: custom gradients that keep `x` and nothing else of its size."""

from keras_bn.kernels.steps import Kernel
from keras_bn.kernels.tensorflow import compiled, passes
from keras_bn.kernels.tensorflow.autograd import run

harmless, has_passes = passes.harmless, compiled.has_passes
_kernel = Kernel(passes, run)
moments, apply, normalize = _kernel.moments, _kernel.apply, _kernel.normalize
