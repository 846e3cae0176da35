"""Faults that the suite must see: each a change of the package's text, and tests that find it."""

from typing import NamedTuple

import keras

BACKEND = keras.backend.backend()


class Fault(NamedTuple):
    """A text in a file of the package, what takes its place, and tests of which one must fail."""

    file: str
    sound: str
    faulty: str
    tests: str

    def planted_in(self, text: str) -> str:
        """Return the text of the file with the fault; what is sound must stand there once."""
        assert text.count(self.sound) == 1, f"not once in {self.file}: {self.sound}"
        return text.replace(self.sound, self.faulty)

    @property
    def kernels(self) -> str:
        """Which of the kernels must be at work: what is compiled would hide what is not."""
        of_passes = ("compiled", "tracing", "replaced")
        return "" if any(part in self.file for part in of_passes) else "uncompiled"


# Tests that are quick. When the fuzz draws other cases, a run without the number finds another one.
FUZZ = "tests/test_fuzz.py::test_layer_agrees_with_the_oracle[{}]"
CONTRACT = "tests/kernels/test_contract.py -k 'any_kappa and eager-conv-output and not generic'"
WEIGHTS = "tests/kernels/test_weights.py -k 'under_a_0_does_not and eager and not generic'"
# Modules that are imported anew confuse torch.compile (2.13).
MOMENTS = "tests/core/test_moments.py -k 'merged_parts and not compile'"
ONE_SIZE = "tests/core/test_moments.py -k 'one_size and not compile'"
REPLICAS = "tests/core/test_moments.py -k parts_of_replicas"
PAIR = "tests/core/test_estimators.py -k 'pair_moves and not compile'"
SCALING = "tests/layers/test_feature_scaling.py"
LIMITS = "tests/layers/test_limits.py"
STATISTICS = "tests/layers/test_statistics.py"
STEPS = "kernels/steps.py"
PASSES = f"kernels/{BACKEND}/passes.py"
JAX = "kernels/jax/parts.py"

# In each backend's kernels: the file, what is sound, and what is faulty.
IS_JAX = BACKEND == "jax"
DIFFERENCE_OF_SQUARES = {
    False: (
        STEPS,
        "passes.total(x, weights, axes) / divisor",
        "0 * passes.total(x, weights, axes)",
    ),
    True: (
        JAX,
        "sum_over(_weighted(x + zero, weights), axes) / count",
        "0 * sum_over(_weighted(x + zero, weights), axes)",
    ),
}[IS_JAX]
UNMASKED_GRADIENT = {
    False: (STEPS, "*line), weights, outer", "*line), None, outer"),
    True: (
        JAX,
        "dx = _weighted(dx.astype(pivot.dtype), weights)",
        "dx = dx.astype(pivot.dtype)",
    ),
}[IS_JAX]
COUNT_IN_FLOAT32 = {
    False: (
        STEPS,
        'self.passes.total(ops.cast(weights, "float64"), None, axes)',
        'ops.cast(self.passes.total(weights, None, axes), "float64")',
    ),
    True: (JAX, "count = exact_sum_over(", "count = sum_over("),
}[IS_JAX]
CENTER_LATE = {
    "tensorflow": (
        PASSES,
        "offset=shift,\n        mean=center,",
        "offset=shift - center * scale,\n        mean=tf.zeros_like(center),",
    ),
    "jax": (
        JAX,
        "(x if center is None else x - center) * scale + shift",
        "x * scale + (shift if center is None else shift - center * scale)",
    ),
    "torch": (
        PASSES,
        "    x = x if center is None else x - center\n",
        "    shift = shift if center is None else shift - center * scale\n",
    ),
}[BACKEND]
# Elsewhere r and d are constants of a step, whatever they carry.
CORRECTED = {
    False: (STEPS, "else r * second + d * first, first", "else r * second, first", FUZZ.format(4)),
    True: (
        "core/estimators.py",
        "return native.stop_gradient(r), native.stop_gradient(d)",
        "return r, d",
        FUZZ.format(4),
    ),
}[IS_JAX]

FAULTS = {
    # The kernels.
    "variance as a difference of mean squares": Fault(*DIFFERENCE_OF_SQUARES, FUZZ.format(4)),
    "mask not applied in the gradient": Fault(*UNMASKED_GRADIENT, FUZZ.format(18)),
    "digits of a count lost": Fault(
        *COUNT_IN_FLOAT32, "tests/kernels/test_weights.py -k 'multiplied and eager'"
    ),
    "center subtracted after scaling": Fault(*CENTER_LATE, CONTRACT),
    "what lies under a mask is multiplied by 0": Fault(
        "kernels/active.py", "x = x if weights is None else harmless(x, weights)", "", WEIGHTS
    ),
    "correction forgotten in the gradient, or given one": Fault(*CORRECTED),
    # The mathematics.
    "unbiased for biased variance": Fault(
        "core/moments.py",
        "return self.m2 / positive(self.count)",
        "return self.m2 / positive(self.count - 1)",
        FUZZ.format(4),
    ),
    "m2 merged without the distance of the means": Fault(
        "core/moments.py",
        "total(parts.m2 + counts * ops.square(distance - offset))",
        "total(parts.m2)",
        MOMENTS,
    ),
    "ghosts merged without the distance of their means": Fault(
        "core/moments.py",
        "find(parts.m2, (0,)).mean + parts.count * means.m2",
        "find(parts.m2, (0,)).mean",
        ONE_SIZE,
    ),
    "equal parts each taken as the whole": Fault(
        "core/moments.py",
        "number * parts.count, 1.0 / number",
        "number * parts.count, 1.0",
        "tests/core/test_moments.py -k equal_parts",
    ),
    "moments of replicas merged by sums of squares": Fault(
        "core/moments.py",
        "pivot = settled(weighted / positive(count))",
        "pivot = ops.zeros_like(weighted)",
        REPLICAS,
    ),
    "mask forgotten where replicas are merged": Fault(
        "core/moments.py",
        "counts = _counted(own).count",
        "counts = ops.ones_like(own.pivot)",
        REPLICAS,
    ),
    "NaN taken up by the moving statistics": Fault(
        "core/moments.py",
        "finite = moments.m2 < math.inf",
        "finite = ops.zeros_like(moments.m2) < math.inf",
        LIMITS + " -k 'one_bad_value and batch'",
    ),
    "empty batch counts as a step": Fault(
        "core/moments.py",
        "return finite if moments.count > 0 else ops.zeros_like(finite)",
        "return finite",
        LIMITS + " -k 'empty_batch and batch'",
    ),
    "epsilon outside the root": Fault(
        "core/affine.py",
        "native.sqrt(moments.variance + epsilon)",
        "native.sqrt(moments.variance) + epsilon",
        FUZZ.format(3),
    ),
    "last digits of the mean dropped": Fault(
        "core/affine.py",
        "-moments.offset * scale)",
        "-0.0 * moments.offset * scale)",
        CONTRACT,
    ),
    "batches merged without the distance of their means": Fault(
        "core/streaming.py",
        "np.square(distance) * self.count * share",
        "0 * np.square(distance)",
        "tests/core/test_streaming.py -k merged_parts",
    ),
    "deviation of equal numbers": Fault(
        "core/streaming.py",
        "keepdims=True) - first * offset",
        "keepdims=True)",
        "tests/core/test_streaming.py -k constant",
    ),
    "infinity counted": Fault(
        "core/streaming.py",
        "known = np.abs(x) <= largest",
        "known = ~np.isnan(x)",
        SCALING + " -k missing_and_stays",
    ),
    "momentum swapped": Fault(
        "core/estimators.py",
        "return old * momentum + new * (1.0 - momentum)",
        "return new * momentum + old * (1.0 - momentum)",
        FUZZ.format(5),
    ),
    "r upside down": Fault(
        "core/estimators.py",
        "    r = stddev / stddev_kept\n",
        "    r = stddev_kept / stddev\n",
        FUZZ.format(5),
    ),
    "statistics in half precision": Fault(
        "core/dtypes.py",
        'return "float64" if "float64" in dtypes else "float32"',
        "return dtypes[0]",
        FUZZ.format(15),
    ),
    "groups of channels far apart": Fault(
        "core/pooling.py",
        "else (groups, shape[axis] // groups)",
        "else (shape[axis] // groups, groups)",
        "tests/core/test_pooling.py",
    ),
    "weights of a debiased average that do not fade": Fault(
        "core/estimators.py",
        "(count if momentum is None else count * momentum) + new",
        "count + new",
        "tests/core/test_estimators.py -k counted_average",
    ),
    "statistics that came without a count thrown away": Fault(
        "core/estimators.py",
        "return 0.0 if momentum is None else",
        "return 0.0 if momentum is not None else",
        "tests/layers/test_counts.py -k 'count_as_settled and list'",
    ),
    "ghosts of neighbouring samples": Fault(
        "core/pooling.py",
        "return ops.reshape(array, (self.size, self.number, *shape[1:]))",
        "return ops.swapaxes(ops.reshape(array, (self.number, self.size, *shape[1:])), 0, 1)",
        "tests/core/test_pooling.py",
    ),
    # The layers.
    "bad channel is counted": Fault(
        "layers/moving_count.py",
        "native.where(known, total, old)",
        "total",
        STATISTICS + " -k 'bad_channel and nan'",
    ),
    "biased for unbiased variance": Fault(
        "core/estimators.py",
        "fresh = batch.unbiased_variance if self.unbiased else batch.variance",
        "fresh = batch.variance",
        STATISTICS + " -k variance_is_that_of_the_population",
    ),
    "filling of an uneven ghost counts": Fault(
        "layers/batch_statistics.py",
        "weights = ops.broadcast_to(weights, (ghosts.samples, *ops.shape(weights)[1:]))\n"
        "        return ghosts.split(x), Pooling(axes, ghosts.split(weights))",
        "return ghosts.split(x), Pooling(axes)",
        "tests/layers/test_ghost.py -k 'batch_of_its_own and table and prime'",
    ),
    "mask forgotten": Fault(
        "layers/base.py",
        "harmless(x, weights), weights",
        "harmless(x, weights), None",
        FUZZ.format(3),
    ),
    "NaN under a mask reaches the output": Fault(
        "layers/base.py",
        "kernels.harmless(x, weights), weights",
        "x, weights",
        FUZZ.format(3),
    ),
    "input cast before its statistics": Fault(
        "layers/base.py", "autocast=False, **kwargs", "autocast=True, **kwargs", FUZZ.format(4)
    ),
    "gamma without gradient": Fault(
        "layers/base.py",
        "learned = Learned(self._spread(self.gamma, dtype),",
        "gamma = self._spread(self.gamma, dtype)\n"
        "        learned = Learned(None if gamma is None else ops.stop_gradient(gamma),",
        FUZZ.format(6),
    ),
    "frozen layer trains": Fault(
        "layers/batch_statistics.py",
        "if not (training and self.trainable)",
        "if not training",
        "tests/layers/test_conformance.py::test_frozen_layer_is_in_inference[batch-rank-2]",
    ),
    "what float32 loses of a large integer": Fault(
        "layers/feature_scaling.py",
        "lost = ops.cast(inputs - ops.cast(x, given), x.dtype)",
        "lost = ops.zeros_like(x)",
        SCALING + " -k 'last_digit and dates'",
    ),
    "rounding of the statistics not kept": Fault(
        "layers/feature_scaling.py",
        "self.offsets.assign(np.stack(offsets))",
        "pass",
        SCALING + " -k 'float64_input'",
    ),
    "samples pooled by group normalization": Fault(
        "layers/group_normalization.py", "(0, axis))", "(axis,))", FUZZ.format(6)
    ),
    "r_max that never rises": Fault(
        "layers/batch_renormalization.py",
        "self._count_step(self._average(batch, self.epsilon))",
        "self._average(batch, self.epsilon)",
        FUZZ.format(18),
    ),
    "moving variance below 0": Fault(
        "layers/batch_normalization.py",
        "native.relu(native.square(stddev) - self.epsilon)",
        "native.square(stddev) - self.epsilon",
        FUZZ.format(82),
    ),
}

# Statistics of all replicas, in JAX; the tests of other backends start processes for each.
VMAP = "tests/distributed/test_jax.py -k 'shards_of_vmap and batch and inside'"
TOTAL = "        return jax.lax.psum(values, axis_name)\n"
SYNCHRONIZED = {
    "sum over replicas without its adjoint": Fault(
        "kernels/jax/replicas.py",
        TOTAL,
        "        own = jax.lax.stop_gradient(values)\n"
        "        return values + jax.lax.psum(own, axis_name) - own\n",
        VMAP,
    ),
    "sum over replicas inside a derivative by hand": Fault(
        "kernels/jax/replicas.py",
        TOTAL,
        "        total = jax.custom_vjp(lambda v: jax.lax.psum(v, axis_name))\n"
        "        total.defvjp(lambda v: (total(v), None), lambda _, g: (total(g),))\n"
        "        return total(values)\n",
        # With devices the gradient is wrong, too: a test of its own shows by how much.
        "tests/distributed/test_jax.py -k 'forward_mode and not devices'",
    ),
    "sums of squares over replicas": Fault(
        "core/moments.py",
        "pivot = settled(weighted / positive(count))",
        "pivot = 0.0 * weighted",
        VMAP,
    ),
    "replicas that all count alike": Fault(
        "core/moments.py",
        "counts = _counted(own).count\n    sums",
        "counts = ops.ones_like(own.pivot)\n    sums",
        VMAP,
    ),
    "statistics of the ghosts of one replica kept": Fault(
        "layers/batch_statistics.py",
        "batch = batch if across is None else across(batch)",
        "batch = batch if across is None else batch",
        "tests/distributed/test_jax.py -k ghosts_are_local",
    ),
}
if IS_JAX:
    FAULTS |= SYNCHRONIZED | {
        "gradients of gamma and beta mistaken for each other": Fault(
            "kernels/jax/compiled.py",
            "found = [dx, columns[1], columns[0]][:half]",
            "found = [dx, columns[0], columns[1]][:half]",
            "tests/kernels/test_jax_compiled.py -k what_is_learned",
        )
    }

if BACKEND == "tensorflow":
    REPLACED = "tests/kernels/test_tensorflow_replaced.py"
    FAULTS |= {
        "functions that nothing replaces": Fault(
            "kernels/tensorflow/replaced.py",
            'api_preferred_device="CPU"',
            'api_preferred_device="GPU"',
            f"{REPLACED} -k than_is_saved",
        ),
        "gradients of what is saved that are not plain": Fault(
            "kernels/tensorflow/compiled.py",
            "    if is_plain() or is_for_each_of_many():\n        return None\n    parts",
            "    if is_for_each_of_many():\n        return None\n    parts",
            f"{REPLACED} -k saved_gradients",
        ),
    }

# The replicas.
REPLICAS = f"kernels/{BACKEND}/replicas.py"
PAIRS = "tests/distributed/test_torch.py -k 'two_processes and batch'"
if BACKEND == "torch":
    COMPILED = "kernels/compiled/"
    EVERYWHERE = "tests/kernels/test_compiled.py"
    FAULTS |= {
        "deviations from a first element that is an outlier": Fault(
            f"{COMPILED}cells.h", "if (far) job->is_far = 1;", "", EVERYWHERE
        ),
        "terms of moments added in single precision": Fault(
            f"{COMPILED}lines.h",
            "a += own * deviation, b += own * deviation * deviation;",
            "a += own * deviation, b = (float)(b + own * deviation * deviation);",
            "tests/layers/test_columns.py -k 'about_0 or one_pass'",
        ),
        "sums of the other threads forgotten": Fault(
            f"{COMPILED}stages.h",
            "for (int part = 1; sums->copy && part < job->parts; part++)",
            "for (int part = 1; sums->copy && part < 0; part++)",
            EVERYWHERE,
        ),
        "channels of a group left apart": Fault(
            f"{COMPILED}cells.h",
            "if (job->together > 1) merge(job, from, to);",
            "",
            "tests/layers/test_groups.py",
        ),
        "d forgotten where sets are corrected": Fault(
            f"{COMPILED}cell_template.h",
            "b = b * *r + *d;",
            "b = b * *r;",
            f"{EVERYWHERE} -k are_corrected",
        ),
        "r forgotten in the gradient of sets that were corrected": Fault(
            f"{COMPILED}cells.h",
            "float g = r ? r[j] : 1;",
            "float g = 1;",
            f"{EVERYWHERE} -k are_corrected",
        ),
        "d forgotten in gamma's gradient": Fault(
            f"{COMPILED}cells.h",
            "mapped(a, b, job->r[i + j], job->d[i + j]) : b",
            "b * job->r[i + j] : b",
            f"{EVERYWHERE} -k are_corrected",
        ),
        "one map for all lines that go together": Fault(
            f"{COMPILED}rows.h",
            "job->slope + cell, job->level + cell, job->gamma",
            "job->slope + lines->at[CELL], job->level + lines->at[CELL], job->gamma",
            "tests/layers/test_rows.py -k however_far",
        ),
        "ghosts merged in one pass without the distance of their means": Fault(
            f"{COMPILED}merging.h", "[2 * n + j] + count * between", "[2 * n + j]", ONE_SIZE
        ),
        "distance of means forgotten where ghosts go in strips": Fault(
            f"{COMPILED}strips.h",
            "add_to(sums + columns, distance * distance);",
            "add_to(sums + columns, distance * 0);",
            ONE_SIZE,
        ),
        "gradients of what is learned forgotten in strips": Fault(
            f"{COMPILED}strips.h",
            "add_to(firsts, first), add_to(firsts + job->columns.number, second);",
            "",
            f"{EVERYWHERE} -k 'eight'",
        ),
        "ghosts of other threads forgotten": Fault(
            f"{COMPILED}merging.h",
            "for (int part = 1; part < job->parts; part++)",
            "for (int part = 1; part < 0; part++)",
            ONE_SIZE,
        ),
        "statistics moved by what is not known": Fault(
            f"{COMPILED}moving.h", "return m2 < INFINITY;", "return 1;", PAIR
        ),
        "NaN under a 0 summed": Fault(
            f"{COMPILED}lines.h",
            "deviation = (Doubles)((Choice)deviation & (own != 0));",
            "",
            EVERYWHERE,
        ),
        "bfloat16 cut off, not rounded": Fault(
            f"{COMPILED}memory.h",
            "(((bits) + 0x7fff + (((bits) >> 16) & 1)) >> 16)",
            "((bits) >> 16)",
            "tests/kernels/test_compiled.py",
        ),
        "results that go past the caches out of order": Fault(
            f"{COMPILED}memory.h",
            "_mm_loadu_si128((const __m128i *)(source + i))",
            "_mm_loadu_si128((const __m128i *)(source + (i ^ 16)))",
            f"{EVERYWHERE} -k no_cache_holds",
        ),
        "results left on their way past the caches": Fault(
            f"{COMPILED}passes.h",
            "if (job->way.is_past_caches) copy_past_caches(",
            "if (0) copy_past_caches(",
            f"{EVERYWHERE} -k no_cache_holds",
        ),
        "gradients of what is learned forgotten where sets are lines": Fault(
            f"{COMPILED}rows.h",
            "if (sum == PRODUCTS) add_to_columns(job, from, to, 0, job->columns.number, part);",
            "",
            EVERYWHERE,
        ),
        "lines that are widened read as they were": Fault(
            f"{COMPILED}rows.h", "wide.types[X] = wide.types[DY] = FLOAT;", "", EVERYWHERE
        ),
        "a result left where its copy was made": Fault(
            f"{COMPILED}torch_ops.c",
            "call->has_failed |= torch.aoti_torch_copy_(call->made[0], y, 0);",
            ";",
            "tests/kernels/test_torch_operations.py -k pytorch_knows",
        ),
        "gaps taken for a dense order": Fault(
            f"{COMPILED}torch_ops.c",
            "if (!call->has_failed && !is_dense(x)) {",
            "if (0) {",
            "tests/kernels/test_torch_operations.py -k pytorch_knows",
        ),
        "operations of ours in what is exported": Fault(
            "kernels/torch/tracing.py",
            "and not torch.compiler.is_exporting()",
            "",
            "tests/kernels/test_torch_operations.py -k exported",
        ),
        "operations of ours in what is traced": Fault(
            "kernels/torch/tracing.py",
            "and not _len_torch_dispatch_stack()",
            "",
            "tests/kernels/test_compiled.py -k traced",
        ),
        "long blocks added one by one by compiled loops": Fault(
            "kernels/torch/sums.py",
            "_BLOCK, _VECTOR = 16, 8",
            "_BLOCK, _VECTOR = 4096, 8",
            "tests/kernels/test_torch.py -k compiled_sums",
        ),
        "gradients of replicas not summed": Fault(
            STEPS, "terms = across.total(ops.stack(terms))", "pass", PAIRS
        ),
        "gathered without the adjoint": Fault(
            REPLICAS,
            "return _Own.apply(grad, ctx.replicas), None",
            "return grad[distributed.get_rank(ctx.replicas._group)], None",
            "tests/distributed/test_torch.py -k 'second_derivative and all'",
        ),
        "replicas merged as sums of squares": Fault(
            REPLICAS,
            "return Moments(total, center, rest, spread.sum(0))",
            "squares = (m2 + count * (pivot + offset).square()).sum(0)\n"
            "    return Moments(total, center, rest, squares - total * (center + rest).square())",
            PAIRS,
        ),
        "mask of replicas forgotten": Fault(
            REPLICAS, "count = own.count * torch.ones", "count = torch.ones", PAIRS
        ),
    }
