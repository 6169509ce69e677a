"""Optimizers: values stay values, one layer at a time, averages, masks, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from omegaconf import OmegaConf

from research.core.errors import ConfigError
from research.core.tree import paths, stack, unstack
from research.training.muon import muon, newton_schulz
from research.training.optimizer import Decay, Optimizer

NAMES = [
    *("gradient_descent", "sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "lamb", "lion", "adafactor", "muon", "chain"),
]
RANDOM = np.random.RandomState(0)


def leaf(*shape):
    return RANDOM.randn(*shape).astype(np.float32)


def block():
    return {
        "attention": {"query": {"kernel": leaf(8, 2, 4), "bias": leaf(2, 4)}, "out": {"kernel": leaf(2, 4, 8)}},
        "mlp": {"kernel": leaf(8, 16)},
    }


PARAMS = {
    "token_embedding": {"embedding": leaf(11, 8)},
    **{f"block_{i}": block() for i in range(2)},
    "encoder": {f"block_{i}": {"norm": {"scale": leaf(8)}} for i in range(3)},  # a second stack, of another depth
    "head": {"kernel": leaf(8, 11)},
}
STACKED = jax.jit(stack)(PARAMS)
GRADIENTS = [jax.tree.map(lambda x: leaf(*x.shape), PARAMS) for _ in range(3)]


@pytest.fixture
def node(request):
    def load(name, **changes):
        file = OmegaConf.load(request.config.rootpath / "conf" / "optimizer" / f"{name}.yaml")
        return {**OmegaConf.to_container(file.get("optimizer", file)), **changes}

    return load


def train(optimizer, params, gradients, rate=0.01, hyper=None):
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params, hyper or {}, jnp.float32(rate))
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(a, b, tolerance=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_equal_and_takes_the_same_steps_scanned_and_unscanned(name, node):
    optimizer, again = (Optimizer.from_config(node(name, learning_rate=None)) for _ in range(2))
    assert optimizer == again
    assert hash(optimizer) == hash(again)
    plain, state = train(optimizer, PARAMS, GRADIENTS)
    scanned, stacked = train(optimizer, STACKED, [jax.jit(stack)(g) for g in GRADIENTS])
    assert jax.tree.structure(scanned) == jax.tree.structure(STACKED)
    assert_close(plain, unstack(scanned))
    assert_close(paths(state), paths(unstack(stacked)), 1e-5)  # the canonical state is one and the same
    assert all(np.abs(x - y).max() > 0 for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(PARAMS), strict=True))
    assert float(state.hyperparams["learning_rate"]) == np.float32(0.01)


def test_rates_and_values_are_arguments_so_nothing_is_compiled_again(node):
    values = ("learning_rate", "weight_decay", "b1")
    optimizer = Optimizer.from_config(node("adamw", learning_rate=None, weight_decay=None, b1=None), values)
    update, state = jax.jit(optimizer.update), optimizer.init(PARAMS)
    results = [
        update(GRADIENTS[0], state, PARAMS, {"weight_decay": jnp.float32(decay), "b1": jnp.float32(b1)}, jnp.float32(rate))
        for rate, decay, b1 in ((0.1, 0.1, 0.9), (0.2, 0.1, 0.9), (0.2, 0.3, 0.5))
    ]
    assert update._cache_size() == 1
    (first, _), (second, _), (third, opt) = results
    assert_close(jax.tree.map(lambda x: 2 * x, first), second)
    assert {name: float(x) for name, x in opt.hyperparams.items()} == {
        "learning_rate": np.float32(0.2),
        "weight_decay": np.float32(0.3),
        "b1": 0.5,
    }
    constant = Optimizer.from_config(node("adamw", learning_rate=None, weight_decay=0.3, b1=0.5))
    expected, _ = jax.jit(constant.update)(GRADIENTS[0], constant.init(PARAMS), PARAMS, {}, jnp.float32(0.2))
    assert_close(third, expected)


def test_trials_under_vmap_are_lone_runs(node):
    optimizer = Optimizer.from_config(node("sgd", learning_rate=None), clip=1.0, ema=0.9)
    first = lambda rate: optimizer.update(GRADIENTS[0], optimizer.init(PARAMS), PARAMS, {}, rate)[0]  # noqa: E731  # one line says it
    rates = jnp.array([0.01, 0.1], jnp.float32)
    both, alone = jax.jit(jax.vmap(first))(rates), jax.jit(first)
    for i, rate in enumerate(rates):
        assert_close(jax.tree.map(lambda x, i=i: x[i], both), alone(rate))


def test_the_average_is_the_weighted_mean_of_the_weights_seen(node):
    optimizer = Optimizer.from_config(node("sgd", learning_rate=None), ema=0.9)
    params, state, update = PARAMS, optimizer.init(PARAMS), jax.jit(optimizer.update)
    seen = []
    for gradient in GRADIENTS * 10:
        updates, state = update(gradient, state, params, {}, jnp.float32(0.1))
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["head"]["kernel"], np.float64))
        total = weights = 0.0
        for weight in seen:
            total, weights = 0.9 * total + 0.1 * weight, 0.9 * weights + 0.1
        np.testing.assert_allclose(optimizer.average(state)["head"]["kernel"], total / weights, atol=1e-5)
    assert Optimizer.from_config(node("sgd")).average(optimizer.init(PARAMS)._replace(average=None)) is None


def test_clipping_is_by_the_norm_of_the_whole_gradient_scanned_or_not(node):
    optimizer = Optimizer.from_config(node("sgd"), clip=0.5, ema=0.9)
    plain, state = train(optimizer, PARAMS, GRADIENTS[:1], rate=1.0)
    assert np.sqrt(sum(np.square(x - y).sum() for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(PARAMS), strict=True))) == pytest.approx(
        0.5, 1e-4
    )
    scanned, stacked = train(optimizer, STACKED, [jax.jit(stack)(GRADIENTS[0])], rate=1.0)
    assert_close(plain, unstack(scanned))
    assert_close(optimizer.average(state), unstack(optimizer.average(stacked)))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb", "lion", "muon"])
def test_weight_decay_shrinks_kernels_and_leaves_biases_and_norms(name, node):
    optimizer = Optimizer.from_config(node(name, weight_decay=0.5))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    after, _ = train(optimizer, PARAMS, [zeros] * 3, rate=0.1)
    for (path, old), new in zip(paths(PARAMS).items(), paths(after).values(), strict=True):
        if path.endswith(("bias", "scale")):
            np.testing.assert_array_equal(new, old, err_msg=path)
        else:
            assert (np.abs(new) < np.abs(old)).all(), path


def test_the_mask_reads_globs_on_canonical_and_stacked_trees():
    decayed = {path for path, yes in paths(Decay()(PARAMS)).items() if yes}
    assert decayed == {path for path in paths(PARAMS) if path.endswith(("kernel", "embedding"))}
    mask = Decay(skip=("**/bias", "**/embedding"), only=("block_*/**", "head/*"))
    decayed = {path for path, yes in paths(mask(PARAMS)).items() if yes}
    assert decayed == {path for path in paths(PARAMS) if path.startswith(("block_", "head")) and not path.endswith("bias")}
    for each in (mask, Decay()):
        plain, stacked = paths(each(PARAMS)), paths(each(STACKED))
        assert all(stacked[path.replace("block_1/", "blocks/")] == yes for path, yes in plain.items() if "block_1/" in path)
        assert stacked["head/kernel"] == plain["head/kernel"]


def test_a_glob_of_ones_own_that_fits_nothing_is_refused_and_a_default_is_not():
    assert Decay()({"head": {"kernel": leaf(2, 2)}}) == {"head": {"kernel": True}}
    with pytest.raises(ConfigError, match=r"optimizer.mask: '\*\*/embeding' fits no parameter; did you mean 'embedding'"):
        Decay(skip=("**/embeding",))(PARAMS)
    with pytest.raises(ConfigError, match="block_1"):
        Decay(only=("block_1/**",))(STACKED)  # one layer of a scanned stack cannot be singled out
    with pytest.raises(ConfigError, match=r"optimizer.adam: '\*\*/haed/kernel'"):
        Optimizer(muon, (("adam", ("**/haed/kernel",)),)).init(PARAMS)


def test_muon_takes_hidden_kernels_as_whole_matrices(node):
    """The first update's momentum is the gradient, times a number that the orthogonalisation forgets."""
    optimizer = Optimizer.from_config(node("muon", rms=None, weight_decay=0.0))
    updates, state = jax.jit(optimizer.update)(GRADIENTS[0], optimizer.init(PARAMS), PARAMS, {}, jnp.float32(1.0))
    for path, matrix in (("attention/query/kernel", (8, 8)), ("attention/out/kernel", (8, 8)), ("mlp/kernel", (8, 16))):
        gradient = np.reshape(paths(GRADIENTS[0])[f"block_0/{path}"], matrix)
        expected = -((matrix[1] / matrix[0]) ** 0.5) * newton_schulz(gradient)
        np.testing.assert_allclose(np.reshape(paths(updates)[f"block_0/{path}"], matrix), expected, atol=1e-5)
    adam = {path.partition("/mu/")[2] for path in paths(state) if "/adam/" in path and "/mu/" in path}
    assert adam == {path for path in paths(PARAMS) if not path.endswith("kernel")} | {"head/kernel"}


def test_a_chain_is_its_transforms_then_the_rate(node):
    optimizer = Optimizer.from_config(node("chain"))
    params, _ = train(optimizer, PARAMS, GRADIENTS, rate=0.1)
    small = [jax.tree.map(lambda x: jnp.clip(x, -1, 1), gradient) for gradient in GRADIENTS]
    assert_close(params, train(Optimizer.from_config(node("adamw")), PARAMS, small, rate=0.1)[0])


def test_a_transform_that_mixes_layers_is_refused_on_a_scanned_model(node):
    optimizer = Optimizer.from_config(node("chain", transforms=[{"_target_": "optax.clip_by_global_norm", "max_norm": 1.0}]))
    train(optimizer, PARAMS, GRADIENTS)
    with pytest.raises(ConfigError, match="mixes the layers of a scanned model"):
        train(optimizer, STACKED, [stack(GRADIENTS[0])])


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("adamw", {"weight_decay": -0.1}, "optimizer.weight_decay=-0.1: must be a number not below 0"),
        ("adafactor", {"weight_decay_rate": -0.1}, "optimizer.weight_decay_rate=-0.1"),
        ("adam", {"b1": 1.0}, r"optimizer.b1=1.0: must be in \[0, 1\)"),
        ("adam", {"b2": -0.1}, "optimizer.b2=-0.1"),
        ("momentum", {"momentum": 1.5}, "optimizer.momentum=1.5"),
        ("rmsprop", {"decay": 1.5}, "optimizer.decay=1.5"),
        ("adam", {"eps": -1e-8}, "optimizer.eps=-1e-08"),
        ("adam", {"weight_decay": 0.1}, "optimizer.weight_decay: adam takes no 'weight_decay'"),
        ("adam", {"bata1": 0.9}, "takes no 'bata1'"),
        ("sgd", {"nesterov": True}, "optimizer.nesterov=True needs optimizer.momentum"),
        ("adam", {"_target_": "optax.adamm"}, "did you mean 'adam'"),
        ("adam", {"_target_": "optax.scale_by_adam"}, "optimizer.learning_rate: scale_by_adam takes no 'learning_rate'"),
        ("chain", {"transforms": [{"_target_": "optax.clipp", "max_delta": 1.0}]}, r"optimizer.transforms\[0\]._target_='optax.clipp'"),
        ("chain", {"transforms": [{"_target_": "optax.clip"}]}, r"optimizer.transforms\[0\]: clip"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_by_name(name, changes, words, node):
    with pytest.raises(ConfigError, match=words):
        Optimizer.from_config(node(name, **changes))


def test_a_target_that_makes_no_optimizer_is_refused():
    with pytest.raises(ConfigError, match="is no optimizer: it returns function"):
        Optimizer.from_config({"_target_": "optax.constant_schedule", "value": 1.0}, values=())


def test_a_value_that_the_optimizer_does_not_take_is_refused(node):
    with pytest.raises(ConfigError, match=r"optimizer.momentum: adamw takes no 'momentum'"):
        Optimizer.from_config(node("adamw"), ("learning_rate", "momentum"))


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "fast", None, True])
def test_starting_values_are_checked_by_name(value, node):
    optimizer = Optimizer.from_config(node("adamw"), ("learning_rate", "weight_decay"))
    optimizer.check({"learning_rate": 0.0, "weight_decay": 1, "dropout": -5})
    with pytest.raises(ConfigError, match=f"optimizer.learning_rate={value!r}: must be"):
        optimizer.check({"learning_rate": value, "weight_decay": 0.1})


@pytest.mark.parametrize(("clip", "ema", "words"), [(0.0, None, "train.clip=0.0"), (-1.0, None, "train.clip=-1.0"), (None, 1.0, "train.ema=1.0")])
def test_clip_and_average_out_of_range_are_refused(clip, ema, words, node):
    with pytest.raises(ConfigError, match=words):
        Optimizer.from_config(node("adamw"), clip=clip, ema=ema)
