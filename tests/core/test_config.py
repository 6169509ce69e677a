import enum

import hydra
import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

import research
from research.core import config, folder
from research.core.errors import ConfigError, ResearchError


def test_compose_gives_what_the_command_line_gives(conf):
    composed = config.compose(["experiment=good", "seed=4"], conf=conf)
    assert (composed.seed, composed.train.steps, list(composed.model.width)) == (4, 20, [64, 64])
    assert composed.name == "large_sgd"  # what only Hydra knows is written in
    assert "hydra" not in composed


def test_compose_works_again_and_inside_a_running_app(conf):
    with initialize_config_dir(conf, version_base="1.3"):
        assert config.compose(["model=large"], conf=conf).model.dropout == 0.5
        assert config.compose([], conf=conf).model.dropout == 0.2
        assert hydra.compose("train").model.dropout == 0.2  # the outer app still stands


def test_compose_refuses_a_typo(conf):
    with pytest.raises(ConfigError, match="did you mean 'large'"):
        config.compose(["model=larg"], conf=conf)


def test_the_package_offers_compose():
    assert research.compose is config.compose
    assert research.compose(["seed=3"]).seed == 3


def test_split_values_moves_numbers_out(conf):
    composed = config.compose(["train.values=[model.dropout,objective.label_smoothing]", "optimizer.learning_rate=1"], conf=conf)
    tree, hyper = config.split_values(composed)
    assert hyper == {"learning_rate": 1.0, "dropout": 0.2, "label_smoothing": 0.1}
    assert all(isinstance(value, float) for value in hyper.values())
    assert tree["optimizer"]["learning_rate"] is None
    assert tree["model"]["dropout"] is None
    assert tree["objective"]["module"] == tree["model"]  # the copy changes with it
    assert tree["objective"]["label_smoothing"] is None
    assert composed.model.dropout == 0.2  # the config itself stays


def test_split_values_of_a_saved_config_is_the_same(conf, tmp_path):
    composed = config.compose(["train.values=[model.dropout]"], conf=conf)
    config.save_config(composed, tmp_path / "config.yaml")
    assert config.split_values(config.read_config(tmp_path / "config.yaml")) == config.split_values(composed)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.values=[model.dropuot]"], r"lists 'model.dropuot', which is not in the config; did you mean 'model.dropout'\?"),
        (["train.values=[model.dropout,filled.dropout]", "filled.dropout=1"], "another path there ends in 'dropout' too"),
        (["train.values=[model.width]"], r"model.width=\[8, 8\]: must be a finite number, since train.values lists it"),
        (["train.values=[note]"], "note=None: must be a finite number, since"),
        (["train.values=[debug.nans]"], "debug.nans=False: must be a finite number"),
        (["optimizer.learning_rate=nan"], "optimizer.learning_rate=nan: must be a finite number"),
        (["optimizer.learning_rate=fast"], "optimizer.learning_rate='fast': must be a finite number"),
        (["optimizer.learning_rate=-0.1"], "optimizer.learning_rate=-0.1 is negative"),
    ],
)
def test_split_values_refuses(conf, overrides, message):
    with pytest.raises(ConfigError, match=message):
        config.split_values(config.compose(overrides, conf=conf))


def test_differences_are_listed_leaf_by_leaf(conf):
    old = config.compose([], conf=conf)
    new = config.compose(["model.width=[8,16]", "seed=1", "train.steps=99", "note=other", "+model.depth=2"], conf=conf)
    assert sorted(config.differences(old, new)) == [
        ("model.depth", None, 2),
        ("model.width.1", 8, 16),
        ("objective.module.depth", None, 2),
        ("objective.module.width.1", 8, 16),
        ("seed", 0, 1),
        ("train.steps", 10, 99),
    ]
    assert config.differences(old, old) == []


def test_data_may_move_but_not_change():
    old = {"data": {"root": "/a", "batch": 4}}
    assert config.differences(old, {"data": {"root": "/b", "batch": 4}}) == []
    assert config.differences(old, {"data": {"root": "/b", "batch": 8}}) == [("data.batch", 4, 8)]
    assert config.differences({"seed": {"a": 1}}, {"seed": 1}) == [("seed.a", 1, None), ("seed", None, 1)]
    assert config.differences({"seeds": 1}, {"seeds": 2}) == []  # another word with the same beginning


@pytest.mark.parametrize("name", ["HF_TOKEN", "api_key", "MY_SECRET", "DB_PASSWORD"])
def test_no_secret_is_saved(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("PLACE", "here")
    node = OmegaConf.create({"a": f"${{oc.env:{name}}}", "b": "${a}", "c": f"x-${{oc.env:{name}}}-y", "d": "${oc.env:PLACE}", "e": [{"f": "${c}"}]})
    config.save_config(node, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "s3cret" not in text
    loaded = config.read_config(tmp_path / "config.yaml")
    assert (loaded.a, loaded.b, loaded.c, loaded.d, loaded.e[0].f) == ("s3cret", "s3cret", "x-s3cret-y", "here", "x-s3cret-y")
    monkeypatch.delenv(name)
    assert config.read_config(tmp_path / "config.yaml").a is None  # the folder can be used without it


def test_a_computed_variable_counts_as_secret_and_a_default_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret")
    node = OmegaConf.create({"which": "TOKEN", "a": "${oc.env:${which}}", "b": "${oc.env:TOKEN,none}", "c": "${oc.env:NOWHERE,data}"})
    config.save_config(node, tmp_path / "config.yaml")
    assert "s3cret" not in (tmp_path / "config.yaml").read_text()
    monkeypatch.delenv("TOKEN")
    loaded = config.read_config(tmp_path / "config.yaml")
    assert (loaded.b, loaded.c) == ("none", "data")


def test_differences_show_no_secret(monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret")
    node = OmegaConf.create({"data": {"token": "${oc.env:TOKEN}"}})
    assert config.differences(node, node) == []
    ((path, old, new),) = config.differences(node, OmegaConf.create({"data": {"token": "typed"}}))
    assert (path, new) == ("data.token", "typed")
    assert "s3cret" not in old


def test_saved_floats_come_back(tmp_path):
    node = OmegaConf.create({"a": 1e-7, "b": "1e-7", "c": [1.0, None, "ü"], "d": True, "e": "true"})
    config.save_config(node, tmp_path / "c.yaml")
    assert config.read_config(tmp_path / "c.yaml") == node


def test_a_missing_interpolation_is_named_with_the_nearest(tmp_path):
    node = OmegaConf.create({"data": {"spec": {"classes": 3}}, "model": {"outputs": "${data.spec.clases}"}})
    with pytest.raises(ConfigError, match=r"model.outputs: Interpolation key 'data.spec.clases' not found; did you mean 'data.spec.classes'\?"):
        config.save_config(node, tmp_path / "c.yaml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not a config"),
        ("- 1", "holds no mapping"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: 1\na: 2", "duplicate key"),
        ("a: ${", "is not a config"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.yaml.*{message}") as caught:
        config.read_config(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


def test_a_config_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ResearchError, match=r"cannot read .*none\.yaml"):
        config.read_config(tmp_path / "none.yaml")


def test_the_real_experiments_are_a_group_in_notebooks_too():
    with initialize_config_dir(str(folder.conf()), version_base="1.3"):
        for path in folder.experiments().glob("*.yaml"):
            assert hydra.compose("train", [f"experiment={path.stem}"])


class Colour(enum.Enum):
    RED = 1


TEXTS = ("1e-3", "1_000", "nan", "true", "no", "y", "12", "a: b", "", "0x1f", "2026-11-27", "12:30:45", "~", "null", ".5", " lead", "#", "- a")
LONG = ("\N{GRINNING FACE}", "line\nline", "x " * 90 + "\n" + "y" * 200, "\x85", "'\"", "${not_closed", "tab\t")


def test_a_saved_config_reads_back_as_the_same_values(tmp_path):
    tree = {"texts": list(TEXTS + LONG[:-2]), "list": [1, 2.5e-7, None, True, [], {}], "inf": float("inf"), "small": 1e-05, "long": 10**20}
    config.save_config(OmegaConf.create(tree), tmp_path / "config.yaml")
    assert OmegaConf.to_container(config.read_config(tmp_path / "config.yaml")) == tree
    assert "'1e-3'" in (tmp_path / "config.yaml").read_text()


def test_paths_and_enumerations_are_saved_as_texts(tmp_path):
    config.save_config(OmegaConf.create({"path": tmp_path, "colour": Colour.RED}), tmp_path / "config.yaml")
    assert config.read_config(tmp_path / "config.yaml") == {"path": str(tmp_path), "colour": "RED"}


def test_what_only_data_can_tell_counts_as_it_is_written_and_a_missing_value_as_none():
    def of(a):
        return config.fingerprint(OmegaConf.create({"model": {"a": a}}))

    assert of("${data.spec.x}") == of("${data.spec.x}") != of("${data.spec.y}")
    assert of("???") == of(None) != of("?")
