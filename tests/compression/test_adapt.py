"""LoRA: the base stands still bit for bit, adapters alone learn, and merging changes nothing but the form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.compression.adapt import Adapt, Merge
from research.compression.factorize import SVD
from research.compression.quantize import Nearest
from research.compression.subject import get
from research.compression.wrapper import Wrapper
from research.core.errors import ConfigError
from research.core.tree import count, paths, sha256
from research.core.types import State
from research.training.optimizer import Optimizer
from research.training.schedule import Constant
from research.training.step import Step

FAMILIES = ("mlp", "cnn", "gpt")


@pytest.fixture(scope="module")
def adapted(subject):
    """adapted(family, **settings): (the base, the same with adapters that do something)."""

    random = np.random.RandomState(3)

    @functools.cache
    def make(family, **settings):
        base = subject(family)
        changed = Adapt(**{"rank": 2, **settings})(base)
        params = jax.tree.map(lambda x: x + 0.1 * random.randn(*x.shape).astype(np.float32), changed.params)
        return base, dataclasses.replace(changed, params=params)

    return make


@pytest.mark.parametrize("family", ["mlp", pytest.param("cnn", marks=pytest.mark.slow), pytest.param("gpt", marks=pytest.mark.slow)])
def test_fresh_adapters_change_nothing(family, subject, outputs):
    base = subject(family)
    np.testing.assert_array_equal(outputs(Adapt(rank=2)(base)), outputs(base))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_is_the_base_plus_the_scaled_product(family, adapted):
    base, changed = adapted(family, alpha=3.0)
    whole = changed.objective.whole(changed.params, changed.frozen)
    layers = {path for path, *_ in changed.objective.layers}
    for path, leaf in paths(whole).items():
        before = np.asarray(get(base.params, path), np.float64)
        if path not in layers:
            np.testing.assert_array_equal(leaf, before)
            continue
        adapter = get(changed.params["adapters"], path.removesuffix("/kernel"))
        product = np.asarray(adapter["down"], np.float64) @ np.asarray(adapter["up"], np.float64)
        np.testing.assert_allclose(leaf, before + 1.5 * product.reshape(before.shape), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(family, adapted, outputs):
    base, changed = adapted(family, train=("**/bias",))
    merged = Merge()(changed)
    assert not isinstance(merged.objective, Wrapper)
    assert merged.frozen is None
    assert merged.config["objective"] == base.config["objective"]
    scale = np.abs(outputs(changed)).max()
    np.testing.assert_allclose(outputs(merged), outputs(changed), rtol=0, atol=1e-6 * scale)
    assert np.abs(outputs(merged) - outputs(base)).max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_stands_still_bit_for_bit_while_adapters_learn(family, adapted):
    base, changed = adapted(family, train=("head/*",) if family != "gpt" else ("norm/*",))
    before = sha256(base.params)
    step = Step(changed.objective, Optimizer(optax.adamw, (("weight_decay", 0.1),)), Constant(), steps=10)
    opt = step.optimizer.init(changed.params)
    counters = {"skipped": {"total": jnp.int32(0), "in_a_row": jnp.int32(0)}}
    state = State(jnp.int32(0), changed.params, {**changed.extra, **counters}, opt, jax.random.key(0), changed.hyper)
    run = jax.jit(step)
    losses = []
    for _ in range(3):
        state, metrics = run(state, changed.frozen, changed.batches[0])
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < losses[0]
    moved = {path: not np.array_equal(leaf, get(changed.params, path)) for path, leaf in paths(state.params).items()}
    assert all(moved.values()), moved
    assert sha256(changed.frozen["own"]) == before
    assert sha256(base.params) == before


def test_dropping_the_adapters_gives_the_base_back(adapted, outputs):
    base, changed = adapted("cnn", train=("head/*",))
    dropped = Merge(drop=True)(changed)
    assert sha256(dropped.params) == sha256(base.params)
    assert dropped.config == base.config
    np.testing.assert_array_equal(outputs(dropped), outputs(base))


def test_what_is_trained_in_full_gets_no_adapter_and_is_used(adapted, outputs):
    _, changed = adapted("mlp", train=("head/*",))
    assert set(changed.params["adapters"]) == {"dense_0", "dense_1"}
    assert set(changed.params["trained"]) == {"head"}
    head = {**changed.params["trained"]["head"], "kernel": jnp.zeros_like(changed.params["trained"]["head"]["kernel"])}
    silent = dataclasses.replace(changed, params={**changed.params, "trained": {"head": head}})
    np.testing.assert_allclose(outputs(silent), np.broadcast_to(head["bias"], outputs(silent).shape), atol=1e-6)


def test_without_adapters_what_is_trained_in_full_is_all_that_learns(subject, outputs):
    base = subject("mlp")
    head = Adapt(only=("head/*",), train=("head/*",))(base)
    assert set(paths(head.params)) == {"trained/head/kernel", "trained/head/bias"}
    np.testing.assert_array_equal(outputs(head), outputs(base))
    assert Adapt(only=(), train=("head/*",))(base).config == head.config
    every = Adapt(only=(), train=("**",))(base)
    assert sha256(every.params["trained"]) == sha256(base.params)
    np.testing.assert_array_equal(outputs(every), outputs(base))


def test_the_config_alone_gives_the_shapes(adapted):
    _, changed = adapted("gpt", train=("norm/*",))
    again = changed.replace(config=changed.config).objective
    assert again == changed.objective
    assert hash(again) == hash(changed.objective)
    key, batch = jax.random.key(0), changed.batches[0]
    shapes = jax.eval_shape(lambda: (again.init(key, batch)[0], again.still(key, batch)))
    expected = (changed.params, changed.frozen)
    assert jax.tree.structure(shapes) == jax.tree.structure(expected)
    assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(expected)]


def test_the_first_adapters_are_a_function_of_the_seed(subject):
    base = subject("mlp")
    first, again, other = (Adapt(rank=2, seed=seed)(base) for seed in (0, 0, 1))
    assert sha256(first.params) == sha256(again.params) != sha256(other.params)
    down = np.asarray(first.params["adapters"]["dense_0"]["down"])
    assert 0.7 / 8 < np.abs(down).max() <= 1 / 8  # 64 inputs
    assert not np.asarray(first.params["adapters"]["dense_0"]["up"]).any()


def test_a_rank_beyond_a_layers_smaller_side_is_that_side(subject):
    changed = Adapt(rank=8)(subject("mlp"))
    assert changed.notes["head/kernel"] == {"rank": 5}
    assert changed.params["adapters"]["head"]["down"].shape == (24, 5)
    assert count(changed.params) < count(changed.frozen)


def test_adapters_decode_as_they_predict(adapted, outputs):
    _, changed = adapted("gpt")
    decoder = changed.objective.decoder()

    @jax.jit
    def decode(params, extra, frozen, hyper, batch):
        cache = decoder.begin(params, extra, frozen, {**batch, "tokens": batch["tokens"][:, :3], "mask": batch["mask"][:, :3]}, 8, hyper)
        cache = decoder.rewind(cache, jnp.full(16, 3, jnp.int32))
        return decoder.advance(params, extra, frozen, cache, batch["tokens"][:, 3:], hyper)[0]

    np.testing.assert_allclose(decode(*changed.model, changed.batches[0]), outputs(changed)[:, 3:], atol=1e-5)


@pytest.mark.parametrize("family", ["mlp", pytest.param("gpt", marks=pytest.mark.slow)])
def test_adapters_over_a_quantized_base_leave_its_codes_alone(family, subject, outputs):
    base = Nearest(format="nf4", skip=("token/*", "position/*") if family == "gpt" else ())(subject(family))
    changed = Adapt(rank=2)(base)
    np.testing.assert_allclose(outputs(changed), outputs(base), rtol=0, atol=1e-6)  # the kernels are decoded in another place of the program
    assert changed.frozen == {"own": base.params, "inner": base.frozen}
    random = np.random.RandomState(0)
    params = jax.tree.map(lambda x: x + 0.1 * random.randn(*x.shape).astype(np.float32), changed.params)
    changed = dataclasses.replace(changed, params=params)
    merged = Merge()(changed)
    assert not isinstance(merged.objective, Wrapper)
    scale = np.abs(outputs(changed)).max()
    np.testing.assert_allclose(outputs(merged), outputs(changed), rtol=0, atol=2e-6 * scale)
    assert np.abs(outputs(merged) - outputs(base)).max() > 1e-2
    dropped = Merge(drop=True)(changed)
    assert dropped.config == base.config
    assert sha256(dropped.params, dropped.frozen) == sha256(base.params, base.frozen)


def test_layers_that_the_base_computes_without_their_kernel_get_no_adapter(subject):
    base = SVD(rank=2, only=("dense_0/*",))(subject("mlp"))
    assert set(Adapt(rank=2)(base).params["adapters"]) == {"dense_1", "head"}
    message = "method: an adapter of dense_0/kernel would do nothing, since Factorized computes that layer without its kernel"
    with pytest.raises(ConfigError, match=message):
        Adapt(rank=2, only=("dense_0/*", "head/*"))(base)
    with pytest.raises(ConfigError, match="since Quantized computes that layer"):
        Adapt(rank=2)(Nearest(activations="dynamic")(subject("mlp")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "method.rank=0: must be at least 1"),
        ({"alpha": 0.0}, "method.alpha=0.0: must be above 0"),
        ({"only": ()}, r"method.only=\[\]: nothing would be trained; name kernels that get an adapter, or parameters in method.train"),
        ({"only": ("dens_0/*",)}, r"method.only: 'dens_0/\*' fits no layer; did you mean 'dense_0/kernel'"),
        ({"train": ("heda/**",)}, r"method.train: 'heda/\*\*' fits no parameter; choose from: dense_0/bias"),
    ],
)
def test_bad_settings_are_refused(settings, message, subject):
    with pytest.raises(ConfigError, match=message):
        Adapt(**settings)(subject("mlp"))


def test_a_run_without_adapters_cannot_be_merged(subject):
    with pytest.raises(ConfigError, match="method=merge: this run has no adapters, its objective is Classify"):
        Merge()(subject("mlp"))
