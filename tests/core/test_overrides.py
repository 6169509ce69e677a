import re

import pytest
from omegaconf import OmegaConf

from research.core.errors import ConfigError
from research.core.overrides import Composer, draw


def check(conf, *overrides, verb="train", **options):
    return Composer(verb, conf).check(overrides, **options)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle=large", r"'modle=large': train has no key 'modle'; did you mean 'model'\?"),
        ("+modle=large", r"'\+modle=large': train has no key 'modle'; did you mean 'model'\?"),
        ("++modle=large", r"did you mean 'model'\?"),
        ("~modle", r"'~modle': train has no key 'modle'; did you mean 'model'\?"),
        ("model=larg", r"there is no model 'larg'; did you mean 'large'\?"),
        ("model@other=large", r"train has no group 'model@other'; did you mean 'model'\?"),
        ("+model=large", "model is chosen without a plus, as model=NAME"),
        ("experiment=goood", r"there is no experiment 'goood'; did you mean 'good'\?"),
        ("+experiment=goood", "experiment is chosen without a plus"),
        ("train.step=3", r"train has no key 'train.step'; did you mean 'train.steps'\?"),
        ("learning_rate=3", r"did you mean 'optimizer.learning_rate'\?"),
        ("+seeed=3", r"did you mean 'seed'\?"),
        ("+xyzzy=3", "choose from: cache, debug, filled, model"),
        ("note.text=3", "train has no key 'note.text'"),
        ("seed", "is not KEY=VALUE"),
        ("=3", "names no key"),
        ("seed=[1,2", "is not KEY=VALUE"),
        ("seed=1,2", "lists several values: add -m"),
        ("model=choice(small,large)", "lists several values: add -m"),
        ("experiment=stray", r"experiment 'stray' sets 'sede', which train does not have; did you mean 'seed'\?"),
        ("experiment=lost", r"experiment=lost: .*'model/larg'; did you mean 'large'\?"),
        ("experiment=wrong", "experiment=wrong: .*defaults must be a list"),
        ("experiment=broken", r"broken\.yaml, line 3: expected"),
    ],
)
def test_what_names_nothing_is_refused_with_the_nearest(conf, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(conf, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sweep", ["model=small,larg", "model=choice(small,larg)", "experiment=good,larg"])
def test_each_value_of_a_sweep_is_checked(conf, sweep):
    with pytest.raises(ConfigError, match=r"there is no .* 'larg'"):
        check(conf, "seed=1,2", sweep, multirun=True)


def test_an_experiment_within_a_sweep_is_checked_too(conf):
    with pytest.raises(ConfigError, match="experiment 'stray' sets 'sede'"):
        check(conf, "experiment=good,stray", multirun=True)


def test_sweeps_of_right_values_pass_unchanged(conf):
    sweep = ["model=small,large", "seed=range(0,100)", "optimizer.learning_rate=interval(0,1)", "experiment=good", "hydra/sweeper=search"]
    assert check(conf, *sweep, multirun=True) == sweep


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("seed=range(5,1)", "holds no value: range(START,STOP) needs START below STOP"),
        ("model=glob(zz*)", "holds no value: no option of model has such a name"),
        ("optimizer.learning_rate=interval(0,1)", "add hydra/sweeper=search"),
    ],
)
def test_a_sweep_without_an_end_or_a_value_is_refused(conf, written, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        check(conf, written, multirun=True)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("seed=3", "seed=3"),
        ("model=large", "model=large"),
        ("model={width:3}", "model={width:3}"),
        ("debug=true", "debug.traceback=true"),
        ("filled.a.b=1", "++filled.a.b=1"),
        ("+filled.a=1", "++filled.a=1"),
        ("+model.activation=relu", "+model.activation=relu"),  # an argument that the file leaves at its default
        ("~note", "~note"),
        ("hydra.verbose=true", "hydra.verbose=true"),
        ("experiment=null", "~experiment"),
    ],
)
def test_overrides_as_hydra_reads_them(conf, written, read):
    assert check(conf, written) == [read]


@pytest.mark.parametrize("text", ["/tmp/a b/ü", "What's up?", "a=b", "x(1)", "tab\tand\nline", 'say "hi"', "100%!", "back\\slash's"])
def test_plain_text_needs_no_quotes(conf, text):
    composer = Composer("train", conf)
    assert composer.load(composer.check([f"name={text}"])).name == text


@pytest.mark.parametrize(
    ("written", "text"),
    [("To be, or not", "To be, or not"), ("42", "42"), ("'quoted'", "quoted"), ('"Hi," she said', '"Hi," she said'), ("null", None), ("", "")],
)
def test_a_prompt_is_taken_literally(conf, written, text):
    composer = Composer("train", conf)
    assert composer.load(composer.check([f"prompt={written}"])).prompt == text


def test_a_group_of_another_verb_is_refused(conf):
    with pytest.raises(ConfigError, match="'model=small': evaluate has no group 'model'; choose from: debug"):
        check(conf, "run=x", "model=small", verb="evaluate")


def test_another_folder_is_searched_too(conf, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: research.models.mlp.MLP\nwidth: 3\n")
    with pytest.raises(ConfigError, match="there is no model 'mine'"):
        check(conf, "model=mine")
    composer = Composer("train", conf, str(tmp_path))
    assert composer.load(composer.check(["model=mine", "model.width=4"])).model.width == 4


def test_an_unknown_verb_is_named(conf):
    with pytest.raises(ConfigError, match="Cannot find primary config 'trian'"):
        check(conf, verb="trian")


def test_the_real_verbs_compose_and_every_option_exists():
    for verb in ("train", "evaluate", "predict"):
        composer = Composer(verb)
        assert composer.check([]) == []
        assert OmegaConf.is_config(composer.load())


def test_a_lot_is_the_same_for_the_same_seed_and_name():
    choices = [[8], [16], [32]]
    found = [(tuple(draw(seed, "width", choices)), tuple(draw(seed, "depth", choices))) for seed in range(60)]
    assert len(set(found)) == 9  # the two are drawn each by itself
    composer = Composer("train")
    model = composer.load(composer.check(["model=mlp", "seed=7", "model.width=${draw:${seed},width,[[8],[16],[32]]}"])).model
    assert tuple(model.width) == found[7][0]
    with pytest.raises(ValueError, match="draw: width has no choice"):
        draw(0, "width", [])
