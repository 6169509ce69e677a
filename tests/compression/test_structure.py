"""Whole units go, and what is left computes what the whole model does without them."""

import numpy as np
import pytest

from research.compression.structure import Structured, masked
from research.core.errors import ConfigError
from research.core.tree import count

CASES = {
    "mlp": ("mlp",),
    "mlp with batch norm": ("mlp", "model.norm=batch"),
    "mlp with sigmoid, which is not 0 at 0": ("mlp", "model.activation=sigmoid"),
    "cnn": ("cnn",),
    "cnn with batch norm": ("cnn", "model.norm=batch"),
    "gpt": ("gpt",),
    "gpt, attention alone": ("gpt", "model.hidden=0"),
    "gpt, attention alone in one block": ("gpt", "model.hidden=[0,16]", "model.depth=2"),
    "gpt, rotary, swiglu": ("gpt", "model.positions=rotary", "model.activation=swiglu", "model.norm=rms"),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case.startswith("gpt, ") else case for case in CASES])
def test_the_shrunk_model_equals_the_masked_one(case, subject, outputs):
    whole = subject(*CASES[case])
    method = Structured(sparsity=0.5, multiple=1)
    small = method(whole)
    assert count(small.params) < 0.75 * count(whole.params)
    zeroed = outputs(masked(whole, method.choose(whole)[1]))
    np.testing.assert_allclose(outputs(small), zeroed, rtol=0, atol=1e-6 * max(np.abs(zeroed).max(), 1))
    assert np.abs(outputs(small) - outputs(whole)).max() > 1e-3


def test_probing_finds_every_axis_of_a_unit(subject):
    _, kept = Structured().choose(subject("cnn", "model.norm=batch"))
    assert set(next(width for width in kept if width.name == "channels[1]").axes) == {
        ("params/conv_1/kernel", 3, 1),
        ("params/norm_1/scale", 0, 1),
        ("params/norm_1/bias", 0, 1),
        ("extra/batch_stats/norm_1/mean", 0, 1),
        ("extra/batch_stats/norm_1/variance", 0, 1),
        ("params/dense_0/kernel", 0, 16),  # the images are 4 x 4 where they are flattened
    }
    _, kept = Structured().choose(subject("gpt"))
    heads = next(width for width in kept if width.name == "heads[1]")
    assert {path for path, *_ in heads.axes} == {
        *(f"params/block_1/attention/{name}/{leaf}" for name in ("query", "key", "value") for leaf in ("kernel", "bias")),
        "params/block_1/attention/out/kernel",
    }


def test_the_units_that_stay_are_those_that_matter(subject, outputs):
    whole = subject("mlp", "model.depth=1", "model.width=[16]")
    kernel = np.array(whole.params["head"]["kernel"])
    kernel[[1, 5, 7, 11]] = 0.0  # nothing reads these units
    whole = whole.replace(params={**whole.params, "head": {**whole.params["head"], "kernel": kernel}})
    small = Structured(sparsity=0.25, multiple=1)(whole)
    np.testing.assert_allclose(outputs(small), outputs(whole), atol=1e-5)
    assert small.notes == {"width[0]": {"units": 16, "kept": 12}}


def test_a_multiple_is_kept_where_there_are_enough_units(subject):
    small = Structured(sparsity={"channels": 0.6}, multiple=8)(subject("cnn"))
    assert small.config["model"]["channels"] == [3, 8]
    assert small.config["model"]["hidden"] == [16]
    assert small.config["objective"]["module"] == small.config["model"]


def test_units_under_a_layer_norm_are_refused_by_name(subject):
    with pytest.raises(ConfigError, match=r"the units of width\[0\] cannot go alone.*partial=true"):
        Structured(sparsity=0.5)(subject("mlp", "model.norm=layer"))
    left = Structured(sparsity=0.5, partial=True)(subject("mlp", "model.norm=layer"))
    assert left.config["model"]["width"] == [16, 24]


def test_shared_key_heads_stay(subject):
    whole = subject("gpt", "model.heads=4", "model.kv_heads=2")
    assert {width.argument for width in Structured().choose(whole)[1]} == {"hidden"}


@pytest.mark.parametrize(("settings", "message"), [({"sparsity": 1.0}, r"method.sparsity=1.0: must be in \[0, 1\)"), ({"multiple": 0}, "multiple=0")])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Structured(**settings)


def test_an_argument_without_units_is_refused_with_the_nearest(subject):
    with pytest.raises(ConfigError, match=r"method.sparsity.chanels: the model has no such sizes; did you mean 'channels'\?"):
        Structured(sparsity={"chanels": 0.5})(subject("cnn"))
