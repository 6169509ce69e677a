"""From a config to a step: equal configs give equal steps, numbers become values, and what does not fit is told."""

import jax
import jax.numpy as jnp
import pytest
from omegaconf import OmegaConf

from research.core.config import compose
from research.core.errors import ConfigError
from research.core.shared import sharing
from research.core.spec import fields, zero_batch
from research.core.tree import sha256
from research.training.assembly import Assembly, assemble
from research.training.parallel import Jit, Pmap
from research.training.step import Step

SPEC = {"fields": fields(image=((8, 8, 1), "float32"), label=((), "int32")), "classes": 10, "outputs": 10, "image": [8, 8, 1]}


def assembled(*overrides, **options):
    config = compose(["model.width=8", "model.depth=1", *overrides])
    OmegaConf.set_struct(config, False)
    config.data.spec = SPEC
    return assemble(config, **options)


def test_equal_configs_give_equal_steps_and_states():
    one, other = assembled("optimizer.learning_rate=0.1"), assembled("optimizer.learning_rate=0.2")
    assert one.step == other.step
    assert hash(one.step) == hash(other.step)
    assert (one.hyper, other.hyper) == ({"learning_rate": 0.1}, {"learning_rate": 0.2})
    assert one.step != assembled("optimizer.b1=0.8").step
    assert sha256(one.state()) == sha256(assembled("optimizer.learning_rate=0.1").state())
    assert sha256(one.state().params) != sha256(assembled("seed=1").state().params)


def test_listed_numbers_are_values_and_no_constants():
    assembly = assembled("train.values=[optimizer.learning_rate,optimizer.weight_decay,model.dropout]", "model.dropout=0.3")
    assert assembly.hyper == {"learning_rate": 1e-3, "weight_decay": 0.01, "dropout": 0.3}
    assert assembly.step.objective.module.dropout is None
    assert set(assembly.step.optimizer.values) == {"learning_rate", "weight_decay"}
    assembly.check(64)


def test_the_first_state_compiled_quickly_is_the_one_compiled_as_any_program():
    one = assembled("model=mlp")
    hyper = {name: jnp.float32(value) for name, value in one.hyper.items()}
    usual = jax.jit(lambda key, hyper: one.step.create(key, zero_batch(one.spec, 1), hyper))(one._key(), hyper)
    assert sha256(one.state()) == sha256(usual)


def test_the_abstract_state_is_that_of_the_first_one():
    assembly = assembled("train.ema=0.9", "model.norm=batch")
    abstract, state = assembly.abstract(), assembly.state()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_the_first_state_is_traced_once_for_its_shapes_and_for_itself(monkeypatch):
    traced, create = [], Step.create
    monkeypatch.setattr(Step, "create", lambda *given: traced.append(1) or create(*given))
    assembly = assembled("model.width=11")  # a program that no other test has made
    assembly.check(4)
    assembly.state()
    assert len(traced) == 1


def test_epochs_are_counted_in_batches():
    assert assembled("train.steps=null", "train.epochs=3", batches=7).step.steps == 21


def test_the_kind_of_key_is_chosen():
    assert {str(jax.random.key_impl(assembled(f"train.key={name}").state().key)) for name in ("threefry", "rbg")} == {"threefry2x32", "rbg"}


def test_a_run_is_read_on_one_device_whatever_it_was_trained_on():
    assert assembled("parallel=pmap").parallel == Pmap()
    assert assembled("parallel=pmap", "parallel.devices=1024", training=False).parallel == Jit()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("objective=regress",), "Regress or its model reads 'target', which is no field of the data"),
        (("model.dropout=null",), "reads 'dropout', .* is not listed in train.values"),
        (("train.monitor=validation/acuracy",), "train.monitor='validation/acuracy' is no metric of this run; did you mean 'validation/accuracy'"),
        (("model.width=none",), "model.width='none' has the wrong type"),
        (("schedule.warmup=2000",), "schedule.warmup=2000 is longer than the run"),
        (("optimizer.learning_rate=-1",), "optimizer.learning_rate=-1"),
        (("train.values=[optimizer.b3]",), "optimizer.b3"),
    ],
)
def test_what_does_not_fit_is_told(overrides, message):
    with pytest.raises(ConfigError, match=message):
        assembled(*overrides).check(64)


def test_what_is_checked_once_for_many_runs_is_checked_anew_for_another_teacher(monkeypatch):
    traced, names = [], Assembly._names

    def counted(self, program, frozen, example):
        traced.append(frozen)
        return names(self, program, frozen, example)

    monkeypatch.setattr(Assembly, "_names", counted)
    small, large = ({"kernel": jax.ShapeDtypeStruct((n, n), "float32")} for n in (2, 3))
    with sharing():
        for frozen in (small, small, large, None, large):
            assembled().check(64, frozen)
    assert traced == [small, large, None]


def test_a_derived_metric_can_be_watched():
    spec = {"fields": fields(features=((3,), "float32"), target=((1,), "float32")), "features": 3, "outputs": 1}
    config = compose(["objective=regress", "train.monitor=validation/rmse"])
    OmegaConf.set_struct(config, False)
    config.data.spec = spec
    assemble(config).check(4)
