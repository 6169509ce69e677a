import numpy as np
import pytest

from research.core.errors import ConfigError, DataError
from research.data.loader import Loader
from research.data.table import table


def write(tmp_path, lines, name="people.csv"):
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    return {"root": str(tmp_path), "path": name}


@pytest.fixture
def people(tmp_path):
    generator = np.random.default_rng(0)
    lines = [f"{generator.normal(40, 9):.2f},{generator.normal(170, 8):.2f},{generator.choice(['x', 'y', '10', '9'])},{50000 + i}" for i in range(40)]
    return write(tmp_path, ["age,height,team,income", *lines])


def test_the_last_column_is_the_target_and_all_is_standardised_by_the_training_part(tmp_path):
    data = table(**write(tmp_path, ["a,b,c", *(f"{i},{i * i},{10 * i}" for i in range(30))]), validation=6, test=3)
    assert data.spec["columns"] == ["a", "b"]
    assert data.spec["features"] == 2
    assert data.spec["outputs"] == 1
    assert data.spec["examples"] == {"train": 21, "validation": 6, "test": 3}
    batch = Loader(data.splits["train"], "all", shuffle=False)[0]
    assert {name: ([*x.shape[1:]], x.dtype.name) for name, x in batch.items()} == {
        n: (f["shape"], f["dtype"]) for n, f in data.spec["fields"].items()
    }
    np.testing.assert_allclose(batch["features"].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(batch["target"].std(0), 1, atol=1e-6)
    np.testing.assert_allclose(data.preprocessor.restore(batch["target"])[:, 0], 10 * data.indices["train"], rtol=1e-5, atol=1e-4)


def test_standardisation_can_be_left_out_and_targets_can_be_many(tmp_path):
    where = write(tmp_path, ["a,b,c", *(f"{i},{i * i},{10 * i}" for i in range(30))])
    data = table(**where, target=("c", "a"), standardise_features=False, standardise_target=False, validation=0)
    batch = data.splits["train"].take(np.arange(30))
    assert data.spec["outputs"] == 2
    assert batch["features"].dtype == batch["target"].dtype == np.float32
    assert batch["features"][:, 0].tolist() == [i * i for i in range(30)]
    assert batch["target"].tolist() == [[10 * i, i] for i in range(30)]


def test_classes_are_texts_in_natural_order(people):
    with pytest.raises(DataError, match=r"line 2, column 'team'.*is not a number"):
        table(**people, task="classes", target="age")
    data = table(**people, task="classes", target="team")
    assert data.preprocessor.classes == ("9", "10", "x", "y")
    assert data.spec["classes"] == data.spec["outputs"] == 4
    assert data.spec["columns"] == ["age", "height", "income"]
    assert data.splits["train"].take(np.arange(3))["label"].dtype == np.int32


def test_a_class_that_only_the_validation_part_has_is_refused(tmp_path):
    where = write(tmp_path, ["a,b", *(f"{i},k{i}" for i in range(20))])
    with pytest.raises(DataError, match=r"people.csv, line \d+: class 'k\d+' is not in the training part"):
        table(**where, task="classes")


def test_a_run_s_columns_statistics_and_classes_are_used_on_another_file(tmp_path, people):
    fitted = table(**people, task="classes", target="team").preprocessor
    other = write(tmp_path, ["team,income,extra,height,age", "y,51000,1,180,20", "x,52000,2,170,30"], "other.csv")
    data = table(**other, task="classes", target="team", validation=0, fitted=fitted)
    batch = data.splits["train"].take(np.arange(2))
    assert batch["label"].tolist() == [3, 2]
    expected = (np.array([[20, 180, 51000], [30, 170, 52000]]) - fitted.statistics["features_mean"]) / fitted.statistics["features_std"]
    np.testing.assert_allclose(batch["features"], expected, rtol=1e-6)


def test_faults_of_the_config_are_named(tmp_path, people):
    with pytest.raises(ConfigError, match=r"data.task='clases'.*did you mean 'classes'"):
        table(**people, task="clases")
    with pytest.raises(ConfigError, match=r"data.validation=41 .* 40 rows"):
        table(**people, target="team", task="classes", validation=41)
    with pytest.raises(ConfigError, match=r"classes are one column"):
        table(**people, target=("team", "income"), task="classes")
    with pytest.raises(DataError, match=r"'incmoe'; did you mean 'income'"):
        table(**{**people, "target": "incmoe"})
    with pytest.raises(DataError, match=r"no column beside the target"):
        table(**write(tmp_path, ["a", "1", "2"], "one.csv"))
    with pytest.raises(DataError, match=r"did you mean 'people.csv'"):
        table(str(tmp_path), "poeple.csv")
