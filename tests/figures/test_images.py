"""The sheet of images: how pixels become colours, and whose caption is red."""

import numpy as np

from research.figures import style
from research.figures.images import image_grid
from research.figures.pixels import pixels, sheet


def test_pixels_of_any_range_and_number_of_channels():
    images = np.arange(8.0).reshape(2, 2, 2, 1) - 4
    np.testing.assert_allclose(pixels(images)[..., 0].ravel(), np.arange(8) / 7)
    assert pixels(np.zeros((1, 2, 2, 3))).shape == (1, 2, 2, 3)
    assert not pixels(np.zeros((1, 2, 2, 3))).any()
    assert pixels(np.ones((1, 2, 2, 2))).min() == 1.0
    assert pixels(np.random.RandomState(0).randn(1, 2, 2, 7)).shape == (1, 2, 2, 3)
    assert pixels(np.full((1, 1, 1, 1), np.nan)).tolist() == [[[[0.5] * 3]]]


def test_a_wrong_prediction_is_red(tmp_path, pixels_of):
    images = np.zeros((4, 8, 8, 1))
    image_grid(images, np.arange(4), np.arange(4), tmp_path / "right.png", classes=["żółw", "猫", "$x$", "d" * 40])
    image_grid(images, np.arange(4), np.array([0, 1, 2, 2]), tmp_path / "wrong.png", title="one mistake")
    image_grid(images, None, None, tmp_path / "plain.png")
    assert pixels_of(tmp_path / "right.png", style.GREEN)
    assert not pixels_of(tmp_path / "right.png", style.RED)
    assert pixels_of(tmp_path / "wrong.png", style.RED)
    assert not pixels_of(tmp_path / "plain.png", style.GREEN)


def test_one_none_and_many_images(tmp_path, size_of):
    for count in (0, 1, 100):
        image_grid(np.random.RandomState(0).rand(count, 6, 9, 3), None, np.zeros(count, int), tmp_path / f"{count}.png")
    assert size_of(tmp_path / "100.png")[0] > size_of(tmp_path / "1.png")[0] >= 300


def test_a_sheet_puts_images_side_by_side():
    images = np.stack([np.full((2, 3, 1), i, np.float32) for i in range(5)])
    picture = sheet(images)
    assert picture.shape == (2 * 2, 3 * 3, 3)
    assert [picture[0, 0, 0], picture[0, 8, 0], picture[2, 0, 0], picture[2, 3, 0], picture[2, 6, 0]] == [0, 128, 191, 255, 0]
