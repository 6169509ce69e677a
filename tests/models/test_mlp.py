import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.core.tree import count, paths
from research.models.mlp import MLP


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"depth": 0},
        {"width": [7, 5, 3], "depth": 3},
        {"norm": "batch"},
        {"norm": "layer", "activation": "gelu"},
        {"dropout": None},
        {"dtype": "bfloat16"},
    ],
)
def test_shapes_of_every_option(configured, image, changes):
    module = configured("mlp", **changes)
    (logits, taps), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), image)
    assert (logits.shape, logits.dtype) == ((4, 10), jnp.float32)
    assert {"input", "logits"} <= set(taps)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_widths_are_those_of_the_tuple(configured, image):
    params = jax.eval_shape(configured("mlp", width=[7, 5], depth=2).init, jax.random.key(0), image)["params"]
    kernels = {path: leaf.shape for path, leaf in paths(params).items() if path.endswith("kernel")}
    assert kernels == {"dense_0/kernel": (64, 7), "dense_1/kernel": (7, 5), "head/kernel": (5, 10)}


def test_parameter_count_is_that_of_the_docstring():
    params = jax.eval_shape(MLP(10).init, jax.random.key(0), jnp.zeros((1, 784)))["params"]
    assert count(params) == 118_282


def test_equals_numpy(configured, filled, image, run):
    module = configured("mlp", width=6)
    variables = filled(module, image)
    logits, taps = run(module, variables, image)
    x = image.reshape(4, 64)
    for i in range(2):
        layer = variables["params"][f"dense_{i}"]
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        np.testing.assert_allclose(taps[f"hidden_{i}"], x, atol=1e-5)
    head = variables["params"]["head"]
    np.testing.assert_allclose(logits, x @ head["kernel"] + head["bias"], atol=1e-5)


def test_dropout_acts_in_training_alone_and_does_not_depend_on_the_cut(configured, filled, image, run):
    module = configured("mlp", dropout=None, width=64)
    variables, hyper = filled(module, image), {"dropout": jnp.float32(0.5)}
    index = np.arange(4, dtype=np.int32)
    whole, _ = run(module, variables, image, index=index, hyper=hyper, train=True)
    part, _ = run(module, variables, image[2:], index=index[2:], hyper=hyper, train=True)
    still, _ = run(module, variables, image, index=index, hyper=hyper)
    np.testing.assert_allclose(part, whole[2:], atol=1e-6)
    assert np.abs(whole - still).max() > 1e-3


def test_batch_statistics_leave_masked_rows_out(configured, filled, image, run):
    module = configured("mlp", norm="batch", width=8)
    variables = filled(module, image)
    mask = np.array([True, False, True, True])
    masked, _ = run(module, variables, image, mask=mask, train=True, mutable=("batch_stats",))
    alone, _ = run(module, variables, image[mask], mask=np.ones(3, bool), train=True, mutable=("batch_stats",))
    np.testing.assert_allclose(masked[mask], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": [8, 8], "depth": 3}, "has 2 entries, but depth is 3"),
        ({"activation": "rellu"}, "did you mean 'relu'"),
        ({"norm": "lyer"}, "did you mean 'layer'"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"width": 2.5}, "model.width=2.5 has the wrong type"),
        ({"widht": 8}, "did you mean 'width'"),
    ],
)
def test_a_mistake_is_named(configured, changes, message):
    with pytest.raises(ConfigError, match=message):
        configured("mlp", **changes)
