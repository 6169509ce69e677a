"""hydra/sweeper=search: what is asked, told and kept, with a launcher that plays the runs; and the whole of it on real ones."""

import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import types

import numpy as np
import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy import stats
from scipy.stats import qmc

from research.core.errors import ConfigError, FolderInUseError
from research.core.overrides import Composer
from research.sweep import search
from research.sweep.ledger import Ledger

X, Y = "optimizer.learning_rate=interval(0.0,1.0)", "+model.y=interval(0.0,1.0)"


class Launcher:
    """Plays each job: the function of its swept numbers is what the run returns; raises what is in `stops` at the launch of that number."""

    def __init__(self, function, stop=None):
        self.function, self.stop, self.jobs = function, stop, []

    def launch(self, jobs, initial_job_idx):
        if self.stop is not None and len(self.jobs) >= self.stop:
            raise KeyboardInterrupt
        self.jobs += jobs
        return [types.SimpleNamespace(return_value=self._result(job)) for job in jobs]

    def _result(self, job):
        values = [float(line.rpartition("=")[2]) for line in job if re.match(r"optimizer\.|\+model\.", line)]
        result = self.function(*values)
        return {"metrics": {"validation/loss": result}, "best": None, "status": "finished"} if isinstance(result, float) else result


@pytest.fixture(scope="module")
def setting():
    """(loader, config) as Hydra gives them to a sweeper, for a folder."""
    loader = Composer("train")._loader

    def make(folder):
        return loader, loader.load_configuration(
            "train", ["experiment=digits_mlp", f"hydra.sweep.dir='{folder}'"], RunMode.MULTIRUN, from_shell=False
        )

    return make


@pytest.fixture
def searched(setting, tmp_path, monkeypatch):
    """searched(function, *overrides, folder=…, stop=…, **settings): (launcher, told trials by number, search.json)."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # optuna waits for the disk at each line

    def run(function, *overrides, folder="sweep", stop=None, **settings):
        path = tmp_path / folder
        launcher = Launcher(function, stop)
        loader, config = setting(path)
        body = search.Search(launcher, loader, config, ["experiment=digits_mlp", *(overrides or (X, Y))], **settings)  # type: ignore[arg-type]  # a launcher and a loader of this test
        with contextlib.suppress(KeyboardInterrupt):
            body.run()
        trials = [trial for trial in body.study.get_trials() if trial.state.is_finished()]
        return launcher, trials, json.loads((path / "search.json").read_text())

    return run


def planted(x, y):
    """A narrow valley with its lowest point, 0, at (0.3, 0.7)."""
    return (x - 0.3) ** 2 + 4 * (y - 0.7) ** 2


def outcome(trials):
    return [(trial.number, trial.params, trial.values, trial.state) for trial in trials]


@pytest.mark.parametrize(
    ("line", "present", "wanted"),
    [
        ("a=interval(16,256)", 64, IntDistribution(16, 256)),
        ("a=tag(log,interval(16,256))", 64, IntDistribution(16, 256, log=True)),
        ("a=interval(0,1)", 0.5, FloatDistribution(0.0, 1.0)),
        ("a=interval(16.0,256)", 64, FloatDistribution(16.0, 256.0)),
        ("a=int(interval(1,3))", None, IntDistribution(1, 3)),
        ("a=tag(log, interval(1e-5,1e-1))", 0.001, FloatDistribution(1e-5, 1e-1, log=True)),
        ("a=range(2,9,3)", 1, IntDistribution(2, 8, step=3)),
        ("a=range(9,2,-3)", 1, IntDistribution(3, 9, step=3)),
        ("a=choice(1,b,2.5)", None, CategoricalDistribution(("1", "b", "2.5"))),
        ("a=1,b", None, CategoricalDistribution(("1", "b"))),
        ("model=glob(m*)", None, CategoricalDistribution(("mlp",))),
    ],
)
def test_a_space_is_read_from_the_override(line, present, wanted):
    (override,) = OverridesParser.create(Composer("train")._loader).parse_overrides([line])
    assert search.axis(override, present).distribution == wanted


def test_a_range_of_fractions_has_its_own_values():
    (override,) = OverridesParser.create().parse_overrides(["a=range(0,1,0.1)"])
    axis = search.axis(override)
    lines = [axis.line(axis.at((i + 0.5) / 10)) for i in range(10)]
    assert [float(line.removeprefix("a=")) for line in lines] == pytest.approx(np.arange(10) / 10)
    assert [axis.line(axis.at(axis.place(axis.value(i)))) for i in range(10)] == lines


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a=interval(1,1)", "the interval is empty"),
        ("a=interval(3,1)", "the interval is reversed; write interval(1,3)"),
        ("a=tag(log,interval(0,1))", "0 has no logarithm"),
        ("a=tag(lag,interval(1,2))", "tag 'lag' is unknown; did you mean 'log'?"),
        ("a=range(5,1)", "the range holds no value"),
        ("model=glob(none*)", "there is nothing to choose from"),
        ("a=tag(log,choice(1,2))", "only numbers between bounds can be searched by their logarithm"),
    ],
)
def test_a_space_that_is_none_is_one_line(line, said):
    (override,) = OverridesParser.create(Composer("train")._loader).parse_overrides([line])
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        search.axis(override)
    assert repr(line) in str(error.value)
    assert "\n" not in str(error.value)


def test_grid_tries_all_in_the_order_of_a_plain_multirun(searched):
    overrides = ("optimizer.learning_rate=range(1,4)", "+model.y=choice(7,5)")
    launcher, trials, told = searched(lambda x, y: x * y, *overrides, sampler="grid", at_once=4)
    lines = [(job[-2], job[-1]) for job in launcher.jobs]
    assert lines == [(f"optimizer.learning_rate={x}", f"+model.y={y}") for x, y in itertools.product((1, 2, 3), (7, 5))]
    assert told["best"][0]["overrides"] == ["optimizer.learning_rate=1", "+model.y=5"]
    assert len(trials) == 6


def test_sobol_is_the_sequence_of_scipy_and_a_choice_shares_it_equally(searched):
    _, trials, _ = searched(planted, X, "+model.y=choice(1,2,3,4)", sampler="sobol", trials=16, seed=3)
    wanted = qmc.Sobol(2, scramble=True, rng=3).random(16)
    np.testing.assert_allclose([trial.params["optimizer.learning_rate"] for trial in trials], wanted[:, 0], rtol=1e-5)
    assert [trial.params["+model.y"] for trial in trials] == [str(int(4 * u) + 1) for u in wanted[:, 1]]


def test_random_draws_evenly_in_the_logarithm_and_whole_numbers_alike(searched):
    overrides = ("optimizer.learning_rate=tag(log,interval(1e-4,1.0))", "+model.y=int(interval(1,4))")
    launcher, trials, _ = searched(planted, *overrides, sampler="random", trials=200, at_once=200)
    logs = [math.log10(trial.params["optimizer.learning_rate"]) for trial in trials]
    assert stats.kstest(logs, stats.uniform(-4, 4).cdf).pvalue > 0.01
    counts = [sum(trial.params["+model.y"] == i for trial in trials) for i in (1, 2, 3, 4)]
    assert stats.chisquare(counts).pvalue > 0.01
    assert all(re.fullmatch(r"\+model\.y=[1-4]", job[-1]) for job in launcher.jobs)  # no 1.0


@pytest.mark.slow
def test_tpe_beats_random_on_a_planted_objective(searched):
    best = {
        sampler: [searched(planted, folder=f"{sampler}{seed}", sampler=sampler, trials=40, seed=seed)[2]["best"][0] for seed in range(10)]
        for sampler in ("tpe", "random")
    }
    tpe, random = ([entry["values"]["validation/loss"] for entry in best[sampler]] for sampler in ("tpe", "random"))
    assert stats.mannwhitneyu(tpe, random, alternative="less").pvalue < 0.05


def test_cmaes_closes_in_where_random_does_not(searched):
    best = {name: searched(planted, folder=name, sampler=name, trials=120, at_once=6)[2]["best"][0]["values"] for name in ("cmaes", "random")}
    assert best["cmaes"]["validation/loss"] < 0.01 * best["random"]["validation/loss"]


@pytest.mark.parametrize(
    ("sampler", "at_once"),
    [pytest.param("tpe", 1, marks=pytest.mark.slow), ("tpe", 3), ("cmaes", 2), pytest.param("random", 3, marks=pytest.mark.slow)],
)
def test_a_search_that_was_killed_anywhere_goes_on_as_one_that_was_not(searched, tmp_path, sampler, at_once):
    settings = {"sampler": sampler, "at_once": at_once, "trials": 11, "startup": 4}
    _, trials, told = searched(planted, **settings)
    wanted, journal = outcome(trials), (tmp_path / "sweep" / "search.journal").read_bytes()
    for i, length in enumerate(np.linspace(1, len(journal) - 1, 7).astype(int)):
        folder = tmp_path / f"killed{i}"
        folder.mkdir()
        (folder / "search.journal").write_bytes(journal[:length])  # most are cut within a line
        _, again, other = searched(planted, folder=folder.name, **settings)
        assert outcome(again) == wanted, length
        assert other == told


def test_stopped_by_ctrl_c_it_goes_on_and_more_trials_may_follow(searched):
    launcher, trials, _ = searched(planted, trials=6, stop=4)
    assert (len(launcher.jobs), len(trials)) == (4, 4)
    launcher, trials, _ = searched(planted, trials=6)
    assert (len(launcher.jobs), len(trials)) == (2, 6)
    launcher, trials, _ = searched(planted, trials=9)
    assert (len(launcher.jobs), len(trials)) == (3, 9)
    _, undisturbed, _ = searched(planted, folder="other", trials=9)
    assert outcome(trials) == outcome(undisturbed)


def test_a_failed_trial_is_told_and_the_search_goes_on(searched):
    launcher, trials, told = searched(lambda x, y: None if x < 0.5 else planted(x, y), trials=12, sampler="random", at_once=4)
    failed = [trial for trial in trials if trial.state is optuna.trial.TrialState.FAIL]
    assert {trial.number for trial in failed} == {trial.number for trial in trials if trial.params["optimizer.learning_rate"] < 0.5}
    assert 0 < len(failed) < 12
    assert told["trials"]["fail"] == len(failed)
    again, _, _ = searched(planted, X, Y, "retry=true", trials=12, sampler="random", at_once=4)
    assert sorted(job[-2:] for job in again.jobs) == sorted(job[-2:] for job in launcher.jobs if float(job[-2].rpartition("=")[2]) < 0.5)


def test_a_score_that_is_no_number_is_a_failure(searched):
    _, trials, told = searched(lambda x, y: math.nan, trials=2)
    assert told["best"] == []
    assert told["trials"]["fail"] == len(trials) == 2


def test_the_same_values_are_run_once(searched):
    launcher, trials, _ = searched(lambda x: x, "optimizer.learning_rate=choice(1,2,3)", sampler="random", trials=12, at_once=4)
    assert len(launcher.jobs) == 3
    assert {trial.values[0] for trial in trials} == {1.0, 2.0, 3.0}
    assert all(trial.values[0] == float(trial.params["optimizer.learning_rate"]) for trial in trials)


def test_several_metrics_give_the_pareto_front(searched):
    def run(x, y):
        return {"metrics": {"validation/accuracy": 1 - planted(x, y)}, "best": None, "status": "finished", "params": int(1000 * x)}

    _, trials, told = searched(run, metric=["validation/accuracy", "params"], trials=40, sampler="random", at_once=40)
    assert told["direction"] == ["max", "min"]
    points = np.array([trial.values for trial in trials]) * [-1, 1]
    wanted = [i for i, point in enumerate(points) if not any(np.all(other <= point) and np.any(other < point) for other in points)]
    assert len(wanted) > 2
    assert {entry["trial"] for entry in told["best"]} == set(wanted)
    values = [entry["values"]["validation/accuracy"] for entry in told["best"]]
    assert values == sorted(values, reverse=True)


def test_a_metric_that_no_run_writes_is_named_at_the_first_trial(searched):
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.metric='validation/lose': no run writes it; did you mean 'validation/loss'\?"):
        searched(planted, metric="validation/lose")


def test_another_search_in_the_folder_is_refused(searched):
    searched(planted, trials=2)
    with pytest.raises(ConfigError, match=r"holds another search .*: choose another sweep_dir"):
        searched(planted, "optimizer.learning_rate=interval(0.0,0.5)", Y, trials=2)


def test_two_searches_at_once_are_refused(searched, tmp_path):
    def run(x, y):
        with pytest.raises(FolderInUseError, match="is in use by another search"):
            searched(planted, trials=1)
        return planted(x, y)

    assert len(searched(run, trials=1)[1]) == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("hydra.sweeper.sampler=tpa",), "hydra.sweeper.sampler='tpa' is unknown; did you mean 'tpe'?"),
        (("hydra.sweeper.pruner=asah",), "hydra.sweeper.pruner='asah' is unknown; did you mean 'asha'?"),
        (("hydra.sweeper.sampler=grid",), "hydra.sweeper.sampler=grid: optimizer.learning_rate is an interval; use range(START,STOP,STEP)"),
        (("hydra.sweeper.trials=0",), "hydra.sweeper.trials=0: must be a whole number of at least 1"),
        (("optimizer.lerning_rate=interval(0,1)",), "override 'optimizer.lerning_rate=interval(0,1)': train has no key"),
        (("hydra.sweeper.storage=nodb://x",), "hydra.sweeper.storage='nodb://x' cannot be opened"),
        (("hydra.sweeper.metric=[validation/loss,params]", "hydra.sweeper.pruner=asha"), "trials are pruned by one metric"),
    ],
)
def test_bad_input_is_one_line(sweep, argv, said):
    told, trials = sweep("hydra/sweeper=search", "optimizer.learning_rate=interval(1e-4,1e-1)", *argv)
    assert (told.code in (1, 2), trials, len(told.err)) == (True, [], 1)
    assert told.err[0].startswith("error: ")
    assert said in told.err[0]


def test_nothing_to_search_is_said(sweep):
    told, _ = sweep("hydra/sweeper=search")
    assert told.code == 2
    assert "no override lists values to choose from" in told.err[-1]


def test_without_optuna_it_says_what_to_install(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "research.sweep.search", raising=False)
    told, _ = sweep("hydra/sweeper=search", "seed=range(3)")
    assert told.code == 2
    assert told.err[-1] == "error: hydra/sweeper=search needs optuna: pip install 'ontogeny[sweeps]'"


@pytest.mark.parametrize("storage", ["journal", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_real_trials_have_folders_and_the_same_command_does_nothing(sweep, result, storage):
    argv = ["hydra/sweeper=search", "hydra.sweeper.trials=3", "optimizer.learning_rate=tag(log,interval(1e-4,1e-1))", "train.steps=10"]
    if storage == "sqlite":
        argv += [f"hydra.sweeper.storage=sqlite:///{sweep.path.parent}/search.db", "hydra/launcher=compiled", "hydra.sweeper.at_once=3"]
    told, trials = sweep(*argv)
    assert told.code == 0, told.err
    assert [trial.state for trial in trials] == ["finished"] * 3
    best = min(trials, key=lambda trial: trial.score["value"])
    (entry,) = json.loads((sweep.path / "search.json").read_text())["best"]
    assert (entry["run"], entry["values"]["validation/loss"]) == (best.run, result(sweep.path / best.run)["metrics"]["validation/loss"])
    assert set(entry["overrides"]) <= set(best.overrides)
    told, again = sweep(*argv)
    assert (told.code, again) == (0, trials)
    assert "3 trials were told before" in told.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("joblib", "hydra.launcher.n_jobs=2"), ("submitit_local", "hydra.launcher.timeout_min=5"), ("ray",)], ids=lambda x: x[0]
)
def test_other_launchers_run_what_the_search_chooses(typed, tmp_path, launcher):
    """In a process of its own: they fork, or start servers. Two at once, so that the second pair knows how the first one went."""
    name, *argv = launcher
    if name == "ray":
        pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    asked = ("hydra/sweeper=search", "hydra.sweeper.trials=4", "hydra.sweeper.at_once=2", "optimizer.learning_rate=tag(log,interval(1e-4,1e-1))")
    command = [sys.executable, "-m", "research.train", "-m", *typed, *asked, f"hydra/launcher={name}", *argv, f"sweep_dir={tmp_path / name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [trial.state for trial in Ledger(tmp_path / name).trials()] == ["finished"] * 4
    (entry,) = json.loads((tmp_path / name / "search.json").read_text())["best"]
    assert (tmp_path / name / entry["run"] / "result.json").exists()
