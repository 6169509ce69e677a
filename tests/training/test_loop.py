"""The loop: its order, what the host remembers, what counts as best, and how a run ends."""

import dataclasses
import itertools
import json
import math
import time

import jax
import numpy as np
import pytest
from etils import epath

from research.core.build import build
from research.core.config import compose
from research.core.errors import ConfigError
from research.data.dataset import Arrays
from research.data.loader import Loader
from research.data.on_device import place
from research.data.preprocess import Preprocessor
from research.training import log
from research.training.checkpoint import Checkpoints
from research.training.clock import Clock
from research.training.loop import CompiledAnew, Diverged, Loop, Settings, new_host
from research.training.parallel import Jit, create

JIT = Jit()


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

    def call(scores=(), bad=(), batches=batches, folder=tmp_path, parallel=JIT, start=0, **settings):
        step, batches = make_step(), Repeated(batches, bad) if isinstance(batches, list) else batches
        settings = Settings(**{"steps": 20, "log_every": 5, "eval_every": 5, "monitor": "validation/loss" if scores else "train/loss", **settings})
        given, seen = itertools.chain(scores, itertools.repeat({})), []

        def evaluate(state):
            seen.append(("evaluate", int(state.step)))
            return next(given)

        hook = lambda state, at: seen.append(("hook", at))  # noqa: E731  # one line says it
        record = log.Log(epath.Path(folder), 0, 20, tensorboard=False, progress="none")
        with Checkpoints(folder, settings.keep) as checkpoints:
            loop = Loop(step, settings, parallel, batches, checkpoints, record, evaluate, Clock(), (hook,))
            state = dataclasses.replace(create(step, jax.random.key(0), batches[0], {"learning_rate": 1e-2}), step=np.int32(start))
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
        ({"chunk": 0}, "train.chunk=0: must be at least 1"),
        ({"chunk": 20}, "train.log_every=10: train.chunk=20 does not divide it; the nearest that it divides is 20"),
        ({"chunk": 7, "steps": 1000}, "train.steps=1000: train.chunk=7 does not divide it; the nearest that it divides is 1001"),
        ({"chunk": 5, "stop_at": 503}, "train.stop_at=503: train.chunk=5 does not divide it; the nearest that it divides is 505"),
        ({"chunk": 10, "eval_every": 3}, "train.eval_every=3: train.chunk=10 does not divide it; the nearest that it divides is 10"),
        ({"chunk": 10, "save_every": 25}, "train.save_every=25: train.chunk=10 does not divide it; the nearest that it divides is 20"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**settings)


def test_epochs_become_steps():
    settings = Settings(steps=None, epochs=3, eval_every="epoch").resolved(7)
    assert (settings.steps, settings.epochs, settings.eval_every) == (21, None, 7)
    assert Settings(steps=10).resolved(7) == Settings(steps=10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"steps": None, "epochs": 3},
            "train.epochs=3: 69 steps, 23 an epoch, which train.chunk=10 does not divide; the nearest that does is train.chunk=3",
        ),
        ({"eval_every": "epoch"}, "train.eval_every=epoch: 23 steps, 23 an epoch, .* the nearest that does is train.chunk=1$"),
    ],
)
def test_epochs_that_are_no_whole_number_of_chunks(settings, message):
    with pytest.raises(ConfigError, match=message):
        Settings(chunk=10, **settings).resolved(23)
    assert Settings(chunk=10, **settings).resolved(20).chunk == 10


@pytest.fixture
def examples():
    """42 examples of the small classifier, as a split."""
    random = np.random.default_rng(1)
    fields = {"features": random.normal(size=(42, 5)).astype(np.float32), "label": random.integers(0, 3, 42).astype(np.int32)}
    return Arrays(fields, Preprocessor({}))


def test_the_next_batch_is_taken_before_the_step_at_a_log_point_is_waited_for(run, batches, tmp_path):
    class Watched(Repeated):
        def iterate(self, start, stop, put):
            for step in range(start, stop):
                written.append(len(records(tmp_path)))
                yield put(self[step])

    written = []
    run(batches=Watched(batches), log_every=5, eval_every=None)
    assert written == [0] * 6 + [1] * 5 + [2] * 5 + [3] * 4


def test_chunks_write_evaluate_and_save_as_single_steps_do(run, tmp_path, examples):
    kept = []
    for chunk in (1, 5):
        folder = tmp_path / str(chunk)
        loader = Loader(place(examples, chunk), 16)
        outcome, seen = run([{"validation/loss": 1.0}] * 4, batches=loader, folder=folder, chunk=chunk, log_every=10, save_every=5, keep="all")
        losses = [{name: r[name] for name in ("step", "train/loss", "learning_rate", "skipped")} for r in records(folder) if "train/loss" in r]
        kept.append((losses, seen, {at: (host["best"], [step for step, _ in host["window"]]) for at, host in hosts(folder).items()}))
        assert (outcome.status, int(outcome.state.step)) == ("finished", 20)
    (a, *single), (b, *chunked) = kept
    assert single == chunked
    assert chunked[1][15] == ({"metric": "validation/loss", "value": 1.0, "step": 5}, [])  # an evaluation writes what is there
    assert [r["step"] for r in a] == [5, 10, 15, 20]
    assert all(x[name] == pytest.approx(y[name], abs=1e-5) for x, y in zip(a, b, strict=True) for name in x)


def test_a_chunk_that_diverges_names_its_steps(run, tmp_path, examples):
    bad = Arrays({**examples.raw, "features": np.full_like(examples.raw["features"], np.nan)}, examples.preprocessor)
    loader = Loader(place(bad, 5), 16)
    with pytest.raises(Diverged, match="7 updates in a row had a non-finite loss or gradient, the last at step 7") as error:
        run(batches=loader, chunk=5, skip_limit=7, log_every=10, eval_every=None)
    assert error.value.indices == {str(step): loader.indices(step).tolist() for step in range(7)}


def test_no_run_goes_on_from_inside_a_chunk(run, examples):
    with pytest.raises(ConfigError, match=r"train.chunk=5 does not divide 3, the step to go on from; use train.chunk=1, or another checkpoint"):
        run(batches=Loader(place(examples, 5), 16), chunk=5, start=3)


class Shorter(Repeated):
    """Its batches are cut at the 12th step."""

    def __getitem__(self, step):
        return {name: values[: 16 if step < 11 else 12] for name, values in super().__getitem__(step).items()}


def test_a_step_that_is_compiled_anew_is_told_with_the_shape_that_changed(run, batches, monkeypatch):
    lines = []
    monkeypatch.setattr(log.Log, "line", lambda _, text: lines.append(text))
    message = "step 12 compiled anew: features 16 x 5 -> 12 x 5, index 16 -> 12, label 16 -> 12, mask 16 -> 12"
    with pytest.warns(CompiledAnew, match=message) as told:
        run(batches=Shorter(batches))
    assert len(told) == 1
    assert f"warning: {message}" in lines


def test_another_type_is_told_too(run, batches):
    class Wider(Repeated):
        def __getitem__(self, step):
            return {**(batch := super().__getitem__(step)), "label": batch["label"].astype(np.int8 if step > 5 else np.int32)}

    with pytest.raises(CompiledAnew, match=r"step 7 compiled anew: label int32 -> int8$"):  # in a test a warning is an error
        run(batches=Wider(batches))


def test_the_host_waits_for_the_device_at_log_points_only(run, monkeypatch):
    """Every array that leaves a step is a spy, which tells how many steps had been dispatched when it was looked at."""
    dispatched, looked = [], []

    class Spy:
        def __init__(self, array):
            self.array = array

        def is_ready(self):
            return self.array.is_ready()

        def __array__(self, dtype=None, copy=None):
            looked.append(len(dispatched))
            return np.asarray(self.array)

    class Watched(Jit):
        def train(self, step):
            compiled = super().train(step)

            def call(state, frozen, batch):
                state, metrics = compiled(state, frozen, batch)
                dispatched.append(1)
                return state, jax.tree.map(Spy, metrics)

            return call

    def refuse(*_):
        raise AssertionError("waited for the device")

    monkeypatch.setattr(jax, "block_until_ready", refuse)
    run(parallel=Watched(), eval_every=None, save_every=100, log_every=5)
    assert set(looked) == {5, 10, 15, 20}
    assert len(looked) % 20 == 0


@pytest.mark.parametrize("is_busy", [True, False])
def test_only_an_idle_device_waits_for_data(run, batches, is_busy):
    class Result:
        def __init__(self, array):
            self.array = array

        def is_ready(self):
            return not is_busy

        def __array__(self, dtype=None, copy=None):
            return np.asarray(self.array)

    class Fake(Jit):
        def train(self, step):
            def call(state, frozen, batch):
                state, metrics = compiled(state, frozen, batch)
                return state, jax.tree.map(Result, metrics)

            compiled = super().train(step)
            return call

    class Slow(Repeated):
        def __getitem__(self, step):
            time.sleep(0.01)
            return super().__getitem__(step)

    outcome, _ = run(batches=Slow(batches), parallel=Fake(), eval_every=None, log_every=20)
    waited = outcome.host["seconds"]["wait"]
    assert waited < 0.1 if is_busy else waited > 0.2  # the first of 20 batches is waited for in any case


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
