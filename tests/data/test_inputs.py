import json

import numpy as np
import pytest

from research.core.errors import DataError
from research.data.inputs import read_inputs
from research.data.parquet_images import parquet_images
from research.data.preprocess import Preprocessor
from research.data.table import table

SPEC = {"image": [6, 5, 3]}


def test_an_image_file_gets_the_bits_that_it_had_in_training(tmp_path, pixels, encode, write_parquet):
    for part in ("train", "test"):
        write_parquet(tmp_path / "toy" / f"{part}.parquet", pixels, np.zeros(20, int))
    data = parquet_images(str(tmp_path), "toy", "", (6, 5, 3), ("a",))
    data.save(tmp_path / "run")
    preprocessor = Preprocessor.load(tmp_path / "run")
    (tmp_path / "some images").mkdir()
    for i in range(20):
        (tmp_path / "some images" / f"{i:02}.png").write_bytes(encode(pixels[i]))
    names, raw = read_inputs(tmp_path / "some images", preprocessor.spec)
    assert names == [f"{i:02}.png" for i in range(20)]
    assert (preprocessor(raw)["image"] == data.splits["test"].take(np.arange(20))["image"]).all()
    np.savez(tmp_path / "images.npz", image=pixels)
    (tmp_path / "images.jsonl").write_text("\n".join(json.dumps({"image": f"some images/{i:02}.png"}) for i in range(20)))
    for path in ("images.npz", "images.jsonl"):
        assert (read_inputs(tmp_path / path, preprocessor.spec)[1]["image"] == pixels).all()
    assert (read_inputs(tmp_path / "some images" / "03.png", preprocessor.spec)[1]["image"] == pixels[3:4]).all()


def test_a_row_gets_the_bits_that_it_had_in_training(tmp_path):
    (tmp_path / "t.csv").write_text("\n".join(["a,b,y", *(f"{i * 0.37},{i**3},{-i}" for i in range(20))]))
    data = table(str(tmp_path), "t.csv", validation=0)
    data.save(tmp_path / "run")
    preprocessor = Preprocessor.load(tmp_path / "run")
    names, raw = read_inputs(tmp_path / "t.csv", preprocessor.spec)
    batch, trained = preprocessor(raw), data.splits["train"].take(np.arange(20))
    assert list(batch) == ["features"]
    assert (batch["features"] == trained["features"]).all()
    assert names[0] == "line 2"
    np.testing.assert_allclose(preprocessor.restore(trained["target"])[:, 0], -np.arange(20.0), atol=1e-5)


def test_grey_arrays_need_no_axis_for_their_channel(tmp_path, pixels):
    np.savez(tmp_path / "x.npz", image=pixels[..., 0])
    assert read_inputs(tmp_path / "x.npz", {"image": [6, 5, 1]})[1]["image"].shape == (20, 6, 5, 1)


def test_inputs_that_do_not_fit_are_refused(tmp_path, pixels):
    np.savez(tmp_path / "x.npz", image=pixels.astype(np.float32))
    with pytest.raises(DataError, match=r"x.npz: image is float32\[20, 6, 5, 3\], and the model reads uint8\[n, 6, 5, 3\]"):
        read_inputs(tmp_path / "x.npz", SPEC)
    np.savez(tmp_path / "x.npz", pixels=pixels)
    with pytest.raises(DataError, match=r"no array 'image'; it holds pixels"):
        read_inputs(tmp_path / "x.npz", SPEC)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no images"):
        read_inputs(tmp_path / "empty", SPEC)
    (tmp_path / "a.jsonl").write_text('{"image": "gone.png"}')
    with pytest.raises(DataError, match=r"gone.png does not exist"):
        read_inputs(tmp_path / "a.jsonl", SPEC)
    with pytest.raises(DataError, match=r"did you mean 'x.npz'"):
        read_inputs(tmp_path / "x.npy", SPEC)
    with pytest.raises(DataError, match=r"prompt="):
        read_inputs(tmp_path / "x.npz", {"vocabulary": 65})


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png", "gs://other/secret.png", "..\\secret.png"])
def test_a_table_cannot_name_a_file_outside_its_folder(tmp_path, pixels, encode, name):
    (tmp_path / "secret.png").write_bytes(encode(pixels[0]))
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "images.jsonl").write_text(json.dumps({"image": name}))
    with pytest.raises(DataError, match="lies outside the table's folder"):
        read_inputs(folder / "images.jsonl", SPEC)
