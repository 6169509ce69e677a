"""Averages of weights, and which of them are worth taking."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.compression.average import Soup, average, greedy
from research.compression.factorize import SVD
from research.core.errors import ConfigError
from research.core.tree import paths


def shifted(tree, seed, size=0.05):
    random = np.random.RandomState(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(size * random.randn(*x.shape), x.dtype), tree)


def test_the_mean_is_weighted_by_ratios_and_keeps_types():
    trees = [{"a": jnp.full((2, 3), value, jnp.bfloat16), "b": {"c": jnp.float32(10 * value)}} for value in (1.0, 2.0, 4.0)]
    mean = average(trees, [1, 1, 2])
    np.testing.assert_allclose(mean["b"]["c"], 27.5)
    np.testing.assert_allclose(np.asarray(mean["a"], np.float32), 2.75)
    assert mean["a"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, average(trees, [2, 2, 4]), mean)
    np.testing.assert_allclose(average(trees)["b"]["c"], 70 / 3, rtol=1e-6)


def test_greedy_takes_what_helps_from_the_best_on():
    target = 3.0
    trees = [{"w": jnp.float32(value)} for value in (10.0, 2.0, 4.5, 2.5)]
    chosen, mean = greedy(trees, lambda tree: abs(float(tree["w"]) - target))
    assert chosen == (3, 2)  # 2.5 is the best; with 2 the mean is worse; with 4.5 it is as good
    assert mean["w"] == 3.5


def test_greedy_alone_keeps_the_best():
    trees = [{"w": jnp.float32(value)} for value in (10.0, 3.0)]
    chosen, mean = greedy(trees, lambda tree: abs(float(tree["w"]) - 3.0))
    assert chosen == (1,)
    assert mean is trees[1]


@pytest.mark.parametrize("family", ["mlp", "gpt"])
def test_a_soup_is_the_mean_of_its_runs(family, subject):
    whole = subject(family)
    others = [shifted(whole.params, seed) for seed in (1, 2)]
    soup = Soup(runs=("a", "b"))(dataclasses.replace(whole, others=others))
    for path, leaf in paths(soup.params).items():
        expected = np.mean([np.asarray(paths(tree)[path], np.float64) for tree in (whole.params, *others)], axis=0)
        np.testing.assert_allclose(leaf, expected, atol=1e-6)
    assert soup.config == whole.config
    assert soup.notes == {name: {"chosen": 1.0} for name in ("this run", "a", "b")}


def test_weights_belong_to_this_run_first(subject):
    whole = subject("mlp")
    soup = Soup(runs=("a",), weights=(1.0, 3.0))(dataclasses.replace(whole, others=[shifted(whole.params, 1, size=1.0)]))
    difference = jax.tree.map(lambda x, y: np.asarray(x - y), soup.params, whole.params)
    other = jax.tree.map(lambda x, y: np.asarray(0.75 * (x - y)), shifted(whole.params, 1, size=1.0), whole.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), difference, other)


def test_the_greedy_choice_leaves_out_what_harms(subject):
    whole = subject("mlp")
    ruined = jax.tree.map(lambda x: 30.0 * x, shifted(whole.params, 1, size=3.0))
    soup = Soup(runs=("ruined", "same"), choose="greedy")(dataclasses.replace(whole, others=[ruined, whole.params]))
    assert soup.notes == {"this run": {"chosen": 1.0}, "ruined": {"chosen": 0.0}, "same": {"chosen": 1.0}}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), soup.params, whole.params)


def test_running_statistics_are_those_of_the_mean_model_on_the_data(subject):
    whole = subject("mlp", "model.norm=batch", "model.depth=1", "model.width=[8]")
    whole = dataclasses.replace(whole, batches=whole.batches[:1])
    soup = Soup(runs=("a",))(dataclasses.replace(whole, others=[shifted(whole.params, 1, size=0.5)]))
    dense, rows = soup.params["dense_0"], np.asarray(whole.batches[0]["image"], np.float64).reshape(16, -1)
    inputs = rows @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"], np.float64)
    statistics = soup.extra["batch_stats"]["norm_0"]
    np.testing.assert_allclose(statistics["mean"], inputs.mean(0), atol=1e-3)
    np.testing.assert_allclose(statistics["variance"], inputs.var(0, ddof=1), rtol=1e-3)


def test_a_run_of_another_form_is_refused_by_its_first_leaf(subject):
    whole = subject("mlp")
    with pytest.raises(ConfigError, match=r"method=soup: model 2 is of another form: dense_0/bias is \(8,\) there, \(16,\) here"):
        Soup(runs=("a",))(dataclasses.replace(whole, others=[subject("mlp", "model.width=[8,24]").params]))


def test_a_compressed_model_is_refused(subject):
    small = SVD(rank=2)(subject("mlp"))
    with pytest.raises(ConfigError, match="method=soup: averages plain models; this one is Factorized"):
        Soup(runs=("a",))(dataclasses.replace(small, others=[small.params]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"method\.runs=\[\]: name the runs to average with"),
        ({"runs": ("a",), "weights": (1.0,), "choose": "greedy"}, "the greedy choice weighs all equally"),
        ({"runs": ("a",), "weights": (1.0,)}, "1 weights for 2 models: give one for each"),
        ({"runs": ("a",), "weights": (1.0, -1.0)}, "must not be negative, and not all 0"),
    ],
)
def test_bad_settings_are_refused(settings, message, subject):
    whole = subject("mlp")
    with pytest.raises(ConfigError, match=message):
        Soup(**settings)(dataclasses.replace(whole, others=[whole.params]))
