"""The norms against torch's."""

import jax.numpy as jnp
import numpy as np
import torch

from research.layers.norm import BatchNorm, LayerNorm, RMSNorm

RANDOM = np.random.RandomState(0)
X = (RANDOM.randn(6, 4, 5) * 2 + 1).astype(np.float32)
SCALE, BIAS = RANDOM.randn(5).astype(np.float32), RANDOM.randn(5).astype(np.float32)
PARAMS = {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}


def test_layer_norm():
    want = torch.nn.functional.layer_norm(torch.tensor(X), (5,), torch.tensor(SCALE), torch.tensor(BIAS))
    np.testing.assert_allclose(LayerNorm().apply({"params": PARAMS}, jnp.asarray(X)), want, atol=1e-5)


def test_rms_norm():
    want = torch.nn.functional.rms_norm(torch.tensor(X), (5,), torch.tensor(SCALE), eps=1e-6)
    np.testing.assert_allclose(RMSNorm().apply({"params": {"scale": PARAMS["scale"]}}, jnp.asarray(X)), want, atol=1e-5)


def test_batch_norm_in_training_and_after():
    peer = torch.nn.BatchNorm1d(5)
    peer.load_state_dict({"weight": torch.tensor(SCALE), "bias": torch.tensor(BIAS)}, strict=False)
    stats = {"mean": jnp.zeros(5), "variance": jnp.ones(5)}
    for step in range(3):
        x = X * (step + 1)
        want = peer(torch.tensor(x).transpose(1, 2)).transpose(1, 2).detach()  # torch's channels come second
        y, changed = BatchNorm().apply({"params": PARAMS, "batch_stats": stats}, jnp.asarray(x), train=True, mutable=["batch_stats"])
        stats = changed["batch_stats"]
        np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(stats["mean"], peer.running_mean, rtol=1e-5)
    np.testing.assert_allclose(stats["variance"], peer.running_var, rtol=1e-5)
    want = peer.eval()(torch.tensor(X).transpose(1, 2)).transpose(1, 2).detach()
    np.testing.assert_allclose(BatchNorm().apply({"params": PARAMS, "batch_stats": stats}, jnp.asarray(X), train=False), want, atol=1e-5)
