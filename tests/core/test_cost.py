"""Operations counted against closed forms."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from research.core.build import build
from research.core.config import compose, resolved, split_values
from research.core.cost import cost, flops, flops_by_layer, flops_per_example
from research.core.spec import abstract_batch, fields
from research.core.tree import count, paths


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_a_matrix_product_is_two_operations_for_each_weight_and_row():
    assert flops(jnp.matmul, shape(5, 7), shape(7, 11)) == 2 * 5 * 7 * 11
    assert flops(lambda x, y: jnp.einsum("bhtk,bhsk->bhts", x, y), shape(2, 3, 4, 5), shape(2, 3, 6, 5)) == 2 * 2 * 3 * 4 * 6 * 5
    assert flops(jnp.matmul, shape(5, 7, dtype=jnp.int8), shape(7, 11, dtype=jnp.int8)) == 2 * 5 * 7 * 11
    assert flops(lambda x: jnp.tanh(x) + 1.0, shape(5, 7)) == 0


def windows(size, kernel, *, stride=1, pad=(0, 0), spread=1, gap=1):
    """How often a window fits, by sliding it."""
    length = (size - 1) * gap + 1 + sum(pad)
    return len(range(0, length - (kernel - 1) * spread, stride))


@pytest.mark.parametrize(
    "how",
    [{}, {"stride": 2}, {"pad": (2, 1)}, {"spread": 2}, {"gap": 2, "pad": (1, 1)}, {"stride": 2, "pad": (1, 0), "spread": 2}],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_counted_window_by_window(how, groups):
    x, kernel = shape(3, 9, 12, 4), shape(3, 2, 4 // groups, 6)

    def convolve(x, kernel):
        settings = {"rhs_dilation": (how.get("spread", 1),) * 2, "lhs_dilation": (how.get("gap", 1),) * 2, "feature_group_count": groups}
        sides = [how.get("pad", (0, 0))] * 2
        return jax.lax.conv_general_dilated(x, kernel, (how.get("stride", 1),) * 2, sides, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)

    places = windows(9, 3, **how) * windows(12, 2, **how)
    assert flops(convolve, x, kernel) == 2 * 3 * places * 6 * (3 * 2 * 4 // groups)


def test_batch_groups_of_a_convolution():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), batch_group_count=2)

    assert flops(convolve, shape(6, 8, 4), shape(3, 4, 10)) == 2 * (3 * 6 * 10) * (3 * 4)


def test_a_scan_counts_as_its_loop_written_out():
    def scanned(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    def written(x, kernels):
        for i in range(6):
            x = jnp.tanh(x @ kernels[i])
        return x

    args = shape(5, 7), shape(6, 7, 7)
    assert cost(scanned, *args) == cost(written, *args) == (6 * 2 * 5 * 7 * 7, True)


def test_recomputing_is_counted_in_the_gradient():
    def loss(kernel, x):
        return jnp.sum(jnp.sin(jnp.sin(x @ kernel) @ kernel))

    args = shape(7, 7), shape(5, 7)
    product = 2 * 5 * 7 * 7
    assert flops(loss, *args) == flops(jax.checkpoint(loss), *args) == flops(jax.jit(loss), *args) == 2 * product
    assert flops(jax.value_and_grad(loss), *args) == 5 * product  # two forward, two for the kernel, one for what lies between
    assert flops(jax.value_and_grad(jax.checkpoint(loss)), *args) == 7 * product


def test_custom_rules_are_looked_into():
    product = jax.custom_jvp(lambda x, y: x @ y)
    product.defjvp(lambda primals, tangents: (product(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))
    assert flops(product, shape(5, 7), shape(7, 11)) == 2 * 5 * 7 * 11

    other = jax.custom_vjp(lambda x, y: x @ y)
    other.defvjp(lambda x, y: (x @ y, (x, y)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    assert flops(other, shape(5, 7), shape(7, 11)) == 2 * 5 * 7 * 11


def test_of_a_condition_the_dearest_branch_counts():
    def function(which, x, y):
        return jax.lax.cond(which, lambda: x @ y, lambda: x @ y @ y)

    assert cost(function, shape(dtype=jnp.bool_), shape(5, 7), shape(7, 7)) == (2 * 2 * 5 * 7 * 7, True)


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    def function(n, x, y):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ y, x)

    assert cost(function, shape(dtype=jnp.int32), shape(5, 7), shape(7, 7)) == (2 * 5 * 7 * 7, False)
    assert cost(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x + 1.0, x), shape(dtype=jnp.int32), shape(5)) == (0, True)


def test_what_nothing_depends_on_is_free():
    assert flops(lambda x, y: (x @ y @ y, x)[1], shape(5, 7), shape(7, 7)) == 0

    def scanned(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x + 1.0, x @ kernel), x, kernels)[0]

    assert flops(scanned, shape(5, 7), shape(6, 7, 7)) == 0


def test_every_device_of_a_mapped_program_counts():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    spec = PartitionSpec("data")
    product = jax.shard_map(lambda x, y: x @ y, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    assert flops(product, shape(8, 7), shape(7, 11)) == 2 * 8 * 7 * 11


IMAGE = {"classes": 5, "outputs": 5, "image": [8, 8, 1], "fields": fields(image=((8, 8, 1), "float32"), label=((), "int32"))}
TEXT = {"vocabulary": 11, "time": 8, "bytes_per_token": 1.0, "fields": fields(mask=(8,), tokens=((8,), "int32"), target=((8,), "int32"))}


def described(spec, *overrides):
    """(objective, abstract model, abstract batch of 4) of a config."""
    config = compose(overrides)
    config.data.spec = spec
    objective = build(split_values(resolved(config))[0]["objective"], where="objective")
    batch = abstract_batch(spec, 4)
    params, extra = jax.eval_shape(objective.init, jax.random.key(0), batch)
    return objective, (params, extra, None, {}), batch


def test_a_transformer_costs_two_operations_a_weight_and_token_and_its_attention():
    width, depth, time = 16, 3, 8
    overrides = ("data=python_docs", "model=gpt", "objective=language_model", f"model.width={width}", f"model.depth={depth}", "model.heads=2")
    objective, model, batch = described(TEXT, *overrides)
    vectors = sum(leaf.size for path, leaf in paths(model[0]).items() if not path.endswith(("kernel", "embedding")))
    matrices = count(model[0]) - vectors - time * width  # positions are looked up; the head is the token embedding
    attention = depth * 2 * (2 * time * time * width)
    assert matrices == depth * 12 * width**2 + 11 * width
    assert flops_per_example(objective, model, batch) == 2 * matrices * time + attention
    scanned = described(TEXT, *overrides, "model.scan=true")
    assert flops_per_example(*scanned) == flops_per_example(objective, model, batch)


def test_a_convolutional_network_by_hand():
    overrides = ("data=digits", "model=cnn", "model.channels=[4,6]", "model.kernel=3", "model.pool=[2,1]", "model.padding=SAME", "model.hidden=[16]")
    products = 64 * 9 * 4 + 16 * 9 * 4 * 6 + 16 * 6 * 16 + 16 * 5
    assert flops_per_example(*described(IMAGE, *overrides)) == 2 * products


def test_a_batch_of_any_size_costs_the_same_per_example():
    objective, model, _ = described(IMAGE, "data=digits", "model=mlp", "model.width=8", "model.depth=1")
    one, many = (flops_per_example(objective, model, abstract_batch(IMAGE, n)) for n in (1, 64))
    assert one == many == 2 * (64 * 8 + 8 * 5)


@pytest.mark.parametrize("more", [(), ("model.scan=true", "model.remat=full"), ("model.attention=reference",)], ids=["plain", "scanned", "reference"])
def test_every_operation_belongs_to_a_layer(more):
    sizes = ("model.width=16", "model.depth=3", "model.heads=2")
    objective, (params, extra, frozen, hyper), batch = described(TEXT, "data=python_docs", "model=gpt", "objective=language_model", *sizes, *more)

    def logits(params, batch):
        return objective.predict(params, extra, frozen, batch, None, hyper)[0]

    found = flops_by_layer(logits, params, batch)
    assert sum(found.values()) == cost(logits, params, batch).flops
    blocks = ["blocks"] if "model.scan=true" in more else [f"block_{i}" for i in range(3)]
    for block in blocks:
        layers = 3 if block == "blocks" else 1
        assert found[f"{block}/mlp/up"] == layers * batch["tokens"].shape[0] * batch["tokens"].shape[1] * 2 * 16 * 64
        assert found[f"{block}/attention"] > 0  # scores and values, of no kernel
