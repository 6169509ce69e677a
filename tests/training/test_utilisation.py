"""What a step has to compute, by formula, against what it multiplies; and what the hardware reaches."""

import pytest
from omegaconf import open_dict

import research
from research.core.errors import ConfigError
from research.core.spec import fields
from research.training import utilisation
from research.training.assembly import assemble
from research.training.utilisation import model_flops, peak, step_flops

WIDTH, DEPTH, TIME, VOCABULARY = 16, 3, 8, 11
TEXT = {
    "vocabulary": VOCABULARY,
    "time": TIME,
    "bytes_per_token": 1.0,
    "fields": fields(mask=(TIME,), tokens=((TIME,), "int32"), target=((TIME,), "int32")),
}
GPT = ("data=python_docs", f"data.time={TIME}", "model=gpt", "objective=language_model", "train.steps=10", "schedule.warmup=0")
SIZES = (f"model.width={WIDTH}", f"model.depth={DEPTH}", "model.heads=2", "model.attention=reference")


def assembled(*overrides, spec=TEXT):
    config = research.compose(list(overrides))
    with open_dict(config):
        config.data.spec = dict(spec)
    return assemble(config, batches=1)


@pytest.mark.parametrize("more", [(), ("model.scan=true",), ("model.bias=false", "model.positions=rotary"), ("model.tied=false",)])
def test_the_formula_of_a_transformer_by_hand(more):
    matrices = DEPTH * 12 * WIDTH**2 + VOCABULARY * WIDTH  # the table of tokens as the head, once; positions are looked up
    told = model_flops(assembled(*GPT, *SIZES, *more))
    assert told.flops == 6 * matrices + 6 * DEPTH * WIDTH * TIME
    assert told.formula == f"6 x {matrices:,} N + 6 x {DEPTH * WIDTH:,} A x {TIME:,} T"


@pytest.mark.parametrize("more", [(), ("model.scan=true",), ("train.accumulate=2",)])
def test_a_step_multiplies_what_the_formula_says_and_the_masked_half(more):
    assembly = assembled(*GPT, *SIZES, *more)
    masked = 6 * DEPTH * WIDTH * TIME
    assert step_flops(assembly, 4) == (4 * TIME * (model_flops(assembly).flops + masked), True)


def test_what_is_computed_again_counts_for_the_step_alone():
    plain, again = (assembled(*GPT, *SIZES, "model.scan=true", f"model.remat={how}") for how in ("none", "full"))
    assert model_flops(plain) == model_flops(again)
    assert step_flops(again, 2).flops > 1.2 * step_flops(plain, 2).flops


def test_anything_else_is_three_forward_passes():
    spec = {"outputs": 3, "fields": fields(features=((16,), "float32"), label=((), "int32"))}
    told = model_flops(assembled("data=digits", "model=mlp", "model.width=8", "model.depth=1", "train.steps=10", spec=spec))
    assert told == (3 * 2 * (16 * 8 + 8 * 3), "3 x 304 FLOPs of a forward pass")


def test_tiles_of_a_convolution_save_the_step_what_the_model_has_to_compute():
    spec = {"outputs": 3, "fields": fields(image=((8, 8, 32), "float32"), label=((), "int32"))}
    sizes = ("model.channels=[32]", "model.pool=1", "model.padding=SAME", "train.steps=10")
    assembly = assembled("data=digits", "model=cnn", *sizes, spec=spec)
    kernel = 2 * 8 * 8 * 9 * 32 * 32
    at_first = 2  # its output and its own gradient; the image needs none
    written, needed = step_flops(assembly, 512).flops, 512 * model_flops(assembly).flops
    assert needed - 512 * kernel - written == 512 * at_first * (kernel - kernel * 16 // 36)


def test_a_peak_is_measured_or_named(monkeypatch):
    monkeypatch.setattr(utilisation, "SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr(utilisation, "PATIENCE", 0.05)
    measured, where = peak("float32")
    assert 1e8 < measured < 1e14
    assert where.startswith("measured, ")
    assert peak("bfloat16", 989) == (989e12, "named, 989 TFLOP/s a device")
    for wrong in (0, -1.0, True, "989", float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="must be the TFLOP/s of one device"):
            peak("float32", wrong)
