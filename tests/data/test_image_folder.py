import functools

import numpy as np
import pytest

from research.core.errors import DataError
from research.data.image_folder import image_folder


@pytest.fixture
def fill(encode):
    """fill(folder, images, classes): writes the images, in turn one of each class."""
    return functools.partial(_fill, encode)


def _fill(encode, folder, images, classes):
    for i, image in enumerate(images):
        place = folder / classes[i % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"bild {i:02}.png").write_bytes(encode(image))


def test_a_plain_folder_is_split_by_the_seed(tmp_path, pixels, fill):
    fill(tmp_path / "tiere", pixels, ["katze", "äffchen"])
    data = image_folder(str(tmp_path), "tiere", validation=4, test=0.25)
    assert data.preprocessor.classes == ("katze", "äffchen")
    assert data.spec["image"] == [6, 5, 3]
    assert data.spec["examples"] == {"train": 11, "validation": 4, "test": 5}
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # class by class
    for name, rows in data.indices.items():
        raw = data.splits[name].raw
        assert (raw["image"] == pixels[order][rows]).all()
        assert (raw["label"] == (rows >= 10)).all()


def test_given_parts_are_kept_and_only_a_missing_validation_part_is_drawn(tmp_path, pixels, fill):
    fill(tmp_path / "train", pixels[:10], ["a", "b"])
    fill(tmp_path / "test", pixels[10:14], ["b"])
    data = image_folder(".", str(tmp_path), validation=2)
    assert data.spec["examples"] == {"train": 8, "test": 4, "validation": 2}
    assert set(data.indices) == {"train", "validation"}
    assert data.splits["test"].raw["label"].tolist() == [1] * 4
    fill(tmp_path / "validation", pixels[14:], ["a"])
    data = image_folder(".", str(tmp_path))
    assert data.spec["examples"] == {"train": 10, "validation": 6, "test": 4}
    assert not data.indices


def test_size_and_channels_can_be_chosen_and_a_run_s_own_are_kept(tmp_path, pixels, fill):
    fill(tmp_path, pixels, ["a", "b"])
    data = image_folder(".", str(tmp_path), size=(4, 4), channels=1)
    assert data.splits["train"].raw["image"].shape[1:] == (4, 4, 1)
    again = image_folder(".", str(tmp_path), fitted=data.preprocessor)
    assert again.spec["image"] == [4, 4, 1]
    assert again.preprocessor.statistics is data.preprocessor.statistics


def test_faults_of_a_folder_are_named(tmp_path, pixels, encode, fill):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r"has no images: expected <class>"):
        image_folder(".", str(tmp_path))
    fill(tmp_path / "train", pixels[:6], ["cat", "dog"])
    fill(tmp_path / "test", pixels[:2], ["cta"])
    with pytest.raises(DataError, match=r"training part has no class 'cta'; did you mean 'cat'"):
        image_folder(".", str(tmp_path))
    (tmp_path / "train" / "dog" / "bild 99.png").write_bytes(encode(pixels[0])[:50])
    with pytest.raises(DataError, match=r"bild 99.png cannot be read as an image"):
        image_folder(str(tmp_path), "train")
    with pytest.raises(DataError, match=r"did you mean 'train'"):
        image_folder(str(tmp_path), "trian")


def test_pixels_are_standardised_by_the_training_part(tmp_path, pixels, fill):
    fill(tmp_path, pixels, ["a"])
    source = image_folder(".", str(tmp_path)).splits["train"]
    np.testing.assert_allclose(source.take(np.arange(len(source)))["image"].std((0, 1, 2)), 1, atol=1e-5)
