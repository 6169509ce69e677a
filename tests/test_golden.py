"""The loss curves of 20 CPU steps as they were when last looked at: a refactoring changes none of them.

`python -m pytest tests/test_golden.py --golden-write` writes tests/golden/*.json anew, after a change that was meant to change them.
"""

import json
import pathlib

import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"
COMMON = ("train.steps=20", "train.log_every=1", "train.eval_every=null", "logger.figures=false", "logger.tensorboard=false", "logger.progress=none")
FAMILIES = {
    "perceptron": ("model=perceptron", "optimizer=momentum"),
    "mlp": ("model.width=16", "model.dropout=0.2", "objective.label_smoothing=0.1", "schedule=cosine", "schedule.warmup=5"),
    "cnn": ("model=cnn", "model.channels=[4,8]", "model.pool=2", "model.padding=SAME", "model.hidden=[8]", "model.norm=batch", "train.accumulate=2"),
    "resnet": ("model=resnet18", "model.blocks=[1,1]", "model.channels=[4,6]", "model.zero=true"),
    "lstm": (
        *("model=lstm", "model.width=16", "model.dropout=0.1", "objective=language_model", "train.clip=1.0", "logger.sample=false"),
        *("data=text", "data.path=TEXT", "data.time=16", "data.batch=8"),
    ),
    "gpt": (
        *("model=gpt", "model.width=16", "model.depth=2", "model.heads=4", "model.kv_heads=2", "model.positions=rotary", "model.norm=rms"),
        *("model.activation=swiglu", "model.hidden=24", "model.dropout=0.1", "objective=language_model", "train.clip=1.0", "logger.sample=false"),
        *("data=text", "data.path=TEXT", "data.time=16", "data.batch=8"),
    ),
}


def text():
    """4,000 characters with something to learn: words of a small language by a generator of its own, the same on every machine."""
    syllables, state, made = ("ba", "co", "di", "fu", "ge", "la ", "mo ", "ni ", "ru ", "se. "), 1, []
    while len(made) < 2000:
        state = state * 16807 % 2147483647  # Park and Miller 1988
        made.append(syllables[state % len(syllables)])
    return "".join(made)[:4000]


def curve(family, folder, command):
    """The training loss of each step."""
    (folder / "text.txt").write_text(text())
    argv = [argument.replace("TEXT", str(folder / "text.txt")) for argument in FAMILIES[family]]
    assert command("train", *argv, *COMMON, f"run_dir={folder / 'run'}").code == 0
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.slow) if name in ("gpt", "lstm") else name for name in FAMILIES])
def test_the_loss_curve_is_what_it_was(family, tmp_path, command, pytestconfig):
    path, losses = GOLDEN / f"{family}.json", curve(family, tmp_path, command)
    if pytestconfig.getoption("--golden-write"):
        path.write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n")
    golden = json.loads(path.read_text())
    assert len(golden) == 20
    assert losses == pytest.approx(golden, rel=1e-4)


def test_there_is_no_curve_without_a_family():
    assert {path.stem for path in GOLDEN.iterdir()} == set(FAMILIES)
