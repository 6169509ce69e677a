"""The residual network against the same in torch, with copied weights: logits, gradients and running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from research.core.tree import paths
from research.layers import conv
from research.losses.cross_entropy import cross_entropy


class Block(nn.Module):
    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.conv_0, self.norm_0 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv_1, self.norm_1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        if stride > 1 or inputs != channels:
            self.shortcut, self.shortcut_norm = nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.norm_1(self.conv_1(torch.relu(self.norm_0(self.conv_0(x)))))
        return torch.relu(y + (self.shortcut_norm(self.shortcut(x)) if hasattr(self, "shortcut") else x))


class Peer(nn.Module):
    def __init__(self, imagenet):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 7, 2, 3, bias=False) if imagenet else nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        self.stem_norm, self.block_0, self.block_1, self.head = nn.BatchNorm2d(4), Block(4, 4, 1), Block(4, 6, 2), nn.Linear(6, 10)

    def forward(self, x):
        return self.head(self.block_1(self.block_0(self.pool(torch.relu(self.stem_norm(self.stem(x)))))).mean((2, 3)))


def named(tree):
    """torch's name -> array in torch's layout."""
    words = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "variance": "running_var"}
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}
    named = {}
    for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True):
        parent, _, name = path.replace("/", ".").rpartition(".")
        named[f"{parent}.{words.get(name, name)}"] = np.asarray(leaf).transpose(axes.get(leaf.ndim, (0,)))
    return named


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize(("stem", "tiles"), [("small", False), ("small", True), ("imagenet", False)])
def test_logits_gradients_and_statistics(configured, filled, stem, tiles, monkeypatch):
    for name in ("SAVED", "CHANNELS", "PRODUCT", "ROWS") if tiles else ():  # so small a network would not take them by itself
        monkeypatch.setattr(conv, name, 0)
    taken, by_tiles = [], conv._by_tiles
    monkeypatch.setattr(conv, "_by_tiles", lambda *args: taken.append(args) or by_tiles(*args))
    random = np.random.RandomState(0)
    x, label = random.randn(4, 18, 18, 3).astype(np.float32), random.randint(0, 10, 4).astype(np.int32)
    module = configured("resnet18", blocks=[1, 1], channels=[4, 6], stem=stem)
    variables = filled(module, x)
    peer = Peer(stem == "imagenet")
    with torch.no_grad():
        state = peer.state_dict()
        given = named(variables["params"]) | named(variables["batch_stats"])
        assert {name for name in state if "num_batches" not in name} == set(given)
        for name, value in given.items():
            state[name].copy_(torch.tensor(value))
    images = torch.tensor(x).permute(0, 3, 1, 2)
    with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's gradient of the strided 1x1 kernel differs from call to call on an AMD EPYC
        still = peer.eval()(images).detach()
        want = peer.train()(images)
        nn.functional.cross_entropy(want, torch.tensor(label).long()).backward()

    @jax.jit
    def step(params, stats):
        def loss(params):
            (logits, _), changed = module.apply({"params": params, "batch_stats": stats}, jnp.asarray(x), train=True, mutable=["batch_stats"])
            return cross_entropy(logits, jnp.asarray(label)).mean(), (logits, changed["batch_stats"])

        return jax.grad(loss, has_aux=True)(params), module.apply({"params": params, "batch_stats": stats}, jnp.asarray(x))[0]

    (gradient, (logits, stats)), frozen = step(variables["params"], variables["batch_stats"])
    assert bool(taken) == tiles
    np.testing.assert_allclose(frozen, still, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits, want.detach(), rtol=1e-4, atol=1e-4)
    for name, value in named(gradient).items():
        np.testing.assert_allclose(value, peer.get_parameter(name).grad, rtol=1e-3, atol=1e-4, err_msg=name)
    for name, value in named(stats).items():
        np.testing.assert_allclose(value, peer.get_buffer(name), rtol=1e-4, atol=1e-4, err_msg=name)
