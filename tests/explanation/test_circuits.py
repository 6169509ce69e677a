import jax
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.explanation.circuits import DirectLogit

KEY = jax.random.key(0)
CASES = {
    "gpt": (),
    "llama": (
        "model.positions=rotary",
        "model.norm=rms",
        "model.activation=swiglu",
        "model.heads=4",
        "model.kv_heads=2",
        "model.tied=false",
        "model.bias=false",
    ),
    "attention alone": ("model.hidden=0",),
}


@pytest.mark.parametrize(("case", "heads"), [("gpt", False), ("llama", True), ("attention alone", True)])
def test_parts_sum_to_the_residual_stream_and_to_the_logit(case, heads, model, examples_of):
    gpt = model("gpt", *CASES[case])
    asked = examples_of(gpt, position=4)
    found = DirectLogit(heads=heads)(gpt, asked, KEY)
    output = np.asarray(gpt.read(asked.batch)[0])[np.arange(3), 4, asked.target[:, 1]]
    np.testing.assert_allclose(found.numbers["output"], output, atol=1e-6)
    np.testing.assert_allclose(found.kept["values"].sum(1), output, atol=1e-5)
    np.testing.assert_allclose(found.numbers["residual_delta"], 0, atol=1e-5)
    np.testing.assert_allclose(found.numbers["completeness_delta"], 0, atol=1e-5)
    assert any("mlp" in name for name in found.numbers["parts"]) == (case != "attention alone")


def test_a_part_is_what_it_writes_through_the_held_norm(model, examples_of):
    gpt = model("gpt")
    asked = examples_of(gpt, target=5, position=3)
    found = DirectLogit()(gpt, asked, KEY)
    names = ("input", "block_0/attention/heads", "block_0/middle", "block_0/output", "norm/factor")
    taps = {name: np.asarray(value)[..., 3, :] for name, value in gpt.read(asked.batch, names)[1].items()}  # of heads: b h k
    params = gpt.params

    def logit(stream):
        centred = stream - stream.mean(-1, keepdims=True)
        return (centred * taps["norm/factor"] * params["norm"]["scale"]) @ params["token"]["embedding"][5]

    wrote = {"embedding": taps["input"], "block 0 mlp": taps["block_0/output"] - taps["block_0/middle"]}
    for head in range(2):
        wrote[f"block 0 head {head}"] = taps["block_0/attention/heads"][:, head] @ params["block_0"]["attention"]["out"]["kernel"][head]
    wrote["block 0 attention bias"] = np.broadcast_to(params["block_0"]["attention"]["out"]["bias"], (3, 16))
    for name, part in wrote.items():
        np.testing.assert_allclose(found.kept["values"][:, found.numbers["parts"].index(name)], logit(part), atol=1e-5, err_msg=name)
    constant = params["norm"]["bias"] @ params["token"]["embedding"][5]
    np.testing.assert_allclose(found.kept["values"][:, -1], constant, atol=1e-5)
    np.testing.assert_allclose(found.kept["heads"][:, 0, 1], logit(wrote["block 0 head 1"]), atol=1e-5)


def test_against_another_output_the_parts_are_differences(model, examples_of):
    gpt = model("gpt")
    one, other = (DirectLogit()(gpt, examples_of(gpt, target=target), KEY) for target in ("c", "f"))
    both = DirectLogit(against="f")(gpt, examples_of(gpt, target="c"), KEY)
    np.testing.assert_allclose(both.kept["values"], one.kept["values"] - other.kept["values"], atol=1e-5)
    with pytest.raises(ConfigError, match="target='z' is no token"):
        DirectLogit(against="z")(gpt, examples_of(gpt), KEY)


def test_it_needs_a_residual_stream(model):
    assert DirectLogit().fits(model("gpt")) is None
    assert DirectLogit().fits(model("cnn")) == "it has no tap of attention weights"
