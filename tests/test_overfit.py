"""Every family can learn one batch by heart: the loss falls below a twentieth of its start."""

import json

import pytest

QUIET = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none")
FEW = ("data.validation=0", "data.test=1780", "data.batch=all")  # 17 digits
FAMILIES = {
    "perceptron": ("model=perceptron", *FEW, "optimizer=adam", "optimizer.learning_rate=0.1"),
    "mlp": ("model.width=32", "model.depth=1", *FEW, "optimizer=adam", "optimizer.learning_rate=0.03"),
    "cnn": (
        "model=cnn",
        "model.channels=[8]",
        "model.pool=2",
        "model.hidden=[16]",
        "model.norm=batch",
        *FEW,
        "optimizer=adam",
        "optimizer.learning_rate=0.03",
    ),
    "resnet": ("model=resnet18", "model.blocks=[1,1]", "model.channels=[4,8]", *FEW, "optimizer=adam", "optimizer.learning_rate=0.03"),
    "lstm": (
        *("model=lstm", "model.width=32", "objective=language_model", "logger.sample=false"),
        *("data=text", "data.path=TEXT", "data.validation=0", "data.time=32", "data.batch=all", "optimizer=adam", "optimizer.learning_rate=0.03"),
    ),
    "gpt": (
        *("model=gpt", "model.width=32", "model.depth=1", "model.heads=2", "model.hidden=32", "objective=language_model", "logger.sample=false"),
        *("data=text", "data.path=TEXT", "data.validation=0", "data.time=32", "data.batch=all", "optimizer=adam", "optimizer.learning_rate=0.03"),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_is_learnt_by_heart(command, tmp_path, family):
    (tmp_path / "text.txt").write_text("sphinx of black quartz, judge my vow")  # 36 characters: four windows, one of them in each epoch
    argv = [argument.replace("TEXT", str(tmp_path / "text.txt")) for argument in FAMILIES[family]]
    steps = ("train.steps=100", "train.log_every=1", "train.eval_every=null", "train.monitor=train/loss")
    told = command("train", *argv, *steps, *QUIET, f"run_dir={tmp_path / 'run'}")
    assert told.code == 0, told.err
    losses = [json.loads(line)["train/loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 100
    assert losses[-1] < 0.05 * losses[0]
