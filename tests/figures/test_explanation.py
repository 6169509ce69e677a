"""Every kind of panel, whatever is in it."""

import io

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from research.figures import explanation as draw
from research.figures import style

RANDOM = np.random.RandomState(0)
NAN = np.nan
ODD = "<script>żółw\n漢 $x$ \\frac{1}"
IMAGE = RANDOM.rand(6, 9, 3)
PANELS = {
    "overlay": draw.Overlay(IMAGE, RANDOM.standard_normal((6, 9)), ODD),
    "a coarse overlay of one channel": draw.Overlay(np.zeros((8, 8, 1)), RANDOM.rand(2, 2)),
    "an overlay of zeros": draw.Overlay(IMAGE, np.zeros((6, 9))),
    "an overlay of nothing": draw.Overlay(IMAGE, np.full((6, 9), NAN)),
    "a huge overlay": draw.Overlay(IMAGE * NAN, RANDOM.standard_normal((6, 9)) * 1e300),
    "a tiny overlay": draw.Overlay(IMAGE, RANDOM.standard_normal((6, 9)) * 1e-300),
    "tokens": draw.Tokens(["a", ODD, " ", "\t", "", "x" * 200, "$"], np.array([1, -1, NAN, 0, 1, -2, 3.0]), ODD),
    "no tokens": draw.Tokens([], np.zeros(0)),
    "many tokens": draw.Tokens(["line of text\n"] * 500, np.zeros(500)),
    "bars": draw.Bars(["a", ODD], np.array([1.0, -2.0]), ODD, "x", np.array([0.5, -3.0]), np.array([1.5, -1.0])),
    "many bars": draw.Bars([f"{'long' * 20} {i}" for i in range(200)], RANDOM.standard_normal(200)),
    "odd bars": draw.Bars(["a", "b", "c"], np.array([NAN, 1e200, 0]), low=np.full(3, NAN), high=np.full(3, 1e201)),
    "no bars": draw.Bars([], np.zeros(0)),
    "heat": draw.Heat(RANDOM.standard_normal((3, 5)), ["a", "b", ODD], list("abcde"), ODD, "x", "y"),
    "a large heat map": draw.Heat(RANDOM.rand(300, 400), [str(i) for i in range(300)], [str(i) for i in range(400)], signed=False),
    "a heat map of nothing": draw.Heat(np.full((2, 2), NAN)),
    "an unsigned heat map of nothing": draw.Heat(np.full((2, 2), NAN), signed=False),
    "a huge heat map": draw.Heat(np.array([[1e300, -1e300], [NAN, 0]])),
    "lines": draw.Lines({ODD: ([0, 1], [1, 0]), "b": ([0, 1], [NAN, 1])}, ODD, "x", "y"),
    "many lines": draw.Lines({str(i): (range(30), range(30)) for i in range(30)}),
    "no lines": draw.Lines({}),
    "points": draw.Points(RANDOM.rand(9, 2), [ODD, "b", "c"] * 3, ODD, "x", "y"),
    "points of many groups": draw.Points(RANDOM.rand(40, 2), [str(i) for i in range(40)]),
    "no points": draw.Points(np.zeros((0, 2))),
    "pictures": draw.Pictures(RANDOM.rand(7, 4, 8, 3), [ODD] * 7, ODD),
    "many pictures": draw.Pictures(RANDOM.rand(100, 4, 4, 1)),
    "no pictures": draw.Pictures(np.zeros((0, 4, 4, 1))),
    "rows": draw.Rows([ODD, "b"], [[ODD, 1.23456789], ["c", 2]], ODD),
    "many rows": draw.Rows(["a"], [[i] for i in range(100)]),
    "no rows": draw.Rows(["a", "b"], []),
}


def texts(figure: Figure):
    """All that is written in a figure."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def decoded(panel):
    return matplotlib.image.imread(io.BytesIO(draw.png(panel)))


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_of_any_content_is_drawn(name):
    picture = decoded(PANELS[name])
    assert 100 < picture.shape[0] < 6000
    assert 250 < picture.shape[1] < 2300
    assert (picture[..., :3] < 0.9).any()


def test_panels_keep_their_sizes_beside_each_other(tmp_path, size_of):
    small, large = draw.Bars(["a"], np.ones(1)), draw.Heat(RANDOM.rand(30, 30))
    draw.save([small], tmp_path / "small.png")
    draw.save([large], tmp_path / "large.png")
    draw.save([small, large, small], tmp_path / "both.png", title="three")
    (w, h), (wide, high), both = (size_of(tmp_path / f"{name}.png") for name in ("small", "large", "both"))
    assert both[0] == pytest.approx(w + wide, abs=3)  # the third begins a row of its own
    assert both[1] == pytest.approx(h + high + 0.4 * style.DOTS_PER_INCH, abs=3)
    draw.save([], tmp_path / "none.png", title="none")
    assert size_of(tmp_path / "none.png")[0] > 300


def test_red_speaks_for_and_blue_against(tmp_path):
    picture = decoded(draw.Overlay(np.ones((2, 2, 3)), np.array([[1.0, -1.0], [0.0, 0.0]])))
    h, w = picture.shape[:2]
    left, right, below = (picture[int(y * h), int(x * w), :3] for y, x in ((0.3, 0.2), (0.3, 0.55), (0.75, 0.2)))
    assert left[0] > left[2] + 0.2
    assert right[2] > right[0] + 0.2
    assert below == pytest.approx([1, 1, 1], abs=0.02)


@pytest.mark.parametrize(
    ("values", "told"), [([0.0, 0.0], "all 0"), ([1.0, NAN], "1 not finite"), ([NAN, np.inf], "2 not finite"), ([3.0, -1.0], "full colour: 3")]
)
def test_what_colours_cannot_tell_is_said(values, told):
    assert any(told in text for text in texts(draw.figure([draw.Tokens(["a", "b"], np.array(values))])))


def test_what_is_left_out_is_counted():
    for panel, told in (
        (PANELS["many bars"], "and 168 more"),
        (PANELS["many rows"], "and 68 more"),
        (PANELS["many pictures"], "and 36 more"),
        (PANELS["many tokens"], "and 400 more tokens"),
        (PANELS["points of many groups"], "40 groups"),
    ):
        assert any(told in text for text in texts(draw.figure([panel]))), told


def test_the_largest_bars_come_first_whatever_their_sign():
    panel = draw.Bars(["a", "b", "c"], np.array([1.0, -3.0, NAN]))
    (axes,) = draw.figure([panel]).findobj(Axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a", "c"]


def test_a_coloured_text_keeps_its_lines():
    places = draw._places(["ab", "c\n", "d", "漢", "x" * 300])
    assert places == [(0, 0, 2), (2, 0, 2), (0, 1, 1), (1, 1, 2), (0, 2, draw.PER_LINE)]


def test_strength_is_the_largest_finite_size():
    assert draw.strength(np.array([1, -3, NAN, np.inf])) == 3.0
    assert draw.strength(np.array([0.0, NAN])) == draw.strength(np.zeros(0)) == 1.0
