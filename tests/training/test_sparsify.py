"""Sparsity during training: zeros that stay zero whatever the optimizer does, and masks that follow each paper's rule."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from omegaconf import OmegaConf

from research.core.build import build
from research.core.config import compose, resolved
from research.core.errors import ConfigError
from research.core.sparsity import layer_sparsities
from research.core.tree import map_paths, paths, stack, unstack
from research.training.optimizer import Optimizer
from research.training.sparsify import Gradual, Movement, RigL, Static

OPTIMIZERS = [
    *("gradient_descent", "sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "lamb", "lion", "adafactor", "muon", "chain"),
]
RANDOM = np.random.RandomState(0)


def leaf(*shape):
    return RANDOM.randn(*shape).astype(np.float32)


def block():
    return {"attention": {"query": {"kernel": leaf(8, 2, 4), "bias": leaf(2, 4)}}, "mlp": {"kernel": leaf(8, 16)}, "norm": {"scale": leaf(8)}}


PARAMS = {"token": {"embedding": leaf(11, 8)}, "block_0": block(), "block_1": block(), "head": {"kernel": leaf(8, 11), "bias": leaf(11)}}
GRADIENTS = [jax.tree.map(lambda x: leaf(*x.shape), PARAMS) for _ in range(20)]
KERNELS = {path for path in paths(PARAMS) if path.endswith("/kernel")}
SIZES = {path: np.size(x) for path, x in paths(PARAMS).items() if path in KERNELS}
SPARSE = map_paths(lambda path, x: x * (np.abs(x) > 0.7).astype(np.float32) if path in KERNELS else x, PARAMS)
RULES = {
    "gradual": Gradual(sparsity=0.8, every=3, steps=20),
    "gradual, erk": Gradual(sparsity=0.8, initial=0.3, every=3, budget="erk", steps=20),
    "gradual, global": Gradual(sparsity=0.8, every=3, scope="global", steps=20),
    "movement": Movement(sparsity=0.8, begin=0.2, every=3, steps=20),
    "rigl": RigL(sparsity=0.7, every=3, steps=20),
}


@pytest.fixture
def node(request):
    def load(name, **changes):
        file = OmegaConf.load(request.config.rootpath / "conf" / "optimizer" / f"{name}.yaml")
        return {**OmegaConf.to_container(file.get("optimizer", file)), **changes}

    return load


def walk(optimizer, params, gradients, rate=0.05):
    """(parameters, state) after each update."""
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params, {}, jnp.float32(rate))
        params = jax.jit(optax.apply_updates)(params, updates)
        yield params, state


def zeros(params):
    return {path: np.asarray(x) == 0 for path, x in paths(params).items() if path in KERNELS}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_through_every_optimizer(name, node):
    decay = {"weight_decay": 0.3} if "weight_decay" in node(name) else {}
    optimizer = Optimizer.from_config(node(name, **decay), clip=5.0, sparsify=Static(), ema=0.9)
    expected = zeros(SPARSE)
    assert all(0.2 < zero.mean() < 0.8 for zero in expected.values())
    for t, (params, state) in enumerate(walk(optimizer, SPARSE, GRADIENTS)):
        for tree in (params, optimizer.average(state)):
            for path, zero in zeros(tree).items():
                np.testing.assert_array_equal(zero, expected[path], err_msg=path)
        if t == 0:
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(x != y, x != 0), SPARSE, params)  # all that lives has moved


def test_without_the_rule_they_do_not_stay(node):
    *_, (params, _) = walk(Optimizer.from_config(node("adamw")), SPARSE, GRADIENTS[:2])
    assert not any(zero.any() for zero in zeros(params).values())


def test_what_lives_is_trained_as_if_there_were_nothing_else(node):
    """Clipping, moments and norms see the gradient of the living alone: the same steps as with gradients that are zero elsewhere."""
    alive = jax.tree.map(lambda x: (x != 0).astype(np.float32), SPARSE)
    masked = [jax.tree.map(np.multiply, gradient, alive) for gradient in GRADIENTS]
    sparse = Optimizer.from_config(node("lamb", weight_decay=0.1), clip=1.0, sparsify=Static())
    plain = Optimizer.from_config(node("lamb", weight_decay=0.1), clip=1.0)
    *_, (params, _) = walk(sparse, SPARSE, GRADIENTS)
    *_, (expected, _) = walk(plain, SPARSE, masked)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params, expected)


@pytest.mark.parametrize("name", ["gradual, global", "movement", pytest.param("rigl", marks=pytest.mark.slow)])
def test_a_scanned_model_takes_the_same_steps_as_unscanned(name, node):
    optimizer = Optimizer.from_config(node("adamw"), sparsify=RULES[name], ema=0.9)
    *_, (plain, state) = walk(optimizer, PARAMS, GRADIENTS)
    *_, (scanned, stacked) = walk(optimizer, jax.jit(stack)(PARAMS), [jax.jit(stack)(gradient) for gradient in GRADIENTS])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), plain, unstack(scanned))
    before, after = (paths(unstack(s.masks.kept)) for s in (state, stacked))
    assert set(before) == set(after) == KERNELS
    for path in before:
        np.testing.assert_array_equal(before[path], after[path], err_msg=path)


@pytest.mark.parametrize("budget", ["uniform", "erk"])
def test_the_cubic_schedule_is_the_papers_and_reaches_its_end(budget, node):
    initial, final, begin, end, every = 0.2, 0.8, 4, 16, 3
    rule = Gradual(sparsity=final, initial=initial, begin=begin / 20, end=end / 20, every=every, budget=budget, steps=20)
    shapes = {path: np.shape(x) for path, x in paths(PARAMS).items() if path in KERNELS}
    first, last = (layer_sparsities(shapes, share, budget) for share in (initial, final))
    seen = [zeros(params) for params, _ in walk(Optimizer.from_config(node("adamw"), sparsify=rule), PARAMS, GRADIENTS)]
    for t, masks in enumerate(seen):
        at = min(max(begin + (t - begin) // every * every, begin), end)  # the last choice
        share = 1 - (1 - (at - begin) / (end - begin)) ** 3
        for path, zero in masks.items():
            start, stop = (int(SIZES[path] * shares[path]) for shares in (first, last))
            assert abs(zero.sum() - (start + (stop - start) * share)) <= 1, (t, path)
    for path, zero in seen[-1].items():
        assert zero.sum() == int(SIZES[path] * last[path])


def test_a_schedule_to_the_very_end_is_finished_by_the_last_update(node):
    rule = Gradual(sparsity=0.8, end=1.0, every=7, steps=20)
    *_, (params, _) = walk(Optimizer.from_config(node("sgd"), sparsify=rule), PARAMS, GRADIENTS)
    assert all(zero.sum() == int(zero.size * 0.8) for zero in zeros(params).values())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gradual_takes_the_smallest_weights(scope, node):
    """Twenty steps of gradient descent, by hand."""
    rule = Gradual(sparsity=0.8, end=0.5, every=2, scope=scope, steps=20)
    weights = {path: np.array(x) for path, x in paths(PARAMS).items() if path in KERNELS}
    kept = {path: np.ones(x.shape, bool) for path, x in weights.items()}
    for t, (params, _) in enumerate(walk(Optimizer.from_config(node("gradient_descent"), sparsify=rule), PARAMS, GRADIENTS)):
        if 0 < t <= 10 and t % 2 == 0:
            share = 0.8 - 0.8 * (1 - t / 10) ** 3
            for group in [weights] if scope == "global" else [{path: x} for path, x in weights.items()]:
                flat = np.concatenate([np.abs(x).ravel() for x in group.values()])
                threshold = np.sort(flat)[int(np.float32(int(flat.size * 0.8)) * np.float32(share / 0.8) + 1e-4)]
                kept |= {path: np.abs(x) >= threshold for path, x in group.items()}
        for path, gradient in paths(GRADIENTS[t]).items():
            if path in weights:
                weights[path] = np.where(kept[path], weights[path] - np.float32(0.05) * gradient, 0)
                np.testing.assert_allclose(paths(params)[path], weights[path], atol=1e-5, err_msg=f"{t} {path}")


def test_movement_takes_the_smallest_sums_of_minus_weight_times_gradient(node):
    rule = Movement(sparsity=0.6, end=0.5, every=5, steps=20)
    weights = {path: np.array(x) for path, x in paths(PARAMS).items() if path in KERNELS}
    kept = {path: np.ones(x.shape, bool) for path, x in weights.items()}
    score = {path: np.zeros(x.shape, np.float32) for path, x in weights.items()}
    for t, (params, _) in enumerate(walk(Optimizer.from_config(node("gradient_descent"), sparsify=rule), PARAMS, GRADIENTS)):
        for path, x in weights.items():
            gradient = paths(GRADIENTS[t])[path]
            score[path] = score[path] - x * gradient
            if t in (5, 10):
                count = int(x.size * 0.6) if t == 10 else int(int(x.size * 0.6) * 0.875)
                kept[path] = score[path] >= np.sort(score[path].ravel())[count]
            weights[path] = np.where(kept[path], x - np.float32(0.05) * gradient, 0)
            np.testing.assert_allclose(paths(params)[path], weights[path], atol=1e-5, err_msg=f"{t} {path}")


def test_rigl_keeps_the_number_of_weights_and_exchanges_them(node):
    rule = RigL(sparsity=0.7, every=3, until=0.75, steps=20)
    living = [{path: ~zero for path, zero in zeros(params).items()} for params, _ in walk(optimizer_of(rule, node), PARAMS, GRADIENTS)]
    shapes = {path: np.shape(x) for path, x in paths(PARAMS).items() if path in KERNELS}
    expected = layer_sparsities(shapes, 0.7, "erk")
    changed = []
    for t, masks in enumerate(living):
        for path, alive in masks.items():
            assert alive.sum() == alive.size - int(alive.size * expected[path]), (t, path)
        changed.append(t > 0 and any((alive != living[t - 1][path]).any() for path, alive in masks.items()))
    assert [t for t, yes in enumerate(changed) if yes] == [3, 6, 9, 12]  # until 15, where the masks rest


def optimizer_of(rule, node):
    return Optimizer.from_config(node("adamw"), sparsify=rule)


def test_an_exchange_of_rigl_is_the_papers():
    """The smallest of the living go, the largest gradients of all others come, and what comes is zero by then."""
    rule = RigL(sparsity=0.5, budget="uniform", fraction=0.4, every=5, until=1.0, steps=20)
    params = {"dense": {"kernel": leaf(12, 20)}}
    masks = rule.init(params)._replace(count=jnp.int32(5))
    kept, gradient = np.asarray(masks.kept["dense"]["kernel"]), leaf(12, 20)
    weights = params["dense"]["kernel"] * kept.astype(np.float32)
    new = np.asarray(rule.update(masks, {"dense": {"kernel": gradient}}, {"dense": {"kernel": weights}}).kept["dense"]["kernel"])
    number = int(0.4 / 2 * (1 + np.cos(np.pi * 5 / 20)) * kept.sum())
    assert number > 20
    order = np.argsort(np.where(kept, np.abs(weights), np.inf).ravel())
    staying = kept.copy().ravel()
    staying[order[:number]] = False
    coming = np.argsort(np.where(staying, np.inf, -np.abs(gradient).ravel()))[:number]
    expected = staying.copy()
    expected[coming] = True
    np.testing.assert_array_equal(new.ravel(), expected)
    assert (weights[new & ~kept] == 0).all()
    assert (new & ~kept).sum() > 5


@pytest.mark.slow
def test_the_masks_of_rigl_are_drawn_by_seed_and_path(node):
    first, again, other = (RigL(seed=seed).init(PARAMS).kept for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))
    assert (first["block_0"]["mlp"]["kernel"] != first["block_1"]["mlp"]["kernel"]).any()


def test_the_average_holds_nothing_of_what_has_gone(node):
    optimizer = Optimizer.from_config(node("adamw"), sparsify=RULES["gradual"], ema=0.99)
    for params, state in walk(optimizer, PARAMS, GRADIENTS):
        average = zeros(optimizer.average(state))
        for path, zero in zeros(params).items():
            np.testing.assert_array_equal(average[path], zero)
    assert all(zero.any() for zero in average.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_masks_cost_nothing_between_two_choices(name):
    """Whatever searches does so inside a branch that the other updates do not take."""

    def primitives(program):
        for equation in program.eqns:
            yield equation.primitive.name
            if equation.primitive.name != "cond":
                for inner in jaxprs_in_params(equation.params):
                    yield from primitives(inner)

    rule = RULES[name]
    program = jax.make_jaxpr(rule.update)(rule.init(PARAMS), GRADIENTS[0], PARAMS)
    assert "scan" in str(program)
    outside = set(primitives(program.jaxpr))
    assert "cond" in outside
    assert not outside & {"scan", "while", "sort"}


def test_only_kernels_are_sparsified_and_globs_choose_among_them():
    kept = paths(Gradual(sparsity=0.5, initial=0.5, only=("block_*/**",), skip=("**/query/*",)).init(PARAMS).kept)
    assert set(kept) == {"block_0/mlp/kernel", "block_1/mlp/kernel"}
    assert set(paths(Static().init(PARAMS).kept)) == KERNELS


def test_a_model_without_kernels_is_left_alone_by_the_static_rule_and_refused_by_others():
    params = {"norm": {"scale": leaf(3)}}
    optimizer = Optimizer(optax.sgd, sparsify=Static())
    updates, _ = optimizer.update(params, optimizer.init(params), params, {}, jnp.float32(1.0))
    np.testing.assert_array_equal(updates["norm"]["scale"], -params["norm"]["scale"])
    for rule in (Gradual(), Movement(scope="global"), RigL()):
        with pytest.raises(ConfigError, match=r"train\.sparsify: no kernel is left"):
            rule.init(params)


@pytest.mark.parametrize(
    ("rule", "settings", "words"),
    [
        (Gradual, {"sparsity": 1.0}, "train.sparsify.sparsity=1.0: must be in [0, 1)"),
        (RigL, {"sparsity": -0.1}, "train.sparsify.sparsity=-0.1: must be in [0, 1)"),
        (Gradual, {"sparsity": 0.5, "initial": 0.6}, "train.sparsify.initial=0.6: must be in [0, sparsity=0.5]"),
        (Movement, {"begin": 0.8, "end": 0.7}, "train.sparsify.begin=0.8, end=0.7: must be shares of the run with 0 <= begin < end <= 1"),
        (Gradual, {"every": 0}, "train.sparsify.every=0: must be at least 1"),
        (RigL, {"every": 0}, "train.sparsify.every=0: must be at least 1"),
        (RigL, {"fraction": 0.0}, "train.sparsify.fraction=0.0: must be in (0, 1]"),
        (RigL, {"until": 1.5}, "train.sparsify.until=1.5: must be in (0, 1]"),
        (Gradual, {"scope": "global", "budget": "erk"}, "train.sparsify.budget=erk says what each layer loses"),
    ],
)
def test_settings_that_make_no_sense_are_refused(rule, settings, words):
    with pytest.raises(ConfigError) as told:
        rule(**settings)
    assert words in str(told.value)


def test_a_glob_that_fits_no_kernel_is_refused():
    with pytest.raises(ConfigError, match=r"train\.sparsify\.only: 'haed/kernel' fits no kernel; did you mean 'head/kernel'\?"):
        Static(only=("haed/kernel",)).init(PARAMS)
    with pytest.raises(ConfigError, match=r"train\.sparsify\.skip: '\*\*/bias' fits no kernel"):
        Static(skip=("**/bias",)).init(PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradual, global", "rigl"])
def test_microbatches_choose_the_same_masks(name, make_step, batches, train):
    masks = []
    for accumulate in (1, 4):
        step = make_step(accumulate=accumulate, dropout=0.0)
        step = type(step)(step.objective, Optimizer(optax.adamw, sparsify=RULES[name]), step.schedule, step.steps, accumulate)
        state, _ = train(step, batches)
        masks.append(state.opt.masks.kept)
    jax.tree.map(np.testing.assert_array_equal, *masks)
    assert any((~x).any() for x in jax.tree.leaves(masks))


PROGRAM = """
    import json, jax, numpy as np, optax
    from research.models.mlp import MLP
    from research.objectives.classify import Classify
    from research.training.optimizer import Optimizer
    from research.training.parallel import Jit, Pmap, create
    from research.training.schedule import Constant
    from research.training.sparsify import RigL
    from research.training.step import Step

    random = np.random.default_rng(0)

    def batch():
        image = random.normal(size=(32, 5)).astype(np.float32)
        return {"features": image, "label": random.integers(0, 3, 32).astype(np.int32), "mask": random.random(32) > 0.4, "index": np.arange(32)}

    batches = [batch() for _ in range(12)]

    def run(parallel):
        optimizer = Optimizer(optax.sgd, sparsify=RigL(sparsity=0.5, every=3, steps=12))
        step = Step(Classify(MLP(outputs=3, width=16)), optimizer, Constant(), steps=12, axis=parallel.axis)
        state, train = parallel.place(create(step, jax.random.key(0), batches[0], {"learning_rate": 0.1})), parallel.train(step)
        for batch in batches:
            state, _ = train(state, None, parallel.put(batch))
        return jax.device_get(state.opt.masks.kept)

    one, many = jax.tree.leaves(run(Jit())), jax.tree.leaves(run(Pmap()))
    print(json.dumps([bool((x == y[i]).all()) for x, y in zip(one, many, strict=True) for i in range(4)]))
"""


@pytest.mark.slow
def test_devices_choose_the_same_masks_as_one_alone():
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    same = json.loads(done.stdout)
    assert len(same) == 12
    assert all(same)


ARGUMENTS = ("model.width=8", "model.depth=1", "train.steps=30", "train.eval_every=10", "train.ema=0.9", "logger.figures=false")
ARGUMENTS += ("logger.tensorboard=false", "logger.progress=none")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["movement", "rigl"])
def test_a_sparse_run_that_was_stopped_ends_as_one_that_was_not(name, command, tmp_path):
    argv = (*ARGUMENTS, f"sparsify={name}", "train.sparsify.every=4")
    for folder, stops in (("whole", ["null"]), ("parts", ["13", "null"])):
        for stop in stops:
            told = command("train", *argv, f"train.stop_at={stop}", f"run_dir={tmp_path / folder}")
            assert told.code == 0, told.err
    results = [json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("whole", "parts")]
    assert results[0]["state_sha256"] == results[1]["state_sha256"]
    assert results[0]["metrics"] == results[1]["metrics"]


@pytest.mark.parametrize("name", ["static", "gradual", "movement", "rigl"])
def test_every_config_holds_every_setting_but_what_training_fills_in(name):
    node = resolved(compose([f"sparsify={name}"]).train.sparsify)
    rule = build(node, where="train.sparsify")
    assert {field.name for field in dataclasses.fields(rule)} == {*node, "steps"} - {"_target_"}
    assert rule == type(rule)()  # its defaults are the class's


def test_a_resumed_run_has_the_same_rule(command, tmp_path):
    argv = (*ARGUMENTS, f"run_dir={tmp_path}", "sparsify=gradual")
    assert command("train", *argv, "train.stop_at=10").code == 0
    told = command("train", *argv, "train.sparsify.sparsity=0.5")
    assert told.code == 2
    assert "train.sparsify.sparsity" in told.err[-1]
