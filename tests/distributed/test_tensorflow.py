"""Statistics of replicas under `tf.distribute`."""

import pickle

import keras
import numpy as np
import pytest

import keras_bn
from tests.distributed import launching
from tests.distributed.once import once
from tests.distributed.shards import PAIRS, built, errors
from tests.oracle import expected, weights_by_name

if keras.backend.backend() != "tensorflow":
    pytest.skip("these are replicas of tf.distribute", allow_module_level=True)

import tensorflow as tf

from tests.distributed import tensorflow_replicas as replicas

TRAINED = 5e-5  # between weights after several steps
MOMENTS = ("moving_mean", "moving_variance")
ENDED = 30  # in which an error must come [s]
IDS = [f"{kind}-{name}" for kind, name in replicas.CASES]

each_case = pytest.mark.parametrize(("kind", "name"), replicas.CASES, ids=IDS)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """Return what `tensorflow_mirrored.py` finds."""

    def run(path):
        program = "tests/distributed/tensorflow_mirrored.py"
        launching.run(program, path, backend="tensorflow")

    return once(tmp_path_factory, "mirrored", run)


def workers(factory, task):
    """Return what each worker of a cluster finds; None for one that died."""

    def run(path):
        program = "tests/distributed/tensorflow_workers.py"
        folder = factory.mktemp(task)
        launching.run(program, task, folder, backend="tensorflow")
        files = [folder / f"{index}.pickle" for index in range(2)]
        found = [pickle.loads(f.read_bytes()) if f.exists() else None for f in files]
        path.write_bytes(pickle.dumps(found))

    return once(factory, task, run)


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory):
    """Return what two workers find that end in an error only at the very last step."""
    return workers(tmp_path_factory, "agreeing")


def worst(shards, kind, found):
    """Return the largest error of replicas against a float64 run over the whole batch."""
    return max(errors(shards, kind, *zip(*found, strict=True)).values())


@each_case
def test_mirrored_replicas_agree_with_the_whole_batch(kind, name, mirrored):
    shards = PAIRS[name]
    assert worst(shards, kind, mirrored["shards"][True][kind, name]) <= shards.tolerance


@each_case
def test_workers_agree_with_the_whole_batch(kind, name, agreeing):
    found = [replica for worker in agreeing for replica in worker["shards"][kind, name]]
    assert worst(PAIRS[name], kind, found) <= PAIRS[name].tolerance


@each_case
def test_replicas_that_are_not_synchronized_do_not(kind, name, mirrored):
    shards = PAIRS[name]
    assert worst(shards, kind, mirrored["shards"][False][kind, name]) > shards.tolerance


@each_case
def test_statistics_are_the_same_to_the_last_bit(kind, name, mirrored):
    first, second = (replica.state for replica in mirrored["shards"][True][kind, name])
    assert all(np.array_equal(first[weight], second[weight]) for weight in first)


SHARDS = {"eager": PAIRS["7 and 1"], "four": replicas.FOUR}


@pytest.mark.parametrize("way", SHARDS)
def test_eager_replicas_and_four_of_them_agree_with_the_whole_batch(way, mirrored):
    assert worst(SHARDS[way], "batch", mirrored["others"][way]) <= 2e-5


@pytest.mark.parametrize("kind", replicas.KINDS)
def test_a_ghost_is_local_and_what_is_kept_is_of_all(kind, mirrored):
    shards = PAIRS["equal"]
    found = mirrored["others"][f"ghosts, {kind}"]
    split, whole = built(kind, virtual_batch_size=3), built(kind)
    weights = weights_by_name(whole)
    for x, dy, replica in zip(shards.cut(shards.x), shards.cut(shards.dy), found, strict=True):
        own = expected(split, weights, x, dy, training=True)
        np.testing.assert_allclose(replica.y, own.y, atol=2e-5)
        np.testing.assert_allclose(replica.dx, own.dx, atol=2e-5)
    state = expected(whole, weights, shards.x, shards.dy, training=True).state
    for name in MOMENTS:
        kept = [replica.state[name] for replica in found]
        np.testing.assert_allclose(kept, [state[name]] * 2, rtol=2e-5)


def difference(found, other):
    return max(np.max(np.abs(a - b)) for a, b in zip(found, other, strict=True))


@pytest.mark.parametrize("count", [2, 4])
def test_fit_comes_to_the_same_weights_on_any_number_of_devices(count, mirrored):
    assert difference(mirrored["fits"][count], mirrored["fits"][1]) <= TRAINED


def test_fit_that_is_not_synchronized_does_not(mirrored):
    fits = mirrored["fits"]
    assert difference(fits["not synchronized"], fits[1]) > 100 * TRAINED


def test_a_custom_loop_of_workers_comes_to_the_weights_of_one_process(agreeing):
    model, optimizer = replicas.network(), replicas.optimizer()
    for x, y in replicas.batches():
        replicas.step(model, optimizer, x, y)
    assert max(difference(worker["trained"], model.get_weights()) for worker in agreeing) <= TRAINED


def assert_kept_of(batches, found):
    """Compare the weights of a layer, by name, with what it must keep of batches."""
    layer = keras_bn.BatchNormalization()
    layer.build((None, replicas.FEATURES))
    wanted = weights_by_name(layer)
    for batch in batches:
        wanted = expected(layer, wanted, batch, batch, training=True).state
    for name in MOMENTS:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_workers_may_have_data_of_different_lengths(index, agreeing):
    half = replicas.BATCH // 2
    parts = replicas.UNEVEN.cut(replicas.data()[0])
    first, second = (np.split(part, range(half, len(part), half)) for part in parts)
    assert len(second) == len(first) + 1
    pairs = zip([*first, first[0][:0]], second, strict=True)
    assert_kept_of(map(np.concatenate, pairs), agreeing[index]["uneven"])


@pytest.mark.parametrize("index", [0, 1])
def test_fit_takes_a_last_batch_that_leaves_a_replica_empty(index, mirrored):
    x, _ = replicas.data(replicas.SAMPLES + 1)
    batches = np.split(x, range(replicas.BATCH, len(x), replicas.BATCH))
    assert_kept_of(batches, mirrored["saved"]["each"]["synchronized"][index])


MEANS = [(layer, name) for layer in ("batch", "renorm", "cumulative") for name in MOMENTS]


def of_replicas(saved, layer, name):
    """Return what the replicas keep of a weight, and what a file has of it."""
    (file,) = saved["file"][layer]
    return np.array([replica[name] for replica in saved["each"][layer]]), file[name]


@pytest.mark.parametrize(("layer", "name"), [*MEANS, ("renorm", "moving_count")])
def test_a_file_holds_the_mean_of_the_replicas(layer, name, mirrored):
    each, file = of_replicas(mirrored["saved"], layer, name)
    assert not np.array_equal(*each)
    np.testing.assert_allclose(file, each.mean(0), rtol=1e-6)


@pytest.mark.parametrize("name", MOMENTS)
def test_the_file_of_keras_holds_the_first_replica_alone(name, mirrored):
    each, file = of_replicas(mirrored["saved"], "Keras", name)
    assert np.array_equal(file, each[0])
    # Keras 3.15.1: NaN, once a batch leaves this replica empty.
    assert not np.array_equal(file, each[1])


def test_a_file_counts_what_all_replicas_saw(mirrored):
    each, file = of_replicas(mirrored["saved"], "cumulative", "moving_count")
    half = replicas.SAMPLES // 2
    assert np.array_equal(each, np.repeat([[half + 1], [half]], replicas.FEATURES, axis=1))
    assert np.array_equal(file, np.full(replicas.FEATURES, replicas.SAMPLES + 1))


def test_steps_stay_whole_numbers(mirrored):
    each, file = of_replicas(mirrored["saved"], "renorm", "step")
    assert file.dtype == "int32"
    # The last batch left the second replica empty.
    assert [*each.tolist(), file.tolist()] == [7, 6, 7]


@pytest.mark.parametrize("name", MOMENTS)
def test_synchronized_statistics_are_saved_as_they_are(name, mirrored):
    each, file = of_replicas(mirrored["saved"], "synchronized", name)
    assert np.array_equal(each, [file, file])


LAYERS = ("batch", "renorm", "cumulative", "synchronized")
each_layer = pytest.mark.parametrize("layer", LAYERS)


@each_layer
def test_a_checkpoint_holds_what_a_file_does(layer, mirrored):
    (file,), (checkpoint,) = (mirrored["saved"][kind][layer] for kind in ("file", "checkpoint"))
    assert all(np.array_equal(file[name], checkpoint[name]) for name in file)


@each_layer
def test_an_exported_model_serves_what_a_file_gives(layer, mirrored):
    saved = mirrored["saved"]
    np.testing.assert_allclose(saved["served"][layer], saved["predicted"][layer], atol=1e-6)


# Where replicas are given weights.
@pytest.mark.parametrize("way", ["file, loaded by replicas", "set"])
@each_layer
def test_replicas_that_are_given_weights_have_them_all_alike(layer, way, mirrored):
    (file,) = mirrored["saved"]["file"][layer]
    first, second = mirrored["saved"][way][layer]
    assert all(np.array_equal(first[name], second[name]) for name in file)
    assert all(np.array_equal(first[name], file[name]) for name in set(file) - {"moving_count"})


def test_what_workers_read_is_the_mean_of_all(agreeing):
    own, together = ([worker["read"][key] for worker in agreeing] for key in ("own", "together"))
    for name in MOMENTS:
        assert np.max(np.abs(own[0][name] - own[1][name])) > 1e-3
        mean = (own[0][name] + own[1][name]) / 2
        np.testing.assert_allclose([part[name] for part in together], [mean] * 2, rtol=1e-6)


# Of each layer on two replicas: two sums forward, two backward. None elsewhere.
SUMS = {
    "training": 2,
    "training, with gradient": 4,
    "shapes inferred in a replica, eager": 2,
    "built in a replica": 2,
    "inference": 0,
    "frozen": 0,
    "not synchronized": 0,
    "one replica": 0,
    "no strategy": 0,
    "symbolic": 0,
}


@pytest.mark.parametrize(("where", "number"), SUMS.items(), ids=SUMS)
def test_replicas_communicate_only_to_train(where, number, mirrored):
    assert sorted(mirrored["communication"][where]) == sorted([0, 1] * number)


@pytest.mark.parametrize("kind", replicas.KINDS)
def test_without_a_strategy_the_graph_is_that_of_the_plain_layer(kind):
    def graph(**options):
        layer = built(kind, **options)
        traced = tf.function(lambda x: layer(x, training=True)).get_concrete_function(
            tf.TensorSpec((8, 3, 2, 5))
        )
        return [operation.type for operation in traced.graph.get_operations()]

    assert graph(synchronized=True) == graph()


@pytest.mark.parametrize("how", ["eager", "graph", "compiled"])
@pytest.mark.parametrize("kind", replicas.KINDS)
def test_without_a_strategy_the_numbers_are_those_of_the_plain_layer(kind, how, run):
    shards = PAIRS["masked"]
    plain, other = (
        run(built(kind, **options), shards.x, shards.dy, how, training=True, mask=shards.mask)
        for options in ({}, {"synchronized": True})
    )
    for found, wanted in zip(tf.nest.flatten(other), tf.nest.flatten(plain), strict=True):
        assert np.array_equal(found, wanted)


def test_a_worker_that_is_a_step_short_ends_in_an_error(agreeing):
    error, message, seconds = agreeing[0]["short"]
    assert error == "DeadlineExceededError"
    assert "Collective has timed out" in message
    assert seconds < ENDED
    assert agreeing[1]["short"][0] == ""


def test_a_worker_that_dies_ends_in_an_error(tmp_path_factory):
    survivor, dead = workers(tmp_path_factory, "dying")
    error, message, seconds = survivor["dead"]
    assert dead is None
    assert error in ("DeadlineExceededError", "UnavailableError", "AbortedError")
    assert "Collective" in message
    assert seconds < ENDED
