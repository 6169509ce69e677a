import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.axis import Layout, constrain, device_axis, laid_out, layerless, layout, name_axes, psum, recorded_names


def test_without_an_axis_the_tree_comes_back():
    tree = {"a": jnp.ones(3)}
    assert psum(tree) is tree
    with device_axis(None):
        assert psum(tree) is tree


def test_under_an_axis_parts_are_summed():
    def part(x):
        with device_axis("data"):
            return psum({"x": x, "twice": 2 * x})

    summed = jax.vmap(part, axis_name="data")(jnp.arange(4.0))
    np.testing.assert_array_equal(summed["x"], np.full(4, 6.0))
    np.testing.assert_array_equal(summed["twice"], np.full(4, 12.0))


def test_the_axis_ends_with_its_block_even_after_an_error():
    with pytest.raises(ZeroDivisionError), device_axis("data"):
        raise ZeroDivisionError
    assert float(psum(jnp.float32(3))) == 3
    with device_axis("data"), device_axis(None):
        assert float(psum(jnp.float32(3))) == 3


LAYOUT = Layout((("data", 1), ("fsdp", 1)), (("batch", ("data",)), ("width", ("fsdp",))))


def test_a_layout_ends_with_its_block_and_an_array_outside_one_stays_itself():
    x = jnp.ones((2, 3))
    with laid_out(LAYOUT):
        assert layout() == LAYOUT
        np.testing.assert_array_equal(jax.jit(lambda x: constrain(x, "batch", "width"))(x), x)
        with laid_out(None):
            assert constrain(x, "batch", "width") is x
    assert layout() is None
    assert constrain(x, "batch", "width") is x


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x):
        name_axes(self, "kernel", "width", "hidden")
        return x @ self.param("kernel", nn.initializers.ones, (3, 4))


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Cell(name="block_7")(x) + Cell(name="head")(x)


def test_the_names_of_axes_are_recorded_where_somebody_asks():
    variables = Stack().init(jax.random.key(0), jnp.ones((2, 3)))
    assert set(variables) == {"params"}  # names are no arrays
    with recorded_names() as names:
        jax.eval_shape(Stack().apply, variables, jnp.ones((2, 3)))
    assert names == {"blocks/kernel": ("width", "hidden"), "head/kernel": ("width", "hidden")}
    Stack().apply(variables, jnp.ones((2, 3)))
    assert len(names) == 2


@pytest.mark.parametrize("path", ["block_3/mlp/kernel", "blocks/mlp/kernel", "encoder/block_12/norm/scale", "block_head/kernel"])
def test_every_layer_has_one_path(path):
    assert layerless(path) == {"block_head/kernel": "block_head/kernel"}.get(path, path.replace("block_3", "blocks").replace("block_12", "blocks"))
