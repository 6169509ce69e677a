import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals  # what jax.ad_checkpoint.print_saved_residuals prints

from research.core.errors import ConfigError
from research.core.tree import count, paths, stack, unstack
from research.models.gpt import GPT

SMALL = {"width": 16, "depth": 2, "heads": 4}
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "kv_heads": 2, "tied": False, "bias": False}
init = functools.partial(jax.jit, static_argnums=0)(lambda module, tokens: module.init(jax.random.key(0), tokens))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        LLAMA,
        {"positions": "sinusoidal", "activation": "gelu"},
        {"heads": [1, 3], "kv_heads": [1, 1], "head_width": 6, "hidden": [5, 7]},
        {"hidden": 0},
        {"hidden": 0, "scan": True},
        {"hidden": [0, 7]},
        {"dropout": None},
        {"scan": True},
        {"scan": True, "remat": "full"},
        {"remat": "full"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "scan": True, **LLAMA},
    ],
)
def test_shapes_of_every_option(configured, tokens, changes):
    module = configured("gpt", **(SMALL | changes))
    (logits, taps), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), tokens)
    assert (logits.shape, logits.dtype) == ((3, 10, 65), jnp.float32)
    assert {"input", "logits"} <= set(taps)
    assert taps["input"].shape == (3, 10, 16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_parameter_count_is_that_of_the_docstring():
    assert count(jax.eval_shape(GPT(65, 64).init, jax.random.key(0), jnp.zeros((1, 64), jnp.int32))) == 809_856


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2_124m", 124_439_808), ("gpt2_350m", 354_823_168), ("gpt_1b3", 1_315_723_264), ("gpt3_175b", 174_604_259_328)],
)
def test_parameter_counts_of_published_sizes(configured, name, parameters):
    module = configured(name, vocabulary=50257, time=1024 if name.startswith("gpt2") else 2048)
    assert count(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))) == parameters


def test_canonical_paths(configured, tokens):
    found = {path: leaf.shape for path, leaf in paths(jax.eval_shape(configured("gpt", **SMALL).init, jax.random.key(0), tokens)["params"]).items()}
    assert found["block_0/attention/query/kernel"] == (16, 4, 4)
    assert found["block_1/attention/out/kernel"] == (4, 4, 16)
    assert found["block_0/mlp/up/kernel"] == (16, 64)
    assert found["token/embedding"] == (65, 16)
    assert not any(path.startswith("head") for path in found)


def test_without_hidden_units_there_are_no_mlps(configured, tokens):
    module = configured("gpt", **SMALL, hidden=0)
    found = paths(jax.eval_shape(module.init, jax.random.key(0), tokens)["params"])
    assert not [path for path in found if "mlp" in path]
    assert module.sizes == {"heads": (4, 4), "head_width": 4}
    assert configured("gpt", **SMALL, hidden=[0, 7]).sizes["hidden"] == (0, 7)


def test_initial_values_are_gpt_2s_and_do_not_depend_on_scan(tokens):
    variables = init(GPT(65, 16, width=128, depth=2), tokens)
    for path, leaf in paths(variables["params"]).items():
        if path.endswith("bias"):
            assert not np.any(leaf)
        elif path.endswith("scale"):
            assert np.all(np.asarray(leaf) == 1)
        else:
            scale = 0.01 if "/out/" in path or "/down/" in path else 0.02  # 0.02 / sqrt(2 x 2 blocks)
            assert abs(np.std(leaf) / scale - 1) < 0.06, path
    scanned = init(GPT(65, 16, width=128, depth=2, scan=True), tokens)
    jax.tree.map(np.testing.assert_array_equal, unstack(jax.tree.map(np.asarray, scanned)), variables)


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt", "llama"])
def test_scanned_equals_unscanned(configured, filled, tokens, run, changes):
    plain, scanned = configured("gpt", **SMALL, **changes), configured("gpt", **SMALL, **changes, scan=True)
    variables = filled(plain, tokens)
    want, _ = run(plain, variables, tokens)
    got, taps = run(scanned, jax.jit(stack)(variables), tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert taps["blocks/output"].shape == (2, 3, 10, 16)


def gradient(module, params, tokens):
    hyper, index = {"dropout": jnp.float32(0.5)}, jnp.arange(len(tokens), dtype=jnp.int32)
    how = {"index": index, "hyper": hyper, "train": True, "rngs": {"dropout": jax.random.key(7)}}
    return jax.jit(jax.grad(lambda params: jnp.square(module.apply({"params": params}, jnp.asarray(tokens), **how)[0]).mean()))(params)


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow), ["middle", "mlp/hidden"]], ids=str)
def test_remat_changes_no_gradient(configured, filled, tokens, remat):
    params = filled(configured("gpt", **SMALL), tokens)["params"]
    want = gradient(configured("gpt", **SMALL, dropout=None), params, tokens)
    got = gradient(configured("gpt", **SMALL, dropout=None, remat=remat), params, tokens)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), got, want)


@pytest.mark.slow
def test_scan_and_remat_change_no_gradient(configured, filled, tokens):
    params = jax.jit(stack)(filled(configured("gpt", **SMALL), tokens)["params"])
    want = gradient(configured("gpt", **SMALL, dropout=None, scan=True), params, tokens)
    got = gradient(configured("gpt", **SMALL, dropout=None, scan=True, remat=["mlp/hidden"]), params, tokens)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), got, want)


@pytest.mark.parametrize("scan", [False, True])
def test_remat_keeps_what_it_says(configured, filled, tokens, scan):
    def kept(remat):
        """Shapes of what the backward pass is given from inside blocks, one block's worth, without parameters and inputs."""
        module = configured("gpt", **SMALL, hidden=24, scan=scan, remat=remat)
        params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
        found = saved_residuals(lambda params: module.apply({"params": params}, jnp.asarray(tokens))[0].sum(), params)
        return [aval.shape for aval, source in found if "argument" not in source and aval.shape[-1:] == (24,)]  # of the 24 hidden units

    everything, none, one, other = kept("none"), kept("full"), kept(["mlp/hidden"]), kept(["middle"])
    assert len(everything) > len(one)
    assert len(one) == (1 if scan else 2)  # one a block, stacked in a scan
    assert none == other == []
    assert len(kept("dots")) == len(one)  # what goes into the activation, where the name keeps what comes out


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_a_later_token_changes_no_earlier_logits_and_order_matters(configured, filled, tokens, run, positions):
    module = configured("gpt", **SMALL, positions=positions)
    variables = filled(module, tokens)
    logits, _ = run(module, variables, tokens)
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 65
    later, _ = run(module, variables, changed)
    np.testing.assert_array_equal(logits[:, :6], later[:, :6])
    assert (np.abs(logits - later)[:, 6:].max((0, 2)) > 1e-3).all()
    swapped, _ = run(module, variables, tokens[:, [1, 0, *range(2, 10)]])
    assert np.abs(swapped - logits)[:, 2:].max() > 1e-3


def test_padded_equals_unpadded(configured, filled, tokens, run):
    module = configured("gpt", **SMALL)
    variables = filled(module, tokens)
    padded = np.concatenate([tokens, np.zeros((3, 6), np.int32)], 1)
    np.testing.assert_allclose(run(module, variables, padded)[0][:, :10], run(module, variables, tokens)[0], atol=1e-4)


def test_dropout_acts_in_training_alone_and_does_not_depend_on_the_cut(configured, filled, tokens, run):
    module = configured("gpt", **SMALL, dropout=None, scan=True)
    variables, hyper, index = filled(module, tokens), {"dropout": jnp.float32(0.5)}, np.array([5, 9, 2], np.int32)
    whole, _ = run(module, variables, tokens, index=index, hyper=hyper, train=True)
    part, _ = run(module, variables, tokens[1:], index=index[1:], hyper=hyper, train=True)
    still, _ = run(module, variables, tokens, index=index, hyper=hyper)
    np.testing.assert_allclose(part, whole[1:], atol=1e-4)
    assert np.abs(whole - still).max() > 1e-3


def test_bfloat16_is_near_float32(configured, filled, tokens, run):
    variables = filled(configured("gpt", **SMALL), tokens)
    exact, _ = run(configured("gpt", **SMALL), variables, tokens)
    low, _ = run(configured("gpt", **SMALL, dtype="bfloat16"), variables, tokens)
    assert 0 < np.abs(low - exact).mean() < 0.02 * np.abs(exact).mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"width": -8}, "width=-8 must be at least 1"),
        ({"heads": 3}, "heads=3 does not divide width=16"),
        ({"heads": [2, 4]}, "head_width must be given"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"hidden": -1}, "hidden=-1 must be at least 0"),
        ({"hidden": [8]}, "hidden=.* has 1 entries, but depth is 2"),
        ({"heads": [2, 4], "head_width": 4, "scan": True}, "scan=true needs blocks of equal size"),
        ({"positions": "rotry"}, "did you mean 'rotary'"),
        ({"positions": "rotary", "head_width": 3}, "even head_width"),
        ({"positions": "sinusoidal", "width": 15, "head_width": 4}, "even width"),
        ({"norm": "batch"}, "norm='batch' is unknown"),
        ({"attention": "blokwise"}, "did you mean 'blockwise'"),
        ({"remat": "ful"}, "remat='ful' is unknown; did you mean 'full'"),
        ({"remat": ["mlp/hiden"]}, "did you mean 'mlp/hidden'"),
        ({"activation": "swigl"}, "did you mean 'swiglu'"),
    ],
)
def test_a_mistake_is_named(configured, changes, message):
    with pytest.raises(ConfigError, match=message):
        configured("gpt", **(SMALL | changes))


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt", "llama"])
def test_its_head_turns_the_normalized_stream_into_logits(configured, filled, tokens, run, changes):
    module = configured("gpt", **SMALL, **changes)
    variables = filled(module, tokens)
    logits, taps = run(module, variables, tokens)
    np.testing.assert_allclose(
        np.asarray(taps["normalized"]) @ np.asarray(module.head(jax.tree.map(jnp.asarray, variables["params"]))), logits, atol=1e-4
    )


@pytest.mark.parametrize("attention", ["reference", "blockwise"])
def test_the_form_of_attention_changes_no_logits(configured, filled, tokens, run, attention):
    variables = filled(configured("gpt", **SMALL), tokens)
    want, got = (run(configured("gpt", **SMALL, attention=form), variables, tokens)[0] for form in ("auto", attention))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_form_that_is_not_there_is_refused(configured, tokens):
    with pytest.raises(ConfigError, match=r"model.attention=cudnn: it needs an NVIDIA GPU"):
        jax.eval_shape(configured("gpt", **SMALL, attention="cudnn").init, jax.random.key(0), tokens)


def test_more_tokens_than_positions_are_refused(configured):
    with pytest.raises(ConfigError, match="17 tokens are more than the model's context; at most time=16"):
        jax.eval_shape(configured("gpt", **SMALL).init, jax.random.key(0), jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(ConfigError, match="at most time=16"):
        configured("gpt", **SMALL).empty_cache(1, 17)
