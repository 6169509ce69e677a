"""Low rank: the nearest matrices there are, multiplied one after the other."""

import functools

import jax
import numpy as np
import pytest

from research.compression.factorize import SVD, Activation, Factorized
from research.compression.linear import linear_layers, watching
from research.compression.subject import get
from research.core.errors import ConfigError
from research.core.tree import count, paths

FAMILIES = ("mlp", "cnn", "resnet", "gpt")


@pytest.fixture(scope="module")
def factorized(subject):
    """factorized(family, SVD or Activation, **settings): (the whole model, the one of low rank)."""

    @functools.cache
    def make(family, method=SVD, **settings):
        whole = subject(family)
        return whole, method(**settings)(whole)

    return make


def matrices(subject, path):
    """A layer's matrix, as it was and as it is, in float64."""
    whole, small = subject
    layer = whole.layers[path]
    now = small.objective.whole(small.params, small.frozen)
    return (np.asarray(layer.matrix(get(tree, path)), np.float64) for tree in (whole.params, now))


def inputs(subject, path):
    """What a layer is multiplied with on the calibration data, in float64."""
    rows = []

    def see(layer, x):
        if layer.path == path:
            rows.append(layer.rows(x)[0])

    @jax.jit
    def run(model, batch):
        rows.clear()
        with watching(see):
            subject.objective.predict(*model, batch, None, subject.hyper)
        return rows[0]

    return np.concatenate([np.asarray(run(subject.model[:3], batch), np.float64) for batch in subject.batches])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [SVD, Activation])
def test_the_layers_compute_what_the_products_would(family, method, factorized, outputs):
    whole, small = factorized(family, method, rank=2)
    assert count(small.params) < count(whole.params)
    plain = whole.replace(params=small.objective.whole(small.params, small.frozen))
    np.testing.assert_allclose(outputs(small), outputs(plain), atol=2e-5)
    assert np.abs(outputs(small) - outputs(whole)).max() > 1e-3


@pytest.mark.parametrize(("family", "path"), [("mlp", "dense_0/kernel"), ("cnn", "conv_1/kernel"), ("gpt", "block_1/attention/query/kernel")])
def test_no_matrix_of_this_rank_is_nearer(family, path, factorized):
    pair = factorized(family, rank=2)
    before, after = matrices(pair, path)
    tail = np.linalg.svd(before, compute_uv=False)[2:]
    np.testing.assert_allclose(np.linalg.norm(before - after), np.sqrt((tail**2).sum()), rtol=1e-4)
    np.testing.assert_allclose(pair[1].notes[path]["error"], np.sqrt((tail**2).sum()) / np.linalg.norm(before), rtol=1e-4)
    assert np.linalg.matrix_rank(after, tol=1e-4) == 2


@pytest.mark.parametrize(("family", "path"), [("mlp", "dense_1/kernel"), ("cnn", "conv_1/kernel"), ("gpt", "block_1/attention/out/kernel")])
def test_no_matrix_of_this_rank_has_nearer_outputs_on_the_data(family, path, factorized):
    pair = factorized(family, Activation, rank=2)
    before, after = matrices(pair, path)
    x = inputs(pair[0], path)
    tail = np.linalg.svd(x @ before, compute_uv=False)[2:]
    best = np.sqrt((tail**2).sum())
    np.testing.assert_allclose(np.linalg.norm(x @ (before - after)), best, rtol=1e-3)
    np.testing.assert_allclose(pair[1].notes[path]["error"], best / np.linalg.norm(x @ before), rtol=1e-3)
    _, blind = matrices(factorized(family, SVD, rank=2), path)
    assert np.linalg.norm(x @ (before - blind)) > 1.01 * best


def test_inputs_that_are_always_zero_do_no_harm(subject, outputs):
    whole = subject("mlp")
    silent = [{**batch, "image": batch["image"] * (np.arange(8) < 4).reshape(1, 8, 1, 1)} for batch in whole.batches]
    small = Activation(rank=8, only=("dense_0/*",))(whole.replace(batches=silent))
    assert np.isfinite(outputs(small)).all()
    assert small.notes["dense_0/kernel"]["error"] < 1


def flops(subject):
    predict = jax.jit(lambda *arguments: subject.objective.predict(*arguments[:3], arguments[4], None, arguments[3])[0])
    return predict.lower(*subject.model, subject.batches[0]).compile().cost_analysis()["flops"]


def test_a_compiled_program_multiplies_with_the_factors_alone(subject):
    whole = subject("mlp", "model.width=[256,256]")
    small = SVD(rank=8, only=("dense_1/*",))(whole)
    rows = whole.batches[0]["image"].shape[0]
    saved = 2 * rows * (256 * 256 - 8 * (256 + 256))
    assert flops(whole) - flops(small) == pytest.approx(saved, rel=0.01)


def test_biases_and_types_stay(subject, outputs):
    whole = subject("cnn", "train.precision=bfloat16")
    small = SVD(share=0.9)(whole)
    assert {leaf.dtype for leaf in paths(small.params).values()} == {np.dtype("float32")}
    for path, leaf in paths(small.params).items():
        if path.endswith("/bias"):
            np.testing.assert_array_equal(leaf, get(whole.params, path))
    assert outputs(small).dtype == np.float32


def test_a_share_is_what_the_factors_hold_at_most(factorized):
    whole, small = factorized("cnn", share=0.5)
    for path, _, rank in small.objective.layers:
        size, pair = get(whole.params, path).size, get(small.params, path)
        one_more = count(pair) // rank * (rank + 1)
        assert count(pair) <= max(0.5 * size, count(pair) // rank) <= max(one_more, 0.5 * size)
        assert one_more > 0.5 * size


@pytest.mark.parametrize("energy", [0.3, 0.6])
def test_energy_is_kept_by_the_smallest_rank(energy, factorized):
    whole, small = factorized("mlp", energy=energy)
    for path, _, rank in small.objective.layers:
        values = np.linalg.svd(np.asarray(get(whole.params, path), np.float64), compute_uv=False) ** 2
        kept = np.cumsum(values) / values.sum()
        assert kept[rank - 1] >= energy
        assert rank == 1 or kept[rank - 2] < energy


def test_a_layer_that_would_not_shrink_is_left_with_a_note(factorized):
    whole, small = factorized("mlp", rank=8)
    assert [path for path, *_ in small.objective.layers] == ["dense_0/kernel", "dense_1/kernel"]
    np.testing.assert_array_equal(small.params["head"]["kernel"], whole.params["head"]["kernel"])
    assert small.notes["head/kernel"] == {"rank": 5, "error": 0.0}


def test_the_config_alone_gives_the_shapes_and_equal_objectives(factorized):
    _, small = factorized("gpt", rank=2)
    again = small.replace(config=small.config).objective
    assert again == small.objective
    assert hash(again) == hash(small.objective)
    shapes = jax.eval_shape(lambda: (again.init(jax.random.key(0), small.batches[0])[0], again.still(jax.random.key(0), small.batches[0])))
    assert jax.tree.structure(shapes) == jax.tree.structure((small.params, small.frozen))
    assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(small.params)]


def test_both_factors_learn(factorized):
    _, small = factorized("cnn", rank=2)

    @jax.jit
    def slopes(params, batch):
        def loss(params):
            tally, _ = small.objective(params, small.extra, small.frozen, batch, None, small.hyper, train=True)
            return tally.terms["cross_entropy"]

        return jax.grad(loss)(params)

    grads = slopes(small.params, small.batches[0])
    assert all(np.asarray(get(grads, f"{path}/{part}")).any() for path, *_ in small.objective.layers for part in ("first", "second"))


def test_factors_can_be_factorized_again_elsewhere(factorized, outputs):
    _, once = factorized("mlp", rank=4, only=("dense_0/*",))
    twice = SVD(rank=4, only=("dense_1/*",))(once)
    assert isinstance(twice.objective.objective, Factorized)
    plain = once.objective.plain
    params = twice.objective.whole(twice.params, twice.frozen)
    assert set(linear_layers(plain, (params, once.extra, None, once.hyper), once.batches[0])) == {"dense_0/kernel", "dense_1/kernel", "head/kernel"}
    straight = jax.jit(lambda params, batch: plain.predict(params, once.extra, None, batch, None, once.hyper)[0]["logits"])(params, once.batches[0])
    np.testing.assert_allclose(outputs(twice), straight, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give exactly one of rank, share and energy, the others null; found none"),
        ({"rank": 2, "share": 0.5}, "found rank, share"),
        ({"rank": 0}, r"method\.rank=0: must be at least 1"),
        ({"share": 1.0}, r"method\.share=1\.0: must be in \(0, 1\)"),
        ({"energy": 0.0}, r"method\.energy=0\.0: must be in \(0, 1\)"),
        ({"rank": 12, "only": ("dense_0/*", "dense_1/*")}, r"dense_1/kernel is 16 x 24, and rank 12 saves nothing; at most 9 does"),
        ({"rank": 100}, r"dense_0/kernel is 64 x 16, and rank 100 saves nothing; at most 12 does"),
        ({"rank": 2, "only": ("dens_0/*",)}, r"method\.only: 'dens_0/\*' fits no layer"),
    ],
)
def test_bad_settings_are_refused(settings, message, subject):
    with pytest.raises(ConfigError, match=message):
        SVD(**settings)(subject("mlp"))
