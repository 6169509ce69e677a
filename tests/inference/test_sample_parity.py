"""Sampling keeps the tokens that transformers' logits warpers keep, with the same probabilities."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from research.inference.sample import candidates, scale


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 5, 40, 200])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
def test_against_transformers(temperature, top_k, top_p):
    logits = np.random.RandomState(0).randn(16, 200).astype(np.float32) * 3
    theirs = torch.from_numpy(logits)
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        theirs = warper(None, theirs)
    ours = scale(jnp.asarray(logits), temperature)
    ours = np.where(candidates(ours, top_k, top_p), ours, -np.inf)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))
    exponential = np.exp(ours)
    np.testing.assert_allclose(exponential / exponential.sum(-1, keepdims=True), torch.softmax(theirs, -1).numpy(), rtol=2e-5, atol=1e-7)
