"""A step gives the same numbers wherever it runs: on one device, on a mesh of eight, on two hosts; and its state moves between them."""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import pytest

from research.core.axis import Layout
from research.core.errors import ConfigError
from research.core.spec import abstract_batch, fields
from research.models.gpt import GPT
from research.models.mlp import MLP
from research.objectives.classify import Classify
from research.objectives.language_model import LanguageModel
from research.training.parallel import Jit, Pmap, Sharded

TEXT = {"fields": fields(mask=(32,), tokens=((32,), "int32"), target=((32,), "int32"))}
ROWS = {"fields": fields(features=((16,), "float32"), label=((), "int32"))}
QUIET = ("logger.figures=false", "logger.tensorboard=false", "logger.sample=false", "train.log_every=10")
SMOOTH = ("model.activation=gelu", "model.pool=1")  # behind a kink of a ReLU or of a maximum a rounding error grows into another run
DIGITS = ("experiment=digits_cnn", "model.norm=batch", *SMOOTH, "train.epochs=null", "train.steps=40", "train.eval_every=20", "data.batch=64", *QUIET)
LAYOUTS = {
    "data": ({"data": 8},),
    "fsdp": ({"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 4}),
    "tensor": ({"data": 1, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
    "sequence": ({"data": 1, "fsdp": 2, "sequence": 4}, {"data": 2, "tensor": 2, "sequence": 2}),
}
GROUPS = [
    (kind, group) for kind in ("mlp", "cnn", "lstm", "gpt", "scanned") for group in LAYOUTS if kind in ("gpt", "scanned") or group in ("data", "fsdp")
]

PROGRAM = """
import json, sys
import jax, numpy as np, optax
from research.layers import conv
from research.models.cnn import CNN
from research.models.gpt import GPT
from research.models.lstm import LSTM
from research.models.mlp import MLP
from research.objectives.classify import Classify
from research.objectives.language_model import LanguageModel
from research.training.optimizer import Optimizer
from research.training.parallel import Jit, Pmap, Sharded
from research.training.schedule import Constant
from research.training.step import Step, means

random = np.random.default_rng(0)

def around(i):
    return {"index": np.arange(16, dtype=np.int32) + 16 * i}

def text(i):
    tokens, target = random.integers(0, 32, (2, 16, 32)).astype(np.int32)
    return {"tokens": tokens, "target": target, "mask": random.random((16, 32)) > 0.3, **around(i)}

def labelled(name, *shape):
    def make(i):
        label = random.integers(0, 3, 16).astype(np.int32)
        return {name: random.normal(size=(16, *shape)).astype(np.float32), "label": label, "mask": random.random(16) > 0.3, **around(i)}
    return make

sizes = {"vocabulary": 32, "time": 32, "width": 32, "depth": 2, "heads": 4, "dropout": 0.2}
KINDS = {
    "mlp": (Classify(MLP(outputs=3, width=64, depth=2, dropout=0.3)), labelled("features", 16)),
    "cnn": (Classify(CNN(outputs=3, channels=(8, 16), pool=(2, 2), padding="SAME", hidden=(32,), norm="batch")), labelled("image", 8, 8, 1)),
    "lstm": (LanguageModel(LSTM(vocabulary=32, width=32, depth=2)), text),
    "gpt": (LanguageModel(GPT(**sizes, positions="rotary")), text),
    "scanned": (LanguageModel(GPT(**sizes, kv_heads=2, scan=True)), text),
}

def run(parallel, objective, batches, accumulate=1):
    conv.COLUMNS = 1 if isinstance(parallel, Sharded) else 1 << 22  # so that meshes take the way of large batches
    one = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in batches[0].items()}
    parallel = parallel.fit(objective, one)
    step = Step(objective, Optimizer(optax.adamw, clip=1.0), Constant(), steps=20, accumulate=accumulate, axis=parallel.axis)
    zeros = {name: np.zeros(x.shape, x.dtype) for name, x in one.items()}
    state = parallel.place(parallel.create(step, jax.random.key(0), zeros, {"learning_rate": 1e-2}))
    losses, train = [], parallel.train(step)
    program = None
    if kind in ("cnn", "lstm"):
        program = jax.jit(lambda state, batch: train(state, None, batch)).lower(state, parallel.put(batches[0])).compile()
    for batch in batches:
        state, metrics = train(state, None, parallel.put(batch))
        losses.append(means(jax.device_get(parallel.one(metrics)))["loss"])
    held = {}
    for leaf in jax.tree.leaves(state):
        raw = jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for shard in raw.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return {"losses": losses, "held": sorted(held.values()), "told": parallel.bytes_per_device(jax.eval_shape(lambda: state)),
            "flops": program and program.cost_analysis()["flops"]}

kind, accumulate, layouts = json.loads(sys.argv[1])
objective, make = KINDS[kind]
batches = [make(i) for i in range(20)]
meshes = [Pmap() if layout is None else Sharded(**layout) for layout in layouts]
print(json.dumps([run(parallel, objective, batches, accumulate) for parallel in (Jit(), *meshes)]))
"""


def on_eight_devices(kind, layouts, accumulate=1):
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", PROGRAM, json.dumps([kind, accumulate, layouts])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "full rematerialization" not in done.stderr  # the partitioner found no good way between two layouts
    one, *others = json.loads(done.stdout)
    assert abs(one["losses"][0] - one["losses"][-1]) > 1e-4
    for other in others:
        assert max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True)) < 1e-5
    return one, others


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "group"), GROUPS)
def test_a_mesh_of_eight_devices_gives_the_losses_of_one(kind, group):
    one, others = on_eight_devices(kind, LAYOUTS[group])
    for layout, other in zip(LAYOUTS[group], others, strict=True):
        assert set(other["held"]) == {other["told"]}  # every device holds what was foretold
        parts = layout.get("fsdp", 1) * layout.get("tensor", 1)
        assert one["told"] / parts <= other["told"] < 1.3 * one["told"] / parts + 2048  # vectors too short to be cut are copied


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("cnn", 1.6), ("lstm", 1.2)])  # each makes the whole update, a third of this CNN's work
def test_each_device_does_its_part_of_products_over_positions(kind, most):
    """A product over positions and rows as one axis can bring the whole batch to every device."""
    one, (other,) = on_eight_devices(kind, LAYOUTS["data"])
    assert other["flops"] < most * one["flops"] / 8


@pytest.mark.slow
def test_microbatches_on_a_mesh_give_the_losses_of_one_device():
    on_eight_devices("gpt", ({"data": 2, "fsdp": 2, "tensor": 2},), accumulate=2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "accumulate"), [("mlp", 2), ("cnn", 1)], ids=["microbatches", "batch statistics"])
def test_pmap_on_eight_devices_equals_jit_on_one(kind, accumulate):
    on_eight_devices(kind, (None,), accumulate)


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match=r"parallel.devices=99: this machine has 1"):
        Pmap(devices=99)
    with pytest.raises(ConfigError, match=r"parallel: data 2 x fsdp 4 needs 8 devices, and there is 1; debug.cpu_devices=N"):
        Sharded(data=2, fsdp=4).check()


def gpt(**sizes):
    return LanguageModel(GPT(**{"vocabulary": 48, "time": 32, "width": 64, "depth": 2, "heads": 4, **sizes}))


@pytest.mark.parametrize(
    ("layout", "sizes", "message"),
    [
        ({"tensor": 3, "data": 1}, {}, r"parallel.tensor=3: the heads of block_0/attention/key/bias are 4, which 3 does not divide"),
        ({"tensor": 4, "data": 1}, {"kv_heads": 2}, r"the heads of block_0/attention/key/bias are 2, which 4 does not divide"),
        ({"tensor": 4, "data": 1}, {"hidden": 90}, r"parallel.tensor=4: the hidden of block_0/mlp/down/kernel are 90, which 4 does not divide"),
        ({"sequence": 5, "data": 1}, {}, r"parallel.sequence=5 does not divide a context of 32 tokens; the nearest that it does is 30"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_the_numbers(layout, sizes, message):
    with pytest.raises(ConfigError, match=message):
        Sharded(**layout).fit(gpt(**sizes), abstract_batch(TEXT, 1))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"fsdp": 0}, "parallel.fsdp=0: must be at least 1"),
        ({"data": None, "fsdp": None}, "parallel.data and parallel.fsdp are both null"),
        ({"rules": (("batch", ("dat",)),)}, "parallel.rules.batch: 'dat' is no axis of the mesh; did you mean 'data'"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(layout, message):
    with pytest.raises(ConfigError, match=message):
        Sharded(**layout)


def test_the_names_of_a_model_say_where_its_arrays_go():
    """On a mesh far larger than this machine: nothing asks for a device."""
    layout = Sharded(data=4, fsdp=8, tensor=2).fit(gpt(), abstract_batch(TEXT, 1))
    where = {
        "params/token/embedding": ((48, 64), ("tensor", "fsdp")),
        "params/block_0/attention/query/kernel": ((64, 4, 16), ("fsdp", "tensor", None)),
        "params/block_1/attention/out/kernel": ((4, 16, 64), ("tensor", None, "fsdp")),
        "params/blocks/mlp/up/kernel": ((2, 64, 256), (None, "fsdp", "tensor")),  # stacked layers
        "opt/inner/0/mu/block_1/mlp/down/kernel": ((256, 64), ("tensor", "fsdp")),  # a moment lies beside its parameter
        "params/unheard/of": ((3, 40, 50), (None, "fsdp", None)),  # the longest axis that fsdp divides
        "params/block_0/mlp_norm/scale": ((64,), ()),  # too short to be cut
        "step": ((), ()),
    }
    for path, (shape, wanted) in where.items():
        got = tuple(axes[0] if isinstance(axes, tuple) and len(axes) == 1 else axes for axes in layout.spec(path, shape))
        assert got == wanted, path
    assert layout.count == 32
    assert layout.size == 64


def test_bytes_per_device_are_what_is_left_of_the_whole():
    objective = gpt(width=512, scan=True)
    params, _ = jax.eval_shape(objective.init, jax.random.key(0), abstract_batch(TEXT, 1))
    whole = Jit().bytes_per_device(params)
    shares = [Sharded(data=1, fsdp=n).fit(objective, abstract_batch(TEXT, 1)).bytes_per_device(params) / whole for n in (1, 2, 4, 8)]
    assert shares[0] == 1
    assert shares[1:] == pytest.approx([1 / 2, 1 / 4, 1 / 8], rel=0.01)


def test_a_name_cuts_one_axis_of_an_array_at_most():
    layout = Layout(
        (("data", 2), ("fsdp", 2), ("tensor", 1), ("sequence", 1)), (("batch", ("data", "fsdp")), ("width", ("fsdp",)), ("heads", ("tensor",)))
    )
    assert tuple(layout.spec(("batch", None, "width", "heads"))) == (("data", "fsdp"), None, None, None)
    assert layout.parts("batch") == 4
    assert layout.parts("heads") == layout.parts("unheard of") == layout.parts(None) == 1


def test_a_model_without_names_fits_any_mesh():
    layout = Sharded(data=1, fsdp=4, tensor=2).fit(Classify(MLP(outputs=3, width=64, depth=1)), abstract_batch(ROWS, 1))
    assert layout.names == ()


def hosts_of(count, folder, *argv, timeout=300):
    """Starts this many hosts of one run, two devices each; returns the processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = (*argv, "debug.cpu_devices=2", f"run_dir={folder}", f"hosts.count={count}", f"hosts.coordinator=127.0.0.1:{port}", "hosts.timeout_s=15")
    command = [sys.executable, "-m", "research.train", *shared]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen([*command, f"hosts.id={i}"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(count)
    ]


def curve(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in ("train/loss", "validation/loss") if name in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run by one host on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = subprocess.run([sys.executable, "-m", "research.train", *DIGITS, f"run_dir={folder}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_chunks_on_a_mesh_make_the_run_of_one_device(alone, tmp_path):
    argv = (*DIGITS, "parallel=mesh", "parallel.data=2", "parallel.fsdp=4", "debug.cpu_devices=8", "train.chunk=10", f"run_dir={tmp_path / 'run'}")
    done = subprocess.run([sys.executable, "-m", "research.train", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert curve(tmp_path / "run") == pytest.approx(curve(alone), abs=1e-5)


@pytest.mark.slow
def test_two_hosts_make_the_run_of_one(alone, tmp_path):
    processes = hosts_of(2, tmp_path / "run", *DIGITS, "parallel=mesh", "parallel.fsdp=2")
    told = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert curve(tmp_path / "run") == pytest.approx(curve(alone), abs=1e-5)
    assert "finished at step 40" in told[0]
    assert "step" not in told[1]  # the first one speaks
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"] == pytest.approx(json.loads((alone / "result.json").read_text())["metrics"], abs=1e-5)


@pytest.mark.slow
def test_a_checkpoint_goes_on_from_host_to_host_and_mesh_to_mesh(alone, tmp_path):
    """Two hosts, eight devices, four, one: each goes on where the one before was stopped, as if there had been one all along."""
    folder = tmp_path / "run"
    places = (
        ("train.stop_at=10", "parallel=mesh", "parallel.fsdp=2"),
        ("train.stop_at=20", "parallel=fsdp", "debug.cpu_devices=8"),
        ("train.stop_at=30", "parallel=mesh", "parallel.data=2", "parallel.fsdp=2", "debug.cpu_devices=4"),
        ("train.stop_at=null",),
    )
    for i, place in enumerate(places):
        if i == 0:
            processes = hosts_of(2, folder, *DIGITS, *place)
            told = [process.communicate(timeout=300)[0] for process in processes]
            assert [process.returncode for process in processes] == [0, 0], told
        else:
            done = subprocess.run([sys.executable, "-m", "research.train", *DIGITS, f"run_dir={folder}", *place], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert f"resuming at step {10 * i}" in done.stdout
    assert curve(folder) == pytest.approx(curve(alone), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL"])
def test_a_host_that_is_asked_to_stop_stops_all_and_one_that_dies_is_an_error(tmp_path, signal):
    import signal as signals

    endless = [argument for argument in DIGITS if not argument.startswith(("train.steps", "train.eval_every"))]
    processes = hosts_of(2, tmp_path / "run", *endless, "train.steps=100000", "train.eval_every=50000", "train.save_every=20", "parallel=data")
    log, began = tmp_path / "run" / "metrics.jsonl", time.monotonic()
    while not (log.exists() and log.read_text()):
        assert time.monotonic() - began < 200
        time.sleep(0.5)
    processes[1].send_signal(getattr(signals, signal))
    began = time.monotonic()
    told = [process.communicate(timeout=120)[0] for process in processes]
    codes = [process.returncode for process in processes]
    if signal == "SIGTERM":
        assert codes == [75, 75], told
        assert "saved at step" in told[0]
        assert [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    else:
        assert codes[0] not in (0, 75), told
        assert time.monotonic() - began < 60  # hosts.timeout_s=15
