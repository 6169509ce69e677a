import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.core.tree import count
from research.models.lstm import LSTM
from research.objectives.language_model import LanguageModel

SMALL = {"width": 6}
LENGTHS = np.array([1, 4, 0], np.int32)


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"width": [4, 8], "embedding": 5}, {"depth": 1, "dropout": None}, {"dtype": "bfloat16"}])
def test_shapes_of_every_option(configured, changes, tokens):
    module = configured("lstm", **(SMALL | changes))
    (logits, taps), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), tokens)
    assert (logits.shape, logits.dtype) == ((3, 10, 65), jnp.float32)
    assert {"input", "hidden_0", "logits"} <= set(taps)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert ("head" in variables["params"]) == (not changes.get("tied"))


def test_parameter_count_is_that_of_the_docstring(tokens):
    assert count(jax.eval_shape(LSTM(65).init, jax.random.key(0), tokens)["params"]) == 1_083_969


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": [4, 8, 16]}, "width=.* has 3 entries, but depth is 2"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"tied": True, "embedding": 5}, "embedding=5 must be the last layer's width, 6"),
    ],
)
def test_a_mistake_is_named(configured, changes, message):
    with pytest.raises(ConfigError, match=message):
        configured("lstm", **(SMALL | changes))


def test_a_later_token_changes_no_earlier_logits(configured, filled, tokens, run):
    module = configured("lstm", **SMALL)
    variables, other = filled(module, tokens), tokens.copy()
    other[:, 6:] = 1
    want, got = (run(module, variables, x)[0] for x in (tokens, other))
    np.testing.assert_array_equal(want[:, :6], got[:, :6])
    assert np.abs(want - got)[:, 6:].max() > 1e-3


def test_dropout_depends_on_the_example_alone(configured, filled, tokens, run):
    module = configured("lstm", **SMALL, dropout=None)
    variables, hyper, index = filled(module, tokens), {"dropout": jnp.float32(0.5)}, np.array([5, 9, 2], np.int32)
    whole, _ = run(module, variables, tokens, index=index, hyper=hyper, train=True)
    part, _ = run(module, variables, tokens[1:], index=index[1:], hyper=hyper, train=True)
    still, _ = run(module, variables, tokens, index=index, hyper=hyper)
    np.testing.assert_allclose(part, whole[1:], atol=1e-4)
    assert np.abs(whole - still).max() > 1e-3


@pytest.mark.parametrize("step", [1, 3])
def test_a_cache_gives_the_logits_of_the_whole(configured, filled, tokens, run, step):
    """From prompts of several lengths, token by token or a few at a time, and once more after a rewind."""
    module = configured("lstm", **SMALL)
    variables = filled(module, tokens)
    want, decoder = run(module, variables, tokens)[0], LanguageModel(module).decoder()
    params, advance = variables["params"], jax.jit(lambda cache, x: decoder.advance(variables["params"], {}, None, cache, x, {}))
    mask = np.arange(4)[None] < LENGTHS[:, None]
    cache = jax.jit(lambda prompt: decoder.begin(params, {}, None, prompt, 10, {}))({"tokens": tokens[:, :4], "mask": mask})
    np.testing.assert_array_equal(cache["length"], LENGTHS)
    for _ in range(2):  # the second time from a cache that has held more
        cache = decoder.rewind(cache, jnp.asarray(LENGTHS))
        for at in range(0, 6, step):
            place = (LENGTHS + at)[:, None] + np.arange(step)
            logits, cache = advance(cache, np.take_along_axis(tokens, place, 1))
            np.testing.assert_allclose(logits, want[np.arange(3)[:, None], place], atol=1e-5)
