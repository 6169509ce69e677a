"""Programs that train the same networks without this project: which one fits a config, and its steps timed on request."""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax
from omegaconf import DictConfig

from research.core.config import resolved
from research.core.errors import ConfigError, ResearchError, nearest
from research.core.overrides import descend

PEER_FOLDER = pathlib.Path(__file__).resolve().parents[2] / "tests" / "peers"


@dataclasses.dataclass(frozen=True)
class Program:
    """A peer's program for one family of models.

    Args:    file: in `PEER_FOLDER`.  options: option of its command line -> path in the config.
             only: path in the config -> the one value that the program knows, which it is not told.
             anywhere: whether it takes `--device` and computes in bfloat16 too; else it is a program for CPU in float32.
    """

    file: str
    options: Mapping[str, str]
    only: Mapping[str, Any]
    anywhere: bool = False


_ONLY = {"model.dropout": 0.0, "train.accumulate": 1}
DEVICES = {"cpu": "cpu", "gpu": "cuda"}  # ours -> torch's
_GPT = Program(
    "gpt_torch.py",
    options={
        **{name: f"model.{name}" for name in ("vocabulary", "time", "width", "depth", "heads")},
        "batch": "data.batch",
        "clip": "train.clip",
        "ema": "train.ema",
        "dtype": "train.precision",
    },
    anywhere=True,
    only={
        "model.kv_heads": None,
        "model.head_width": None,
        "model.hidden": None,
        "model.positions": "learned",
        "model.activation": "gelu_tanh",
        "model.norm": "layer",
        "model.bias": False,
        "model.tied": True,
        "model.remat": "none",
        "optimizer._target_": "optax.adamw",
        **_ONLY,
    },
)
_CNN = Program(
    "cnn_torch.py",
    options={
        **{name: f"model.{name}" for name in ("outputs", "channels", "kernel", "pool", "hidden")},
        "batch": "data.batch",
        "image": "data.spec.image",
        "ema": "train.ema",
    },
    only={
        "model.padding": "VALID",
        "model.activation": "relu",
        "model.norm": None,
        "train.clip": None,
        "optimizer._target_": "optax.adam",
        "train.precision": "float32",
        **_ONLY,
    },
)
_RESNET = Program(
    "resnet_torch.py",
    options={
        **{name: f"model.{name}" for name in ("outputs", "blocks", "channels")},
        "batch": "data.batch",
        "image": "data.spec.image",
        "ema": "train.ema",
    },
    only={
        "model.hidden": None,
        "model.stem": "small",
        "model.activation": "relu",
        "train.clip": None,
        "optimizer._target_": "research.training.optimizer.sgd",
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": False,
        "optimizer.weight_decay": 0.0,
        "train.precision": "float32",
        "train.accumulate": 1,
    },
)
_LSTM = Program(
    "lstm_torch.py",
    options={
        **{name: f"model.{name}" for name in ("vocabulary", "width", "depth")},
        "time": "data.spec.time",
        "batch": "data.batch",
        "clip": "train.clip",
        "ema": "train.ema",
    },
    only={"model.embedding": None, "model.tied": False, "optimizer._target_": "optax.adam", "train.precision": "float32", **_ONLY},
)
PEERS = {
    "torch": {
        "research.models.gpt.GPT": _GPT,
        "research.models.cnn.CNN": _CNN,
        "research.models.resnet.ResNet": _RESNET,
        "research.models.lstm.LSTM": _LSTM,
    }
}


class Peer:
    """A peer's program in a process of its own, which sleeps until it is asked for a block of steps.

    Args:    process: answers with one line of JSON when it is ready, and with one more for each line that it reads.  errors: its stderr.
    """

    def __init__(self, name: str, process: subprocess.Popen[str], errors: IO[str]):
        self.name, self._process, self._errors = name, process, errors
        self.facts = {fact: value for fact, value in self._answer().items() if fact != "seconds"}

    def block(self) -> list[float]:
        """Seconds of each step of one block.

        Raises:  ResearchError: the program has ended; the last line of its stderr is shown.
        """
        with contextlib.suppress(BrokenPipeError):  # it is dead; _answer says why
            print(file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        raise ResearchError(f"peer={self.name}: its program ended with code {code}: {said[-1] if said else 'without a word'}")


@contextlib.contextmanager
def started(name: str, command: list[str]) -> Iterator[Peer]:
    """A peer that is ready; it ends with the context."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            yield Peer(name, process, errors)
        finally:
            process.kill()


def find_program(config: DictConfig) -> Program | None:
    """The program of `peer` for the experiment's model; None where no peer is asked for.

    Raises:  ConfigError: an unknown peer, one that is not installed, or one without a program for this model.
    """
    if config.peer is None:
        return None
    if config.peer not in PEERS:
        raise ConfigError(f"peer={config.peer!r}{nearest(config.peer, PEERS)}")
    programs, family = PEERS[config.peer], config.model._target_
    if family not in programs:
        raise ConfigError(f"peer={config.peer}: there is no program for {family}, only for {', '.join(programs)}")
    if not (PEER_FOLDER / programs[family].file).exists():
        raise ConfigError(
            f"peer={config.peer}: there is no {PEER_FOLDER / programs[family].file}; the peers come with a checkout, not with the package"
        )
    if importlib.util.find_spec(config.peer) is None:
        raise ConfigError(f"peer={config.peer}: {config.peer} is not installed; pip install {config.peer}")
    return programs[family]


def peer_command(program: Program, config: Mapping[str, Any]) -> list[str]:
    """The command that runs a peer's program at the sizes of this config.

    Args:    config: holds the data's spec.
    Raises:  ConfigError: the config asks for something that the program does not know.
    """
    tree = resolved(config)
    for path, known in program.only.items():
        if (value := descend(tree, path)[0]) != known:
            raise ConfigError(f"peer: {program.file} only knows {path}={json.dumps(known)}, not {json.dumps(value)}")
    command = [sys.executable, str(PEER_FOLDER / program.file)]
    backend = jax.default_backend()
    if backend not in (DEVICES if program.anywhere else ("cpu",)):
        raise ConfigError(f"peer: {program.file} runs on {' or '.join(DEVICES.values()) if program.anywhere else 'cpu'}, and this is a {backend}")
    if program.anywhere:
        command += ["--device", DEVICES[backend]]
    for option, path in program.options.items():
        value = descend(tree, path)[0]
        if value is not None:
            command += [f"--{option}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return command
