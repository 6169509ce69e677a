"""Compiled programs between processes: used, bounded, and never in the way."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from research.core.cache import cached_programs, default_folder
from research.core.config import compose
from research.core.errors import ConfigError

TRAIN = ("model.width=8", "model.depth=1", "train.steps=20", "train.eval_every=10", "logger.tensorboard=false", "logger.figures=false")


@pytest.fixture
def unset():
    """JAX without a folder of its own, as it is outside tests."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def trained(folder, cache, *argv):
    """(stdout, stderr) of a run in a process that has no cache but that of the user."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "research.train", *TRAIN, "logger.progress=none", f"run_dir={folder}", *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_a_second_process_compiles_nothing_says_nothing_and_ends_in_the_same_state(tmp_path):
    from research.core.folder import read_json

    told = [trained(tmp_path / name, tmp_path / "cache", *argv) for name, argv in (("a", ()), ("b", ()), ("c", ("cache.folder=null",)))]
    assert [err for _, err in told] == ["", "", ""]
    assert ["from the cache" in out for out, _ in told] == [False, True, False]
    a, b, c = (read_json(tmp_path / name / "result.json") for name in "abc")
    assert a["state_sha256"] == b["state_sha256"] == c["state_sha256"]
    assert b["compile_s"] < 0.7 * a["compile_s"]
    assert list((tmp_path / "cache" / "ontogeny" / "programs").glob("*/jit_*"))


def test_a_program_comes_from_the_folder_and_settings_are_given_back(unset, tmp_path):
    before = jax.config.jax_compilation_cache_max_size, jax.config.jax_persistent_cache_min_compile_time_secs
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        with cached_programs({"folder": str(folder), "bytes": 10**6}):
            jax.jit(lambda x: x * 7 + 1)(3.0)
        hits.append(folder.name)
    assert [hit.rpartition("/")[2] for hit in hits] == ["a", "cache_hits", "a", "b"]
    assert jax.config.jax_compilation_cache_dir is None
    assert (jax.config.jax_compilation_cache_max_size, jax.config.jax_persistent_cache_min_compile_time_secs) == before


def test_the_folder_does_not_grow_beyond_its_bytes(unset, tmp_path):
    with cached_programs({"folder": str(tmp_path), "bytes": 12_000}):
        for i in range(6):
            jax.jit(lambda x, i=i: x * i + 1)(3.0)
    kept = list(tmp_path.glob("*-cache"))
    assert 0 < sum(file.stat().st_size for file in kept) <= 12_000
    assert len(kept) < 6


def test_what_jax_was_told_comes_first(tmp_path):
    assert jax.config.jax_compilation_cache_dir  # the tests' own
    before = jax.config.jax_compilation_cache_dir
    with cached_programs({"folder": str(tmp_path / "other"), "bytes": 10}):
        assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "other").exists()


def test_null_is_no_cache(unset):
    with cached_programs({"folder": None, "bytes": 10}):
        assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_written_is_one_line(unset, tmp_path, capsys):
    (tmp_path / "file").touch()
    with cached_programs({"folder": str(tmp_path / "file" / "cache"), "bytes": 10}):
        assert jax.config.jax_compilation_cache_dir is None
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("warning: cache.folder=")
    assert "Not a directory" in told[0]


@pytest.mark.parametrize("size", [0, -1, None, 1.5, True])
def test_a_size_that_is_none_is_refused(unset, size):
    with (
        pytest.raises(ConfigError, match=f"cache.bytes={size}: must be a whole number of at least 1"),
        cached_programs({"folder": "auto", "bytes": size}),
    ):
        pass


def test_the_folder_is_the_users_and_of_this_processor(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    first = default_folder()
    assert first.parent == pathlib.Path("/x/ontogeny/programs")
    monkeypatch.setattr("research.core.cache._processor", lambda: "another")
    assert default_folder() != first


@pytest.mark.parametrize("verb", ["train", "evaluate", "benchmark", "inspect", "report"])
def test_every_verb_has_it(verb):
    assert compose([], verb).cache == {"folder": "auto", "bytes": 2_000_000_000}
