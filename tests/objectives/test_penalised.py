"""Objectives with a penalty on how the model answers: closed forms, exact accumulation, gradients, and what coefficient 0 leaves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from research.core.errors import ConfigError
from research.core.gradients import pullback
from research.models.gpt import GPT
from research.models.mlp import MLP
from research.models.perceptron import Perceptron
from research.objectives.attention_alignment import AttentionAlignment
from research.objectives.classify import Classify
from research.objectives.jacobian import JacobianPenalty
from research.objectives.language_model import LanguageModel
from research.objectives.regress import Regress
from research.objectives.right_reasons import RightReasons
from research.training.optimizer import Optimizer
from research.training.schedule import Constant
from research.training.step import Step, divide

KEY = jax.random.key(3)
LAYERS = ("block_0/attention/weights", "block_1/attention/weights")
LINEAR, DEEP = Classify(Perceptron(5)), Classify(MLP(5, width=6, depth=1, activation="tanh"))
TEXT = LanguageModel(GPT(11, 8, width=8, depth=2, heads=2))


@pytest.fixture(scope="module")
def images(images):
    """With a relevance that differs from example to example; a masked row that no sum may see."""
    relevance = np.random.RandomState(1).rand(*images["image"].shape) > 0.5
    return jax.tree.map(jnp.asarray, {**images, "relevance": relevance})


@pytest.fixture(scope="module")
def text(text):
    relevance = np.random.RandomState(1).randint(0, 3, text["mask"].shape).astype(np.float32)
    relevance[2] = 0.0  # an example of which nothing is known
    return jax.tree.map(jnp.asarray, {**text, "relevance": relevance})


@functools.partial(jax.jit, static_argnums=(0, 4))
def tallied(objective, params, batch, hyper=None, train=True):
    return objective(params, {}, None, batch, KEY if train else None, hyper or {}, train=train)[0]


@functools.partial(jax.jit, static_argnums=0)
def loss(objective, params, batch):
    return divide(objective(params, {}, None, batch, KEY, {}, train=True)[0], objective.weights(batch), objective.coefficients, {})


def begun(objective, batch):
    """Parameters, somewhat larger than the first ones, so that no gradient is lost in rounding."""
    return jax.tree.map(lambda x: 2 * x, objective.init(jax.random.key(0), batch)[0])


def probabilities(params, batch):
    logits = np.asarray(batch["image"], np.float64).reshape(6, -1) @ np.asarray(params["head"]["kernel"], np.float64) + np.asarray(
        params["head"]["bias"]
    )
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def test_right_reasons_of_a_linear_model_are_its_weights(images):
    """sum over k of log p_k = sum of z_k - K log sum exp z, so the gradient is W (1 - K p)."""
    params = begun(LINEAR, images)
    slope = (1 - 5 * probabilities(params, images)) @ np.asarray(params["head"]["kernel"], np.float64).T  # b f
    each = ((~np.asarray(images["relevance"]).reshape(6, -1) * slope) ** 2).sum(1)
    objective = RightReasons(LINEAR, right_reasons=0.5)
    tally = tallied(objective, params, images)
    expected = each[np.asarray(images["mask"])].sum()
    np.testing.assert_allclose(tally.terms["right_reasons"], expected, rtol=1e-5)
    np.testing.assert_allclose(tally.metrics["right_reasons"], (expected, 4), rtol=1e-5)
    plain = loss(LINEAR, params, images)
    np.testing.assert_allclose(loss(objective, params, images), plain + 0.5 * expected / 4, rtol=1e-5)


def test_the_jacobian_of_a_linear_model_is_its_kernel(images):
    params = begun(LINEAR, images)
    expected = 4 * 0.5 * (np.asarray(params["head"]["kernel"], np.float64) ** 2).sum()
    np.testing.assert_allclose(tallied(JacobianPenalty(LINEAR, projections=None), params, images).terms["jacobian"], expected, rtol=1e-5)


def test_random_directions_estimate_the_jacobian_without_bias_and_belong_to_the_example(images):
    params = begun(LINEAR, images)
    exact, few, many = (tallied(JacobianPenalty(LINEAR, projections=n), params, images).terms["jacobian"] for n in (None, 1, 4000))
    np.testing.assert_allclose(many, exact, rtol=0.02)
    assert abs(few / exact - 1) > 1e-3
    turned = jax.tree.map(lambda x: x[::-1], images)
    np.testing.assert_allclose(tallied(JacobianPenalty(LINEAR, projections=1), params, turned).terms["jacobian"], few, rtol=1e-5)


@pytest.mark.slow
def test_the_jacobian_of_a_text_is_that_of_its_valid_positions(text):
    objective = LanguageModel(GPT(11, 8, width=4, depth=1, heads=1))
    params = begun(objective, text)
    small = {name: x[:1] for name, x in text.items()}

    @jax.jit
    def jacobian(params):
        taps = objective.apply(params, {}, None, small, None, {}, train=False)[1]
        edited = lambda value: objective.apply(params, {}, None, small, None, {}, train=False, edits={"input": (True, value)})[0]  # noqa: E731  # one line says it
        return jax.jacfwd(edited)(taps["input"])  # b t v b t d

    expected = 0.5 * (np.asarray(jacobian(params), np.float64)[0, np.asarray(small["mask"])[0]] ** 2).sum()
    np.testing.assert_allclose(tallied(JacobianPenalty(objective, projections=None), params, small).terms["jacobian"], expected, rtol=1e-4)


def test_attention_is_aligned_by_the_divergence_of_its_mean(text):
    objective = AttentionAlignment(TEXT, layers=LAYERS, heads=(1,))
    params = begun(TEXT, text)

    @jax.jit
    def both(params):
        taps = TEXT.apply(params, {}, None, text, None, {}, train=False)[1]
        return {layer: taps[layer] for layer in LAYERS}, objective(params, {}, None, text, None, {}, train=False)[0].metrics

    taps, metrics = both(params)
    mask, relevance = np.asarray(text["mask"]), np.asarray(text["relevance"], np.float64)
    expected = 0.0
    for i in (0, 1, 3):  # of the other nothing is relevant
        weights = np.mean([np.asarray(taps[layer], np.float64)[i, 1] for layer in LAYERS], 0)
        mean = weights[mask[i]].mean(0)
        wanted = np.where(mask[i], relevance[i], 0)
        wanted = wanted / wanted.sum()
        expected += sum(w * np.log(w / a) for w, a in zip(wanted, mean, strict=True) if w)
    np.testing.assert_allclose(metrics["attention_alignment"], (expected, 3), rtol=1e-4)
    assert float(objective.weights(text)["attention_alignment"]) == 3


@pytest.mark.slow
def test_attention_moves_to_where_it_is_told_to_look(text):
    objective = AttentionAlignment(LanguageModel(GPT(11, 8, width=8, depth=1, heads=2)), layers=LAYERS[:1], attention_alignment=100.0)
    only = {**text, "relevance": jnp.zeros((4, 8), jnp.float32).at[:, 0].set(1.0), "mask": jnp.ones((4, 8), bool)}
    step = jax.jit(Step(objective, Optimizer(optax.adam), Constant(), steps=60))
    state = step.__wrapped__.create(KEY, only, {"learning_rate": 0.05})
    first = None
    for _ in range(60):
        state, metrics = step(state, None, only)
        first = first or metrics["attention_alignment"]
    assert float(metrics["attention_alignment"][0]) < 0.1 * float(first[0])


PENALISED = {
    "right_reasons": RightReasons(DEEP, right_reasons=0.3),
    "jacobian": JacobianPenalty(DEEP, jacobian=0.3, projections=2),
    "both": RightReasons(JacobianPenalty(DEEP, jacobian=0.1), right_reasons=0.2),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "both" else pytest.mark.slow) for name in PENALISED])
def test_gradients_are_those_of_finite_differences(name, images):
    params = begun(DEEP, images)
    check_grads(lambda params: loss(PENALISED[name], params, images), (params,), order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "both" else pytest.mark.slow) for name in (*PENALISED, "attention")])
def test_accumulation_is_exact_under_uneven_masks(name, images, text):
    objective, batch = (AttentionAlignment(TEXT, layers=LAYERS), text) if name == "attention" else (PENALISED[name], images)
    params, moved = begun(objective, batch), []
    if name != "attention":
        batch = jax.tree.map(lambda x: jnp.concatenate([x, x[:2]]), batch)  # eight examples; of the second microbatch one counts
    for accumulate in (1, 4):
        step = Step(objective, Optimizer(optax.sgd), Constant(), steps=10, accumulate=accumulate)
        state = dataclasses.replace(step.create(KEY, batch, {"learning_rate": 1.0}), params=params)
        moved.append(jax.jit(step)(state, None, batch)[0].params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), *moved)
    assert max(np.abs(np.asarray(x - y)).max() for x, y in zip(jax.tree.leaves(moved[0]), jax.tree.leaves(params), strict=True)) > 1e-3


def test_coefficient_0_is_the_objective_inside(images):
    params = begun(DEEP, images)
    plain = tallied(DEEP, params, images)
    for objective in (RightReasons(DEEP, right_reasons=0.0), JacobianPenalty(DEEP, jacobian=0.0)):
        assert objective.coefficients == DEEP.coefficients
        jax.tree.map(np.testing.assert_array_equal, tallied(objective, params, images), plain)
        assert objective.weights(images).keys() == DEEP.weights(images).keys()


def test_a_coefficient_can_be_a_value_of_the_program(images):
    params = begun(DEEP, images)
    open_ended, hyper = RightReasons(DEEP, right_reasons=None), {"right_reasons": jnp.float32(0.3)}
    value = divide(tallied(open_ended, params, images, hyper), open_ended.weights(images), open_ended.coefficients, hyper)
    np.testing.assert_allclose(value, loss(PENALISED["right_reasons"], params, images), rtol=1e-6)


def test_the_model_is_read_as_one_without_the_penalty(images):
    objective, params = PENALISED["both"], begun(DEEP, images)
    assert jax.tree.structure(params) == jax.tree.structure(DEEP.init(KEY, images)[0])
    bare = {name: x for name, x in images.items() if name != "relevance"}
    assert set(tallied(objective, params, bare, None, False).metrics) == {"loss", "accuracy", "jacobian"}  # a split that says nothing of relevance
    with pytest.raises(KeyError, match="relevance"):
        tallied(objective, params, bare)
    predicted = objective.predict(params, {}, None, bare, None, {})[0]["logits"]
    np.testing.assert_array_equal(predicted, DEEP.predict(params, {}, None, bare, None, {})[0]["logits"])
    assert AttentionAlignment(TEXT, layers=LAYERS).decoder() == TEXT.decoder()
    again = RightReasons(JacobianPenalty(Classify(MLP(5, width=6, depth=1, activation="tanh")), jacobian=0.1), right_reasons=0.2)
    assert (objective, hash(objective)) == (again, hash(again))


def test_a_mistake_is_named(images, text):
    for make, message in (
        (lambda: RightReasons(DEEP, right_reasons=-1.0), "right_reasons=-1.0 must be a number not below 0"),
        (lambda: RightReasons(Regress(MLP(2))), "Regress has no log-probabilities"),
        (lambda: RightReasons(RightReasons(DEEP)), "the objective inside has a term 'right_reasons' already"),
        (lambda: JacobianPenalty(DEEP, projections=0), "projections=0 must be at least 1"),
        (lambda: AttentionAlignment(TEXT), r"layers=\[\]: name the taps"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for objective, batch, message in (
        (RightReasons(DEEP, at="inptu"), images, "'inptu' is no tap of this model; did you mean 'input'"),
        (
            RightReasons(DEEP),
            {**images, "relevance": images["relevance"][:, :3]},
            r"relevance has the shape \(3, 8, 1\) for an input of the shape \(8, 8, 1\)",
        ),
        (AttentionAlignment(TEXT, layers=("block_0/attention/heads",)), text, "attention weights are b h t t"),
        (
            AttentionAlignment(TEXT, layers=LAYERS, heads=(2,)),
            text,
            "objective.heads: 2 is no head of 'block_0/attention/weights'; they are numbered 0 to 1",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            jax.eval_shape(functools.partial(objective, train=True), objective.init(KEY, batch)[0], {}, None, batch, KEY, {})


def test_only_real_numbers_have_a_gradient():
    with pytest.raises(ConfigError, match="'tokens' holds int32, which has no gradient"):
        pullback(lambda edits: (jnp.zeros(1), {"tokens": jnp.zeros(1, jnp.int32)}), "tokens")
