"""Methods by name: every file builds a method that keeps the contract, and what does not fit is refused before anything is computed."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest

from research.core import folder
from research.core.build import build
from research.core.errors import ConfigError
from research.explanation import methods
from research.explanation.gradient import Saliency
from research.explanation.result import Attribution

FILES = sorted(path.stem for path in (folder.conf() / "method").glob("*.yaml"))
NAMES = [name for name in FILES if f"_target_: {methods.ROOM}" in (folder.conf() / "method" / f"{name}.yaml").read_text()]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_describes_a_method(name):
    text = (folder.conf() / "method" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    node = methods._default(name)
    settings = {key for key in node if not key.startswith("_")}
    method = build({key: "0" if value == "???" else value for key, value in node.items()}, where="method")
    assert method.reads in ("examples", "nothing")
    assert settings == {field.name for field in dataclasses.fields(method)}  # the file holds every setting
    assert all(f"\n{key}:" in text and "#" in text.split(f"\n{key}:")[1].splitlines()[0] for key in settings), "a setting has no comment"
    assert list(inspect.signature(method).parameters) == ["model", "examples", "key"]


def test_names_are_those_of_this_room():
    assert methods.names() == NAMES
    assert "saliency" in NAMES
    assert "lora" not in NAMES
    assert set(FILES) - set(NAMES) == {name for name in folder.described("method", "research.compression.") if "/" not in name}


def test_settings_are_changed_and_wrong_ones_refused():
    assert methods.node("saliency", {"absolute": False})["absolute"] is False
    with pytest.raises(ConfigError, match=r"saliency has no setting 'absolut'; did you mean 'absolute'\?"):
        methods.node("saliency", {"absolut": False})
    with pytest.raises(ConfigError, match=r"method=salience explains nothing; did you mean 'saliency'\?"):
        methods.node("salience")
    with pytest.raises(ConfigError, match=r"method=lora explains nothing: it compresses, see research\.compress"):
        methods.node("lora")


def test_a_method_that_does_not_fit_is_refused_with_those_that_do(model, examples_of):
    gpt = model("gpt")
    with pytest.raises(ConfigError, match=r"method=grad_cam does not fit this run: .+; these do: .*\bsaliency\b"):
        methods.prepare(gpt, "grad_cam", methods.node("grad_cam"), True)
    assert "grad_cam" not in methods.fitting(gpt)
    assert {"grad_cam", "saliency"} <= set(methods.fitting(model("cnn")))


def test_examples_are_asked_for_and_taps_looked_up_before_anything_is_computed(model, examples_of):
    cnn = model("cnn")
    with pytest.raises(ConfigError, match="method=saliency explains examples: give input=PATH"):
        methods.prepare(cnn, "saliency", methods.node("saliency"), False)
    with pytest.raises(ConfigError, match="'maps_9' is no tap of this model; did you mean 'maps_"):
        methods.prepare(cnn, "saliency", methods.node("saliency", {"at": "maps_9"}), True)


def test_a_result_knows_what_made_it(model, examples_of):
    cnn = model("cnn")
    chosen = examples_of(cnn, 2)
    result = methods.explain(cnn, "saliency", methods.node("saliency", {"absolute": False}), chosen)
    assert isinstance(result, Attribution)
    assert (result.method, result.settings["absolute"], result.names) == ("saliency", False, tuple(chosen.names))
    assert "_target_" not in result.settings
    assert result.subject == (cnn, chosen)


def test_what_is_not_finite_is_refused(model, examples_of):
    cnn = model("cnn")
    broken = dataclasses.replace(cnn, params=jax.tree.map(lambda x: np.full_like(x, np.nan), cnn.params))
    with pytest.raises(ConfigError, match="method=saliency: the attribution of example 0 is not finite"):
        methods.apply(Saliency(), broken, "saliency", {}, examples_of(cnn, 1))
