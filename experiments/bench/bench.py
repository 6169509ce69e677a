"""`make bench`: how fast steps are beside plain torch, how they grow with the context, and what each of several devices holds.

    python experiments/bench/bench.py                      all parts that a CPU can do
    python experiments/bench/bench.py gpt cnn steps=20     some parts; KEY=VALUE goes to `research.benchmark`
    python experiments/bench/bench.py gpu                  GPT-2 shapes in bfloat16, on an NVIDIA GPU

Each part is measured in a process of its own and written into table.json and table.md beside this file; a part that is not measured again keeps
the numbers, the date and the hardware that it has there. Exit code 0 where all bars of the parts that were asked for are met.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
PEERS = HERE.parents[1] / "tests" / "peers"
TABLE, MARKDOWN, FIGURE = HERE / "table.json", HERE / "table.md", HERE / "context.png"
CONTEXTS, TOKENS = (512, 1024, 2048, 4096, 8192), 8192
DEVICES = (1, 2, 4, 8)
COLD, WARM = 15.0, 5.0  # seconds from the command to the first step of the quickstart
_STARTS = (("cold_s", "with no program kept", COLD), ("warm_s", "with the programs of the run before", WARM))
BUSY = 0.1  # as in research.benchmark
SECONDS = 20.0  # that a point of `context` is timed for, and at least FEWEST steps: a shared machine is slow for seconds at a time
FEWEST = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """Our step beside torch's.

    Args:    title: as the table has it.  experiment, overrides: of `research.benchmark`.
             bar: the most that our step may take, in steps of torch; None: it is told, not judged.
    """

    title: str
    experiment: str
    overrides: tuple[str, ...] = ()
    bar: float | None = None


_SHORT = ("rounds=9",)  # on a machine that others use, the ratio of one round is off by a tenth
_LONG = ("steps=10", "warmup=3", "rounds=5")  # steps that take a second or more
_GPT2 = ("model.vocabulary=50257", "model.bias=false", "data.time=1024", "train.precision=bfloat16", "model.dropout=0.0", "steps=30")
ROWS = {
    "gpt": Row("GPT 4x128, batch 12 x 64", "shakespeare_char_cpu", _SHORT, 1.0),
    "gpt_wide": Row(
        "GPT 6x384, batch 16 x 256",
        "shakespeare_char_cpu",
        ("model.width=384", "model.depth=6", "model.heads=6", "data.time=256", "data.batch=16", *_LONG),
        1.0,
    ),
    "cnn": Row("Keras's CNN, batch 64", "mnist_cnn", _SHORT, 1.0),
    "cnn_small": Row("Keras's CNN, batch 12", "mnist_cnn", ("data.batch=12", *_SHORT), 1.0),
    "lstm": Row("LSTM 2x256, batch 64 x 64", "shakespeare_char_lstm", ("steps=15", "rounds=5"), 1.2),
    "resnet": Row("ResNet-18, 32 x 32, batch 32", "cifar10_resnet18", ("data.batch=32", *_LONG), 1.4),
}
GPU = {
    "gpt2_124m": Row(
        "GPT-2 124M, batch 16 x 1024", "shakespeare_char_cpu", ("model.width=768", "model.depth=12", "model.heads=12", "data.batch=16", *_GPT2)
    ),
    "gpt2_350m": Row(
        "GPT-2 350M, batch 8 x 1024", "shakespeare_char_cpu", ("model.width=1024", "model.depth=24", "model.heads=16", "data.batch=8", *_GPT2)
    ),
    "gpt_1b3": Row(
        "GPT 1.3B, batch 4 x 1024", "shakespeare_char_cpu", ("model.width=2048", "model.depth=24", "model.heads=16", "data.batch=4", *_GPT2)
    ),
}
PARTS = (*ROWS, "quickstart", "context", "devices", "sweeps")
SWEPT = ("learning_rate=1e-4,2e-4,5e-4,1e-3,2e-3,5e-3,1e-2,2e-2", "seed=range(4)")
SWEEP = ("experiment=digits_mlp", f"optimizer.{SWEPT[0]}", SWEPT[1])
ONE = ("experiment=digits_mlp", "optimizer.learning_rate=1e-3", "seed=0")
TRIALS = 32
PLAIN = "plain Hydra, Flax and Optax"
LAUNCHERS = {  # name: (overrides, how many times faster the first one must be)
    "compiled": (("hydra/launcher=compiled",), None),
    "compiled, reuse": (("hydra/launcher=compiled", "hydra.launcher.mode=reuse"), None),
    "compiled, vmap": (("hydra/launcher=compiled", "hydra.launcher.mode=vmap"), None),
    "basic": ((), 8.0),
    "joblib, 2 workers": (("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), 4.0),
}


def main(arguments: list[str]) -> int:
    """Measures the parts that are named, or all that a CPU can do."""
    extra = [argument for argument in arguments if "=" in argument]
    asked = [argument for argument in arguments if "=" not in argument] or list(PARTS)
    if wrong := [part for part in asked if part not in (*PARTS, "gpu")]:
        return _error(f"there is no part {wrong[0]!r}; the parts are {', '.join((*PARTS, 'gpu'))}")
    if "gpu" in asked and (backend := _out("import jax; print(jax.default_backend())").split()[-1]) != "gpu":
        return _error(f"the part 'gpu' needs an NVIDIA GPU and jax[cuda12]; JAX finds a {backend} here")
    for part in asked:
        if part in ROWS:
            _keep(part, _beside_torch(ROWS[part], extra))
        elif part == "gpu":
            for name, row in GPU.items():
                _keep(name, _beside_torch(row, extra))
        else:
            _keep(part, {"quickstart": _quickstart, "context": _context, "devices": _devices, "sweeps": _sweeps}[part]())
    table = json.loads(TABLE.read_text())
    MARKDOWN.write_text(markdown(table))
    print("", MARKDOWN.read_text(), sep="\n")
    done = [name for part in asked for name in (GPU if part == "gpu" else (part,))]
    return int(any(verdict(name, table[name]) not in ("met", "") for name in done))


def verdict(part: str, entry: dict[str, Any]) -> str:
    """Whether the bar is met; "" where there is none. A machine that others use says nothing, whatever the ratio."""
    if "failed" in entry:
        return "FAILED"
    if part == "quickstart":
        return "met" if entry["cold_s"] <= COLD and entry["warm_s"] <= WARM else "MISSED"
    if part == "sweeps":
        seconds = {point["launcher"]: point["cold_s"] for point in entry["points"]}
        met = all(seconds[name] >= bar * seconds["compiled"] for name, (_, bar) in LAUNCHERS.items() if bar is not None)
        return "met" if met else "MISSED"
    row = ROWS.get(part)
    if row is None or row.bar is None:
        return ""
    if (entry["busy"] or 0.0) > BUSY:
        return "machine busy"
    return "met" if entry["ratio"] <= row.bar else "MISSED"


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """All that was measured, as it is read on a page."""
    lines = ["# Measured by `make bench`", ""]
    rows = {name: row for name, row in {**ROWS, **GPU}.items() if name in table}
    if rows:
        lines += ["| work | ours, ms | torch, ms | ours / torch | at most | | tokens or examples/s | utilisation | steps | where, when |"]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        entry, bar = table[name], "" if row.bar is None else f"{row.bar:g}"
        if "failed" in entry:
            lines.append(f"| {row.title} | | | | {bar} | FAILED: {entry['failed']} | | | | {_place(entry)} |")
            continue
        peer, rounds = entry["peer"], ", ".join(f"{ratio:.2f}" for ratio in entry["ratios"])
        cells = [f"{entry['ms_per_step']:.2f}", f"{peer['ms_per_step']:.2f} ({peer['variant']})", f"{entry['ratio']:.2f} ({rounds})", bar]
        cells += [verdict(name, entry), f"{entry['items_per_s']:,.0f}", f"{entry['utilisation']:.1%}", f"{entry['steps'] * len(entry['ratios'])}"]
        lines.append(f"| {row.title} | {' | '.join(cells)} | {_place(entry)} |")
    if rows:
        lines += [
            "",
            "Medians; each round times ours, then torch's fastest variant; the ratio is the median of those of the rounds. Utilisation: what the",
        ]
        lines += ["model has to compute, of what a matrix product reaches on the same machine (`research/training/utilisation.py` has the formula)."]
    if entry := table.get("quickstart"):
        cold, warm = (f"{entry[name]:.1f} s {how} (at most {most:g})" for name, how, most in _STARTS)
        lines += ["", f"Quickstart, from the command to its first step: {cold}, {warm}: {verdict('quickstart', entry)}. {_place(entry)}"]
    if entry := table.get("context"):
        lines += ["", f"Context, at {TOKENS:,} tokens a step ({entry['model']}), {_place(entry)}:", ""]
        lines += [
            "| context | ms a step | by the formula | by what is multiplied | bytes a token beside the state | kept for the backward pass |",
            "|---|---|---|---|---|---|",
        ]
        for point in entry["points"]:
            numbers = ("context", "ms_per_step", "formula_ms", "computed_ms", "bytes_per_token", "kept_per_token")
            lines.append(f"| {' | '.join(format(point[name], ',.0f') for name in numbers)} |")
        lines += ["", "By the formula: the time of the first row times what the model has to compute. Beyond 512 positions weights are not kept but"]
        lines += ["computed again, and a span of queries multiplies masked keys, too: by what is multiplied counts both."]
        lines += ["", "![Step time and memory over the context](context.png)"]
    if entry := table.get("devices"):
        lines += ["", f"Bytes that each device holds of the state ({entry['model']}), `parallel=fsdp`, {_place(entry)}:", ""]
        lines += ["| devices | measured | told beforehand | 1/n of one | over 1/n | temporary, by the compiler |", "|---|---|---|---|---|---|"]
        one = entry["points"][0]["bytes"]
        for point in entry["points"]:
            cells = [str(point["devices"]), *(f"{point[name]:,}" for name in ("bytes", "told"))]
            cells += [f"{one / point['devices']:,.0f}", f"{point['bytes'] * point['devices'] / one - 1:+.1%}", f"{point['temporary_bytes']:,}"]
            lines.append(f"| {' | '.join(cells)} |")
    if entry := table.get("sweeps"):
        first, alone = entry["points"][0], next(point for point in entry["points"] if point["launcher"] == "basic")
        lines += [
            "",
            f"A sweep of {first['trials']} trials (`digits_mlp`, 8 rates x 4 seeds, 500 steps each), the whole command, {_place(entry)}:",
            "",
        ]
        lines += ["| launcher | s, no program kept | times `compiled` | at least | s, programs kept | programs | s that a further trial adds |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for point in entry["points"]:
            bar = LAUNCHERS.get(point["launcher"], ((), None))[1]
            warm, added = ("" if point[name] is None else f"{point[name]:{form}}" for name, form in (("warm_s", ".1f"), ("added_s", ".2f")))
            cells = [f"{point['cold_s']:.1f}", f"{point['cold_s'] / first['cold_s']:.2f}", "" if bar is None else f"{bar:g}", warm]
            lines.append(f"| {' | '.join([point['launcher'], *cells, point['told'], added])} |")
        lines += [
            "",
            f"Bars: {verdict('sweeps', entry)}. A step is compiled for its content, and rates and seeds are values of it: so `basic`, too, compiles",
        ]
        lines += ["once for all its jobs, and each worker of `joblib` once for its own. The last row is the same work without this project"]
        lines += ["(`tests/peers/sweep_hydra.py`), where each job compiles its step anew, as Flax's own examples have it."]
        lines += [f"What a further trial adds: the seconds of {TRIALS} less those of one, programs kept, over {TRIALS - 1}; in a lone run training"]
        lines += [f"alone takes {alone['train_s']:.2f} s."]
    return "\n".join(lines) + "\n"


def _place(entry: dict[str, Any]) -> str:
    return f"{entry['device']}, {entry['measured']}"


def _beside_torch(row: Row, extra: list[str]) -> dict[str, Any]:
    """What `research.benchmark` says of this row; {"failed": why} where it has no numbers."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "result.json"
        command = [sys.executable, "-m", "research.benchmark", f"experiment={row.experiment}", "peer=torch", f"json={file}", *row.overrides, *extra]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # torch needs its part of a GPU
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            print(done.stderr, file=sys.stderr, end="")
            return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
        return json.loads(file.read_text())


def _quickstart() -> dict[str, Any]:
    """Seconds from the command to the first step, with an empty cache of programs and then with what that left there."""
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (_first_step(pathlib.Path(folder), name) for name in ("cold", "warm"))
    return {"cold_s": cold, "warm_s": warm}


def _first_step(folder: pathlib.Path, name: str) -> float:
    """The command is ended once the log has its first step, so this includes Python's start, the imports, the data and the compiler."""
    quiet = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none", "logger.sample=false")
    settings = ("train.log_every=1", f"run_dir={folder / name}", f"cache.folder={folder / 'programs'}", *quiet)
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    log, start = folder / name / "metrics.jsonl", time.perf_counter()
    command = [sys.executable, "-m", "research.train", "experiment=quickstart", *settings]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (log.exists() and log.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"error: the quickstart ended with code {process.returncode} before its first step")
            time.sleep(0.01)
        return time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()


def _context() -> dict[str, Any]:
    """Step time and memory at a fixed number of tokens, the context growing; the figure is drawn."""
    points = [json.loads(_out(f"import runpy; runpy.run_path({str(__file__)!r})['context_point']({context})")) for context in CONTEXTS]
    first = points[0]
    for point in points:
        for name, flops in (("formula_ms", "flops_per_token"), ("computed_ms", "step_flops_per_token")):
            point[name] = first["ms_per_step"] * point[flops] / first[flops]
    from research.figures.scaling import over_context

    over_context(points, FIGURE, title=f"{TOKENS:,} tokens a step, cut into longer texts")
    return {"model": "GPT 4x128, rotary positions", "points": points}


def context_point(context: int) -> None:
    """Prints one point: the step compiled once, its memory as the compiler tells it, and its time on zeros."""
    import jax
    import numpy as np

    from research.core.memory import keep_freed_memory
    from research.training.preflight import abstract_state, residual_bytes
    from research.training.utilisation import model_flops, step_flops

    keep_freed_memory()  # as in training
    rows = TOKENS // context
    assembly = _assembled(context, "model.positions=rotary", f"data.batch={rows}")
    shapes = {name: jax.ShapeDtypeStruct((rows, context), kind) for name, kind in (("tokens", "int32"), ("target", "int32"), ("mask", "bool"))}
    shapes["index"] = jax.ShapeDtypeStruct((rows,), "int32")
    program = jax.jit(assembly.step.__call__, donate_argnums=0).lower(abstract_state(assembly), None, shapes).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    batch = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    state, seconds = assembly.state(), []
    while len(seconds) <= FEWEST or sum(seconds[1:]) < SECONDS:
        start = time.perf_counter()
        state, metrics = program(state, None, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    kept = residual_bytes(assembly.step.objective, abstract_state(assembly), None, shapes)
    numbers = {"ms_per_step": 1e3 * float(np.median(seconds[1:])), "bytes_per_token": temporary / TOKENS, "kept_per_token": kept / TOKENS}
    flops = {"flops_per_token": model_flops(assembly).flops, "step_flops_per_token": step_flops(assembly, rows).flops / TOKENS}
    print(json.dumps({"context": context, **numbers, **flops}))


def _devices() -> dict[str, Any]:
    """Bytes on the first of 1, 2, 4 and 8 devices that a CPU pretends to be."""
    points = json.loads(_out(f"import runpy; runpy.run_path({str(__file__)!r})['device_points']()"))
    return {"model": "GPT 4x512, AdamW", "points": points}


def device_points() -> None:
    """Prints all points."""
    import jax

    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    points = []
    for count in DEVICES:
        assembly = _assembled(64, "model.width=512", "data.batch=16", "parallel=fsdp", f"parallel.fsdp={count}")
        state, parallel = assembly.state(), assembly.parallel
        first = jax.devices()[0]
        arrays = [jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf for leaf in jax.tree.leaves(state)]
        held = sum(shard.data.nbytes for leaf in arrays for shard in leaf.addressable_shards if shard.device == first)
        batch = {name: jax.numpy.ones((16, 64), kind) for name, kind in (("tokens", "int32"), ("target", "int32"), ("mask", "bool"))}
        batch["index"] = jax.numpy.arange(16, dtype="int32")
        program = jax.jit(parallel.train(assembly.step)).lower(state, None, parallel.put(batch)).compile()
        told = parallel.bytes_per_device(assembly.abstract())
        temporary = program.memory_analysis().temp_size_in_bytes
        points.append({"devices": count, "bytes": held, "told": told, "temporary_bytes": temporary})
    print(json.dumps(points))


def _sweeps() -> dict[str, Any]:
    """Seconds of one command with each launcher: with an empty cache of programs of its own, with what that left there, and then of one trial."""
    points = []
    for name, (overrides, _) in LAUNCHERS.items():
        with tempfile.TemporaryDirectory() as folder:
            cold, _, _ = _swept(pathlib.Path(folder), "cold", overrides)
            warm, trials, told = _swept(pathlib.Path(folder), "warm", overrides)
            one, _, _ = _swept(pathlib.Path(folder), "one", overrides, ONE)
        trained = statistics.median(trial["result"]["train_s"] for trial in trials)
        each = {"added_s": (warm - one) / (len(trials) - 1), "train_s": trained}
        points.append({"launcher": name, "cold_s": cold, "warm_s": warm, "trials": len(trials), **each, "told": told})
        print(points[-1], flush=True)
    points.append(_swept_plainly())
    print(points[-1], flush=True)
    return {"points": points}


def _swept_plainly() -> dict[str, Any]:
    """The same work by tests/peers/sweep_hydra.py, which knows nothing of this project."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PEERS / "sweep_hydra.py"), "-m", *SWEPT, f"hydra.sweep.dir={folder}"]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seconds, results = time.perf_counter() - start, list(pathlib.Path(folder).glob("*/result.json"))
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    if len(results) != TRIALS:
        raise SystemExit(f"error: {' '.join(command)} left {len(results)} results of {TRIALS}")
    return {"launcher": PLAIN, "cold_s": seconds, "warm_s": None, "trials": TRIALS, "added_s": None, "told": "one for each job"}


def _swept(folder: pathlib.Path, name: str, overrides: tuple[str, ...], sweep: tuple[str, ...] = SWEEP) -> tuple[float, list[dict[str, Any]], str]:
    """(seconds, trials with their results, what the launcher said of its programs) of one sweep."""
    settings = (f"sweep_dir={folder / name}", f"cache.folder={folder / 'programs'}")
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    command, start = [sys.executable, "-m", "research.train", "-m", *sweep, *overrides, *settings], time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    last = {line["trial"]: line for line in map(json.loads, (folder / name / "ledger.jsonl").read_text().splitlines())}
    trials = [{**line, "result": json.loads((folder / name / line["run"] / "result.json").read_text())} for line in last.values()]
    return seconds, trials, next((line for line in done.stderr.splitlines() if "of one program" in line), "")


def _assembled(context: int, *overrides: str) -> Any:
    """nanoGPT's CPU preset at another context; no data is read."""
    from omegaconf import open_dict

    from research import compose
    from research.core.spec import fields
    from research.training.assembly import assemble

    config = compose(["experiment=shakespeare_char_cpu", f"data.time={context}", *overrides])
    shape = (context,)
    described = fields(mask=shape, tokens=(shape, "int32"), target=(shape, "int32"))
    with open_dict(config):
        config.data.spec = {"vocabulary": 65, "time": context, "bytes_per_token": 1.0, "fields": described}
    return assemble(config, batches=1)


def _out(program: str) -> str:
    """The last line that a Python program prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return done.stdout.strip().splitlines()[-1]


def _keep(part: str, entry: dict[str, Any]) -> None:
    """Writes the numbers of a part beside those that are there."""
    from research.training.run import device_name

    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    table[part] = {"device": device_name(), **entry, "measured": now}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def _error(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
