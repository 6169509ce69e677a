"""Counterfactuals: the distance to the boundary of a linear model, the wanted class, the box, and what may change."""

import dataclasses

import jax
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.core.spec import fields
from research.explanation.counterfactual import Counterfactual
from research.explanation.model import examples
from research.figures import explanation as draw

KEY = jax.random.key(0)
SHORT = {"searches": 5, "steps": 60}
FREE = {"low": -50.0, "high": 50.0, **SHORT}


@pytest.fixture(scope="module")
def linear(model):
    """A linear classifier of 6 columns into 2 classes."""
    made = model("regression", "model.depth=0", "model.width=[]")
    spec = {**made.spec, "classes": 2, "fields": fields(features=((6,), "float32"), label=((), "int32")), "columns": list("uvwxyz")}
    return dataclasses.replace(made, spec=spec, classes=("no", "yes"))


def leads(model, features):
    """By how much the second class leads the first."""
    values = np.asarray(model.read({"features": features, "mask": np.ones(len(features), bool)})[0])
    return values[:, 1] - values[:, 0]


@pytest.mark.parametrize(("norm", "within"), [("l2", 1.01), ("l1", 1.05)])
def test_the_distance_is_that_to_a_linear_models_boundary(norm, within, linear, examples_of):
    given = examples_of(linear, 4)
    found = Counterfactual(norm=norm, margin=0.02)(linear, given, KEY)
    kernel = np.asarray(linear.params["head"]["kernel"])
    normal = kernel[:, 1] - kernel[:, 0]
    length = np.linalg.norm(normal) if norm == "l2" else np.abs(normal).max()
    least = (np.abs(leads(linear, given.batch["features"])) + 0.02) / length
    assert found.numbers["flipped"] == [True] * 4
    ratio = np.asarray(found.numbers[norm]) / least
    assert ratio.min() > 0.9999
    assert ratio.max() < within
    before, after = (leads(linear, found.kept[name]) for name in ("before", "after"))
    assert (np.sign(before) == -np.sign(after)).all()
    np.testing.assert_allclose(np.abs(after), 0.02, atol=1e-4)
    if norm == "l1":
        assert max(found.numbers["entries_changed"]) <= 2


def test_the_wanted_class_is_the_target_and_else_any_other(model, examples_of):
    made = model("cnn")
    batch = examples_of(made, 3).batch
    any_other = Counterfactual(**FREE)(made, examples(made, batch), KEY)
    assert any_other.numbers["flipped"] == [True] * 3
    assert all(a != b for a, b in zip(any_other.numbers["before"], any_other.numbers["after"], strict=True))
    for target in ("two", "four"):
        given = examples(made, batch, target=target)
        found = Counterfactual(**FREE)(made, given, KEY)
        answers = np.asarray(made.read({**batch, "image": found.kept["after"]})[0]).argmax(1)
        for i in range(3):
            if any_other.numbers["before"][i] != target:
                assert found.numbers["flipped"][i]
                assert found.numbers["after"][i] == target == made.classes[answers[i]]
                assert found.numbers["l2"][i] >= any_other.numbers["l2"][i] * 0.9  # any other class is no farther
                assert f"{found.numbers['before'][i]} -> {target} at distance" in found.lines[i]


def test_nothing_leaves_the_box_or_changes_beside_what_may(model, examples_of, linear):
    made = dataclasses.replace(model("mlp"), statistics={"image_mean": np.array([0.5]), "image_std": np.array([0.25])})
    batch = examples_of(made, 3).batch
    batch = {**batch, "image": np.clip(batch["image"], -2.0, 2.0)}  # black and white, as the model reads them
    found = Counterfactual(only=(0, 0, 4, 8), **SHORT)(made, examples(made, batch), KEY)
    after = found.kept["after"]
    assert after.min() >= -2.0
    assert after.max() <= 2.0
    assert (after[:, 4:] == batch["image"][:, 4:]).all()
    assert np.abs(after[:, :4] - batch["image"][:, :4]).max() > 0.01
    given = examples_of(linear, 2)
    columns = Counterfactual(only=("v", 3))(linear, given, KEY)
    changed = (columns.kept["after"] != given.batch["features"]).any(0)
    assert changed.tolist() == [False, True, False, True, False, False]


def test_what_cannot_flip_is_told_and_left_as_it_is(linear, examples_of):
    given = examples_of(linear, 2)
    found = Counterfactual(low=-5.0, high=5.0, margin=1000.0, steps=5, searches=2)(linear, given, KEY)
    assert found.numbers["flipped"] == [False, False]
    np.testing.assert_array_equal(found.kept["after"], found.kept["before"])
    assert found.numbers["before"] == found.numbers["after"]
    assert "no change found that flips" in found.lines[0]
    assert found.numbers["l2"].tolist() == [0.0, 0.0]


def test_a_batch_finds_what_its_rows_find(model, examples_of):
    made = model("mlp")
    given = examples_of(made, 3)
    method = Counterfactual(**FREE)
    whole = method(made, given, KEY)
    for i in (0, 2):
        np.testing.assert_allclose(method(made, given.row(i), KEY).numbers["l2"], whole.numbers["l2"][i], rtol=1e-3)


def test_before_after_and_difference_are_drawn(model, linear, examples_of):
    made = model("mlp")
    found = Counterfactual(**FREE)(made, examples_of(made, 1), KEY)
    pictures, difference = found.panels(0)
    assert isinstance(pictures, draw.Pictures)
    assert isinstance(difference, draw.Overlay)
    np.testing.assert_array_equal(pictures.images[1], found.kept["after"][0])
    np.testing.assert_allclose(difference.values, (found.kept["after"] - found.kept["before"])[0, ..., 0])
    rows, _ = Counterfactual()(dataclasses.replace(linear, statistics={"features_mean": np.full(6, 100.0), "features_std": np.full(6, 10.0)}),
                               examples_of(linear, 1), KEY).panels(0)  # fmt: skip
    assert isinstance(rows, draw.Rows)
    _, before, after, change = rows.rows[0]  # in the data's own units
    assert before > 50
    assert change == pytest.approx(after - before)


def test_what_does_not_fit_says_why(model):
    assert "no classes" in Counterfactual().fits(model("regression"))
    assert Counterfactual().fits(model("gpt")) is not None
    assert Counterfactual().fits(model("cnn")) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l3"}, "method.norm='l3' is unknown"),
        ({"steps": 0}, "method.steps=0: must be at least 1"),
        ({"rate": 0.0}, "method.rate=0.0: must be above 0"),
        ({"margin": -1.0}, "method.margin=-1.0: must not be negative"),
        ({"low": 1.0, "high": 0.0}, "method.low=1.0: must be below high=0.0"),
        ({"only": (5, 5, 5, 8)}, "method.only=[5, 5, 5, 8] covers nothing of an input of 8 x 8 x 1"),
        ({"only": (8, 0, 20, 8)}, "method.only=[8, 0, 20, 8] covers nothing of an input of 8 x 8 x 1"),
        ({"only": ("left",)}, "method.only=['left']: of an image it is [top,left,bottom,right], of a table a list of columns"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message, model, examples_of):
    with pytest.raises(ConfigError) as told:
        Counterfactual(**settings)(model("mlp"), examples_of(model("mlp"), 1), KEY)
    assert message in str(told.value)
