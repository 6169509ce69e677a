import numpy as np
import pytest

from research.core.errors import ConfigError
from research.data.repeated import repeated


def test_the_second_half_repeats_the_first_and_alone_counts():
    data = repeated(vocabulary=20, time=16, examples=50, validation=7)
    batch = data.splits["train"].take(np.arange(50))
    np.testing.assert_array_equal(batch["tokens"][:, 8:], batch["tokens"][:, :8])
    np.testing.assert_array_equal(batch["target"][:, :-1], batch["tokens"][:, 1:])
    np.testing.assert_array_equal(batch["target"][:, -1], batch["tokens"][:, 0])  # the stretch begins a third time
    np.testing.assert_array_equal(batch["mask"], np.broadcast_to(np.arange(16) >= 8, (50, 16)))
    assert all(len(set(row[:8])) == 8 for row in batch["tokens"].tolist())
    assert (batch["tokens"].dtype, batch["target"].dtype, batch["mask"].dtype) == (np.int32, np.int32, bool)
    assert data.spec["examples"] == {"train": 50, "validation": 7}


def test_a_shortest_stretch_varies_the_length_and_every_target_that_counts_can_be_looked_up():
    batch = repeated(vocabulary=16, time=24, shortest=3, examples=200, validation=0).splits["train"].take(np.arange(200))
    lengths = 24 - batch["mask"].sum(1)
    assert set(lengths) == set(range(3, 13))
    for tokens, target, mask, length in zip(batch["tokens"], batch["target"], batch["mask"], lengths, strict=True):
        assert not mask[:length].any()
        for place in range(length, 24):
            assert tokens[place] == tokens[place - length]
            assert target[place] == tokens[place - length + 1]


def test_an_example_is_a_function_of_seed_split_and_number():
    few, many, other = (repeated(vocabulary=16, time=16, shortest=4, seed=s, examples=n) for s, n in ((3, 30), (3, 90), (4, 30)))
    rows = np.array([29, 4, 4])
    for name in ("tokens", "mask"):
        np.testing.assert_array_equal(few.splits["train"].take(rows)[name], many.splits["train"].take(rows)[name])
        np.testing.assert_array_equal(few.splits["validation"].take(rows)[name], many.splits["validation"].take(rows)[name])
    tokens = few.splits["train"].take(np.arange(30))["tokens"]
    assert (tokens != other.splits["train"].take(np.arange(30))["tokens"]).any()
    assert (tokens != few.splits["validation"].take(np.arange(30))["tokens"]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": 3}, "data.time=3: a stretch and its repetition need at least 4 tokens"),
        ({"shortest": 33}, "data.shortest=33: must be from 2 to half of data.time, 32"),
        ({"shortest": 1}, "data.shortest=1: must be from 2"),
        ({"vocabulary": 31}, "data.vocabulary=31: a stretch of 32 different tokens needs at least 32"),
        ({"examples": 0}, "data.examples=0: must be at least 1"),
        ({"validation": -1}, "data.validation=-1: must be at least 0"),
        ({"seed": -1}, "data.seed=-1: must be at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        repeated(**changes)


def test_a_language_model_of_tokens_that_are_no_text_trains_and_is_scored(command, tmp_path):
    small = (
        "data.time=8",
        "data.vocabulary=8",
        "data.shortest=2",
        "data.examples=16",
        "data.validation=4",
        "data.batch=4",
        "model.width=8",
        "model.heads=2",
    )
    quiet = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none", "expect=null")
    steps = ("train.steps=2", "train.eval_every=1", "schedule.warmup=0")
    told = command("train", "experiment=induction", *small, *quiet, *steps, f"run_dir={tmp_path / 'run'}")
    assert told.code == 0, told.err
    assert not (tmp_path / "run" / "samples").exists()  # there is no text to write
    assert "bits_per_byte" not in (tmp_path / "run" / "metrics.jsonl").read_text()
