"""A sweep of small trainings in plain Hydra, Flax and Optax, as their own examples write it: what `hydra/launcher=compiled` is measured beside.

    python tests/peers/sweep_hydra.py -m learning_rate=1e-4,1e-3 'seed=range(4)' hydra.sweep.dir=PATH

The job of `experiment=digits_mlp`: the same digits, sizes, steps, log points, evaluations and kept checkpoints (the best and the last). A
`TrainState` holds the module's `apply` and the optimizer as static fields; both are new in each job, so each job compiles its step anew.
"""

import csv
import dataclasses
import json
import pathlib

import flax.linen as nn
import hydra
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from sklearn.datasets import load_digits


@dataclasses.dataclass
class Config:
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0
    width: int = 128
    depth: int = 2
    steps: int = 500
    batch: int = 64
    log_every: int = 10
    eval_every: int = 100


class Network(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def _scores(state, params, x, y):
    logits = state.apply_fn({"params": params}, x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, (logits.argmax(-1) == y).mean()


@jax.jit
def train_step(state, x, y):
    (loss, accuracy), grads = jax.value_and_grad(lambda params: _scores(state, params, x, y), has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss, "accuracy": accuracy, "gradient_norm": optax.global_norm(grads)}


@jax.jit
def eval_step(state, x, y):
    return _scores(state, state.params, x, y)


def _data():
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = (pixels[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    return {"test": (x[:360], y[:360]), "validation": (x[360:540], y[360:540]), "train": (x[540:], y[540:])}


@hydra.main(version_base=None, config_name="config")
def main(config: Config) -> None:
    folder = pathlib.Path(HydraConfig.get().runtime.output_dir)
    data = _data()
    network = Network(config.width, config.depth)
    params = network.init(jax.random.key(config.seed), jnp.zeros((1, 64)))["params"]
    tx = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)
    best, rng, (x, y), order = (np.inf, state), np.random.default_rng(config.seed), data["train"], np.empty(0, np.int64)
    with open(folder / "metrics.csv", "w", newline="") as file:
        log, window = csv.writer(file), []
        for step in range(1, config.steps + 1):
            if len(order) < config.batch:
                order = rng.permutation(len(y))
            picked, order = order[: config.batch], order[config.batch :]
            state, metrics = train_step(state, x[picked], y[picked])
            window.append(metrics)
            if step % config.log_every == 0:
                fetched = jax.device_get(window)
                log.writerow([step, *(np.mean([one[name] for one in fetched]) for name in metrics)])
                window = []
            if step % config.eval_every == 0:
                loss, accuracy = map(float, eval_step(state, *data["validation"]))
                log.writerow([step, loss, accuracy])
                best = min(best, (loss, state), key=lambda pair: pair[0])
    with ocp.StandardCheckpointer() as checkpointer:
        for name, kept in (("last", state), ("best", best[1])):
            checkpointer.save(folder.absolute() / name, {"step": kept.step, "params": kept.params, "opt": kept.opt_state})
    loss, accuracy = map(float, eval_step(best[1], *data["test"]))
    (folder / "result.json").write_text(json.dumps({"test/loss": loss, "test/accuracy": accuracy}))


if __name__ == "__main__":
    ConfigStore.instance().store(name="config", node=Config)
    main()
