"""Compress as a person calls it: every method makes a run of a run, which every verb takes."""

import json

import numpy as np
import pytest

from research import Run
from research.core.config import read_config
from research.core.tree import paths, sha256
from research.training.checkpoint import Checkpoints

LITTLE = ("calibration.examples=32", "calibration.batch=16", "ledger.latency=false", "ledger.figures=false")
METHODS = {
    "prune/magnitude": (),
    "prune/sparsegpt": (),
    "prune/structured": ("method.multiple=1", "finetune.steps=2"),
    "quantize/int8": (),
    "quantize/gptq": (),
    "distill": ("finetune.steps=2",),
    "lora": ("finetune.steps=2",),
}
AWARE = "pipeline=[{quantize/qat:{format:int4,finetune:{steps:4}}},{quantize/nearest:{format:int4}}]"


@pytest.fixture
def compress(command, parent, tmp_path):
    """compress("mlp", "method=…"): the folder of the compressed run, and its ledger."""

    def call(family, *argv, folder=tmp_path / "small"):
        told = command("compress", f"run={parent(family)}", f"run_dir={folder}", *LITTLE, *argv)
        assert told.code == 0, told.err
        return folder, json.loads((folder / "compression.json").read_text())

    return call


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cnn", "gpt"))])
def test_the_contract_of_a_family(family, method, compress, command, parent):
    """The result is a run that describes itself: read by its own config, scored, used for prediction, with its descent."""
    folder, report = compress(family, f"method={method}", *METHODS[method])
    small = Run(folder)
    assert small.config.compression[-1].method == method
    assert small.config.compression[-1].parent.run == str(parent(family))
    assert small.result["status"] == "finished"
    assert command("evaluate", f"run={folder}", "figures=false").code == 0
    scores = json.loads((folder / "evaluation.json").read_text())["metrics"]
    for name, row in report["metrics"].items():
        assert row["after"][0] == pytest.approx(scores[f"{report['split']}/{name}"], rel=1e-4)
    if family == "gpt":
        assert len(small.generate("The ", tokens=8, temperature=0.0)) == 12


def test_zeros_survive_fine_tuning(compress):
    folder, report = compress("mlp", "method=prune/magnitude", "method.sparsity=0.75", "finetune.steps=6")
    kernel = np.asarray(Run(folder).state("latest").params["dense_0"]["kernel"])
    assert (kernel == 0).mean() == pytest.approx(0.75, abs=0.01)
    assert Run(folder).state("latest").step == 6
    assert report["sizes"]["after"]["bytes"] < 0.5 * report["sizes"]["before"]["bytes"]


def test_a_chain_makes_a_run_of_each_stage(compress):
    folder, report = compress("mlp", "pipeline=[{prune/structured: {multiple: 1, sparsity: 0.5}},quantize/int8]")
    assert [entry.method for entry in read_config(folder / "config.yaml").compression] == ["prune/structured", "quantize/int8"]
    assert [stage["method"] for stage in report["stages"]] == ["prune/structured", "quantize/int8"]
    assert report["sizes"]["after"]["bytes"] < 0.2 * report["sizes"]["before"]["bytes"]
    assert Run(folder / "stages" / "1_prune_structured").result["status"] == "finished"


def test_what_was_trained_with_rounding_is_rounded_without_loss(compress, command):
    folder, report = compress("mlp", AWARE)
    aware = json.loads((folder / "stages" / "1_quantize_qat" / "result.json").read_text())["metrics"]
    for name, row in report["metrics"].items():
        assert row["after"][0] == pytest.approx(aware[f"{report['split']}/{name}"], rel=1e-5)
        assert row["after"][0] != row["before"][0] or name == "accuracy"
    assert report["sizes"]["after"]["bytes_by_type"]["int4"] > report["sizes"]["after"]["bytes_by_type"]["float32"]


def test_all_is_trained_without_an_adapter_and_counted_once(compress):
    folder, report = compress("mlp", "method=lora", "method.only=[]", "method.train=['**']", "finetune.steps=2")
    assert report["sizes"]["after"]["parameters"] == report["sizes"]["before"]["parameters"]
    weights = Run(folder).weights()
    assert set(paths(weights.params)) == {f"trained/{path}" for path in paths(weights.frozen["own"])}


def test_the_same_command_goes_on_after_an_interruption(compress, parent, command, tmp_path, monkeypatch):
    argv = ("method=prune/magnitude", "finetune.steps=6")
    whole, _ = compress("mlp", *argv, folder=tmp_path / "whole")

    def killed(self, state, host, *, best):
        if int(state.step):
            raise KeyboardInterrupt
        return save(self, state, host, best=best)

    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        told = command("compress", f"run={parent('mlp')}", f"run_dir={tmp_path / 'cut'}", *LITTLE, *argv)
        assert told.code == 75, told.err
    cut, _ = compress("mlp", *argv, folder=tmp_path / "cut")
    assert sha256(Run(cut).state("latest")) == sha256(Run(whole).state("latest"))
    told = command("compress", f"run={parent('mlp')}", f"run_dir={cut}", *LITTLE, "method=prune/random", "finetune.steps=6")
    assert told.code == 2
    assert "holds another run" in told.err[-1]


def test_the_parent_is_left_as_it_is(compress, parent, snapshot):
    before = snapshot(parent("mlp"))
    compress("mlp", "method=quantize/int8")
    assert snapshot(parent("mlp")) == before


def test_other_data_of_the_same_form(compress):
    folder, _ = compress("mlp", "method=prune/magnitude", "finetune.steps=2", "data.only=[5,6]")
    config = read_config(folder / "config.yaml")
    assert list(config.data.only) == [5, 6]
    assert config.data.spec.examples.train < 400


BAD = {
    "neither method nor pipeline": ((), "give method=NAME, as method=prune/wanda, or pipeline=[NAME,NAME]"),
    "both": (("method=quantize/int8", "pipeline=[quantize/int8]"), "give method=NAME"),
    "an unknown method": (("pipeline=[prune/wand]",), "there is no method 'prune/wand'"),
    "an unknown setting": (("pipeline=[{prune/wanda: {sparsty: 0.5}}]",), "prune/wanda has no setting 'sparsty'; did you mean 'sparsity'?"),
    "sparsity": (("method=prune/magnitude", "method.sparsity=1.5"), "sparsity=1.5"),
    "a glob": (("method=prune/magnitude", "method.only=['dence_0/*']"), "'dence_0/*' fits no layer; did you mean 'dense_0/kernel'?"),
    "calibration": (("method=prune/wanda", "calibration.examples=100000"), "calibration.examples=100000: the training split has"),
    "a data key": (("method=quantize/int8", "data.rot=here"), "data.rot: the run's data has no such key; choose from: "),
    "nothing to train": (("method=lora", "method.only=[]", "finetune.steps=2"), "method.only=[]: nothing would be trained"),
    "energy": (("method=quantize/int8", "ledger.energy=FRE"), "ledger.energy="),
    "no training": (("method=lora",), "method=lora is of use only when it is trained: give finetune.steps or finetune.epochs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_written(case, command, parent, tmp_path):
    argv, message = BAD[case]
    little = [entry for entry in LITTLE if entry.partition("=")[0] not in {more.partition("=")[0] for more in argv}]
    told = command("compress", f"run={parent('mlp')}", f"run_dir={tmp_path / 'small'}", *little, *argv)
    assert told.code == 2, told
    assert message in told.err[-1]
    assert not (tmp_path / "small" / "config.yaml").exists()


def test_a_quantized_run_is_not_compressed_again(compress, command, tmp_path):
    folder, _ = compress("mlp", "method=quantize/int8")
    told = command("compress", f"run={folder}", f"run_dir={tmp_path / 'again'}", *LITTLE, "method=quantize/int8")
    assert told.code == 2
    assert "quantize" in told.err[-1]


def test_the_frozen_part_is_verified_as_a_checkpoint_is(compress, command):
    folder, _ = compress("mlp", "method=quantize/int8")
    assert any(str(leaf.dtype) == "int8" for leaf in paths(Run(folder).weights().frozen).values())
    files = [path for path in (folder / "checkpoints" / "frozen" / "state").rglob("*") if path.is_file() and path.stat().st_size]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    told = command("evaluate", f"run={folder}", "figures=false")
    assert told.code == 4
    assert f"damaged checkpoint: {folder / 'checkpoints' / 'frozen'}" in told.err[-1]
