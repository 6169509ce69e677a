import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.axis import device_axis, psum


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
