"""The clock: spans by name, compilation apart."""

import contextlib
import time

import jax
import jax.numpy as jnp
import pytest

from research.training.clock import Clock


def test_spans_add_up_and_go_on_from_an_earlier_part():
    clock = Clock({"train": 10.0})
    for _ in range(2):
        with clock.span("train"):
            time.sleep(0.02)
    assert 10.04 <= clock.seconds["train"] < 11
    assert {name for name, spent in clock.seconds.items() if not spent} == {"compile", "start", "wait", "evaluate", "save"}


def test_compilation_inside_a_span_is_booked_apart():
    clock = Clock()
    with clock.span("evaluate"):
        began = time.perf_counter()
        jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.ones((7, 5)))  # never compiled before
        elapsed = time.perf_counter() - began
    assert clock.seconds["compile"] > 0.5 * clock.seconds["evaluate"]
    assert clock.seconds["compile"] + clock.seconds["evaluate"] == pytest.approx(elapsed, rel=0.2)


def test_a_span_that_fails_is_booked_too():
    clock = Clock()
    with contextlib.suppress(KeyError), clock.span("save"):
        time.sleep(0.01)
        raise KeyError
    assert clock.seconds["save"] >= 0.01


def test_an_unknown_name_is_a_fault():
    with pytest.raises(KeyError), Clock().span("trian"):
        pass
