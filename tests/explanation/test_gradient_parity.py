"""Gradient methods against Captum on the same weights: what `references/gradient.py` has stored."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest

from research.core.build import build
from research.core.tree import map_paths
from research.explanation import methods
from research.explanation.gradient import IntegratedGradients, read
from research.explanation.model import examples
from research.explanation.smooth import SmoothGrad

KEY = jax.random.key(0)
HIDDEN, UNITS = {"mlp": "hidden_0", "cnn": "maps_1"}, {"mlp": (3,), "cnn": (2, 1, 3)}
CASES = {  # name of the stored result: (method, settings)
    "saliency": ("saliency", {}),
    "input_x_gradient": ("input_x_gradient", {}),
    "integrated_gradients": ("integrated_gradients", {"baseline": 0.3}),
    "guided_backpropagation": ("guided_backpropagation", {}),
    "layer_gradient": ("input_x_gradient", {"at": "HIDDEN"}),
    "neuron": ("saliency", {"absolute": False, "of": {"tap": "HIDDEN", "unit": "UNIT"}}),
    "grad_cam": ("grad_cam", {}),
    "guided_grad_cam": ("guided_grad_cam", {}),
}


@pytest.fixture(scope="module")
def captum(model):
    """captum(family): (the model with the stored weights, its examples, what Captum says)."""
    return functools.cache(functools.partial(_stored, model))


def _stored(model, family):
    with np.load(pathlib.Path(__file__).parent / "references" / "gradient.npz") as file:
        kept = {name.removeprefix(f"{family}/"): file[name] for name in file if name.startswith(f"{family}/")}
    made = model(family)
    params = map_paths(lambda path, leaf: kept[f"params/{path}"].reshape(leaf.shape), made.params)
    made = dataclasses.replace(made, params=params)
    given = examples(made, {"image": kept["image"], "mask": np.ones(len(kept["image"]), bool)}, target=kept["target"])
    np.testing.assert_allclose(made.read(given.batch)[0], kept["output"], atol=1e-6)
    return made, given, kept


node = functools.cache(methods.node)


def close(found, wanted):
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(found, wanted.reshape(found.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "name"), [*(("cnn", name) for name in CASES), *(("mlp", name) for name in CASES if "cam" not in name)])
def test_equal_to_captum(captum, family, name):
    made, given, kept = captum(family)
    method, settings = CASES[name]
    settings = {key: HIDDEN[family] if value == "HIDDEN" else value for key, value in settings.items()}
    if "of" in settings:
        settings["of"] = {"tap": HIDDEN[family], "unit": UNITS[family]}
    result = build({**node(method), **settings})(made, given, KEY)
    close(result.values, kept[name])
    if name == "grad_cam":
        close(result.kept["map"], kept["map"])
    if "of" not in settings:
        np.testing.assert_allclose(result.output, kept["output"][range(3), kept["target"]], atol=1e-6)


@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_integrated_gradients_of_a_layer_equal_captum(captum, family):
    made, given, kept = captum(family)
    method = IntegratedGradients(at=HIDDEN[family])
    bases = np.repeat(kept["layer_baseline"][:1], 3, 0)[:, None]
    close(method.integrate(made, given, read(made, given, method.at), bases).values, kept["layer_integrated_gradients"])


@pytest.mark.parametrize("variant", ["mean", "squared", "variance"])
@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_smooth_saliency_equals_captum_with_the_same_noise(captum, family, variant):
    made, given, kept = captum(family)
    method = SmoothGrad(variant=variant, samples=8)
    close(method.over(made, given, kept["noise"], KEY).values, kept[f"smooth_{variant}"])
