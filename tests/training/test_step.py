"""The step: exact under accumulation and masks, deaf to numbers, and safe with what is not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.errors import ConfigError
from research.core.tree import sha256
from research.core.types import Tally
from research.data.dataset import Arrays
from research.data.loader import Loader
from research.data.on_device import Rows, place
from research.data.preprocess import Preprocessor
from research.data.text import Windows
from research.models.cnn import CNN
from research.models.gpt import GPT
from research.models.mlp import MLP
from research.objectives.classify import Classify
from research.objectives.language_model import LanguageModel
from research.training import parallel
from research.training.optimizer import Optimizer
from research.training.schedule import Cosine
from research.training.step import Step, divide, gathered, means


def far(a, b):
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_exact_under_uneven_masks_and_dropout(make_step, batches, train, accumulate):
    whole, whole_metrics = train(make_step(), batches)
    parts, parts_metrics = train(make_step(accumulate=accumulate), batches)
    assert far(whole.params, parts.params) < 1e-6
    assert all(far(a["loss"], b["loss"]) < 1e-4 for a, b in zip(whole_metrics, parts_metrics, strict=True))


def test_masked_examples_do_not_matter(make_step, batches, train):
    other = [{**batch, "features": np.where(batch["mask"][:, None], batch["features"], 1e3).astype(np.float32)} for batch in batches]
    assert far(train(make_step(), batches)[0].params, train(make_step(), other)[0].params) == 0.0


def test_equal_steps_share_one_program_and_other_values_compile_nothing(make_step, batches):
    def run(step, hyper):
        state = parallel.create(step, jax.random.key(0), batches[0], hyper)
        state, _ = parallel.Jit().train(step)(state, None, batches[0])
        return state

    first, second = make_step(dropout=None), make_step(dropout=None)
    assert first is not second
    assert first == second
    assert hash(first) == hash(second)
    run(first, {"learning_rate": 1e-2, "dropout": 0.1})
    before = parallel._jit_train._cache_size()
    changed = run(second, {"learning_rate": 1e-1, "dropout": 0.5})
    assert parallel._jit_train._cache_size() == before
    assert far(changed.params, run(first, {"learning_rate": 1e-2, "dropout": 0.1}).params) > 1e-3
    assert parallel._jit_train._cache_size() == before
    run(make_step(dropout=0.25), {"learning_rate": 1e-2})
    assert parallel._jit_train._cache_size() == before + 1


@pytest.fixture
def table():
    """42 examples, so that the last batch of 16 of an epoch is short."""
    random = np.random.default_rng(1)
    fields = {"features": random.normal(size=(42, 5)).astype(np.float32), "label": random.integers(0, 3, 42).astype(np.int32)}
    return Arrays(fields, Preprocessor({}))


@pytest.fixture
def windows():
    """Overlapping windows of a text: more of them than an epoch draws."""
    return Windows(np.random.default_rng(1).integers(0, 11, 150).astype(np.int32), 8, overlap=True)


@pytest.fixture
def gpt_step():
    """A small GPT with dropout."""
    model = GPT(vocabulary=11, time=8, width=16, depth=1, heads=2, dropout=0.2)
    return Step(LanguageModel(model), Optimizer(optax.adamw, (("weight_decay", 0.01),), clip=1.0), Cosine(warmup=2), steps=40)


@pytest.mark.parametrize("kind", ["table", pytest.param("windows", marks=pytest.mark.slow), pytest.param("accumulated", marks=pytest.mark.slow)])
def test_chunks_see_the_bits_of_single_steps_and_give_their_losses(make_step, gpt_step, request, kind):
    step = gpt_step if kind == "windows" else dataclasses.replace(make_step(norm="batch"), accumulate=1 + (kind == "accumulated"))
    source = request.getfixturevalue("windows" if kind == "windows" else "table")
    host, device = Loader(source, 16, seed=3), Loader(place(source, 8), 16, seed=3)
    chunks = list(device.chunks(0, 40, 8))
    assert len(chunks) == 5
    gather = jax.jit(jax.vmap(gathered, in_axes=(None, 0)))
    for i, (held, picks) in enumerate(chunks):
        batches = jax.device_get(gather(held, picks))
        for j in range(8):
            wanted = host[8 * i + j]
            assert batches.keys() == wanted.keys()
            for name, values in wanted.items():
                assert (batches[name][j].dtype, batches[name][j].tobytes()) == (values.dtype, values.tobytes())
    assert not all(host[i]["mask"].all() for i in range(40))

    jit, losses = parallel.Jit(), {}
    for chunk in (1, 8):
        state, history = parallel.create(step, jax.random.key(0), host[0], {"learning_rate": 1e-2}), []
        for fed in chunks if chunk > 1 else [(host[i],) for i in range(40)]:
            state, metrics = (jit.train_chunk if chunk > 1 else jit.train)(step)(state, None, *fed)
            history.append(jax.device_get(metrics))
        stacked = [{name: (a[i], b[i]) for name, (a, b) in part.items()} for part in history for i in range(chunk)] if chunk > 1 else history
        losses[chunk] = np.array([means(metrics)["loss"] for metrics in stacked])
        assert int(state.step) == len(stacked) == 40
    assert np.abs(losses[1] - losses[8]).max() < 1e-5
    assert np.ptp(losses[1]) > 0.1


def test_a_donated_state_is_used_again(make_step, batches):
    """Nothing of the state is held twice: all its bytes are the outputs' own, for single steps and for chunks."""
    step, jit = make_step(norm="batch"), parallel.Jit()
    held = Rows({name: batches[0][name] for name in ("features", "label", "mask")})
    picks = {"index": np.zeros((2, 16), np.int32), "keep": np.ones((2, 16), bool)}
    for program, train, fed in ((parallel._jit_train, jit.train, (batches[0],)), (parallel._jit_chunk, jit.train_chunk, (held, picks))):
        state = parallel.create(step, jax.random.key(0), batches[0], {"learning_rate": 1e-2})
        size = sum(jax.random.key_data(x).nbytes if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.nbytes for x in jax.tree.leaves(state))
        assert program.lower(step, state, None, *fed).compile().memory_analysis().alias_size_in_bytes == size
        after, _ = train(step)(state, None, *fed)
        assert all(x.is_deleted() for x in jax.tree.leaves(state))
        assert not any(x.is_deleted() for x in jax.tree.leaves(after))


def test_pmap_knows_no_chunks_and_says_so(make_step):
    with pytest.raises(ConfigError, match=r"train.chunk: parallel=pmap takes single steps; use train.chunk=1, or parallel=jit"):
        parallel.Pmap(devices=1).train_chunk(make_step())


@pytest.mark.parametrize("kind", ["mlp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("cnn", "gpt"))])
def test_bfloat16_follows_float32_and_keeps_32_bits_in_all_that_stays(kind):
    random = np.random.default_rng(2)
    shape = {"mlp": (12,), "cnn": (8, 8, 1), "gpt": (8,)}[kind]
    model = {
        "mlp": MLP(outputs=3, width=16, depth=2, norm="layer"),
        "cnn": CNN(outputs=3, channels=(4, 8), pool=2, hidden=(8,), norm="batch", padding="SAME"),
        "gpt": GPT(vocabulary=11, time=8, width=16, depth=1, heads=2),
    }[kind]
    batches = []
    for i in range(4):
        batch = {"mask": np.ones(16, bool), "index": np.arange(16, dtype=np.int32) + 16 * i}
        if kind == "gpt":
            tokens = (random.integers(0, 11, (16, 1)) + np.arange(9)) % 11
            batch |= {"tokens": tokens[:, :-1].astype(np.int32), "target": tokens[:, 1:].astype(np.int32), "mask": np.ones((16, 8), bool)}
        else:
            label = random.integers(0, 3, 16).astype(np.int32)
            inputs = random.normal(size=(16, *shape)) + label.reshape(-1, *[1] * len(shape))
            batch |= {"features" if kind == "mlp" else "image": inputs.astype(np.float32), "label": label}
        batches.append(batch)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        objective = (LanguageModel if kind == "gpt" else Classify)(dataclasses.replace(model, dtype=dtype))
        step = Step(objective, Optimizer(optax.adam), Cosine(), steps=40)
        train, state = jax.jit(step), step.create(jax.random.key(0), batches[0], {"learning_rate": 1e-2})
        losses[dtype] = []
        for i in range(24):
            state, metrics = train(state, None, batches[i % 4])
            losses[dtype].append(means(jax.device_get(metrics))["loss"])
        for leaf in jax.tree.leaves((state.params, state.extra, state.opt, metrics)):
            assert not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.float32
    full, half = np.array(losses["float32"]), np.array(losses["bfloat16"])
    assert full[-1] < 0.7 * full[0]
    assert 0 < np.abs(full - half).max() < 0.05


def test_a_non_finite_update_is_skipped_and_counted(make_step, batches, train):
    poisoned = {**batches[1], "features": batches[1]["features"].copy()}
    poisoned["features"][np.flatnonzero(poisoned["mask"])[0], 0] = np.nan
    step = make_step(norm="batch")
    before, _ = train(step, batches[:1])
    after, history = train(step, [poisoned], state=before)
    same = lambda part: sha256(getattr(before, part)) == sha256(getattr(after, part))  # noqa: E731  # one line says it
    assert same("params")
    assert same("opt")
    assert sha256(before.extra["batch_stats"]) == sha256(after.extra["batch_stats"])
    assert int(after.step) == 2
    assert {name: int(x) for name, x in after.extra["skipped"].items()} == {"total": 1, "in_a_row": 1}
    assert float(history[0]["skipped"][0]) == 1.0
    again, _ = train(step, batches[2:3], state=after)
    assert {name: int(x) for name, x in again.extra["skipped"].items()} == {"total": 1, "in_a_row": 0}
    assert not same("params") or sha256(again.params) != sha256(after.params)


def test_the_learning_rate_is_peak_times_schedule(make_step, batches, train):
    state, history = train(make_step(), batches, {"learning_rate": 0.4})
    rates = [float(metrics["learning_rate"][0]) for metrics in history]
    expected = [0.4 / 3, 0.8 / 3, *(0.4 * 0.5 * (1 + np.cos(np.pi * (i - 2) / 18)) for i in range(2, 8))]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert float(state.opt.hyperparams["learning_rate"]) == pytest.approx(expected[-1], rel=1e-6)  # a checkpoint tells its step's rate


def test_no_leaf_of_a_new_state_is_shared(make_step, batches):
    state = make_step().create(jax.random.key(0), batches[0], {"learning_rate": 0.1})
    arrays = [leaf for leaf in jax.tree.leaves(state) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in arrays]
    assert len(set(pointers)) == len(pointers)


def test_a_term_without_weight_counts_nothing():
    tally = Tally({"a": jnp.float32(6), "b": jnp.float32(5)}, {})
    weights = {"a": jnp.float32(3), "b": jnp.float32(0)}
    loss = lambda hyper: float(divide(tally, weights, (("a", 0.5), ("b", 2.0)), hyper))  # noqa: E731  # one line says it
    assert loss({}) == 1.0
    assert loss({"a": jnp.float32(2)}) == 4.0


def test_means_are_null_at_weight_zero():
    assert means({"x": (np.float32(3), np.float32(2)), "y": (np.float32(0), np.float32(0))}) == {"x": 1.5, "y": None}


def test_accumulation_is_refused_where_a_term_couples_the_batch(make_step):
    step = make_step()

    class Coupled(type(step.objective)):
        batch_coupled = True

    coupled = Coupled(step.objective.module)
    dataclasses.replace(step, objective=coupled)
    with pytest.raises(ConfigError, match=r"train.accumulate=2: a term of Coupled"):
        dataclasses.replace(step, objective=coupled, accumulate=2)
