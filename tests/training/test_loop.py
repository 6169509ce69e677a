"""The loop: its order, what the host remembers, what counts as best, and how a run ends."""

import itertools
import json
import math

import jax
import numpy as np
import pytest
from etils import epath

from research.core.build import build
from research.core.config import compose
from research.core.errors import ConfigError
from research.training import log
from research.training.checkpoint import Checkpoints
from research.training.clock import Clock
from research.training.loop import Diverged, Loop, Settings, new_host
from research.training.parallel import Jit, create


class Repeated:
    """A few batches over and over; those of the steps in `bad` hold a NaN."""

    def __init__(self, batches, bad=()):
        self.batches, self.bad = batches, set(bad)

    def __getitem__(self, step):
        batch = self.batches[step % len(self.batches)]
        if step + 1 in self.bad:
            batch = {**batch, "features": np.full_like(batch["features"], np.nan)}
        return batch

    def iterate(self, start, stop, put):
        return (put(self[step]) for step in range(start, stop))

    def indices(self, step):
        return self[step]["index"]


@pytest.fixture
def run(make_step, batches, tmp_path):
    """run(scores, bad, **settings): how 20 steps end whose evaluations give these scores, and the calls that the loop made."""

    def call(scores=(), bad=(), **settings):
        step = make_step()
        settings = Settings(**{"steps": 20, "log_every": 5, "eval_every": 5, "monitor": "validation/loss" if scores else "train/loss", **settings})
        given, seen = itertools.chain(scores, itertools.repeat({})), []

        def evaluate(state):
            seen.append(("evaluate", int(state.step)))
            return next(given)

        hook = lambda state, at: seen.append(("hook", at))  # noqa: E731
        record = log.Log(epath.Path(tmp_path), 0, 20, tensorboard=False, progress="none")
        with Checkpoints(tmp_path, settings.keep) as checkpoints:
            loop = Loop(step, settings, Jit(), Repeated(batches, bad), checkpoints, record, evaluate, Clock(), (hook,))
            state = create(step, jax.random.key(0), batches[0], {"learning_rate": 1e-2})
            try:
                return loop.run(state, None, new_host()), seen
            finally:
                record.close()

    return call


def hosts(folder):
    return {int(path.name): json.loads((path / "host.json").read_text()) for path in (folder / "checkpoints").iterdir()}


def records(folder):
    return log.read(epath.Path(folder))


def test_settings_are_the_defaults_of_the_config():
    assert build(compose([]).train, where="train") == Settings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "train.steps=0: must be at least 1"),
        ({"steps": None}, "give exactly one of them"),
        ({"epochs": 2}, "give exactly one of them"),
        ({"patience": 0}, "train.patience=0"),
        ({"accumulate": 0}, "train.accumulate=0"),
        ({"save_every": -1}, "train.save_every=-1"),
        ({"minimum_delta": -0.1}, "train.minimum_delta=-0.1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**settings)


def test_epochs_become_steps():
    settings = Settings(steps=None, epochs=3, eval_every="epoch").resolved(7)
    assert (settings.steps, settings.epochs, settings.eval_every) == (21, None, 7)
    assert Settings(steps=10).resolved(7) == Settings(steps=10)


def test_the_order_is_evaluate_then_hooks_then_save(run, tmp_path):
    outcome, seen = run([{"validation/loss": value} for value in (4.0, 3.0, 2.0, 1.0)])
    assert seen == [(kind, at) for at in (5, 10, 15, 20) for kind in ("evaluate", "hook")]
    assert (outcome.status, outcome.reason, int(outcome.state.step)) == ("finished", None, 20)
    assert [(r["step"], "validation/loss" in r) for r in records(tmp_path)] == [(at, kind) for at in (5, 10, 15, 20) for kind in (False, True)]
    host = hosts(tmp_path)[20]
    assert set(host) == set(new_host())
    assert host["best"] == {"metric": "validation/loss", "value": 1.0, "step": 20}
    assert host["bad_evaluations"] == 0
    assert host["window"] == []
    assert host["seconds"]["train"] > 0


def test_a_checkpoint_knows_its_own_step_rate_and_window(run, tmp_path):
    run(log_every=4, eval_every=None, save_every=6, keep="all")
    saved = hosts(tmp_path)
    state = {at: rate for r in records(tmp_path) for at, rate in [(r["step"], r.get("learning_rate"))]}
    assert [step for step, _ in saved[18]["window"]] == [17, 18]  # 16 was the last log point
    assert saved[18]["learning_rate"] != state[16]
    assert saved[18]["learning_rate"] == pytest.approx(saved[18]["window"][-1][1]["learning_rate"][0])


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_is_not_finite_is_never_best(run, tmp_path, value):
    outcome, _ = run([{"validation/loss": value}, {"validation/loss": 9.0}, {"validation/loss": value}, {"validation/loss": value}])
    assert outcome.host["best"] == {"metric": "validation/loss", "value": 9.0, "step": 10}
    assert outcome.host["bad_evaluations"] == 2
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert (checkpoints.best(), checkpoints.latest()) == (10, 20)
    assert not any(isinstance(r.get("validation/loss"), float) and not math.isfinite(r["validation/loss"]) for r in records(tmp_path))


@pytest.mark.parametrize(
    ("settings", "values", "best", "ended"),
    [
        ({}, (3.0, 2.0, 2.5, 2.4), 10, ("finished", 20)),
        ({"mode": "max"}, (3.0, 2.0, 2.5, 4.0), 20, ("finished", 20)),
        ({"minimum_delta": 0.5}, (3.0, 2.6, 2.5, 2.4), 20, ("finished", 20)),
        ({"minimum_delta": 1.0}, (3.0, 2.6, 2.5, 2.4), 5, ("finished", 20)),
        ({"patience": 1}, (3.0, 2.0, 2.5, 2.4), 10, ("stopped_early", 15)),
        ({"patience": 2}, (3.0, 3.0, 3.0, 2.4), 5, ("stopped_early", 15)),
        ({"patience": 2}, (3.0, 3.5, 2.0, 2.4), 15, ("finished", 20)),
    ],
)
def test_best_and_patience(run, settings, values, best, ended):
    outcome, _ = run([{"validation/loss": value} for value in values], **settings)
    assert outcome.host["best"]["step"] == best
    assert (outcome.status, int(outcome.state.step)) == ended


def test_the_training_loss_can_be_watched(run, tmp_path):
    outcome, _ = run()
    losses = {r["step"]: r["train/loss"] for r in records(tmp_path)}
    assert set(losses) == {5, 10, 15, 20}
    assert outcome.host["best"]["value"] == min(losses.values())


def test_a_monitor_that_no_evaluation_gives_is_named(run):
    with pytest.raises(ConfigError, match=r"train.monitor='validation/los' is no metric of this run; did you mean 'validation/loss'\?"):
        run([{"validation/loss": 1.0}], monitor="validation/los")


def test_skipped_updates_are_counted_and_left_out_of_the_means(run, tmp_path):
    outcome, _ = run(bad=(7, 8))
    assert [r["skipped"] for r in records(tmp_path)] == [0, 2, 0, 0]
    assert all(math.isfinite(r["train/loss"]) for r in records(tmp_path))
    assert int(outcome.state.extra["skipped"]["total"]) == 2


def test_only_skips_in_a_row_end_a_run(run):
    """Between the two rows of five lies a window without any skip, which must not be passed over."""
    outcome, _ = run(bad=(*range(1, 6), *range(11, 16)), skip_limit=6)
    assert outcome.status == "finished"
    assert int(outcome.state.extra["skipped"]["total"]) == 10


def test_too_many_in_a_row_end_a_run_with_their_examples(run, batches):
    with pytest.raises(Diverged, match="4 updates in a row had a non-finite loss or gradient, the last at step 11") as error:
        run(bad=(3, *range(8, 13)), skip_limit=4)  # seen at the log point at step 15
    assert error.value.step == 11
    assert error.value.indices == {str(step): batches[step % len(batches)]["index"].tolist() for step in range(7, 11)}
