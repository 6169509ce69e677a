"""What every objective must do, whatever its loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.axis import device_axis
from research.core.errors import DataError

CASES = {
    "classify": ("classify", "mlp", {"width": 8, "norm": "batch", "dropout": None}, "images"),
    "regress": ("regress", "mlp", {"width": 8, "dropout": None}, "rows"),
    "language_model": ("language_model", "gpt", {"width": 8, "depth": 1, "heads": 2, "dropout": None}, "text"),
}
HYPER = {"dropout": jnp.float32(0.5)}
KEY = jax.random.key(1)


@pytest.fixture(scope="module", params=CASES)
def case(request, configured):
    """(objective, batch, params, extra)"""
    name, model_name, model, batch = CASES[request.param]
    objective, batch = configured(name, model_name, model), request.getfixturevalue(batch)
    return objective, batch, *objective.init(jax.random.key(0), batch)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def call(objective, params, extra, batch, key=None, hyper=None, train=False):
    return objective(params, extra, None, batch, key, hyper or {}, train=train)


def test_equal_content_makes_equal_objectives(case, configured, request):
    objective = case[0]
    name, model_name, model, _ = CASES[request.node.callspec.params["case"]]
    again, other = configured(name, model_name, model), configured(name, model_name, {**model, "width": 16})
    assert objective == again
    assert hash(objective) == hash(again)
    assert objective != other


def test_init_needs_shapes_alone(case):
    objective, batch, params, extra = case
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    assert jax.tree.map(jnp.shape, jax.eval_shape(objective.init, jax.random.key(0), abstract)) == jax.tree.map(jnp.shape, (params, extra))
    zeros = jax.tree.map(np.zeros_like, batch)
    jax.tree.map(np.testing.assert_array_equal, objective.init(jax.random.key(0), zeros), (params, extra))


def test_terms_have_coefficients_and_weights(case):
    objective, batch, params, extra = case
    tally, _ = call(objective, params, extra, batch, KEY, HYPER, train=True)
    terms = dict(objective.coefficients)
    assert set(tally.terms) == set(terms) == set(objective.weights(batch))
    assert "loss" in tally.metrics
    assert not objective.batch_coupled
    for leaf in jax.tree.leaves((tally, objective.weights(batch))):
        assert (leaf.shape, leaf.dtype) == ((), jnp.float32)


def test_masked_elements_do_not_count(case):
    objective, batch, params, extra = case
    changed = dict(batch)
    for name in ("label", "target", "image", "features"):
        if name in batch:
            keep = batch["mask"].reshape(batch["mask"].shape + (1,) * (batch[name].ndim - batch["mask"].ndim))
            changed[name] = np.where(keep, batch[name], 0)
    assert any(not np.array_equal(changed[name], batch[name]) for name in batch)
    tallies = [call(objective, params, extra, each, KEY, HYPER, train=True)[0] for each in (batch, changed)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), *tallies)


def test_sums_of_halves_are_the_sum_of_the_whole(case):
    objective, batch, params, extra = case
    tally, _ = call(objective, params, extra, batch)
    half = len(batch["index"]) // 2
    first, second = (call(objective, params, extra, {k: v[part] for k, v in batch.items()})[0] for part in (slice(half), slice(half, None)))
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-5), first, second, tally)


def test_one_program_serves_all_hyper_values(case):
    objective, batch, params, extra = case
    call(objective, params, extra, batch, KEY, HYPER, train=True)
    before = call._cache_size()
    call(objective, params, extra, batch, KEY, {"dropout": jnp.float32(0.1)}, train=True)
    assert call._cache_size() == before


def test_unknown_collections_pass_through(case):
    objective, batch, params, extra = case
    counters = {"skipped": {"total": jnp.zeros((), jnp.int32)}}
    for train in (False, True):
        _, after = call(objective, params, {**extra, **counters}, batch, KEY, HYPER, train=train)
        assert set(after) == {*extra, "skipped"}


def test_only_training_changes_extra(configured, images):
    objective = configured("classify", "mlp", {"width": 8, "norm": "batch"})
    params, extra = objective.init(jax.random.key(0), images)
    _, same = call(objective, params, extra, images)
    jax.tree.map(np.testing.assert_array_equal, same, extra)
    _, changed = call(objective, params, extra, images, KEY, train=True)
    assert np.abs(changed["batch_stats"]["norm_0"]["mean"]).max() > 0


def test_predict_reads_a_batch_without_answers(case):
    objective, batch, params, extra = case
    name = "value" if "features" in batch else "logits"
    given = {k: v for k, v in batch.items() if k not in ("label", "target")}
    predict = jax.jit(lambda batch, edits: objective.predict(params, extra, None, batch, None, {}, edits=edits))
    outputs, taps = predict(given, {})
    assert list(outputs) == [name]
    np.testing.assert_array_equal(outputs[name], taps["logits"])
    patched, _ = predict(given, {"logits": np.ones_like(taps["logits"])})
    np.testing.assert_allclose(patched[name], np.asarray(taps["logits"]) + 1, rtol=1e-6)


def test_batch_statistics_are_global_under_a_device_axis(configured, images):
    objective = configured("classify", "mlp", {"width": 8, "norm": "batch"})
    params, extra = objective.init(jax.random.key(0), images)
    whole, stats = call(objective, params, extra, images, KEY, train=True)
    with device_axis("devices"):
        split = {name: x.reshape(2, 3, *x.shape[1:]) for name, x in images.items()}
        one = jax.jit(jax.vmap(lambda part: objective(params, extra, None, part, KEY, {}, train=True), axis_name="devices"))
        parts, stats_parts = one(split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.sum(0), b, rtol=1e-5), parts, whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5), stats_parts, stats)


@pytest.mark.parametrize("names", [[], ["image", "features"]])
def test_a_batch_needs_one_input(case, names):
    objective, batch, *_ = case
    wrong = {"mask": batch["mask"], "index": batch["index"], **dict.fromkeys(names, np.zeros((2, 3), np.float32))}
    with pytest.raises(DataError, match=f"has {len(names)} inputs"):
        objective.init(jax.random.key(0), wrong)
