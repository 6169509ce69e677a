import jax.numpy as jnp
import numpy as np
import pytest

from research.metrics.classification import accuracy, top_k

RANDOM = np.random.RandomState(0)
LOGITS = RANDOM.randn(50, 7).astype(np.float32)
LABEL = RANDOM.randint(0, 7, 50).astype(np.int32)
MASK = RANDOM.rand(50) > 0.3


def test_accuracy_is_the_share_of_highest_scores():
    right, count = accuracy(jnp.asarray(LOGITS), jnp.asarray(LABEL), jnp.asarray(MASK))
    assert float(right) == (LOGITS.argmax(-1) == LABEL)[MASK].sum()
    assert float(count) == MASK.sum()


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_looks_among_the_k_highest(k):
    highest = np.argsort(-LOGITS, -1)[:, :k]
    right, count = top_k(jnp.asarray(LOGITS), jnp.asarray(LABEL), jnp.asarray(MASK), k)
    assert float(right) == (highest == LABEL[:, None]).any(-1)[MASK].sum()
    assert float(count) == MASK.sum()


def test_top_1_is_accuracy_also_under_ties():
    tied = jnp.asarray(np.round(LOGITS))
    for logits in (tied, jnp.zeros((50, 7))):
        assert top_k(logits, jnp.asarray(LABEL), jnp.ones(50), 1)[0] == accuracy(logits, jnp.asarray(LABEL), jnp.ones(50))[0]


def test_a_nan_is_never_right():
    assert top_k(jnp.full((50, 7), jnp.nan), jnp.asarray(LABEL), jnp.ones(50), 3)[0] == 0


def test_leading_axes_are_counted_alike():
    flat = top_k(jnp.asarray(LOGITS), jnp.asarray(LABEL), jnp.asarray(MASK), 2)
    assert top_k(jnp.asarray(LOGITS.reshape(5, 10, 7)), jnp.asarray(LABEL.reshape(5, 10)), jnp.asarray(MASK.reshape(5, 10)), 2) == flat
