import jax
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.explanation.generation import Generation
from research.explanation.gradient import InputXGradient
from research.explanation.model import examples

KEY = jax.random.key(0)


@pytest.fixture
def gpt(model):
    return model("gpt")


@pytest.fixture
def asked(gpt, examples_of):
    return examples_of(gpt, 2, position=2)


def test_it_goes_on_with_the_likeliest_tokens(gpt, asked):
    found = Generation(tokens=4)(gpt, asked, KEY)
    for i in range(2):
        row = list(asked.batch["tokens"][i, :3])
        for _ in range(4):
            batch = {"tokens": np.array([row + [0] * (8 - len(row))], np.int32), "mask": np.ones((1, 8), bool), "index": np.zeros(1, np.int32)}
            row.append(int(np.asarray(gpt.read(batch)[0])[0, len(row) - 1].argmax()))
        assert found.kept[f"tokens_{i}"].tolist() == row


def test_each_new_token_is_attributed_to_the_tokens_before_it(gpt, asked):
    found = Generation(tokens=3)(gpt, asked, KEY)
    tokens = found.kept["tokens_1"]
    for n in range(3):
        batch = {"tokens": tokens[None, :5], "mask": np.ones((1, 5), bool)}
        alone = InputXGradient()(gpt, examples(gpt, batch, target=int(tokens[3 + n]), position=2 + n), KEY)
        np.testing.assert_allclose(found.kept["values_1"][n], alone.values[0], atol=1e-5)
        assert not found.kept["values_1"][n, 3 + n :].any()
        np.testing.assert_allclose(found.kept["output_1"][n], alone.output[0], atol=1e-5)
    _, heat = found.panels(1)
    assert list(heat.rows) == [gpt.token(int(t)) for t in tokens[3:]]
    assert heat.values.shape == (3, 5)


def test_with_points_a_row_sums_to_what_the_text_adds_to_the_logit(gpt, asked):
    found = Generation(tokens=2, points=64)(gpt, asked, KEY)
    tokens = found.kept["tokens_0"]
    batch = {"tokens": tokens[None, :4], "mask": np.ones((1, 4), bool), "index": np.zeros(1, np.int32)}
    logits, taps = gpt.read(batch, ("input",))
    full, embedded = np.asarray(logits)[0], np.asarray(taps["input"])[0]
    for n in range(2):
        mean = np.broadcast_to(embedded[: 3 + n].mean(0), (1, 4, 16)).astype(np.float32)  # of the tokens that were there
        empty = np.asarray(gpt.read(batch, (), {"input": (np.ones((1, 1, 1), bool), mean)})[0])[0]
        expected = full[2 + n, tokens[3 + n]] - empty[2 + n, tokens[3 + n]]
        assert found.kept["values_0"][n].sum() == pytest.approx(expected, abs=2e-3)


def test_a_temperature_draws_by_the_key(gpt, asked):
    first, again, other = (Generation(tokens=5, temperature=5.0)(gpt, asked, key).kept["tokens_0"] for key in (KEY, KEY, jax.random.key(1)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_text_without_room_is_refused(gpt, asked, model):
    with pytest.raises(ConfigError, match=r"method.tokens=7: the text has 3 of the 8 tokens .* make at most method.tokens=6"):
        Generation(tokens=7)(gpt, asked, KEY)
    assert "does not go on" in Generation().fits(model("cnn"))
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        Generation(tokens=0)
