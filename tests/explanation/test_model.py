"""A model as explanation sees it: taps read and replaced, targets by every name, and what is refused."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.explanation import model as room
from research.explanation.model import examples, pick, replaced, score


@pytest.fixture
def batch(examples_of):
    """batch(model, 3): fields alone."""
    return lambda model, count: dict(examples_of(model, count).batch)


def test_taps_are_known_in_their_order_without_computing(model):
    assert next(iter(model("cnn").taps)) == "input"
    assert list(model("cnn").taps)[-1] == "logits"
    assert model("cnn").taps["input"].shape == (1, 8, 8, 1)
    assert model("gpt").outputs == (8, 11)
    assert (model("cnn").field, model("regression").field, model("gpt").field) == ("image", "features", "tokens")


def test_reading_does_not_compile_again(model, batch):
    cnn = model("cnn")
    cnn.read(batch(cnn, 3), ("logits",))
    before = room._read._cache_size()
    cnn.read(batch(cnn, 3), ("logits",))
    assert room._read._cache_size() == before
    cnn.read(batch(cnn, 3), ("logits", "input"))
    assert room._read._cache_size() == before + 1


def test_an_edit_replaces_a_tap_where_its_mask_says(model, batch):
    gpt = model("gpt")
    one, two = batch(gpt, 2), batch(gpt, 2)
    two["tokens"] = (two["tokens"] + 1) % 11
    (first, taps), (second, _) = gpt.read(one, ("input",)), gpt.read(two)
    mask = np.zeros((2, 8, 1), bool)
    mask[:, 5:] = True
    mixed, _ = gpt.read(two, (), {"input": (mask, taps["input"])})
    np.testing.assert_allclose(mixed[:, :5], second[:, :5], atol=1e-6)  # what comes before does not see it
    assert np.abs(np.asarray(mixed[0, 5:]) - np.asarray(second[0, 5:])).max() > 1e-3
    whole, _ = gpt.read(two, (), {"input": replaced(taps["input"])})
    np.testing.assert_allclose(whole, first, atol=1e-6)


def test_a_score_is_the_output_that_was_chosen(model, examples_of):
    for family in ("cnn", "gpt"):
        subject = model(family)
        chosen = examples_of(subject, 3, target=[1, 2, 0])
        values, _ = jax.jit(score, static_argnums=0)(subject.objective, subject.arrays, chosen.batch, chosen.target)
        outputs = np.asarray(subject.read(chosen.batch)[0])
        expected = [outputs[(i, *chosen.target[i])] for i in range(3)]
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        np.testing.assert_allclose(pick(jax.numpy.asarray(outputs), chosen.target), expected)


def test_targets_have_every_name(model, batch):
    cnn, gpt = model("cnn"), model("gpt")
    outputs = np.asarray(cnn.read(batch(cnn, 3))[0])
    assert examples(cnn, batch(cnn, 3)).target[:, 0].tolist() == outputs.argmax(1).tolist()
    assert examples(cnn, batch(cnn, 3), target="three").target.tolist() == [[3]] * 3
    assert examples(cnn, batch(cnn, 3), target=["one", 2, "4"]).target[:, 0].tolist() == [1, 2, 4]
    assert examples(gpt, batch(gpt, 2), target="c").target.tolist() == [[7, 2], [5, 2]]  # the second ends in padding
    assert examples(gpt, batch(gpt, 2), target=3, position=-2).target.tolist() == [[6, 3], [4, 3]]
    assert examples(model("regression"), batch(model("regression"), 2)).target.tolist() == [[0], [0]]


def test_a_class_whose_name_is_a_number_is_taken_by_its_name(model, batch):
    cnn = dataclasses.replace(model("cnn"), classes=("4", "3", "2", "1", "0"))
    assert examples(cnn, batch(cnn, 1), target=4).target.tolist() == [[0]]


def test_names_of_outputs(model):
    assert model("cnn").name(2) == "two"
    assert model("gpt").name(2) == "'c'"
    assert model("regression").name(1) == "1"
    assert dataclasses.replace(model("gpt"), pieces=[b"\xff"] * 11).token(0) == "\ufffd"


BAD = {
    "out of range": ("cnn", {"target": 5}, "target=5: this model has the outputs 0 to 4"),
    "negative": ("cnn", {"target": -1}, "target=-1: this model has the outputs 0 to 4"),
    "misspelt": ("cnn", {"target": "thre"}, "target='thre' is no class of this run; did you mean 'three'?"),
    "a token that is none": ("gpt", {"target": "zz"}, "target='zz' is no token of this run"),
    "one for each, but fewer": ("cnn", {"target": [1, 2]}, "target lists 2 outputs for 3 examples"),
    "a position where there are none": ("cnn", {"position": 0}, "position=0: this model has one output an example"),
    "a position beyond the text": ("gpt", {"position": 6}, "position=6: the text has 6 tokens, 0 to 5"),
    "a position before the text": ("gpt", {"position": -7}, "position=-7: the text has 6 tokens, 0 to 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_target_is_refused(case, model, batch):
    family, arguments, message = BAD[case]
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        examples(model(family), batch(model(family), 3), **arguments)


def test_an_input_of_another_shape_is_refused(model, batch):
    cnn, gpt = model("cnn"), model("gpt")
    wide = {**batch(cnn, 2), "image": np.zeros((2, 9, 8, 1), np.float32)}
    with pytest.raises(ConfigError, match=r"an example has the shape \(9, 8, 1\), and the model reads \(8, 8, 1\)"):
        examples(cnn, wide)
    with pytest.raises(ConfigError, match="this model reads 'image'; the batch has features, index, mask"):
        examples(cnn, {"features": np.zeros((2, 3)), "mask": np.ones(2, bool)})
    for length in (0, 9):
        text = {"tokens": np.zeros((1, length), np.int32), "mask": np.ones((1, length), bool)}
        with pytest.raises(ConfigError, match=f"a text of {length} tokens: this model reads 1 to 8"):
            examples(gpt, text)


@pytest.mark.parametrize("family", ["cnn", "gpt"])
def test_a_mask_that_covers_nothing_is_refused(family, model, batch):
    fields = batch(model(family), 3)
    fields["mask"] = fields["mask"].copy()
    fields["mask"][1] = False
    with pytest.raises(ConfigError, match=r"^example 1: its mask covers nothing, so there is nothing to explain"):
        examples(model(family), fields)


def test_an_unknown_tap_is_refused(model, batch):
    cnn = model("cnn")
    for arguments in ((("maps_9",),), ((), {"maps_9": replaced(np.zeros(1))})):
        with pytest.raises(ConfigError, match="'maps_9' is no tap of this model; did you mean 'maps_"):
            cnn.read(batch(cnn, 1), *arguments)


def test_a_row_of_examples(model, examples_of):
    whole = examples_of(model("gpt"), 3)
    row = whole.row(1)
    assert (len(row), row.names, row.length(0)) == (1, ["example 1"], 6)
    np.testing.assert_array_equal(row.batch["tokens"], whole.batch["tokens"][1:2])
    np.testing.assert_array_equal(row.target, whole.target[1:2])
