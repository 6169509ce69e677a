import importlib.util

import numpy as np
import pytest
from sklearn.datasets import load_digits

from research.core.errors import ConfigError, DataError
from research.data.digits import digits


def test_the_digits_are_split_into_fifths_and_tenths_by_the_seed():
    data, other = digits(), digits(seed=1)
    assert data.spec["examples"] == {"train": 1257, "validation": 180, "test": 360}
    assert data.spec["image"] == [8, 8, 1]
    assert data.preprocessor.classes == tuple("0123456789")
    rows = np.concatenate(list(data.indices.values()))
    assert sorted(rows.tolist()) == list(range(1797))
    assert (data.indices["test"] != other.indices["test"]).any()


def test_they_are_those_of_scikit_learn():
    pixels, labels = load_digits(return_X_y=True)
    data = digits()
    for name, source in data.splits.items():
        rows = data.indices[name]
        assert (source.raw["label"] == labels[rows]).all()
        assert (source.raw["image"].reshape(-1, 64) == np.rint(pixels[rows] * 255 / 16)).all()


def test_without_scikit_learn_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"^the digits come with scikit-learn, which is not installed: pip install scikit-learn$"):
        digits()


def test_pixels_span_the_bytes_and_labels_are_balanced():
    raw = digits().splits["train"].raw
    assert raw["image"].dtype == np.uint8
    assert raw["image"].min() == 0
    assert raw["image"].max() == 255
    assert np.bincount(raw["label"], minlength=10).min() > 100


def test_some_classes_only():
    every, some = digits(), digits(only=(5, 6))
    assert some.spec["outputs"] == 10
    for name in ("train", "validation", "test"):
        labels = some.splits[name].raw["label"]
        assert set(labels.tolist()) == {5, 6}
        assert len(labels) == np.isin(every.splits[name].raw["label"], (5, 6)).sum() == len(some.indices[name])
    with pytest.raises(ConfigError, match=r"data\.only: 10 is no class; they are numbered 0 to 9"):
        digits(only=(10,))
