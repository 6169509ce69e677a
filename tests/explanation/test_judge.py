"""Whether an explanation tells the truth: every measure by a closed form, and the warning that a map ignores the weights."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.spec import fields
from research.explanation import judge as judging
from research.explanation import methods
from research.explanation.judge import Disturbed, Judge, gini, positions, rank_correlation, shuffled, similarity, top_overlap
from research.explanation.model import Model, examples
from research.explanation.order import layer_of, layers
from research.explanation.result import Attribution, Finding

QUICK = Judge(steps=6, orders=2, sets=32, draws=2, rows=64)
WEIGHTS = np.array([3.0, -2.0, 0.5, 1.0, 0.0, -1.0], np.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """One layer: what is right can be said in closed form."""

    def predict(self, params, extra, frozen, batch, key, hyper, *, edits=None):
        x = jnp.asarray(batch["features"])
        edit = (edits or {}).get("input")
        if isinstance(edit, tuple):
            x = jnp.where(edit[0], edit[1], x)
        elif edit is not None:
            x = x + edit
        return {"value": x @ params["head"]["kernel"]}, {"input": x}


@dataclasses.dataclass(frozen=True)
class Told:
    """A method whose map is a function of the examples alone."""

    values: tuple[float, ...] | str
    reads = "examples"

    def fits(self, model):
        return None

    def __call__(self, model, examples, key):
        if self.values == "edges":
            image = np.asarray(examples.batch["image"])
            values = np.abs(np.diff(image, axis=1, append=0)) + np.abs(np.diff(image, axis=2, append=0))
        else:
            values = np.tile(np.array(self.values, np.float32), (len(examples), 1))
        return Attribution(values, None, None, np.zeros(len(examples), np.float32), examples.target, "told", subject=(model, examples))


def linear(x):
    """(the model, the examples): output = x . WEIGHTS."""
    spec = {"features": 6, "outputs": 1, "fields": fields(features=((6,), "float32"))}
    model = Model(Linear(), {"head": {"kernel": jnp.asarray(WEIGHTS)[:, None]}}, {}, None, {}, spec)
    batch = {"features": np.asarray(x, np.float32), "mask": np.ones(len(x), bool)}
    return model, examples(model, batch)


def told(model, found, values):
    """A verdict on this map alone: the numbers of the first example."""
    method = Told(values)
    verdict = QUICK([method(model, found, jax.random.key(0))], again={"told": method})
    return {measure: values[0] for measure, values in verdict.numbers["each"]["told"].items()}


def test_the_right_order_deletes_and_inserts_best_of_all(model):
    model, found = linear(np.ones((1, 6)))
    parts = WEIGHTS  # of an input of ones with baseline 0
    areas = {}
    for order in itertools.permutations(range(6)):
        left = parts.sum() - np.concatenate([[0.0], np.cumsum(parts[list(order)])])
        areas[order] = np.trapezoid(left, np.linspace(0, 1, 7))
    right = told(model, found, tuple(map(float, parts)))
    assert right["deletion"] == pytest.approx(min(areas.values()), abs=1e-5)
    assert right["insertion"] == pytest.approx(max(areas.values()), abs=1e-5)  # what is put in is what the other took out
    wrong = told(model, found, tuple(map(float, -parts)))
    assert wrong["deletion"] == pytest.approx(max(areas.values()), abs=1e-5)
    assert wrong["deletion_random"] == right["deletion_random"]  # the same orders for each method
    assert min(areas.values()) < right["deletion_random"] < max(areas.values())


def test_a_map_that_orders_nothing_is_found_out(model):
    model, found = linear(np.ones((2, 6)))
    for sign, count in ((1, 0), (-1, 1)):
        method = Told(tuple(map(float, sign * WEIGHTS)))
        warnings = QUICK([method(model, found, jax.random.key(0))], again={"told": method}).numbers["warnings"]
        assert len([line for line in warnings if "does not order the input" in line]) == count


def test_infidelity_of_an_exact_attribution_is_0_and_of_a_multiple_only_scaled(model):
    model, found = linear(np.random.RandomState(0).standard_normal((1, 6)))
    parts = WEIGHTS * found.batch["features"][0]
    exact = told(model, found, tuple(map(float, parts)))
    assert exact["infidelity"] == pytest.approx(0.0, abs=1e-10)
    assert exact["infidelity_scaled"] == pytest.approx(0.0, abs=1e-10)
    double = told(model, found, tuple(map(float, 2 * parts)))
    assert double["infidelity"] > 0.1
    assert double["infidelity_scaled"] == pytest.approx(0.0, abs=1e-10)
    other = told(model, found, (1.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    assert 0.05 < other["infidelity_scaled"] <= 1.0


def test_infidelity_is_the_mean_square_over_the_sets(model):
    """The same by hand, with the sets drawn anew."""
    model, found = linear(np.ones((1, 6)))
    random = np.random.default_rng(0)
    for _ in range(QUICK.orders):
        random.permutation(6)
    gone = ~(random.random((QUICK.sets, 6)) >= random.uniform(0.0, 1.0, (QUICK.sets, 1)))
    claim, fall = gone @ np.arange(6.0), gone @ WEIGHTS.astype(np.float64)
    assert told(model, found, tuple(map(float, range(6))))["infidelity"] == pytest.approx(np.mean((claim - fall) ** 2), rel=1e-5)


def test_a_constant_gradient_is_not_sensitive_and_a_steep_one_is(model):
    linear_model, found = linear(np.random.RandomState(0).standard_normal((2, 6)))
    gradient = methods.explain(linear_model, "saliency", methods.node("saliency"), found)
    product = methods.explain(linear_model, "input_x_gradient", methods.node("input_x_gradient"), found)
    table = QUICK([gradient, product]).numbers["each"]
    np.testing.assert_allclose(table["saliency"]["sensitivity"], 0.0, atol=1e-6)
    spread = found.batch["features"].std(1)
    size = np.linalg.norm(np.asarray(product.values), axis=1)
    assert (np.array(table["input_x_gradient"]["sensitivity"]) > 0).all()
    most = QUICK.noise * spread * np.linalg.norm(WEIGHTS) / size  # every entry moved by the radius
    assert (np.array(table["input_x_gradient"]["sensitivity"]) <= most + 1e-6).all()


@pytest.mark.parametrize("family", ["mlp", "gpt"])
def test_the_disturbance_is_small_the_same_for_an_example_wherever_it_stands_and_new_for_each_draw(family, model, examples_of):
    own = model(family)
    found = examples_of(own, 3)

    def noisy(key):
        return dataclasses.replace(own, objective=Disturbed(own.objective, 0.1), frozen={"model": own.frozen, "noise": jax.random.key(key)})

    def inputs(which, rows):
        return np.asarray(which.read(rows.batch, ["input"])[1]["input"])

    clean, moved = inputs(own, found), inputs(noisy(0), found)
    axes = tuple(range(1, clean.ndim))
    limit = 0.1 * clean.std(axes, keepdims=True)
    assert (np.abs(moved - clean) <= limit + 1e-6).all()
    assert np.abs(moved - clean).max() > 0.9 * limit.max()
    turned = dataclasses.replace(found, batch={name: np.asarray(x)[::-1] for name, x in found.batch.items()})
    np.testing.assert_array_equal(inputs(noisy(0), turned), moved[::-1])
    assert np.abs(inputs(noisy(1), found) - moved).max() > 1e-3
    edit = {"input": (np.ones((), bool), jnp.zeros_like(clean))}
    still, _ = noisy(0).read(found.batch, edits=edit)
    np.testing.assert_allclose(still, own.read(found.batch, edits=edit)[0], atol=1e-6)  # an edit comes after the noise


def test_a_map_that_ignores_the_weights_is_found_out_and_real_methods_are_not(model, examples_of):
    own = model("cnn")
    found = examples_of(own, 3, target=1)
    edges = Told("edges")
    real = [methods.explain(own, name, methods.node(name), found) for name in ("saliency", "input_x_gradient")]
    verdict = QUICK([edges(own, found, jax.random.key(0)), *real], again={"told": edges})
    table, warnings = verdict.numbers["methods"], verdict.numbers["warnings"]
    assert table["told"]["weights"] == pytest.approx(1.0)
    assert table["told"]["weights_similarity"] == pytest.approx(1.0)
    assert [line for line in warnings if "does not depend" in line] == [line for line in warnings if line.startswith("told:")][:1] != []
    assert max(table[result.method]["weights"] for result in real) < QUICK.alike
    stages = verdict.numbers["layers"]
    assert stages["shuffled"] == list(layers(own))[::-1]
    np.testing.assert_allclose(stages["rank_correlation"]["told"], 1.0)
    assert stages["rank_correlation"]["saliency"][-1] == pytest.approx(table["saliency"]["weights"])
    assert verdict.numbers["agreement"]["names"] == ["told", "saliency", "input_x_gradient"]
    assert len(verdict.drawn) == 6
    assert verdict.show() is not None


@pytest.mark.slow
def test_a_text_is_judged_where_it_counts(model, examples_of):
    own = model("gpt")
    found = examples_of(own, 2)
    result = methods.explain(own, "input_x_gradient", methods.node("input_x_gradient"), found)
    values = np.array(result.values)
    values[1, -2:] = 1e6  # padding, which no measure may see
    loud = dataclasses.replace(result, values=values)
    quiet, found_loud = (QUICK([one]).numbers["each"]["input_x_gradient"] for one in (result, loud))
    for measure, numbers in quiet.items():
        np.testing.assert_allclose(numbers, found_loud[measure], rtol=1e-6, err_msg=measure)
    assert np.isfinite(list(quiet.values())).all()
    assert np.isnan(positions(loud)[1, -2:]).all()


def test_values_at_another_tap_are_judged_by_what_needs_no_place(model, examples_of):
    own = model("mlp")
    result = methods.explain(own, "saliency", methods.node("saliency", {"at": "hidden_0"}), examples_of(own, 2))
    verdict = QUICK([result])
    assert positions(result) is None
    assert set(verdict.numbers["methods"]["saliency"]) == {"sparseness", "sensitivity", "weights"}


def test_a_coarse_map_is_stretched_with_the_same_sum(model, examples_of):
    own = model("cnn")
    result = methods.explain(own, "input_x_gradient", methods.node("input_x_gradient", {"at": "maps_1"}), examples_of(own, 2))
    coarse = np.asarray(result.values).sum(-1)
    fine = positions(result).reshape(2, 8, 8)
    assert coarse.shape == (2, 4, 4)
    np.testing.assert_allclose(fine[:, ::2, ::2] * 4, coarse, rtol=1e-6)
    np.testing.assert_allclose(fine.sum((1, 2)), coarse.sum((1, 2)), rtol=1e-4)


def test_there_is_no_verdict_on_findings():
    assert QUICK([Finding()]) is None


def test_shuffling_keeps_each_array_s_entries_and_other_layers(model):
    own = model("cnn", "model.norm=batch")
    other = shuffled(own, ["conv_1", "norm_0"], np.random.default_rng(0))
    for tree, new in ((own.params, other.params), (own.extra, other.extra)):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            moved = np.asarray(dict(jax.tree_util.tree_leaves_with_path(new))[path])
            chosen = "conv_1" in str(path) or "norm_0" in str(path)
            assert (moved != np.asarray(x)).any() == chosen, path
            np.testing.assert_array_equal(np.sort(moved.ravel()), np.sort(np.asarray(x).ravel()))


def test_layers_stand_in_the_order_of_the_forward_pass(model):
    assert list(layers(model("cnn"))) == ["conv_0", "conv_1", "dense_0", "head"]
    assert layer_of("own/conv_1/kernel/codes", ()) == "conv_1"  # as wrappers nest it
    assert layer_of("statistics/norm_0/mean", {"norm_0"}) == "norm_0"
    found = layers(model("gpt"))
    assert list(found)[-3:] == ["block_0", "block_1", "norm"]
    assert max(found, key=lambda name: found[name][1]) == "token"  # tied: used again for the logits


def test_numbers_by_hand():
    assert gini(np.array([0.0, 0.0, 0.0, -2.0])) == pytest.approx(0.75)
    assert gini(np.ones(5)) == pytest.approx(0.0)
    assert gini(np.zeros(3)) == 0.0
    sizes = np.random.RandomState(0).exponential(size=50)
    by_pairs = np.abs(sizes[:, None] - sizes[None]).sum() / (2 * len(sizes) * sizes.sum())
    assert gini(sizes) == pytest.approx(by_pairs)
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([10.0, 200.0, 3000.0])) == pytest.approx(1.0)
    assert rank_correlation(np.array([1.0, 2.0, 2.0, 5.0]), np.array([4.0, 3.0, 1.0, 0.0])) == pytest.approx(-0.9486832980505138)
    assert rank_correlation(np.zeros(3), np.arange(3.0)) == 0.0
    assert rank_correlation(np.zeros(3), np.ones(3)) == 1.0
    assert top_overlap(np.arange(10.0), np.array([*np.arange(9.0), -1.0]), 0.2) == pytest.approx(0.5)


def test_similarity_is_that_of_one_window_by_hand():
    random = np.random.RandomState(0)
    x, y = random.standard_normal((2, 7, 7))
    a, b = x / np.abs(x).max(), y / np.abs(y).max()
    covariance = np.mean((a - a.mean()) * (b - b.mean()))
    expected = (2 * a.mean() * b.mean() + 4e-4) * (2 * covariance + 36e-4)
    expected /= (a.mean() ** 2 + b.mean() ** 2 + 4e-4) * (a.var() + b.var() + 36e-4)
    assert similarity(x, y) == pytest.approx(expected)
    assert similarity(x, 3 * x) == pytest.approx(1.0)


def test_scipy_ranks_alike():
    from scipy.stats import spearmanr

    random = np.random.RandomState(0)
    x, y = random.randint(0, 6, (2, 40)).astype(float)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert judging.MEASURES.keys() >= {"deletion", "insertion", "infidelity", "sensitivity", "sparseness", "weights"}


def test_the_command_prints_the_verdict_and_warns(parent, command, monkeypatch, tmp_path):
    strict = dataclasses.replace(QUICK, alike=-1.0)  # by which every map is alike
    monkeypatch.setattr("research.explain.Judge", lambda: strict)
    words = (f"run={parent('mlp')}", "method=[saliency,input_x_gradient]", "index=0,1", "judge=true", f"out={tmp_path}")
    told = command("explain", *words)
    assert told.code == 0, told.err
    assert "deletion (low is good)" in told.out
    found = json.loads((tmp_path / "explanation.json").read_text())["judge"]
    assert len(found["each"]["saliency"]["deletion"]) == 2
    assert found["methods"]["saliency"]["deletion"] == pytest.approx(np.mean(found["each"]["saliency"]["deletion"]))
    assert len(found["warnings"]) >= 2
    page = (tmp_path / "explanation.html").read_text()
    for warning in found["warnings"]:
        assert any(warning in line for line in told.err)
        assert warning in page
    assert (tmp_path / "judge.png").exists()
