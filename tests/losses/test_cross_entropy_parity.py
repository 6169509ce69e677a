"""Cross-entropy against torch's, with smoothing and class weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from research.losses.cross_entropy import cross_entropy

RANDOM = np.random.RandomState(0)
LOGITS = (3 * RANDOM.randn(40, 7)).astype(np.float32)
LABEL = RANDOM.randint(0, 7, 40)
WEIGHTS = (RANDOM.rand(7) + 0.5).astype(np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_each_element_and_the_weighted_mean(smoothing, weights):
    got = cross_entropy(
        jnp.asarray(LOGITS), jnp.asarray(LABEL, jnp.int32), label_smoothing=smoothing, class_weights=None if weights is None else jnp.asarray(weights)
    )
    options = {"weight": None if weights is None else torch.tensor(weights), "label_smoothing": smoothing}
    want = torch.nn.functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(LABEL), reduction="none", **options)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    mean = torch.nn.functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(LABEL), **options)
    np.testing.assert_allclose(got.sum() / (40 if weights is None else weights[LABEL].sum()), mean, rtol=1e-5)
