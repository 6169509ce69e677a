import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.core.tree import map_paths, stack
from research.models.gpt import GPT
from research.objectives.language_model import LanguageModel

MODEL = {"width": 8, "depth": 2, "heads": 2}
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "kv_heads": 1, "tied": False}


def filled(objective, batch):
    """Parameters that matter more than the small initial ones."""
    random = np.random.RandomState(0)
    shapes, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
    return map_paths(lambda path, leaf: np.float32(path.endswith("scale")) + 0.3 * random.randn(*leaf.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def predict(objective, params, batch):
    return objective.predict(params, {}, None, batch, None, {})[0]["logits"]


@functools.partial(jax.jit, static_argnums=0)
def call(objective, params, batch, hyper):
    return objective(params, {}, None, batch, None, hyper, train=True)[0]


def test_sums_over_the_valid_tokens(configured, text):
    objective = configured("language_model", "gpt", MODEL)
    params = filled(objective, text)
    logits, tally = np.asarray(predict(objective, params, text)), call(objective, params, text, {})
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_probs, text["target"][..., None], -1)[..., 0]
    total, count = nll[text["mask"]].sum(), text["mask"].sum()
    np.testing.assert_allclose(tally.terms["cross_entropy"], total, rtol=1e-5)
    np.testing.assert_allclose(tally.metrics["loss"], (total, count), rtol=1e-5)
    np.testing.assert_allclose(tally.metrics["accuracy"], ((logits.argmax(-1) == text["target"])[text["mask"]].sum(), count))
    np.testing.assert_allclose(tally.metrics["bits_per_byte"], (total / math.log(2), 2 * count), rtol=1e-5)
    assert objective.weights(text) == {"cross_entropy": count}
    assert set(tally.metrics) == {"loss", "accuracy", "bits_per_byte"}


def test_z_loss_is_a_term_of_its_own(configured, text):
    objective = configured("language_model", "gpt", MODEL, z_loss=1e-4)
    plain = configured("language_model", "gpt", MODEL)
    params = filled(objective, text)
    tally = call(objective, params, text, {})
    normaliser = np.log(np.exp(predict(objective, params, text)).sum(-1))
    np.testing.assert_allclose(tally.terms["z_loss"], np.square(normaliser)[text["mask"]].sum(), rtol=1e-4)
    assert objective.coefficients == (("cross_entropy", 1.0), ("z_loss", 1e-4))
    assert objective.weights(text)["z_loss"] == text["mask"].sum()
    np.testing.assert_allclose(tally.metrics["loss"], call(plain, params, text, {}).metrics["loss"], rtol=1e-6)
    assert dict(configured("language_model", "gpt", MODEL, z_loss=None).coefficients)["z_loss"] == 0.0  # the step reads hyper["z_loss"]


def test_without_bytes_there_are_no_bits_per_byte(configured, text):
    objective = configured("language_model", "gpt", MODEL, bytes_per_token=None)
    assert "bits_per_byte" not in jax.eval_shape(call, objective, filled(objective, text), text, {}).metrics


def test_perplexity_is_derived(configured):
    objective = configured("language_model", "gpt", MODEL)
    assert objective.derived({"loss": math.log(3.0)}) == pytest.approx({"perplexity": 3.0})
    assert objective.derived({"loss": None}) == objective.derived({"loss": 1e4}) == {}


def test_a_model_without_a_cache_has_no_decoder(configured):
    assert configured("language_model", "perceptron").decoder() is None


@pytest.mark.parametrize(("chunk", "model"), [(3, {}), (4, {"tied": False, "scan": True, "norm": "rms"})])
def test_in_chunks_the_sums_and_gradients_are_the_same(configured, text, chunk, model):
    def loss(objective):
        def of(params):
            tally = call(objective, params, text, {})
            return tally.terms["cross_entropy"] + tally.terms["z_loss"], tally

        return jax.jit(jax.value_and_grad(of, has_aux=True))

    plain = configured("language_model", "gpt", MODEL | model, z_loss=1e-2)
    chunked = configured("language_model", "gpt", MODEL | model, z_loss=1e-2, chunk=chunk)
    params = filled(plain, text)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), loss(chunked)(params), loss(plain)(params))


def test_in_chunks_no_logits_of_all_positions_are_kept():
    text = {name: jax.ShapeDtypeStruct((4, 64), dtype) for name, dtype in (("tokens", jnp.int32), ("target", jnp.int32), ("mask", bool))}
    logits = 4 * 4 * 64 * 2000  # bytes

    def temporary(chunk):
        objective = LanguageModel(GPT(2000, 64, width=8, depth=1, heads=1), chunk=chunk)
        params, _ = jax.eval_shape(objective.init, jax.random.key(0), text)
        loss = jax.grad(lambda params, batch: call(objective, params, batch, {}).terms["cross_entropy"])
        return jax.jit(loss).lower(params, text).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < logits < temporary(None)


def test_chunks_that_cannot_be_are_refused(configured):
    with pytest.raises(ConfigError, match=r"objective.chunk=0: must be a number of positions from 1 on"):
        configured("language_model", "gpt", MODEL, chunk=0)
    with pytest.raises(ConfigError, match=r"objective.chunk=8: Perceptron has no head"):
        configured("language_model", "perceptron", chunk=8)


LENGTHS = np.array([3, 8, 1, 5], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def begin(objective, params, batch):
    return objective.decoder().begin(params, {}, None, batch, 8, {})


@functools.partial(jax.jit, static_argnums=0)
def advance(objective, params, cache, tokens):
    return objective.decoder().advance(params, {}, None, cache, tokens, {})


@pytest.mark.parametrize(
    "changes",
    [{}, LLAMA, {"positions": "sinusoidal", "scan": True, "remat": "full"}, {**LLAMA, "scan": True}, {"heads": [1, 3], "head_width": 4}],
    ids=["learned", "rotary", "sinusoidal scanned", "rotary scanned", "uneven"],
)
def test_decoding_equals_the_full_forward_pass(configured, text, changes):
    objective = configured("language_model", "gpt", MODEL | changes)
    decoder, tokens = objective.decoder(), text["tokens"]
    params = filled(configured("language_model", "gpt", MODEL | changes | {"scan": False}), text)
    params = jax.jit(stack)(params) if changes.get("scan") else params
    want = np.asarray(predict(objective, params, text))

    prompt = {"tokens": tokens, "mask": np.arange(8) < LENGTHS[:, None], "index": text["index"]}  # padded at the end, a length of its own per row
    cache = begin(objective, params, prompt)
    np.testing.assert_array_equal(cache["length"], LENGTHS)
    assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(cache))

    position = LENGTHS - 1
    for _ in range(2):  # the second time from a cache that has held more
        cache = decoder.rewind(cache, jnp.asarray(position))
        for step in range(3):
            at = np.minimum(position + step, 7)
            logits, cache = advance(objective, params, cache, tokens[np.arange(4), at][:, None])
            inside = position + step < 8
            np.testing.assert_allclose(np.asarray(logits)[inside, 0], want[np.arange(4), at][inside], atol=1e-4, rtol=1e-4)


def test_several_tokens_at_once_equal_one_by_one(configured, text):
    objective = configured("language_model", "gpt", MODEL)
    params = filled(objective, text)
    empty = {"tokens": text["tokens"], "mask": np.zeros((4, 8), bool), "index": text["index"]}
    logits, cache = advance(objective, params, begin(objective, params, empty), text["tokens"])
    np.testing.assert_allclose(logits, predict(objective, params, text), atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(cache["length"], np.full(4, 8))
