import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import optax
import pytest
from omegaconf import OmegaConf

from research.core import build as module
from research.core.build import build, check_targets, freeze, thaw
from research.core.errors import ConfigError
from research.training.schedule import Constant


def test_a_node_becomes_its_object_with_lists_as_tuples():
    node = OmegaConf.create({"size": [3, 3], "layer": {"_target_": "flax.linen.Conv", "features": 4, "kernel_size": "${size}"}})
    layer = build(node.layer, where="layer")
    assert layer == nn.Conv(features=4, kernel_size=(3, 3))
    assert hash(layer) == hash(nn.Conv(features=4, kernel_size=(3, 3)))


def test_nested_nodes_are_built_first_and_plain_values_come_back():
    node = {"a": {"_target_": "flax.linen.Dense", "features": 2}, "b": [1, [2]], "c": None}
    assert build(node) == {"a": nn.Dense(2), "b": (1, (2,)), "c": None}


def test_partial_args_and_recursive():
    partial = build({"_target_": "optax.sgd", "_partial_": True, "learning_rate": 1})
    assert isinstance(partial, functools.partial)
    assert partial.keywords == {"learning_rate": 1.0}
    assert isinstance(build({"_target_": "optax.chain", "_args_": [{"_target_": "optax.sgd", "learning_rate": 0.1}]}), optax.GradientTransformation)
    chained = build({"_target_": "optax.apply_if_finite", "inner": {"_target_": "optax.sgd", "learning_rate": 0.1}, "max_consecutive_errors": 3})
    assert isinstance(chained, optax.GradientTransformation)
    inner = {"_target_": "flax.linen.Dense", "features": 2}
    assert build({"_target_": "optax.masked", "_partial_": True, "_recursive_": False, "mask": inner}).keywords == {"mask": freeze(inner)}


def test_extra_arguments_win_and_some_keys_are_left_out():
    node = {"_target_": "flax.linen.Dense", "features": 2, "batch": 3}
    assert build(node, without=("batch",), features=5) == nn.Dense(5)


@pytest.mark.parametrize(
    "target",
    [
        "builtins.open",
        "os.system",
        "pathlib.Path.write_text",
        "research.core.folder.write_text",
        "research.train.main",
        "research.training.run.write_json",
        "research.training.optimizer.optax.adamw",
        "research.training.schedule.dataclasses.make_dataclass",
        "flax.linen.Dense.__init__.__globals__.get",
        "jax.numpy.load",
        "researching.x",
        "optax",
        3,
        None,
    ],
)
def test_a_forbidden_target_is_never_executed(target, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.x\._target_=.* is not allowed"):
        build({"_target_": "flax.linen.Dense", "features": 2, "x": {"_target_": target, "_args_": ["/tmp/forbidden", "w"]}}, where="model")


def test_a_forbidden_target_is_found_wherever_it_hides_before_anything_is_built():
    check_targets({"a": [{"_target_": "optax.sgd"}]})
    with pytest.raises(ConfigError, match=r"c\.a\[1\]\.b\._target_='os.system'"):
        check_targets({"a": [1, {"b": {"_target_": "os.system"}}]}, "c")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "flax.linen.Dens", "features": 1}, r"m\._target_='flax.linen.Dens' does not exist; did you mean 'Dense'\?"),
        ({"_target_": "research.models.mpl.MLP"}, r"does not exist; did you mean 'mlp'\?"),
        ({"_target_": "flax.linen.Dense", "feature": 1}, r"m\.feature: Dense takes no 'feature'; did you mean 'features'\?"),
        ({"_target_": "flax.linen.Dense"}, "m: Dense: missing a required argument: 'features'"),
        ({"_target_": "flax.linen.Dense", "features": "many"}, r"m\.features='many' has the wrong type: expected int, found str"),
        ({"_target_": "flax.linen.Dense", "features": True, "use_bias": "no"}, r"m\.use_bias='no' has the wrong type: expected bool"),
        ({"_target_": "research.training.schedule.Cosine", "floor": -1}, "m: "),
        ({"_target_": "flax.linen.Dense", "features": "???"}, "Missing mandatory value"),
        ({"_target_": "flax.linen.Dense", "features": "${nowhere}"}, "Interpolation key 'nowhere' not found"),
    ],
)
def test_what_cannot_be_built_is_named_in_one_line(node, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(OmegaConf.create(node), where="m")
    assert "\n" not in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Typed:
    number: float = 0.0
    numbers: tuple[float, ...] = ()
    rate: float | None = None
    named: Mapping[str, float] = dataclasses.field(default_factory=dict)
    pair: tuple[int, float] = (1, 1.0)
    count: int = 0


def test_ints_stand_for_floats_but_not_the_reverse(monkeypatch):
    monkeypatch.setattr(module, "_locate", lambda target, where: Typed)
    node = {"_target_": "optax.x"}
    for _ in range(20):  # a checker that samples would now and then let an int through
        made = build({**node, "number": 1, "numbers": [1.5, 2.5, 3, 4.5], "rate": 3, "named": {"a": 0.5, "b": 2}})
        assert made == Typed(1.0, (1.5, 2.5, 3.0, 4.5), 3.0, named={"a": 0.5, "b": 2.0})
        assert {type(x) for x in (made.number, *made.numbers, made.rate, *made.named.values())} == {float}
    for name, value in (("count", 1.0), ("number", True), ("numbers", [1.0, 1.0, True]), ("number", "1"), ("pair", [1, 2, 3])):
        with pytest.raises(ConfigError, match="wrong type"):
            build({**node, name: value})


def test_a_fault_in_a_new_file_is_shown_and_not_hidden(tmp_path, monkeypatch):
    import research.models

    (tmp_path / "faulty.py").write_text("import not_installed\n")
    (tmp_path / "unfinished.py").write_text("def f(:\n")
    monkeypatch.setattr(research.models, "__path__", [*research.models.__path__, str(tmp_path)])
    with pytest.raises(ConfigError, match="cannot be imported: No module named 'not_installed'"):
        build({"_target_": "research.models.faulty.Model"})
    with pytest.raises(ConfigError, match="cannot be imported: SyntaxError"):
        build({"_target_": "research.models.unfinished.Model"})


def test_objects_from_equal_nodes_are_equal():
    node = {"_target_": "research.training.schedule.Constant"}
    assert build(node) == build(node) == Constant()


def test_freeze_and_thaw_are_inverse():
    node = {"b": {"x": (1, 2)}, "a": (1.5, None)}
    frozen = freeze({"b": {"x": [1, 2]}, "a": [1.5, None]})
    assert hash(frozen) == hash(freeze(node))
    assert thaw(frozen) == node
