"""What only PyTorch offers: views, torch.func, hooks, and memory that can be counted."""

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn import kernels
from keras_bn.core.affine import standardize
from keras_bn.kernels import reference
from tests.kernels import hard

if keras.backend.backend() != "torch":
    pytest.skip("these are properties of PyTorch", allow_module_level=True)

import torch

from keras_bn.kernels.torch.sums import sum_over

U = hard.unit_roundoff("float32")


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(3, 2, shape)).to(dtype)


def normalized(x, weights=None, dtype="float64"):
    moments = kernels.moments(x, (0, 1), weights)
    return kernels.apply(x, standardize(moments, 1e-3), dtype)


def loss(x, weights=None):
    return torch.sin(normalized(x, weights)).sum()


# Each makes a view, of a tensor or of an array, whose channels stay last.
VIEWS = {
    "transposed": lambda x: x.swapaxes(0, 1),
    "space first in memory": lambda x: x.reshape(30, 24, 10).swapaxes(0, 1),
    "channels first in memory": lambda x: x.reshape(24, 10, 30).swapaxes(1, 2),
    "every second row": lambda x: x[::2],
    "every third column": lambda x: x[:, 1::3],
    "cropped": lambda x: x[3:-2, 2:-5],
    "one row repeated": lambda x: x[:1] + 0 * x[:3],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_need_not_be_contiguous(view):
    x = hard.channels((24, 30, 10), 2)
    y = reference.normalize(view(x), (0, 1), epsilon=hard.EPSILON)
    exact = reference.moments(view(x), (0, 1))
    found = normalized(view(torch.from_numpy(x)), dtype="float32").numpy()
    assert hard.share(found - y, hard.output_bound(y, exact, U)) <= 1


def test_an_expanded_view_is_as_good_as_a_copy():
    x = sample(1, 7, 3).expand(5, 7, 3)
    assert torch.allclose(normalized(x), normalized(x.clone()), atol=1e-14)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_gradients_reach_the_base_of_a_view(view):
    base = sample(24, 30, 10).requires_grad_()
    (found,) = torch.autograd.grad(loss(view(base)), base)
    copy = view(base).detach().clone().requires_grad_()
    (through_copy,) = torch.autograd.grad(loss(copy), copy)
    (expected,) = torch.autograd.grad(view(base), base, through_copy)
    assert torch.allclose(found, expected, atol=1e-12)


def saved_bytes(function, x) -> int:
    """Return how many bytes are kept for backward, each storage counted once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x)
    for tensor in kept_by(y.grad_fn):
        pack(tensor)
    return sum(storages.values())


def kept_by(node):
    """Find what the nodes of a graph keep without saving it, in what closures hold."""
    yield from tensors_in(getattr(node, "step", None))
    for following, _ in getattr(node, "next_functions", ()):
        yield from kept_by(following)


def tensors_in(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    inside = thing if isinstance(thing, tuple | list) else ()
    cells = getattr(thing, "__closure__", None) or ()
    for part in (*inside, *(cell.cell_contents for cell in cells)):
        yield from tensors_in(part)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_only_the_input_is_saved_for_backward(dtype, weighted):
    x = sample(32, 64, 16, dtype=getattr(torch, dtype)).requires_grad_()
    wide = torch.float64 if dtype == "float64" else torch.float32
    weights = torch.ones(32, 64, 1, dtype=wide) if weighted else None
    given = x.nbytes + (weights.nbytes if weighted else 0)
    per_channel = 16 * wide.itemsize
    saved = saved_bytes(lambda x: normalized(x, weights, dtype), x)
    assert given <= saved <= given + 16 * per_channel


def test_a_mask_adds_no_more_than_its_weights():
    layer, x = keras_bn.BatchNormalization(), sample(32, 64, 16, dtype=torch.float32)
    layer.build(x.shape)
    mask = torch.ones(32, 64, dtype=torch.bool)
    mask[::4] = False
    saved = saved_bytes(lambda x: layer(x, training=True, mask=mask), x.requires_grad_())
    assert x.nbytes < saved <= x.nbytes + 4 * mask.nbytes + 16 * 16 * 4


def test_an_activation_may_work_in_place_on_the_output():
    x = sample(8, 9, 3).requires_grad_()
    (found,) = torch.autograd.grad(torch.relu_(normalized(x)).square().sum(), x)
    (expected,) = torch.autograd.grad(torch.relu(normalized(x)).square().sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_pass_torchs_own_check(check, weighted):
    weights = torch.tensor([[1.0], [0.0], [0.5], [2.0]], dtype=torch.float64)[:, None]
    x = sample(4, 3, 2).requires_grad_()
    assert check(lambda x: normalized(x, weights if weighted else None), (x,))


# Layers that PyTorch's own kernels compute as a whole, for inputs of these shapes.
NATIVE = {
    "few samples": ((16, 3), keras_bn.BatchNormalization, {}),
    "few rows": ((5, 6), keras_bn.LayerNormalization, {}),
    "rows": ((40, 3), keras_bn.LayerNormalization, {}),
    "groups": ((2, 4, 5), keras_bn.GroupNormalization, {"groups": 2, "axis": 1}),
}


@pytest.mark.parametrize(("shape", "kind", "options"), NATIVE.values(), ids=NATIVE)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_through_native_kernels_pass_torchs_own_check(check, shape, kind, options):
    layer = kind(dtype="float64", **options)
    layer.build(shape)
    sizes = [(1, *shape), *(w.shape for w in layer.trainable_variables)]
    x, *learned = (sample(*size, seed=i).requires_grad_() for i, size in enumerate(sizes))
    fixed = layer.non_trainable_variables
    how = {"training": True} if fixed else {}

    def normalized(x, *learned):
        return layer.stateless_call(learned, fixed, x[0] - 3, **how)[0]

    assert check(normalized, (x, *learned))


def test_func_grad_is_autograd_grad():
    x = sample(4, 5, 3)
    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    assert torch.allclose(torch.func.grad(loss)(x.detach()), expected, atol=1e-13)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["x", "weights", "both"])
def test_vmap_is_a_loop(axes):
    x = sample(6, 4, 5, 3) if axes[0] == 0 else sample(4, 5, 3)
    weights = torch.from_numpy(np.random.default_rng(2).integers(0, 3, (6, 4, 5, 1)) / 2)
    weights = weights if axes[1] == 0 else weights[0]
    found = torch.vmap(normalized, axes)(x, weights)
    rows = [
        (x[i] if axes[0] == 0 else x, weights[i] if axes[1] == 0 else weights) for i in range(6)
    ]
    assert torch.allclose(found, torch.stack([normalized(*row) for row in rows]), atol=1e-13)


def test_vmap_of_gradients_is_a_loop():
    x = sample(6, 4, 5, 3)
    expected = torch.stack([torch.func.grad(loss)(row) for row in x])
    assert torch.allclose(torch.vmap(torch.func.grad(loss))(x), expected, atol=1e-13)


def test_jacrev_agrees_with_finite_differences():
    x, direction = sample(3, 4, 2), sample(3, 4, 2, seed=1)
    found = torch.func.jacrev(normalized)(x).reshape(24, 24) @ direction.ravel()
    difference = normalized(x + 1e-5 * direction) - normalized(x - 1e-5 * direction)
    assert torch.allclose(found, difference.ravel() / 2e-5, atol=1e-8)


def test_an_input_without_gradient_gives_an_output_without():
    x = sample(4, 5, 3)
    assert not normalized(x).requires_grad


def test_a_checkpoint_changes_no_gradient():
    x = sample(4, 5, 3).requires_grad_()
    again = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
    (found,), (expected,) = torch.autograd.grad(again, x), torch.autograd.grad(loss(x), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kept", [(), ("center",), ("center", "scale")], ids=len)
def test_inference_compiles_whole_with_any_number_of_parameters(kept):
    options = {name: name in kept for name in ("center", "scale")}
    layer = keras_bn.GroupNormalization(2, **options)
    layer.build((None, 5, 4))
    x = sample(3, 5, 4, dtype=torch.float32)
    with torch.no_grad():
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert torch.allclose(found, layer(x), atol=1e-6)


def test_a_compiled_sum_is_as_wide_as_it_is_asked_for():
    values = sample(4096, 3, dtype=torch.bfloat16)
    total = torch.compile(lambda v: sum_over(v, (0,), torch.float64), backend="aot_eager")(values)
    assert torch.allclose(total, values.double().sum(0, keepdim=True), rtol=1e-14)


@pytest.mark.parametrize(
    ("shape", "axes"), [((64, 1024), (1,)), ((4096, 32), (0,)), ((3, 56, 56, 16), (1, 2))]
)
@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "transposed"])
def test_compiled_sums_do_not_add_up_their_rounding_errors(shape, axes, is_dense):
    rng = np.random.default_rng(0)
    for values in (np.full(shape, 0.1), 0.1 * rng.integers(0, 2, shape)):
        exact = values.astype("float32").astype("float64").sum(axes, keepdims=True)
        x = torch.from_numpy(values.astype("float32"))
        x = x if is_dense else x.transpose(0, -1).contiguous().transpose(0, -1)
        function = torch.compile(lambda x: sum_over(x, axes, torch.float32), fullgraph=True)
        assert hard.share(function(x).numpy() - exact, 8 * U * exact) <= 1
