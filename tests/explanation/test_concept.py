"""Concept vectors: certain where a linear model makes them so, chance where it does not, Welch's test against scipy."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.stats import ttest_ind

from research.core.errors import ConfigError
from research.explanation.concept import TCAV, welch

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def planted(model, with_data):
    """Class c has a light row c; the logit of 1 rises with row 0, that of 2 falls with it, no other sees it."""
    random = np.random.RandomState(0)
    label = (np.arange(400) % 5).astype(np.int32)
    image = random.standard_normal((400, 8, 8, 1)).astype(np.float32)
    image[np.arange(400), label] += 2.0
    linear = model("mlp", "model.depth=0", "model.width=[]")
    kernel = np.zeros((8, 8, 5), np.float32)
    kernel[0, :, 1], kernel[0, :, 2] = 1.0, -1.0
    kernel[6, :, 3], kernel[7, ::2, 3] = 1.0, -1.0
    params = jax.tree.map(lambda x: kernel.reshape(64, 5) if np.ndim(x) == 2 else np.zeros_like(x), linear.params)
    return with_data(dataclasses.replace(linear, params=params), test={"image": image, "label": label})


@pytest.mark.parametrize("concept", ["zero", 0, tuple(range(0, 400, 5)), "file"])
def test_a_concept_speaks_for_the_class_that_rises_with_it_and_against_the_one_that_falls(planted, concept, tmp_path):
    if concept == "file":
        concept = str(tmp_path / "light.npz")
        np.savez(concept, image=planted.data().splits["test"].fields["image"][::5])
    found = TCAV(at="input", concept=concept, target=(1, "two", 3), examples=40)(planted, None, KEY).numbers
    (name,) = found["scores"]
    assert name == {"zero": "zero", 0: "zero"}.get(concept, "light" if isinstance(concept, str) else "examples")
    assert (found["scores"][name]["one"], found["scores"][name]["two"]) == (1.0, 0.0)
    assert max(found["p"][name]["one"], found["p"][name]["two"]) < 0.05 / 3
    assert found["p"][name]["three"] > 0.05 / 3  # it looks elsewhere
    assert 0.7 < found["accuracy"][name] <= 0.95  # a fifth of the random examples are of the concept


def test_every_class_in_turn(planted):
    found = TCAV(at="input", examples=30, sets=5, judged=20)(planted, None, KEY)
    assert found.kept["scores"].shape == (5, 5, 5)
    assert found.drawn[0].values.shape == (5, 5)
    assert np.isnan(found.drawn[0].values[0, 3])  # no more than chance is left blank
    assert found.numbers["scores"]["zero"]["one"] == 1.0


def test_what_is_no_concept_is_said_to_be_none(planted):
    random = np.random.RandomState(1)
    found = TCAV(at="input", concept=tuple(map(int, random.choice(400, 60, replace=False))), target=1)(planted, None, KEY)
    assert found.numbers["p"]["examples"]["one"] > 0.05
    assert "hardly knows examples" in found.lines[-1]


def test_a_large_map_is_moved_at_all_its_places_at_once(model, with_data):
    random = np.random.RandomState(0)
    data = {"image": random.rand(60, 8, 8, 1).astype(np.float32), "label": (np.arange(60) % 5).astype(np.int32)}
    cnn = with_data(model("cnn", "model.channels=[20,6]"), test=data)
    found = TCAV(at="maps_0", concept=0, target=1, examples=10, sets=3)(cnn, None, KEY)
    assert 0 <= found.numbers["scores"]["zero"]["one"] <= 1


def test_welch_is_that_of_scipy():
    random = np.random.RandomState(0)
    first, second = random.rand(10), 0.3 + random.rand(7)
    np.testing.assert_allclose(welch(first, second), ttest_ind(first, second, equal_var=False).pvalue, rtol=1e-6)
    assert (welch(np.ones(5), np.ones(5)), welch(np.ones(5), np.zeros(5))) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concept": "thre"}, r"method\.concept='thre' is no class of this run; did you mean 'three'"),
        ({"target": 5}, r"method\.target=5 is no class"),
        ({"concept": (1, 2, 400)}, r"numbers of examples, 0 to 399"),
        ({"concept": (1, 2, 3)}, r"examples has 3 examples; a direction needs at least 6"),
        ({"concept": "none.npz"}, r"'none\.npz' cannot be read"),
        ({"at": "hidden_0"}, r"'hidden_0' is no tap"),
    ],
)
def test_what_cannot_be_asked(planted, settings, message):
    with pytest.raises(ConfigError, match=message):
        TCAV(**settings)(planted, None, KEY)


def test_it_needs_classes(model, with_data):
    assert TCAV().fits(model("mlp")) is not None
    gpt = with_data(model("gpt"), train={"tokens": np.zeros((3, 8), np.int32)})
    assert TCAV().fits(gpt) == "its data has no classes"
