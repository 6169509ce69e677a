"""Gradient methods: what they promise, against closed forms; every tap and unit; baselines; what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.build import build
from research.core.errors import ConfigError
from research.explanation import gradient, methods
from research.explanation.gradient import ExpectedGradients, InputXGradient, IntegratedGradients, Saliency, fill, read
from research.explanation.guided import GradCAM, GuidedBackpropagation, stretched
from research.explanation.model import Examples, examples
from research.explanation.smooth import SmoothGrad
from research.layers.activation import activation, guided

KEY = jax.random.key(0)
GRADIENTS = ("saliency", "input_x_gradient", "integrated_gradients", "expected_gradients", "smooth_grad", "guided_backpropagation")
TEXT = GRADIENTS[:5]
NAMES = (*GRADIENTS, "grad_cam", "guided_grad_cam")
SMOOTH = ("model.activation=tanh", "model.pool=1")  # a max-pool has kinks
SHORT = ("gpt", "model.depth=1")
QUICK = {  # what makes a method quick; noise needs no data
    "integrated_gradients": {"points": 4},
    "expected_gradients": {"points": 2, "references": 3, "background": "noise"},
    "smooth_grad": {"samples": 3},
}


def made(name, **settings):
    """The method as its YAML describes it, with these settings."""
    return build({**node(name), **QUICK.get(name, {}), **settings}, where="method")


node = functools.cache(methods.node)  # composing takes longer than most of these tests


def matrix(model, *path):
    node = model.params
    for name in path:
        node = node[name]
    return np.asarray(node, np.float64)


def linear(model):
    """An MLP without hidden layers: outputs = features @ kernel + bias."""
    return model("regression", "model.depth=0", "model.width=1")


@pytest.fixture
def traces(monkeypatch):
    """Counts how often an objective's predict is traced or run, as a list that grows."""
    seen = []

    def count(model):
        @dataclasses.dataclass(frozen=True)
        class Counted:
            objective: object

            def predict(self, *args, **kwargs):
                seen.append(1)
                return self.objective.predict(*args, **kwargs)

        return dataclasses.replace(model, objective=Counted(model.objective))

    return count, seen


def test_a_linear_model_is_explained_in_closed_form(model, examples_of):
    made_, kernel = linear(model), matrix(linear(model), "head", "kernel")
    given = examples_of(made_, 4, target=[0, 1, 1, 0])
    slope, x = kernel.T[given.target[:, 0]], given.batch["features"]
    np.testing.assert_allclose(Saliency()(made_, given, KEY).values, np.abs(slope), atol=1e-6)
    np.testing.assert_allclose(Saliency(absolute=False)(made_, given, KEY).values, slope, atol=1e-6)
    np.testing.assert_allclose(InputXGradient()(made_, given, KEY).values, x * slope, atol=1e-6)
    np.testing.assert_allclose(IntegratedGradients(points=1, baseline=0.5)(made_, given, KEY).values, (x - 0.5) * slope, atol=1e-5)
    method = ExpectedGradients(points=1, references=5, background="noise", noise=2.0)
    result = method(made_, given, KEY)
    np.testing.assert_allclose(result.values, (x - result.baseline) * slope, atol=1e-5)
    assert 0.2 < np.abs(result.baseline).mean() < 4
    noisy = SmoothGrad(method="input_x_gradient", samples=3)
    noise = np.random.RandomState(0).standard_normal((4, 3, 6)).astype(np.float32)
    np.testing.assert_allclose(noisy.over(made_, given, noise, KEY).values, (x + noise.mean(1)) * slope, atol=1e-5)
    squared = dataclasses.replace(noisy, variant="squared").over(made_, given, noise, KEY).values
    np.testing.assert_allclose(squared, np.square((x[:, None] + noise) * slope[:, None]).mean(1), rtol=1e-4)
    variance = dataclasses.replace(noisy, variant="variance").over(made_, given, noise, KEY).values
    np.testing.assert_allclose(variance, (noise * slope[:, None]).var(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "at"),
    [
        (("cnn", *SMOOTH), "maps_0"),
        (("regression", "model.activation=gelu"), "hidden_0"),
        pytest.param(SHORT, "block_0/middle", marks=pytest.mark.slow),
    ],
)
def test_integrated_gradients_are_complete(family, at, model, examples_of):
    made_ = model(*family)
    given = examples_of(made_, 3)
    for tap in ("input", at):
        value = read(made_, given, tap)
        base = np.random.RandomState(9).standard_normal(value.shape).astype(np.float32)  # at one number, a layer norm has a kink
        result = IntegratedGradients(points=32, at=tap).integrate(made_, given, value, base[:, None])
        empty = made_.read(given.batch, (), {tap: (np.bool_(True), base)})[0]
        before = np.asarray(empty)[(np.arange(3), *given.target.T)]
        np.testing.assert_allclose(result.values.reshape(3, -1).sum(1), result.output - before, atol=2e-5, rtol=1e-4)
        np.testing.assert_allclose(result.delta, 0, atol=2e-5)
        assert np.abs(result.output - before).max() > 0.01


def test_delta_tells_what_too_few_points_miss(model, examples_of):
    made_ = model("regression", "model.activation=tanh")
    given = examples_of(made_, 4)
    misses = [np.abs(IntegratedGradients(points=points)(made_, given, KEY).delta).max() for points in (1, 3, 12)]
    assert misses[0] > 10 * misses[1] > 100 * misses[2]


def test_expected_gradients_sum_to_the_output_less_its_mean_over_the_training_data(model, examples_of):
    made_ = with_data(model("cnn", *SMOOTH))
    given = examples_of(made_, 2)
    result = ExpectedGradients(points=16, references=6)(made_, given, KEY)
    images = np.asarray(made_.data().splits["train"].take(np.arange(6))["image"])  # there are no more
    at_data = np.asarray(made_.read({"image": images, "mask": np.ones(6, bool), "index": np.arange(6)})[0])[:, given.target[:, 0]].mean(0)
    np.testing.assert_allclose(result.values.sum((1, 2, 3)), result.output - at_data, atol=1e-4)
    np.testing.assert_allclose(result.delta, 0, atol=1e-4)
    np.testing.assert_allclose(result.baseline[0], images.mean(0), atol=1e-6)
    with pytest.raises(ConfigError, match="references=7: the training data has 6 examples"):
        ExpectedGradients(references=7)(made_, given, KEY)


@pytest.mark.slow
def test_expected_gradients_of_a_text_draw_windows_of_its_length(model, examples_of):
    made_ = with_data(model(*SHORT))
    given = examples_of(made_, 1)
    batch = {"tokens": given.batch["tokens"][:, :5], "mask": np.ones((1, 5), bool)}
    result = ExpectedGradients(points=16, references=2)(made_, examples(made_, batch), KEY)
    assert result.values.shape == (1, 5)
    np.testing.assert_allclose(result.delta, 0, atol=1e-4)


def test_an_input_that_changes_nothing_gets_nothing_and_one_that_does_gets_something(model, examples_of):
    made_ = model("regression")
    kernel = matrix(made_, "dense_0", "kernel").astype(np.float32)
    kernel[2] = 0.0  # the hidden layer does not read it
    params = {**made_.params, "dense_0": {**made_.params["dense_0"], "kernel": kernel}}
    blind = dataclasses.replace(made_, params=params)
    given = examples_of(blind, 3)
    for name in GRADIENTS:
        values = made(name)(blind, given, KEY).values
        np.testing.assert_array_equal(values[:, 2], 0)
        assert (np.abs(np.delete(values, 2, 1)).max(0) > 0).all(), name


def test_networks_of_equal_function_are_explained_alike(model, examples_of):
    """A hidden layer with its units in another order, and scaled up before ReLU and down after it, is the same function."""
    made_ = model("regression")
    order = np.random.RandomState(0).permutation(16)
    scale = np.exp(np.random.RandomState(1).standard_normal(16)).astype(np.float32)
    dense, head = made_.params["dense_0"], made_.params["head"]
    params = {
        "dense_0": {"kernel": (dense["kernel"] * scale)[:, order], "bias": (dense["bias"] * scale)[order]},
        "head": {"kernel": (head["kernel"] / scale[:, None])[order], "bias": head["bias"]},
    }
    other, given = dataclasses.replace(made_, params=params), examples_of(made_, 3)
    for name in ("saliency", "input_x_gradient", "integrated_gradients", "expected_gradients"):
        np.testing.assert_allclose(made(name)(other, given, KEY).values, made(name)(made_, given, KEY).values, atol=2e-6)


def test_integrated_gradients_are_linear_in_the_output(model, examples_of):
    """A head that adds two outputs is explained by the sum of what explains each."""
    made_ = model("regression", "model.activation=tanh")
    head = made_.params["head"]
    kernel = np.stack([2 * head["kernel"][:, 0] - 3 * head["kernel"][:, 1], head["kernel"][:, 1]], 1)
    both = dataclasses.replace(made_, params={**made_.params, "head": {**head, "kernel": kernel}})
    method = IntegratedGradients(points=8)
    first, second = (method(made_, examples_of(made_, 3, target=target), KEY).values for target in (0, 1))
    together = method(both, examples_of(both, 3, target=0), KEY).values
    np.testing.assert_allclose(together, 2 * first - 3 * second, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "smooth_grad" else name for name in NAMES])
def test_a_batch_is_explained_as_one_by_one(name, model, examples_of):
    for family in (SHORT, ("cnn",)) if name in ("saliency", "integrated_gradients", "smooth_grad") else (("cnn",),):
        made_ = model(*family)
        given = examples_of(made_, 3)
        whole = made(name)(made_, given, KEY)
        assert np.abs(whole.values).max() > 1e-4
        for i in range(3):
            one = made(name)(made_, given.row(i), KEY)
            np.testing.assert_allclose(one.values[0], whole.values[i], atol=1e-6)
            np.testing.assert_allclose(one.output[0], whole.output[i], atol=1e-6)


@pytest.mark.parametrize("name", TEXT)
def test_padding_gets_nothing_and_changes_nothing(name, model, examples_of):
    made_ = model(*SHORT)
    given = examples_of(made_, 3)
    values = made(name)(made_, given, KEY).values
    assert values.shape == (3, 8)
    np.testing.assert_array_equal(values[1, 6:], 0)
    assert (values[1, :6] != 0).all()
    tokens = given.batch["tokens"].copy()
    tokens[1, 6:] = (tokens[1, 6:] + 1) % 11
    other = Examples({**given.batch, "tokens": tokens}, given.names, given.target)
    np.testing.assert_allclose(made(name)(made_, other, KEY).values, values, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_one_compilation_for_a_method_and_a_shape(name, model, examples_of, traces):
    count, seen = traces
    made_ = count(model("cnn" if "cam" in name else "mlp"))
    made(name)(made_, examples_of(made_, 3), KEY)
    made_.outputs, made_.taps  # noqa: B018  # traced for their shapes, once
    before = len(seen)
    made(name)(made_, examples_of(made_, 3, target=1, seed=1), KEY)
    if name == "integrated_gradients":
        made(name, baseline=0.5)(made_, examples_of(made_, 3), KEY)
        made(name, baseline="blur")(made_, examples_of(made_, 3), KEY)
    if name == "smooth_grad":
        return  # looks at the shapes of a model of its own
    assert len(seen) == before


def test_rows_cut_examples_and_points_without_changing_the_result(model, examples_of):
    made_ = model("regression")
    given = examples_of(made_, 5)
    method = IntegratedGradients(points=7)
    wanted = method(made_, given, KEY)
    for rows in (2, 12):
        found = dataclasses.replace(method, rows=rows)(made_, given, KEY)
        for name in ("values", "output", "delta"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-5)
    smooth = SmoothGrad(samples=3)
    wanted = smooth(made_, given, KEY)
    for rows in (1, 7):
        np.testing.assert_allclose(dataclasses.replace(smooth, rows=rows)(made_, given, KEY).values, wanted.values, atol=1e-6)


def test_any_tap_is_explained(model, examples_of):
    made_ = model("cnn")
    given = examples_of(made_, 2)
    for at in ("maps_0", "maps_1", "hidden_0"):
        value = np.asarray(made_.read(given.batch, (at,))[1][at])
        assert InputXGradient(at=at)(made_, given, KEY).values.shape == value.shape
    head = matrix(made_, "head", "kernel")  # after the last tap the model is linear
    wanted = head.T[given.target[:, 0]]
    np.testing.assert_allclose(Saliency(at="hidden_0", absolute=False)(made_, given, KEY).values, wanted, atol=1e-6)
    np.testing.assert_allclose(
        IntegratedGradients(at="hidden_0", points=1, baseline=2.0)(made_, given, KEY).values, wanted * (value - 2.0), atol=1e-5
    )


def test_a_unit_is_explained_as_an_output_is(model, examples_of):
    made_ = model("cnn")
    given = examples_of(made_, 3, target=2)
    of = {"tap": "logits", "unit": (2,)}
    np.testing.assert_allclose(Saliency(of=of)(made_, given, KEY).values, Saliency()(made_, given, KEY).values, atol=1e-7)
    maps = np.asarray(made_.read(given.batch, ("maps_1",))[1]["maps_1"])
    one = IntegratedGradients(points=4, of={"tap": "maps_1", "unit": (1, 2, 3)})(made_, given, KEY)
    np.testing.assert_allclose(one.output, maps[:, 1, 2, 3], atol=1e-6)
    reach = one.values[:, :, :, 0] != 0
    assert reach[:, :7].any()
    assert not reach[:, 7:].any()  # row 1 of the maps sees rows 0 to 2 of the pooled maps, and those rows 0 to 6 of the image
    column = Saliency(absolute=False, of={"tap": "maps_1", "unit": (None, 2, 3)})(made_, given, KEY)
    each = sum(Saliency(absolute=False, of={"tap": "maps_1", "unit": (y, 2, 3)})(made_, given, KEY).values for y in range(4))
    np.testing.assert_allclose(column.values, each, atol=1e-6)
    np.testing.assert_allclose(column.output, maps[:, :, 2, 3].sum(1), atol=1e-5)


def test_grad_cam_by_its_formula(model, examples_of):
    made_ = model("cnn")
    given = examples_of(made_, 3)
    maps = np.asarray(made_.read(given.batch, ("maps_1",))[1]["maps_1"])
    slope = Saliency(at="maps_1", absolute=False)(made_, given, KEY).values
    wanted = np.maximum((slope.mean((1, 2))[:, None, None] * maps).sum(-1), 0)
    result = GradCAM()(made_, given, KEY)
    np.testing.assert_allclose(result.arrays()["map"], wanted, atol=1e-6)
    assert result.values.shape == (3, 8, 8)
    assert wanted.max() > 0
    first = GradCAM(at="maps_0")(made_, given, KEY)
    assert np.abs(first.values - result.values).max() > 1e-3
    ramp = stretched(np.array([[[0.0, 1.0]]], np.float32), (1, 4))
    np.testing.assert_allclose(ramp[0, 0], [0, 0.25, 0.75, 1])  # half-pixel centres, held at the border


def test_the_last_maps_are_the_last_recorded_not_the_last_by_name(model, examples_of):
    made_ = model("cnn", f"model.channels={[2] * 11}", f"model.pool={[2, 2, *[1] * 9]}")
    given = examples_of(made_, 1)
    np.testing.assert_array_equal(GradCAM()(made_, given, KEY).values, GradCAM(at="maps_10")(made_, given, KEY).values)


def test_guided_gradients_pass_an_activation_where_they_are_positive(model, examples_of):
    x, slope = jnp.array([-1.0, 2.0, 3.0, -4.0]), jnp.array([1.0, 5.0, -6.0, -7.0])
    for on, wanted in ((False, [0, 5, -6, 0]), (True, [0, 5, 0, 0])):
        with guided(on):
            np.testing.assert_array_equal(jax.vjp(activation("relu"), x)[1](slope)[0], wanted)
    with guided():
        np.testing.assert_allclose(jax.vjp(activation("tanh"), x)[1](slope)[0], np.maximum(slope, 0) / np.cosh(x) ** 2, atol=1e-6)
        np.testing.assert_array_equal(jax.vjp(activation("identity"), x)[1](slope)[0], slope)
    made_ = model("mlp")
    given = examples_of(made_, 3)
    first, second = matrix(made_, "dense_0", "kernel"), matrix(made_, "dense_1", "kernel")
    hidden = [np.asarray(value) for value in made_.read(given.batch, ("hidden_0", "hidden_1"))[1].values()]
    slope = np.maximum(matrix(made_, "head", "kernel").T[given.target[:, 0]], 0) * (hidden[1] > 0)
    slope = np.maximum(slope @ second.T, 0) * (hidden[0] > 0)
    plain = Saliency(absolute=False)(made_, given, KEY).values
    found = GuidedBackpropagation()(made_, given, KEY).values
    np.testing.assert_allclose(found.reshape(3, -1), slope @ first.T, atol=1e-6)
    np.testing.assert_array_equal(Saliency(absolute=False)(made_, given, KEY).values, plain)  # the rule is over
    assert np.abs(found - plain).max() > 1e-2


def test_smooth_grad_without_noise_is_the_method_itself(model, examples_of):
    for family, name in ((("mlp",), "saliency"), (("mlp",), "integrated_gradients"), (SHORT, "input_x_gradient")):
        made_ = model(*family)
        given = examples_of(made_, 3)
        smooth = SmoothGrad(method=name, settings=QUICK.get(name, {}), samples=2, noise=0.0)
        np.testing.assert_allclose(smooth(made_, given, KEY).values, made(name)(made_, given, KEY).values, atol=1e-6)


def test_smooth_grad_draws_noise_in_the_range_of_each_input(model, examples_of):
    """Of a linear model, the variance of input x gradient is that of the noise x slope squared."""
    made_, kernel = linear(model), matrix(linear(model), "head", "kernel")
    given = examples_of(made_, 2, target=0)
    given = Examples({**given.batch, "features": given.batch["features"] * np.array([[1.0], [10.0]], np.float32)}, given.names, given.target)
    result = SmoothGrad(method="input_x_gradient", variant="variance", samples=400, noise=0.2)(made_, given, KEY)
    deviation = np.sqrt(result.values / kernel[:, 0] ** 2)
    np.testing.assert_allclose(deviation, np.repeat(0.2 * np.ptp(given.batch["features"], 1)[:, None], 6, 1), rtol=0.2)
    np.testing.assert_allclose(result.output, np.asarray(made_.read(given.batch)[0])[:, 0], atol=1e-5)


def test_baselines_made_of_the_image(model, examples_of):
    image = np.zeros((1, 20, 20, 2), np.float32)
    image[0, 10, 10] = [1, 2]
    np.testing.assert_allclose(fill(image, "mean")[0, 3, 4], [1 / 400, 2 / 400], rtol=1e-5)
    blurred = fill(image, "blur")
    np.testing.assert_allclose(blurred.sum((0, 1, 2)), [1, 2], rtol=1e-3)
    np.testing.assert_allclose(blurred[0, 10, 12, 0] / blurred[0, 10, 10, 0], np.exp(-0.5), rtol=1e-3)  # 2 pixels: one deviation
    np.testing.assert_allclose(fill(np.ones((1, 8, 8, 1), np.float32), "blur"), 1, rtol=1e-5)  # the border is not darker
    made_ = model("cnn", *SMOOTH)
    for baseline in ("blur", "mean"):
        result = IntegratedGradients(points=24, baseline=baseline)(made_, examples_of(made_, 2), KEY)
        np.testing.assert_allclose(result.delta, 0, atol=1e-4)


@pytest.mark.slow
def test_a_model_in_bfloat16_is_explained(model, examples_of):
    made_ = model("cnn", "model.dtype=bfloat16")
    given = examples_of(made_, 2)
    for name, settings in (("guided_grad_cam", {}), ("integrated_gradients", {}), ("smooth_grad", {}), ("saliency", {"at": "hidden_0"})):
        values = made(name, **settings)(made_, given, KEY).values
        wanted = made(name, **settings)(model("cnn"), given, KEY).values
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, wanted, atol=0.05 * np.abs(wanted).max())


def test_what_is_refused(model, examples_of):
    made_ = model("cnn")
    given = examples_of(made_, 2)
    cases = {
        "'maps_7' is no tap of this model; did you mean 'maps_": {"at": "maps_7"},
        "of={'tap': 'maps_1'}: it is written as": {"of": {"tap": "maps_1"}},
        "'map' is no tap of this model": {"of": {"tap": "map", "unit": (1,)}},
        r"the tap maps_1 has the shape \(4, 4, 6\), so a unit has 3 places": {"of": {"tap": "maps_1", "unit": (1,)}},
        "axis 2 of the tap maps_1 has the places 0 to 5": {"of": {"tap": "maps_1", "unit": (0, 0, 6)}},
        "of.tap=maps_0 comes before at=maps_1": {"at": "maps_1", "of": {"tap": "maps_0", "unit": (0, 0, 0)}},
    }
    for message, settings in cases.items():
        with pytest.raises(ConfigError, match=message):
            made("saliency", **settings)(made_, given, KEY)
    with pytest.raises(ConfigError, match=r"at=hidden_0 holds no maps, y x c; these taps do: maps_0, maps_1"):
        made("grad_cam", at="hidden_0")(made_, given, KEY)
    for name, settings, message in (
        ("integrated_gradients", {"points": 0}, "points=0 must be at least 1"),
        ("integrated_gradients", {"baseline": "blurr"}, "did you mean 'blur'"),
        ("expected_gradients", {"references": 0}, "references=0"),
        ("expected_gradients", {"background": "dat"}, "did you mean 'data'"),
        ("smooth_grad", {"samples": 0}, "samples=0"),
        ("smooth_grad", {"noise": -1.0}, "noise=-1.0"),
        ("smooth_grad", {"variant": "means"}, "did you mean 'mean'"),
        ("smooth_grad", {"method": "smooth_grad"}, "smooth itself"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(name, **settings)
    with pytest.raises(ConfigError, match="did you mean 'saliency'"):
        made("smooth_grad", method="salienc").fits(made_)


def test_what_does_not_fit(model):
    cnn, mlp, text = model("cnn"), model("mlp"), model("gpt")
    assert all(made(name).fits(cnn) is None for name in NAMES)
    assert all(made(name).fits(text) is None for name in TEXT)
    assert "sum to nothing" in GuidedBackpropagation().fits(text)
    assert "sum to nothing" in Saliency(absolute=False).fits(text)
    assert Saliency(absolute=False, at="block_0/output").fits(text) is None
    assert "which is not there" in ExpectedGradients().fits(cnn)
    assert "reads tokens" in GradCAM().fits(text)
    assert "no tap of maps" in GradCAM().fits(mlp)
    assert "made of image" in IntegratedGradients(baseline="blur").fits(text)
    assert "made of image or tokens" in IntegratedGradients(baseline="mean", at="maps_0").fits(cnn)
    assert "reads tokens" in SmoothGrad(method="grad_cam").fits(text)


def test_rows_of_a_call_are_those_that_were_measured():
    assert all(method().rows == gradient.ROWS for method in (IntegratedGradients, ExpectedGradients, SmoothGrad))
    assert all(node(name)["rows"] == gradient.ROWS for name in ("integrated_gradients", "expected_gradients", "smooth_grad"))


class Source:
    """Six examples as a split of a run's data."""

    def __init__(self, model):
        random, shape = np.random.RandomState(3), tuple(model.spec["fields"][model.field]["shape"])
        drawn = random.standard_normal((6, *shape)).astype(np.float32)
        self.fields = {model.field: drawn if model.field != "tokens" else random.randint(0, 11, (6, *shape)).astype(np.int32)}

    def __len__(self):
        return 6

    def take(self, indices):
        return {name: x[indices] for name, x in self.fields.items()}


def with_data(model):
    source = Source(model)
    data = type("Data", (), {"splits": {"train": source}})()
    return dataclasses.replace(model, data=lambda: data)


def test_a_text_is_compared_with_the_mean_of_its_own_tokens(model, examples_of):
    made_ = model("gpt")
    given = examples_of(made_, 2)
    result = IntegratedGradients()(made_, given, KEY)
    embedded = read(made_, given, "input")
    for i, mask in enumerate(given.mask):
        np.testing.assert_allclose(result.baseline[i], np.broadcast_to(embedded[i][mask].mean(0), embedded[i].shape), atol=1e-6)
    np.testing.assert_allclose(result.delta, 0, atol=1e-4)
    other = IntegratedGradients(baseline=0.0)(made_, given, KEY)
    assert np.abs(other.values - result.values).max() > 1e-3
