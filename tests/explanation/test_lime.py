"""LIME: exact on a linear model, equal to the `lime` package within its sampling error, honest about its fit."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.explanation.lime import Lime, generator, weighted_ridge
from research.explanation.model import examples
from research.explanation.segments import features_of

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def table(model):
    """(the regressor with the stored weights, its row, the stored results)."""
    with np.load(pathlib.Path(__file__).parent / "references" / "perturbation.npz") as file:
        kept = {name.removeprefix("table/"): file[name] for name in file if name.startswith("table/")}
    params = {
        "dense_0": {"kernel": kept["hidden"], "bias": kept["bias"]},
        "head": {"kernel": kept["head"], "bias": np.zeros(2, np.float32)},
    }
    made = dataclasses.replace(model("regression"), params=params)
    return made, examples(made, {"features": kept["row"][None], "mask": np.ones(1, bool)}, target=1), kept


def test_the_slopes_of_a_table_are_those_of_the_lime_package(table):
    made, given, kept = table
    found = [Lime(samples=2000)(made, given, jax.random.key(seed)) for seed in range(5)]
    ours, theirs = np.concatenate([result.values for result in found]), kept["lime"]
    error = np.sqrt(theirs.var(0, ddof=1) * (1 / len(theirs) + 1 / len(ours)))
    assert error.max() < 0.006  # against slopes of up to 0.31
    np.testing.assert_array_less(np.abs(ours.mean(0) - theirs.mean(0)), 4 * error)
    np.testing.assert_allclose(ours.std(0, ddof=1), theirs.std(0, ddof=1), rtol=1.5)
    fits = np.array([result.numbers["r_squared"][0] for result in found])
    assert abs(fits.mean() - kept["lime_r_squared"].mean()) < 4 * kept["lime_r_squared"].std()


def test_a_linear_model_is_recovered_exactly(model, examples_of):
    made = model("regression", "model.depth=0", "model.width=[]")
    found = Lime(samples=50, ridge=0.0, deviation=0.5)(made, examples_of(made, 2, target=1), KEY)
    np.testing.assert_allclose(found.values, np.tile(np.asarray(made.params["head"]["kernel"])[:, 1], (2, 1)), atol=1e-6)
    np.testing.assert_allclose(found.numbers["r_squared"], 1.0, atol=1e-9)
    assert found.baseline is None


def test_the_parts_of_an_image_of_a_linear_model_are_recovered_exactly(model, examples_of):
    made = model("mlp", "model.depth=0", "model.width=[]")
    given = examples_of(made, 2, target=3)
    found = Lime(samples=80, ridge=0.0, segments=12, baseline=0.5)(made, given, KEY)
    part = (given.batch["image"][..., 0] - 0.5) * np.asarray(made.params["head"]["kernel"])[:, 3].reshape(8, 8)
    for values, groups, wanted in zip(found.values[..., 0], features_of(made, given, 12), part, strict=True):
        for number in range(groups.max() + 1):
            assert values[groups == number].sum() == pytest.approx(wanted[groups == number].sum(), abs=1e-5)
            assert np.ptp(values[groups == number]) == 0  # evenly
    np.testing.assert_allclose(found.numbers["r_squared"], 1.0, atol=1e-8)


def test_a_text_is_explained_by_its_tokens_alone(model, examples_of):
    text = model("gpt")
    found = Lime(samples=200)(text, examples_of(text, 2), KEY)
    assert found.values.shape == (2, 8)
    assert (found.values[1, -2:] == 0).all()
    assert np.abs(found.values[1, :-2]).min() > 0
    assert ((found.numbers["r_squared"] > 0.3) & (found.numbers["r_squared"] < 1)).all()
    assert found.numbers["features"].tolist() == [8, 6]


def test_weighted_ridge_is_that_of_scikit_learn():
    from sklearn.linear_model import Ridge

    random = np.random.RandomState(0)
    x, y, weights = random.standard_normal((40, 5)), random.standard_normal(40), random.rand(40)
    slopes, intercept, fit = weighted_ridge(x, y, weights, 0.7)
    theirs = Ridge(alpha=0.7).fit(x, y, sample_weight=weights)
    np.testing.assert_allclose(slopes, theirs.coef_, atol=1e-12)
    assert intercept == pytest.approx(theirs.intercept_)
    assert fit == pytest.approx(theirs.score(x, y, sample_weight=weights))
    assert weighted_ridge(x, np.full(40, 0.3), weights, 0.0)[2] == 1.0


def test_the_same_key_gives_the_same_and_a_batch_what_its_rows_give(model, examples_of):
    made = model("cnn")
    given = examples_of(made, 3)
    method = Lime(samples=32, segments=6)
    whole = method(made, given, KEY).values
    for i in range(3):
        np.testing.assert_allclose(method(made, given.row(i), KEY).values[0], whole[i], atol=1e-6)
    assert np.abs(method(made, given, jax.random.key(1)).values - whole).max() > 1e-4
    assert generator(KEY).random() == generator(KEY).random() != generator(jax.random.key(1)).random()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "method.samples=1: must be at least 2"),
        ({"width": 0.0}, "method.width=0.0: must be above 0"),
        ({"ridge": -1.0}, "method.ridge=-1.0: must not be negative"),
        ({"deviation": 0.0}, "method.deviation=0.0: must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Lime(**settings)
