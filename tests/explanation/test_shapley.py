"""Shapley values: equal to the definition by brute force, with the properties that define them, and to the `shap` package's."""

import dataclasses
import itertools
import math
import pathlib
import sys
import types

import jax
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.explanation.model import examples
from research.explanation.perturbation import coalition_scores
from research.explanation.segments import features_of
from research.explanation.shapley import (
    Shap,
    as_explanation,
    every_coalition,
    exact_shapley,
    kernel_coalitions,
    kernel_shapley,
    permutation_shapley,
)

KEY = jax.random.key(0)
ALL = ({"estimator": "kernel"}, {"estimator": "exact"}, {"estimator": "permutation", "samples": 400})
NINE = {"segments": 9}


def brute(worth, count):
    """Shapley values as the mean over all orders."""
    values = np.zeros(count)
    for order in itertools.permutations(range(count)):
        there = np.zeros(count, bool)
        for j in order:
            before = worth(there[None])[0]
            there[j] = True
            values[j] += worth(there[None])[0] - before
    return values / math.factorial(count)


def game_of(table):
    """A game by its table, in the order of `every_coalition`."""
    return lambda z: table[(z * (1 << np.arange(z.shape[1]))).sum(1)]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_kernel_and_exact_equal_brute_force_on_any_game(count):
    table = np.random.RandomState(count).standard_normal(2**count)
    game = game_of(table)
    wanted = brute(game, count)
    np.testing.assert_allclose(exact_shapley(table), wanted, atol=1e-12)
    z, weights = kernel_coalitions(count, 2**count, np.random.default_rng(0))
    np.testing.assert_allclose(kernel_shapley(z, game(z) - table[0], weights, table[-1] - table[0]), wanted, atol=1e-10)


@pytest.mark.parametrize(("family", "estimator"), [("cnn", "kernel"), ("cnn", "exact"), ("regression", "kernel"), ("gpt", "exact")])
def test_a_models_values_equal_brute_force(family, estimator, model, examples_of):
    made = model(family)
    given = examples_of(made, 2)
    found = Shap(estimator, segments=6, background=0.2)(made, given, KEY)
    for i, groups in enumerate(features_of(made, given, 6)):
        count = int(groups.max()) + 1
        table = coalition_scores(made, given.row(i), 0.2, groups, every_coalition(count))
        wanted = brute(game_of(table), count) if count <= 6 else exact_shapley(table)
        values = found.values[i] if family != "cnn" else found.values[i, ..., 0]
        np.testing.assert_allclose([values[groups == j].sum() for j in range(count)], wanted, atol=1e-6)
    assert np.abs(found.values).max() > 1e-3


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings["estimator"])
def test_the_values_sum_to_the_change_of_the_output(settings, model, examples_of):
    made = model("cnn")
    given = examples_of(made, 2)
    found = Shap(**settings, **NINE)(made, given, KEY)
    blank = made.read({**given.batch, "image": np.zeros((2, 8, 8, 1), np.float32)})[0]
    before = np.asarray(blank)[range(2), given.target[:, 0]]
    np.testing.assert_allclose(found.values.sum((1, 2, 3)), found.output - before, atol=1e-5)
    np.testing.assert_allclose(found.numbers["expected"], before, atol=1e-6)
    np.testing.assert_allclose(found.delta, 0.0, atol=1e-5)


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings["estimator"])
def test_equal_columns_share_alike_and_one_that_is_not_read_has_nothing(settings, model, examples_of):
    made = model("regression")
    kernel = np.array(made.params["dense_0"]["kernel"])
    kernel[1], kernel[4] = kernel[0], 0.0
    made = dataclasses.replace(made, params={**made.params, "dense_0": {**made.params["dense_0"], "kernel": kernel}})
    given = examples_of(made, 1)
    features = given.batch["features"].copy()
    features[:, 1] = features[:, 0]
    given = examples(made, {"features": features, "mask": np.ones(1, bool)}, target=0)
    values = Shap(**settings)(made, given, KEY).values[0]
    assert abs(values[4]) < 1e-6
    assert abs(values[0]) > 0.01
    assert values[0] == pytest.approx(values[1], abs=1e-6 if settings["estimator"] != "permutation" else 0.05)


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings["estimator"])
def test_a_linear_model_has_weight_times_distance_from_the_mean_background(settings, model, examples_of, with_data):
    made = model("regression", "model.depth=0", "model.width=[]")
    training = np.random.RandomState(4).standard_normal((7, 6)).astype(np.float32)
    made = with_data(made, train={"features": training})
    given = examples_of(made, 2, target=1)
    found = Shap(**settings, background="data", references=7)(made, given, KEY)
    weights = np.asarray(made.params["head"]["kernel"])[:, 1]
    np.testing.assert_allclose(found.values, (given.batch["features"] - training.mean(0)) * weights, atol=1e-5)
    np.testing.assert_allclose(found.baseline, np.tile(training.mean(0), (2, 1)), atol=1e-6)


def test_values_over_a_background_equal_those_of_the_shap_package(model, with_data):
    with np.load(pathlib.Path(__file__).parent / "references" / "perturbation.npz") as file:
        kept = {name.removeprefix("table/"): file[name] for name in file if name.startswith("table/")}
    params = {"dense_0": {"kernel": kept["hidden"], "bias": kept["bias"]}, "head": {"kernel": kept["head"], "bias": np.zeros(2, np.float32)}}
    made = with_data(dataclasses.replace(model("regression"), params=params), train={"features": kept["background"]})
    given = examples(made, {"features": kept["row"][None], "mask": np.ones(1, bool)}, target=1)
    for estimator in ("kernel", "exact"):
        found = Shap(estimator, background="data", references=5)(made, given, KEY)
        np.testing.assert_allclose(found.values[0], kept["shap"], atol=1e-6)


def test_a_sample_of_coalitions_comes_near_the_exact_values_and_nearer_with_more():
    count = 12
    random = np.random.RandomState(0)
    weights, pairs = random.standard_normal(count), 0.3 * random.standard_normal((count, count))
    table = np.array([z @ weights + np.tanh(z @ pairs @ z) for z in every_coalition(count).astype(float)])
    game, wanted = game_of(table), exact_shapley(table)
    errors = []
    for samples in (48, 200, 1000):
        each = []
        for seed in range(5):
            z, share = kernel_coalitions(count, samples, np.random.default_rng(seed))
            assert len(np.unique(z, axis=0)) == len(z) <= samples
            assert not (z.all(1) | ~z.any(1)).any()
            assert share.sum() == pytest.approx(sum((count - 1) / (s * (count - s)) for s in range(1, count)))
            each.append(kernel_shapley(z, game(z) - table[0], share, table[-1] - table[0]) - wanted)
        errors.append(float(np.abs(each).mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02 < np.abs(wanted).max() / 10


@pytest.mark.parametrize("samples", [700, 2048])
def test_the_outermost_sizes_are_gone_through_and_every_coalition_has_its_opposite(samples):
    z, weights = kernel_coalitions(64, samples, np.random.default_rng(0))
    sizes = z.sum(1)
    assert (sizes == 1).sum() == (sizes == 63).sum() == 64
    assert samples - 1 <= len(z) <= samples
    there = {(row.tobytes(), weight) for row, weight in zip(z, weights, strict=True)}
    assert all(((~row).tobytes(), weight) in there for row, weight in zip(z, weights, strict=True))


def test_an_odd_game_has_values_and_errors_by_permutation():
    count = 8
    table = np.random.RandomState(1).standard_normal(2**count)
    game, wanted = game_of(table), exact_shapley(table)
    values, start, error = permutation_shapley(game, count, 400, np.random.default_rng(0))
    assert start == table[0]
    assert values.sum() == pytest.approx(table[-1] - table[0])
    assert 0 < error < 0.1
    assert np.abs(values - wanted).max() < 4 * error
    additive = game_of(every_coalition(count) @ np.arange(8.0))
    values, _, error = permutation_shapley(additive, count, 2, np.random.default_rng(0))
    np.testing.assert_allclose(values, np.arange(8.0), atol=1e-12)
    assert error == pytest.approx(0.0, abs=1e-12)


def test_one_feature_has_the_whole_change(model, examples_of):
    made = model("cnn")
    for settings in ALL:
        found = Shap(**settings, segments=1)(made, examples_of(made, 1), KEY)
        assert found.values.sum() == pytest.approx(float(found.output[0] - found.numbers["expected"][0]), abs=1e-5)


def test_too_many_features_and_too_few_samples_are_refused(model, examples_of):
    made = model("cnn")
    given = examples_of(made, 1)
    with pytest.raises(ConfigError, match=r"estimator=exact: 64 features have 2\^64 coalitions; at most 12, or estimator=kernel; segments=12 cuts"):
        Shap("exact")(made, given, KEY)
    with pytest.raises(ConfigError, match=r"method\.samples=100: 64 features need at least 128"):
        Shap(samples=100)(made, given, KEY)
    assert Shap(samples=6, segments=3)(made, given, KEY).delta == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "kernal"}, "method.estimator='kernal' is unknown; did you mean 'kernel'?"),
        ({"backend": "shapp"}, "method.backend='shapp' is unknown; did you mean 'shap'?"),
        ({"background": "mean"}, "method.background='mean': must be a number, or data"),
        ({"references": 0}, "method.references=0: must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Shap(**settings)


def test_a_background_of_data_needs_data(model):
    assert "background=data needs the run's data" in Shap(background="data").fits(model("mlp"))
    assert Shap().fits(model("mlp")) is None


def test_the_package_that_is_not_there_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "shap", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"backend=shap needs the shap package: pip install 'ontogeny\[explain\]', or backend=own"):
        Shap(backend="shap")


def test_the_packages_plots_get_the_table_with_its_columns(model, examples_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "shap", types.SimpleNamespace(Explanation=types.SimpleNamespace))
    made = model("regression")
    made = dataclasses.replace(made, spec={**made.spec, "columns": list("uvwxyz")})
    given = examples_of(made, 2, target=1)
    found = dataclasses.replace(Shap()(made, given, KEY), subject=(made, given))
    shown = as_explanation(found)
    assert shown.feature_names == list("uvwxyz")
    np.testing.assert_array_equal(shown.data, given.batch["features"])
    np.testing.assert_allclose(shown.base_values, found.numbers["expected"], atol=1e-5)
