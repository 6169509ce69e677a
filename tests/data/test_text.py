import math

import numpy as np
import pytest

from research.core.errors import ConfigError, DataError
from research.data.dataset import open_data
from research.data.loader import Loader, whole
from research.data.preprocess import Preprocessor
from research.data.text import Windows, python_docs, text

STORY = "".join(chr(97 + i % 7) for i in range(1000))


def write(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def test_training_windows_start_anywhere_and_an_epoch_covers_the_text_once():
    windows = Windows(np.arange(1000, dtype=np.int32), 16, overlap=True)
    assert len(windows) == 984
    assert windows.draws == math.ceil(999 / 16)
    loader = Loader(windows, 8, seed=0)
    seen = np.concatenate([loader.indices(step) for step in range(len(loader))])
    assert len(seen) == len(set(seen.tolist())) == 63
    assert len(set((seen % 16).tolist())) > 8
    batch = windows.take(np.array([0, 983], np.int32))
    assert (batch["tokens"] == np.array([[0], [983]]) + np.arange(16)).all()
    assert (batch["target"] == batch["tokens"] + 1).all()
    assert batch["mask"].all()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("length", [18, 33, 100])
def test_a_pass_over_a_split_predicts_every_token_but_the_first_exactly_once(length, overlap):
    batches = list(whole(Windows(np.arange(length, dtype=np.int32), 16, overlap), 3))
    targets = np.concatenate([batch["target"][batch["mask"]] for batch in batches])
    tokens = np.concatenate([batch["tokens"][batch["mask"]] for batch in batches])
    assert targets.tolist() == list(range(1, length))
    assert tokens.tolist() == list(range(length - 1))


@pytest.mark.parametrize("extra", [1, 2, 15, 16, 17])
def test_short_texts_have_enough_windows_for_an_epoch(extra):
    windows = Windows(np.arange(16 + extra, dtype=np.int32), 16, overlap=True)
    assert 1 <= windows.draws <= len(windows)


def test_the_spec_and_the_batches_of_a_text_agree(tmp_path):
    data = text(write(tmp_path, "story.txt", STORY), "story.txt", time=8)
    assert data.spec["vocabulary"] == 7
    assert data.spec["time"] == 8
    assert data.spec["bytes_per_token"] == 1.0
    assert data.spec["examples"] == {"train": 113, "validation": 13}
    batch = Loader(data.splits["train"], 4)[0]
    assert {name: ([*x.shape[1:]], x.dtype.name) for name, x in batch.items()} == {
        n: (f["shape"], f["dtype"]) for n, f in data.spec["fields"].items()
    }
    whole = data.preprocessor.tokenizer.encode(STORY)
    assert (data.splits["train"].tokens == whole[:900]).all()
    assert (data.splits["validation"].tokens == whole[900:]).all()


def test_bytes_per_token_counts_the_predicted_tokens_of_the_validation_part(tmp_path):
    root = write(tmp_path, "accents.txt", "e" * 90 + "é" * 9 + "e")  # validation: é nine times, then e
    assert text(root, "accents.txt", "byte", time=4).spec["bytes_per_token"] == 18 / 18
    assert text(root, "accents.txt", "char", unknown="é", time=4).spec["bytes_per_token"] == 17 / 9


def test_the_vocabulary_comes_from_the_training_part_only(tmp_path):
    root = write(tmp_path, "late.txt", STORY + "z")
    with pytest.raises(DataError, match=r"'z'.*data.unknown"):
        text(root, "late.txt")
    assert text(root, "late.txt", unknown="?").spec["vocabulary"] == 8
    pairs = [
        text(write(tmp_path, name, "in the end " * 90 + tail), name, "bpe", 260, time=8) for name, tail in (("a.txt", "x" * 50), ("b.txt", "yy" * 25))
    ]
    assert pairs[0].preprocessor.tokenizer == pairs[1].preprocessor.tokenizer


def test_a_glob_joins_files_in_sorted_order_also_in_folders_with_odd_names(tmp_path):
    root = write(tmp_path, "büch er/b.txt", STORY)
    write(tmp_path, "büch er/a.txt", "A" * 100)
    data = text(root, "büch er/*.txt", validation=0)
    assert data.preprocessor.tokenizer.decode(data.splits["train"].tokens) == "A" * 100 + "\n" + STORY
    assert list(data.splits) == ["train"]
    assert text("elsewhere", f"{root}/büch er/b.txt").spec["vocabulary"] == 7  # an absolute path stands for itself


def test_a_run_s_tokenizer_is_used_on_another_text(tmp_path, monkeypatch):
    root = write(tmp_path, "story.txt", STORY)
    write(tmp_path, "other.txt", "gfedcba" * 30)
    fitted = text(root, "story.txt").preprocessor
    other = text(root, "other.txt", time=8, fitted=fitted)
    assert other.preprocessor.tokenizer == fitted.tokenizer
    assert other.splits["train"].tokens[:3].tolist() == [6, 5, 4]


@pytest.mark.parametrize(
    ("content", "options", "error", "words"),
    [
        ("", {}, DataError, "story.txt is empty"),
        ("short story", {}, DataError, "story.txt, train part is too short: 9 tokens of at least 65"),
        ("a" * 100, {"validation": 1, "time": 8}, DataError, "validation part is too short: 1 tokens of at least 2"),
        ("a" * 100, {"validation": 100}, ConfigError, r"data.validation=100 .* 100 rows"),
        ("a" * 100, {"time": 0}, ConfigError, "data.time=0"),
        (b"abc\xff", {}, DataError, "story.txt is not UTF-8: byte 3 is 0xff"),
    ],
)
def test_text_that_cannot_be_trained_on_is_refused(tmp_path, content, options, error, words):
    with pytest.raises(error, match=words):
        text(write(tmp_path, "story.txt", content), "story.txt", **options)


def test_a_missing_file_names_the_nearest_one(tmp_path):
    root = write(tmp_path, "tiny/input.txt", STORY)
    with pytest.raises(DataError, match=r"did you mean 'input.txt'"):
        text(root, "tiny/inptu.txt")
    with pytest.raises(DataError, match=r"there is no .*tiyn; did you mean 'tiny'"):
        text(root, "tiyn/input.txt")
    with pytest.raises(DataError, match=r"no file fits .*tiny/\*.md"):
        text(root, "tiny/*.md")
    with pytest.raises(DataError, match=r"is a folder"):
        text(root, "tiny")


def test_tokens_out_of_range_are_found_before_training():
    with pytest.raises(DataError, match=r"train split: token 9 at position 3 is outside 0 … 6"):
        Windows(np.array([0, 1, 2, 9], np.int32), 2, overlap=True).check({"vocabulary": 7}, "train split")


def test_the_language_reference_is_there_without_a_download():
    data = python_docs(unknown="\ufffd")
    assert 400_000 < sum(len(source.tokens) for source in data.splits.values()) < 700_000
    start = data.preprocessor.tokenizer.decode(data.splits["train"].tokens[:200])
    assert "assert" in start.lower()


def test_the_opener_is_reached_through_a_config(tmp_path):
    node = {"_target_": "research.data.text.text", "root": write(tmp_path, "s.txt", STORY), "path": "s.txt", "batch": 4, "spec": {"time": 64}}
    data = open_data(node)
    data.save(tmp_path / "run")
    assert dict(Preprocessor.load(tmp_path / "run").spec) == dict(data.spec)
    with pytest.raises(DataError, match=r"data.spec.time=64 .* time=32"):
        open_data({**node, "time": 32})
