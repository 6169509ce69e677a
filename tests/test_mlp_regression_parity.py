"""The experiment mlp_regression against torch: the whole path from config to loss curve, from the same initial weights."""

import jax
import numpy as np
import torch

from research.core.config import compose
from research.data.dataset import open_data
from research.data.loader import Loader
from research.training.assembly import assemble
from research.training.step import means


def test_the_loss_curve_equals_torchs():
    config = compose(["experiment=mlp_regression"])
    dataset = open_data(config.data)
    config.data.spec = dict(dataset.spec)
    loader = Loader(dataset.split("train"), config.data.batch, seed=config.seed)
    assembly = assemble(config, batches=len(loader))
    assert assembly.step.steps == 100
    state, step = assembly.state(), jax.jit(assembly.step)
    twin = _twin(state.params)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
    ours, theirs = [], []
    for i in range(assembly.step.steps):
        batch = loader[i]
        state, metrics = step(state, None, batch)
        ours.append(means(jax.device_get(metrics))["loss"])
        loss = torch.nn.functional.mse_loss(twin(torch.from_numpy(batch["features"])), torch.from_numpy(batch["target"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ours[-1] < ours[0] - 0.01


def _twin(params):
    """A torch network of 10, 5 and 1 units with these weights."""
    twin = torch.nn.Sequential(torch.nn.Linear(10, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
    for layer, name in ((twin[0], "dense_0"), (twin[2], "head")):
        layer.weight.data = torch.tensor(np.asarray(params[name]["kernel"]).T.copy())
        layer.bias.data = torch.tensor(np.asarray(params[name]["bias"]))
    return twin
