"""Train, evaluate and predict as a person calls them: the real configs shrunk, from the command line to the files of the run folder."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from research import Run, compose
from research.core.config import read_config
from research.core.tree import sha256
from research.data.dataset import open_data
from research.training.loop import Loop

RESULT = {"status", "reason", "experiment", "step", "params", "metrics", "best", "expect", "compile_s", "train_s", "steps_per_s", "examples_per_s"}
RESULT |= {"tokens_per_s", "peak_bytes", "device", "params_sha256", "state_sha256"}
ENVIRONMENT = {"time", "command", "python", "platform", "host", "cpus", "devices", "versions", "commit"}
SHORT = ("train.steps=20", "train.eval_every=10", "train.save_every=10", "train.log_every=5")
QUIET = ("logger.figures=false", "logger.tensorboard=false")
MLP = ("model.width=8", "model.depth=1")
GPT = (
    "experiment=quickstart",
    "data.time=16",
    "data.batch=4",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "model.hidden=16",
    "schedule.warmup=2",
)
FAMILIES = {
    "mlp": ("experiment=digits_mlp", "train.chunk=1", *MLP),
    "cnn": ("experiment=digits_cnn", "model.channels=[4,4,8]", "model.hidden=[8]", "train.epochs=null"),
    "regression": (
        "experiment=mlp_regression",
        "train.chunk=1",
        "data.validation=20",
        "data.test=20",
        "train.epochs=null",
        "train.monitor=validation/loss",
    ),
    "gpt": GPT,
}


def read(path):
    return json.loads(path.read_text())


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def column(folder, name):
    return {record["step"]: record[name] for record in records(folder) if name in record}


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """trained(family): (run folder, what the command told); each is trained once."""
    held = {}

    def make(family):
        if family not in held:
            folder = tmp_path_factory.mktemp("runs") / family
            held[family] = folder, command("train", *FAMILIES[family], *SHORT, f"run_dir={folder}")
        return held[family]

    return make


@pytest.fixture
def train(command, tmp_path):
    """train("seed=1"): a short quiet MLP run in tmp_path/run, found to exit 0; returns the folder."""

    def call(*argv, code=0, folder=tmp_path / "run"):
        told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}", *argv)
        assert told.code == code, told.err
        return folder

    return call


@pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.slow) if family == "cnn" else family for family in FAMILIES])
def test_a_run_leaves_a_complete_folder(trained, family):
    folder, told = trained(family)
    assert told.code == 0, told.err
    result = read(folder / "result.json")
    assert set(result) >= RESULT
    assert (result["status"], result["step"], result["reason"]) == ("finished", 20, None)
    assert result["best"]["metric"] == "validation/loss"
    assert all(result[name] > 0 for name in ("params", "train_s", "steps_per_s", "examples_per_s", "peak_bytes"))
    assert result["compile_s"] >= 0  # 0 where another test of this process has compiled the same program
    assert (result["tokens_per_s"] is not None) == (family == "gpt")
    assert all(math.isfinite(value) for value in result["metrics"].values())
    run = Run(folder)
    assert result["state_sha256"] == sha256(run.state("latest")) == read(folder / "checkpoints" / "20" / "manifest.json")["state_sha256"]
    assert result["params_sha256"] == sha256(run.state("latest").params)
    assert {10, 20} == {int(path.name) for path in (folder / "checkpoints").iterdir()}
    (launch,) = read(folder / "environment.json")
    assert set(launch) >= ENVIRONMENT
    assert list(column(folder, "train/loss")) == [5, 10, 15, 20]
    assert list(column(folder, "validation/loss")) == [10, 20]
    assert all({"step", "time_s"} < set(record) for record in records(folder))
    assert "${" not in (folder / "config.yaml").read_text()
    assert run.config.data.spec.examples.train > 0
    assert (folder / "data" / "spec.json").exists()
    (events,) = folder.glob("events.out.tfevents.*")
    assert events.stat().st_size > 1000
    assert (folder / "figures" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert ((folder / "data" / "tokenizer.json").exists(), (folder / "samples" / "20.txt").exists()) == (family == "gpt", family == "gpt")
    assert "20 at step" not in told.out
    assert f"research.evaluate run={folder}" in told.out


@pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.slow) if family == "cnn" else family for family in FAMILIES])
def test_evaluate_agrees_with_the_end_of_training(trained, command, family):
    folder, _ = trained(family)
    split = "validation" if family == "gpt" else "test"
    told = command("evaluate", f"run={folder}", "data.batch=7")
    assert told.code == 0, told.err
    report, result = read(folder / "evaluation.json"), read(folder / "result.json")
    assert report["split"] == split
    assert report["metrics"] == pytest.approx({name: value for name, value in result["metrics"].items() if name.startswith(split)}, rel=1e-5)
    assert ("classification" in report, "regression" in report) == (family in ("mlp", "cnn"), family == "regression")
    if "classification" in report:
        matrix = np.array(report["classification"]["confusion_matrix"])
        assert matrix.sum() == report["examples"] == 360
        assert matrix.trace() / 360 == pytest.approx(report["metrics"]["test/accuracy"])
        assert {"test_confusion_matrix", "test_calibration", "test_per_class"} <= set(Run(folder).figures)
    assert f"{split}/loss" in told.out
    assert (folder / "evaluation.json").as_posix() in told.out


def test_evaluate_takes_another_split_and_checkpoint(trained, command):
    folder, _ = trained("mlp")
    for split, examples in (("train", 1257), ("validation", 180)):
        assert command("evaluate", f"run={folder}", f"data.split={split}", "checkpoint=10", "figures=false").code == 0
        report = read(folder / "evaluation.json")
        assert (report["split"], report["examples"], report["checkpoint"]) == (split, examples, 10)
    assert report["metrics"]["validation/loss"] == pytest.approx(column(folder, "validation/loss")[10], rel=1e-5)


def test_evaluate_reads_every_token_of_the_part_that_was_trained_on(trained, command):
    folder, _ = trained("gpt")
    run = Run(folder)
    windows = open_data(run.config.data, run.preprocessor).split("train").whole
    told = command("evaluate", f"run={folder}", "data.split=train", "figures=false")
    assert told.code == 0, told.err
    report = read(folder / "evaluation.json")
    assert report["examples"] == len(windows) == math.ceil((len(windows.tokens) - 1) / 16)
    some = windows.take(np.arange(0, len(windows), 29))  # windows from all over the text
    logits = run.predict(some)["logits"]
    picked = np.take_along_axis(logits, some["target"][..., None], 2)[..., 0]
    loss = (np.log(np.exp(logits).sum(-1)) - picked)[some["mask"]].mean()
    assert report["metrics"]["train/loss"] == pytest.approx(loss, rel=0.02)


@pytest.mark.slow
def test_evaluate_judges_a_text_with_unknown_characters_as_training_did(command, tmp_path):
    text = "the quick brown fox jumps over the lazy dog. " * 40
    (tmp_path / "text.txt").write_text(text + "é?" * 100)  # é, two bytes, is read as ?, one byte
    argv = (*GPT, *SHORT, *QUIET, "data=text", f"data.path={tmp_path / 'text.txt'}", 'data.unknown="?"', "data.time=16", "data.batch=4")
    told = command("train", *argv, "logger.sample=false", f"run_dir={tmp_path / 'run'}")
    assert told.code == 0, told.err
    assert command("evaluate", f"run={tmp_path / 'run'}").code == 0
    told = read(tmp_path / "run" / "evaluation.json")
    assert told["metrics"] == pytest.approx(read(tmp_path / "run" / "result.json")["metrics"], rel=1e-6)
    assert told["data"] == {"_target_": "research.data.text.text", "path": str(tmp_path / "text.txt")}
    other = ("data=text", f"data.path={tmp_path / 'text.txt'}", "data.time=8")
    assert "the run was trained with 16" in command("evaluate", f"run={tmp_path / 'run'}", *other).out


def test_evaluate_takes_another_data_set_of_the_same_shape(trained, command):
    folder, _ = trained("mlp")
    assert command("evaluate", f"run={folder}", "data=digits", "data.seed=7", "data.test=0.5", "figures=false").code == 0
    assert read(folder / "evaluation.json")["examples"] == 899


def test_predict_classifies_an_array_of_images(trained, command, tmp_path):
    folder, _ = trained("mlp")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", image=pixels)
    told = command("predict", f"run={folder}", f"input={tmp_path / 'images.npz'}", "batch=2", "top=3", f"out={tmp_path / 'out'}")
    assert told.code == 0, told.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    run = Run(folder)
    logits = run.predict({**run.preprocessor({"image": pixels[..., None]}), "mask": np.ones(5, bool)})["logits"]
    assert [row["class"] for row in rows] == [str(i) for i in logits.argmax(1)]
    assert all(len(row["top"]) == 3 and row["probability"] == row["top"][0]["probability"] for row in rows)
    assert "row 4" in told.out


def test_predict_gives_a_regression_back_in_the_units_of_its_table(train, command, tmp_path):
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 2)) * 100
    rows = [f"{a},{b},{3 * a - b + 1000}" for a, b in x]
    (tmp_path / "table.csv").write_text("\n".join(["left,right,sum", *rows]))
    argv = ("data=table", f"data.path={tmp_path / 'table.csv'}", "data.test=10", "data.batch=16", "objective=regress", "optimizer.learning_rate=0.05")
    folder = train(*argv, "train.steps=200", "train.eval_every=100")
    assert command("evaluate", f"run={folder}").code == 0
    report = read(folder / "evaluation.json")
    assert report["regression"]["r2"] > 0.95
    (tmp_path / "new.csv").write_text("right,other,left\n10,x,20\n")  # columns are found by name
    assert command("predict", f"run={folder}", f"input={tmp_path / 'new.csv'}").code == 0
    row = read(folder / "predictions.jsonl")
    assert row["input"] == "line 2"
    assert row["value"][0] == pytest.approx(1050, abs=150)


def test_predict_classes_of_a_table_by_their_names(train, command, tmp_path):
    random = np.random.default_rng(0)
    rows = [f'{{"x": [{a}, {b}], "kind": "{"warm" if a > b else "cold"}"}}' for a, b in random.normal(size=(80, 2))]
    (tmp_path / "table.jsonl").write_text("\n".join(rows))
    argv = (
        "data=table",
        f"data.path={tmp_path / 'table.jsonl'}",
        "data.task=classes",
        "data.test=0.2",
        "data.batch=16",
        "optimizer.learning_rate=0.05",
    )
    folder = train(*argv, "train.steps=100", "train.eval_every=50")
    assert read(folder / "result.json")["metrics"]["test/accuracy"] > 0.8
    (tmp_path / "new.jsonl").write_text('{"x": [9, -9]}\n{"x": [-9, 9]}\n')
    assert command("predict", f"run={folder}", f"input={tmp_path / 'new.jsonl'}").code == 0
    assert [json.loads(line)["class"] for line in (folder / "predictions.jsonl").read_text().splitlines()] == ["warm", "cold"]


def test_predict_writes_text(trained, command):
    folder, _ = trained("gpt")
    argv = (f"run={folder}", "prompt=The , of", "tokens=20", "seed=3", "temperature=1.0", "top_k=20", "top_p=0.95")
    told = command("predict", *argv, "samples=2")
    assert told.code == 0, told.err
    first, second = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert first["prompt"] == "The , of"
    assert len(first["text"]) == len(second["text"]) == 20
    assert first["text"] != second["text"]
    assert "The , of" + first["text"] in told.out
    assert command("predict", *argv).code == 0
    assert read(folder / "predictions.jsonl")["text"] == first["text"]
    assert Run(folder).generate("The , of", tokens=20, seed=3, temperature=1.0, top_k=20, top_p=0.95) == "The , of" + first["text"]


def test_the_same_command_again_has_nothing_to_do(trained, command, snapshot):
    folder, _ = trained("cnn")
    before = snapshot(folder)
    told = command("train", *FAMILIES["cnn"], *SHORT, f"run_dir={folder}")
    assert (told.code, told.err) == (0, [])
    assert "nothing to do" in told.out
    assert snapshot(folder) == before


def test_resume_never_refuses_a_folder_that_is_in_use(train, snapshot):
    folder = train("resume=never")
    before = snapshot(folder)
    train("resume=never", code=2)
    assert snapshot(folder) == before


def test_another_config_is_refused_with_the_keys_that_differ(train, command, snapshot):
    folder = train()
    before = snapshot(folder)
    told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}", "optimizer.learning_rate=0.5", "model.width=9", "seed=3", "train.log_every=2")
    assert (told.code, len(told.err)) == (2, 1)
    for text in ("model.width: 8 there, 9 here", "optimizer.learning_rate: 0.001 there, 0.5 here", "seed: 0 there, 3 here", "resume=fork"):
        assert text in told.err[0]
    assert "log_every" not in told.err[0]
    assert "objective" not in told.err[0]
    assert snapshot(folder) == before


def test_other_data_under_the_same_name_is_refused(train, command, tmp_path, snapshot):
    path = tmp_path / "table.csv"
    rows = ["x,y", *(f"{i},{i * i}" for i in range(50))]
    path.write_text("\n".join(rows))
    argv = ("data=table", f"data.path={path}", "data.batch=16", "objective=regress")
    folder = train(*argv, "train.stop_at=10")
    before = snapshot(folder)
    path.write_text("\n".join([*rows, "50,2500"]))
    told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}", *argv)
    assert told.code != 0
    assert "data.spec.examples.validation=5 is declared, but the opened data has validation=6" in told.err[-1]
    assert snapshot(folder) == before


def test_what_is_not_compared_may_change(train):
    folder = train("train.stop_at=10")
    assert read(folder / "result.json")["status"] == "interrupted"
    assert read(folder / "result.json")["reason"] == "train.stop_at=10"
    train("train.log_every=2", "train.eval_every=4")
    assert len(read(folder / "environment.json")) == 2
    assert list(column(folder, "train/loss")) == [5, 10, 12, 14, 16, 18, 20]
    assert read_config(folder / "config.yaml").train.log_every == 2
    assert read(folder / "result.json")["status"] == "finished"


def test_a_longer_run_goes_on_where_the_history_is_the_same(train, tmp_path):
    folder, whole = train(), tmp_path / "whole"
    train("train.steps=40")
    assert read(folder / "result.json")["step"] == 40
    train("train.steps=40", folder=whole)
    assert read(folder / "result.json")["state_sha256"] == read(whole / "result.json")["state_sha256"]


def test_a_longer_run_under_cosine_is_refused_with_what_to_do(train, command, snapshot):
    folder = train("schedule=cosine")
    before = snapshot(folder)
    told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}", "schedule=cosine", "train.steps=40")
    assert told.code == 2
    for text in ("train.steps=40", "begun for 20 steps", "Cosine", "resume=fork", "checkpoint=STEP"):
        assert text in told.err[-1]
    assert snapshot(folder) == before
    told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}", "schedule=cosine", "train.steps=10")
    assert told.code == 2
    assert "train.steps=10: this run is at step 20 already" in told.err[-1]
    assert snapshot(folder) == before


def forks(folder):
    return sorted(folder.parent.glob(f"{folder.name}-fork-*"))


@pytest.mark.parametrize(
    "changes",
    [
        ("seed=5",),
        *(pytest.param((f"optimizer={name}",), marks=pytest.mark.slow) for name in ("rmsprop", "adam")),
        ("train.ema=0.9", "train.clip=1.0"),
        ("optimizer.learning_rate=0.002",),
    ],
    ids=["seed", "rmsprop", "adam", "ema", "rate"],
)
def test_a_fork_goes_on_from_its_parent_in_a_new_folder(train, snapshot, changes):
    folder = train()
    before = snapshot(folder)
    train("resume=fork", "train.steps=40", *changes)
    assert snapshot(folder) == before
    (fork,) = forks(folder)
    (launch,) = read(fork / "environment.json")
    assert launch["parent"] == {"run": str(folder), "result": read(folder / "result.json")["state_sha256"]}
    assert list(column(fork, "train/loss")) == [25, 30, 35, 40]
    assert read(fork / "result.json")["step"] == 40
    assert column(fork, "validation/loss")[30] < column(folder, "validation/loss")[10]  # it did not start anew


@pytest.mark.slow
def test_a_fork_may_start_before_the_decay(train, snapshot):
    wsd = ("schedule=warmup_stable_decay", "schedule.decay=10", "train.keep=all", "train.eval_every=5")
    folder = train(*wsd)
    before = snapshot(folder)
    train(*wsd, "resume=fork", "checkpoint=10", "train.steps=30")
    assert snapshot(folder) == before
    (fork,) = forks(folder)
    assert list(column(fork, "train/loss")) == [15, 20, 25, 30]
    rates = column(fork, "learning_rate")
    assert rates[20] == column(folder, "learning_rate")[10] > rates[25] > rates[30]


def test_checkpoints_without_a_config_are_nobodys(train, command):
    folder = train("train.stop_at=10")
    (folder / "config.yaml").unlink()
    told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}")
    assert (told.code, "holds checkpoints but no config.yaml" in told.err[-1]) == (2, True)
    assert (folder / "checkpoints" / "10").exists()


def test_a_resumed_run_has_no_result_until_it_ends(train, monkeypatch):
    folder, loop = train(), Loop.run
    seen = []

    def run(self, *state):
        seen.append(Run(folder).result)
        return loop(self, *state)

    monkeypatch.setattr(Loop, "run", run)
    train("train.steps=40")
    assert seen == [{}]


def test_another_monitor_has_another_best(train):
    folder = train("train.steps=60", "train.stop_at=20")
    assert read(folder / "result.json")["best"]["metric"] == "validation/loss"
    train("train.steps=60", "train.monitor=validation/accuracy", "train.mode=max", "train.patience=9")
    best = read(folder / "result.json")["best"]
    assert (best["metric"], best["value"]) == ("validation/accuracy", max(list(column(folder, "validation/accuracy").values())[2:]))


def test_a_fork_can_be_resumed_like_any_run(train, tmp_path):
    folder = train("train.steps=10")
    train("resume=fork", "train.steps=40", "optimizer=adam", "train.stop_at=11")
    (fork,) = forks(folder)
    assert {10, 11} == {int(path.name) for path in (fork / "checkpoints").iterdir()}
    train("train.steps=40", "optimizer=adam", folder=fork)
    train("resume=fork", "train.steps=40", "optimizer=adam")
    (other,) = set(forks(folder)) - {fork}
    assert read(fork / "result.json")["state_sha256"] == read(other / "result.json")["state_sha256"]


def test_a_fork_with_another_model_names_the_leaves(train, command, snapshot):
    folder = train()
    before = snapshot(folder)
    told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}", "resume=fork", "train.steps=40", "model.width=9")
    assert told.code == 4
    assert "dense_0/bias is (8,) float32 there, (9,) float32 here" in told.err[-1]
    assert snapshot(folder) == before
    assert not forks(folder)


@pytest.mark.parametrize(
    ("argv", "text"), [(("train.steps=20",), "is at step 20 already; give more steps"), (("run_dir=null",), "needs run_dir=PATH")]
)
def test_a_fork_that_cannot_be_is_refused(train, command, argv, text):
    folder = train()
    told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}", "resume=fork", *argv)
    assert told.code == 2
    assert text in told.err[-1]


def test_patience_ends_a_run_early_for_good(train, command):
    folder = train("train.steps=100", "train.patience=2", "train.minimum_delta=100")
    result = read(folder / "result.json")
    assert (result["status"], result["step"], result["best"]["step"]) == ("stopped_early", 30, 10)
    assert result["reason"] == "validation/loss did not improve in 2 evaluations"
    assert result["metrics"]["validation/loss"] == pytest.approx(column(folder, "validation/loss")[10])
    told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}", "train.steps=100", "train.patience=2", "train.minimum_delta=100")
    assert (told.code, "nothing to do" in told.out) == (0, True)


def test_the_monitor_may_be_a_score_that_grows(train):
    folder = train("train.monitor=validation/accuracy", "train.mode=max")
    best = read(folder / "result.json")["best"]
    assert best["value"] == max(column(folder, "validation/accuracy").values())


def test_without_a_validation_split_the_training_loss_is_watched(train, command):
    folder = train("data.validation=0", "train.log_every=10")
    losses = column(folder, "train/loss")
    assert read(folder / "result.json")["best"] == {"metric": "train/loss", "value": losses[20], "step": 20}
    assert losses[20] < losses[10]
    assert set(read(folder / "result.json")["metrics"]) == {"test/loss", "test/accuracy"}


def test_epochs_and_evaluation_by_epoch(train):
    folder = train("train.steps=null", "train.epochs=2", "train.eval_every=epoch")
    assert read(folder / "result.json")["step"] == 40  # 1,257 examples in batches of 64
    assert list(column(folder, "validation/loss")) == [20, 40]
    train("train.steps=null", "train.epochs=2", "train.eval_every=epoch")
    assert len(read(folder / "environment.json")) == 1


def test_gradient_descent_means_the_whole_split(train):
    folder = train("optimizer=gradient_descent", "train.steps=3", "train.log_every=1")
    assert read_config(folder / "config.yaml").data.batch == "all"
    result = read(folder / "result.json")
    assert result["examples_per_s"] / result["steps_per_s"] == pytest.approx(1257)
    losses = list(column(folder, "train/loss").values())
    assert losses == sorted(losses, reverse=True)


def test_the_whole_split_may_be_cut_into_microbatches(train, tmp_path):
    """1,257 rows, an odd number: one more is added whose mask is False."""
    argv = ("optimizer=gradient_descent", "train.steps=3", "train.log_every=1")
    one, two = (train(*argv, f"train.accumulate={n}", folder=tmp_path / str(n)) for n in (1, 2))
    assert column(two, "train/loss") == pytest.approx(column(one, "train/loss"), rel=1e-6)


def test_a_running_average_is_what_evaluate_uses(train, command):
    folder = train("train.ema=0.9")
    scores = {}
    for weights in ("raw", "ema", "auto"):
        assert command("evaluate", f"run={folder}", f"weights={weights}", "checkpoint=latest", "figures=false", "data.split=validation").code == 0
        scores[weights] = read(folder / "evaluation.json")["metrics"]["validation/loss"]
    assert scores["auto"] == scores["ema"] != scores["raw"]
    assert scores["ema"] == pytest.approx(column(folder, "validation/loss")[20], rel=1e-5)


def test_weights_that_the_run_does_not_have(trained, command):
    folder, _ = trained("mlp")
    told = command("evaluate", f"run={folder}", "weights=ema")
    assert (told.code, told.err) == (2, ["error: weights=ema: this run kept no running average (train.ema is null); use weights=raw"])
    told = command("evaluate", f"run={folder}", "checkpoint=15")
    assert told.code == 4
    assert "checkpoint=15" in told.err[-1]


def test_plateau_lowers_the_rate(train):
    folder = train("schedule=plateau", "schedule.patience=1", "schedule.threshold=10", "train.steps=60")  # nothing can improve by so much
    rates = column(folder, "learning_rate")
    assert [rates[step] for step in (30, 35, 50, 55, 60)] == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    assert float(Run(folder).state("latest").hyper["learning_rate"]) == pytest.approx(1e-5)


def test_bfloat16_computes_in_16_bits_and_keeps_32(train, trained, command):
    folder = train("train.precision=bfloat16")
    state = Run(folder).state("latest")
    assert {str(leaf.dtype) for leaf in (*state.params["head"].values(), *state.params["dense_0"].values())} == {"float32"}
    assert Run(folder).objective.module.dtype == "bfloat16"
    short, full = (column(path, "validation/loss")[20] for path in (folder, trained("mlp")[0]))
    assert short != full
    assert short == pytest.approx(full, rel=0.02)
    assert command("evaluate", f"run={folder}", "figures=false").code == 0


def test_values_live_in_the_state(train):
    folder = train("train.values=[optimizer.learning_rate,model.dropout,objective.label_smoothing]", "model.dropout=0.25")
    hyper = Run(folder).state("latest").hyper
    assert {name: float(value) for name, value in hyper.items()} == pytest.approx({"learning_rate": 1e-3, "dropout": 0.25, "label_smoothing": 0.0})
    assert Run(folder).objective.module.dropout is None


@pytest.mark.parametrize(("keep", "steps"), [("latest", [15, 20]), ("all", [5, 10, 15, 20]), ("every:10", [10, 15, 20])])
def test_what_is_kept(train, keep, steps):
    folder = train(f"train.keep={keep}", "train.save_every=5", "train.eval_every=null")
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir()) == steps


@pytest.mark.parametrize("parallel", ["pmap", "data"])
def test_one_device_may_be_called_by_any_name(train, parallel, tmp_path):
    plain, other = train(), train(f"parallel={parallel}", folder=tmp_path / parallel)
    assert column(other, "train/loss") == pytest.approx(column(plain, "train/loss"), rel=1e-5)


@pytest.mark.slow
def test_two_devices_make_the_same_run_and_one_may_go_on_with_it(train, tmp_path):
    """In processes of their own: the number of devices is fixed when JAX starts."""
    how = ("model.dropout=0.2", "model.norm=batch", "optimizer=momentum", "optimizer.learning_rate=0.05")  # Adam makes steps of rounding errors
    alone = train(*how)
    folder, argv = tmp_path / "pmap", [*MLP, *SHORT, *QUIET, *how]
    for more in (("parallel=pmap", "debug.cpu_devices=2", "train.stop_at=13"), ("parallel=pmap", "debug.cpu_devices=4", "train.stop_at=16"), ()):
        subprocess.run([sys.executable, "-m", "research.train", *argv, *more, f"run_dir={folder}"], check=True)
    assert [launch["devices"]["count"] for launch in read(folder / "environment.json")] == [2, 4, 1]
    for name in ("train/loss", "validation/loss"):
        assert column(folder, name) == pytest.approx(column(alone, name), rel=1e-5)


def test_the_best_accuracy_is_the_highest(train):
    folder = train("train.monitor=validation/accuracy", "train.steps=40")
    accuracy = column(folder, "validation/accuracy")
    best = read(folder / "result.json")["best"]
    assert len(set(accuracy.values())) > 1
    assert best["value"] == max(accuracy.values())


def test_a_stop_that_is_past_is_refused(train, command):
    folder = train("train.stop_at=10")
    told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}", "train.stop_at=10")
    assert told.code == 2
    assert "train.stop_at=10: this run is at step 10 already; give more, or train.stop_at=null to go on to 20" in told.err[-1]
    train("train.stop_at=null")


def test_a_fork_that_is_refused_leaves_no_folder(train, command):
    folder = train()
    for more in ("checkpoint=77", "model.activation=gelu"):
        told = command("train", "train.steps=30", *QUIET, f"run_dir={folder}", "resume=fork", "model.depth=2", more)
        assert told.code in (2, 4), told.err
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_multirun_makes_a_folder_for_each_job(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = command("train", *MLP, *SHORT, *QUIET, "-m", "seed=0,1", "paths.sweeps=some sweeps")
    assert told.code == 0, told.err
    (sweep,) = (tmp_path / "some sweeps").iterdir()
    folders = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert sorted(read_config(folder / "config.yaml").seed for folder in folders) == [0, 1]
    assert len({read(folder / "result.json")["state_sha256"] for folder in folders}) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"some sweeps"}


def test_no_secret_reaches_the_run_folder(train, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cret-v4lue")
    folder = train("paths.data=${oc.env:HF_TOKEN}")
    assert not [path for path in folder.rglob("*") if path.is_file() and b"s3cret-v4lue" in path.read_bytes()]
    assert "${oc.env:HF_TOKEN,null}" in (folder / "config.yaml").read_text()
    train("paths.data=${oc.env:HF_TOKEN}", "train.steps=30")  # and it can be read again


def test_the_python_api_is_what_the_verb_uses(tmp_path, trained):
    from research.train import train

    folder, _ = trained("mlp")
    result = train(compose([*FAMILIES["mlp"], *SHORT, f"run_dir={tmp_path / 'run'}"]))
    assert result["state_sha256"] == read(folder / "result.json")["state_sha256"]
    assert Run(tmp_path / "run").metrics()[-1]["step"] == 20
    run = Run(tmp_path / "run")
    assert run.result["metrics"] == result["metrics"]
    batch = {"image": np.ones((2, 8, 8, 1), np.float32), "mask": np.ones(2, bool)}
    before = run.predict(batch, "latest")["logits"]
    assert run.predict(batch, "latest")["logits"].tobytes() == before.tobytes()
    train(compose([*FAMILIES["mlp"], *SHORT, f"run_dir={tmp_path / 'run'}", "train.steps=30"]))
    assert run.predict(batch, "latest")["logits"].tobytes() != before.tobytes()  # the same object sees that the run went on


def test_predict_needs_nothing_but_the_run_folder(command, tmp_path):
    """Neither the data that it was trained on nor a word of the config about where that lies."""
    (tmp_path / "data.csv").write_text("x,y\n" + "".join(f"{i},{2 * i}\n" for i in range(40)))
    (tmp_path / "new.csv").write_text("x\n3\n")
    argv = ("data=table", f"data.path={tmp_path / 'data.csv'}", "objective=regress", "data.batch=8", *MLP, *SHORT, *QUIET)
    assert command("train", *argv, f"run_dir={tmp_path / 'run'}").code == 0
    (tmp_path / "data.csv").unlink()
    told = command("predict", f"run={tmp_path / 'run'}", f"input={tmp_path / 'new.csv'}")
    assert told.code == 0, told.err
    assert len(read(tmp_path / "run" / "predictions.jsonl")["value"]) == 1


def test_a_run_may_be_moved(train, command, tmp_path):
    folder = train("train.stop_at=10")
    folder.rename(tmp_path / "elsewhere")
    moved = train(folder=tmp_path / "elsewhere")
    assert read(moved / "result.json")["step"] == 20
    assert command("evaluate", f"run={moved}", "figures=false").code == 0


def test_expectations_are_judged_and_written(train, command):
    expect = ("expect={metric:test/accuracy,band:[0.99,null]}",)
    folder = train(*expect, "train.stop_at=10")
    assert read(folder / "result.json")["expect"] is None  # not judged before the end
    told = command("train", *MLP, *SHORT, *QUIET, f"run_dir={folder}", *expect)
    assert (told.code, "MISSED" in told.out) == (0, True)
    assert read(folder / "result.json")["expect"] == {"metric": "test/accuracy", "band": [0.99, None], "met": False}
