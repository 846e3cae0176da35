"""The passes in C as operations of PyTorch: right, and in compiled code there to be used."""

import ctypes

import keras
import numpy as np
import pytest

from keras_bn.core.affine import Learned
from keras_bn.core.estimators import Correction, Limits
from keras_bn.core.pooling import Pooling
from keras_bn.kernels.compiled import library
from tests.kernels import hard
from tests.kernels.compiled_cases import (
    CASES,
    compare,
    compare_groups,
    drawn,
    drawn_groups,
    drawn_to_correct,
    every_corrected,
    every_handed,
    every_layer,
)

if keras.backend.backend() != "torch":
    pytest.skip("operations of PyTorch", allow_module_level=True)
if library() is None:
    pytest.skip("built without a compiler, or switched off", allow_module_level=True)

import torch
from torch._ops import OpOverload
from torch.nn import Parameter

import keras_bn
from keras_bn import kernels
from keras_bn.kernels.torch import operations
from tests.kernels.test_compiled import LAYOUTS, tensor


@pytest.fixture
def called(monkeypatch):
    """Return the names of the operations that are called with values, not traced."""
    names, call = set(), OpOverload.__call__

    def recorded(operation, *inputs, **options):
        if operation.namespace == "keras_bn" and type(inputs[0]) in (torch.Tensor, Parameter):
            names.add(operation._opname.removesuffix(f"_{operations._ENDING}"))
        return call(operation, *inputs, **options)

    monkeypatch.setattr(OpOverload, "__call__", recorded)
    return names


def compiled(function, backend="aot_eager"):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def gradients(function, inputs, *dy, is_any_size=False):
    """Return results and gradients."""
    given = [part.detach().requires_grad_() for part in inputs]
    if is_any_size:
        torch._dynamo.mark_dynamic(given[0], 0)
    first, *rest = function(*given)
    found = [first, *rest, *torch.autograd.grad(first, given, *dy)]
    return [part.detach().double().numpy() for part in found]


def whole(pooling, dtype="float32", correct=None):
    def function(x, *learned):
        given = Learned(*learned) if learned else Learned(None, None)
        y, moments = kernels.normalize(x, pooling, given, hard.EPSILON, dtype, correct=correct)
        return y, moments.variance

    return function


def check(x, dy, gamma, beta, axes, dtype="float32", backend="aot_eager", is_any_size=False):
    function = compiled(whole(Pooling(axes), dtype), backend)
    given = [x, torch.from_numpy(gamma), torch.from_numpy(beta)]
    found = gradients(function, given, dy, is_any_size=is_any_size)
    compare(found, *(part.double().numpy() for part in (x, dy)), gamma, beta, axes, dtype)


@every_handed
def test_normalization_and_its_gradients_are_right(shape, axes, varied, dtype, mean, called):
    x, dy, *learned = drawn(shape, axes, varied, mean, dtype)
    check(tensor(x), tensor(dy), *learned, axes, dtype)
    assert called == {"normalize", "gradients"}


# What PyTorch makes code of takes seconds each.
@pytest.mark.parametrize("case", ["columns", "images, channels first", "rows of two axes"])
@pytest.mark.parametrize("is_any_size", [False, True], ids=["known sizes", "any size"])
def test_code_that_is_made_around_them_is_right(case, is_any_size, called):
    shape, axes, varied = CASES[case]
    x, dy, *learned = drawn(shape, axes, varied, 1e4)
    big = map(tensor, (x, dy))
    check(*big, *learned, axes, backend="inductor", is_any_size=is_any_size)
    assert called == {"normalize", "gradients"}


@pytest.mark.parametrize("case", ["images", "rows that are not last", "two kept axes"])
@pytest.mark.parametrize("laid_out", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_memory_may_lie_in_any_order(case, laid_out, backend):
    shape, axes, varied = CASES[case]
    x, dy, *learned = drawn(shape, axes, varied)
    big = (laid_out(tensor(part)) for part in (x, dy))
    check(*big, *learned, axes, backend=backend)


def samples(x):
    """Return arguments of each operation, for an input of two axes."""
    rows, columns = torch.rand(x.shape[0], 1), torch.rand(6, 1, x.shape[1])
    counts = rows.sum().expand(1, x.shape[1]).contiguous()
    ends = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    dy, kept = torch.randn(x.shape), torch.rand(2, 1, x.shape[1]) + 1
    how, ghosts = (1, False, 1, 1e-3, True, True), x.reshape(2, 3, x.shape[1])
    return {
        "normalize": (x, [*columns[:2]], [], *how, False, x.dtype),
        "normalize corrected": (x, [], [*kept, ends], *how, False, x.dtype),
        "normalize ghosts": (ghosts, [], [], *how, True, x.dtype),
        "gradients": (x, dy, columns[:3], [columns[3]], False, 1, True),
        "gradients of nothing learned": (x, dy, columns[:3], [], False, 1, True),
        "gradients of corrected sets": (x, dy, columns[:5], [columns[5]], False, 1, True),
        "moments": (x, [], 1, True),
        "moments weighted": (x, [rows, counts], 1, True),
        "products": (x, dy, columns[0]),
        "mapped_products": (x, dy, *columns[:3], columns[3]),
        "mapped": (x, *columns[:3], [], False, torch.bfloat16),
        "mapped learned": (x, *columns[:3], [*columns[3:5]], True, x.dtype),
        "combined": (x, dy, *columns[:4], [], [columns[4]]),
        "combined weighted": (x, dy, *columns[:4], [rows], []),
        "moved": (*torch.rand(5, 9), 8.0, 0.9, -1.0),
    }


VIEWS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: torch.cat((x, x), 1).reshape(-1, x.shape[1])[::2],
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row repeated": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("name", samples(torch.randn(6, 5)))
def test_pytorch_knows_of_each_operation_what_it_gives(name, view):
    inputs = samples(view(torch.randn(6, 5, generator=torch.manual_seed(0))))[name]
    operation = getattr(operations, name.split()[0])
    torch.library.opcheck(operation, inputs)
    found, wanted = operation(*inputs), operation(inputs[0].contiguous(), *inputs[1:])
    torch.testing.assert_close(found, wanted)


def test_an_operation_that_fails_says_so():
    x, deep = torch.randn(6, 5), torch.randn((2,) * 12)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="keras_bn"):
            operations.mapped(x, *torch.rand(3, 1, 5), [], False, torch.float64)
        with pytest.raises(RuntimeError, match="keras_bn"):
            operations.moments(deep, [], 1, True)


# As PyTorch before 2.10 does.
def test_a_library_that_lacks_the_interface_gets_no_operations():
    lacking = ctypes.CDLL(library()._name)
    assert not library().keras_bn_implement_for_torch(ctypes.c_void_p(lacking._handle), b"none")
    assert not hasattr(torch.ops.keras_bn, "normalize_none")
    test_an_operation_that_fails_says_so()


@pytest.mark.parametrize("axis", [1, 2], ids=["first", "last"])
def test_groups_are_merged_as_the_core_merges_them(axis, called):
    x, pooling = drawn_groups(axis)
    found = gradients(compiled(whole(pooling)), [tensor(x)], torch.ones(x.shape))
    assert called == {"normalize", "gradients"}
    compare_groups(found[0], x, axis)


@every_corrected
def test_sets_are_corrected_as_the_core_corrects_them(shape, learned, limits, called):
    big, kept = drawn_to_correct(shape)
    x, dy, mean, stddev, gamma, beta = map(tensor, big + kept)
    ends = Limits(*(None if end is None else torch.tensor(end) for end in limits))
    correct = Correction(mean, stddev, ends, hard.EPSILON)
    pooling, results = Pooling((x.ndim - 2,)), []
    for own in (correct, lambda batch: correct(batch)):
        function = compiled(whole(pooling, correct=own))
        called.clear()
        results.append(gradients(function, [x, gamma, beta] if learned else [x], dy))
        assert ("normalize" in called) == (own is correct)
    for found, wanted in zip(*results, strict=True):
        assert np.allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


def built(kind, options, shape=(None, 5, 16)):
    layer = kind(**options)
    layer.build(shape)
    return layer


@every_layer
def test_a_layer_in_compiled_code_is_the_layer(kind, options, use, called):
    results = []
    for how in (compiled, lambda function: function):
        layer = built(kind, options)
        x = torch.randn(6, 5, 16, generator=torch.manual_seed(0)).requires_grad_()
        y = how(lambda x, layer=layer: torch.sin(layer(x, **use)).sum())(x)
        weights = [weight.value for weight in layer.trainable_variables]
        state = [weight.numpy() for weight in layer.non_trainable_variables]
        found = torch.autograd.grad(y, [x, *weights])
        results.append([*(part.numpy() for part in found), *state])
        # Compiled code joins what is done to statistics; else it is one call.
        moved = {"moved"} if state and how is not compiled else set()
        assert called == {"normalize", "gradients"} | moved
        called.clear()
    for found, wanted in zip(*results, strict=True):
        assert np.allclose(found, wanted, atol=1e-5)


def test_sets_are_merged_within_transforms_too(called):
    many = 1 + torch.rand(3, 4, 60, 7, generator=torch.manual_seed(0))

    def merged(x):
        given = (Pooling((0,)), Learned(None, None), hard.EPSILON, "float32")
        return kernels.normalize(x, *given, merges=True)[1][1:]

    found = torch.vmap(merged)(many)
    assert not called
    for x, *each in zip(many, *found, strict=True):
        for own, wanted in zip(each, merged(x), strict=True):
            assert torch.allclose(own, wanted, rtol=1e-5, atol=1e-6)
    assert called == {"normalize"}


# Keras' own state moves when a layer is called: PyTorch says so.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@every_layer
def test_what_is_exported_holds_no_operation_of_ours(kind, options, use):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = built(kind, options)

        def forward(self, x):
            return self.layer(x, **dict.fromkeys(use, False))

    x = torch.randn(6, 5, 16)
    for strict in (False, True):
        program = torch.export.export(Module(), (x,), strict=strict)
        assert not [node for node in program.graph.nodes if "keras_bn" in str(node.target)]


TRANSFORMS = {
    "vmap": (torch.vmap, lambda layer: layer),
    "grad": (torch.func.grad, lambda layer: lambda x: torch.sin(layer(x)).sum()),
    "jvp": (
        lambda f: lambda x: torch.func.jvp(f, (x,), (torch.cos(x),))[1],
        lambda layer: lambda x: torch.sin(layer(x)),
    ),
}


# An operation without derivatives would pass for a constant there. PyTorch loads its decompositions
# with a function that it has deprecated itself (torch 2.13, 2.14).
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(("transform", "made"), TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("kind", [keras_bn.GroupNormalization, keras_bn.LayerNormalization])
def test_transforms_within_compiled_code_get_plain_operations(kind, transform, made, called):
    layer = built(kind, {"groups": 4} if kind is keras_bn.GroupNormalization else {})
    function, x = transform(made(layer)), torch.randn(6, 3, 5, 16)
    x = x if transform is torch.vmap else x[:, 0]
    found = compiled(function)(x)
    assert not called
    assert torch.allclose(found, function(x), atol=1e-5)
