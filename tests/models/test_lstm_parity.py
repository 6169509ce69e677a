"""The language model against torch.nn.LSTM with copied weights: logits and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from research.losses.cross_entropy import cross_entropy


def test_logits_and_gradients(configured, filled, tokens):
    module = configured("lstm", width=6, embedding=5)
    params = filled(module, tokens)["params"]
    target = np.random.RandomState(1).randint(0, 65, tokens.shape).astype(np.int32)

    embedding, peer, head = nn.Embedding(65, 5), nn.LSTM(5, 6, 2, batch_first=True), nn.Linear(6, 65)
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor(params["token"]["embedding"]))
        head.weight.copy_(torch.tensor(params["head"]["kernel"].T))
        head.bias.copy_(torch.tensor(params["head"]["bias"]))
        for i in range(2):
            layer = params[f"lstm_{i}"]
            getattr(peer, f"weight_ih_l{i}").copy_(torch.tensor(layer["input"]["kernel"].T))
            getattr(peer, f"weight_hh_l{i}").copy_(torch.tensor(layer["recurrent"].T))
            getattr(peer, f"bias_ih_l{i}").copy_(torch.tensor(layer["input"]["bias"]))
            getattr(peer, f"bias_hh_l{i}").zero_()
    want = head(peer(embedding(torch.tensor(tokens).long()))[0])
    nn.functional.cross_entropy(want.flatten(0, 1), torch.tensor(target).long().flatten()).backward()

    @jax.jit
    def logits_and_gradient(params):
        def loss(params):
            logits, _ = module.apply({"params": params}, jnp.asarray(tokens))
            return cross_entropy(logits, jnp.asarray(target)).mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    gradient, logits = logits_and_gradient(params)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(logits, want.detach(), **close)
    np.testing.assert_allclose(gradient["token"]["embedding"], embedding.weight.grad, **close)
    np.testing.assert_allclose(gradient["head"]["kernel"], head.weight.grad.T, **close)
    for i in range(2):
        layer = gradient[f"lstm_{i}"]
        np.testing.assert_allclose(layer["input"]["kernel"], getattr(peer, f"weight_ih_l{i}").grad.T, **close)
        np.testing.assert_allclose(layer["recurrent"], getattr(peer, f"weight_hh_l{i}").grad.T, **close)
        np.testing.assert_allclose(layer["input"]["bias"], getattr(peer, f"bias_ih_l{i}").grad, **close)
