"""What is compiled: each program once in a run, and nothing at all where only values change. Counted by JAX's own events."""

import collections

import jax
import pytest

QUIET = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none")
VALUES = ("train.values=[optimizer.learning_rate,optimizer.weight_decay,model.dropout,objective.label_smoothing]",)
MLP = ("model.width=11", "model.depth=1", "train.steps=20", "train.log_every=5", "train.accumulate=2", *VALUES, *QUIET)
GPT = (
    "experiment=quickstart",
    "data.time=8",
    "data.batch=4",
    "model.width=12",
    "model.depth=1",
    "model.heads=2",
    "model.hidden=8",
    "schedule.warmup=0",
)


@pytest.fixture
def compiled():
    """The number of compilations so far by the name of the program, found anew or in the cache on disk."""
    counts: collections.Counter[str] = collections.Counter()

    def listen(event, duration, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            counts[facts["fun_name"]] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listen)


def test_each_program_of_a_run_is_compiled_once(command, compiled, tmp_path):
    told = command("train", *MLP, "train.eval_every=4", "data.validation=200", "data.test=200", f"run_dir={tmp_path}")
    assert told.code == 0, told.err
    assert compiled["jit(first_state)"] == 1
    assert compiled["jit(<lambda>)"] == 1  # the step: for 20 updates in 5 parts between evaluations
    assert compiled["jit(_measure)"] == 1  # six evaluations of two splits of one size
    assert sum(compiled.values()) < 12  # the rest are single operations


@pytest.mark.slow
def test_other_values_compile_nothing(command, compiled, tmp_path):
    argv = (*MLP, "train.eval_every=null", "model.width=13")
    assert command("train", *argv, f"run_dir={tmp_path / 'first'}", "model.dropout=0.1").code == 0
    assert compiled["jit(<lambda>)"] == 1
    compiled.clear()
    others = ("optimizer.learning_rate=0.01", "optimizer.weight_decay=0.2", "model.dropout=0.3", "objective.label_smoothing=0.1", "seed=5")
    assert command("train", *argv, *others, f"run_dir={tmp_path / 'second'}").code == 0
    assert not compiled
    assert command("train", *argv, "model.width=14", f"run_dir={tmp_path / 'third'}").code == 0
    assert compiled["jit(<lambda>)"] == 1  # another shape does compile: the count is no constant 0


@pytest.mark.slow
def test_a_language_model_is_sampled_by_two_programs_however_often(command, compiled, tmp_path):
    argv = (*GPT, *QUIET, "train.steps=12", "train.eval_every=3", f"run_dir={tmp_path / 'run'}")
    assert command("train", *argv).code == 0
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 4
    names = ("jit(<lambda>)", "jit(_measure)", "jit(_prefill)", "jit(_advance)")
    assert {name: compiled[name] for name in names} == {"jit(<lambda>)": 1, "jit(_measure)": 1, "jit(_prefill)": 1, "jit(_advance)": 1}
    compiled.clear()
    for prompt, more in (("The", ()), ("A longer one", ("temperature=0.3", "top_k=3", "tokens=30"))):
        assert command("predict", f"run={tmp_path / 'run'}", f"prompt={prompt}", "tokens=5", *more).code == 0
    assert not {name: count for name, count in compiled.items() if name in names}
