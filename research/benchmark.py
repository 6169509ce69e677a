"""Times training steps, says what they reach of the hardware, and where the time goes: `python -m research.benchmark experiment=NAME peer=torch`."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table

from research.core import app
from research.core.errors import ConfigError, DataError
from research.core.folder import write_json
from research.data.dataset import Dataset, open_data
from research.data.loader import Loader
from research.data.on_device import place
from research.data.random_data import random_data
from research.training.assembly import assemble, settings
from research.training.peer import Peer, find_program, peer_command, started
from research.training.profile import Operation, dearest, traced
from research.training.run import device_name, environment, new_path, peak_bytes
from research.training.timing import Block, Timer, settle
from research.training.utilisation import check_peak, model_flops, peak, step_flops

BUSY = 0.1  # share of the processor in other programs' hands above which a time is not that of the machine
TRACED = 10  # steps of a profile, at most: a trace of a large model grows by megabytes with each


def benchmark(config: DictConfig) -> dict[str, Any]:
    """The measured numbers, as they are printed and written to `json`.

    A step is timed from asking for its batch until all its results are there; the rate is that of training, which looks at results only every
    `train.log_every` steps. With a peer the two programs are timed in turn, so that both see the same machine. A machine that others use bends
    even the ratio, since a program whose threads wait for each other suffers more: `busy` says how much of it they used.

    Args:    config: as `research.compose([...], verb="benchmark")` gives it.
    Utilisation is what the model has to compute (`training/utilisation.py` has the formula, which is printed) over what a large matrix product of
    the run's type reaches on this machine, or over a peak that is named. Beside it stands what the step really multiplies.

    Raises:  ConfigError: an experiment or peer that cannot be timed.  ResearchError: the peer's program failed.
    """
    for name in ("steps", "warmup", "rounds"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ConfigError(f"{name}={config[name]}: must be a whole number of at least 1")
    check_peak(config.peak)
    program = find_program(config)
    dataset, is_random = _open(config.data)
    with open_dict(config):
        config.data.spec = dict(dataset.spec)
    loader = Loader(place(dataset.split("train"), settings(config).chunk), config.data.batch, seed=config.seed)
    assembly = assemble(config, batches=len(loader))
    assembly.check(loader.batch)
    at_most, peak_from = peak(config.train.precision, config.peak)
    timer = Timer(assembly, loader, config.warmup + (config.rounds + 2) * config.steps)
    if program is None:
        timer.warm_up(config.warmup)
        shares, blocks, compared = [settle()], [timer.block(config.steps)], {"peer": None, "ratio": None, "ratios": None}
    else:
        with started(config.peer, [*peer_command(program, config), "--steps", str(config.steps)]) as peer:
            shares, blocks, compared = _rounds(peer, timer, config)
    steps_per_s = timer.rate(config.steps)
    items = loader.batch * dataset.spec.get("time", 1)
    model, step = model_flops(assembly), step_flops(assembly, loader.batch)
    result = {
        "experiment": config.name,
        "device": device_name(),
        "busy": float(np.mean(shares)),
        "data": "random" if is_random else "real",
        "batch": loader.batch,
        "parameters": timer.parameters,
        "steps": config.steps,
        "compile_s": timer.compile_s,
        **_times([step for block in blocks for step, _ in block]),
        "steps_per_s": steps_per_s,
        "items": "tokens" if "time" in dataset.spec else "examples",
        "items_per_s": steps_per_s * items,
        "model_flops_per_item": model.flops,
        "model_flops_formula": model.formula,
        "step_flops_per_item": step.flops / items,
        "peak_flops_per_s": at_most,
        "peak_from": peak_from,
        "utilisation": model.flops * items * steps_per_s / at_most,
        "step_utilisation": step.flops * steps_per_s / at_most,
        "data_wait": _share(blocks),
        "peak_bytes": peak_bytes(),
        "versions": environment()["versions"],
        **compared,
        "profile": _profile(config, timer) if config.profile else None,
    }
    _show(result)
    if config.json:
        write_json(config.json, result)
    return result


def main(argv: list[str] | None = None) -> int:
    """The exit code of the command line."""
    return app.main(benchmark, "benchmark", argv)


def _open(node: DictConfig) -> tuple[Dataset, bool]:
    """(the data of the config, or random data where it is missing; whether it is random)."""
    try:
        return open_data(node), False
    except DataError as error:
        try:
            data = random_data(node)
        except ConfigError:
            raise error from None
        app.say(f"random data of the same shapes is timed, since {error}")
        return data, True


def _profile(config: DictConfig, timer: Timer) -> dict[str, Any]:
    """Where a trace of a few steps lies, and the operations that took most of their time."""
    folder = new_path(config.paths.runs, f"{config.name}-profile") if config.profile is True else config.profile
    steps = min(TRACED, config.steps)
    with traced(folder):
        steps = len(timer.block(steps))  # of whole chunks
    return {"folder": os.fspath(folder), "steps": steps, "operations": [dataclasses.asdict(operation) for operation in dearest(folder, steps)]}


def _times(seconds: list[float]) -> dict[str, Any]:
    """The median time of a step and the quartiles around it, in milliseconds."""
    low, middle, high = np.percentile(seconds, [25, 50, 75]) * 1e3
    return {"ms_per_step": middle, "ms_per_step_quartiles": [low, high]}


def _share(blocks: list[Block]) -> float:
    """Waiting as a share of all the time."""
    whole, waited = np.sum([step for block in blocks for step in block], axis=0)
    return waited / whole


def _rounds(peer: Peer, timer: Timer, config: DictConfig) -> tuple[list[float], list[Block], dict[str, Any]]:
    """(what others used of the processor, our blocks, the peer's numbers and the ratios: of each round's medians, and the median of those)."""
    if (theirs := peer.facts["parameters"]) != timer.parameters:
        raise ConfigError(f"peer={peer.name}: its network has {theirs:,} parameters, ours {timer.parameters:,}: their times cannot be compared")
    timer.warm_up(config.warmup)
    rounds = [(settle(), timer.block(config.steps), settle(), peer.block()) for _ in range(config.rounds)]
    ratios = [float(np.median([step for step, _ in ours]) / np.median(theirs)) for _, ours, _, theirs in rounds]
    facts = {"name": peer.name, **peer.facts, **_times([step for *_, theirs in rounds for step in theirs])}
    shares = [share for first, _, second, _ in rounds for share in (first, second)]
    return shares, [ours for _, ours, *_ in rounds], {"peer": facts, "ratio": float(np.median(ratios)), "ratios": ratios}


def _show(result: Mapping[str, Any]) -> None:
    """The numbers as a table on standard output."""
    peer = result["peer"]
    low, high = result["ms_per_step_quartiles"]
    rows = {
        "parameters": f"{result['parameters']:,}",
        "ms per step": f"{result['ms_per_step']:.2f}  ({low:.2f} to {high:.2f})",
        "steps/s": f"{result['steps_per_s']:.2f}",
        f"{result['items']}/s": f"{result['items_per_s']:,.0f}",
        "utilisation": f"{result['utilisation']:.1%} of {result['peak_flops_per_s'] / 1e12:.3g} TFLOP/s",
        "computed": f"{result['step_utilisation']:.1%}",
        "compile": f"{result['compile_s']:.1f} s",
        "data wait": f"{result['data_wait']:.1%}",
        "peak memory": f"{(result['peak_bytes'] or 0) / 2**20:,.0f} MiB",
    }
    titles = [f"{result['experiment']}, batch {result['batch']}", "ours", *([f"{peer['name']} {peer['version']}, {peer['variant']}"] if peer else [])]
    table = Table(*titles, box=None, header_style="bold", pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value, *([_theirs(name, peer)] if peer else []))
    Console().print(f"{result['device']}, {result['data']} data", table, sep="\n")
    item = f"FLOPs a {result['items'].removesuffix('s')}"
    app.say(f"utilisation: {result['model_flops_formula']} = {result['model_flops_per_item']:,.0f} {item}, which the model has to compute,")
    app.say(f"  of a peak that is {result['peak_from']}; computed: {result['step_flops_per_item']:,.0f}, in the step as it is written")
    if result["profile"]:
        _show_profile(result["profile"])
    if peer:
        app.say(f"ours / {peer['name']}: {result['ratio']:.2f}  (rounds: {', '.join(f'{ratio:.2f}' for ratio in result['ratios'])})")
    if result["busy"] > BUSY:
        app.say(f"other programs used {result['busy']:.0%} of the processor: measure again on a quiet machine")


def _show_profile(profile: Mapping[str, Any]) -> None:
    table = Table(
        f"operation, {profile['steps']} steps", "module", "share", "ms a step", "times a step", box=None, header_style="bold", pad_edge=False
    )
    for operation in (Operation(**fields) for fields in profile["operations"]):
        name = operation.operation + (", backward" if operation.backward else "")
        table.add_row(name, operation.module, f"{operation.share:.1%}", f"{operation.seconds * 1e3:.2f}", f"{operation.count:g}")
    Console().print("", table, f"trace: {profile['folder']}", sep="\n")


def _theirs(row: str, peer: Mapping[str, Any]) -> str:
    low, high = peer["ms_per_step_quartiles"]
    return {"parameters": f"{peer['parameters']:,}", "ms per step": f"{peer['ms_per_step']:.2f}  ({low:.2f} to {high:.2f})"}.get(row, "")


if __name__ == "__main__":
    raise SystemExit(main())
