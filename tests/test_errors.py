"""The errors that people make: each ends in one line that names the bad value and the nearest right one, in its exit code, and loses nothing."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from research import Run

QUIET = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none")
MLP = ("model.width=8", "model.depth=1", "train.steps=20", "train.eval_every=10", "train.log_every=5", *QUIET)
GPT = ("experiment=quickstart", "data=text", "data.time=8", "data.batch=4", "model.width=8", "model.depth=1", "model.heads=2", "model.hidden=8")
GPT += ("schedule.warmup=0", "train.steps=4", "train.eval_every=2", "logger.sample=false", *QUIET)
TABLE = ("data=table", "objective=regress", "data.batch=8", *MLP)
ROWS = "\n".join(f"{i},{2 * i}" for i in range(30))


@pytest.fixture
def refused(command, tmp_path, snapshot):
    """refused(code, texts, verb, *argv): the command ends in one error line that holds the texts; a new run folder holds no more than a result."""

    def call(code, texts, verb, *argv):
        folder = tmp_path / "refused"
        told = command(verb, *argv, *((f"run_dir={folder}",) if verb == "train" and not any(a.startswith("run_dir=") for a in argv) else ()))
        lines = [line for line in told.err if line.startswith("error: ")]
        assert (told.code, len(lines)) == (code, 1), told
        assert told.err[-1] == lines[0]
        for text in (texts,) if isinstance(texts, str) else texts:
            assert str(text) in lines[0]
        if folder.exists():
            assert set(snapshot(folder)) == {"result.json"}
            result = json.loads((folder / "result.json").read_text())
            assert (result["status"], result["reason"]) == ("failed", lines[0].removeprefix("error: "))
        return lines[0]

    return call


@pytest.fixture(scope="module")
def classifier(command, tmp_path_factory):
    """A trained run, not to be changed."""
    folder = tmp_path_factory.mktemp("some runs") / "classifier"
    assert command("train", *MLP, f"run_dir={folder}").code == 0
    return folder


@pytest.fixture(scope="module")
def language_model(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("some runs")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    assert command("train", *GPT, f"data.path={folder / 'text.txt'}", f"run_dir={folder / 'model'}").code == 0
    return folder / "model"


@pytest.fixture
def unchanged(classifier, language_model, snapshot):
    """The trained runs are, after the test, what they were before."""
    before = snapshot(classifier), snapshot(language_model)
    yield
    assert (snapshot(classifier), snapshot(language_model)) == before


@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        ("experiment=quikstart", "there is no experiment 'quikstart'; did you mean 'quickstart'?"),
        ("model=gtp", "there is no model 'gtp'; did you mean 'gpt'?"),
        ("data=digit", "there is no data 'digit'; did you mean 'digits'?"),
        ("optimizer=adamm", "did you mean 'adam'?"),
        ("modle=gpt", "train has no key 'modle'; did you mean 'model'?"),
        ("+modle=gpt", "train has no key 'modle'; did you mean 'model'?"),
        ("+model=gpt", "model is chosen without a plus, as model=NAME"),
        ("train.stepz=3", "did you mean 'train.steps'?"),
        ("optimizer.beta1=0.9", "train has no key 'optimizer.beta1'"),
        ("+optimizer.b3=0.9", "optimizer.b3: adamw takes no 'b3'"),
        ("seed=1,2", "add -m to run each"),
        ("--multy", "unrecognized arguments: --multy; see --help"),
        ("seed", "is not KEY=VALUE"),
    ],
)
def test_a_name_that_does_not_exist(refused, argv, texts):
    refused(2, texts, "train", argv)


@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        ("train.steps=many", "train.steps='many' has the wrong type: expected int"),
        ("train.steps=1.5", "train.steps=1.5 has the wrong type"),
        ("train.precision=float16", "train.precision='float16' has the wrong type: expected Literal['float32', 'bfloat16']"),
        ("model.width=wide", "model.width='wide' has the wrong type: expected int | tuple[int, ...]"),
        ("model.activation=rel", ("model", "'rel' is unknown; did you mean 'relu'?")),
        ("data.batch=half", "data.batch='half' must be a whole number"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast': must be a finite number"),
        ("seed=one", "seed='one': must be a whole number"),
        ("seed=-1", "seed=-1: must be a whole number of at least 0"),
        ("data.seed=-1", "data.seed=-1"),
        ("check=maybe", "check='maybe': must be true or false"),
        ("resume=neverr", "resume='neverr' is unknown; did you mean 'never'?"),
        ("logger.progress=lots", "logger.progress='lots' is unknown; choose from: auto, bar, lines, none"),
        ("logger.histograms=few", "logger.histograms='few'"),
    ],
)
def test_a_value_of_the_wrong_type(refused, argv, texts):
    refused(2, texts, "train", *MLP, argv)


@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        ("train.accumulate=5", ("data.batch=64 cannot be cut into train.accumulate=5", "the nearest that can is 65")),
        ("data.batch=0", "data.batch=0 must be a whole number of at least 1"),
        ("train.steps=0", "train.steps=0: must be at least 1"),
        ("train.steps=-5", "train.steps=-5: must be at least 1"),
        ("train.stop_at=0", "train.stop_at=0: must be at least 1"),
        ("train.epochs=3", "train.steps=20 and train.epochs=3: give exactly one of them"),
        ("train.eval_every=0", "train.eval_every=0"),
        ("train.keep=some", "train.keep='some': must be latest, all, or every:N"),
        ("train.monitor=validation/los", "is no metric of this run; did you mean 'validation/loss'?"),
        ("train.values=[model.dropuot]", "did you mean 'model.dropout'?"),
        ("train.clip=0", "train.clip=0"),
        ("train.ema=1", "train.ema=1"),
        ("optimizer.learning_rate=-1e-3", "optimizer.learning_rate=-0.001"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate=inf"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1"),
        ("optimizer.b1=1.5", "optimizer.b1=1.5: must be in [0, 1)"),
        ("schedule.warmup=21", "schedule.warmup=21 is longer than the run, train.steps=20"),
        ("data.validation=1797", "leaves nothing to train on: the data has 1797 rows"),
        ("model.dropout=null", "reads 'dropout', which is no field of the data (image, label) and is not listed in train.values"),
        ("objective=regress", "reads 'target', which is no field of the data (image, label)"),
        ("objective=language_model", ("'data.spec.bytes_per_token' not found", "choose a model and an objective that fit it")),
        ("model=gpt", ("'data.spec.vocabulary' not found", "choose a model and an objective that fit it")),
        ("data=python_docs", ("'data.spec.outputs' not found", "this data gives fields, vocabulary, time")),
        ("parallel=pmap parallel.devices=999", "parallel.devices=999: this machine has"),
    ],
)
def test_a_value_out_of_range(refused, argv, texts):
    refused(2, texts, "train", *MLP, *argv.split())


def test_an_image_too_small_for_its_model(refused):
    refused(2, ("the image is 3 x 3 before conv_1", "use padding=SAME"), "train", "model=cnn", *QUIET)


@pytest.mark.parametrize(
    "argv",
    [
        ("model._target_=os.system",),
        ("objective._target_=builtins.open", "+objective.file=SENTINEL", "+objective.mode=w"),
        ("data._target_=pathlib.Path.touch", "+data.self=SENTINEL"),
        ("optimizer._target_=research.core.folder.write_text", "+optimizer.path=SENTINEL", "+optimizer.text=x"),
        ("schedule._target_=research.training.run.write_result", "+schedule.path=SENTINEL"),
        ("train._target_=subprocess.run", "+train.args=[touch,SENTINEL]"),
        ("parallel._target_=jax.numpy.save", "+parallel.file=SENTINEL"),
        ("+model.module={_target_:builtins.open,file:SENTINEL,mode:w}",),
        (
            "+model.x={_target_:research.data.tokenizers.Characters.save,self:{_target_:research.data.tokenizers.Characters,characters:x},path:SENTINEL}",
        ),
    ],
)
def test_a_forbidden_target_is_never_executed(refused, argv, tmp_path):
    sentinel = tmp_path / "sentinel"
    refused(2, ("_target_=", "is not allowed: "), "train", *QUIET, *(a.replace("SENTINEL", str(sentinel)) for a in argv))
    assert not sentinel.exists()


def test_a_forbidden_target_in_a_run_that_came_from_elsewhere(refused, classifier, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "copy")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("research.models.mlp.MLP", "pathlib.Path.touch"))
    for verb in ("evaluate", "predict"):
        refused(2, "_target_='pathlib.Path.touch' is not allowed", verb, f"run={folder}", *(("input=x.png",) if verb == "predict" else ()))


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("short.txt", b"abcabc", "is too short"),
        ("bytes.txt", b"abc" * 50 + b"\xff" * 9, "bytes.txt is not UTF-8: byte 150 is 0xff"),
        ("letter.txt", b"abc" * 50 + b"z" * 9, ("letter.txt, validation part: character 'z' (U+007A)", "data.unknown")),
    ],
)
def test_text_that_cannot_be_trained_on(refused, tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    refused(1, texts, "train", *GPT, f"data.path={tmp_path / name}")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.csv", f"x,y\n{ROWS}\n3,nan", "a.csv, line 32, column 'y': nan is not a finite"),
        ("a.csv", f"x,y\n{ROWS}\n3,1e99", "a.csv, line 32, column 'y'"),
        ("a.csv", f"x,y\n{ROWS}\n3,three", "a.csv, line 32, column 'y': 'three' is not a number"),
        ("a.csv", f"x,y\n{ROWS}\n3", "a.csv, line 32: 1 cells, and the header names 2"),
        ("a.csv", f'x,y\n{ROWS}\n3,"4', "a.csv, line 32"),
        ("a.csv", ROWS, "a.csv, line 1: the first line must name the columns"),
        ("a.csv", "", "a.csv has no rows"),
        ("a.csv", "x,y\n", "a.csv has no rows"),
        ("a.jsonl", '{"x": 1, "y": 2}\n{"x": 1, "y"', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"x": 1, "y": 2}\n[1, 2]', "a.jsonl, line 2: expected an object, found list"),
        ("a.jsonl", '{"x": 1, "y": 2}\n{"x": 1}', "a.jsonl, line 2: 'y' is missing"),
        ("a.jsonl", '{"x": 1, "y": 2}\n{"x": NaN, "y": 2}', "a.jsonl, line 2, column 'x': nan"),
        ("a.npz", "no zip", "a.npz cannot be read as .npz"),
        ("a.table", "x", "its name must end in .csv, .jsonl, .npz"),
    ],
)
def test_a_table_with_a_fault_names_file_and_row(refused, tmp_path, name, content, texts):
    (tmp_path / name).write_text(content)
    refused(1, texts, "train", *TABLE, f"data.path={tmp_path / name}")


def test_a_class_that_only_the_judged_part_has(refused, tmp_path):
    rows = [f"{i},{'ab'[i % 2]}" for i in range(30)]
    for i in range(30):  # whichever rows are drawn for validation, one of these files has the class only there
        path = tmp_path / f"{i}.csv"
        path.write_text("\n".join(["x,kind", *rows[:i], f"{i},aa", *rows[i + 1 :]]))
    validation = _validation_row(tmp_path / "0.csv")
    texts = (f"{validation}.csv, line {validation + 2}: class 'aa' is not in the training part", "did you mean 'a'?")
    argv = ("data=table", "data.task=classes", "data.validation=1", *MLP)
    refused(1, texts, "train", *argv, f"data.path={tmp_path / f'{validation}.csv'}")


def _validation_row(path):
    from research.data.table import table

    return int(table("", str(path), task="classes", validation=1).indices["validation"][0])


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("fault", ["truncated", "unreadable", "empty"])
def test_a_damaged_image_is_named(refused, images, fault):
    bad = images / "dog" / "3.png"
    whole = bad.read_bytes()
    bad.write_bytes({"truncated": whole[: len(whole) // 2], "unreadable": b"not an image", "empty": b""}[fault])
    refused(1, f"{bad} cannot be read as an image", "train", "data=image_folder", f"data.path={images}", *MLP)


def test_a_folder_without_images(refused, tmp_path):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    refused(1, f"{tmp_path / 'images'} has no images: expected <class>/<name>", "train", "data=image_folder", f"data.path={tmp_path / 'images'}")


@pytest.fixture
def mnist(tmp_path, images):
    """write(cell, label): a folder with mnist/train.parquet, and mnist/test.parquet whose row 3 is as given."""

    def write(cell=None, label=1):
        good = {"bytes": (images / "cat" / "1.png").read_bytes(), "path": None}
        (tmp_path / "mnist").mkdir(exist_ok=True)
        for part, cells, labels in (("train", [good] * 20, [i % 10 for i in range(20)]), ("test", [good] * 3 + [cell or good], [1, 2, 3, label])):
            table = pyarrow.table({"image": cells, "label": pyarrow.array(labels, pyarrow.int64())})
            pyarrow.parquet.write_table(table, tmp_path / "mnist" / f"{part}.parquet")
        return tmp_path

    return write


def test_a_label_out_of_range(refused, mnist):
    refused(1, "test.parquet, row 3: label 10 is outside 0 … 9", "train", "data=mnist", f"paths.data={mnist(label=10)}", *MLP)


def test_a_bad_row_of_a_parquet_file(refused, mnist):
    refused(1, "test.parquet, row 3 cannot be read as an image", "train", "data=mnist", f"paths.data={mnist({'bytes': b'x', 'path': None})}", *MLP)


def test_a_truncated_parquet_file(refused, mnist):
    root = mnist()
    path = root / "mnist" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    refused(1, f"{path} cannot be read as parquet", "train", "data=mnist", f"paths.data={root}", *MLP)


def test_a_token_out_of_range(refused, language_model, tmp_path):
    """A tokenizer that does not belong to the model: its tokens would be clamped silently."""
    folder = shutil.copytree(language_model, tmp_path / "copy")
    (folder / "data" / "tokenizer.json").write_text(json.dumps({"kind": "byte"}))
    refused(2, "outside the vocabulary", "predict", f"run={folder}", "prompt=the")


def test_a_missing_file_is_named_with_the_nearest(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("notes.txt").write_text("abc" * 100)
    refused(1, ("note.txt does not exist; did you mean 'notes.txt'?",), "train", *GPT, "data.path=note.txt", "data.root=.")
    refused(1, "data/notes.txt does not exist, but notes.txt does: data.root=.", "train", *GPT, "data.path=notes.txt")
    refused(1, "no file fits", "train", *GPT, "data.path='*.md'")


def test_a_value_that_must_be_given(refused):
    refused(2, "data.path is not given; add data.path=VALUE", "train", *GPT)
    refused(2, "run is not given; add run=VALUE", "evaluate")


def test_no_network(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    texts = (f"no data set 'mnist' in '{tmp_path}', and there is no network", "set paths.data or RESEARCH_DATA to the folder that holds mnist/")
    refused(1, texts, "train", "data=mnist", f"paths.data={tmp_path}", *MLP)


def test_data_that_is_gone_leaves_the_run_as_it_is(refused, command, tmp_path, snapshot):
    path, folder = tmp_path / "table.csv", tmp_path / "run"
    path.write_text(f"x,y\n{ROWS}")
    assert command("train", *TABLE, f"data.path={path}", f"run_dir={folder}", "train.stop_at=10").code == 0
    path.rename(tmp_path / "table2.csv")
    before = snapshot(folder)
    refused(1, "table.csv does not exist; did you mean 'table2.csv'?", "train", *TABLE, f"data.path={path}", f"run_dir={folder}")
    refused(1, "data.root=FOLDER says where it is now", "evaluate", f"run={folder}")
    assert snapshot(folder) == before


@pytest.mark.parametrize("where", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written(refused, tmp_path, where):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / where
    refused(1, f"run_dir='{path}' cannot be written: ", "train", *MLP, f"run_dir={path}")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_results_that_cannot_be_written(refused, classifier, images, tmp_path, verb):
    folder = shutil.copytree(classifier, tmp_path / "copy")
    name = {"evaluate": "evaluation.json", "predict": "predictions.jsonl"}[verb]
    (folder / name).mkdir()
    refused(1, f"cannot write {folder / name}: ", verb, f"run={folder}", f"input={images}" if verb == "predict" else "figures=false")
    assert not list(folder.glob("*.part"))


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of 2 MB of its own; a plain one where the machine lets nobody mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", folder], check=True)


def fill(disk, patch, leave):
    """Leaves so many bytes on the disk, or lets it say so."""
    if os.path.ismount(disk):
        (disk / "filler").unlink(missing_ok=True)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    else:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 20, 1 << 20, leave))


def test_a_full_disk_names_the_path_and_keeps_the_checkpoints(command, disk, snapshot, monkeypatch):
    folder = disk / "run"
    argv = (*MLP, "logger.tensorboard=true", "train.save_every=5", f"run_dir={folder}")
    assert command("train", *argv, "train.stop_at=10").code == 0
    before = {name: digest for name, digest in snapshot(folder).items() if name.startswith("checkpoints")}
    with monkeypatch.context() as patch:
        for leave in (1 << 16, 1 << 12, 0):  # too little for a checkpoint, for the logs, for anything
            fill(disk, patch, leave)
            told = command("train", *argv)
            assert told.code in (1, 4), leave
            assert str(folder) in told.err[-1]
            assert told.err[-1].startswith("error: ")
            assert "No space left on device" in told.err[-1]
            assert {name: digest for name, digest in snapshot(folder).items() if name.startswith("checkpoints")} == before
    (disk / "filler").unlink(missing_ok=True)
    told = command("train", *argv)
    assert (told.code, "resuming at step 10" in told.out) == (0, True)


def test_a_folder_that_another_process_writes(refused, command, tmp_path, classifier, snapshot):
    folder = shutil.copytree(classifier, tmp_path / "run")
    before = snapshot(folder)
    program = f"import sys\nfrom etils import epath\nfrom research.training.run import claimed\nwith claimed(epath.Path({str(folder)!r})):\n"
    program += "    print('held', flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        refused(5, (f"run_dir='{folder}' is in use by host ", f"pid {holder.pid}"), "train", *MLP, f"run_dir={folder}")
        assert snapshot(folder) == before
        holder.kill()
    assert command("train", *MLP, f"run_dir={folder}").code == 0  # a dead holder holds nothing


@pytest.mark.slow
def test_paths_with_spaces_and_unicode(command, tmp_path, images):
    home = tmp_path / "Übung 1 测试 'a, b'"
    home.mkdir()
    data = shutil.move(images, home / "Bilder für später")
    quoted = str(home).replace("'", "\\'")
    folder = f"run_dir='{quoted}/ein Lauf'"
    assert command("train", "data=image_folder", f"data.path='{quoted}/{data.name}'", *MLP, "logger.tensorboard=true", folder).code == 0
    told = command("evaluate", f"run='{quoted}/ein Lauf'")
    assert told.code == 0, told.err
    told = command("predict", f"run='{quoted}/ein Lauf'", f"input='{quoted}/{data.name}/cat'")
    assert told.code == 0, told.err
    rows = (home / "ein Lauf" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(row)["input"] for row in rows] == [f"{i}.png" for i in range(6)]
    assert "nothing to do" in command("train", "data=image_folder", f"data.path='{quoted}/{data.name}'", *MLP, "logger.tensorboard=true", folder).out


def test_a_checkpoint_of_another_model_names_leaves_and_shapes(refused, classifier, command, tmp_path, snapshot):
    other, folder = tmp_path / "other", shutil.copytree(classifier, tmp_path / "run")
    assert command("train", *MLP, "model.width=9", f"run_dir={other}").code == 0
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(other / "checkpoints", folder / "checkpoints")
    (folder / "result.json").unlink()
    before = snapshot(folder)
    texts = ("params/dense_0/bias is (9,) float32 there, (8,) float32 here", "params/dense_0/kernel is (64, 9) float32 there, (64, 8) float32 here")
    for verb, argv in (("evaluate", (f"run={folder}",)), ("train", (*MLP, f"run_dir={folder}"))):
        refused(4, texts, verb, *argv)
        assert snapshot(folder) == before


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("verb", "argv", "code", "texts"),
    [
        ("evaluate", ("data.split=tset",), 1, "the data has no split 'tset'; did you mean 'test'?"),
        ("evaluate", ("data.batch=0",), 2, "data.batch=0 must be a whole number"),
        ("evaluate", ("checkpoint=bst",), 2, "checkpoint='bst'"),
        ("evaluate", ("checkpoint=7",), 4, "checkpoint=7"),
        ("evaluate", ("weights=average",), 2, "weights='average': choose from: auto, raw, ema"),
        ("evaluate", ("data=random_regression",), 1, "data.spec.image"),
        ("predict", (), 2, "give exactly one of them; this run takes input=PATH"),
        ("predict", ("prompt=hello",), 2, "this run is no language model; give input=PATH"),
        ("predict", ("input=nothing.png",), 1, "nothing.png does not exist"),
        ("predict", (f"input={__file__}",), 1, "test_errors.py cannot be read as an image"),
        ("predict", ("input=x.png", "top=0"), 2, "top=0: must be a whole number of at least 1"),
        ("predict", ("input=x.png", "batch=many"), 2, "batch='many': must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_asked_of_a_classifier(refused, classifier, verb, argv, code, texts):
    refused(code, texts, verb, f"run={classifier}", *argv)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("argv", "code", "texts"),
    [
        (("input=x.csv",), 1, "x.csv does not exist"),
        ((f"input={__file__}",), 1, "a language model is given prompt="),
        (("prompt=HELLO",), 1, "character 'H' (U+0048) at position 0 is not among"),
        (("prompt=the", "tokens=0"), 2, "tokens=0"),
        (("prompt=the", "temperature=-1"), 2, "temperature=-1"),
        (("prompt=the", "top_k=0"), 2, "top_k=0"),
        (("prompt=the", "top_p=1.5"), 2, "top_p=1.5"),
        (("prompt=the", "samples=0"), 2, "samples=0: must be a whole number of at least 1"),
        (("prompt=the", "seed=some"), 2, "seed='some'"),
    ],
)
def test_what_cannot_be_asked_of_a_language_model(refused, language_model, argv, code, texts):
    refused(code, texts, "predict", f"run={language_model}", *argv)


def test_a_run_that_is_not_there_is_named_with_the_nearest(refused, classifier):
    refused(2, "is no run folder: it holds no config.yaml; did you mean 'classifier'?", "evaluate", f"run={classifier.parent / 'clasifier'}")


def test_a_rate_that_diverges_keeps_the_last_good_checkpoint(command, tmp_path):
    argv = (*MLP, "optimizer=sgd", "optimizer.learning_rate=1e30", "train.steps=60", "train.save_every=1", "train.skip_limit=8", "data.batch=16")
    told = command("train", *argv, f"run_dir={tmp_path}")
    assert (told.code, told.err) == (3, ["error: 8 updates in a row had a non-finite loss or gradient, the last at step 9"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["step"]) == ("diverged", 9)
    diverged = json.loads((tmp_path / "diverged.json").read_text())
    assert diverged["reason"] == result["reason"]
    assert list(diverged["indices"]) == [str(step) for step in range(1, 9)]  # as of loader.indices(step)
    assert all(len(set(rows)) == 16 for rows in diverged["indices"].values())
    state = Run(tmp_path).state("latest")
    assert np.isfinite(state.params["head"]["kernel"]).all()
    assert int(state.extra["skipped"]["total"]) == int(state.step) - 1
    again = command("train", *argv, f"run_dir={tmp_path}")  # resumed, it diverges again and says so at once
    assert (again.code, again.err) == (told.code, told.err) or "the last at step" in again.err[-1]


def test_debug_shows_the_traceback_and_the_line_stays_the_last(command, tmp_path):
    told = command("train", *MLP, "train.steps=0", "debug=true", f"run_dir={tmp_path / 'run'}")
    assert (told.code, told.err[0]) == (2, "Traceback (most recent call last):")
    assert told.err[-1] == "error: train.steps=0: must be at least 1"
