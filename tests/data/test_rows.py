import json

import numpy as np
import pytest

from research.core.errors import DataError
from research.data.rows import read_rows


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_three_kinds_of_file_hold_the_same_table(tmp_path):
    values = np.array([[1.5, -2], [3, 4e3]])
    npz = tmp_path / "t.npz"
    np.savez(npz, x=values, y=np.array([0, 1]))
    csv = written(tmp_path, "größe der tiere.csv", "\ufeffx_0,x_1,y\r\n1.5,-2,0\r\n\r\n3, 4e3 ,1\r\n")
    jsonl = written(tmp_path, "t.jsonl", "\n".join(json.dumps({"x": x.tolist(), "y": i}) for i, x in enumerate(values)) + "\n")
    tables = [read_rows(path) for path in (npz, csv, jsonl)]
    assert all(list(rows.columns) == ["x_0", "x_1", "y"] and len(rows) == 2 for rows in tables)
    assert all((rows.numbers(["x_0", "x_1"]) == values).all() for rows in tables)
    assert [rows.names for rows in tables] == [["row 0", "row 1"], ["line 2", "line 4"], ["line 1", "line 2"]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "a,b\n1,2\n3\n", "t.csv, line 3: 1 cells, and the header names 2"),
        ("t.csv", 'a,b\n1,"2\n', "t.csv, line 2: unexpected end"),
        ("t.csv", "1,2\n3,4\n", "line 1: .* must name the columns"),
        ("t.csv", "a,a\n3,4\n", "line 1: the column 'a' is there twice"),
        ("t.csv", "a,b\n", "t.csv has no rows"),
        ("t.csv", "", "t.csv has no rows"),
        ("t.csv", b"a,b\n1,\xff\n", "t.csv cannot be read: .*0xff"),
        ("t.jsonl", '{"a": 1}\n{"a": 1', "t.jsonl, line 2 is not JSON: column 8: Expecting"),
        ("t.jsonl", '{"a": 1}\n[1]', "t.jsonl, line 2: expected an object, found list"),
        ("t.jsonl", '{"a": 1}\n\n{"b": 1}', "t.jsonl, line 3: 'a' is missing"),
        ("t.jsonl", '{"a": 1}\n{"a": 1, "b": 2}', "t.jsonl, line 2: 'b' is not in line 1"),
        ("t.jsonl", '{"a": [1, 2]}\n{"a": [1]}', "t.jsonl, line 2: 'a_1' is missing"),
        ("t.npz", b"PK nonsense", "t.npz cannot be read as .npz"),
        ("t.npz", b"", "t.npz cannot be read as .npz"),
        ("t.txt", "a", "t.txt is not a table: .*.csv, .jsonl, .npz"),
    ],
)
def test_a_damaged_table_is_refused_with_file_and_row(tmp_path, name, content, words):
    with pytest.raises(DataError, match=words) as error:
        read_rows(written(tmp_path, name, content))
    assert "\n" not in str(error.value)


def test_a_truncated_npz_one_of_unequal_arrays_and_one_of_objects_are_refused(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, x=np.zeros((4, 2)), y=np.zeros(3))
    with pytest.raises(DataError, match=r"unequal length: .*'x_0': 4.*'y': 3"):
        read_rows(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"t.npz cannot be read as .npz"):
        read_rows(path)
    np.savez(path, x=np.zeros((4, 2, 2)))
    with pytest.raises(DataError, match=r"'x' of shape \(4, 2, 2\)"):
        read_rows(path)
    np.savez(path, x=np.array([print], object))
    with pytest.raises(DataError, match=r"allow_pickle"):
        read_rows(path)


@pytest.mark.parametrize(
    ("cell", "words"), [("abc", "'abc' is not a number"), ("", "'' is not a number"), ("nan", "nan is not"), ("1e300", "1e.300 is not")]
)
def test_a_cell_that_is_no_finite_number_is_named(tmp_path, cell, words):
    rows = read_rows(written(tmp_path, "t.csv", f"age,height\n1,2\n3,{cell}\n"))
    with pytest.raises(DataError, match=rf"t.csv, line 3, column 'height': {words}"):
        rows.numbers(["age", "height"])


def test_null_in_a_jsonl_is_no_number(tmp_path):
    with pytest.raises(DataError, match=r"line 2, column 'a': nan"):
        read_rows(written(tmp_path, "t.jsonl", '{"a": 1}\n{"a": null}')).numbers(["a"])


def test_a_missing_column_names_the_nearest(tmp_path):
    with pytest.raises(DataError, match=r"no column 'hieght'; did you mean 'height'"):
        read_rows(written(tmp_path, "t.csv", "age,height\n1,2\n")).numbers(["hieght"])
