import hashlib
import struct

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import tree
from research.core.types import State


def layer(i, width=3):
    return {"kernel": jnp.full((width, 2), i, jnp.float32), "bias": jnp.full((2,), -i, jnp.bfloat16)}


def unstacked(depth=12):
    return {"embedding": jnp.ones((4,)), **{f"block_{i}": layer(i) for i in range(depth)}, "head": {"kernel": jnp.zeros((2, 2))}}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32)), a, b)


def test_paths_name_leaves_and_leave_out_none():
    assert list(tree.paths({"a": {"b": 1, "c": None}, "d": (2, 3)})) == ["a/b", "d/0", "d/1"]
    assert tree.map_paths(lambda path, leaf: f"{path}={leaf}", {"a": {"b": 1}}) == {"a": {"b": "a/b=1"}}


@pytest.mark.parametrize(
    ("path", "glob", "fits"),
    [
        ("block_0/mlp/kernel", "**/kernel", True),
        ("kernel", "**/kernel", True),
        ("block_0/mlp/kernel", "*/kernel", False),
        ("block_0/mlp/kernel", "block_*/*/kernel", True),
        ("block_0/mlp/kernel", "**", True),
        ("block_0/mlp/kernel", "block_?/**", True),
        ("block_10/mlp/kernel", "block_?/**", False),
        ("block_0/mlp/kernel", "kernel", False),
        ("a.b/kernel", "a?b/kernel", True),
        ("axb/kernel", "a.b/kernel", False),
        ("blocks/mlp/kernel", "block_*/mlp/kernel", True),  # a stacked leaf stands for every layer
        ("blocks/mlp/kernel", "block_3/mlp/kernel", False),
        ("encoder/blocks/kernel", "encoder/block_*/*", True),
    ],
)
def test_globs(path, glob, fits):
    assert tree.matches(path, [glob]) is fits
    assert not tree.matches(path, [])


def test_stack_and_unstack_are_inverse_beyond_nine_layers():
    canonical = unstacked()
    stacked = tree.stack(canonical)
    assert stacked["blocks"]["kernel"].shape == (12, 3, 2)
    assert float(stacked["blocks"]["kernel"][10, 0, 0]) == 10  # block_10 comes after block_9, not after block_1
    same(tree.unstack(stacked), canonical)
    assert any("blocks/" in path for path in tree.paths(stacked))
    assert not any("blocks/" in path for path in tree.paths(canonical))
    same(tree.unstack(canonical), canonical)


def test_restack_gives_each_part_the_layout_of_the_tree_that_it_is_for():
    canonical = {"encoder": unstacked(2), "decoder": unstacked(3), "count": jnp.int32(1)}
    like = {**canonical, "decoder": tree.stack(canonical["decoder"])}
    same(tree.restack(tree.paths(canonical), jax.eval_shape(lambda: like)), like)
    same(tree.restack(tree.paths(canonical), canonical), canonical)


def test_optimizer_states_and_abstract_trees_stack_too():
    optimizer = optax.chain(optax.clip(1.0), optax.masked(optax.adamw(0.1), tree.map_paths(lambda path, _: "bias" not in path, unstacked(2))))
    state = optimizer.init(unstacked(2))
    stacked = tree.stack(state)
    assert any("blocks/" in path for path in tree.paths(stacked))
    same(tree.unstack(stacked), state)
    abstract = jax.eval_shape(lambda: unstacked(2))
    assert tree.unstack(tree.stack(abstract)) == abstract


def state(params):
    return State(jnp.int32(3), params, {}, optax.adam(0.1).init(params), jax.random.key(1), {"learning_rate": jnp.float32(0.1)})


def test_the_hash_is_of_the_content_alone():
    params = unstacked(2)
    reference = tree.sha256(state(params))
    assert len(reference) == 64
    assert tree.sha256(state(dict(reversed(params.items())))) == reference
    assert tree.sha256(tree.stack(state(params))) == reference
    assert tree.sha256(jax.device_get(state(params)).replace(key=jax.random.key(1))) == reference


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.replace(step=s.step + 1),
        lambda s: s.replace(key=jax.random.key(2)),
        lambda s: s.replace(hyper={"learning_rate": jnp.float32(0.2)}),
        lambda s: s.replace(hyper={"rate": jnp.float32(0.1)}),
        lambda s: s.replace(params={**s.params, "embedding": jnp.ones((4, 1))}),
        lambda s: s.replace(params={**s.params, "embedding": jnp.ones((4,), jnp.float16)}),
        lambda s: s.replace(extra={"count": jnp.int32(0)}),
    ],
)
def test_the_hash_sees_every_change(change):
    assert tree.sha256(change(state(unstacked(2)))) != tree.sha256(state(unstacked(2)))


def test_the_hash_is_as_documented():
    leaves = {"b": {"c": jnp.array([1.5, -2], jnp.bfloat16)}, "a": jnp.arange(3, dtype=jnp.int32), "d": jnp.array(True)}
    content = b"a\0int32\0(3,)\0" + struct.pack("<3i", 0, 1, 2) + b"b/c\0bfloat16\0(2,)\0" + struct.pack("<2H", 0x3FC0, 0xC000) + b"d\0bool\0()\0\x01"
    assert tree.sha256(leaves) == hashlib.sha256(content).hexdigest()


def test_count():
    assert tree.count({"a": jnp.ones((2, 3)), "b": jax.ShapeDtypeStruct((), jnp.float32)}) == 7


@flax.struct.dataclass
class Node:
    inner: dict
    fixed: int = flax.struct.field(pytree_node=False, default=0)


def test_any_pytree_node_is_walked_and_keeps_its_static_parts():
    node = Node({"block_0": layer(0), "block_1": layer(1)}, fixed=5)
    stacked = tree.stack([node])
    assert (set(stacked[0].inner), stacked[0].fixed) == ({"blocks"}, 5)
    same(tree.unstack(stacked), [node])


def test_the_hash_knows_what_is_frozen():
    params, frozen = {"kernel": np.ones(3, np.float32)}, {"base": np.arange(4, dtype=jnp.int4)}
    assert tree.sha256(params) == tree.sha256(params, None)
    assert len({tree.sha256(params), tree.sha256(params, frozen), tree.sha256(params, {"base": -frozen["base"]})}) == 3
    assert tree.sha256(params, frozen) == tree.sha256({**params, "frozen": frozen})
