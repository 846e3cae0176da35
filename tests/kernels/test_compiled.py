"""The passes in C beside the float64 reference: any layout, dtype and number of threads."""

import shutil
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest

from keras_bn.core.affine import Affine, Learned
from keras_bn.core.estimators import Correction, Limits
from keras_bn.core.pooling import Pooling
from keras_bn.kernels import reference
from keras_bn.kernels.compiled import library
from tests.kernels import hard
from tests.kernels.compiled_cases import (
    CASES,
    compare,
    compare_groups,
    compare_output,
    compare_weighted,
    drawn,
    drawn_groups,
    drawn_to_correct,
    every_batch,
    every_case,
    every_large_case,
    every_learned,
    every_limit,
    every_weight,
)

if keras.backend.backend() != "torch":
    pytest.skip("the passes serve PyTorch", allow_module_level=True)
if library() is None:
    pytest.skip("built without a compiler, or switched off", allow_module_level=True)

import torch

import keras_bn
from keras_bn import kernels
from keras_bn.kernels import torch as torch_kernel
from keras_bn.kernels.normalization import Plan
from keras_bn.kernels.torch import compiled, passes

U = hard.unit_roundoff("float32")


def tensor(array):
    half = array.dtype == ml_dtypes.bfloat16
    found = torch.from_numpy(array.astype("float32") if half else array)
    return found.bfloat16() if half else found


def by_passes(x, dy, learned, axes, dtype):
    """Return y, the moments, and the gradients."""
    plan = Plan(Pooling(axes), hard.EPSILON, dtype)
    y, moments, kept = passes.normalize(x, learned, plan)
    return y, moments, passes.gradients(x, dy, learned, kept, plan)


def by_any_way(x, dy, learned, axes, dtype):
    """Return the same, by the passes or, where they do not serve, in other ways."""
    given = [part.requires_grad_() for part in (x.detach(), *learned)]
    y, moments = kernels.normalize(
        given[0], Pooling(axes), Learned(*given[1:]), hard.EPSILON, dtype
    )
    return y.detach(), moments, torch.autograd.grad(y, given, dy)


def check(x, dy, gamma, beta, axes, *, how=by_passes, laid_out=lambda part: part, dtype="float32"):
    """Compare `normalize` and `gradients` with the reference."""
    learned = Learned(torch.from_numpy(gamma), torch.from_numpy(beta))
    given = laid_out(tensor(x)), laid_out(tensor(dy))
    y, moments, (dx, d_gamma, d_beta) = how(*given, learned, axes, dtype)
    found = [part.double().numpy() for part in (y, moments.variance, dx, d_gamma, d_beta)]
    compare(found, x, dy, gamma, beta, axes, dtype)


PROCESSORS = ["any processor", "AVX2", "AVX-512", "AVX-512 with bfloat16"]


@pytest.fixture(params=range(len(PROCESSORS)), ids=PROCESSORS)
def processor(request):
    """Take the passes for older processors, too; this one's, where it is older itself."""
    library().keras_bn_take_generation(request.param)
    yield
    library().keras_bn_take_generation(len(PROCESSORS) - 1)


DRAWS = {"near 0": (0.0, 300), "far": (1e4, 300), "without outliers": (0.5, 0)}


@every_case
@pytest.mark.parametrize(("mean", "outlier"), DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("processor")
def test_normalization_and_its_gradients_are_right(shape, axes, varied, mean, outlier, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*drawn(shape, axes, varied, mean, outlier=outlier), axes)
    finally:
        torch.set_num_threads(before)


@every_case
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.usefixtures("processor")
def test_half_precision_is_rounded_once(shape, axes, varied, dtype):
    check(*drawn(shape, axes, varied, 0.5, dtype), axes, dtype=dtype)


@every_large_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_that_no_cache_holds_are_as_right(shape, axes, varied, dtype):
    shape = shape if dtype == "float32" else (2 * shape[0], *shape[1:])
    check(*drawn(shape, axes, varied, 0.5, dtype), axes, how=by_any_way, dtype=dtype)


MIXED = [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")]


@every_case
@pytest.mark.parametrize(("given", "asked"), MIXED, ids=map("-".join, MIXED))
def test_the_output_may_have_another_dtype(shape, axes, varied, given, asked):
    x, _, *learned = drawn(shape, axes, varied, 0.5, given)
    plan = Plan(Pooling(axes), hard.EPSILON, asked)
    y, _, _ = passes.normalize(tensor(x), Learned(*map(tensor, learned)), plan)
    compare_output(y.double().numpy(), x.astype("float64"), *learned, axes, asked)


@every_case
@pytest.mark.parametrize(("given", "sloped"), MIXED, ids=map("-".join, MIXED))
def test_the_slope_may_have_another_dtype(shape, axes, varied, given, sloped):
    narrow = sloped if given == "float32" else given
    x, dy, *learned = drawn(shape, axes, varied, 0.5, narrow)
    check(x.astype(given), dy.astype(sloped), *learned, axes, dtype=given)


LAYOUTS = {
    "reversed": lambda part: (
        part.permute(*range(part.ndim)[::-1]).contiguous().permute(*range(part.ndim)[::-1])
    ),
    "with gaps": lambda part: torch.stack((part, part), 0)[1],
    "every second": lambda part: torch.stack((part, part), -2).flatten(-3, -2)[..., ::2, :],
    "cut out": lambda part: torch.nn.functional.pad(part, (3, 2, 1, 1))[..., 1:-1, 3:-2],
    "every third": lambda part: part.repeat_interleave(3, -1)[..., ::3],
}


@every_case
@pytest.mark.parametrize("laid_out", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_may_lie_in_any_order(shape, axes, varied, laid_out):
    check(*drawn(shape, axes, varied), axes, how=by_any_way, laid_out=laid_out)


def test_the_gradient_may_lie_otherwise_than_the_input():
    shape, axes, varied = CASES["images"]
    x, dy, gamma, beta = drawn(shape, axes, varied)
    plan, learned = Plan(Pooling(axes), 1e-3, "float32"), Learned(*map(tensor, (gamma, beta)))
    _, _, kept = passes.normalize(tensor(x), learned, plan)
    alike = passes.gradients(tensor(x), tensor(dy), learned, kept, plan)
    turned = LAYOUTS["reversed"](tensor(dy))
    for found, wanted in zip(
        passes.gradients(tensor(x), turned, learned, kept, plan), alike, strict=True
    ):
        assert torch.equal(found, wanted)


# A sum hands back one number that stands for all: memory without elements to read one by one.
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("kind", [keras_bn.BatchNormalization, keras_bn.BatchRenormalization])
def test_the_gradient_may_be_one_number(kind, masked):
    layer, x = kind(), torch.randn(40, 33, 8).requires_grad_()
    layer.build(x.shape)
    mask = torch.rand(40, 33) < 0.7 if masked else None
    weights = [weight.value for weight in layer.trainable_variables]
    results = []
    for dy in (torch.tensor(3.0).expand(x.shape), torch.full(x.shape, 3.0)):
        y = layer(x, training=True, mask=mask)
        results.append(torch.autograd.grad(y, [x, *weights], dy))
    for found, wanted in zip(*results, strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 130, 24), (2, 3000, 24)], ids=["many", "few"])
@pytest.mark.parametrize("axis", [1, 2], ids=["first", "last"])
def test_groups_are_merged_as_the_core_merges_them(shape, axis):
    x, pooling = drawn_groups(axis, shape)
    y, *_ = passes.normalize(tensor(x), Learned(None, None), Plan(pooling, hard.EPSILON, "float32"))
    compare_groups(y, x, axis)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.usefixtures("processor")
@every_weight
def test_weights_count_and_what_lies_under_a_0_does_not(axes, sizes):
    def moments(x, weights, count):
        found = compiled.moments(tensor(x), tensor(weights), torch.from_numpy(count), axes)
        return [part.numpy() for part in found]

    compare_weighted(moments, sizes, axes)


@pytest.mark.parametrize("axes", [(0,), (1,)], ids=str)
def test_a_first_element_that_hardly_counts_may_lie_anywhere(axes):
    x, weights = np.random.default_rng(0).normal(0, 1, (900, 900)), np.ones((900, 900))
    first = (0, slice(None)) if axes == (0,) else (slice(None), 0)
    x[first], weights[first] = 1e6, 1e-20
    x, weights = x.astype("float32"), weights.astype("float32")
    exact = reference.moments(x, axes, weights)
    count = torch.from_numpy(np.asarray(exact.count, "float32"))
    _, _, m2 = compiled.moments(tensor(x), tensor(weights), count, axes)
    assert hard.share(m2.numpy() / exact.count - exact.variance, 8 * U * exact.variance) <= 1


# A sum of weights is rounded to float32: what that is off by counts as far as the pivot is.
@pytest.mark.parametrize("deviations", [2.5, 5.0, 60.0])
def test_a_rounded_sum_of_weights_does_not_count_by_the_first_element(deviations):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(0, 1, (901, 64)), rng.uniform(0.1, 2, (901, 64)).astype("float32")
    x[0] = deviations
    x = x.astype("float32")
    exact = reference.moments(x, (0,), weights)
    count = torch.from_numpy(np.asarray(exact.count, "float32"))
    _, _, m2 = compiled.moments(tensor(x), tensor(weights), count, (0,))
    assert hard.share(m2.numpy() / exact.count - exact.variance, 8 * U * exact.variance) <= 1


@every_limit
@every_learned
@every_batch
def test_sets_are_corrected_as_the_core_corrects_them(shape, learned, limits):
    big, kept = drawn_to_correct(shape)
    x, dy, mean, stddev, gamma, beta = map(tensor, big + kept)
    ends = Limits(*(None if end is None else torch.tensor(end) for end in limits))
    correct = Correction(mean, stddev, ends, 1e-3)
    given = Learned(gamma, beta) if learned else Learned(None, None)
    pooling = Pooling((x.ndim - 2,))
    whole = Plan(pooling, 1e-3, "float32", correct)
    results = []
    for plan in (whole, whole._replace(correct=lambda batch: correct(batch))):
        parts = [part.clone().requires_grad_() for part in (x, *given.given)]
        y, _ = torch_kernel.normalize(parts[0], given.filled(parts[1:]), plan)
        results.append([y.detach(), *torch.autograd.grad(y, parts, dy)])
    assert passes.normalize(x, given, whole)[2].correction is not None
    for found, wanted in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


def test_what_is_small_may_be_broadcast():
    x, dy = (torch.randn(50, 60, 8, generator=torch.manual_seed(i)) for i in range(2))
    center, scale = torch.randn(1, 1, 8), torch.randn(50, 1, 8)
    y = compiled.mapped(x, Affine(center, scale, None), torch.float32)
    assert torch.allclose(y, (x - center) * scale, atol=1e-6)
    dx = compiled.combined(x, dy, center, (scale, center, None), torch.rand(50, 60, 1), None)
    assert dx.shape == x.shape


UNSERVED = {
    "float64": lambda x: x.double(),
    "empty": lambda x: x[:0],
    "meta": lambda x: x.to("meta"),
    "negated view": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("given", UNSERVED.values(), ids=UNSERVED)
def test_what_is_not_served_is_refused(given):
    x = given(torch.randn(40, 8))
    assert compiled.moments(x, None, 40, (0,)) is None


# A line of memory has gaps, or holds one number again and again.
@pytest.mark.parametrize("axes", [(0,), (1,)], ids=str)
def test_lines_with_gaps_are_copied_before(axes):
    x = torch.randn(40, 24, generator=torch.manual_seed(0))
    for part in (x[:, ::3], x[:, :1].expand(-1, 8)):
        found, dense = (compiled.moments(given, None, 8, axes) for given in (part, part.clone()))
        assert all(map(torch.equal, found, dense))


# Whoever writes down what is done must find what runs without this package.
def test_what_is_traced_holds_no_operation_of_ours():
    def normalized(x):
        return kernels.normalize(x, Pooling((1,)), Learned(None, None), 1e-3, "float32")[0]

    x, other = torch.randn(2, 40, 8)
    traced = torch.fx.experimental.proxy_tensor.make_fx(normalized)(x)
    assert not [node for node in traced.graph.nodes if "keras_bn" in str(node.target)]
    assert torch.allclose(traced(other), normalized(other), atol=1e-6)


def test_a_built_package_has_the_passes_wherever_there_is_a_compiler():
    folder = Path(compiled.__file__).parents[1] / "compiled"
    assert bool(list(folder.glob("passes.*.so"))) >= bool(shutil.which("cc"))
