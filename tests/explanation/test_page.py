"""The page: whole in itself, every text only text, every number within reach."""

import html.parser

import numpy as np
import pytest

from research.explanation.page import page
from research.explanation.result import Finding
from research.figures import explanation as draw

EVIL = """<script>alert("1")</script>'"&<img src=x onerror=alert(1)>"""


class Seen(html.parser.HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def finding(*panels, **more):
    return Finding(drawn=panels, method="method", **more)


def test_every_text_is_only_text():
    tokens = draw.Tokens([EVIL, "a"], np.array([1.0, -2.0]), EVIL)
    rows = draw.Rows([EVIL, "b"], [[EVIL, 1.0]], EVIL)
    bars = draw.Bars(["a"], np.ones(1), EVIL)
    numbers = {EVIL: EVIL, "each": np.ones(1)}
    whole = Finding((bars,), numbers, {}, ((tokens, rows),), (), EVIL, {EVIL: EVIL, "nested": {EVIL: [EVIL]}}, (EVIL,))
    seen = Seen(page(EVIL, [whole], facts={EVIL: EVIL, "data": {"root": EVIL}}, warnings=[EVIL]))
    assert {tag for tag, _ in seen.elements} & {"script", "link", "iframe", "object"} == set()
    images = [attributes for tag, attributes in seen.elements if tag == "img"]
    assert [image["alt"] for image in images] == [EVIL]
    assert all(set(attributes) <= {"alt", "src", "style", "title", "class", "lang", "charset"} for _, attributes in seen.elements)
    assert seen.words.count(EVIL) >= 12
    assert "http" not in page("title", [whole], facts={})


def test_tokens_have_their_values_in_reach():
    panel = draw.Tokens(["a", "\n", "b", "c"], np.array([2.0, -1.0, 0.0, np.nan]), "text")
    seen = Seen(page("title", [finding(panel)], facts={}))
    spans = [attributes for tag, attributes in seen.elements if tag == "span"]
    assert [span["title"] for span in spans] == ["2", "-1", "0", "nan"]
    strengths = [span["style"].rpartition(",")[2] for span in spans]
    assert strengths == ["0.600)", "0.300)", "0.000)", "0.300)"]
    assert "rgba(197,48,48" in spans[0]["style"]  # red speaks for
    assert "rgba(31,95,191" in spans[1]["style"]
    assert "rgba(128,128,128" in spans[3]["style"]
    assert "a↵\nbc" in seen.words
    assert "full colour: 2" in seen.words
    assert "against it" in seen.words
    assert "against it" not in Seen(page("title", [finding(draw.Tokens(["a"], np.ones(1)))], facts={})).words


@pytest.mark.parametrize("values", [np.zeros(2), np.full(2, np.nan), np.array([1e300, -1e300])])
def test_any_values(values):
    assert "nothing" not in page("title", [finding(draw.Tokens(["a", "b"], values))], facts={})


def test_numbers_and_settings_are_told_and_nothing_is_not():
    numbers = {"score": 0.123456, "curve": np.arange(9.0), "helped": [[1], [2, 3]]}
    seen = Seen(page("title", [finding(numbers=numbers, settings={"layer": None, "points": 8})], facts={"data": {}, "index": [0, 5], "seed": 0}))
    assert "score0.1235" in seen.words
    assert "points8" in seen.words
    assert "index0, 5" in seen.words
    assert "seed0" in seen.words
    for name in ("curve", "helped", "layer", "data", "None"):
        assert name not in seen.words


def test_warnings_come_first():
    seen = page("title", [finding()], facts={}, warnings=["the map does not depend on the weights"])
    assert seen.index('class="warning"') < seen.index("<h3>method</h3>")
