import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.explanation.model import examples, replaced
from research.explanation.patching import HeadAblation, Patching, PathPatching, Site, sweep

KEY = jax.random.key(0)
HEADS = ["block_0/attention/heads", "block_1/attention/heads"]


@pytest.fixture
def gpt(model):
    return model("gpt")


@pytest.fixture
def pair(gpt):
    """Two texts that differ at two tokens, each the other's corrupt one."""
    tokens = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [1, 9, 3, 4, 5, 6, 0, 8]], np.int32)
    return examples(gpt, {"tokens": tokens, "mask": np.ones((2, 8), bool)}, target=3)


def logits(model, asked, batch=None, edits=None):
    outputs = np.asarray(model.read(asked.batch if batch is None else batch, (), edits)[0])
    return outputs[(np.arange(len(asked)), *asked.target.T)]


def corrupt(asked):
    return {**asked.batch, "tokens": asked.batch["tokens"][::-1]}


def test_all_of_a_stream_is_clean_and_nothing_is_corrupt(gpt, pair):
    found = Patching(against=None)(gpt, pair, KEY)
    for tap in ("input", "block_0/output", "block_1/output"):
        np.testing.assert_allclose(found.kept[f"{tap}/whole".replace("/", ".")], 1, atol=1e-5)
    same = found.kept["input.position"][:, [0, 2, 3, 4, 5, 7]]  # where both texts have one token nothing is exchanged
    np.testing.assert_allclose(same, 0, atol=1e-5)
    low, high = logits(gpt, pair, corrupt(pair)), logits(gpt, pair)
    np.testing.assert_array_equal((found.numbers["corrupt"], found.numbers["clean"]), (low, high))
    values = gpt.read(pair.batch, ["input"])[1]
    nothing = Site("input", "whole", 1)
    exact, _ = sweep(gpt, corrupt(pair), pair.target, np.full(2, -1, np.int32), [nothing], {"input": gpt.read(corrupt(pair), ["input"])[1]["input"]})
    np.testing.assert_allclose(exact[nothing][0], low, atol=1e-6)
    exact, _ = sweep(gpt, corrupt(pair), pair.target, np.full(2, -1, np.int32), [nothing], values)
    np.testing.assert_allclose(exact[nothing][0], high, atol=1e-6)


@pytest.mark.parametrize(("into", "rows"), [("corrupt", 256), ("clean", 6)])
def test_each_unit_is_one_edit(gpt, pair, into, rows):
    found = Patching(against=None, into=into, rows=rows)(gpt, pair, KEY)
    base, source = (corrupt(pair), pair.batch) if into == "corrupt" else (pair.batch, corrupt(pair))
    low, high = found.numbers["corrupt"], found.numbers["clean"]
    for tap, unit, mask in (("block_0/output", 6, np.arange(8).reshape(1, 8, 1) == 6), (HEADS[1], 1, np.array([False, True]).reshape(1, 2, 1, 1))):
        edits = {tap: (mask, gpt.read(source, [tap])[1][tap])}
        expected = (logits(gpt, pair, base, edits) - low) / (high - low)
        by = "head" if tap in HEADS else "position"
        np.testing.assert_allclose(found.kept[f"{tap}/{by}".replace("/", ".")][:, unit], expected, atol=2e-5)


def test_the_other_output_is_what_the_corrupt_run_finds_likeliest(gpt, pair):
    found = Patching()(gpt, pair, KEY)
    outputs = np.asarray(gpt.read(corrupt(pair))[0])[np.arange(2), pair.target[:, 0]]
    likeliest = outputs.argmax(-1)
    expected = [outputs[i, 3] - (outputs[i, best] if best != 3 else 0) for i, best in enumerate(likeliest)]
    np.testing.assert_allclose(found.numbers["corrupt"], expected, atol=1e-6)


@pytest.mark.parametrize("family", ["mlp", "cnn", pytest.param("regression", marks=pytest.mark.slow)])
def test_models_of_other_families_are_patched_layer_by_layer(family, model, examples_of):
    net = model(family)
    asked = examples_of(net, 2)
    found = Patching()(net, asked, KEY)
    assert found.numbers["whole"] == {tap: pytest.approx(1, abs=1e-4) for tap in list(net.taps)[:-1]}
    inner = list(net.taps)[-2]
    units = Patching(at=(inner,), by="channel", against=None)(net, asked, KEY)
    values = units.kept[f"{inner}.channel"]
    np.testing.assert_allclose(values.sum(1), 1, atol=1e-4)  # the layer above it is linear


def test_a_corrupt_example_can_be_a_text_or_a_number_of_the_data(gpt, pair):
    class Source:
        def __len__(self):
            return 2

        def take(self, indices):
            return {"tokens": pair.batch["tokens"][indices]}

    data = type("Data", (), {"splits": {"test": Source()}})()
    known = dataclasses.replace(gpt, data=lambda: data, encode=lambda text: np.array([ord(c) - ord("a") for c in text], np.int32))
    one = dataclasses.replace(pair.row(0), batch={**pair.row(0).batch})
    rolled = Patching(against=None)(gpt, pair, KEY).kept["block_0.output.position"][0]
    for given in (1, "bjdefgai"):
        found = Patching(corrupt=given, against=None)(known, one, KEY)
        np.testing.assert_allclose(found.kept["block_0.output.position"][0], rolled, atol=2e-5)
    for given, message in {
        "bj": "'bj' has 2 tokens, the clean example 8: they must be of one size",
        2: "method.corrupt=2: the data has the examples 0 to 1",
        0: "answers the corrupt example as it does the clean one",
        None: "one example has nothing to be compared with",
    }.items():
        with pytest.raises(ConfigError, match=message):
            Patching(corrupt=given)(known, one, KEY)
    with pytest.raises(ConfigError, match="this run reads no text"):
        Patching(corrupt="text")(gpt, one, KEY)


def test_a_head_of_the_last_block_has_no_path_but_the_direct_one(gpt, pair):
    bare = dataclasses.replace(
        gpt, params={**gpt.params, "block_1": {**gpt.params["block_1"], "mlp": jax.tree.map(jnp.zeros_like, gpt.params["block_1"]["mlp"])}}
    )
    direct, whole = (method(against=None)(bare, pair, KEY) for method in (PathPatching, Patching))
    np.testing.assert_allclose(direct.kept["to.block_1.output"][:, 1], whole.kept["block_1.attention.heads.head"], atol=2e-5)


def test_the_direct_path_adds_what_the_head_writes_and_nothing_else(model):
    gpt = model("gpt", "model.hidden=0")
    tokens = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [1, 9, 3, 4, 5, 6, 0, 8]], np.int32)
    asked = examples(gpt, {"tokens": tokens, "mask": np.ones((2, 8), bool)}, target=3)
    found = PathPatching(against=None)(gpt, asked, KEY).kept["to.block_1.output"]
    (_, clean), (_, held) = gpt.read(asked.batch, HEADS), gpt.read(corrupt(asked), [*HEADS, "block_1/output"])
    low, high = logits(gpt, asked, corrupt(asked)), logits(gpt, asked)
    for layer in range(2):
        for head in range(2):
            change = np.asarray(clean[HEADS[layer]] - held[HEADS[layer]])[:, head] @ gpt.params[f"block_{layer}"]["attention"]["out"]["kernel"][head]
            edited = logits(gpt, asked, corrupt(asked), {"block_1/output": replaced(held["block_1/output"] + change)})
            np.testing.assert_allclose(found[:, layer, head], (edited - low) / (high - low), atol=2e-5)


def test_only_the_named_head_of_a_receiver_notices(gpt, pair):
    every = PathPatching(receivers=("block_1/attention/value",), against=None)(gpt, pair, KEY).kept["to.block_1.attention.value"]
    first = PathPatching(receivers=("block_1/attention/value",), head=0, against=None)(gpt, pair, KEY).kept["to.block_1.attention.value"]
    assert np.abs(every - first)[:, 0].max() > 1e-3
    np.testing.assert_allclose(every[:, 1], 0, atol=1e-5)  # what a block sends comes too late for its own values
    held = {tap: replaced(value) for tap, value in gpt.read(corrupt(pair), HEADS)[1].items()}
    clean = gpt.read(pair.batch, HEADS)[1][HEADS[0]]
    mask = np.array([True, False]).reshape(1, 2, 1, 1)
    held[HEADS[0]] = replaced(jnp.where(mask, clean, held[HEADS[0]][1]))
    noticed = gpt.read(corrupt(pair), ["block_1/attention/value"], held)[1]["block_1/attention/value"]
    low, high = logits(gpt, pair, corrupt(pair)), logits(gpt, pair)
    edited = logits(gpt, pair, corrupt(pair), {"block_1/attention/value": (mask, noticed)})
    np.testing.assert_allclose(first[:, 0, 0], (edited - low) / (high - low), atol=2e-5)


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_ablation_is_one_edit_a_head(gpt, pair, value):
    batch = {**pair.batch, "target": np.roll(pair.batch["tokens"], -1, 1), "mask": np.arange(8)[None] >= np.array([[4], [2]])}
    asked = examples(gpt, batch, target=3)
    found = HeadAblation(value=value)(gpt, asked, KEY)
    read = gpt.read(asked.batch, HEADS)[1][HEADS[0]]
    instead = jnp.zeros_like(read) if value == "zero" else jnp.broadcast_to(read.mean((0, 2), keepdims=True), read.shape)
    edits = {HEADS[0]: (np.array([False, True]).reshape(1, 2, 1, 1), instead)}
    np.testing.assert_allclose(found.kept["lost"][:, 0, 1], logits(gpt, asked) - logits(gpt, asked, None, edits), atol=1e-5)
    scores = [np.asarray(gpt.read(asked.batch, (), edit)[0], np.float64) for edit in (None, edits)]
    losses = []
    for outputs in scores:
        nll = np.log(np.exp(outputs).sum(-1)) - np.take_along_axis(outputs, batch["target"][..., None], -1)[..., 0]
        losses.append(np.mean([each[mask].mean() for each, mask in zip(nll, batch["mask"], strict=True)]))
    assert found.numbers["loss"] == pytest.approx(losses[0], abs=1e-5)
    assert found.kept["loss"][0, 1] == pytest.approx(losses[1] - losses[0], abs=1e-5)


def test_all_heads_and_layers_share_one_program(gpt, pair, monkeypatch):
    calls = []
    real = type(gpt.objective).predict

    def counted(self, *args, **kwargs):
        calls.append(kwargs.get("edits") is not None)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(gpt.objective), "predict", counted)
    jax.clear_caches()
    HeadAblation(rows=2)(gpt, pair, KEY)  # six chunks of one
    assert sum(calls) == 1


def test_settings_that_do_not_fit_are_refused(gpt, pair, model):
    with pytest.raises(ConfigError, match=r"'block_0/outptu' fits no tap of this model.*block_0/output"):
        Patching(at=("block_0/outptu",))(gpt, pair, KEY)
    with pytest.raises(ConfigError, match=r"method.by=head: block_0/output of the shape .* cannot be cut so, only by position, whole, channel"):
        Patching(at=("block_0/output",), by="head")(gpt, pair, KEY)
    with pytest.raises(ConfigError, match=r"method\.head=1: block_1/output has no heads"):
        PathPatching(head=1)(gpt, pair, KEY)
    for wrong in ({"into": "both"}, {"rows": 0}, {"by": "layer"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            Patching(**wrong)
    with pytest.raises(ValueError, match="value='noise': choose from: zero, mean"):
        HeadAblation(value="noise")
    for method in (PathPatching(), HeadAblation()):
        assert method.fits(model("mlp")) == "it has no tap of attention weights"
