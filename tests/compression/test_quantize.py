"""Quantized models against numpy, in prediction, decoding, training and on disk."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.compression.adapt import Adapt
from research.compression.codes import NORMAL_FLOAT, encode, number_format, scales
from research.compression.factorize import SVD
from research.compression.gptq import GPTQ
from research.compression.quantize import Nearest, QuantizationAware
from research.compression.scale import AWQ, SmoothQuant
from research.compression.subject import get, put
from research.core.errors import ConfigError
from research.core.tree import map_paths, paths, sha256
from research.core.types import State
from research.training.checkpoint import Checkpoints
from research.training.optimizer import Optimizer
from research.training.schedule import Constant
from research.training.step import Step

FAMILIES = ("mlp", "cnn", "resnet", "gpt")
METHODS = {
    "int8": Nearest(),
    "int4_groups": Nearest(format="int4", group=8, partial=True),
    "int2": Nearest(format="int2"),
    "nf4": Nearest(format="nf4"),
    "fp8": Nearest(format="fp8"),
    "gptq": GPTQ(format="int3"),
    "awq": AWQ(),
}


@pytest.fixture(scope="module")
def base(subject):
    """base(family): its model, made once."""
    return functools.cache(subject)


@pytest.fixture(scope="module")
def quantized(base):
    """quantized(family, method): the model after the method, made once."""
    return functools.cache(lambda family, method: method(base(family)))


def decoded(changed):
    """The plain parameters that the codes of a quantized model stand for, by numpy."""
    leaves = {}
    for path, kind, shape, *_ in changed.objective.layers:
        stored = {name: np.asarray(leaf) for name, leaf in get(changed.frozen["own"], path).items()}
        codes = stored["values"].T
        if changed.objective.format == "nf4":
            units = np.array(NORMAL_FLOAT, np.float32)[(codes.astype(np.int32) + 7) % 16]
        else:
            units = codes.astype(np.float32)
        weights = units * np.repeat(stored["scale"], len(units) // len(stored["scale"]), axis=0)
        if "input_scale" in stored:
            weights = weights / stored["input_scale"][:, None]
        leaves[path] = weights.T if kind == "embedding" else weights.reshape(shape)
    return put(changed.params, leaves)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.slow) if family != "mlp" else family for family in FAMILIES])
def test_the_model_computes_what_its_codes_stand_for(family, method, base, quantized, outputs):
    changed = quantized(family, METHODS[method])
    plain = dataclasses.replace(base(family), params=decoded(changed))
    np.testing.assert_allclose(outputs(changed), outputs(plain), atol=2e-6 * np.abs(outputs(plain)).max())
    kinds = {kind for _, kind, *_ in changed.objective.layers}
    assert kinds == {"mlp": {"dense"}, "cnn": {"conv", "dense"}, "resnet": {"conv", "dense"}, "gpt": {"embedding", "dense"}}[family]
    assert not {path for path, *_ in changed.objective.layers} & set(paths(changed.params))


@pytest.mark.parametrize("method", METHODS)
def test_the_config_alone_gives_the_shapes(method, quantized):
    changed = quantized("cnn", METHODS[method])
    again = changed.replace(config=changed.config).objective
    assert again == changed.objective
    assert hash(again) == hash(changed.objective)
    key, batch = jax.random.key(0), changed.batches[0]
    shapes = jax.eval_shape(lambda: (again.init(key, batch)[0], again.still(key, batch)))
    found, expected = ({path: (x.shape, x.dtype) for path, x in paths(tree).items()} for tree in (shapes, (changed.params, changed.frozen)))
    assert found == expected


def test_equal_models_share_one_trace(quantized):
    changed, traces = quantized("mlp", METHODS["int8"]), []

    def run(objective, model, batch):
        traces.append(objective)
        return objective.predict(*model[:3], batch, None, model[3])[0]

    run = jax.jit(run, static_argnums=0)
    for _ in range(2):
        run(changed.replace(config=changed.config).objective, changed.model, changed.batches[0])
    assert len(traces) == 1


def test_split_is_rounding_to_nearest(base, quantized):
    changed = quantized("gpt", METHODS["int8"])
    params, own = jax.jit(changed.objective.split)(base("gpt").params)
    assert sha256(params) == sha256(changed.params)
    assert sha256(own) == sha256(changed.frozen["own"])


def test_the_error_falls_with_bits_in_every_layer(base):
    notes = [Nearest(format=name)(base("cnn")).notes for name in ("int8", "int4", "int3", "int2")]
    for path in notes[0]:
        errors = [note[path]["error"] for note in notes]
        assert errors == sorted(errors)
        assert 0 < errors[0] < 0.01


def test_notes_are_the_relative_error_and_the_bits_of_a_weight(base):
    plain = base("cnn")
    changed = Nearest(format="int4", group=8, only=("dense_0/*", "conv_1/*"))(plain)
    for path, note in changed.notes.items():
        before, after = (np.asarray(get(tree, path)) for tree in (plain.params, decoded(changed)))
        assert note["error"] == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-5)
        assert note["bits"] == 4 + 32 / 8
    assert Nearest(only=("dense_0/*",))(plain).notes["dense_0/kernel"]["bits"] == 8 + 32 / len(get(plain.params, "dense_0/kernel"))


def rows_rounded(rows, static=None):
    """(eight-bit integers, their scale) of rows by numpy."""
    largest = np.abs(rows).max(-1, keepdims=True) if static is None else np.float32(static)
    scale = (largest * np.float32(1 / 127)).astype(np.float32)
    return np.clip(np.round(rows * (1 / scale)), -127, 127).astype(np.int64), scale


def product(rows, stored, static=None):
    """rows x matrix in integers, by numpy."""
    rows = rows / np.asarray(stored["input_scale"]) if "input_scale" in stored else rows
    codes, scale = rows_rounded(rows, static)
    weights, steps = np.asarray(stored["values"]).T.astype(np.int64), np.asarray(stored["scale"])
    parts = zip(np.split(codes, len(steps), axis=-1), np.split(weights, len(steps)), steps, strict=True)
    return sum((part @ weight).astype(np.float32) * step for part, weight, step in parts) * scale


ACTIVATIONS = {
    "dynamic": Nearest(activations="dynamic"),
    "static": Nearest(activations="static"),
    "groups": Nearest(format="int4", activations="dynamic", group=4, partial=True),
    "smooth": SmoothQuant(),
}


@functools.partial(jax.jit, static_argnums=0)
def predict(objective, model, batch, edits=None):
    params, extra, frozen, hyper = model
    return objective.predict(params, extra, frozen, batch, None, hyper, edits=edits)


@pytest.mark.parametrize("method", ACTIVATIONS)
def test_integers_are_multiplied_by_a_dense_layer_and_a_convolution(method, quantized):
    changed = quantized("cnn", ACTIVATIONS[method])
    taps = predict(changed.objective, changed.model, changed.batches[0])[1]
    x = np.pad(changed.batches[0]["image"], ((0, 0), (1, 1), (1, 1), (0, 0)))  # SAME
    patches = np.stack([x[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)], axis=3).reshape(16, 8, 8, -1)
    for name, rows, tap in (("conv_0", patches, "maps_0"), ("head", np.asarray(taps["hidden_0"]), "logits")):
        stored = get(changed.frozen["own"], f"{name}/kernel")
        static = np.asarray(stored["activation_scale"]) * 127 if method == "static" else None
        y = product(rows, stored, static)
        y = y + np.asarray(get(changed.params, f"{name}/bias"))
        np.testing.assert_allclose(np.asarray(taps[tap]), np.maximum(y, 0) if tap == "maps_0" else y, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("method", ACTIVATIONS)
def test_integers_are_multiplied_by_attention_and_a_tied_head(method, quantized):
    changed = quantized("gpt", ACTIVATIONS[method])
    taps = predict(changed.objective, changed.model, changed.batches[0])[1]
    heads = np.asarray(taps["block_0/attention/heads"]).swapaxes(1, 2).reshape(16, 8, -1)
    middle = np.asarray(taps["block_0/middle"]) - np.asarray(taps["input"])
    for path, rows, found in (
        ("block_0/attention/out/kernel", heads, middle),
        ("token/embedding", np.asarray(taps["normalized"]), np.asarray(taps["logits"])),
    ):
        stored = get(changed.frozen["own"], path)
        static = np.asarray(stored["activation_scale"]) * 127 if method == "static" else None
        y = product(rows, stored, static)
        y = y + (np.asarray(get(changed.params, "block_0/attention/out/bias")) if path != "token/embedding" else 0)
        np.testing.assert_allclose(found, y, atol=1e-5 * np.abs(y).max())


def test_the_static_scale_is_the_largest_input_of_the_calibration_data(base, quantized):
    plain, changed = base("mlp"), quantized("mlp", ACTIVATIONS["static"])
    largest = max(np.abs(batch["image"]).max() for batch in plain.batches)
    assert float(get(changed.frozen["own"], "dense_0/kernel")["activation_scale"]) == pytest.approx(largest / 127)


def test_edits_reach_a_model_that_multiplies_integers(quantized):
    changed = quantized("mlp", ACTIVATIONS["dynamic"])
    value = jnp.ones((16, 24))
    outputs, taps = predict(changed.objective, changed.model, changed.batches[0], {"hidden_1": (jnp.ones((16, 24), bool), value)})
    stored = get(changed.frozen["own"], "head/kernel")
    expected = product(np.ones((16, 24), np.float32), stored) + np.asarray(get(changed.params, "head/bias"))
    np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5)
    np.testing.assert_array_equal(taps["hidden_1"], value)


def test_smoothing_helps_where_an_input_is_large(base):
    plain = base("mlp")
    batches = [
        {**batch, "image": batch["image"] * np.where(np.arange(64).reshape(1, 8, 8, 1) == 5, 100, 1).astype(np.float32)} for batch in plain.batches
    ]
    kernel = get(plain.params, "dense_0/kernel").at[5].divide(100.0)
    hard = dataclasses.replace(plain, batches=batches, params=put(plain.params, {"dense_0/kernel": kernel}))

    def error(method):
        changed = method(hard)
        (found, _), (expected, _) = (predict(x.objective, x.model, batches[0]) for x in (changed, hard))
        return np.linalg.norm(found["logits"] - expected["logits"])

    assert error(SmoothQuant(only=("dense_0/*",))) < 0.5 * error(Nearest(activations="dynamic", only=("dense_0/*",)))


def test_scales_are_what_the_papers_say(base, quantized):
    plain = base("mlp")
    image = np.concatenate([batch["image"] for batch in plain.batches]).reshape(32, -1)
    weights = np.abs(np.asarray(get(plain.params, "dense_0/kernel"))).max(1)
    smooth = get(quantized("mlp", ACTIVATIONS["smooth"]).frozen["own"], "dense_0/kernel")["input_scale"]
    np.testing.assert_allclose(smooth, np.sqrt(np.abs(image).max(0) / weights), rtol=1e-5)
    found = np.log(np.asarray(get(quantized("mlp", METHODS["awq"]).frozen["own"], "dense_0/kernel")["input_scale"]))
    size = np.log(np.abs(image).mean(0))
    exponent = (found.max() - found.min()) / (size.max() - size.min())
    assert round(exponent * 20) == pytest.approx(exponent * 20, abs=1e-3)
    np.testing.assert_allclose(found, exponent * (size - (size.max() + size.min()) / 2), atol=1e-5)


# not the small ResNet: in a network of a few channels some layers tie
@pytest.mark.parametrize("family", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cnn", "gpt"))])
def test_methods_that_look_at_data_change_the_outputs_of_layers_less(family, base):
    settings = {"format": "int4", "grid": "symmetric", "sequential": False}
    gptq, awq, once = GPTQ(**settings)(base(family)), AWQ(**settings)(base(family)), AWQ(**settings, points=1)(base(family))
    for path, kind, *_ in gptq.objective.layers:
        if kind != "embedding":
            nearest = once.notes[path]["error"]  # exponent 0: plain rounding
            assert awq.notes[path]["error"] <= nearest * (1 + 1e-6)
            assert gptq.notes[path]["error"] < nearest


def test_each_block_sees_the_quantized_ones_before_it(base, quantized):
    one, all_at_once = quantized("mlp", METHODS["gptq"]), GPTQ(format="int3", sequential=False)(base("mlp"))
    same = {path: sha256(get(one.frozen["own"], path)) == sha256(get(all_at_once.frozen["own"], path)) for path, *_ in one.objective.layers}
    assert same == {"dense_0/kernel": True, "dense_1/kernel": False, "head/kernel": False}


@functools.partial(jax.jit, static_argnums=(0, 3))
def begin(decoder, model, batch, prompt):
    params, extra, frozen, hyper = model
    start = {**batch, "tokens": batch["tokens"][:, :prompt], "mask": batch["mask"][:, :prompt]}
    return decoder.begin(params, extra, frozen, start, batch["tokens"].shape[1], hyper)


@functools.partial(jax.jit, static_argnums=0)
def advance(decoder, model, cache, tokens):
    params, extra, frozen, hyper = model
    return decoder.advance(params, extra, frozen, cache, tokens, hyper)


def decode(changed):
    """(logits of positions 2 to 7, read one at a time after a prompt of three; the cache)."""
    decoder, batch = changed.objective.decoder(), changed.batches[0]
    cache, logits = decoder.rewind(begin(decoder, changed.model, batch, 3), jnp.full(16, 2, jnp.int32)), []
    for i in range(2, 8):
        made, cache = advance(decoder, changed.model, cache, batch["tokens"][:, i : i + 1])
        logits.append(made)
    return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize("method", [METHODS["int4_groups"], ACTIVATIONS["dynamic"], ACTIVATIONS["static"]])
def test_decoding_equals_predicting(method, quantized, outputs):
    changed = quantized("gpt", method)
    logits, _ = decode(changed)
    expected = outputs(changed)[:, 2:]
    away = np.abs(logits - expected) > 1e-4 * np.abs(expected).max()
    assert away.mean() <= (0.02 if changed.objective.activations else 0)  # a sum in another order may fall on the other side of a half


def test_a_single_row_is_multiplied_with_codes(quantized, outputs):
    changed = quantized("gpt", METHODS["int4_groups"])
    one = dataclasses.replace(changed, batches=[{name: field[:1] for name, field in changed.batches[0].items()}])
    decoder, batch = one.objective.decoder(), one.batches[0]
    cache = decoder.rewind(begin(decoder, one.model, batch, 3), jnp.full(1, 2, jnp.int32))
    logits, _ = advance(decoder, one.model, cache, batch["tokens"][:, 2:3])
    np.testing.assert_allclose(logits, outputs(one)[:, 2:3], atol=1e-5 * np.abs(logits).max())
    text = advance.lower(decoder, one.model, cache, batch["tokens"][:, 2:3]).as_text()
    assert text.count("optimization_barrier") == 13  # six layers in each of two blocks, and the head


def test_a_cache_of_eight_bits_is_near_and_a_quarter_as_large(base, quantized, outputs):
    small, plain = quantized("gpt", Nearest(cache="int8")), quantized("gpt", METHODS["int8"])
    (logits, cache), (expected, full) = decode(small), decode(plain)
    assert 0 < np.linalg.norm(logits - expected) < 0.01 * np.linalg.norm(expected)
    keys = {path for path in paths(full) if path.endswith(("key", "value"))}
    for path in keys:
        stored, kept = get(cache, path), np.asarray(get(full, path))
        assert stored["values"].dtype == jnp.int8
        assert stored["values"].nbytes * 4 == kept.nbytes
        assert stored["scale"].shape == (*kept.shape[:3], 1)
        found = np.asarray(stored["values"], np.float32) * np.asarray(stored["scale"])
        if path.startswith("block_0"):  # later blocks have read what is rounded
            assert (np.abs(found - kept) <= np.asarray(stored["scale"]) * 0.5001).all()
    assert len(keys) == 4


def test_a_position_in_the_cache_is_rounded_once(quantized):
    small = quantized("gpt", Nearest(cache="int8"))
    decoder, batch = small.objective.decoder(), small.batches[0]
    cache = begin(decoder, small.model, batch, 4)
    longer = advance(decoder, small.model, cache, batch["tokens"][:, 4:6])[1]
    for path in paths(cache):
        if path != "length":
            before, after = np.asarray(get(cache, path)), np.asarray(get(longer, path))
            np.testing.assert_array_equal(before[:, :, :4], after[:, :, :4])
            assert (before[:, :, 4:6] != after[:, :, 4:6]).any()


def test_a_wrapper_around_a_quantized_model_keeps_its_cache(quantized):
    small = quantized("gpt", Nearest(cache="int8"))
    (logits, cache), (expected, kept) = decode(Adapt(rank=2)(small)), decode(small)
    assert {path: leaf.dtype for path, leaf in paths(cache).items()} == {path: leaf.dtype for path, leaf in paths(kept).items()}
    np.testing.assert_allclose(logits, expected, atol=1e-2 * np.abs(expected).max())  # of a code that falls on the other side of a half


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2", "nf4", "fp8"])
def test_codes_come_back_from_disk_and_take_their_bits(name, tmp_path):
    kernel = jax.random.normal(jax.random.key(0), (512, 512))
    scale = scales(kernel, number_format(name))
    frozen = {"own": {"layer": {"kernel": {"values": encode(kernel, scale, number_format(name)), "scale": scale}}}, "inner": None}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_frozen(frozen)
        back = checkpoints.frozen(jax.eval_shape(lambda: frozen))
    assert sha256(back) == sha256(frozen)
    assert back["own"]["layer"]["kernel"]["values"].dtype == frozen["own"]["layer"]["kernel"]["values"].dtype
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < {"int8": 1, "fp8": 1, "int4": 0.5, "int3": 0.5, "nf4": 0.5, "int2": 0.25}[name] * 512 * 512 + 12_000


@pytest.mark.parametrize("family", FAMILIES)
def test_after_training_with_rounding_rounding_changes_nothing(family, base, outputs):
    settings = {"format": "int4", "group": 8, "partial": True}
    aware = QuantizationAware(**settings)(base(family))
    small = Nearest(**settings)(aware)
    assert sha256(decoded(small)) == sha256(jax.jit(aware.objective.whole)(aware.params, aware.frozen))
    np.testing.assert_allclose(outputs(small), outputs(aware), atol=2e-6 * np.abs(outputs(aware)).max())
    assert np.abs(outputs(aware) - outputs(base(family))).max() > 1e-2
    assert small.config["objective"]["objective"] == base(family).config["objective"]


@pytest.mark.slow
def test_the_gradient_passes_the_rounding_as_if_it_were_not_there(base):
    aware = QuantizationAware(format="int2")(base("mlp"))

    def total(params):
        return sum(jnp.vdot(leaf, jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape)) for leaf in jax.tree.leaves(params))

    found = jax.grad(lambda params: total(aware.objective.whole(params, aware.frozen)))(aware.params)
    expected = jax.grad(total)(aware.params)
    for path, leaf in paths(expected).items():
        np.testing.assert_array_equal(get(found, path), leaf)


def test_training_with_rounding_learns(base):
    aware = QuantizationAware(format="int4")(base("mlp"))
    step = Step(aware.objective, Optimizer(optax.adam), Constant(), steps=20)
    counters = {"skipped": {"total": jnp.int32(0), "in_a_row": jnp.int32(0)}}
    hyper = {"learning_rate": jnp.float32(1e-2)}
    state = State(jnp.int32(0), aware.params, {**aware.extra, **counters}, step.optimizer.init(aware.params), jax.random.key(0), hyper)
    run, losses = jax.jit(step), []
    for _ in range(20):
        state, metrics = run(state, aware.frozen, aware.batches[0])
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.5 * losses[0]


def test_both_factors_of_a_kernel_of_low_rank_are_quantized(base, outputs):
    thin = SVD(rank=3, only=("dense_0/*",))(base("mlp"))
    changed = Nearest()(thin)
    assert {path for path, *_ in changed.objective.layers} == {"dense_0/kernel/first", "dense_0/kernel/second", "dense_1/kernel", "head/kernel"}
    assert 0 < np.linalg.norm(outputs(changed) - outputs(thin)) < 0.05 * np.linalg.norm(outputs(thin))
    with pytest.raises(ConfigError, match="dense_0/kernel/first is a factor of a kernel, whose inputs stay float; use activations=null"):
        Nearest(activations="dynamic")(thin)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_stand_on_a_quantized_base(family, quantized, outputs):
    changed = quantized(family, METHODS["nf4"])
    adapted = Adapt(rank=2)(changed)
    np.testing.assert_allclose(outputs(adapted), outputs(changed), atol=1e-5)
    moved = dataclasses.replace(adapted, params=map_paths(lambda path, x: x + 0.1, adapted.params))
    assert np.abs(outputs(moved) - outputs(changed)).max() > 1e-2


def test_a_model_that_is_quantized_already_is_refused(quantized):
    changed = quantized("mlp", METHODS["int8"])
    named = dataclasses.replace(changed, config={**changed.config, "compression": [{"method": "prune/wanda"}, {"method": "quantize/int8"}]})
    for method in (Nearest(), QuantizationAware(), GPTQ()):
        with pytest.raises(ConfigError, match="this model is quantized already, by quantize/int8: take the run that it was made from"):
            method(named)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (Nearest, {"format": "int5"}, "method.format='int5' is unknown; did you mean 'int"),
        (Nearest, {"group": 0}, "method.group=0: must be at least 1, or null"),
        (Nearest, {"group": 30}, r"method.group=30: dense_0/kernel has 64 inputs, which 30 does not divide \(the nearest number that does is 32\)"),
        (Nearest, {"format": "fp8", "activations": "dynamic"}, "method.format=fp8 is none, use int8"),
        (Nearest, {"cache": "int8"}, "method.cache=int8: this model has no decoder"),
        (Nearest, {"only": ("dens_0/*",)}, r"method.only: 'dens_0/\*' fits no layer; did you mean 'dense_0/kernel'"),
        (QuantizationAware, {"format": "int"}, "method.format='int' is unknown"),
        (GPTQ, {"damp": -1.0}, "method.damp=-1.0: must not be negative"),
        (GPTQ, {"block": 0}, "method.block=0: must be at least 1"),
        (AWQ, {"points": 0}, "method.points=0: must be at least 1"),
        (SmoothQuant, {"alpha": 2.0}, r"method.alpha=2.0: must be in \[0, 1\]"),
        (SmoothQuant, {"activations": None}, "method.activations=null: smoothing is for inputs that are rounded"),
    ],
)
def test_bad_settings_are_refused(method, settings, message, base):
    with pytest.raises(ConfigError, match=message):
        method(**settings)(base("mlp"))


def test_a_group_that_does_not_divide_falls_back_where_that_is_allowed(base):
    changed = Nearest(group=64, partial=True)(base("mlp"))
    assert {path: group for path, *_, group in changed.objective.layers} == {"dense_0/kernel": 64, "dense_1/kernel": None, "head/kernel": None}


def test_data_of_which_no_row_counts_is_refused(base):
    empty = dataclasses.replace(base("mlp"), batches=[{**batch, "mask": np.zeros(16, bool)} for batch in base("mlp").batches])
    with pytest.raises(ConfigError, match="calibration: no row of the data counts at dense_0/kernel"):
        GPTQ()(empty)
