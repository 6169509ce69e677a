"""Schedules against closed forms, at the edges, under jit and vmap, and what they refuse."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
from omegaconf import OmegaConf

from research.core.build import build
from research.core.errors import ConfigError
from research.training.schedule import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    Plateau,
    Step,
    WarmupStableDecay,
    same_history,
)

STEPS = 100
ALL = [
    Constant(warmup=7),
    Cosine(warmup=7, final=0.1),
    Linear(warmup=7, final=0.2),
    Step(warmup=7, every=30),
    Step(warmup=7, at=(40, 80), factor=0.5),
    Exponential(warmup=7, rate=0.9, every=10),
    WarmupStableDecay(warmup=7, decay=20),
    WarmupStableDecay(warmup=7, decay=20, shape="cosine"),
    WarmupStableDecay(warmup=7, decay=20, shape="sqrt"),
    Plateau(warmup=7),
]
every = pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)


def curve(schedule, steps=STEPS):
    return np.array([schedule(step, steps) for step in range(steps + 1)])


def nanogpt(step, steps, warmup, final):
    """`get_lr` of nanoGPT's train.py at a peak rate of 1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step > steps:
        return final
    ratio = (step - warmup) / (steps - warmup)
    return final + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (1 - final)


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_cosine_is_nanogpts_rule(warmup):
    expected = [nanogpt(step, STEPS, warmup, 0.1) for step in range(STEPS + 1)]
    np.testing.assert_allclose(curve(Cosine(warmup=warmup, final=0.1)), expected, rtol=1e-6)


@every
def test_one_program_gives_the_same_shape_as_plain_calls(schedule):
    @functools.partial(jax.jit, static_argnums=(0, 2))
    def compiled(schedule, step, steps):
        traces.append(step)
        return schedule(step, steps)

    traces = []
    rates = [compiled(dataclasses.replace(schedule), np.int32(step), STEPS) for step in range(STEPS + 1)]
    assert len(traces) == 1
    assert (rates[0].dtype, rates[0].shape) == (np.float32, ())
    np.testing.assert_allclose(np.array(rates), curve(schedule), rtol=1e-6, atol=1e-7)


@every
def test_the_shape_stays_in_zero_and_one_and_warms_up_in_a_line(schedule):
    rates = curve(schedule)
    assert 0 <= rates.min() <= rates.max() <= 1
    np.testing.assert_allclose(rates[:7], np.arange(1, 8) / 8, rtol=1e-6)
    assert rates[7] == 1
    assert 0 <= float(schedule(10 * STEPS, STEPS)) <= rates[-1] + 1e-7  # past the end: held, never rising again


def test_linear_exponential_and_staircase_follow_their_closed_forms():
    step = np.arange(STEPS + 1)
    np.testing.assert_allclose(curve(Linear(warmup=0, final=0.2)), 1 - 0.8 * step / STEPS, rtol=1e-6)
    np.testing.assert_allclose(curve(Exponential(rate=0.9, every=10)), 0.9 ** (step / 10), rtol=1e-5)
    np.testing.assert_allclose(curve(Step(at=(40, 80), factor=0.5)), np.select([step < 40, step < 80], [1, 0.5], 0.25), rtol=1e-6)
    np.testing.assert_allclose(curve(Step(every=30)), 0.1 ** (step // 30), rtol=1e-5)


@pytest.mark.parametrize(("shape", "fall"), [("linear", lambda p: p), ("cosine", lambda p: (1 - np.cos(np.pi * p)) / 2), ("sqrt", np.sqrt)])
def test_warmup_stable_decay_is_flat_and_then_falls(shape, fall):
    progress = np.clip((np.arange(STEPS + 1) - 80) / 20, 0, 1)
    np.testing.assert_allclose(curve(WarmupStableDecay(decay=20, shape=shape, final=0.1)), 1 - 0.9 * fall(progress), rtol=1e-5, atol=1e-6)
    assert curve(WarmupStableDecay(decay=0, final=0.0))[-2] == 1


def test_a_longer_run_is_the_same_run_only_while_the_shape_agrees():
    assert same_history(Constant(warmup=5), 100, 100, 200)
    assert same_history(Step(every=30), 100, 100, 200)
    assert same_history(Cosine(final=0.1, warmup=20), 20, 100, 200)  # still warming up
    assert not same_history(Cosine(final=0.1), 50, 100, 200)
    assert not same_history(Linear(), 2, 100, 200)
    stable = WarmupStableDecay(decay=20)
    assert same_history(stable, 81, 100, 200)  # update 80 is the first of the decay, still at 1
    assert not same_history(stable, 82, 100, 200)
    assert same_history(Cosine(), 0, 100, 200)


def test_schedules_are_equal_and_hashable_by_content():
    assert Cosine(final=0.1) == Cosine(final=0.1) != Cosine(final=0.2)
    assert hash(Step(at=(1, 2))) == hash(Step(at=(1, 2)))


@pytest.mark.parametrize(
    ("schedule", "steps", "words"),
    [
        (Cosine(warmup=101), 100, ["schedule.warmup=101", "train.steps=100"]),
        (WarmupStableDecay(warmup=90, decay=20), 100, ["schedule.warmup=90", "schedule.decay=20", "train.steps=100"]),
        (WarmupStableDecay(decay=101), 100, ["schedule.decay=101", "train.steps=100"]),
    ],
)
def test_a_phase_longer_than_the_run_is_refused(schedule, steps, words):
    with pytest.raises(ConfigError) as error:
        schedule.check(steps)
    assert all(word in str(error.value) for word in words)
    schedule.check(200)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Constant(warmup=-1), "schedule.warmup=-1"),
        (lambda: Cosine(final=1.5), "schedule.final=1.5"),
        (lambda: Linear(final=-0.1), "schedule.final=-0.1"),
        (lambda: Step(), "schedule.every=None"),
        (lambda: Step(every=3, at=(4,)), "schedule.at=[4]"),
        (lambda: Step(every=0), "schedule.every=0"),
        (lambda: Step(every=3, factor=2.0), "schedule.factor=2.0"),
        (lambda: Exponential(rate=0.0), "schedule.rate=0.0"),
        (lambda: Exponential(every=0), "schedule.every=0"),
        (lambda: WarmupStableDecay(decay=-1), "schedule.decay=-1"),
        (lambda: WarmupStableDecay(final=2.0), "schedule.final=2.0"),
        (lambda: Plateau(factor=1.0), "schedule.factor=1.0"),
        (lambda: Plateau(patience=-1), "schedule.patience=-1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make, name):
    with pytest.raises(ConfigError) as error:
        make()
    assert name in str(error.value)


def test_plateau_goes_on_from_its_record_as_if_never_stopped():
    values = [1.0, 0.5, 0.6, 0.6, float("nan"), 0.6, 0.4, 0.41, 0.41, 0.41]
    schedule = Plateau(patience=1, factor=0.5, cooldown=1, minimum=0.3)
    whole, record = [], {}
    for value in values:
        record, factor = schedule.observe(record, value)
        whole.append(factor)
    halves, record = [], {}
    for value in values:
        record, factor = schedule.observe(json.loads(json.dumps(record)), value)
        halves.append(factor)
    assert whole == halves
    assert whole.count(0.5) == 1
    assert math.prod(whole) == pytest.approx(0.3)
    assert record["best"] == 0.4


@every
def test_only_plateau_looks_at_results(schedule):
    record, factors = {}, []
    for _ in range(30):
        record, factor = schedule.observe(record, 1.0)
        factors.append(factor)
    assert (min(factors) < 1) == isinstance(schedule, Plateau)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step", "exponential", "warmup_stable_decay", "plateau"])
def test_every_config_builds(name, request):
    node = OmegaConf.load(request.config.rootpath / "conf" / "schedule" / f"{name}.yaml")
    schedule = build(OmegaConf.create({"schedule": node, "train": {"mode": "min"}}).schedule, where="schedule")
    schedule.check(1000)
    assert float(schedule(0, 1000)) == 1
    assert {field.name for field in dataclasses.fields(schedule)} == set(node) - {"_target_"}
