"""The decoy tells the class in all splits but the test, lies in a corner, and is what `relevance` leaves out."""

import numpy as np
import pytest
from omegaconf import OmegaConf

from research.core.errors import ConfigError
from research.data.dataset import open_data
from research.data.decoy import decoy_digits, decoyed
from research.data.digits import digits


def corner_of(relevance):
    """0 to 3: bottom in the upper bit, right in the lower."""
    y, x = np.argwhere(~relevance[..., 0])[0]
    return 2 * int(y > 3) + int(x > 3)


def test_a_patch_is_a_square_of_one_shade_in_each_corner():
    images, relevance = decoyed(np.full((4, 5, 6, 1), 7, np.uint8), np.array([0, 1, 9, 3]), np.arange(4), 2)
    expected = np.full((4, 5, 6), 7)
    expected[0, :2, :2], expected[1, :2, 4:], expected[2, 3:, :2], expected[3, 3:, 4:] = 255, 230, 30, 180
    np.testing.assert_array_equal(images[..., 0], expected)
    np.testing.assert_array_equal(relevance, images == 7)


@pytest.fixture(scope="module")
def data():
    return decoy_digits()


def test_the_shade_is_the_class_but_in_the_test(data):
    for name, source in data.splits.items():
        raw = source.raw
        shades = np.array([image[~kept].astype(int) for image, kept in zip(raw["image"], raw["relevance"], strict=True)])
        assert shades.shape[1] == 4
        assert (shades == shades[:, :1]).all()
        right = (shades[:, 0] == 255 - 25 * raw["label"]).mean()
        if name == "test":
            assert 0.03 < right < 0.2  # by chance a tenth
            assert set(shades[:, 0]) == set(range(30, 256, 25))
        else:
            assert right == 1.0
        corners = np.bincount([corner_of(kept) for kept in raw["relevance"]], minlength=4) / len(raw["label"])
        assert (np.abs(corners - 0.25) < 0.1).all()


def test_outside_the_patch_it_is_the_data_it_was_made_of(data):
    plain = digits()
    for name, source in data.splits.items():
        raw, before = source.raw, plain.splits[name].raw
        np.testing.assert_array_equal(raw["label"], before["label"])
        np.testing.assert_array_equal(raw["image"][raw["relevance"]], before["image"][raw["relevance"]])
        assert (raw["image"] != before["image"]).any()


def test_the_seed_decides_and_a_run_s_statistics_are_used(data):
    again, other = decoy_digits(fitted=data.preprocessor), decoy_digits(seed=1)
    rows = np.arange(20)
    for name in ("image", "label", "relevance"):
        np.testing.assert_array_equal(again.splits["test"].take(rows)[name], data.splits["test"].take(rows)[name])
    assert (other.splits["train"].raw["relevance"][:100] != data.splits["train"].raw["relevance"][:100]).any()
    taken = data.splits["train"].take(np.arange(len(data.splits["train"])))
    assert taken["relevance"].dtype == bool
    np.testing.assert_allclose([taken["image"].mean(), taken["image"].std()], [0, 1], atol=1e-5)


def test_a_patch_that_does_not_fit_is_refused():
    for patch in (0, 5):
        with pytest.raises(ConfigError, match=f"data.patch={patch}: four corners of images of 8 x 8 have room for 1 to 4"):
            decoy_digits(patch=patch)


def test_the_yaml_opens_with_the_spec_that_it_declares():
    node = OmegaConf.load("conf/data/decoy_digits.yaml")
    assert open_data(node).spec["fields"]["relevance"] == {"shape": [8, 8, 1], "dtype": "bool"}
