"""The objective of distillation: what it adds to the student's own, and that the teacher stands still."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.errors import ConfigError
from research.losses.distillation import patient_distance, soft_loss
from research.objectives.distill import Distill
from research.training.optimizer import Optimizer
from research.training.schedule import Constant
from research.training.step import Step, divide

KEY = jax.random.key(0)
GPT = {"width": 8, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def images(images):
    return jax.tree.map(jnp.asarray, images)


@pytest.fixture(scope="module")
def rows(rows):
    return jax.tree.map(jnp.asarray, rows)


@pytest.fixture(scope="module")
def text(text):
    return jax.tree.map(jnp.asarray, text)


@pytest.fixture(scope="module")
def classifiers(configured):
    """(the student's objective, the teacher's): multilayer perceptrons of different width."""
    return configured("classify", "mlp", {"width": [6], "depth": 1}), configured("classify", "mlp", {"width": [9, 7], "depth": 2})


@pytest.fixture(scope="module")
def languages(configured):
    """The same as language models of different depth and number of heads."""
    return configured("language_model", "gpt", GPT), configured("language_model", "gpt", {**GPT, "depth": 2, "heads": 4})


def begun(objective, batch, seed=0):
    """(params, extra, frozen with a teacher of random weights)."""
    params, extra = objective.init(jax.random.key(seed), batch)
    teacher = objective.teacher.init(jax.random.key(seed + 1), batch)
    louder = jax.tree.map(lambda x: 3 * x, teacher[0])
    return params, extra, objective.taught(objective.still(KEY, batch), louder, teacher[1], objective.teacher.still(KEY, batch), {})


@functools.partial(jax.jit, static_argnums=(0, 5))
def tallied(objective, params, extra, frozen, batch, train=True):
    return objective(params, extra, frozen, batch, KEY, {}, train=train)[0]


def outputs(objective, params, extra, batch):
    return jax.jit(lambda *model: objective.apply(*model, None, batch, None, {}, train=False)[:2])(params, extra)


@pytest.mark.parametrize(("pair", "batch"), [("classifiers", "images"), pytest.param("languages", "text", marks=pytest.mark.slow)])
def test_the_loss_is_the_weighted_sum_over_valid_items(pair, batch, request):
    (student, teacher), batch = request.getfixturevalue(pair), request.getfixturevalue(batch)
    objective = Distill(student, teacher, temperature=3.0, hard=0.25, soft=0.5)
    params, extra, frozen = begun(objective, batch)
    tally = tallied(objective, params, extra, frozen, batch)
    own, _ = outputs(student, params, extra, batch)
    wanted, _ = outputs(teacher, frozen["teacher"]["params"], frozen["teacher"]["extra"], batch)
    soft = np.asarray(soft_loss(own, wanted, 3.0))[batch["mask"]].sum()
    hard = tallied(student, params, extra, None, batch).terms["cross_entropy"]
    np.testing.assert_allclose(tally.terms["soft"], soft, rtol=1e-5)
    np.testing.assert_allclose(tally.metrics["soft"], (soft, batch["mask"].sum()), rtol=1e-5)
    loss = divide(tally, objective.weights(batch), objective.coefficients, {})
    np.testing.assert_allclose(loss, (0.25 * float(hard) + 0.5 * soft) / int(batch["mask"].sum()), rtol=1e-5)
    np.testing.assert_allclose(tally.metrics["loss"][0], hard, rtol=1e-5)  # as a metric, the student's own loss stays what it was


def test_a_student_that_is_its_teacher_has_no_soft_loss_and_no_gradient_of_it(classifiers, images):
    objective = Distill(classifiers[1], classifiers[1], hard=0.0, soft=1.0)
    _, extra, frozen = begun(objective, images)

    def loss(params):
        return divide(objective(params, extra, frozen, images, KEY, {}, train=True)[0], objective.weights(images), objective.coefficients, {})

    value, grads = jax.jit(jax.value_and_grad(loss))(frozen["teacher"]["params"])
    np.testing.assert_allclose(value, 0, atol=1e-6)
    jax.tree.map(lambda x: np.testing.assert_allclose(x, 0, atol=1e-5), grads)


def test_no_gradient_reaches_the_teacher(classifiers, images):
    objective = Distill(*classifiers, hidden=1.0, hidden_layers=(("hidden_0", "hidden_1"),))
    params, extra, frozen = begun(objective, images)

    def loss(weights, params):
        taught = {**frozen, "teacher": {**frozen["teacher"], "params": weights}}
        tally, _ = objective(params, extra, taught, images, KEY, {}, train=True)
        return sum(tally.terms.values())

    to_teacher, to_student = jax.jit(jax.grad(loss, argnums=(0, 1)))(frozen["teacher"]["params"], params)
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(to_teacher))
    assert all(np.asarray(x).any() for x in jax.tree.leaves(to_student))


def test_hidden_states_of_other_width_are_compared_through_a_learned_map(classifiers, images):
    objective = Distill(*classifiers, hidden=1.0, hidden_layers=(("hidden_0", "hidden_1"), ("logits", "logits")), hidden_loss="patient")
    params, extra, frozen = begun(objective, images)
    assert {name: pair["kernel"].shape for name, pair in params["projections"].items()} == {"0": (6, 7)}  # logits are of one width
    assert set(params) == {"dense_0", "head", "projections"}
    plain = {name: value for name, value in params.items() if name != "projections"}
    _, here = outputs(classifiers[0], plain, extra, images)
    _, there = outputs(classifiers[1], frozen["teacher"]["params"], extra, images)
    mapped = here["hidden_0"] @ params["projections"]["0"]["kernel"]
    each = patient_distance(mapped, there["hidden_1"]) + patient_distance(here["logits"], there["logits"])
    got = tallied(objective, params, extra, frozen, images)
    np.testing.assert_allclose(got.terms["hidden"], np.asarray(each)[images["mask"]].sum(), rtol=1e-5)


def test_maps_of_an_image_are_averaged_over_positions(configured, images):
    model = {"kernel": 3, "pool": 1, "padding": "SAME", "hidden": []}
    student = configured("classify", "cnn", {**model, "channels": [4]})
    teacher = configured("classify", "cnn", {**model, "channels": [4, 4]})
    objective = Distill(student, teacher, hidden=2.0, hidden_layers=(("maps_0", "maps_1"),))
    params, extra, frozen = begun(objective, images)
    _, here = outputs(student, params, extra, images)
    _, there = outputs(teacher, frozen["teacher"]["params"], extra, images)
    each = np.square(np.asarray(here["maps_0"]) - np.asarray(there["maps_1"])).mean((1, 2, 3))
    np.testing.assert_allclose(tallied(objective, params, extra, frozen, images).terms["hidden"], each[images["mask"]].sum(), rtol=1e-5)


@pytest.mark.slow
def test_attention_is_learned_from_another_number_of_heads(languages, text):
    pairs = (("block_0/attention/weights", "block_1/attention/weights"),)
    objective = Distill(*languages, attention=1.0, attention_layers=pairs, soft=0.0, hard=0.0)
    params, extra, frozen = begun(objective, text)
    tally = tallied(objective, params, extra, frozen, text)
    assert set(tally.terms) == {"cross_entropy", "attention"}
    _, here = outputs(languages[0], params, extra, text)
    _, there = outputs(languages[1], frozen["teacher"]["params"], extra, text)
    student, teacher = (np.asarray(taps[path], np.float64).mean(1) for taps, path in zip((here, there), pairs[0], strict=True))
    seen = teacher > 0
    each = (teacher * np.where(seen, np.log(np.where(seen, teacher, 1)) - np.log(np.where(seen, student, 1)), 0)).sum(-1)
    np.testing.assert_allclose(tally.terms["attention"], each[text["mask"]].sum(), rtol=1e-4)


def test_values_are_compared_by_their_squared_difference(configured, rows):
    student, teacher = configured("regress", "mlp", {"width": [4], "depth": 1}), configured("regress", "mlp", {"width": [6], "depth": 1})
    objective = Distill(student, teacher)
    params, extra, frozen = begun(objective, rows)
    own, _ = outputs(student, params, extra, rows)
    wanted, _ = outputs(teacher, frozen["teacher"]["params"], extra, rows)
    each = np.square(np.asarray(own) - np.asarray(wanted)).mean(1)
    np.testing.assert_allclose(tallied(objective, params, extra, frozen, rows).terms["soft"], each[rows["mask"]].sum(), rtol=1e-5)


def test_answers_in_the_batch_take_the_teachers_place(classifiers, images):
    objective = Distill(*classifiers)
    params, extra, frozen = begun(objective, images)
    wanted, _ = outputs(classifiers[1], frozen["teacher"]["params"], extra, images)
    live = tallied(objective, params, extra, frozen, images)
    cached = tallied(objective, params, extra, {**frozen, "teacher": None}, {**images, "teacher": wanted})
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), cached, live)


def test_without_a_teacher_the_student_is_scored_alone(classifiers, images):
    objective = Distill(*classifiers)
    params, extra, frozen = begun(objective, images)
    still = objective.still(KEY, images)
    assert still == {"student": None, "teacher": None}
    alone = tallied(objective, params, extra, still, images, False)
    jax.tree.map(np.testing.assert_array_equal, alone, tallied(classifiers[0], params, extra, None, images, False))
    with pytest.raises(ConfigError, match=r"teacher\.run=null: distillation needs the run of a teacher"):
        tallied(objective, params, extra, still, images)
    predicted = jax.jit(lambda *model: objective.predict(*model, images, None, {})[0]["logits"])(params, extra, frozen)
    np.testing.assert_allclose(predicted, outputs(classifiers[0], params, extra, images)[0], atol=1e-6)


def test_accumulation_is_exact(classifiers, images):
    objective = Distill(*classifiers, hidden=1.0, hidden_layers=(("hidden_0", "hidden_1"),), hidden_loss="cosine")
    params, _, frozen = begun(objective, images)
    moved = []
    for accumulate in (1, 2):  # the masks of the two halves are uneven
        step = Step(objective, Optimizer(optax.sgd), Constant(), steps=10, accumulate=accumulate)
        state = dataclasses.replace(step.create(KEY, images, {"learning_rate": 1.0}), params=params)
        moved.append(jax.jit(step)(state, frozen, images)[0].params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *moved)
    assert all(np.abs(np.asarray(x - y)).max() > 1e-4 for x, y in zip(jax.tree.leaves(moved[0]), jax.tree.leaves(params), strict=True))


def test_coefficients_and_temperature_can_be_values_of_the_program(classifiers, images):
    params, extra, frozen = begun(Distill(*classifiers), images)
    open_ended = Distill(*classifiers, temperature=None, hard=None, soft=None)
    hyper = {"temperature": jnp.float32(4.0), "hard": jnp.float32(0.1), "soft": jnp.float32(0.9)}

    @functools.partial(jax.jit, static_argnums=0)
    def loss(objective, hyper):
        tally, _ = objective(params, extra, frozen, images, KEY, hyper, train=True)
        return divide(tally, objective.weights(images), objective.coefficients, hyper)

    np.testing.assert_allclose(loss(open_ended, hyper), loss(Distill(*classifiers, temperature=4.0, hard=0.1, soft=0.9), {}), rtol=1e-6)


def test_equal_by_content_and_decoding_as_the_student(languages, text):
    objective, again = (Distill(*languages, hidden=1.0, hidden_layers=(("block_0/output", "block_1/output"),)) for _ in range(2))
    assert objective == again
    assert hash(objective) == hash(again)
    params, extra, frozen = begun(Distill(*languages), text)
    decoder, plain = objective.decoder(), languages[0].decoder()

    def last(decoder, frozen, params):
        cache = decoder.rewind(decoder.begin(params, extra, frozen, text, 8, {}), jnp.full(4, 7, jnp.int32))
        return decoder.advance(params, extra, frozen, cache, text["tokens"][:, 7:], {})[0]

    got = jax.jit(functools.partial(last, decoder, frozen))({**params, "projections": {}})
    np.testing.assert_array_equal(got, jax.jit(functools.partial(last, plain, None))(params))
    assert objective.derived({"loss": 0.0}) == {"perplexity": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"soft": -1.0}, "soft=-1.0 must be a number not below 0"),
        ({"hidden": 1.0}, r"hidden=1.0 and hidden_layers=\(\): give both or neither"),
        ({"attention_layers": (("a", "b"),)}, "attention=0.0 and attention_layers="),
    ],
)
def test_a_mistake_is_named(classifiers, changes, message):
    with pytest.raises(ValueError, match=message):
        Distill(*classifiers, **changes)


def test_a_tap_that_is_not_there_is_named_with_the_nearest(classifiers, images):
    with pytest.raises(ConfigError, match="'hiden_1' is no tap of the teacher; did you mean 'hidden_1'"):
        Distill(*classifiers, hidden=1.0, hidden_layers=(("hidden_0", "hiden_1"),)).init(KEY, images)
