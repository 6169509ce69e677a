import io
import os

import numpy as np
import pytest
from etils import epath
from PIL import Image

from research.core.errors import DataError
from research.data.images import decode, decode_all, image_paths, read_files


def test_a_png_comes_back_as_its_own_pixels(pixels, encode):
    assert (decode(encode(pixels[0]), (6, 5, 3), "x") == pixels[0]).all()
    assert (decode(encode(pixels[0]), None, "x") == pixels[0]).all()
    grey = pixels[0, ..., :1]
    assert (decode(encode(grey), (6, 5, 1), "x") == grey).all()


def test_colour_size_and_depth_are_converted(pixels, encode):
    assert decode(encode(pixels[0]), (4, 3, 1), "x").shape == (4, 3, 1)
    grey = decode(encode(pixels[0, ..., :1]), (6, 5, 3), "x")
    assert (grey == pixels[0, ..., :1]).all()
    deep = io.BytesIO()
    Image.fromarray((np.arange(30).reshape(6, 5) * 2000).astype(np.uint16)).save(deep, "PNG")
    assert (decode(deep.getvalue(), (6, 5, 1), "x")[..., 0] == (np.arange(30).reshape(6, 5) * 2000) >> 8).all()


def test_a_photograph_taken_upright_is_turned_upright(pixels):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to the right
    Image.fromarray(pixels[0]).save(buffer, "PNG", exif=exif)
    assert (decode(buffer.getvalue(), (5, 6, 3), "x") == np.rot90(pixels[0], -1)).all()


def test_many_images_keep_their_order(pixels, encode):
    files = [encode(pixels[i % 20]) for i in range(600)]
    assert (decode_all(files.__getitem__, 600, (6, 5, 3), str) == pixels[np.arange(600) % 20]).all()


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) * 3 // 4], lambda data: data[:10], lambda data: b"", lambda data: b"text" * 9], ids=range(4)
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_damaged_image_is_named(tmp_path, damage, kind, encode):
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encode(noise))
    (tmp_path / "bad one.png").write_bytes(damage(encode(noise, kind)))
    with pytest.raises(DataError, match=r"bad one.png cannot be read as an image"):
        read_files(image_paths(epath.Path(tmp_path)), (40, 40, 3))


def test_image_files_are_found_below_a_folder_in_order(tmp_path):
    for name in ("b/2.JPG", "b/10.png", "a.jpeg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [os.path.relpath(path, tmp_path) for path in image_paths(epath.Path(tmp_path))] == ["a.jpeg", "b/10.png", "b/2.JPG"]
