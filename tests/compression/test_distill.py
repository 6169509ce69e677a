"""Students: their configs, where their parameters come from, and the whole way through the command line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from omegaconf import OmegaConf, open_dict

from research import Run
from research.compression.adapt import Adapt
from research.compression.distill import Distill, copied, student
from research.compression.distill import taught as taught_config
from research.compression.factorize import SVD
from research.core.build import build, freeze
from research.core.config import read_config
from research.core.errors import CheckpointError, ConfigError
from research.core.tree import count, paths, sha256
from research.train import train

ORIGIN = {"run": "runs/teacher", "step": 7, "weights": "ema", "sha256": "0" * 64}
QUIET = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none", "logger.sample=false")


@pytest.fixture(scope="module")
def taught(subject):
    """taught(teacher, {depth: 1}, **settings): the student of a subject."""

    def make(teacher, changes=None, **settings):
        return Distill(student=freeze(changes or {}), **settings)(dataclasses.replace(teacher, origin=ORIGIN))

    return make


def test_the_student_is_the_changed_model_under_the_objective(subject, taught):
    teacher = subject("mlp")
    made = taught(teacher, {"width": [4], "depth": 1}, temperature=4.0)
    assert {path: leaf.shape for path, leaf in paths(made.params).items()} == {
        "dense_0/kernel": (64, 4),
        "dense_0/bias": (4,),
        "head/kernel": (4, 5),
        "head/bias": (5,),
    }
    node = made.config["objective"]
    assert node["objective"]["module"] == made.config["model"] == {**teacher.config["model"], "width": [4], "depth": 1}
    assert node["teacher"] == teacher.config["objective"]
    assert node["temperature"] == 4.0
    assert made.config["teacher"] == {"run": "runs/teacher", "checkpoint": 7, "weights": "ema", "sha256": "0" * 64, "cache": False}
    assert made.objective.teacher == teacher.objective


@pytest.mark.parametrize("family", ["mlp", "cnn", "gpt"])
def test_a_student_of_the_same_form_has_parameters_of_its_own(family, subject, taught):
    teacher = subject(family)
    made, again, other = (taught(teacher, seed=seed) for seed in (0, 0, 1))
    assert jax.tree.structure(made.params) == jax.tree.structure(teacher.params)
    assert sha256(made.params) == sha256(again.params) != sha256(other.params)
    assert made.frozen == {"student": None, "teacher": None}
    shapes = jax.eval_shape(made.objective.init, jax.random.key(0), made.batches[0])
    assert jax.tree.structure(shapes) == jax.tree.structure((made.params, made.extra))


def test_a_student_of_another_family_takes_the_outputs_of_its_teacher(subject, taught):
    made = taught(subject("cnn"), {"_target_": "research.models.mlp.MLP", "width": 8, "depth": 1})
    assert made.config["model"] == {"_target_": "research.models.mlp.MLP", "outputs": 5, "dtype": "float32", "width": 8, "depth": 1}
    assert made.params["head"]["kernel"].shape == (8, 5)


def test_a_compressed_teacher_teaches_as_it_is_and_its_form_is_not_inherited(subject, taught):
    teacher = SVD(rank=2)(subject("cnn"))
    made = taught(teacher)
    assert made.objective.teacher == teacher.objective
    assert set(paths(made.params)) == set(paths(subject("cnn").params))
    assert count(made.params) > count(teacher.params)


def blocks(*numbers, start=0.0, width=3):
    return {f"block_{i}": {"mlp": {"kernel": np.full((2, width), start + i)}} for i in numbers}


def test_blocks_are_copied_as_told_and_all_else_where_it_fits():
    teacher = {"token": {"embedding": np.ones((5, 2))}, **blocks(0, 1, 2, 3)}
    fresh = {"token": {"embedding": np.zeros((5, 2))}, **blocks(0, 1, 2, start=-9.0)}
    made = copied(fresh, teacher, ((0, 1), (1, 3)))
    assert [made[f"block_{i}"]["mlp"]["kernel"][0, 0] for i in range(3)] == [1, 3, -7]
    assert made["token"]["embedding"].all()
    by_number = copied(fresh, teacher)
    assert [by_number[f"block_{i}"]["mlp"]["kernel"][0, 0] for i in range(3)] == [0, 1, 2]


def test_blocks_that_cannot_be_copied_are_named():
    with pytest.raises(ConfigError, match=r"method\.blocks: the teacher has no block_5"):
        copied(blocks(0), blocks(0, 1), ((0, 5),))
    with pytest.raises(ConfigError, match=r"method\.copy=true: no parameter of the student has the path and shape"):
        copied(blocks(0), blocks(0, width=4))


def test_what_has_another_shape_is_drawn_anew(subject, taught):
    teacher = subject("mlp")
    made, fresh = (taught(teacher, {"width": [16, 8]}, copy=copy) for copy in (True, False))
    np.testing.assert_array_equal(made.params["dense_0"]["kernel"], teacher.params["dense_0"]["kernel"])
    np.testing.assert_array_equal(made.params["dense_1"]["kernel"], fresh.params["dense_1"]["kernel"])


def test_the_student_alone_is_a_plain_run(subject, taught, outputs):
    teacher = subject("mlp")
    made = taught(teacher, {"width": [6, 6]}, hidden=1.0, hidden_layers=(("hidden_0", "hidden_0"),))
    assert made.params["projections"]["0"]["kernel"].shape == (6, 16)
    config, params, frozen = student(made.config, made.params, made.frozen)
    plain = made.replace(config=config, params=params, frozen=frozen)
    assert plain.config["objective"] == {**teacher.config["objective"], "module": made.config["model"]}
    assert plain.config["train"] == teacher.config["train"]
    assert set(plain.params) == {"dense_0", "dense_1", "head"}
    assert frozen is None
    np.testing.assert_array_equal(outputs(plain), outputs(made))
    for untouched in (teacher, Adapt(rank=2)(teacher)):
        config, params, frozen = student(untouched.config, untouched.params, untouched.frozen)
        assert config == untouched.config
        assert params is untouched.params
        assert frozen is untouched.frozen


def test_values_of_the_program_keep_their_meaning(subject, taught):
    teacher = subject("mlp", "train.values=[optimizer.learning_rate,objective.label_smoothing,model.dropout]")
    made = taught(teacher)
    assert made.config["train"]["values"] == ["optimizer.learning_rate", "objective.objective.label_smoothing", "model.dropout"]
    assert made.objective.objective.label_smoothing is None
    assert made.objective.objective.module.dropout is None


def test_a_compressed_run_recovers_under_its_parent(subject):
    whole = subject("mlp")
    small = SVD(rank=2)(whole)
    config = taught_config(small.config, whole.config["objective"], ORIGIN, {"hard": 0.0, "soft": 1.0})
    recovering = small.replace(config=config, frozen={"student": small.frozen, "teacher": None})
    frozen = recovering.objective.taught(recovering.frozen, whole.params, whole.extra, None, {})

    @jax.jit
    def loss(params, batch):
        tally, _ = recovering.objective(params, small.extra, frozen, batch, None, small.hyper, train=True)
        return tally.terms["soft"]

    before, slope = jax.value_and_grad(loss)(small.params, small.batches[0])
    after = loss(jax.tree.map(lambda x, d: x - 1e-3 * d, small.params, slope), small.batches[0])
    assert after < before
    assert student(recovering.config, small.params, recovering.frozen)[0]["objective"] == small.config["objective"]


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"widht": 4}, {}, r"method\.student\.widht: MLP takes no 'widht'; did you mean 'width'"),
        ({}, {"temperature": -1.0}, r"objective: temperature=-1\.0 must be above 0"),
        ({}, {"hidden": 1.0, "hidden_layers": (("hidden_0", "hiden_1"),)}, "'hiden_1' is no tap of the teacher; did you mean 'hidden_1'"),
        ({}, {"blocks": ((0, 0),)}, r"method\.blocks=\[\[0, 0\]\]: blocks are copied with copy=true alone"),
        ({"width": [1, 1, 1], "depth": 3}, {"copy": True, "blocks": ()}, None),
    ],
)
def test_bad_settings_are_refused(changes, settings, message, subject, taught):
    if message is None:
        assert taught(subject("mlp"), changes, **settings).params["head"]["bias"].shape == (5,)  # the head's bias alone fits
        return
    with pytest.raises(ConfigError, match=message):
        taught(subject("mlp"), changes, **settings)


def test_the_config_file_builds_the_method(request):
    node = read_config(request.config.rootpath / "conf" / "method" / "distill.yaml")
    node.student = {"width": [4], "depth": 1}
    assert build(node, where="method") == Distill(student=(("depth", 1), ("width", (4,))))


@pytest.fixture(scope="module")
def distilled(command, parent, tmp_path_factory):
    """distilled("live", cache): the folder of a student that the command makes."""
    folder = tmp_path_factory.mktemp("students")

    def make(name, cache):
        told = command(
            *("compress", f"run={parent('mlp')}", f"run_dir={folder / name}", "method=distill", "method.student={width:8}", "method.soft=1.0"),
            *(f"method.cache={cache}", "calibration.examples=32", "calibration.batch=16", "ledger.latency=false", "ledger.figures=false"),
            *("finetune.steps=20", "finetune.learning_rate=0.01"),
        )
        assert told.code == 0, told.err
        return folder / name

    return make


@pytest.fixture(scope="module")
def live(distilled):
    """The folder of a student whose teacher runs at each step."""
    return distilled("live", "false")


def column(folder, name):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def test_a_student_learns_from_its_teacher_and_is_a_run(live, parent, command):
    soft = column(live, "train/soft")
    assert soft[-1] < 0.8 * soft[0]
    small, teacher = Run(live), Run(parent("mlp"))
    assert small.config.teacher.sha256 == small.config.compression[-1].parent.sha256
    assert small.frozen() == {"student": None, "teacher": None}
    assert not (live / "checkpoints" / "frozen").exists()  # a link, no copy
    assert count(small.state().params) < count(teacher.state().params)
    assert command("evaluate", f"run={live}", "figures=false").code == 0


def test_cached_answers_teach_the_same(live, distilled):
    cached = distilled("cached", "true")
    np.testing.assert_allclose(column(cached, "train/soft"), column(live, "train/soft"), rtol=1e-4)
    arrays = (Run(folder).state("latest").params for folder in (live, cached))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *arrays)


@pytest.fixture
def trained(live, tmp_path):
    """trained("name", steps=…, stop_at=…, run=…): the result of a student's config trained from its first step, its link to the teacher changed."""

    def call(name="again", steps=4, stop_at=None, **teacher):
        config = read_config(live / "config.yaml")
        with open_dict(config):
            config.run_dir, config.train.steps, config.train.stop_at = str(tmp_path / name), steps, stop_at
            config.teacher = OmegaConf.merge(config.teacher, teacher)
        return train(config)

    return call


def test_an_interrupted_student_goes_on_bit_for_bit(trained):
    straight = trained("straight")
    assert trained("stopped", stop_at=2)["step"] == 2
    assert trained("stopped")["state_sha256"] == straight["state_sha256"]


def test_a_teacher_whose_weights_have_changed_is_refused(trained):
    with pytest.raises(CheckpointError, match=r"holds other weights than teacher\.sha256 says: .*… there, 123… here"):
        trained(sha256="123")


def test_a_teacher_with_other_outputs_is_refused(trained, command, tmp_path):
    told = command("train", "experiment=mlp_regression", "train.epochs=10", *QUIET, f"run_dir={tmp_path / 'other'}")
    assert told.code == 0, told.err
    with pytest.raises(ConfigError, match=r"other' has other outputs: classes=None there, classes=10 in this run's data"):
        trained(run=str(tmp_path / "other"), sha256=None)


def test_a_missing_teacher_is_told(trained):
    with pytest.raises(ConfigError, match=r"teacher\.run=null: distillation needs the run of a teacher"):
        trained(run=None)


def test_an_objective_that_learns_from_nobody_refuses_a_teacher(parent, command, tmp_path):
    told = command(
        "train", "experiment=digits_mlp", "train.chunk=1", f"teacher.run={parent('mlp')}", "train.steps=1", *QUIET, f"run_dir={tmp_path / 'x'}"
    )
    assert told.code == 2
    assert "Classify learns from no teacher; a student is made by research.compress" in told.err[-1]
