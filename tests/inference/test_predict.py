"""Prediction: padded batches change nothing, and rows, file and table say what the arrays say."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from research.core.errors import DataError
from research.inference import predict as module
from research.inference.batches import padded
from research.inference.predict import class_rows, predict, table, value_rows, write_predictions
from research.models.mlp import MLP
from research.objectives.classify import Classify

IMAGES = np.random.RandomState(0).randn(23, 4, 4, 1).astype(np.float32)


def _batches(size):
    return [{"image": IMAGES[i : i + size], "mask": np.ones(len(IMAGES[i : i + size]), bool)} for i in range(0, len(IMAGES), size)]


@pytest.fixture(scope="module")
def model():
    objective = Classify(MLP(3, width=8))
    params, extra = objective.init(jax.random.key(0), {"image": jnp.asarray(IMAGES[:1])})
    return objective, params, extra, None, {}


@pytest.mark.parametrize(("size", "rows"), [(7, None), (7, 16), (23, 64), (1, 1)])
def test_any_batch_size_gives_the_same_predictions(model, size, rows):
    objective, params, *_ = model
    expected, _ = objective.predict(params, {}, None, {"image": jnp.asarray(IMAGES)}, None, {})
    np.testing.assert_allclose(predict(*model, _batches(size), rows=rows)["logits"], expected["logits"], rtol=1e-5, atol=1e-6)


def test_one_program_for_every_number_of_inputs(model):
    before = module._predict._cache_size()
    for count in (1, 5, 8):
        assert predict(*model, [{name: x[:count] for name, x in _batches(8)[0].items()}], rows=8)["logits"].shape == (count, 3)
    assert module._predict._cache_size() == before + 1


def test_no_input_and_too_large_a_batch(model):
    with pytest.raises(DataError, match="the input has no examples"):
        predict(*model, [])
    with pytest.raises(ValueError, match="a batch of 7 examples does not fit in 4"):
        list(padded(_batches(7), 4))


def test_class_rows_list_the_likeliest_first():
    probability = np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])
    rows = class_rows(probability, ["a.png", "b.png"], ["cat", "dog", "żółw"], top=2)
    assert rows[0] == {
        "input": "a.png", "class": "dog", "probability": 0.5, "top": [{"class": "dog", "probability": 0.5}, {"class": "żółw", "probability": 0.3}],
    }  # fmt: skip
    assert rows[1]["class"] == "cat", "the first of equals"
    assert [row["class"] for row in class_rows(probability, ["a", "b"], (), top=9)] == ["1", "0"]
    assert len(class_rows(probability, "ab", (), top=9)[0]["top"]) == 3


def test_the_file_has_one_json_object_per_line_and_no_nan(tmp_path):
    path = tmp_path / "new folder" / "predictions.jsonl"
    rows = value_rows(np.array([[1.5, np.nan], [np.inf, -2.0]]), ["żółw", "b"])
    write_predictions(path, rows)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"input": "żółw", "value": [1.5, None]},
        {"input": "b", "value": [None, -2.0]},
    ]
    assert [file.name for file in path.parent.iterdir()] == ["predictions.jsonl"]


def _drawn(shown):
    console = Console(file=io.StringIO(), width=100)
    console.print(shown)
    return console.file.getvalue()


def test_the_table_shows_the_first_rows_and_counts_the_others():
    rows = class_rows(np.full((30, 2), 0.5), [f"{i}.png" for i in range(30)], ["[cat]", "dog"])
    text = _drawn(table(rows, limit=4))
    assert "[cat]" in text
    assert "dog 50.0%" in text
    assert "3.png" in text
    assert "4.png" not in text
    assert "… and 26 more" in text
    assert "1.5  -2" in _drawn(table(value_rows(np.array([[1.5, -2.0]]), ["x"])))
    assert "input" in _drawn(table([]))
