import json
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from research.core.errors import ConfigError, DataError
from research.core.spec import abstract_batch
from research.data.dataset import Arrays, Dataset, open_data
from research.data.loader import Loader
from research.data.preprocess import Preprocessor

CONF = Path(__file__).parents[2] / "conf"
CONFIGS = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))


@pytest.fixture
def root(tmp_path, encode, write_parquet):
    """Small files for every config that reads files."""
    generator = np.random.default_rng(0)
    for name, shape, image in (("mnist", (28, 28, 1), "image"), ("cifar10", (32, 32, 3), "img")):
        for part in ("train", "test"):
            images = generator.integers(0, 256, (20, *shape), dtype=np.uint8)
            write_parquet(tmp_path / name / f"{part}.parquet", images, np.arange(20) % 10, image)
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("To be, or not to be. " * 60)
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(encode(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)))
    (tmp_path / "table.csv").write_text("x,y\n" + "\n".join(f"{i},{i * i}" for i in range(20)))
    return tmp_path


PATHS = {"text": "tinyshakespeare/*.txt", "image_folder": "images", "table": "table.csv"}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "of_teacher"])  # which stands for another run's
def test_every_config_opens_and_its_batches_fit_its_spec(name, root):
    overrides = [f"+data={name}", "+paths=default", f"paths.data={root}", *([f"data.path='{PATHS[name]}'"] if name in PATHS else [])]
    with initialize_config_dir(str(CONF), version_base=None):
        node = compose(overrides=overrides).data
    data = open_data(node)
    data.save(root / "run")
    assert dict(open_data(node, Preprocessor.load(root / "run")).spec) == json.loads((root / "run" / "spec.json").read_text()) == dict(data.spec)
    for split, source in data.splits.items():
        loader = Loader(source, node.batch, shuffle=split == "train")
        expected = abstract_batch(data.spec, loader.batch)
        assert {key: (x.shape, x.dtype) for key, x in loader[0].items()} == {key: (x.shape, x.dtype) for key, x in expected.items()}
        assert sum(int(batch["mask"].any(tuple(range(1, batch["mask"].ndim))).sum()) for batch in loader) == data.spec["examples"][split]


def test_each_config_states_its_source_and_licence():
    for name in CONFIGS:
        header = (CONF / "data" / f"{name}.yaml").read_text().lower()
        assert "# source" in header, name
        assert "licence" in header, name


def test_a_declared_spec_is_compared_with_the_data():
    node = {"_target_": "research.data.random_regression.random_regression", "batch": 4, "spec": {"features": 12}}
    with pytest.raises(DataError, match=r"data.spec.features=12 .* features=10"):
        open_data(node)
    with pytest.raises(ConfigError, match=r"data.row.*did you mean 'rows'"):
        open_data({**node, "row": 4})


def test_rows_of_a_drawn_split_are_saved(tmp_path):
    open_data({"_target_": "research.data.random_regression.random_regression", "rows": 10, "validation": 3}).save(tmp_path)
    rows = json.loads((tmp_path / "split.json").read_text())
    assert len(rows["validation"]) == 3
    assert sorted(rows["train"] + rows["validation"]) == list(range(10))


def test_an_unknown_split_names_those_that_there_are():
    data = Dataset({"train": Arrays({}, Preprocessor({})), "validation": Arrays({}, Preprocessor({}))}, Preprocessor({}))
    with pytest.raises(DataError, match=r"no split 'test'; choose from: train, validation"):
        data.split("test")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"label": np.array([0, 1, 3])}, "train split, example 2: label 3 is outside 0 … 2"),
        ({"label": np.array([0, -1, 2])}, "train split, example 1: label -1"),
        ({"features": np.array([[0, 1], [2, np.inf]])}, "train split, features, example 1, column 1: inf"),
        ({"target": np.array([np.nan])}, "train split, target, example 0, column 0: nan"),
    ],
)
def test_examples_that_are_not_what_the_spec_says_are_found_before_training(raw, words):
    with pytest.raises(DataError, match=words):
        Arrays(raw, Preprocessor({})).check({"classes": 3}, "train split")
