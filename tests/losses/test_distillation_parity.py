"""The losses of distillation against torch's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from research.losses.distillation import cosine_distance, soft_loss

RANDOM = np.random.RandomState(0)
STUDENT, TEACHER = ((3 * RANDOM.randn(8, 7)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_loss_is_kl_div_times_the_squared_temperature(temperature):
    student = torch.tensor(STUDENT, requires_grad=True)
    inputs = torch.log_softmax(student / temperature, -1), torch.softmax(torch.tensor(TEACHER) / temperature, -1)
    want = torch.nn.functional.kl_div(*inputs, reduction="batchmean") * temperature**2
    want.backward()
    got, slope = jax.value_and_grad(lambda x: soft_loss(x, jnp.asarray(TEACHER), temperature).mean())(jnp.asarray(STUDENT))
    np.testing.assert_allclose(got, want.detach(), rtol=1e-5)
    np.testing.assert_allclose(slope, student.grad, atol=1e-6)


def test_cosine_distance_is_the_cosine_embedding_loss():
    want = torch.nn.functional.cosine_embedding_loss(torch.tensor(STUDENT), torch.tensor(TEACHER), torch.ones(8), reduction="none")
    np.testing.assert_allclose(cosine_distance(jnp.asarray(STUDENT), jnp.asarray(TEACHER)), want, atol=1e-6)
