"""Every optimizer config against torch.optim, or ten lines of numpy where torch has none: 50 updates from the same weights and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from omegaconf import OmegaConf

from research.training.muon import newton_schulz
from research.training.optimizer import Optimizer

UPDATES = 50
SHAPES = {"dense_0/kernel": (5, 4), "dense_0/bias": (4,), "norm/scale": (4,), "dense_1/kernel": (4, 7), "head/kernel": (7, 3), "head/bias": (3,)}
RANDOM = np.random.RandomState(0)
WEIGHTS = {path: (0.2 * RANDOM.randn(*shape)).astype(np.float32) for path, shape in SHAPES.items()}
GRADIENTS = [{path: RANDOM.randn(*shape).astype(np.float32) for path, shape in SHAPES.items()} for _ in range(UPDATES)]


@pytest.fixture
def ours(request):
    """Trains with the optimizer of a config file and some changes, and returns the weights by path."""

    def train(name, clip=None, **changes):
        file = OmegaConf.load(request.config.rootpath / "conf" / "optimizer" / f"{name}.yaml")
        node = {**OmegaConf.to_container(file.get("optimizer", file)), **changes}
        optimizer = Optimizer.from_config(node, clip=clip)
        params = unflatten_dict(WEIGHTS, sep="/")
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for gradient in GRADIENTS:
            updates, state = update(unflatten_dict(gradient, sep="/"), state, params, {}, jnp.float32(node["learning_rate"]))
            params = optax.apply_updates(params, updates)
        return flatten_dict(params, sep="/")

    return train


def theirs(make, weight_decay=0.0, clip=None):
    """Trains with make([decaying group, other group]) of torch, whose matrices are transposed, and returns the weights by path."""
    tensors = {path: torch.nn.Parameter(torch.tensor(x.T)) for path, x in WEIGHTS.items()}
    decaying = [x for path, x in tensors.items() if path.endswith("kernel")]
    others = [x for path, x in tensors.items() if not path.endswith("kernel")]
    optimizer = make([{"params": decaying, "weight_decay": weight_decay}, {"params": others}])
    for gradient in GRADIENTS:
        for path, x in tensors.items():
            x.grad = torch.tensor(gradient[path].T)
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        optimizer.step()
    return {path: x.detach().numpy().T for path, x in tensors.items()}


def assert_equal(ours, theirs, tolerance=1e-6):
    for path, x in theirs.items():
        np.testing.assert_allclose(ours[path], x, rtol=tolerance, atol=tolerance, err_msg=path)


T = torch.optim


@pytest.mark.parametrize(
    ("name", "changes", "make", "decay"),
    [
        ("gradient_descent", {}, lambda p: T.SGD(p, lr=0.1), 0.0),
        ("sgd", {}, lambda p: T.SGD(p, lr=0.1), 0.0),
        ("sgd", {"weight_decay": 0.02}, lambda p: T.SGD(p, lr=0.1), 0.02),
        ("momentum", {"weight_decay": 0.02}, lambda p: T.SGD(p, lr=0.05, momentum=0.9), 0.02),
        ("nesterov", {"weight_decay": 0.02}, lambda p: T.SGD(p, lr=0.05, momentum=0.9, nesterov=True), 0.02),
        ("adagrad", {}, lambda p: T.Adagrad(p, lr=0.01), 0.0),
        ("rmsprop", {}, lambda p: T.RMSprop(p, lr=0.001), 0.0),
        ("rmsprop", {"momentum": 0.9, "centered": True}, lambda p: T.RMSprop(p, lr=0.001, momentum=0.9, centered=True), 0.0),
        ("adam", {}, lambda p: T.Adam(p, lr=0.001), 0.0),
        ("adam", {"b1": 0.8, "b2": 0.95, "eps": 1e-3}, lambda p: T.Adam(p, lr=0.001, betas=(0.8, 0.95), eps=1e-3), 0.0),
        ("adamw", {}, lambda p: T.AdamW(p, lr=0.001, weight_decay=0.0), 0.01),
        ("adafactor", {"min_dim_size_to_factor": 1}, lambda p: T.Adafactor(p, lr=0.01), 0.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_equals_torch(ours, name, changes, make, decay):
    assert_equal(ours(name, **changes), theirs(make, decay))


def test_clipping_equals_torchs(ours):
    """torch divides by the norm plus 1e-6."""
    assert_equal(ours("sgd", clip=0.5), theirs(lambda p: T.SGD(p, lr=0.1), clip=0.5), tolerance=2e-6)


def test_adafactors_two_differences_from_torch_are_those_that_its_config_names(ours):
    """At a rate of 0.5, torch's cap of 1 / sqrt(step) holds after four updates: the same rule with the capped rate is torch's."""
    capped = theirs(lambda p: T.Adafactor(p, lr=0.5))
    assert np.abs(ours("adafactor", learning_rate=0.5, min_dim_size_to_factor=1)["dense_0/kernel"] - capped["dense_0/kernel"]).max() > 0.01
    optimizer = Optimizer(optax.adafactor, (("min_dim_size_to_factor", 1),))
    params = dict(WEIGHTS)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step, gradient in enumerate(GRADIENTS, 1):
        updates, state = update(gradient, state, params, {}, jnp.float32(min(0.5, step**-0.5)))
        params = optax.apply_updates(params, updates)
    assert_equal(params, capped, tolerance=1e-5)  # large steps: weights reach 10


def test_lion_equals_ten_lines_of_numpy(ours):
    expected = {}
    for path, weight in WEIGHTS.items():
        p, m, decay = weight.astype(np.float64), 0.0, 0.1 * path.endswith("kernel")
        for gradient in GRADIENTS:
            g = gradient[path].astype(np.float64)
            p = p - 1e-4 * (np.sign(0.9 * m + 0.1 * g) + decay * p)
            m = 0.99 * m + 0.01 * g
        expected[path] = p
    assert_equal(ours("lion"), expected)


def test_lamb_equals_ten_lines_of_numpy(ours):
    expected = {}
    for path, weight in WEIGHTS.items():
        p, m, v, decay = weight.astype(np.float64), 0.0, 0.0, 0.01 * path.endswith("kernel")
        for t, gradient in enumerate(GRADIENTS, 1):
            g = gradient[path].astype(np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6) + decay * p
            p = p - 1e-3 * np.linalg.norm(p) / np.linalg.norm(u) * u
        expected[path] = p
    assert_equal(ours("lamb"), expected)


def orthogonal(x):
    """Newton and Schulz in float64."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("rms", [0.2, None])
def test_muon_equals_numpy_in_double_precision_and_torch_in_its_bfloat16(ours, rms):
    """torch's Newton-Schulz runs in bfloat16, so it is met to that precision, of the distance moved; Adam takes the rest exactly."""
    found = ours("muon", rms=rms, weight_decay=0.1)
    hidden = ("dense_0/kernel", "dense_1/kernel")
    parameters = {path: torch.nn.Parameter(torch.tensor(WEIGHTS[path].T)) for path in hidden}
    torchs = T.Muon(parameters.values(), lr=1e-3, weight_decay=0.1, adjust_lr_fn="original" if rms is None else "match_rms_adamw")
    for gradient in GRADIENTS:
        for path, x in parameters.items():
            x.grad = torch.tensor(gradient[path].T)
        torchs.step()
    for path in hidden:
        p, m = WEIGHTS[path].astype(np.float64), 0.0
        i, o = p.shape
        for gradient in GRADIENTS:
            m = 0.95 * m + 0.05 * gradient[path]
            scale = max(1, o / i) ** 0.5 if rms is None else rms * max(i, o) ** 0.5
            p = p - 1e-3 * (scale * orthogonal(0.95 * m + 0.05 * gradient[path]) + 0.1 * p)
        np.testing.assert_allclose(found[path], p, atol=2e-6)
        moved = np.linalg.norm(p - WEIGHTS[path])
        assert np.linalg.norm(parameters[path].detach().numpy().T - found[path]) < 0.02 * moved
    adam = theirs(lambda p: T.AdamW(p, lr=0.001, betas=(0.9, 0.95), weight_decay=0.0), 0.1)
    assert_equal(found, {path: x for path, x in adam.items() if path not in hidden})


def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_vectors():
    x = np.random.RandomState(1).randn(12, 30).astype(np.float32)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    for matrix, core in ((x, u.T @ newton_schulz(x) @ v.T), (x.T, v @ newton_schulz(x.T) @ u)):
        values = np.diag(core)
        assert matrix.shape == newton_schulz(matrix).shape
        assert 0.6 < values.min() <= values.max() < 1.3
        np.testing.assert_allclose(core, np.diag(values), atol=1e-4)
    assert not newton_schulz(np.zeros((3, 4), np.float32)).any()
