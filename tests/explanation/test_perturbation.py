"""Occlusion, ablation and coalitions: equal to Captum, to a loop by hand, whatever the chunks; segments cover what they say."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from research.core.build import build
from research.core.errors import ConfigError
from research.core.tree import map_paths
from research.explanation import methods
from research.explanation.model import examples
from research.explanation.perturbation import Ablation, Occlusion, coalition_scores
from research.explanation.segments import features_of, grid, spread, superpixels

KEY = jax.random.key(0)
HERE = pathlib.Path(__file__).parent / "references"
QUARTERS = {"segments": 4, "features": "grid"}


@pytest.fixture(scope="module")
def stored(model):
    """(the CNN with the stored weights, its examples, what Captum says)."""
    with np.load(HERE / "gradient.npz") as file:
        kept = {name.removeprefix("cnn/"): file[name] for name in file if name.startswith("cnn/")}
    made = model("cnn")
    made = dataclasses.replace(made, params=map_paths(lambda path, leaf: kept[f"params/{path}"].reshape(leaf.shape), made.params))
    given = examples(made, {"image": kept["image"], "mask": np.ones(3, bool)}, target=kept["target"])
    with np.load(HERE / "perturbation.npz") as file:
        return made, given, {name.removeprefix("captum/"): file[name] for name in file if name.startswith("captum/")}


@pytest.mark.parametrize(
    ("name", "method"),
    [("square", Occlusion(3)), ("square", Occlusion((3, 3), (1, 1), rows=7)), ("wide", Occlusion((3, 5), (2, 4), baseline=0.4))],
)
def test_occlusion_equals_captum(name, method, stored):
    made, given, kept = stored
    found = method(made, given, KEY).values
    assert np.abs(kept[name]).max() > 0.1
    np.testing.assert_allclose(found[..., 0], kept[name], rtol=0, atol=1e-6)


def test_ablation_of_a_grid_equals_captum_and_sums_to_the_fall(stored):
    made, given, kept = stored
    found = Ablation(**QUARTERS, baseline=0.4)(made, given, KEY)
    np.testing.assert_allclose(found.values[..., 0] * 16, kept["ablation"], rtol=0, atol=1e-6)  # 16 pixels share a quarter's
    assert found.numbers["features"].tolist() == [4, 4, 4]
    np.testing.assert_array_equal(found.baseline, np.full((3, 8, 8, 1), 0.4, np.float32))


def test_coalitions_are_what_editing_by_hand_gives(model, examples_of):
    made = model("cnn")
    row = examples_of(made, 1, target=2)
    groups = grid((8, 8), 6)
    groups[0] = -1  # a line that is never replaced
    z = np.random.RandomState(0).rand(11, 6) < 0.5
    references = np.random.RandomState(1).standard_normal((3, 8, 8, 1)).astype(np.float32)

    def by_hand(coalition, base):
        absent = ~np.append(coalition, True)[groups]
        image = np.where(absent[..., None], base, row.batch["image"][0])
        return np.asarray(made.read({**row.batch, "image": image[None].astype(np.float32)})[0])[0, 2]

    wanted = np.array([[by_hand(coalition, base) for base in references] for coalition in z])
    for rows in (256, 5):
        np.testing.assert_allclose(coalition_scores(made, row, references, groups, z, rows), wanted.mean(1), atol=1e-6)
    np.testing.assert_allclose(coalition_scores(made, row, 0.5, groups, z), [by_hand(coalition, 0.5) for coalition in z], atol=1e-6)
    assert coalition_scores(made, row, 0.5, groups, z[:0]).shape == (0,)


def test_columns_and_tokens_are_features_by_themselves(model, examples_of):
    made = model("regression")
    given = examples_of(made, 2, target=1)
    found = Ablation(baseline=0.25)(made, given, KEY)
    for j in range(6):
        features = given.batch["features"].copy()
        features[:, j] = 0.25
        without = np.asarray(made.read({**given.batch, "features": features})[0])[:, 1]
        np.testing.assert_allclose(found.values[:, j], found.output - without, atol=1e-6)
    text = model("gpt")
    given = examples_of(text, 2)  # the second ends in two tokens of padding
    found = Ablation()(text, given, KEY)
    assert found.values.shape == (2, 8)
    assert (found.values[1, -2:] == 0).all()
    assert np.abs(found.values[1, :-2]).min() > 0
    windows = Occlusion(1)(text, given, KEY)
    np.testing.assert_allclose(windows.values, found.values, atol=1e-6)  # a window of one token takes that token away


def test_a_later_token_means_nothing_to_an_earlier_output(model, examples_of):
    text = model("gpt")
    found = Ablation()(text, examples_of(text, 1, position=3), KEY)
    assert (found.values[0, 4:] == 0).all()
    assert np.abs(found.values[0, :4]).min() > 0


def test_one_program_for_each_shape(model, examples_of, monkeypatch):
    made = model("cnn", "model.hidden=[8]")
    calls = []
    original = type(made.objective).predict
    monkeypatch.setattr(type(made.objective), "predict", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    given = examples_of(made, 3)
    for method in (Ablation(segments=9), Occlusion(2)):
        method(made, given, KEY)
        count = len(calls)
        method(made, given, KEY)
        method(made, examples_of(made, 3, seed=5), KEY)  # other superpixels
        assert len(calls) == count


def test_superpixels_follow_an_edge_and_hang_together():
    from scipy import ndimage

    image = np.zeros((20, 30, 3))
    image[:, 13:] = 1.0
    image += 0.1 * np.random.RandomState(0).rand(*image.shape)
    label = superpixels(image, 24)
    count = label.max() + 1
    assert 16 <= count <= 24
    assert set(np.unique(label)) == set(range(count))
    assert all(ndimage.label(label == number)[1] == 1 for number in range(count))
    sides = np.array([(label[:, :13] == number).any() and (label[:, 13:] == number).any() for number in range(count)])
    assert not sides.any()


@pytest.mark.parametrize("image", [np.zeros((9, 7, 1)), np.random.RandomState(0).rand(16, 16, 3)], ids=["flat", "noise"])
def test_superpixels_of_images_without_edges_are_still_many(image):
    label = superpixels(image, 12)
    assert label.max() + 1 == grid(image.shape[:2], 12).max() + 1 >= 9
    assert np.bincount(label.ravel()).min() >= 1


@pytest.mark.parametrize(("places", "segments"), [((28, 28), 64), ((8, 8), 1), ((8, 8), 64), ((5, 17), 12), ((17, 5), 12), ((10,), 4)])
def test_a_grid_has_at_most_so_many_cells_of_nearly_one_size(places, segments):
    cells = grid(places, segments)
    sizes = np.bincount(cells.ravel())
    assert segments / 2 < len(sizes) <= segments
    assert sizes.min() > 0
    for axis in range(len(places)):
        lengths = np.unique(np.moveaxis(cells, axis, 0).reshape(places[axis], -1)[:, 0], return_counts=True)[1]
        assert np.ptp(lengths) <= 1


def test_what_is_spread_sums_to_what_there_was():
    groups = np.array([[0, 0, 1], [-1, 0, 1]])
    spreaded = spread(np.array([3.0, -4.0]), groups, (2, 3, 2))
    np.testing.assert_allclose(spreaded[..., 1], [[0.5, 0.5, -1.0], [0.0, 0.5, -1.0]])
    assert spreaded.sum() == pytest.approx(-1.0)


def test_features_of_padded_text_skip_the_padding(model, examples_of):
    text = model("gpt")
    groups = features_of(text, examples_of(text, 2), 64)
    assert groups[0].tolist() == list(range(8))
    assert groups[1].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "method.window=0: must be at least 1"),
        ({"stride": (1, 0)}, r"method.stride=\(1, 0\): must be at least 1"),
        ({"window": 9}, "method.window=9: the input has 8 positions there"),
        ({"window": 2, "stride": 3}, "method.stride=3: with window=2 some positions are never covered; at most 2"),
        ({"window": (2, 2, 1)}, "this input has 2 axes of positions"),
        ({"rows": 0}, "method.rows=0: must be at least 1"),
    ],
)
def test_windows_that_cannot_be_are_refused(settings, message, model, examples_of):
    with pytest.raises(ConfigError, match=message):
        Occlusion(**settings)(model("cnn"), examples_of(model("cnn"), 1), KEY)


def test_features_that_cover_nothing_are_refused(model, examples_of):
    made = model("cnn")
    row = examples_of(made, 1)
    with pytest.raises(ConfigError, match="feature 0 covers nothing of example 0"):
        coalition_scores(made, row, 0.0, np.full((8, 8), -1), np.ones((1, 0), bool))
    gap = np.where(grid((8, 8), 4) == 2, 3, grid((8, 8), 4))
    with pytest.raises(ConfigError, match="feature 2 covers nothing of example 0"):
        coalition_scores(made, row, 0.0, gap, np.ones((1, 4), bool))
    with pytest.raises(ConfigError, match=r"coalitions of shape \(1, 3\), and the input has 4 features"):
        coalition_scores(made, row, 0.0, grid((8, 8), 4), np.ones((1, 3), bool))
    with pytest.raises(ConfigError, match=r"method\.segments=65: the input has 64 positions, so some would cover nothing"):
        Ablation(segments=65)(made, row, KEY)
    with pytest.raises(ConfigError, match=r"method\.segments=0: must be at least 1"):
        Ablation(segments=0)
    with pytest.raises(ConfigError, match=r"method\.features='girds' is unknown; did you mean 'grid'"):
        Ablation(features="girds")
    text = model("gpt")
    given = examples_of(text, 1)
    empty = dataclasses.replace(given, batch={**given.batch, "mask": np.zeros((1, 8), bool)})
    with pytest.raises(ConfigError, match="example 0: its mask covers nothing"):
        Ablation()(text, empty, KEY)


@pytest.mark.parametrize("name", ["occlusion", "ablation", "lime", "shap", "counterfactual", "permutation", "partial_dependence"])
def test_the_file_holds_every_setting_with_its_default(name):
    node = methods.node(name)
    method = build(node, where="method")
    assert {field.name for field in dataclasses.fields(method)} == set(node) - {"_target_"}
    assert method == type(method)()
