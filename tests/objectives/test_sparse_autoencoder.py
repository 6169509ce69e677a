"""A sparse autoencoder: sums in closed form, a planted dictionary found again, and a run that needs nothing but its own folder."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import Run
from research.core.errors import ConfigError
from research.inference.evaluate import evaluate
from research.objectives.sparse_autoencoder import FEATURES, READ, RECONSTRUCTION, SparseAutoencoder

KEY = jax.random.key(0)
GPT = {"width": 8, "depth": 1, "heads": 2}
QUIET = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none", "logger.sample=false")


@pytest.fixture(scope="module")
def images(images):
    return jax.tree.map(jnp.asarray, images)


@pytest.fixture(scope="module")
def text(text):
    return jax.tree.map(jnp.asarray, text)


@pytest.fixture(scope="module")
def rows(rows):
    return jax.tree.map(jnp.asarray, rows)


def begun(objective, batch, **params):
    """(params, extra, frozen) with a teacher of random weights, three times as large as at the start; `params` in the place of its own."""
    own, extra = jax.jit(objective.init)(KEY, batch)
    taught, still = jax.jit(objective.teacher.init)(jax.random.key(1), batch)
    frozen = objective.taught(None, jax.tree.map(lambda x: 3 * x, taught), still, objective.teacher.still(KEY, batch), {})
    return {**own, **params}, extra, frozen


@functools.partial(jax.jit, static_argnums=(0, 5))
def called(objective, params, extra, frozen, batch, train):
    return objective(params, extra, frozen, batch, None, {}, train=train)


@functools.partial(jax.jit, static_argnums=0)
def predicted(objective, params, extra, frozen, batch, edits=None):
    return objective.predict(params, extra, frozen, batch, None, {}, edits=edits)


def means(tally):
    return {name: np.asarray(total / weight) for name, (total, weight) in tally.metrics.items()}


def identity(width):
    """A dictionary that leaves no error: every axis both ways."""
    axes = jnp.concatenate([jnp.eye(width, dtype=jnp.float32), -jnp.eye(width, dtype=jnp.float32)])
    return {"encoder": {"kernel": axes.T, "bias": jnp.zeros(2 * width, jnp.float32)}, "decoder": {"kernel": 3 * axes}}


def coded(objective, params, x):
    """(features, reconstruction) by numpy."""
    mean, deviation = (x.mean(-1, keepdims=True), np.sqrt(x.var(-1, keepdims=True) + 1e-5)) if objective.normalize else (0.0, 1.0)
    read = (x - mean) / deviation
    center, decoder = params["center"]["bias"], np.asarray(params["decoder"]["kernel"])
    features = np.maximum((read - center) @ params["encoder"]["kernel"] + params["encoder"]["bias"], 0)
    if objective.active is not None:
        order = np.argsort(-features, -1)[..., objective.active :]
        np.put_along_axis(features, order, 0.0, -1)
    guess = features @ (decoder / np.linalg.norm(decoder, axis=-1, keepdims=True)) + center
    return features, guess * deviation + mean, ((read - guess) ** 2).mean(-1)


@pytest.mark.parametrize(("active", "sparsity", "normalize"), [(3, 0.0, True), (None, 0.2, False)])
def test_its_sums_are_those_of_numpy_over_the_valid_items(configured, text, active, sparsity, normalize):
    objective = SparseAutoencoder(configured("language_model", "gpt", GPT), "block_0/output", 20, active, sparsity, normalize, revival=0.0)
    params, extra, frozen = begun(objective, text)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape, x.dtype), params)
    outputs, taps = predicted(objective, params, extra, frozen, text)
    x = np.asarray(predicted(objective.teacher, frozen["params"], frozen["extra"], None, text)[1]["block_0/output"])
    np.testing.assert_allclose(taps[READ], x, rtol=1e-5, atol=1e-5)
    features, reconstruction, error = coded(objective, jax.tree.map(np.asarray, params), x)
    np.testing.assert_allclose(taps[FEATURES], features, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(taps[RECONSTRUCTION], reconstruction, rtol=1e-3, atol=1e-3)
    mask = np.asarray(text["mask"])
    found = means(called(objective, params, extra, frozen, text, False)[0])
    np.testing.assert_allclose(found["reconstruction"], error[mask].mean(), rtol=1e-4)
    np.testing.assert_allclose(found["sparsity"], features.sum(-1)[mask].mean(), rtol=1e-4)
    np.testing.assert_allclose(found["loss"], error[mask].mean() + sparsity * features.sum(-1)[mask].mean(), rtol=1e-4)
    np.testing.assert_allclose(found["active"], (features > 0).sum(-1)[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["density"], (features > 0)[mask].mean(0), rtol=1e-5)
    derived = objective.derived({name: value.tolist() for name, value in found.items()})
    share = 1 - ((x - reconstruction)[mask] ** 2).sum() / ((x[mask] - x[mask].mean(0)) ** 2).sum()
    np.testing.assert_allclose(derived["explained_variance"], share, rtol=1e-3)
    assert list(outputs) == ["logits"]


def test_a_dictionary_without_error_leaves_the_models_loss_and_zeros_do_not(configured, text):
    plain = configured("language_model", "gpt", GPT)
    objective = SparseAutoencoder(plain, "block_0/output", 16, None, 0.1, normalize=False)
    params, extra, frozen = begun(objective, text, **identity(8))
    found, _ = evaluate(objective, params, extra, frozen, {}, [jax.tree.map(np.asarray, text)])
    model = (frozen["params"], frozen["extra"], None)
    own, _ = called(plain, *model, text, False)
    edits = {"block_0/output": (jnp.ones((), bool), jnp.zeros((4, 8, 8), jnp.float32))}
    outputs = predicted(plain, *model, text, edits)[0]["logits"]
    zeros = plain.tally(outputs, text, {}, train=False)
    np.testing.assert_allclose(found["model_loss"], means(own)["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["ablated_loss"], means(zeros)["loss"], rtol=1e-5)
    assert abs(found["ablated_loss"] - found["model_loss"]) > 0.1
    np.testing.assert_allclose(found["spliced_loss"], found["model_loss"], rtol=1e-4)
    np.testing.assert_allclose([found["recovered"], found["explained_variance"]], 1.0, rtol=1e-4)
    assert "moments" not in found  # only what a number says is reported
    assert "density" not in found


def test_dead_features_are_counted_grow_old_and_only_then_are_revived(configured, rows):
    objective = SparseAutoencoder(configured("regress", "mlp", {"width": [6], "depth": 1}), "input", 14, None, 0.1, False, dead_after=7)
    params, extra, frozen = begun(objective, rows, **identity(7))
    params["encoder"]["bias"] = jnp.where(jnp.arange(14, dtype=jnp.int32) < 3, -1e3, 0.0)
    found, _ = evaluate(objective, params, extra, frozen, {}, [jax.tree.map(np.asarray, rows)])
    seen = (np.asarray(rows["features"]) @ np.asarray(params["encoder"]["kernel"]) + np.asarray(params["encoder"]["bias"]) > 0)[
        np.asarray(rows["mask"])
    ]
    assert found["dead"] == (~seen.any(0)).mean() > 0
    slope = jax.jit(jax.grad(lambda p, extra: objective(p, extra, frozen, rows, None, {}, train=True)[0].terms["revival"]))
    for idle in (4.0, 8.0):
        tally, extra = called(objective, params, extra, frozen, rows, True)
        np.testing.assert_array_equal(extra["idle"][:3], idle)  # 4 of the 6 rows are valid
        np.testing.assert_array_equal(extra["idle"] == 0, seen.any(0))
        assert tally.terms["revival"] == 0  # it looks at what was dead before
    kernel = np.abs(slope(params, extra)["encoder"]["kernel"]).sum(0)
    assert (kernel[:3] > 0).all()  # though they never are above 0
    assert (kernel[seen.any(0)] == 0).all()


def test_an_edit_of_a_feature_steers_the_model(configured, images):
    objective = SparseAutoencoder(configured("classify", "mlp", {"width": [6], "depth": 1}), "hidden_0", 12, None, 0.1, False)
    params, extra, frozen = begun(objective, images, **identity(6))
    edit = (jnp.arange(12, dtype=jnp.int32) == 2, jnp.float32(5.0))
    steered, taps = predicted(objective, params, extra, frozen, images, {FEATURES: edit})
    x = taps[READ].at[:, 2].set(5.0 + jnp.minimum(taps[READ][:, 2], 0.0))
    wanted = predicted(objective.teacher, frozen["params"], frozen["extra"], None, images, {"hidden_0": (jnp.ones((), bool), x)})[0]
    np.testing.assert_allclose(steered["logits"], wanted["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_planted_dictionary_is_found_again(configured):
    """24 directions in 16 axes, two of them at once: more than any rotation of the axes could name."""
    random = np.random.RandomState(0)
    truth = random.standard_normal((24, 16)).astype(np.float32)
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    amounts = np.zeros((4096, 24), np.float32)
    for row in amounts:
        row[random.choice(24, 2, replace=False)] = random.uniform(0.5, 1.5, 2)
    x = amounts @ truth
    batch = {"features": x, "target": np.zeros((4096, 5), np.float32), "mask": np.ones(4096, bool), "index": np.arange(4096, dtype=np.int32)}
    objective = SparseAutoencoder(configured("regress", "mlp", {"width": [4], "depth": 1}), "input", 48, 2, 0.0, False, dead_after=20_000)
    params, extra, frozen = begun(objective, batch)
    optimizer = optax.adam(3e-3)

    def loss(params, extra, part):
        tally, extra = objective(params, extra, frozen, part, None, {}, train=True)
        return sum(value * tally.terms[name] for name, value in objective.coefficients) / 512, extra

    @jax.jit
    def trained(params, extra):
        def step(carry, start):
            params, extra, opt = carry
            part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, 512), jax.tree.map(jnp.asarray, batch))
            slope, extra = jax.grad(loss, has_aux=True)(params, extra, part)
            with jax.numpy_dtype_promotion("standard"):
                update, opt = optimizer.update(slope, opt, params)
            return (optax.apply_updates(params, update), extra, opt), None

        return jax.lax.scan(step, (params, extra, optimizer.init(params)), jnp.arange(1500, dtype=jnp.int32) % 8 * 512)[0][:2]

    params, extra = trained(params, extra)
    found = np.array(params["decoder"]["kernel"])
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    near = (found @ truth.T).max(0)
    assert (near > 0.95).mean() > 0.9
    scores, _ = evaluate(objective, params, extra, frozen, {}, [batch])
    assert scores["explained_variance"] > 0.95
    assert scores["active"] <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 0}, "features=0"),
        ({"active": 600}, "active=600 must be from 1 to features=512"),
        ({"active": None}, "nothing makes the features sparse"),
        ({"sparsity": -1.0}, "sparsity=-1.0"),
        ({"revival": float("nan")}, "revival=nan"),
        ({"dead_after": 0}, "dead_after=0"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(**settings)


def test_what_it_cannot_read_is_refused(configured, images, text):
    classifier = configured("classify", "mlp", {"width": [6], "depth": 1})
    with pytest.raises(ConfigError, match=r"'hidden_9' is no tap of the model; did you mean 'hidden_0'"):
        SparseAutoencoder(classifier, "hidden_9").init(KEY, images)
    with pytest.raises(ConfigError, match=r"give teacher\.run=PATH"):
        SparseAutoencoder().init(KEY, images)
    with pytest.raises(ConfigError, match="a tap with a vector for each item"):
        SparseAutoencoder(configured("language_model", "gpt", GPT), "block_0/attention/weights").init(KEY, text)
    objective = SparseAutoencoder(classifier, "hidden_0")
    with pytest.raises(ConfigError, match=r"teacher\.cache=false"):
        objective(*begun(objective, images), {**images, "teacher": images["label"]}, None, {}, train=True)


def test_equal_settings_are_one_program(configured):
    one, two = (SparseAutoencoder(configured("classify", "mlp"), "hidden_0") for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != dataclasses.replace(two, at="input")


@pytest.fixture(scope="module")
def seen_through(command, parent, tmp_path_factory):
    """(run folder, the command's arguments): a dictionary of a copy of a run that is then gone, stopped in the middle and gone on with."""
    place = tmp_path_factory.mktemp("dictionary")
    shutil.copytree(parent("mlp"), place / "teacher")
    argv = ["experiment=sparse_autoencoder", "objective.at=hidden_0", "objective.features=24", "objective.active=4", "train.steps=4"]
    argv += ["train.eval_every=2", "train.log_every=2", *QUIET]
    for folder in ("whole", "halved"):
        stop = ["train.stop_at=2"] if folder == "halved" else []
        told = command("train", *argv, f"teacher.run={place / 'teacher'}", f"run_dir={place / folder}", *stop)
        assert told.code == 0, told.err
    shutil.rmtree(place / "teacher")
    return place, argv


def test_a_run_goes_on_bit_for_bit_and_is_evaluated_when_its_teacher_is_gone(command, seen_through):
    place, argv = seen_through
    told = command("train", *argv, f"teacher.run={place / 'teacher'}", f"run_dir={place / 'halved'}")
    assert told.code == 0, told.err
    whole, halved = (json.loads((place / name / "result.json").read_text()) for name in ("whole", "halved"))
    assert whole["state_sha256"] == halved["state_sha256"]
    assert Run(place / "halved").config.teacher == Run(place / "whole").config.teacher
    told = command("evaluate", f"run={place / 'halved'}", "figures=false")
    assert told.code == 0, told.err
    scores = json.loads((place / "halved" / "evaluation.json").read_text())
    for name in ("explained_variance", "dead", "model_loss", "spliced_loss", "ablated_loss", "recovered"):
        assert scores["metrics"][f"test/{name}"] is not None, name


def test_another_teacher_in_the_same_folder_is_refused(command, parent, seen_through):
    place, argv = seen_through
    told = command("train", *argv, f"teacher.run={parent('mlp')}", f"run_dir={place / 'whole'}")
    assert told.code == 2
    assert "holds a run that looks into" in told.err[-1]


def test_without_a_teacher_or_with_data_of_none_the_command_says_what_to_give(command, tmp_path):
    told = command("train", "experiment=sparse_autoencoder", f"run_dir={tmp_path / 'none'}")
    assert told.code == 2
    assert "give teacher.run=PATH" in told.err[-1]
    told = command("train", "data=of_teacher", "model=mlp", f"run_dir={tmp_path / 'none'}")
    assert told.code == 2
    assert "data=of_teacher goes with teacher.run=PATH" in told.err[-1]


@pytest.mark.slow
def test_a_run_of_a_scanned_text_model_is_seen_through_too(command, parent, tmp_path):
    argv = ["objective.at=block_1/output", "objective.features=24", "objective.active=4", "train.steps=2", "train.eval_every=2", *QUIET]
    told = command("train", "experiment=sparse_autoencoder", f"teacher.run={parent('gpt')}", f"run_dir={tmp_path / 'run'}", *argv)
    assert told.code == 0, told.err
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["validation/active"] <= 4
    own = json.loads((parent("gpt") / "result.json").read_text())["metrics"]
    assert metrics["validation/model_loss"] == pytest.approx(own["validation/loss"], rel=0.02)  # of the best step, as the teacher is
