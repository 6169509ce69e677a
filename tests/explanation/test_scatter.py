"""Maps: PCA against scikit-learn, t-SNE that keeps planted neighbours."""

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

from research.core.errors import ConfigError
from research.explanation.scatter import EmbeddingMap, pca, tsne

KEY = jax.random.key(0)


def clusters(rows=36, width=10):
    random = np.random.RandomState(0)
    label = np.arange(rows) % 3
    return (8 * np.eye(3, width)[label] + random.standard_normal((rows, width))).astype(np.float32), label


def test_pca_is_that_of_scikit_learn():
    x, _ = clusters()
    oracle = PCA(2, svd_solver="full").fit(x.astype(np.float64))
    places, shares = pca(x)
    wanted = oracle.transform(x.astype(np.float64))
    np.testing.assert_allclose(np.abs(places), np.abs(wanted), atol=1e-4)
    np.testing.assert_allclose(shares, oracle.explained_variance_ratio_, rtol=1e-5)
    np.testing.assert_array_equal(pca(x)[0], places)


def test_tsne_keeps_neighbours_and_repeats_itself():
    x, label = clusters()
    places = tsne(x, 6.0, 3)
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.diag(np.full(len(x), np.inf))
    assert (label[distance.argmin(1)] == label).all()
    np.testing.assert_array_equal(tsne(x, 6.0, 3), places)
    with pytest.raises(ConfigError, match=r"method\.perplexity=36\.0: must be below the number of items, 36"):
        tsne(x, 36.0, 3)


def test_a_map_of_a_tap(model, with_data):
    random = np.random.RandomState(0)
    source = {"image": random.standard_normal((40, 8, 8, 1)).astype(np.float32), "label": (np.arange(40) % 5).astype(np.int32)}
    mlp = with_data(model("mlp"), test=source)
    found = EmbeddingMap(how="pca")(mlp, None, KEY)
    assert found.numbers["at"] == "hidden_1"
    (panel,) = found.drawn
    assert list(dict.fromkeys(panel.groups)) == sorted(model("mlp").classes)
    _, taps = mlp.read({**source, "mask": np.ones(40, bool), "index": np.arange(40, dtype=np.int32)}, ["hidden_1"])
    np.testing.assert_allclose(found.kept["pca"], pca(np.asarray(taps["hidden_1"]))[0], atol=1e-4)
    tokens = random.randint(0, 11, (30, 8)).astype(np.int32)
    gpt = with_data(model("gpt"), train={"tokens": tokens, "target": tokens, "mask": np.ones((30, 8), bool)})
    assert set(EmbeddingMap(how="pca", each=2)(gpt, None, KEY).drawn[0].groups) <= {repr(letter) for letter in "abcdefghijk"}
    with pytest.raises(ValueError, match="examples=2"):
        EmbeddingMap(examples=2)
