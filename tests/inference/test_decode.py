"""Generation with a small GPT: against the plain forward pass, without compilations, past the context, row by row."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.core.keys import named, per_example
from research.inference import decode
from research.inference.decode import generate, start_token
from research.inference.sample import Sampling, sample
from research.models.gpt import GPT
from research.models.mlp import MLP
from research.objectives.classify import Classify
from research.objectives.language_model import LanguageModel

TIME, VOCABULARY = 16, 13
SPEC = {"time": TIME, "vocabulary": VOCABULARY}
PROMPT = [3, 1, 4, 1, 5]


def _objective(**changes):
    return LanguageModel(GPT(VOCABULARY, TIME, **({"width": 16, "depth": 1, "heads": 2, "tied": False} | changes)))


@functools.cache
def _params(objective):
    """Large weights, so that the next token depends on the context; from numpy, since compiling `init` would take longer than the tests."""
    shapes, _ = jax.eval_shape(objective.init, jax.random.key(0), {"tokens": jnp.zeros((1, TIME), jnp.int32)})
    rng = np.random.RandomState(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.randn(*x.shape) * 0.4 if len(x.shape) > 1 else np.ones(x.shape), jnp.float32), shapes)


@pytest.fixture
def model():
    return _objective(), _params(_objective())


@jax.jit
def _draw_array(logits, seed, step, settings):
    keys = per_example(named(jax.random.key(seed), "sample"), jnp.arange(1))
    return sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), *settings)


def _draw(*args):
    return int(_draw_array(*args)[0])


def _generate(model, prompts, tokens, **how):
    objective, params = model
    return np.stack(list(generate(objective, params, {}, None, {}, prompts, SPEC, tokens=tokens, **how)), 1)  # b t


def _plain(model, window):
    """Logits of the token after a window, by one forward pass without a cache; what pads the window comes later and changes nothing."""
    tokens = np.zeros((1, TIME), np.int32)
    tokens[0, : len(window)] = window
    return np.asarray(_forward(*model, tokens))[:, len(window) - 1]


@functools.partial(jax.jit, static_argnums=0)
def _forward(objective, params, tokens):
    return objective.apply(params, {}, None, {"tokens": tokens}, None, {}, train=False)[0]


@pytest.mark.parametrize("prompt", [[7], PROMPT, [2] * TIME])
@pytest.mark.parametrize("changes", [{}, {"positions": "rotary", "kv_heads": 1, "norm": "rms", "activation": "swiglu", "depth": 2, "scan": True}])
def test_text_is_sampled_from_the_plain_forward_pass_past_the_context(prompt, changes):
    model, sampling = (_objective(**changes), _params(_objective(**changes))), Sampling(1.5, 8, 0.9)
    text, window, spread = list(prompt), list(prompt), []
    for step in range(2 * TIME):
        if len(window) > TIME:
            window = text[-TIME // 2 :]  # a full context goes on from its last half
        logits = _plain(model, window)
        spread.append(logits)
        text.append(_draw(logits, 7, step, sampling.values(VOCABULARY)))
        window.append(text[-1])
    assert _generate(model, [prompt], 2 * TIME, sampling=sampling, seed=7)[0].tolist() == text[len(prompt) :]
    assert np.std(spread, axis=0).mean() > 0.3, "logits that hardly depend on the text would prove nothing"


def test_temperature_zero_takes_the_likeliest_token(model):
    logits = _plain(model, PROMPT)
    assert _generate(model, [PROMPT], 1, sampling=Sampling(0.0)) == logits.argmax()


def test_same_seed_same_text_and_other_seed_other_text(model):
    first = _generate(model, [PROMPT] * 3, 12, seed=1)
    np.testing.assert_array_equal(first, _generate(model, [PROMPT] * 3, 12, seed=1))
    assert (first != _generate(model, [PROMPT] * 3, 12, seed=2)).any()
    assert (first[0] != first[1]).any(), "samples of one prompt must differ"


def test_a_row_does_not_depend_on_the_others(model):
    ragged = [PROMPT, [7], [2] * 14]
    together = _generate(model, ragged, 3 * TIME)
    np.testing.assert_array_equal(together[0], _generate(model, [PROMPT, [9] * 5, [1]], 3 * TIME)[0])
    np.testing.assert_array_equal(together[2], _generate(model, [[1], [1], [2] * 14], 3 * TIME)[2])
    np.testing.assert_array_equal(together[0], _generate(model, [PROMPT], 3 * TIME)[0])


def test_a_longer_text_begins_as_the_shorter(model):
    np.testing.assert_array_equal(_generate(model, [PROMPT], 30)[:, :9], _generate(model, [PROMPT], 9))


def test_two_programs_whatever_is_asked(model):
    # _objective() is another object of the same content
    before = decode._prefill._cache_size(), decode._advance._cache_size()
    for prompts, tokens, sampling, seed in (
        ([PROMPT] * 4, 3, Sampling(), 0),
        ([[1]] * 4, 40, Sampling(0.0), 1),
        ([[2] * 15, [1], PROMPT, [3] * 16], 1, Sampling(0.3, 5, 0.5), 2),
    ):
        _generate((_objective(), model[1]), prompts, tokens, sampling=sampling, seed=seed)
    assert (decode._prefill._cache_size() - before[0], decode._advance._cache_size() - before[1]) == (1, 1)


def test_a_second_text_compiles_nothing(model, caplog):
    _generate(model, [PROMPT] * 3, 20)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        _generate(model, [[1], [2] * 9, PROMPT], 37, sampling=Sampling(0.5, 3, 0.8), seed=5)
    assert not [record.message for record in caplog.records if "ompil" in record.message]


def test_tokens_come_one_by_one(model):
    made = generate(*model, {}, None, {}, [PROMPT], SPEC, tokens=10**9)
    assert [next(made).shape for _ in range(3)] == [(1,)] * 3
    assert next(made).dtype == np.int32


def test_an_empty_prompt_is_the_start_token(model):
    assert start_token((b"a", b"\n", b"b")) == 1
    assert start_token((b"a", b"b")) == 0
    np.testing.assert_array_equal(_generate(model, [[]], 5, start=4), _generate(model, [[4]], 5))


def test_a_long_prompt_is_cut_with_a_warning(model, caplog):
    long = [i % VOCABULARY for i in range(50)]
    cut = _generate(model, [long], 4, sampling=Sampling(0.0))
    assert "the prompt has 50 tokens and the context 16: only the last 16 are used" in caplog.text
    np.testing.assert_array_equal(cut, _generate(model, [long[-TIME:]], 4, sampling=Sampling(0.0)))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([PROMPT], {"tokens": 0}, "tokens=0: must be a whole number of at least 1"),
        ([PROMPT], {"tokens": 2.5}, "tokens=2.5: must be a whole number"),
        ([PROMPT], {"tokens": 5, "seed": -1}, "seed=-1: must be a whole number from 0"),
        ([], {"tokens": 5}, "samples=0: must be at least 1"),
        ([[1, VOCABULARY]], {"tokens": 5}, "prompt token 13 at position 1 is outside the vocabulary of 13"),
        ([[-1]], {"tokens": 5}, "prompt token -1 at position 0"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(model, prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(*model, {}, None, {}, prompts, SPEC, **options)


def test_a_classifier_makes_no_text():
    with pytest.raises(ConfigError, match="Classify makes no text"):
        generate(Classify(MLP(3)), {}, {}, None, {}, [[1]], SPEC, tokens=1)
