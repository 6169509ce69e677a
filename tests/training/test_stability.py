"""Signs of unstable training: what is measured is right, costs the run nothing, and the warning names the layer."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from research.models.gpt import GPT
from research.models.mlp import MLP
from research.objectives.classify import Classify
from research.objectives.language_model import LanguageModel
from research.training import log, stability
from research.training.checkpoint import Checkpoints
from research.training.clock import Clock
from research.training.loop import Loop, Settings, new_host
from research.training.optimizer import Optimizer
from research.training.parallel import Jit, create
from research.training.schedule import Constant
from research.training.step import Step


class Recurrent(nn.Module):
    """h = W h + x, a linear recurrent network whose W starts as `scale` times the identity."""

    scale: float
    width: int = 5

    @nn.compact
    def __call__(self, x, *, mask=None, index=None, hyper=None, train=False):
        start = lambda key, shape: self.scale * jnp.eye(*shape, dtype=jnp.float32)  # noqa: E731  # one line says it
        kernel = self.param("recurrent", start, (self.width, self.width))
        h = jnp.zeros((len(x), self.width), jnp.float32)
        for _ in range(12):
            h = h @ kernel + x
        return nn.Dense(3, name="head")(h), {}


class Residual(nn.Module):
    """A stack of dense layers with sigmoids as deep as the one that vanishes, but each adds to a stream."""

    depth: int = 10

    @nn.compact
    def __call__(self, x, *, mask=None, index=None, hyper=None, train=False):
        x = nn.Dense(16, name="first")(x)
        for i in range(self.depth):
            x = x + nn.sigmoid(nn.Dense(16, name=f"dense_{i}")(x))
        return nn.Dense(3, name="head")(x), {}


@pytest.fixture
def run(batches, tmp_path, capsys):
    """run(module): (warnings, records of metrics.jsonl) of six steps, logged every three."""

    def call(module, objective=Classify, batches=batches, **settings):
        step = Step(objective(module), Optimizer(optax.sgd), Constant(), steps=6, stability=True)
        record = log.Log(epath.Path(tmp_path), 0, 6, tensorboard=False, progress="lines")
        settings = Settings(steps=6, log_every=3, eval_every=None, monitor="train/loss", **settings)
        with Checkpoints(tmp_path, "latest") as checkpoints:
            loop = Loop(step, settings, Jit(), Batches(batches), checkpoints, record, lambda state: {}, Clock())
            loop.run(create(step, jax.random.key(0), batches[0], {"learning_rate": 1e-6}), None, new_host())
        record.close()
        told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        return told, log.read(epath.Path(tmp_path))

    return call


class Batches:
    def __init__(self, batches):
        self.batches = batches

    def iterate(self, start, stop, put):
        return (put(self.batches[step % len(self.batches)]) for step in range(start, stop))

    def indices(self, step):
        return self.batches[step]["index"]


def test_gradients_vanish_in_a_deep_sigmoid_network_and_the_first_layer_is_named_once(run):
    told, records = run(MLP(outputs=3, width=16, depth=10, activation="sigmoid"))
    assert len(told) == 1  # of two log points
    assert told[0].startswith("warning: step 3: gradients vanish on their way back: the gradient norm of dense_0 is ")
    assert ", that of head " in told[0]
    assert 0 < records[-1]["train/gradient_ratio"] < 1e-4


def test_gradients_explode_in_a_recurrent_network_of_weights_3_and_its_layer_is_named(run):
    told, _ = run(Recurrent(3.0))
    assert [line.partition(":")[0] for line in told] == ["warning"]
    assert "gradients explode: the gradient norm of recurrent is " in told[0]
    assert run(Recurrent(0.5))[0] == []


def test_an_update_that_is_not_finite_names_the_layers(run, batches):
    told, _ = run(Recurrent(1e6), skip_limit=7)
    assert told
    assert "gradients explode: they are not finite in recurrent" in told[0]


def test_a_residual_network_of_that_depth_gives_no_warning(run):
    told, records = run(Residual())
    assert told == []
    assert 0.01 < records[-1]["train/gradient_ratio"] < 100


@pytest.mark.slow
def test_a_transformer_gives_no_warning_stacked_or_not(run):
    random = np.random.RandomState(0)
    tokens = random.randint(0, 11, (4, 9)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "target": tokens[:, 1:], "mask": random.rand(4, 8) > 0.3, "index": np.arange(4, dtype=np.int32)}
    rows = []
    for scan in (False, True):
        told, records = run(GPT(11, 8, width=8, depth=2, heads=2, scan=scan), LanguageModel, [batch])
        assert told == []
        rows.append(records[-1])
    plain, stacked = rows
    assert plain.keys() == stacked.keys()
    assert {"train/gradient_norm/block_1/attention/query", "train/update_norm/token", "train/dead/block_0/mlp/hidden"} <= plain.keys()
    names = [name for name in plain if "norm/" in name or "dead/" in name or "ratio" in name]
    np.testing.assert_allclose([plain[name] for name in names], [stacked[name] for name in names], rtol=1e-3, atol=1e-9)


def test_layers_are_ordered_as_the_model_reads_them(batches):
    def ordered(objective, batch):
        step = Step(objective, Optimizer(optax.sgd), Constant(), steps=1)
        state = jax.eval_shape(step.create, jax.random.key(0), batch, {"learning_rate": 0.1})
        return stability.order(objective, state, None, batch)

    mlp = ordered(Classify(MLP(outputs=3, width=4, depth=11, norm="layer")), batches[0])
    assert mlp == [*(f"dense_{i}" for i in range(11)), "head"]  # not by name, where dense_10 comes before dense_2; norms hold no matrix
    text = {"tokens": np.zeros((2, 8), np.int32), "mask": np.ones((2, 8), bool), "index": np.arange(2, dtype=np.int32)}
    for scan in (False, True):
        gpt = ordered(LanguageModel(GPT(11, 8, width=8, depth=2, heads=2, scan=scan, tied=False)), text)
        assert gpt[0] == "token"
        assert gpt[-2:] == ["block_1/mlp/down", "head"]
        assert gpt.index("block_0/attention/out") < gpt.index("block_0/mlp/up") < gpt.index("block_1/attention/query")


def test_norms_and_dead_units_are_those_of_the_numbers_themselves(batches):
    module = MLP(outputs=3, width=6, depth=2)
    step = Step(Classify(module), Optimizer(optax.sgd), Constant(), steps=4, stability=True)
    batch = batches[0]
    state = step.create(jax.random.key(0), batch, {"learning_rate": 0.5})
    bias = np.zeros(6, np.float32)
    bias[:2] = -100.0  # two units that nothing wakes
    state = dataclasses.replace(state, params={**state.params, "dense_1": {**state.params["dense_1"], "bias": jnp.asarray(bias)}})
    metrics = jax.jit(step)(state, None, batch)[1]

    def loss(params):
        logits, _ = module.apply({"params": params}, jnp.asarray(batch["features"]), train=False)
        each = -jax.nn.log_softmax(logits)[np.arange(16), batch["label"]]
        return jnp.where(batch["mask"], each, 0.0).sum() / np.float32(batch["mask"].sum())

    grads = jax.jit(jax.grad(loss))(state.params)
    for layer, leaves in grads.items():
        norm = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in leaves.values()))
        np.testing.assert_allclose(metrics[f"gradient_norm/{layer}"][0], norm, rtol=1e-4)
        np.testing.assert_allclose(metrics[f"update_norm/{layer}"][0], 0.5 * norm, rtol=1e-4)
    _, taps = module.apply({"params": state.params}, jnp.asarray(batch["features"]), train=False)
    for name in ("hidden_0", "hidden_1"):
        count, weight = metrics[f"active/{name}"]
        np.testing.assert_array_equal(count, (np.asarray(taps[name])[batch["mask"]] > 1e-6).sum(0))
        assert float(weight) == batch["mask"].sum()
    assert stability.Watch(["dense_0", "head"]).scores(jax.device_get(metrics))["dead/hidden_1"] >= 2 / 6


def test_measuring_changes_no_update(make_step, batches, train):
    plain, _ = train(make_step(), batches[:3])
    watched, _ = train(dataclasses.replace(make_step(), stability=True), batches[:3])
    np.testing.assert_allclose(*(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)]) for state in (plain, watched)), atol=1e-6)


@pytest.mark.slow
def test_what_is_measured_does_not_depend_on_microbatches(make_step, batches, train):
    whole, parts = (train(dataclasses.replace(make_step(accumulate=n), stability=True), batches[:1])[1][0] for n in (1, 4))
    assert whole.keys() == parts.keys()
    for name, (total, weight) in whole.items():
        np.testing.assert_allclose(total, parts[name][0], rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(weight, parts[name][1], rtol=1e-6)


@pytest.mark.slow
def test_the_option_reaches_metrics_jsonl_and_a_resumed_run_writes_the_same(command, tmp_path):
    common = (
        "experiment=digits_mlp",
        "train.chunk=1",
        "model.width=8",
        "train.steps=6",
        "train.eval_every=2",
        "train.log_every=3",
        "train.stability=true",
    )
    quiet = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none")
    for path, halves in (("whole", ((),)), ("halves", (("train.stop_at=4",), ()))):  # 4: in the middle of a window
        for half in halves:
            assert command("train", *common, *quiet, *half, f"run_dir={tmp_path / path}").code in (0, 75)
    lines = [list(map(json.loads, (tmp_path / path / "metrics.jsonl").read_text().splitlines())) for path in ("whole", "halves")]
    last = [next(record for record in reversed(record) if "train/dead/hidden_0" in record) for record in lines]
    names = [name for name in last[0] if "norm" in name or "dead" in name or "ratio" in name]
    assert len(names) == 1 + 3 + 3 + 2 + 1
    assert {name: last[0][name] for name in names} == {name: last[1][name] for name in names}
    results = [json.loads((tmp_path / path / "result.json").read_text()) for path in ("whole", "halves")]
    assert results[0]["state_sha256"] == results[1]["state_sha256"]
