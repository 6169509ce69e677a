import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.core.tree import count
from research.models.resnet import ResNet

SMALL = {"blocks": [1, 1], "channels": [4, 6]}


@pytest.mark.parametrize(
    "changes",
    [{}, {"stem": "imagenet"}, {"hidden": [3, 5]}, {"hidden": 2, "blocks": [1, 2]}, {"zero": True, "activation": "gelu"}, {"dtype": "bfloat16"}],
)
def test_shapes_of_every_option(configured, image, changes):
    module = configured("resnet18", **(SMALL | changes))
    (logits, taps), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), image)
    assert (logits.shape, logits.dtype) == ((4, 10), jnp.float32)
    assert {"input", "maps", "block_0/hidden", "block_1/output", "pooled", "logits"} <= set(taps)
    assert taps["block_1/output"].shape[1] == (1 if "stem" in changes else 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("stem", "outputs", "parameters"),
    [("small", 10, 11_173_962), ("imagenet", 1000, 11_689_512)],  # kuangliu's network for CIFAR-10; torchvision's resnet18
)
def test_parameter_count_is_the_published_one(stem, outputs, parameters):
    shapes = jax.eval_shape(ResNet(outputs, stem=stem).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert count(shapes["params"]) == parameters


def test_with_zero_scales_a_block_changes_nothing_at_first(configured, image):
    module = configured("resnet18", blocks=[1], channels=[4], zero=True)
    _, taps = jax.jit(lambda x: module.init_with_output(jax.random.key(0), x)[0])(image)
    np.testing.assert_array_equal(taps["block_0/output"], taps["maps"])
    assert np.abs(taps["block_0/hidden"]).max() > 0.1


def test_batch_statistics_leave_padding_out(configured, filled, image, run):
    module = configured("resnet18", **SMALL)
    variables = filled(module, image)
    padded = np.concatenate([image, np.ones((2, 8, 8, 1), np.float32)])
    mask = np.arange(6) < 4
    want, _ = run(module, variables, image, mask=mask[:4], train=True, mutable=("batch_stats",))
    got, _ = run(module, variables, padded, mask=mask, train=True, mutable=("batch_stats",))
    np.testing.assert_allclose(got[:4], want, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [1, 1, 1]}, "blocks=.* has 3 entries, but depth is 2"),
        ({"channels": [4, 0]}, "channels=.* must be at least 1"),
        ({"hidden": [4]}, "hidden=.* has 1 entries, but depth is 2"),
        ({"stem": "imagnet"}, "did you mean 'imagenet'"),
        ({"activation": "rellu"}, "did you mean 'relu'"),
    ],
)
def test_a_mistake_is_named(configured, changes, message):
    with pytest.raises(ConfigError, match=message):
        configured("resnet18", **(SMALL | changes))
