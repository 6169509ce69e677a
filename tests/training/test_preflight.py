"""What a step will need, told before it runs, against what can be counted by hand."""

import jax
import pytest
from omegaconf import open_dict

import research
from research.core.errors import ConfigError
from research.core.spec import abstract_batch, fields
from research.training.assembly import assemble
from research.training.preflight import abstract_state, check_memory, preflight, probe, residual_bytes

ROWS = {"outputs": 3, "fields": fields(features=((16,), "float32"), label=((), "int32"))}
TEXT = {"vocabulary": 48, "time": 32, "bytes_per_token": 1.0, "fields": fields(mask=(32,), tokens=((32,), "int32"), target=((32,), "int32"))}
MLP = ("data=digits", "model=mlp", "model.width=64", "model.depth=2", "optimizer=adamw", "train.steps=10")
GPT = (
    "data=python_docs",
    "data.time=32",
    "model=gpt",
    "objective=language_model",
    "model.width=32",
    "model.depth=4",
    "model.heads=4",
    "train.steps=10",
)


def assembled(spec, *overrides):
    config = research.compose(list(overrides))
    with open_dict(config):
        config.data.spec = dict(spec)
    return assemble(config, batches=1)


def test_the_state_is_counted_part_by_part_and_cut_as_the_mesh_says():
    parameters = 16 * 64 + 64 + 64 * 64 + 64 + 64 * 3 + 3
    told = preflight(assembled(ROWS, *MLP), 32)
    assert told["params_bytes"] == told["gradient_bytes_per_device"] == 4 * parameters
    assert told["opt_bytes"] == pytest.approx(8 * parameters, abs=64)  # two moments, and counters
    far = preflight(assembled(TEXT, *GPT, "model.width=512", "model.hidden=2048", "parallel=mesh", "parallel.data=2", "parallel.fsdp=8"), 32)
    near = preflight(assembled(TEXT, *GPT, "model.width=512", "model.hidden=2048"), 32)
    assert far["devices"] == 16  # of which this machine has one
    assert far["state_bytes"] == near["state_bytes"]
    assert far["state_bytes_per_device"] == pytest.approx(near["state_bytes_per_device"] / 8, rel=0.02)
    assert far["activation_bytes_per_example"] == near["activation_bytes_per_example"]
    assert near["activation_bytes_per_device"] - far["activation_bytes_per_device"] == (32 - 2) * near["activation_bytes_per_example"]


def test_what_fits_is_what_memory_leaves():
    assembly = assembled(TEXT, *GPT)
    told = preflight(assembly, 8, memory=100_000_000)
    fixed = told["state_bytes_per_device"] + told["gradient_bytes_per_device"]
    each = told["activation_bytes_per_example"]
    assert told["largest_microbatch"] == pytest.approx((100_000_000 - fixed) / each, abs=1.5)
    assert preflight(assembly, 8, memory=told["state_bytes"])["largest_microbatch"] == 0
    cut = preflight(assembled(TEXT, *GPT, "train.accumulate=4"), 8, memory=100_000_000)
    assert cut["activation_bytes_per_device"] == pytest.approx(told["activation_bytes_per_device"] / 4, rel=0.1)


def test_what_is_kept_is_that_of_the_batch_that_is_asked_for():
    spec = {"outputs": 3, "fields": fields(image=((80, 80, 3), "float32"), label=((), "int32"))}
    assembly = assembled(spec, "data=digits", "model=resnet18", "model.blocks=[1,1]", "model.channels=[8,16]", "train.steps=10")
    told = preflight(assembly, 8)  # one image's windows are kept, those of several are read again
    kept = residual_bytes(assembly.step.objective, abstract_state(assembly), None, abstract_batch(spec, 8))
    assert told["activation_bytes_per_device"] == pytest.approx(kept, rel=0.01)
    assert 0 < told["activation_bytes_per_example"] < kept / 4
    assert 8 < told["largest_microbatch"] < told["memory_bytes"] / (80 * 80 * 8 * 4)


@pytest.mark.parametrize("scan", [pytest.param("true", marks=pytest.mark.slow), "false"])
def test_recomputing_keeps_one_vector_a_block_and_token(scan):
    def kept(rows, *more):
        assembly = assembled(TEXT, *GPT, f"model.scan={scan}", *more)
        return residual_bytes(assembly.step.objective, abstract_state(assembly), None, abstract_batch(TEXT, rows))

    full = kept(2, "model.remat=full") - kept(1, "model.remat=full")
    deeper = kept(2, "model.remat=full", "model.depth=8") - kept(1, "model.remat=full", "model.depth=8")
    assert deeper - full == pytest.approx(4 * 32 * 32 * 4, rel=0.01)  # four blocks more, tokens x width x bytes
    assert kept(2) - kept(1) > 3 * full


def test_a_probe_runs_the_step_and_knows_its_memory():
    told = probe(assembled(ROWS, *MLP), 32)
    assert told["ms_per_step"] > 0
    assert told["temporary_bytes"] > 4 * 32 * 64  # at least one hidden layer


def test_memory_is_a_number_of_bytes():
    check_memory(None)
    check_memory(1)
    for wrong in ("80GB", 0, True, 1.5):
        with pytest.raises(ConfigError, match=f"memory={wrong!r}: must be a number of bytes"):
            check_memory(wrong)


def test_a_mesh_that_is_not_here_can_be_looked_at_but_not_probed():
    assembly = assembled(ROWS, *MLP, "parallel=fsdp", "parallel.fsdp=4")
    assert preflight(assembly, 32)["devices"] == 4
    assert jax.device_count() == 1
    with pytest.raises(ConfigError, match="fsdp 4 needs 4 devices, and there is 1"):
        probe(assembly, 32)
