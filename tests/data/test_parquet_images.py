import sys
import time

import huggingface_hub.constants
import numpy as np
import pytest

from research.core.errors import ConfigError, DataError
from research.data.parquet_images import parquet_images

NAMES = ("cat", "dog", "owl", "eel")


def opened(root, hub="nobody/toy", **options):
    return parquet_images(**{"root": str(root), "name": "toy", "hub": hub, "shape": (6, 5, 3), "classes": NAMES, "validation": 4, **options})


@pytest.fixture
def root(tmp_path, pixels, write_parquet):
    folder = tmp_path / "my dätä"
    write_parquet(folder / "toy" / "train.parquet", pixels, np.arange(20) % 4)
    write_parquet(folder / "toy" / "test.parquet", pixels[:5], np.arange(5) % 4)
    return folder


def test_validation_is_drawn_from_the_training_file_and_the_test_file_stays_whole(root, pixels):
    data = opened(root)
    assert data.spec["examples"] == {"train": 16, "validation": 4, "test": 5}
    assert data.spec["classes"] == 4
    assert data.spec["image"] == [6, 5, 3]
    for name, rows in data.indices.items():
        assert (data.splits[name].raw["image"] == pixels[rows]).all()
        assert (data.splits[name].raw["label"] == rows % 4).all()
    assert sorted(np.concatenate(list(data.indices.values()))) == list(range(20))
    assert (data.splits["test"].raw["image"] == pixels[:5]).all()


def test_statistics_come_from_the_training_part_only(root, pixels):
    data = opened(root)
    part = pixels[data.indices["train"]]
    np.testing.assert_allclose(data.preprocessor.statistics["image_mean"], part.mean((0, 1, 2)) / 255)
    np.testing.assert_allclose(data.splits["train"].take(np.arange(16))["image"].mean((0, 1, 2)), 0, atol=1e-5)
    fitted = opened(root, seed=5, fitted=data.preprocessor)
    assert fitted.preprocessor.statistics is data.preprocessor.statistics


def test_files_of_the_hub_take_the_same_way(tmp_path, root, pixels, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data, local = opened(tmp_path / "nothing", hub=str(root / "toy")), opened(root)
    assert all((data.splits[name].raw["image"] == local.splits[name].raw["image"]).all() for name in local.splits)


def test_without_files_and_network_one_line_says_what_to_do_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    with pytest.raises(DataError, match=r"no data set 'toy' in .*no network: set paths.data or RESEARCH_DATA") as error:
        opened(tmp_path)
    assert time.perf_counter() - began < 5
    assert "\n" not in str(error.value)
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_without_the_library_that_downloads_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"no data set 'toy' in .*: set paths.data .* pip install 'ontogeny\[hub\]'"):
        opened(tmp_path)


def test_damaged_files_rows_and_labels_are_named(root, pixels, encode, write_parquet):
    train = root / "toy" / "train.parquet"
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train.parquet cannot be read as parquet"):
        opened(root)
    write_parquet(train, [*(encode(x) for x in pixels[:7]), encode(pixels[7])[:60]], [0] * 8)
    with pytest.raises(DataError, match=r"train.parquet, row 7 cannot be read as an image"):
        opened(root)
    write_parquet(train, pixels, [0] * 13 + [4] + [0] * 6)
    with pytest.raises(DataError, match=r"train.parquet, row 13: label 4 is outside 0 … 3"):
        opened(root)
    write_parquet(train, pixels, [0] * 3 + [None] + [0] * 16)
    with pytest.raises(DataError, match=r"row 3: label -1 is outside"):
        opened(root)


def test_missing_files_and_columns_name_the_nearest(root):
    (root / "toy" / "test.parquet").rename(root / "toy" / "tset.parquet")
    with pytest.raises(DataError, match=r"test.parquet does not exist; did you mean 'tset.parquet'"):
        opened(root)
    with pytest.raises(DataError, match=r"no column 'img'; did you mean 'image'"):
        opened(root, image="img")


def test_more_validation_rows_than_images_are_refused(root):
    with pytest.raises(ConfigError, match=r"data.validation=21 \(21 rows\) .* 20 rows"):
        opened(root, validation=21)
