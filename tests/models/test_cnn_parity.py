"""Keras's MNIST network against the same in torch, with copied weights: logits and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from research.losses.cross_entropy import cross_entropy
from research.models.cnn import CNN


def test_logits_and_gradients(filled):
    random = np.random.RandomState(0)
    x, label = random.randn(4, 28, 28, 1).astype(np.float32), random.randint(0, 10, 4)
    params = filled(CNN(10), x)["params"]

    convs, dense, head = [nn.Conv2d(*c, 3) for c in ((1, 32), (32, 64), (64, 64))], nn.Linear(576, 64), nn.Linear(64, 10)
    peer = nn.Sequential(convs[0], nn.ReLU(), nn.MaxPool2d(2), convs[1], nn.ReLU(), nn.MaxPool2d(2), convs[2], nn.ReLU())
    with torch.no_grad():
        for i, conv in enumerate(convs):
            conv.weight.copy_(torch.tensor(params[f"conv_{i}"]["kernel"].transpose(3, 2, 0, 1)))  # y x c d -> d c y x
            conv.bias.copy_(torch.tensor(params[f"conv_{i}"]["bias"]))
        for layer, name in ((dense, "dense_0"), (head, "head")):
            layer.weight.copy_(torch.tensor(params[name]["kernel"].T))
            layer.bias.copy_(torch.tensor(params[name]["bias"]))
    maps = peer(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # flattened with the channels last, as here
    want = head(torch.relu(dense(maps.reshape(4, -1))))
    nn.functional.cross_entropy(want, torch.tensor(label)).backward()

    @jax.jit
    def logits_and_gradient(params):
        def loss(params):
            logits, _ = CNN(10).apply({"params": params}, jnp.asarray(x))
            return cross_entropy(logits, jnp.asarray(label, jnp.int32)).mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    gradient, logits = logits_and_gradient(params)
    np.testing.assert_allclose(logits, want.detach(), rtol=1e-4, atol=1e-4)
    for i, conv in enumerate(convs):
        np.testing.assert_allclose(gradient[f"conv_{i}"]["kernel"], conv.weight.grad.permute(2, 3, 1, 0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gradient["dense_0"]["kernel"], dense.weight.grad.T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gradient["head"]["bias"], head.bias.grad, rtol=1e-3, atol=1e-4)
