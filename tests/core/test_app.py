import logging
import os
import subprocess
import sys
import textwrap

import jax
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from research.core import app, errors
from research.core.config import compose


def verb(config):
    """Fails as its config says."""
    seen.append(config)
    kind = {
        1: ValueError,
        2: errors.ConfigError,
        3: errors.DivergedError,
        4: errors.CheckpointError,
        5: errors.FolderInUseError,
        75: errors.Interrupted,
    }
    if config.get("seed") in kind:
        raise kind[config.seed](f"seed {config.seed}\nwas bad")
    if config.get("seed") == 99:
        raise KeyboardInterrupt
    if config.get("note") == "warning":
        logging.getLogger("some.library").warning("careful")
    if config.get("note") == "interpolation":
        return config.model.width + config.objective.modul
    return config.get("seed")


seen = []


@pytest.fixture
def run(conf, capsys, monkeypatch, tmp_path):
    """Runs the verb in process: (exit code, stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)
    seen.clear()

    def call(*argv, name="train"):
        code = app.main(verb, name, [*argv, "--config-path", conf])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


def test_a_verb_gets_its_config_and_nothing_is_left_behind(run, tmp_path):
    assert run("seed=7", "model=large", "name=ü b") == (0, "", [])
    (config,) = seen
    assert (config.seed, config.model.dropout, config.name) == (7, 0.5, "ü b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("seed", "line"), [(1, "ValueError: seed 1 was bad"), (2, "seed 2 was bad"), (3, None), (4, None), (5, None), (75, None)])
def test_every_error_is_one_line_and_its_code(run, seed, line):
    code, out, err = run(f"seed={seed}")
    assert (code, out, err) == (seed, "", [f"error: {line or f'seed {seed} was bad'}"])


def test_ctrl_c_is_resumable(run):
    assert run("seed=99")[::2] == (75, ["error: interrupted; nothing had been saved"])


@pytest.mark.parametrize("flag", ["debug=true", "debug.traceback=true"])
def test_debug_shows_the_traceback_above_the_line(run, flag):
    code, _, err = run("seed=1", flag)
    assert (code, err[0], err[-1]) == (1, "Traceback (most recent call last):", "error: ValueError: seed 1 was bad")
    code, _, err = run("sede=1", flag)  # found before the config is composed
    assert (code, err[0]) == (2, "Traceback (most recent call last):")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sede=1"], "did you mean 'seed'?"),
        (["--foo"], "error: command line: unrecognized arguments: --foo; see --help"),
        (["--config-path", "relative"], "error: --config-path=relative must be absolute"),
        (["hydra/launcher=basik"], "did you mean 'basic'?"),
        (["hydra.launcer=1"], "Could not override 'hydra.launcer'"),
        (["--config-dir", "/not/there"], "Additional config directory '/not/there' not found"),
        (["+seed=2"], "An item is already at 'seed'"),
    ],
)
def test_a_bad_command_line_is_a_bad_config(conf, capsys, argv, message):
    code = app.main(verb, "train", ["--config-path", conf, *argv])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith("error: ")
    assert message in line


def test_a_missing_value_is_named_before_the_verb_runs(run):
    assert run(name="evaluate") == (2, "", ["error: run is not given; add run=VALUE"])
    assert run("run=x", name="evaluate")[0] == 0
    assert len(seen) == 1


def test_a_key_that_the_verb_does_not_find_is_a_bad_config(run):
    code, _, (line,) = run("note=interpolation")
    assert code == 2
    assert "modul" in line


def test_a_multirun_goes_on_and_reports_the_worst(run, tmp_path):
    code, out, err = run("-m", "seed=3,0,1", "model=small,large")
    assert code == 3
    assert [config.seed for config in seen] == [3, 3, 0, 0, 1, 1]
    assert out.splitlines()[1] == "job 1: seed=3 model=large"
    assert err[-1].startswith("error: 4 of 6 jobs failed: [seed=3 model=small] seed 3 was bad (exit code 3); ")
    assert "[seed=1 model=large] ValueError: seed 1 was bad (exit code 1)" in err[-1]
    assert len(err) == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["multirun.yaml"]


def test_a_multirun_without_failure_is_done(run):
    assert run("-m", "seed=0,6")[0] == 0
    assert len(seen) == 2


def test_a_multirun_stops_where_it_is_interrupted(run):
    code, _, err = run("-m", "seed=0,75,0,0")
    assert (code, len(seen)) == (75, 2)
    assert err[-1].startswith("error: 1 of 2 jobs failed: [seed=75]")


def test_a_sweep_with_a_typo_starts_no_job(run):
    code, _, (line,) = run("-m", "seed=0,6", "model=small,larg")
    assert (code, seen) == (2, [])
    assert "did you mean 'large'" in line


@pytest.mark.parametrize("argv", [["--cfg", "job"], ["--help"], ["--hydra-help"], ["--info", "defaults"], ["-sc", "install=bash"]])
def test_hydras_own_options_work(run, argv):
    code, out, err = run(*argv)
    assert (code, err, seen) == (0, [], [])
    assert out


def test_the_printed_config_can_be_asked_for_in_part(run):
    code, out, _ = run("--cfg", "job", "--package", "optimizer", "optimizer.learning_rate=0.5")
    assert (code, out.splitlines()[1:]) == (0, ["_target_: optax.sgd", "learning_rate: 0.5"])


def test_completion_names_the_options_of_a_group(run, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "research-train model=")
    monkeypatch.setenv("COMP_POINT", "21")
    assert run("-sc", "query=bash")[1].split() == ["model=large", "model=small"]


def test_the_process_is_as_before(run, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    root = logging.getLogger()

    def state():
        return sys.argv[:], os.getcwd(), root.handlers[:], root.level, GlobalHydra.instance().hydra, HydraConfig.instance().cfg, dict(os.environ)

    before = state()
    for argv in (["seed=1"], ["sede=1"], ["-m", "seed=99"], ["--info", "plugins"], ["hydra.verbose=true"]):
        run(*argv)
        assert state() == before


def test_a_warning_is_shown_once_whatever_a_library_did_to_logging(run, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [*root.handlers, logging.StreamHandler()])
    assert run("note=warning")[2] == ["WARNING: careful"]


def test_it_runs_inside_itself(conf, capsys):
    def outer(config):
        assert app.main(verb, "train", ["--config-path", conf, "seed=6"]) == 0
        assert compose(["seed=3"], conf=conf).seed == 3
        return HydraConfig.get().job.name

    assert app.main(outer, "train", ["--config-path", conf]) == 0
    assert capsys.readouterr().err == ""


def test_flags_hold_for_one_job(conf):
    def read(config):
        found.append((jax.config.jax_debug_nans, jax.config.jax_disable_jit))

    found: list[tuple[bool, bool]] = []
    for flags in (["debug.nans=true", "debug.disable_jit=true"], []):
        assert app.main(read, "train", ["--config-path", conf, *flags]) == 0
    assert found == [(True, True), (False, False)]


def test_devices_cannot_change_once_jax_runs(run):
    jax.devices()
    code, _, (line,) = run("debug.cpu_devices=3")
    assert (code, line) == (2, "error: debug.cpu_devices=3 comes too late: JAX already runs in this process")


@pytest.mark.parametrize("value", ["0", "many", "1.5"])
def test_devices_are_counted(run, value):
    code, _, (line,) = run(f"debug.cpu_devices={value}")
    assert (code, line.endswith(": must be a whole number of at least 1")) == (2, True)


def test_in_a_process_of_its_own(conf, tmp_path):
    (tmp_path / "program.py").write_text(
        textwrap.dedent("""
            import jax
            from research.core import app

            def count(config):
                print(config.seed, jax.device_count())

            raise SystemExit(app.main(count, "train"))
        """)
    )
    command = [sys.executable, "program.py", "--config-path", conf, "debug.cpu_devices=3", "seed=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "4 3\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]
