"""Every YAML of every group is composed, built and traced; every experiment says what it is."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf, open_dict

from research.core import folder
from research.core.build import build
from research.core.config import compose, save_config
from research.core.spec import abstract_batch, fields
from research.explanation import methods
from research.run import looked_into
from research.training.assembly import assemble

CONF, EXPERIMENTS = pathlib.Path(folder.conf()), pathlib.Path(folder.experiments())
IMAGE = {"fields": fields(image=((28, 28, 1), "float32"), label=((), "int32")), "classes": 10, "outputs": 10, "image": [28, 28, 1]}
TABLE = {"fields": fields(features=((7,), "float32"), target=((2,), "float32")), "features": 7, "outputs": 2}
TEXT = {"fields": fields(mask=(16,), tokens=((16,), "int32"), target=((16,), "int32")), "vocabulary": 11, "time": 16, "bytes_per_token": 1.0}
SPECS = {"classify": IMAGE, "regress": TABLE, "language_model": TEXT}
TEACHERS = {"sparse_autoencoder": "shakespeare_char_cpu"}  # experiment: that of the run that its command names
RELEVANCE = ("right_reasons", "attention_alignment")  # objectives that read which inputs may be used
TEXT_MODELS = ("gpt", "lstm", "gpt2_124m", "gpt2_350m", "gpt_1b3", "gpt3_175b")
MODEL_OPTIONS = {
    "perceptron": ("model.outputs=3",),
    "mlp": (
        "model.width=[8,4]",
        "model.base=64",
        "model.width=[8,4] model.base=4",
        "model.depth=0",
        "model.norm=batch",
        "model.norm=layer",
        "model.dropout=0.5",
        "model.activation=silu",
    ),
    "cnn": (
        *("model.kernel=[5,3,1]", "model.pool=1", "model.padding=SAME", "model.hidden=[]", "model.hidden=[32,16]", "model.norm=batch"),
        *("model.norm=layer", "model.dropout=0.5", "model.activation=gelu", "model.base=8"),
    ),
    "lstm": ("model.width=[8,16]", "model.tied=true", "model.embedding=8", "model.depth=1", "model.dropout=0.5"),
    "resnet18": ("model.blocks=[1,1,1,1]", "model.hidden=8", "model.stem=imagenet", "model.zero=true", "model.activation=gelu"),
    "gpt": (
        *("model.positions=sinusoidal", "model.positions=rotary", "model.activation=swiglu", "model.activation=relu", "model.norm=rms"),
        *("model.bias=false", "model.tied=false", "model.dropout=0.5", "model.scan=true", "model.remat=full", "model.scan=true model.remat=dots"),
        *(
            "model.kv_heads=2",
            "model.hidden=[8,16,8,16]",
            "model.hidden=0",
            "model.hidden=[8,0,8,0]",
            "model.heads=[4,2,4,2] model.head_width=16",
            "model.head_width=8",
            "model.base=64",
            "model.head_width=32 model.base=32",
            "model.remat=[middle,mlp/hidden]",
            "model.attention=reference",
            "model.attention=blockwise",
        ),
    ),
    "gpt2_124m": ("model.vocabulary=50257 model.time=1024",),
    "gpt2_350m": ("model.vocabulary=50257 model.time=1024",),
    "gpt_1b3": ("model.remat=full",),
    "gpt3_175b": ("model.remat=[middle]",),
}


def options(group):
    return sorted(path.relative_to(CONF / group).with_suffix("").as_posix() for path in (CONF / group).rglob("*.yaml"))


def traced(overrides, spec):
    """The state after one update of what these overrides describe, as shapes alone."""
    config = compose([*overrides, "train.steps=300", "data.batch=4"])
    OmegaConf.set_struct(config, False)
    if config.objective.get("teacher", "") is None:  # it looks into a run, here into one of a classifier
        config.objective.teacher = compose([*overrides, "objective=classify"]).objective
    config.data.spec = spec
    assembly = assemble(config)
    assembly.check(4, assembly.still())
    return assembly


@pytest.mark.parametrize("model", options("model"))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_model_takes_a_step(model, precision):
    objective = "language_model" if model.startswith(("gpt", "lstm")) else "classify"
    assembly = traced([f"model={model}", f"objective={objective}", f"train.precision={precision}"], SPECS[objective])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(assembly.abstract().params))


@pytest.mark.parametrize(("model", "option"), [(model, option) for model, every in MODEL_OPTIONS.items() for option in every])
def test_every_option_of_a_model_takes_a_step(model, option):
    objective = "language_model" if model.startswith(("gpt", "lstm")) else "classify"
    spec = {**SPECS[objective], "outputs": 3} if "outputs" in option else SPECS[objective]
    traced([f"model={model}", f"objective={objective}", *option.split()], spec)


def test_no_model_is_without_options():
    assert set(MODEL_OPTIONS) == set(options("model"))


@pytest.mark.parametrize("objective", options("objective"))
def test_every_objective_takes_a_step(objective):
    text = objective in ("language_model", "attention_alignment")
    spec = SPECS.get(objective, TEXT if text else IMAGE)
    if objective in RELEVANCE:
        shape = (spec["time"],) if text else tuple(spec["image"])
        spec = {**spec, "fields": {**spec["fields"], "relevance": {"shape": list(shape), "dtype": "float32"}}}
    traced([f"objective={objective}", f"model={'gpt' if text else 'mlp'}"], spec)


@pytest.mark.parametrize("optimizer", options("optimizer"))
def test_every_optimizer_takes_a_step(optimizer):
    traced([f"optimizer={optimizer}", "model=mlp", "objective=regress"], TABLE)


@pytest.mark.parametrize("schedule", options("schedule"))
def test_every_schedule_takes_a_step(schedule):
    step = traced([f"schedule={schedule}"], IMAGE).step
    shape = [float(step.schedule(jnp.int32(i), 300)) for i in (0, 150, 299)]
    assert all(0.0 <= value <= 1.0 for value in shape)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_says_what_it_is(path):
    config = compose([f"experiment={path.stem}"])
    assert config.name == path.stem
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Command:", "Published:", "Measured:"):
        assert any(word in line for line in header), f"{path.name} does not say {word}"
    low, high = config.expect.band
    assert low is not None or high is not None
    assert low is None or high is None or low < high


@pytest.mark.parametrize("name", options("../experiments"))
def test_every_experiment_takes_a_step_and_expects_what_it_measures(name, tmp_path):
    config = compose([f"experiment={name}"])
    data = compose([f"experiment={TEACHERS.get(name, name)}"])
    spec = spec_of(data)
    if name in TEACHERS:  # data, model and the objective that it looks into are those of a run: here of a folder that holds a config and no weights
        with open_dict(data):
            data.data.spec = spec
        save_config(data, tmp_path / "config.yaml")
        config.teacher.run = str(tmp_path)
        assert looked_into(config) is not None
    with open_dict(config):
        config.data.spec = spec
    assembly = assemble(config, batches=20)
    still = assembly.still()
    assembly.check(4, still)
    split, _, metric = config.expect.metric.partition("/")
    assert split in ("validation", "test") or (split == "train" and not config.data.get("validation", 0))
    objective, state, batch = assembly.step.objective, assembly.abstract(), abstract_batch(spec, 4)
    tally, _ = jax.eval_shape(lambda s, f, b: objective(s.params, s.extra, f, b, None, s.hyper, train=False), state, still, batch)
    means = {name: np.full(total.shape, 0.001).tolist() for name, (total, _) in tally.metrics.items()}  # a mean square above the squared mean
    assert metric in {*means, *objective.derived(means)}


def spec_of(config):
    """The spec that an experiment's data would have, as far as its config tells."""
    if "image" in config.data.spec:
        declared = OmegaConf.to_container(config.data.spec).get("fields", {})
        return {**IMAGE, "fields": {**fields(image=(tuple(config.data.spec.image), "float32"), label=((), "int32")), **declared}}
    if "features" in config.data.spec:
        n, o = config.data.features, config.data.outputs
        return {"fields": fields(features=((n,), "float32"), target=((o,), "float32")), "features": n, "outputs": o}
    time = config.data.time
    return {**TEXT, "fields": fields(mask=(time,), tokens=((time,), "int32"), target=((time,), "int32")), "time": time}


@pytest.mark.parametrize("group", sorted(path.name for path in CONF.iterdir() if path.is_dir()))
def test_every_option_of_every_group_composes(group):
    for option in options(group):
        assert compose([f"{group}={option}"], verb="compress" if group == "method" else "train") is not None


@pytest.mark.parametrize("sparsify", options("sparsify"))
def test_every_way_to_train_sparsely_takes_a_step(sparsify):
    traced([f"sparsify={sparsify}", "train.ema=0.99"], IMAGE)


@pytest.mark.parametrize("method", [method for method in options("method") if method != "soup"])  # which has no default: the runs to average
def test_every_method_is_built_from_its_yaml(method):
    explains = method in methods.names()
    made = build(compose([f"method={method}"], verb="explain" if explains else "compress").method, where="method")
    assert made.reads in ("examples", "nothing") if explains else isinstance(made.trains, bool)
