"""Maximal-update parametrization: the table for every kind of parameter, the base width bit for bit, flat coordinates, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from omegaconf import open_dict

from research.core import mup
from research.core.config import compose, differences, split_values
from research.core.errors import ConfigError
from research.core.spec import fields
from research.core.tree import paths, unstack
from research.inspect import inspect
from research.training.assembly import assemble, widening
from research.training.coordinates import coordinates, slopes
from research.training.optimizer import Decay, Optimizer, sgd

IMAGE = {"fields": fields(image=((8, 8, 1), "float32"), label=((), "int32")), "classes": 10, "outputs": 10, "image": [8, 8, 1]}
TEXT = {"fields": fields(mask=(8,), tokens=((8,), "int32"), target=((8,), "int32")), "vocabulary": 11, "time": 8, "bytes_per_token": 1.0}
MLP = ("model=mlp", "model.depth=3")
CNN = ("model=cnn", "model.padding=SAME")
GPT = ("model=gpt", "objective=language_model", "model.depth=2", "model.heads=2")
CASES = {  # overrides at m = 4, and the arguments of the base
    "mlp": ((*MLP, "model.width=64", "model.base=16"), {"width": 16}),
    "mlp of several widths": ((*MLP, "model.width=[64,32,128]", "model.base=16", "model.norm=layer"), {"width": (16, 8, 32)}),
    "cnn": ((*CNN, "model.channels=[16,32,32]", "model.hidden=[32]", "model.base=4"), {"channels": (4, 8, 8), "hidden": (8,)}),
    "gpt": ((*GPT, "model.width=64", "model.base=16"), {"width": 16}),
    "gpt, scanned": ((*GPT, "model.width=64", "model.base=16", "model.scan=true"), {"width": 16}),
    "gpt, more heads": (
        (*GPT, "model.width=64", "model.base=16", "model.head_width=8", "model.heads=8", "model.hidden=128", "model.kv_heads=4"),
        {"width": 16, "heads": 2, "hidden": 32, "kv_heads": 1},
    ),
    "gpt, untied": ((*GPT, "model.width=64", "model.base=16", "model.tied=false", "model.activation=swiglu", "model.norm=rms"), {"width": 16}),
}
VECTORS = ("/embedding", "/bias", "/scale")


def made(*overrides):
    """(the config with its data's spec, what it describes)."""
    config = compose(["train.steps=8", "data.batch=4", *overrides])
    with open_dict(config):
        config.data.spec = TEXT if "objective=language_model" in overrides else IMAGE
    return config, assemble(config)


def expected_kind(path, case):
    """Table 8's, by the names of this project's layers."""
    first = {"mlp": "dense_0/kernel", "cnn": "conv_0/kernel"}.get(case[:3])
    if path == "head/bias":
        return "fixed"
    if path == "head/kernel":
        return "output"
    return "input" if path == first or path.endswith(VECTORS) else "hidden"


def at_base(case, *more):
    """The overrides of a case with its base's own sizes."""
    overrides, base = CASES[case]
    sized = [f"model.{name}={list(size) if isinstance(size, tuple) else size}" for name, size in base.items()]
    return (*overrides, *sized, *more)


def batch_of(spec, rows=4, seed=0):
    random = np.random.default_rng(seed)
    made = {"mask": np.ones((rows, *spec["fields"]["mask"]["shape"]), bool), "index": np.arange(rows, dtype=np.int32)}
    if "tokens" in spec["fields"]:
        made |= {name: random.integers(0, 11, (rows, 8)).astype(np.int32) for name in ("tokens", "target")}
    else:
        made |= {"image": random.normal(size=(rows, 8, 8, 1)).astype(np.float32), "label": random.integers(0, 10, rows).astype(np.int32)}
    return jax.tree.map(jnp.asarray, made)


@pytest.mark.parametrize("case", CASES)
def test_each_parameter_is_of_its_kind_and_has_the_rates_of_the_table(case):
    overrides, _ = CASES[case]
    for optimizer, table in (("adamw", {"hidden": 1 / 4}), ("momentum", {"input": 4.0, "output": 4.0})):
        config, assembly = made(*overrides, f"optimizer={optimizer}")
        found = widening(split_values(config)[0])
        shown = {path.replace("blocks/", "block_0/"): kind for path, kind in found.items()}
        assert shown == {path: expected_kind(path, case) for path in shown}
        assert set(found) == set(paths(assembly.abstract().params))
        rates = dict(assembly.step.optimizer.rates)
        assert {path: rates.get(path, 1.0) for path in found} == {path: table.get(kind, 1.0) for path, kind in found.items()}


@pytest.mark.parametrize("case", ["mlp of several widths", *(pytest.param(case, marks=pytest.mark.slow) for case in ("cnn", "gpt, untied"))])
def test_first_values_have_the_deviation_of_the_base_or_its_mth_root(case):
    """Kernels and embeddings of a wide model, over many seeds, against those of the standard model at the base width."""
    overrides, _ = CASES[case]
    wide, narrow = (made(*given)[1] for given in (overrides, at_base(case, "model.base=null")))

    def deviations(assembly):
        def of(key):
            return jax.tree.map(lambda x: jnp.square(x).mean(), assembly.step.objective.init(key, batch)[0])

        batch = batch_of(assembly.spec)
        squares = jax.jit(lambda keys: jax.lax.map(of, keys))(jax.random.split(jax.random.key(0), 40))
        return {path: float(np.sqrt(x.mean())) for path, x in paths(squares).items()}

    there, here = deviations(narrow), deviations(wide)
    for path in there:
        if path.endswith("/bias"):
            assert here[path] == 0, path
        else:
            assert here[path] / there[path] == pytest.approx(0.5 if expected_kind(path, case) == "hidden" else 1.0, rel=0.06), path


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case.startswith("gpt, ") else case for case in CASES])
def test_at_the_base_its_program_is_that_of_the_standard_model(case):
    programs = []
    for base in ((), ("model.base=null",)):
        _, assembly = made(*at_base(case, *base), "optimizer=adamw")
        state, batch = assembly.abstract(), batch_of(assembly.spec)
        programs.append((jax.make_jaxpr(assembly.step)(state, None, batch), jax.make_jaxpr(assembly.step.objective.init)(jax.random.key(0), batch)))
    assert str(programs[0]) == str(programs[1])
    assert "mul" in str(programs[0])


@pytest.mark.slow
def test_at_the_base_it_trains_to_the_standard_model_bit_for_bit():
    states = []
    for base in ((), ("model.base=null",)):
        _, assembly = made(*at_base("mlp", *base), "optimizer.learning_rate=0.01")
        state, step = assembly.state(), jax.jit(assembly.step)
        for seed in range(2):
            state, _ = step(state, None, batch_of(assembly.spec, seed=seed))
        states.append(state)
    jax.tree.map(np.testing.assert_array_equal, states[0].params, states[1].params)


@pytest.mark.slow
def test_a_scanned_model_is_the_same_as_its_blocks_one_by_one():
    results = []
    for scan in ("true", "false"):
        _, assembly = made(*GPT, "model.width=32", "model.base=16", f"model.scan={scan}", "optimizer.learning_rate=0.01")
        state = assembly.state()
        first = unstack(state.params)
        state, metrics = jax.jit(assembly.step)(state, None, batch_of(TEXT))
        results.append((first, unstack(state.params), metrics["loss"][0]))
    jax.tree.map(np.testing.assert_array_equal, results[0][0], results[1][0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), results[0][1:], results[1][1:])  # of a rate of 0.01


RATE, DECAY = 0.05, 0.3
WEIGHT, SLOPE = np.array([1.0, -2.0, 3.0], np.float32), np.array([0.5, 0.25, -1.0], np.float32)


@pytest.mark.parametrize(
    ("factory", "arguments", "first"),
    [  # the first update without weight decay, in closed form
        (optax.adam, {"eps": 0.0}, -np.sign(SLOPE)),
        (optax.adamw, {"eps": 0.0, "weight_decay": DECAY}, -np.sign(SLOPE)),
        (optax.lion, {"weight_decay": DECAY}, -np.sign(SLOPE)),
        (optax.adagrad, {"initial_accumulator_value": 0.0, "eps": 0.0}, -np.sign(SLOPE)),
        (optax.rmsprop, {"decay": 0.0, "eps": 0.0}, -np.sign(SLOPE)),
        (sgd, {"weight_decay": DECAY}, -SLOPE),
        (sgd, {"weight_decay": DECAY, "momentum": 0.9, "nesterov": True}, -1.9 * SLOPE),
    ],
    ids=["adam", "adamw", "lion", "adagrad", "rmsprop", "sgd", "nesterov"],
)
def test_a_rate_multiplies_the_update_and_leaves_the_weight_decay(factory, arguments, first):
    arguments = {**arguments, **({"mask": Decay()} if "weight_decay" in arguments else {})}
    optimizer = Optimizer(factory, tuple(arguments.items()), rates=(("slow/kernel", 0.25), ("slow/bias", 4.0)))
    params = {name: {"kernel": jnp.asarray(WEIGHT), "bias": jnp.asarray(WEIGHT)} for name in ("slow", "plain")}
    grads = jax.tree.map(lambda _: jnp.asarray(SLOPE), params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params, {}, jnp.float32(RATE))
    decay = DECAY * (1.9 if arguments.get("nesterov") else 1.0) if "weight_decay" in arguments else 0.0
    for name, leaf, rate in (("slow", "kernel", 0.25), ("slow", "bias", 4.0), ("plain", "kernel", 1.0), ("plain", "bias", 1.0)):
        shrunk = decay * WEIGHT if leaf == "kernel" else 0.0  # biases do not decay
        np.testing.assert_allclose(updates[name][leaf], RATE * (rate * first - shrunk), rtol=2e-5, atol=1e-6, err_msg=f"{name}/{leaf}")


@pytest.mark.parametrize("optimizer", ["adam", "lion", "adagrad", "rmsprop", "sgd", "momentum", "nesterov", "gradient_descent", "adamw"])
def test_every_optimizer_with_a_rule_takes_a_step(optimizer):
    _, assembly = made(*MLP, "model.width=32", "model.base=16", f"optimizer={optimizer}")
    assembly.check(4)
    assert assembly.step.optimizer.rates


def test_logits_of_attention_are_divided_by_the_head_width_where_heads_widen():
    """softmax(sqrt(k0) q . k / k) of the queries and keys that the layer's own kernels give."""
    batch = batch_of(TEXT)
    for given, k, base in (
        (("model.width=64", "model.base=16"), 32, 8),
        (("model.width=64", "model.base=16", "model.head_width=8", "model.heads=8"), 8, 8),
    ):
        _, assembly = made(*GPT, *given, "model.depth=1")
        state, objective = assembly.state(), assembly.step.objective
        _, taps = jax.jit(lambda params, objective=objective: objective.predict(params, {}, None, batch, None, {}))(state.params)
        kernel, x = state.params["block_0"]["attention"], np.asarray(taps["input"], np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)  # the first norm's scale is 1, its bias 0
        query, key = (np.einsum("btd,dhk->bhtk", x, np.asarray(kernel[name]["kernel"], np.float64)) for name in ("query", "key"))
        scores = math.sqrt(base) * np.einsum("bhtk,bhsk->bhts", query, key) / k
        scores = np.where(np.tril(np.ones((8, 8), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        np.testing.assert_allclose(taps["block_0/attention/weights"], weights / weights.sum(-1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_what_the_head_reads_is_divided_by_m_however_the_logits_are_made(tied):
    batch = batch_of(TEXT)
    _, assembly = made(*GPT, "model.width=64", "model.base=16", f"model.tied={tied}", "model.depth=1")
    state, objective = assembly.state(), assembly.step.objective
    outputs, taps = jax.jit(lambda params: objective.predict(params, {}, None, batch, None, {}))(state.params)
    matrix = state.params["token"]["embedding"].T if tied == "true" else state.params["head"]["kernel"]
    np.testing.assert_allclose(outputs["logits"], taps["normalized"] @ matrix / 4, atol=1e-6)
    losses = []
    for chunk in ("null", "3"):
        _, assembly = made(*GPT, "model.width=64", "model.base=16", f"model.tied={tied}", "model.depth=1", f"objective.chunk={chunk}")
        loss = jax.jit(lambda params, objective=assembly.step.objective: objective(params, {}, None, batch, None, {}, train=False)[0].terms)
        losses.append(loss(state.params)["cross_entropy"])
    np.testing.assert_allclose(*losses, rtol=1e-6)


def widest(family, base, optimizer, widths, rate, seeds):
    """{width: {tap: its change after four updates}}, geometric means over seeds of the first values and the batch."""
    found = {}
    for width in widths:
        given = {
            "mlp": (*MLP, f"model.width={width}"),
            "gpt": (*GPT, f"model.width={width}"),
            "cnn": (*CNN, f"model.channels=[{width // 2},{width},{width}]", f"model.hidden=[{width}]", "model.pool=[2,2,1]"),
        }[family]
        runs = []
        for seed in range(seeds):
            _, assembly = made(*given, f"model.base={base}", f"optimizer={optimizer}", f"optimizer.learning_rate={rate}", f"seed={seed}")
            runs.append(coordinates(assembly, [batch_of(assembly.spec, 16, seed=seed)] * 4))
        found[width] = {tap: math.exp(sum(math.log(run[tap][-1]) for run in runs) / seeds) for tap in runs[0]}
    return found


@pytest.mark.parametrize(
    ("family", "base", "optimizer", "widths", "rate", "seeds"),
    [
        pytest.param("mlp", 64, "adam", (64, 256, 1024), 0.001, 1, marks=pytest.mark.slow),
        pytest.param("mlp", 64, "sgd", (64, 256, 1024), 0.1, 1, marks=pytest.mark.slow),
        pytest.param("gpt", 32, "adam", (32, 64, 128, 256), 0.003, 1, marks=pytest.mark.slow),
        pytest.param("cnn", 8, "adam", (16, 32, 64, 128), 0.001, 8, marks=pytest.mark.slow),  # so narrow that one seed's slopes are off by 0.2
    ],
    ids=["mlp, adam", "mlp, sgd", "gpt, adam", "cnn, adam"],
)
def test_activations_move_alike_at_every_width_and_in_the_standard_model_they_do_not(family, base, optimizer, widths, rate, seeds):
    """The coordinate check: slopes of log change over log width."""
    flat = slopes(widest(family, base, optimizer, widths, rate, seeds))
    standard = slopes(widest(family, "null", optimizer, widths, rate, seeds))
    assert set(flat) == set(standard)
    assert max(map(abs, flat.values())) < 0.15
    assert max(map(abs, standard.values())) > 0.4


def test_slopes_are_the_powers_of_the_width():
    assert slopes({w: {"a": 3 * w**0.5, "b": 2.0, "c": 7 / w} for w in (64, 128, 512)}) == pytest.approx({"a": 0.5, "b": 0.0, "c": -1.0}, abs=1e-12)


def test_a_resumed_run_sees_a_change_of_the_base():
    old, new = (made(*MLP, "model.width=64", f"model.base={base}")[0] for base in ("null", 32))
    assert ("model.base", None, 32) in differences(old, new)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((*MLP, "model.width=64", "model.base=16", "optimizer=muon"), ("muon", "adamw", "model.base=null")),
        ((*MLP, "model.width=64", "model.base=16", "optimizer=lamb"), ("lamb",)),
        ((*MLP, "model.width=64", "model.base=16", "optimizer=adafactor"), ("adafactor",)),
        ((*MLP, "model.width=64", "model.base=16", "optimizer=chain"), ("chain",)),
        ((*MLP, "model.width=[64,24,8]", "model.base=12"), ("model: base=12", "a multiple of 8", "as 16")),
        ((*MLP, "model.width=64", "model.base=0"), ("model: base=0",)),
        ((*GPT, "model.width=64", "model.heads=4", "model.base=6"), ("base=6", "head_width=16", "as 8")),
        ((*GPT, "model.width=64", "model.heads=4", "model.head_width=16", "model.base=8"), ("base=8", "heads=4", "as 16")),
        (("model=resnet18", "model.base=16"), ("model.base",)),
        (("model=lstm", "objective=language_model", "model.base=16"), ("model.base",)),
        ((*MLP, "model.base=wide"), ("model.base='wide'",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else None,
)
def test_what_makes_no_sense_is_refused_in_one_line(overrides, words):
    with pytest.raises(ConfigError) as error:
        made(*overrides)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_structured_pruning_refuses_what_would_change_m():
    _, assembly = made(*MLP, "model.width=64", "model.base=16")
    with pytest.raises(ConfigError, match=r"model\.base=16"):
        _ = assembly.step.objective.module.sizes


@pytest.mark.slow
def test_inspect_shows_the_multipliers_and_draws_the_check(tmp_path):
    figure = tmp_path / "drawn" / "coordinates.png"
    overrides = ["experiment=mup", "model.depth=2", "model.width=32", "model.base=8", "taps=false"]
    report = inspect(compose([*overrides, "coordinates.times=[1,2]", "coordinates.updates=1", f"coordinates.figure={figure}"], verb="inspect"))
    rows = {row["path"]: (row["kind"], row["first_values"], row["rate"]) for row in report["widening"]}
    assert rows["dense_1/kernel"] == ("hidden", 0.5, 0.25)
    assert rows["head/kernel"] == ("output", 1.0, 1.0)
    assert set(report["coordinates"]) == {"standard", "maximal update"}
    assert set(report["coordinates"]["standard"]) == {"hidden_0", "hidden_1", "logits"}
    assert figure.stat().st_size > 10_000
    for bad, words in (("model.base=null", "no base"), ("coordinates.times=[1]", "two or more")):
        with pytest.raises(ConfigError, match=words):
            inspect(compose([*(line for line in overrides if not line.startswith("model.base")), "coordinates.times=[1,2]", bad], verb="inspect"))


def test_rates_of_every_kind_are_powers_of_m():
    found = {kind: kind for kind in mup.KINDS}
    assert mup.rates(found, 8.0, "adam") == {"input": 1.0, "hidden": 0.125, "output": 1.0, "fixed": 1.0}
    assert mup.rates(found, 8.0, "sgd") == {"input": 8.0, "hidden": 1.0, "output": 8.0, "fixed": 1.0}
