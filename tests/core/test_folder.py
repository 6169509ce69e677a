import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from research.core import folder
from research.core.errors import ResearchError


def test_configs_are_found():
    assert (folder.conf() / "train.yaml").exists()
    assert folder.experiments().name == "experiments"


def test_text_comes_back_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new folder" / "ünï.txt"
    folder.write_text(path, "grüße\n")
    folder.write_text(path, "second\n")
    assert path.read_text() == "second\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["ünï.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    folder.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        folder.write_text(path, "new \ud800")  # cannot be encoded: fails half way
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_where_nothing_can_be_written_the_path_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResearchError, match=r"cannot write .*file/a\.json: File exists"):
        folder.write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), None),
        (np.float32("inf"), None),
        ({"a": (1, -np.inf)}, {"a": [1, None]}),
        (np.array([1.5, np.nan]), [1.5, None]),
        (jnp.float32(2), 2.0),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (epath.Path("/x/y"), "/x/y"),
        ({1: "one"}, {"1": "one"}),
    ],
)
def test_json_holds_no_nan_and_plain_values_only(tmp_path, value, written):
    folder.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert folder.read_json(tmp_path / "a.json") == written


def test_json_of_an_unknown_type_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        folder.write_json(tmp_path / "a.json", {"a": object()})
    assert not list(tmp_path.iterdir())


def test_unreadable_json_is_named_with_its_line(tmp_path):
    with pytest.raises(ResearchError, match=r"there is no file .*none\.json"):
        folder.read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{\n "a": \n')
    with pytest.raises(ResearchError, match=r"bad\.json is not JSON: line 3"):
        folder.read_json(tmp_path / "bad.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ResearchError, match=r"bytes\.json is not JSON: byte 0"):
        folder.read_json(tmp_path / "bytes.json")
    with pytest.raises(ResearchError, match="cannot read"):
        folder.read_json(tmp_path)


def test_written_json_is_plain_json(tmp_path):
    folder.write_json(tmp_path / "a.json", {"b": [1, 2.5, None, "x"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2.5, None, "x"]}
