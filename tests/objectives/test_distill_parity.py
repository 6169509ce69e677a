"""The objective of distillation against torch: the loss and its gradient, through a linear student."""

import jax
import numpy as np
import pytest
import torch

from research.objectives.distill import Distill
from research.training.step import divide


@pytest.mark.parametrize(("temperature", "hard", "soft"), [(1.0, 0.0, 1.0), (4.0, 0.3, 0.7)])
def test_loss_and_gradient(configured, images, temperature, hard, soft):
    linear = configured("classify", "perceptron")
    objective = Distill(linear, linear, temperature=temperature, hard=hard, soft=soft)
    params, extra = linear.init(jax.random.key(0), images)
    teacher, _ = linear.init(jax.random.key(1), images)
    frozen = objective.taught({"student": None, "teacher": None}, teacher, {}, None, {})

    @jax.jit
    def loss(params, batch):
        tally, _ = objective(params, extra, frozen, batch, None, {}, train=True)
        return divide(tally, objective.weights(batch), objective.coefficients, {})

    value, grads = jax.value_and_grad(loss)(params, images)

    keep = images["mask"]
    x, label = torch.tensor(images["image"][keep].reshape(keep.sum(), -1)), torch.tensor(images["label"][keep]).long()
    (name,) = params
    kernel, bias = (torch.tensor(np.asarray(params[name][leaf]), requires_grad=True) for leaf in ("kernel", "bias"))
    logits = x @ kernel + bias
    wanted = x @ torch.tensor(np.asarray(teacher[name]["kernel"])) + torch.tensor(np.asarray(teacher[name]["bias"]))
    divergence = torch.nn.functional.kl_div(
        torch.log_softmax(logits / temperature, -1), torch.softmax(wanted / temperature, -1), reduction="batchmean"
    )
    total = hard * torch.nn.functional.cross_entropy(logits, label) + soft * temperature**2 * divergence
    total.backward()
    np.testing.assert_allclose(value, total.detach(), rtol=1e-5)
    np.testing.assert_allclose(grads[name]["kernel"], kernel.grad, atol=1e-5)
    np.testing.assert_allclose(grads[name]["bias"], bias.grad, atol=1e-5)
