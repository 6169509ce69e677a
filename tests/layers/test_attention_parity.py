"""Attention against torch's scaled_dot_product_attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from research.layers.causal import blockwise_attention


@pytest.mark.parametrize(("h", "g", "t"), [(4, 4, 9), (4, 2, 70), (6, 1, 64)])
def test_value_and_gradient(h, g, t):
    random = np.random.RandomState(0)
    arrays = [random.randn(2, n, t, 8).astype(np.float32) for n in (h, g, g)]
    weight = random.randn(2, h, t, 8).astype(np.float32)
    peers = [torch.tensor(x, requires_grad=True) for x in arrays]
    want = torch.nn.functional.scaled_dot_product_attention(*peers, is_causal=True, enable_gqa=True)
    (want * torch.tensor(weight)).sum().backward()

    @jax.jit
    def output_and_gradients(*inputs):
        got, pull = jax.vjp(blockwise_attention, *inputs)
        return got, pull(jnp.asarray(weight))

    got, gradients = output_and_gradients(*arrays)
    np.testing.assert_allclose(got, want.detach(), atol=1e-5)
    for gradient, peer in zip(gradients, peers, strict=True):
        np.testing.assert_allclose(gradient, peer.grad, atol=2e-5)
