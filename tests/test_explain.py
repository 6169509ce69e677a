"""Explain as a person calls it: any run, from one command, as a page, pictures, arrays and numbers."""

import html.parser
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import research.explanation.gradient as gradient
from research import Run
from research.explanation.model import replaced
from research.explanation.result import Attribution

POINTS = "{integrated_gradients: {points: 8}}"
ODD = "<script>alert(1)</script> & $x$"  # of a column and a class: it must be shown, never obeyed


@pytest.fixture(scope="module")
def table(command, tmp_path_factory):
    """A run on a table with names of its own: four columns, three classes."""
    folder = tmp_path_factory.mktemp("table")
    random = np.random.RandomState(0)
    rows = random.standard_normal((60, 4))
    labels = np.array(["yes", "perhaps", ODD])[np.digitize(rows[:, 0], [-0.5, 0.5])]
    lines = [f"age,height,{ODD},weight,answer", *(",".join([*(f"{x:.4f}" for x in row), name]) for row, name in zip(rows, labels, strict=True))]
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    quiet = ("logger.progress=none", "logger.figures=false", "logger.tensorboard=false")
    argv = (
        "data=table",
        f"data.path={folder / 'data.csv'}",
        "data.task=classes",
        "objective=classify",
        "model=mlp",
        "model.width=8",
        "train.steps=4",
    )
    told = command("train", *argv, *quiet, f"run_dir={folder / 'run'}")
    assert told.code == 0, told.err
    return folder / "run"


@pytest.fixture
def explain(command, parent, tmp_path):
    """explain("mlp" or a folder, "method=…"): the explanation's folder and the content of its JSON."""

    def call(run, *argv, out=tmp_path / "out"):
        told = command("explain", f"run={run if isinstance(run, pathlib.Path) else parent(run)}", f"out={out}", *argv)
        assert told.code == 0, told.err
        return out, json.loads((out / "explanation.json").read_text())

    return call


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, and the text outside of them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def page(folder):
    return Page((folder / "explanation.html").read_text())


@pytest.mark.parametrize("method", ["saliency", pytest.param("integrated_gradients", marks=pytest.mark.slow)])
def test_a_family_can_be_attributed(every_family, method, parent):
    """The contract of a family: gradients reach the input, no position that does not count gets any, and integrated ones add up."""
    run = Run(parent(every_family))
    batch = drawn(run, 3)
    result = run.explain(method, batch, **({"points": 64} if method == "integrated_gradients" else {}))
    assert isinstance(result, Attribution)
    assert result.values.shape == (3, *batch[run.model().field].shape[1:])
    assert np.isfinite(result.values).all()
    assert all(np.abs(values).max() > 0 for values in result.values)
    if result.delta is not None:
        np.testing.assert_allclose(result.delta, 0.0, atol=0.03 * np.abs(result.output).max())  # max-pooling is not smooth


def test_a_family_can_be_read_and_patched(every_family, parent):
    """The contract of a family: a tap replaced by itself changes nothing, all of the clean input makes the clean output, and logits are a tap."""
    run = Run(parent(every_family))
    model, batch = run.model(), drawn(run, 2)
    assert next(iter(model.taps)) == "input"
    names = tuple(model.taps)
    outputs, taps = model.read(batch, names)
    for name, shape in model.taps.items():
        assert taps[name].shape[1:] == shape.shape[1:]
    np.testing.assert_allclose(np.asarray(outputs), np.asarray(taps["logits"]), atol=1e-5)
    same, _ = model.read(batch, (), {name: replaced(value) for name, value in taps.items()})
    np.testing.assert_allclose(np.asarray(same), np.asarray(outputs), atol=1e-5)
    corrupt = {**batch, model.field: batch[model.field][::-1].copy()}
    wrong, _ = model.read(corrupt)
    assert np.abs(np.asarray(wrong) - np.asarray(outputs)).max() > 1e-3
    patched, _ = model.read(corrupt, (), {"input": replaced(taps["input"])})
    np.testing.assert_allclose(np.asarray(patched), np.asarray(outputs), atol=1e-5)
    nothing, _ = model.read(corrupt, (), {"input": (np.zeros((), bool), taps["input"])})
    np.testing.assert_allclose(np.asarray(nothing), np.asarray(wrong), atol=1e-5)


def test_a_family_is_patched_as_a_person_types_it(every_family, explain):
    """The contract of a family: from the command line, the clean input as a whole restores the clean answer, and what is compared has a name."""
    _, report = explain(every_family, "method=patching", "index=0,1", "figures=false")
    (told,) = report["methods"]
    assert told["whole"]["input"] == pytest.approx(1.0, abs=1e-3)
    assert len(told["whole"]) > 1
    assert np.abs(np.subtract(told["clean"], told["corrupt"])).min() > 0
    model = Run(pathlib.Path(report["run"])).model()
    for target, against, words in zip(told["target"], told["against"], told["explained"], strict=True):
        assert words.startswith(model.name(target) + (f" less {model.name(against)}" if against >= 0 else ""))
        assert (" after position " in words) == (len(model.outputs) == 2)


@pytest.mark.slow
def test_the_terminal_names_the_outputs_that_are_explained(command, parent, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that no row is broken
    methods = "[logit_lens,{direct_logit: {against: y}},{patching: {corrupt: abd, against: y}},{path_patching: {corrupt: abd, against: null}}]"
    out = tmp_path / "out"
    told = command("explain", f"run={parent('gpt')}", f"method={methods}", "prompt=abc", "target=x", "figures=false", f"out={out}")
    assert told.code == 0, told.err
    rows = [line for line in told.out.splitlines() if line.startswith("'abc' ")]
    alone, less = "'x' after position 2", "'x' less 'y' after position 2"
    for row, words in zip(rows, (alone, less, less, alone), strict=True):
        assert f"{row.split('  ', 1)[1].strip()}  ".startswith(f"{words}  "), row
    for line in told.out.splitlines():
        assert not {"target", "position", "against"} & set(line.split()) or line.startswith("'abc'")
    report = json.loads((out / "explanation.json").read_text())
    assert [each["explained"] for each in report["methods"]] == [[alone], [less], [less], [alone]]
    assert f"explained {less}" in page(out).words


def drawn(run, count):
    """A batch of random inputs as the run reads them."""
    random, spec = np.random.RandomState(0), run.spec
    (field,) = {"image", "features", "audio", "tokens"} & set(spec["fields"])
    shape = (count, *spec["fields"][field]["shape"])
    if field == "tokens":
        return {"tokens": random.randint(0, spec["vocabulary"], shape).astype(np.int32), "mask": np.ones(shape, bool)}
    return {field: random.standard_normal(shape).astype(np.float32), "mask": np.ones(count, bool)}


def test_one_method_leaves_a_page_pictures_arrays_and_numbers(explain, parent):
    folder, report = explain("cnn", "method=integrated_gradients", "method.points=8", "index=0,2", "data.split=validation")
    (told,) = report["methods"]
    assert (told["method"], told["settings"]["points"], told["examples"]) == ("integrated_gradients", 8, ["validation 0", "validation 2"])
    assert len(told["completeness_delta"]) == len(told["output"]) == 2
    with np.load(folder / "integrated_gradients.npz") as arrays:
        assert arrays["values"].shape == (2, 8, 8, 1)
        np.testing.assert_allclose(arrays["delta"], told["completeness_delta"])
        np.testing.assert_allclose(arrays["target"][:, -1], told["target"])
    logits = Run(parent("cnn")).predict(Run(parent("cnn")).dataset().splits["validation"].take(np.array([0, 2])) | {"mask": np.ones(2, bool)})
    np.testing.assert_allclose(told["output"], logits["logits"].max(-1), rtol=1e-5)
    for i in range(2):
        with Image.open(folder / f"integrated_gradients_{i}.png") as picture:
            assert picture.size[0] > 500
    assert sorted(path.name for path in folder.iterdir()) == [
        *("explanation.html", "explanation.json", "integrated_gradients.npz", "integrated_gradients_0.png", "integrated_gradients_1.png")
    ]
    seen = page(folder)
    assert [tag for tag, _ in seen.elements if tag in ("script", "link", "iframe", "object")] == []
    sources = [attributes["src"] for tag, attributes in seen.elements if tag == "img"]
    assert len(sources) == 4  # each example as it is, and its map
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "validation 2" in seen.words
    assert "completeness delta" in seen.words


def test_several_methods_stand_side_by_side(explain):
    folder, report = explain("mlp", f"method=[saliency,{POINTS}]", "index=[1]", "figures=false")
    assert [told["method"] for told in report["methods"]] == ["saliency", "integrated_gradients"]
    assert report["methods"][1]["settings"]["points"] == 8
    assert not list(folder.glob("*.png"))
    assert len([tag for tag, _ in page(folder).elements if tag == "img"]) == 3


def test_a_text_is_coloured_token_by_token(explain, parent):
    prompt = "if <b>: a, b"
    assert Run(parent("gpt")).config.model.scan  # blocks are taken apart, whatever they were in training
    folder, report = explain("gpt", f"method=[saliency,{POINTS}]", f"prompt={prompt}", "target=x", "position=-2", "figures=false")
    for told in report["methods"]:
        assert told["explained"] == ["'x' after position 10"]
    seen = page(folder)
    spans = [attributes for tag, attributes in seen.elements if tag == "span"]
    assert len(spans) == 2 * len(prompt)
    with np.load(folder / "saliency.npz") as arrays:
        assert [float(span["title"]) for span in spans[: len(prompt)]] == pytest.approx(arrays["values"][0], rel=1e-3)
        assert arrays["values"][0, 11] == 0.0  # it comes after the place that is asked about
    assert prompt in seen.words
    assert "b" not in {tag for tag, _ in seen.elements}


def test_the_terminal_tells_what_is_explained_and_takes_brackets_as_they_are(command, parent, tmp_path):
    argv = ("method=[saliency,induction_score]", "prompt='[/b]: a, b'", "target=x", f"out={tmp_path / 'out'}", "figures=false")
    told = command("explain", f"run={parent('gpt')}", *argv)
    assert told.code == 0, told.err
    assert "'[/b]: a, b'  'x' after position 9" in told.out
    assert "saliency: 1 example\ninduction_score: the model as a whole\n" in told.out
    assert "induction score" not in told.out  # no table: its numbers are of no example


def test_values_that_should_add_up_and_do_not_are_warned_of(command, parent, tmp_path):
    argv = (f"run={parent('gpt')}", "prompt=abc", f"out={tmp_path / 'out'}", "figures=false")
    words = "the values of 'abc' miss the output's change, "
    told = command("explain", *argv, "method=integrated_gradients", "method.points=1", "method.baseline=1e-3")
    assert any(words in line and line.endswith("more points come closer") for line in told.err), told.err
    assert words in page(tmp_path / "out").words
    assert not any(words in line for line in command("explain", *argv, "method=shap").err)


def test_a_table_has_names_and_they_are_only_text(explain, table, tmp_path):
    (tmp_path / "new.csv").write_text(f"weight,{ODD},height,age\n1,2,3,4\n4,3,2,1\n")
    folder, report = explain(table, "method=input_x_gradient", f"input={tmp_path / 'new.csv'}", "target=perhaps")
    assert report["methods"][0]["explained"] == ["perhaps"] * 2
    assert report["methods"][0]["target"] == [list(Run(table).preprocessor.classes).index("perhaps")] * 2
    folder, _ = explain(table, "method=saliency", f"input={tmp_path / 'new.csv'}", f"target='{ODD}'")
    seen = page(folder)
    assert "script" not in {tag for tag, _ in seen.elements}
    assert any(ODD in attributes.get("alt", "") for tag, attributes in seen.elements if tag == "img")


def test_a_picture_from_a_file(explain, tmp_path):
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8), np.uint8)).save(tmp_path / "<i>photo.png")
    folder, report = explain("mlp", "method=saliency", f"input={tmp_path / '<i>photo.png'}", "target=7", "figures=false")
    assert (report["methods"][0]["examples"], report["methods"][0]["target"]) == (["<i>photo.png"], [7])
    assert "<i>photo.png" in page(folder).words


def test_a_regression_explains_its_first_output(explain, command, tmp_path):
    quiet = ("logger.progress=none", "logger.figures=false", "logger.tensorboard=false")
    argv = ("data=random_regression", "data.outputs=2", "model=mlp", "model.width=8", "objective=regress", "train.steps=2")
    assert command("train", *argv, *quiet, f"run_dir={tmp_path / 'run'}").code == 0
    _, report = explain(tmp_path / "run", f"method=[{POINTS}]", "index=0,1", "figures=false")
    assert report["methods"][0]["target"] == [0, 0]
    assert np.abs(report["methods"][0]["completeness_delta"]).max() < 1e-2


@pytest.mark.parametrize(("method", "more"), [("quantize/int8", ()), pytest.param("lora", ("finetune.steps=2",), marks=pytest.mark.slow)])
def test_a_compressed_run_is_explained_as_any_other(method, more, explain, command, parent, tmp_path):
    little = ("calibration.examples=32", "calibration.batch=16", "ledger.latency=false", "ledger.figures=false")
    small = tmp_path / "small"
    told = command("compress", f"run={parent('mlp')}", f"run_dir={small}", f"method={method}", *little, *more)
    assert told.code == 0, told.err
    _, report = explain(small, f"method=[saliency,{POINTS}]", "index=0", "figures=false")
    logits = Run(small).predict(Run(small).dataset().splits["test"].take(np.array([0])) | {"mask": np.ones(1, bool)})["logits"]
    assert report["methods"][0]["output"] == pytest.approx([logits.max()], rel=1e-4)
    assert abs(report["methods"][1]["completeness_delta"][0]) < 0.05


def test_the_same_command_has_the_same_folder_and_leaves_the_run_as_it_was(command, parent, snapshot):
    before = snapshot(parent("mlp"))
    folders = set()
    for argv in (("method=saliency", "index=0"), ("method=saliency", "index=0"), ("method=saliency", "index=1"), ("method=[saliency]", "index=0")):
        told = command("explain", f"run={parent('mlp')}", "figures=false", *argv)
        assert told.code == 0, told.err
        folders.add(pathlib.Path(told.out.splitlines()[-1].removeprefix("wrote ")).parent)
    assert {folder.parent for folder in folders} == {parent("mlp") / "explanations"}
    assert len(folders) == 2
    after = snapshot(parent("mlp"))
    assert {name: digest for name, digest in after.items() if not name.startswith("explanations/")} == before


def test_examples_share_a_program_and_the_next_batch_of_the_shape_too(parent):
    run = Run(parent("mlp"))
    run.explain("saliency", drawn(run, 4))
    before = gradient._slope._cache_size()
    for target in (None, 3, [0, 1, 2, 3]):
        run.explain("saliency", drawn(run, 4), target)
    assert gradient._slope._cache_size() == before


def test_what_one_method_found_is_kept_when_another_fails(command, parent, tmp_path, monkeypatch):
    def fail(self, model, examples, key):
        raise ValueError("no such luck")

    monkeypatch.setattr(gradient.InputXGradient, "__call__", fail)
    told = command("explain", f"run={parent('mlp')}", f"out={tmp_path}", "method=[input_x_gradient,saliency]", "index=0", "figures=false")
    assert told.code == 1
    assert "no such luck" in told.err[-1]
    report = json.loads((tmp_path / "explanation.json").read_text())
    assert report["failed"] == {"input_x_gradient": "no such luck"}
    assert [told["method"] for told in report["methods"]] == ["saliency"]


def test_help_tells_the_methods_of_each_verb(command):
    assert "\n  integrated_gradients " in command("explain", "--help").out
    assert "prune/wanda" not in command("explain", "--help").out
    assert "\n  prune/wanda " in command("compress", "--help").out
    assert "integrated_gradients" not in command("compress", "--help").out


def test_an_attribution_is_shown_in_a_notebook(parent):
    run = Run(parent("mlp"))
    result = run.explain("saliency", drawn(run, 2), target=["3", 4], names=["first", "second"])
    assert [result.explained(i) for i in range(2)] == ["3", "4"]
    figure = result.show(1)
    assert figure.get_suptitle() == "second"


LONG = "prompt=" + 17 * "a"
BAD = {
    "no method": ("mlp", ("index=0",), "give method=NAME or method=[NAME,NAME]; there are: "),
    "an unknown method": ("mlp", ("method=salienzy", "index=0"), "there is no method 'salienzy'; did you mean 'saliency'?"),
    "an unknown method in a list": ("mlp", ("method=[saliency,salienzy]", "index=0"), "method=salienzy explains nothing; did you mean 'saliency'?"),
    "a method that compresses": (
        "mlp",
        ("method=prune/wanda", "index=0"),
        "method=prune/wanda explains nothing: it compresses, see research.compress",
    ),
    "an unknown setting": (
        "mlp",
        ("method=[{saliency: {absolut: false}}]", "index=0"),
        "saliency has no setting 'absolut'; did you mean 'absolute'?",
    ),
    "a method twice": ("mlp", ("method=[saliency,{saliency: {absolute: false}}]", "index=0"), "method: saliency is listed twice"),
    "an empty list": ("mlp", ("method=[]", "index=0"), "method=[] lists no method; there are: "),
    "nothing to smooth": ("mlp", ("method=smooth_grad", "method.method=counterfactual", "index=0"), "counterfactual gives no number for each part"),
    "a judge that is no yes or no": ("mlp", ("method=saliency", "index=0", "judge=maybe"), "judge='maybe': must be true or false"),
    "a seed that is no number": ("mlp", ("method=saliency", "index=0", "seed=one"), "seed='one': must be a whole number of at least 0"),
    "a position that is no number": ("gpt", ("method=saliency", "prompt=abc", "position=last"), "position='last': must be a whole number"),
    "a wrong setting": ("mlp", ("method=integrated_gradients", "method.points=0", "index=0"), "points=0 must be at least 1"),
    "an unknown tap": ("mlp", ("method=saliency", "method.at=inputt", "index=0"), "'inputt' is no tap of this model; did you mean 'input'?"),
    "a method that does not fit": ("mlp", ("method=grad_cam", "index=0"), "method=grad_cam does not fit this run: "),
    "one of several that does not fit": ("mlp", ("method=[saliency,grad_cam]", "index=0"), "method=grad_cam does not fit this run: "),
    "nothing to explain": ("mlp", ("method=saliency",), "method=saliency explains examples: give input=PATH, index=NUMBERS"),
    "two things": ("mlp", ("method=saliency", "index=0", "input=x.png"), "input and index are both given"),
    "a class out of range": ("mlp", ("method=saliency", "index=0", "target=10"), "target=10: this model has the outputs 0 to 9"),
    "a class misspelt": (
        "table",
        ("method=saliency", "index=0", "target=perhabs"),
        "target='perhabs' is no class of this run; did you mean 'perhaps'?",
    ),
    "an index out of range": ("mlp", ("method=saliency", "index=0,100000"), "index=100000: the test split has the examples 0 to "),
    "an index that is no number": ("mlp", ("method=saliency", "index=first"), "index=first: the test split has the examples 0 to "),
    "a split": ("mlp", ("method=saliency", "index=0", "data.split=tests"), "data.split='tests': the run's data has "),
    "a position without positions": ("mlp", ("method=saliency", "index=0", "position=1"), "position=1: this model has one output an example"),
    "a text for images": ("mlp", ("method=saliency", "prompt=hello"), "prompt: this run reads no text"),
    "pictures of another size": (
        "mlp",
        ("method=saliency", "input={folder}/big.npz"),
        "image is uint8[1, 9, 8, 1], and the model reads uint8[n, 8, 8, 1]",
    ),
    "a missing file": ("mlp", ("method=saliency", "input={folder}/none.png"), "none.png"),
    "an empty prompt": ("gpt", ("method=saliency", "prompt=''"), "prompt is empty: there is nothing to explain"),
    "a long prompt": ("gpt", ("method=saliency", LONG), "a text of 17 tokens: this model reads 1 to 16"),
    "a position out of range": ("gpt", ("method=saliency", "prompt=abc", "position=3"), "position=3: the text has 3 tokens, 0 to 2"),
    "a token that is none": ("gpt", ("method=saliency", "prompt=abc", "target=xyz"), "target='xyz' is no token of this run"),
    "a prompt and an input": ("gpt", ("method=saliency", "prompt=abc", "input=x.png"), "input and prompt are both given"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line_and_nothing_computed(case, command, parent, table, tmp_path, monkeypatch):
    def never(*arguments):
        raise AssertionError("it was computed before all was checked")

    monkeypatch.setattr("research.explanation.methods.apply", never)
    np.savez(tmp_path / "big.npz", image=np.zeros((1, 9, 8, 1), np.uint8))
    family, argv, message = BAD[case]
    argv = [argument.replace("{folder}", str(tmp_path)) for argument in argv]
    told = command("explain", f"run={table if family == 'table' else parent(family)}", f"out={tmp_path / 'out'}", *argv)
    assert told.code in (1, 2), told
    assert len([line for line in told.err if line.startswith("error: ")]) == 1, told.err
    assert message in told.err[-1]
    assert not (tmp_path / "out").exists()


def test_a_method_that_does_not_fit_names_those_that_do(command, parent, tmp_path):
    told = command("explain", f"run={parent('mlp')}", f"out={tmp_path / 'out'}", "method=grad_cam", "index=0")
    fitting = told.err[-1].partition("these do: ")[2].split(", ")
    assert {"saliency", "integrated_gradients"} <= set(fitting)
    assert not {"grad_cam", "guided_grad_cam", "prune/wanda", "lora"} & set(fitting)


@pytest.mark.parametrize("argv", [("method=saliency",), ("pipeline=[quantize/int8,saliency]",)])
def test_compress_refuses_what_explains(argv, command, parent, tmp_path):
    told = command("compress", f"run={parent('mlp')}", f"run_dir={tmp_path / 'small'}", *argv)
    assert told.code == 2
    assert "method=saliency makes no smaller model: it explains, see research.explain" in told.err[-1]
    assert not (tmp_path / "small").exists()


def test_an_image_of_another_size_is_fitted_and_that_is_said(command, parent, tmp_path):
    Image.fromarray(np.full((20, 12), 128, np.uint8)).save(tmp_path / "large.png")
    argv = (f"run={parent('cnn')}", "method=saliency", f"input={tmp_path / 'large.png'}", f"out={tmp_path / 'out'}", "figures=false")
    told = command("explain", *argv)
    assert told.code == 0, told.err
    assert "large.png has 20 x 12 pixels; what is explained is fitted to the model's 8 x 8" in told.out


def test_what_was_explained_is_kept_when_the_judge_is_interrupted(command, parent, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("research.explain.Judge.__call__", interrupted)
    told = command("explain", f"run={parent('mlp')}", "method=saliency", "index=0", "judge=true", f"out={tmp_path / 'out'}", "figures=false")
    assert told.code == 75
    assert (tmp_path / "out" / "explanation.json").exists()
    assert (tmp_path / "out" / "saliency.npz").exists()
