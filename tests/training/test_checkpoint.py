"""Checkpoints: bit for bit there and back, and safe whatever happens to the process, the disk or the files."""

import contextlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.errors import CheckpointError, ConfigError
from research.core.tree import paths, sha256, stack
from research.core.types import State
from research.training import checkpoint, manifest
from research.training.checkpoint import Checkpoints
from research.training.optimizer import Optimizer

OPTIMIZER = Optimizer(optax.adamw, clip=1.0, ema=0.9)
RANDOM = np.random.RandomState(0)
PARAMS = {
    **{f"block_{i}": {"kernel": RANDOM.randn(3, 4).astype(np.float32), "scale": RANDOM.randn(4).astype(np.float32)} for i in range(2)},
    "head": {"kernel": RANDOM.randn(4, 2).astype(np.float32), "half": jnp.arange(3, dtype=jnp.bfloat16), "none": np.zeros((0, 5), np.float32)},
}


def state(step, *, params=PARAMS, impl="threefry2x32", optimizer=OPTIMIZER):
    """A state that differs at every step, as a real one does."""
    params = jax.tree.map(lambda x: (x + step).astype(x.dtype), params)
    extra = {"counts": jnp.full(2, step, jnp.int32), "skipped": {"total": jnp.int32(1), "in_a_row": jnp.int32(0)}}
    return State(jnp.int32(step), params, extra, optimizer.init(params), jax.random.key(step, impl=impl), {"learning_rate": jnp.float32(0.1)})


LIKE = jax.eval_shape(lambda: state(0))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(paths(found).items(), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype, path
        raw = jax.random.key_data if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray
        assert np.asarray(raw(x)).tobytes() == np.asarray(raw(y)).tobytes(), path


def save(checkpoints, *steps, best=()):
    for step in steps:
        checkpoints.save(state(step), {"step": step}, best=step in best)
    checkpoints.wait()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a run, ünïcode"


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_a_state_comes_back_bit_for_bit(folder, impl):
    old = state(7, impl=impl)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(old, {"best": 0.5, "nan": float("nan"), "array": np.float32(2)}, best=True)
        found, host = checkpoints.restore("latest", jax.eval_shape(lambda: old))
    assert_same(found, old)
    assert host == {"best": 0.5, "nan": None, "array": 2.0}
    manifest = json.loads((folder / "checkpoints" / "7" / "manifest.json").read_text())
    assert manifest["state_sha256"] == sha256(old) == sha256(found)
    assert manifest["tree"]["params/head/kernel"] == ["float32", [4, 2]]
    step = jax.jit(lambda s: jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x + x, s), donate_argnums=0)
    jax.block_until_ready(step(found))  # what came back can be trained on, donated, without a warning


def test_the_disk_holds_the_canonical_tree_whether_layers_are_scanned_or_not(folder):
    plain, scanned = state(3), state(3, params=stack(PARAMS))
    with Checkpoints(folder / "plain") as one, Checkpoints(folder / "scanned") as two:
        one.save(plain, {}, best=False)
        two.save(scanned, {}, best=False)
        like = jax.eval_shape(lambda: scanned)
        for checkpoints in (one, two):
            assert_same(checkpoints.restore("latest", LIKE)[0], plain)
            assert_same(checkpoints.restore("latest", like)[0], scanned)


def test_leaves_are_placed_by_the_shardings_of_the_abstract_state(folder):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), LIKE)
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 1)
        found, _ = checkpoints.restore("latest", like)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(found))


def test_the_state_is_copied_before_save_returns(folder):
    overwrite = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 0, x), donate_argnums=0)
    live = state(1)
    live = live.replace(params=jax.tree.map(jnp.asarray, live.params))
    before = jax.tree.map(np.array, live.params)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(live, {}, best=False)
        jax.block_until_ready(overwrite(live.params))
        assert live.params["head"]["kernel"].is_deleted()
        assert_same(checkpoints.restore("latest", LIKE)[0].params, before)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("latest", [10, 25, 30]), ("all", [5, 10, 15, 20, 25, 30]), ("every:15", [10, 15, 25, 30]), ("every:10", [10, 20, 25, 30])],
)
def test_the_latest_the_one_before_the_best_and_what_was_asked_for_are_kept(folder, keep, kept):
    with Checkpoints(folder, keep) as checkpoints:
        save(checkpoints, 5, 10, 15, 20, 25, 30, best=(5, 10))
        assert checkpoints.steps() == kept
        assert (checkpoints.latest(), checkpoints.best()) == (30, 10)
        for which, step in (("latest", 30), ("best", 10), (25, 25)):
            found, host = checkpoints.restore(which, LIKE)
            assert (int(found.step), host) == (step, {"step": step})
            assert_same(found, state(step))


def test_within_the_pace_only_what_a_later_one_cannot_replace_is_written(folder):
    with Checkpoints(folder, keep="every:50", pace_s=3600) as checkpoints:

        def saved(step, *, best=False):
            checkpoints.save(state(step), {"step": step}, best=best)
            checkpoints._written()  # waits for the writer, and begins nothing
            return checkpoints.steps()

        assert saved(10, best=True) == []
        assert saved(20, best=True) == []  # a better one, in the place of the first
        assert saved(30) == [20]  # the best would be lost
        assert saved(40) == [20]
        assert saved(50) == [20, 50]  # asked for
        assert saved(60) == [20, 50]
        found, host = checkpoints.restore("latest", LIKE)
        assert_same(found, state(60))
        assert host == {"step": 60}
        assert checkpoints.best() == 20
        checkpoints._paced -= 3600
        assert saved(70)[-1] == 70
        assert saved(80)[-1] == 70
    with Checkpoints(folder, read_only=True) as checkpoints:  # leaving the block has written the last
        assert checkpoints.steps() == [20, 50, 70, 80]


def test_a_paced_writer_has_its_small_best_in_memory(folder, monkeypatch):
    with Checkpoints(folder, pace_s=3600) as checkpoints:
        for step, best in ((10, True), (20, False)):
            checkpoints.save(state(step), {"step": step}, best=best)
        checkpoints.wait()
        shutil.rmtree(checkpoints.folder / "10" / "state")
        found, host = checkpoints.restore("best", LIKE)
        assert_same(found, state(10))
        assert host == {"step": 10}
        jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state.params), donate_argnums=0)(found)
        assert_same(checkpoints.restore("best", LIKE)[0], state(10))
        monkeypatch.setattr(checkpoint, "_SMALL", 1)  # bytes: from here on none is small
        checkpoints.save(state(30), {"step": 30}, best=True)
        checkpoints.wait()
        shutil.rmtree(checkpoints.folder / "30" / "state")
        assert int(checkpoints.restore("best", LIKE)[0].step) == 20


def test_the_best_is_the_latest_where_none_was_named(folder):
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 1, 2)
        assert checkpoints.best() is None
        assert int(checkpoints.restore("best", LIKE)[0].step) == 2


def test_after_a_rollback_later_steps_are_retired(folder):
    with Checkpoints(folder, "all") as checkpoints:
        save(checkpoints, 5, 10, 20, best=(20,))
        save(checkpoints, 15)
        assert checkpoints.steps() == [5, 10, 15]
        assert checkpoints.best() is None
        again = state(15).replace(hyper={"learning_rate": jnp.float32(0.5)})
        checkpoints.save(again, {}, best=True)
        assert_same(checkpoints.restore("latest", LIKE)[0], again)
        assert checkpoints.steps() == [5, 10, 15]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])  # a manifest ends in a newline, which says nothing


def test_every_file_flipped_truncated_or_missing_falls_back_and_names_it(folder, caplog):
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 10, 20, best=(20,))
        good, latest = folder / "good", folder / "checkpoints" / "20"
        shutil.copytree(latest, good)
        files = [path.relative_to(good) for path in good.rglob("*") if path.is_file()]
        assert len(files) >= 6
        for name in files:
            for damage in (flip, truncate, type(latest).unlink):
                if damage is not type(latest).unlink and not (good / name).stat().st_size:
                    continue
                damage(latest / name)
                caplog.clear()
                found, host = checkpoints.restore("latest", LIKE)
                assert int(found.step) == host["step"] == 10
                if (latest / "manifest.json").exists():  # without one, the step is no checkpoint at all
                    assert f"damaged checkpoint: {latest} ({name.as_posix()})" in caplog.text
                    assert int(checkpoints.restore("best", LIKE)[0].step) == 10
                    with pytest.raises(CheckpointError, match=r"20 .*; and no other to fall back to"):
                        checkpoints.restore(20, LIKE)
                shutil.rmtree(latest)
                shutil.copytree(good, latest)
        assert_same(checkpoints.restore("latest", LIKE)[0], state(20))


def test_a_reader_of_a_run_that_goes_on_takes_what_its_writer_has_made_meanwhile(folder, monkeypatch):
    """Between a look at the list and the reading, the writer removes what was listed and adds a newer step."""
    sound = manifest.damage

    def and_then(path, content):
        found = sound(path, content)
        if path.name in ("10", "20"):
            shutil.rmtree(path)
            if not (folder / "checkpoints" / "30").exists():
                with Checkpoints(folder) as writer:
                    save(writer, 30)
        return found

    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 10, 20)
    monkeypatch.setattr(manifest, "damage", and_then)
    with Checkpoints(folder, read_only=True) as reader:
        assert_same(reader.restore("latest", LIKE)[0], state(30))


def test_arrays_that_are_not_what_was_saved_are_found_though_every_file_is_sealed(folder):
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 10, 20)
        path = folder / "checkpoints" / "20"
        shutil.rmtree(path / "state")
        shutil.copytree(folder / "checkpoints" / "10" / "state", path / "state")  # as if the library had written other arrays
        content = manifest.read(path)
        (path / manifest.NAME).unlink()
        manifest.write(path, {name: value for name, value in content.items() if name != "files"})
        with pytest.raises(CheckpointError, match="its arrays are not those that were saved"):
            checkpoints.restore(20, LIKE)
        assert int(checkpoints.restore("latest", LIKE)[0].step) == 10


def test_where_all_are_damaged_each_is_named(folder):
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 10, 20)
        for step in ("10", "20"):
            flip(folder / "checkpoints" / step / "host.json")
        with pytest.raises(CheckpointError, match=r"20 \(host.json\), .*10 \(host.json\); and no other"):
            checkpoints.restore("latest", LIKE)


def test_another_models_checkpoint_is_refused_by_its_leaves_before_its_arrays_are_read(folder):
    wide = {**PARAMS, "head": {**PARAMS["head"], "kernel": np.zeros((4, 7), np.float32)}}
    deep = {**PARAMS, "block_2": PARAMS["block_1"]}
    half = {**PARAMS, "head": {**PARAMS["head"], "kernel": jnp.zeros((4, 2), jnp.bfloat16)}}
    sgd = Optimizer(optax.sgd)
    cases = [
        (lambda: state(0, params=wide), r"params/head/kernel is \(4, 2\) float32 there, \(4, 7\) float32 here; .*; and 1 more"),
        (lambda: state(0, params=deep), r"params/block_2/kernel is nothing there, \(3, 4\) float32 here"),
        (lambda: state(0, params=half), r"params/head/kernel is \(4, 2\) float32 there, \(4, 2\) bfloat16 here"),
        (lambda: state(0, optimizer=sgd), r"of another model or optimizer: opt/average/count is \(\) int32 there, nothing here"),
        (lambda: state(0, impl="rbg"), r"key is \(\) key<fry> there, \(\) key<rbg> here"),
    ]
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 10)
        shutil.rmtree(folder / "checkpoints" / "10" / "state")
        for make, words in cases:
            with pytest.raises(CheckpointError, match=words):
                checkpoints.restore("latest", jax.eval_shape(make))


@contextlib.contextmanager
def full_disk():
    """A disk that takes no file beyond 2 kB, by the operating system's own limit; nothing but a save belongs inside, for pytest writes files too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_to_save(checkpoints, step):
    """Begins a save that cannot succeed, and returns once it has failed; nobody has been told yet."""
    with full_disk():
        checkpoints.save(state(step), {}, best=False)
        futures.wait([checkpoints._pending])


def test_a_failed_save_surfaces_with_its_path_and_earlier_steps_stay(folder):
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 10)
        for surface in (checkpoints.wait, lambda: checkpoints.save(state(30), {}, best=False), lambda: checkpoints.restore("latest", LIKE)):
            fail_to_save(checkpoints, 20)
            with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*ünïcode/checkpoints/20: .*; earlier checkpoints stay"):
                surface()
            assert_same(checkpoints.restore("latest", LIKE)[0], state(10))
            assert [path.name for path in (folder / "checkpoints").iterdir()] == ["10"]
        save(checkpoints, 20)  # there is room again
        assert checkpoints.steps() == [10, 20]


def test_leaving_the_block_writes_what_is_pending_and_reports_what_failed(folder, caplog):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state(10), {}, best=False)
    assert Checkpoints(folder, read_only=True).latest() == 10
    with pytest.raises(CheckpointError, match="checkpoints/20"), Checkpoints(folder) as checkpoints:
        fail_to_save(checkpoints, 20)
    with pytest.raises(KeyError), Checkpoints(folder) as checkpoints:  # noqa: PT012  # what happens inside is what is tested
        fail_to_save(checkpoints, 20)
        raise KeyError  # what the block itself died of is not hidden
    assert "checkpoints/20" in caplog.text


def test_the_next_writer_cleans_up_and_a_reader_touches_nothing(folder):
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 10, 20)
    root = folder / "checkpoints"
    shutil.copytree(root / "20", root / "30.partial")  # killed before the manifest
    (root / "30.partial" / "manifest.json").unlink()
    (root / "20").rename(root / "20.partial")  # killed between removing the old 20 and renaming the new one
    shutil.copytree(root / "10", root / "5")  # killed while step 5 was being removed
    (root / "5" / "manifest.json").unlink()
    names = {path.name for path in root.iterdir()}
    with Checkpoints(folder, read_only=True) as reader:
        assert reader.steps() == [10]
        with pytest.raises(ValueError, match="opened for reading"):
            reader.save(state(1), {}, best=False)
    assert {path.name for path in root.iterdir()} == names
    with Checkpoints(folder) as writer:
        assert {path.name for path in root.iterdir()} == {"10", "20"}
        assert_same(writer.restore("latest", LIKE)[0], state(20))


def test_a_relative_folder_is_made_absolute_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run") as checkpoints:
        monkeypatch.chdir("/")
        save(checkpoints, 1)
    assert (tmp_path / "run" / "checkpoints" / "1" / "manifest.json").exists()


FROZEN = {"dense_0": {"kernel": {"values": jnp.arange(-8, 8, dtype=jnp.int4).reshape(4, 4), "scale": jnp.ones(4)}}, "empty": None}


def test_what_is_frozen_is_written_once_and_verified(folder):
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.frozen(None) is None
        with pytest.raises(CheckpointError, match="frozen is missing"):
            checkpoints.frozen(FROZEN)
        checkpoints.save_frozen(FROZEN)
        save(checkpoints, 1, 2, 3)
        assert checkpoints.steps() == [2, 3]
        read = checkpoints.frozen(jax.eval_shape(lambda: FROZEN))
        assert jax.tree.structure(read) == jax.tree.structure(FROZEN)
        for new, old in zip(jax.tree.leaves(read), jax.tree.leaves(FROZEN), strict=True):
            assert new.dtype == old.dtype
            np.testing.assert_array_equal(np.asarray(new), np.asarray(old))
        with pytest.raises(CheckpointError, match="another model"):
            checkpoints.frozen({"dense_0": {"kernel": jnp.zeros(3)}})
    for file in [path for path in (folder / "checkpoints" / "frozen").rglob("*") if path.is_file()]:
        content = file.read_bytes()
        file.write_bytes(content + b"x")
        with Checkpoints(folder, read_only=True) as checkpoints, pytest.raises(CheckpointError, match=r"damaged checkpoint: .*frozen \("):
            checkpoints.frozen(FROZEN)
        file.write_bytes(content)


def test_wrong_words_and_empty_folders_are_refused_by_name(folder):
    for keep in ("some", "every:0", "every:x", "every"):
        with pytest.raises(ConfigError, match=f"train.keep='{keep}'"):
            Checkpoints(folder, keep)
    with Checkpoints(folder) as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
        with pytest.raises(CheckpointError, match="checkpoints holds no checkpoint"):
            checkpoints.restore("latest", LIKE)
        save(checkpoints, 100)
        with pytest.raises(CheckpointError, match=r"checkpoint=101: .* has no such step; did you mean '100'"):
            checkpoints.restore(101, LIKE)
        with pytest.raises(ConfigError, match="checkpoint='newest'"):
            checkpoints.restore("newest", LIKE)


WRITER = """
import sys
import jax, jax.numpy as jnp, numpy as np
from research.core.types import State
from research.training.checkpoint import Checkpoints

with Checkpoints(sys.argv[1]) as checkpoints:
    for step in range(1, 10**6):
        params = {f"kernel_{i}": np.full((64, 64), step + i, np.float32) for i in range(8)}
        checkpoints.save(State(np.int32(step), params, {}, (), jax.random.key(step), {}), {"step": step}, best=step % 3 == 0)
        checkpoints.wait()
        print(step, flush=True)
"""


def kill_writers(folders, seed):
    """Starts a writer in each folder and kills it at a random moment; then its last whole checkpoint must be there, and writing must go on."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True) for folder in folders]
    for writer, folder in zip(writers, folders, strict=True):
        for _ in range(2):
            assert writer.stdout.readline()
        time.sleep(random.Random(f"{seed} {folder.name}").random() / 10)
        writer.send_signal(signal.SIGKILL)
        written = [2, *map(int, writer.stdout.read().split())][-1]
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
        like = State(np.int32(0), {f"kernel_{i}": np.zeros((64, 64), np.float32) for i in range(8)}, {}, (), jax.random.key(0), {})
        with Checkpoints(folder) as checkpoints:
            found, host = checkpoints.restore("latest", like)
            assert int(found.step) == host["step"] in (written, written + 1)
            for i in range(8):
                assert (np.asarray(found.params[f"kernel_{i}"]) == int(found.step) + i).all()
            assert sorted(path.name for path in checkpoints.folder.iterdir()) == sorted(map(str, checkpoints.steps()))
            checkpoints.save(found.replace(step=found.step + 1), host, best=False)


def test_kill_9_during_a_save_loses_no_whole_checkpoint(tmp_path):
    kill_writers([tmp_path / str(i) for i in range(3)], seed=time.time_ns())


@pytest.mark.slow
def test_kill_9_during_a_save_twenty_times(tmp_path):
    for i in range(5):
        kill_writers([tmp_path / f"{i}_{j}" for j in range(4)], seed=time.time_ns())


def test_saving_a_small_state_does_not_hold_up_training(folder):
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 1)
        spent = []
        for step in range(2, 8):
            now = state(step)
            begin = time.perf_counter()
            checkpoints.save(now, {}, best=False)
            spent.append(time.perf_counter() - begin)
            checkpoints.wait()
    assert min(spent) < 0.05
