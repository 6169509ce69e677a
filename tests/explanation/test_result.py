"""Attributions and findings: what is kept, what is told, and which picture fits."""

import dataclasses

import numpy as np
import pytest
from matplotlib.axes import Axes

from research.explanation.result import Attribution, Finding, beside, one_each
from research.figures import explanation as draw


def attribution(model, examples, shape, **more):
    values = np.random.RandomState(0).standard_normal((len(examples), *shape)).astype(np.float32)
    outputs = np.arange(len(examples), dtype=np.float32)
    made = Attribution(values, None, None, outputs, examples.target, method="saliency", names=tuple(examples.names), subject=(model, examples))
    return dataclasses.replace(made, **more)


@pytest.mark.parametrize(
    ("family", "shape", "kind"),
    [
        ("cnn", (8, 8, 1), draw.Overlay),
        ("cnn", (4, 4), draw.Overlay),
        ("cnn", (16,), draw.Bars),
        ("cnn", (4, 4, 2, 3), draw.Heat),
        ("regression", (6,), draw.Bars),
        ("gpt", (8,), draw.Tokens),
        ("gpt", (8, 16), draw.Heat),
    ],
)
def test_values_of_any_shape_have_their_picture(family, shape, kind, model, examples_of):
    subject = model(family)
    (panel,) = attribution(subject, examples_of(subject, 2), shape).panels(1)
    assert isinstance(panel, kind)
    assert draw.png(panel).startswith(b"\x89PNG")


def test_positions_that_do_not_count_are_not_drawn(model, examples_of):
    gpt = model("gpt")
    panels = [attribution(gpt, examples_of(gpt, 2), (8,)).panels(i)[0] for i in range(2)]
    assert [len(panel.tokens) for panel in panels] == [8, 6]


def test_a_picture_says_what_it_is_about(model, examples_of):
    cnn, gpt = model("cnn"), model("gpt")
    named = attribution(cnn, examples_of(cnn, 2, target=["two", 4]), (8, 8, 1))
    assert [named.explained(i) for i in range(2)] == ["two", "four"]
    assert named.panels(0)[0].title == "saliency: two"
    assert attribution(gpt, examples_of(gpt, 1, target="c", position=2), (8,)).explained(0) == "'c' after position 2"
    inside = attribution(cnn, examples_of(cnn, 1), (8, 8, 1), settings={"of": {"tap": "maps_1", "unit": [0, None, 1]}})
    assert inside.explained(0) == "maps_1 [0, None, 1]"
    bare = dataclasses.replace(named, subject=None)
    assert bare.explained(1) == "output 4"
    assert isinstance(bare.panels(0)[0], draw.Heat)


def test_columns_have_their_names(model, examples_of):
    subject = model("regression")
    spec = {**subject.spec, "columns": list("uvwxyz")}
    named = attribution(dataclasses.replace(subject, spec=spec), examples_of(subject, 1), (6,))
    assert list(named.panels(0)[0].names) == list("uvwxyz")
    assert list(dataclasses.replace(named, at="hidden_0").panels(0)[0].names) == list("012345")


def test_what_is_kept_and_what_is_told(model, examples_of):
    gpt = model("gpt")
    whole = attribution(gpt, examples_of(gpt, 2), (8,), delta=np.ones(2, np.float32), numbers={"error": [1, 2]}, kept={"extra": np.zeros(3)})
    assert set(whole.arrays()) == {"values", "delta", "output", "target", "extra"}
    told = whole.summary()
    assert told["completeness_delta"].tolist() == [1, 1]
    assert told["position"].tolist() == [7, 5]
    assert told["error"] == [1, 2]
    assert "completeness_delta" not in attribution(gpt, examples_of(gpt, 1), (8,)).summary()


def test_show_draws_the_input_too(model, examples_of):
    cnn, gpt = model("cnn"), model("gpt")
    shown = attribution(cnn, examples_of(cnn, 2), (8, 8, 1))
    assert len(shown.pictured(1)) == 1
    np.testing.assert_array_equal(shown.pictured(1)[0].images[0], examples_of(cnn, 2).batch["image"][1])
    assert shown.show(1).get_suptitle() == "example 1"
    assert attribution(gpt, examples_of(gpt, 1), (8,)).pictured(0) == ()


def test_methods_stand_beside_each_other_and_a_notebook_shows_them(model, examples_of):
    cnn = model("cnn")
    one, two = (attribution(cnn, examples_of(cnn, 2), (8, 8, 1), method=name) for name in ("saliency", "lime"))
    picture = beside([one, Finding(method="none", names=one.names), two], 1)
    assert picture.get_suptitle() == "example 1"
    titles = [axes.get_title(loc="left") for axes in picture.findobj(Axes)]
    assert [title.partition(":")[0] for title in titles if title] == ["saliency", "lime"]
    data, how = picture._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert 300 < how["width"] < 2000
    assert beside([]).get_suptitle() == ""


def test_one_number_for_each_example_is_told_from_what_only_looks_like_it():
    numbers = {
        "l2": np.ones(2),
        "rank": [1, 2],
        "ragged": [[1], [1, 2]],
        "flipped": [True, False],
        "names": ["a", "b"],
        "score": 0.5,
        "three": [1, 2, 3],
    }
    assert list(one_each(Finding(numbers=numbers, names=("first", "second")))) == ["l2", "rank"]
    assert one_each(Finding(numbers={"length": 32, "none": []}, names=("first",))) == {}
    assert one_each(Finding(numbers={"none": []})) == {}
    named = {"target": [1, 2], "position": [3, 4], "against": [5, 6], "explained": ["a", "b"], "output": [0.5, 0.25]}
    assert one_each(Finding(numbers=named, names=("first", "second"))) == {"explained": ["a", "b"], "output": [0.5, 0.25]}


def test_a_finding_of_the_whole_and_of_each_example():
    line = draw.Lines({"a": ([0, 1], [0, 1])}, "whole")
    whole = Finding((line,), {"score": 1.0}, {"scores": np.ones(2)}, ((line, line),), method="probe", names=("first",))
    assert (len(whole.panels(0)), whole.summary(), whole.arrays()["scores"].tolist()) == (2, {"score": 1.0}, [1, 1])
    assert whole.show().get_suptitle() == "probe"
    assert dataclasses.replace(whole, each=()).panels(0) == ()
