"""The losses of numbers against torch's."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from research.losses.regression import absolute_error, huber, squared_error

VALUE, TARGET = np.random.RandomState(0).randn(2, 6, 3).astype(np.float32) * 3


@pytest.mark.parametrize(
    ("loss", "peer"),
    [
        (squared_error, F.mse_loss),
        (absolute_error, F.l1_loss),
        (functools.partial(huber, delta=2.0), functools.partial(F.huber_loss, delta=2.0)),
    ],
)
def test_each_element(loss, peer):
    want = peer(torch.tensor(VALUE), torch.tensor(TARGET), reduction="none")
    np.testing.assert_allclose(loss(jnp.asarray(VALUE), jnp.asarray(TARGET)), want, rtol=1e-5)
