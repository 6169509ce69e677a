import numpy as np
import pytest

from research.core.errors import DataError
from research.data.preprocess import Preprocessor, standardise
from research.data.tokenizers import Characters


def test_pixels_become_numbers_with_mean_0_and_deviation_1_per_channel(pixels):
    preprocessor = Preprocessor({"image": [6, 5, 3]}, None, standardise("image", pixels))
    image = preprocessor({"image": pixels})["image"]
    assert image.dtype == np.float32
    assert image.shape == pixels.shape
    np.testing.assert_allclose(image.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(image.std((0, 1, 2)), 1, atol=1e-5)
    reference = (pixels / 255 - pixels.mean((0, 1, 2)) / 255) / (pixels.std((0, 1, 2)) / 255)
    np.testing.assert_allclose(image, reference, atol=1e-5)


def test_an_image_gets_the_same_bits_alone_and_in_a_batch(pixels):
    preprocessor = Preprocessor({"image": [6, 5, 3]}, None, standardise("image", pixels))
    assert (preprocessor.image(pixels)[7:8] == preprocessor.image(pixels[7:8])).all()
    assert preprocessor.image(pixels[:0]).shape == (0, *pixels.shape[1:])  # the mistakes of a model that makes none


def test_pixels_without_statistics_lie_between_0_and_1(pixels):
    image = Preprocessor({"image": [6, 5, 3]}).image(pixels)
    np.testing.assert_allclose(image, pixels / np.float32(255), rtol=1e-6)


def test_a_constant_column_becomes_zero():
    values = np.stack([np.full(9, 7.3), np.arange(9.0)], 1)
    features = Preprocessor({}, None, standardise("features", values))({"features": values})["features"]
    assert features.dtype == np.float32
    assert abs(features[:, 0]).max() < 1e-6
    assert abs(features[:, 1].std() - 1) < 1e-6
    black = np.zeros((3, 2, 2, 1), np.uint8)
    assert standardise("image", black)["image_std"] == [1]


def test_predictions_are_given_back_in_the_units_of_the_data():
    target = np.array([[1e5], [3e5], [2e5]])
    preprocessor = Preprocessor({}, None, standardise("target", target))
    value = preprocessor({"target": target})["target"]
    assert abs(value).max() < 2
    np.testing.assert_allclose(preprocessor.restore(value), target, rtol=1e-6)
    assert Preprocessor({}).restore(value) is value


def test_labels_and_tokens_pass_through():
    raw = {"label": np.arange(3, dtype=np.int32), "tokens": np.ones((3, 4), np.int32)}
    assert all(Preprocessor({})(raw)[name] is raw[name] for name in raw)


def test_what_is_saved_is_what_is_loaded(tmp_path, pixels):
    saved = Preprocessor({"image": [6, 5, 3]}, Characters("abc"), standardise("image", pixels), ("cat", "größe"))
    saved.save(tmp_path / "run folder" / "dätä")
    loaded = Preprocessor.load(tmp_path / "run folder" / "dätä")
    assert (loaded.spec, loaded.tokenizer, loaded.classes) == (saved.spec, saved.tokenizer, saved.classes)
    assert (loaded.image(pixels) == saved.image(pixels)).all()
    Preprocessor({"time": 3}).save(tmp_path / "bare")
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["spec.json"]
    assert Preprocessor.load(tmp_path / "bare").statistics == {}


@pytest.mark.parametrize("name", ["spec.json", "statistics.npz", "classes.json", "tokenizer.json"])
def test_a_damaged_file_is_named_and_nothing_in_it_is_executed(tmp_path, name, pixels):
    Preprocessor({}, Characters("abc"), standardise("image", pixels), ("a",)).save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-3])
    with pytest.raises(DataError, match=name):
        Preprocessor.load(tmp_path)
    if name == "statistics.npz":
        np.savez(tmp_path / name, image_mean=np.array([print], object))
        with pytest.raises(DataError, match=r"allow_pickle"):
            Preprocessor.load(tmp_path)


def test_a_folder_without_a_spec_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"holds no spec.json"):
        Preprocessor.load(tmp_path / "nothing")
