import dataclasses

import jax
import numpy as np
import pytest

from research.explanation.lens import LogitLens, TunedLens
from research.explanation.model import examples
from research.explanation.stream import blocks

KEY = jax.random.key(0)


class Texts:
    """Random texts as a split."""

    def __len__(self):
        return 40

    def take(self, indices):
        random = np.random.RandomState(7).randint(0, 11, (40, 9)).astype(np.int32)[indices]
        return {"tokens": random[:, :-1], "target": random[:, 1:], "mask": np.ones((len(random), 8), bool)}


@pytest.fixture
def gpt(model):
    data = type("Data", (), {"splits": {"train": Texts(), "validation": Texts()}})()
    return dataclasses.replace(model("gpt"), data=lambda: data)


def test_the_lens_after_the_last_block_gives_the_models_own_logits(gpt, examples_of):
    asked = examples_of(gpt, position=4)
    found = LogitLens(top=3)(gpt, asked, KEY)
    outputs = np.asarray(gpt.read(asked.batch)[0])
    np.testing.assert_allclose(found.kept["logits"][-1], outputs[:, 4], atol=1e-5)
    np.testing.assert_array_equal(found.kept["likeliest"][-1], outputs.argmax(-1))
    np.testing.assert_allclose(found.kept["kl"][-1], 0, atol=1e-6)
    assert found.kept["kl"][0].min() > 1e-3


def test_the_lens_is_the_final_norm_and_the_head_on_each_stream(gpt, examples_of):
    asked = examples_of(gpt, position=4)
    found = LogitLens()(gpt, asked, KEY)
    norm, embedding = gpt.params["norm"], gpt.params["token"]["embedding"]
    names = ("input", "block_0/output")
    taps = gpt.read(asked.batch, names)[1]
    for layer, name in enumerate(names):
        x = np.asarray(taps[name])[:, 4]
        centred = x - x.mean(-1, keepdims=True)
        normalized = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
        np.testing.assert_allclose(found.kept["logits"][layer], normalized @ embedding.T, atol=1e-4)


def test_what_is_drawn_names_tokens_and_layers(gpt, examples_of):
    found = LogitLens(top=2)(gpt, examples_of(gpt), KEY)
    heat, _, table, words = found.panels(1)
    assert list(heat.rows) == ["input", "block 0", "block 1"]
    assert heat.values.shape == (3, 6)
    assert table.columns == ["after", "likeliest", "2."]
    assert len(words.rows) == 6


def test_a_tuned_lens_comes_closer_and_leaves_the_last_block_alone(gpt, examples_of):
    asked = examples_of(gpt)
    found = TunedLens(steps=60, rate=2e-2, held=20)(gpt, asked, KEY)
    before, after = found.kept["kl_before"], found.kept["kl_after"]
    assert (after[:-1] < 0.7 * before[:-1]).all()
    np.testing.assert_allclose([before[-1], after[-1]], 0, atol=1e-3)
    assert found.kept["kernel"].shape == (len(blocks(gpt)) + 1, 16, 16)


def test_the_measured_kl_is_that_of_the_held_out_texts(gpt):
    method = TunedLens(steps=1, rate=1e-9, held=3)  # a lens that is still the identity
    found = method(gpt, examples(gpt, Texts().take(np.arange(1))), KEY)
    rows = np.asarray(jax.random.permutation(jax.random.split(KEY)[1], 40))[:3]
    batch = {**Texts().take(rows), "index": rows.astype(np.int32)}
    by_place = [LogitLens()(gpt, examples(gpt, batch, position=place), KEY).kept["kl"].mean(1) for place in range(8)]
    np.testing.assert_allclose(found.kept["kl_before"], np.mean(by_place, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.kept["kl_after"], found.kept["kl_before"], rtol=1e-3, atol=1e-5)


def test_a_lens_that_cannot_be_trained_or_read_is_told(model):
    assert "data is not known" in TunedLens().fits(model("gpt"))
    assert "no tap of attention" in LogitLens().fits(model("cnn"))
    with pytest.raises(ValueError, match="steps=0 must be above 0"):
        TunedLens(steps=0)
