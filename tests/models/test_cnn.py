import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import open_dict

from research import compose
from research.core.errors import ConfigError
from research.core.tree import count, paths
from research.data.dataset import open_data
from research.data.loader import Loader
from research.models import cnn
from research.models.cnn import CNN
from research.training.assembly import assemble


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((28, 28, 1), {}),
        ((32, 32, 3), {"norm": "batch", "dropout": None}),
        ((32, 32, 3), {"channels": [8, 16], "kernel": [5, 3], "pool": 2, "hidden": []}),
        ((8, 8, 1), {"padding": "SAME"}),
        ((8, 8, 1), {"channels": [8], "pool": 1, "norm": "layer", "activation": "gelu"}),
        ((28, 28, 1), {"dtype": "bfloat16", "norm": "batch"}),
    ],
)
def test_shapes_of_every_option(configured, shape, changes):
    module = configured("cnn", **changes)
    (logits, taps), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((2, *shape)))
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert {"input", "logits"} <= set(taps)
    assert taps["input"].shape == (2, *shape)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("shape", "parameters"), [((28, 28, 1), 93_322), ((32, 32, 3), 122_570)])
def test_parameter_count_is_that_of_the_docstring(shape, parameters):
    assert count(jax.eval_shape(CNN(10).init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]) == parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "8 x 8 before conv_2|1 x 1 before conv_2|3 x 3 before conv_1"),
        ({"padding": "SAME", "channels": [4, 4, 4, 4], "pool": 2}, "1 x 1 before conv_3.*pool=2"),
    ],
)
def test_an_image_that_becomes_empty_is_named(configured, image, changes, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(configured("cnn", **changes).init, jax.random.key(0), image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": [2, 2]}, "pool=\\(2, 2\\) has 2 entries, but depth is 3"),
        ({"padding": "same"}, "'same' is unknown"),
        ({"channels": [8, 0, 8]}, "channels=.* must be at least 1"),
        ({"norm": "bach"}, "did you mean 'batch'"),
    ],
)
def test_a_mistake_is_named(configured, changes, message):
    with pytest.raises(ConfigError, match=message):
        configured("cnn", **changes)


def test_batch_statistics_leave_padding_out(configured, filled, image, run):
    module = configured("cnn", norm="batch", channels=[4, 4], pool=[2, 1], hidden=[8])
    variables = filled(module, image)
    padded = np.concatenate([image, np.zeros((2, 8, 8, 1), np.float32)])
    mask = np.arange(6) < 4
    want, _ = run(module, variables, image, mask=mask[:4], train=True, mutable=("batch_stats",))
    got, _ = run(module, variables, padded, mask=mask, train=True, mutable=("batch_stats",))
    np.testing.assert_allclose(got[:4], want, atol=1e-4)


def test_the_gradient_of_a_pool_survives_what_the_compiler_computes_anew(monkeypatch):
    """A whole step on digits, whose plain ground is made of equal maxima, compiled so that its parts round differently, beside Flax's pool."""
    config = compose(["experiment=digits_cnn"])
    dataset = open_data(config.data)
    with open_dict(config):
        config.data.spec = dict(dataset.spec)
    loader = Loader(dataset.split("train"), config.data.batch, seed=config.seed)

    def moments():
        assembly = assemble(config, batches=len(loader))
        program = jax.jit(assembly.step.__call__).lower(state := assembly.state(), None, loader[0])
        after, _ = program.compile(compiler_options={"xla_backend_optimization_level": 0})(state, None, loader[0])
        return {path: leaf for path, leaf in paths(after.opt).items() if "mu" in path}

    ours = moments()
    monkeypatch.setattr(cnn, "max_pool", lambda x, size: nn.max_pool(x, (size, size), (size, size)))
    theirs = moments()
    assert len(ours) > 10
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), ours, theirs)
