import jax
import jax.numpy as jnp
import numpy as np

from research.core.keys import named, per_example


def data(key):
    return np.asarray(jax.random.key_data(key))


def test_named_keys_are_fixed_by_the_name_alone():
    key = jax.random.key(0)
    np.testing.assert_array_equal(data(named(key, "dropout")), data(jax.random.fold_in(key, 0x1289EFC9)))
    np.testing.assert_array_equal(data(named(key, "dropout")), data(named(key, "dropout")))
    assert (data(named(key, "dropout")) != data(named(key, "sample"))).any()


def test_an_examples_key_depends_on_its_index_alone():
    key = jax.random.key(0)
    whole = data(per_example(key, jnp.array([5, 2, 9, 5])))
    np.testing.assert_array_equal(whole[[0, 1]], data(per_example(key, jnp.array([5, 2]))))
    np.testing.assert_array_equal(whole[0], whole[3])
    np.testing.assert_array_equal(whole[2], data(jax.random.fold_in(key, 9)))
    assert len(np.unique(whole, axis=0)) == 3
    assert per_example(key, jnp.zeros((0,), jnp.int32)).shape == (0,)
