"""Pruning: every score by hand, every pattern, layers one after another, what is refused, and a run that keeps its zeros."""

import dataclasses
import logging
import math
import pathlib

import jax
import numpy as np
import pytest

from research.compression.linear import moments
from research.compression.prune import Gradient, Iterative, Magnitude, Random, SparseGPT, Wanda, loss_gradient
from research.compression.subject import get
from research.core.build import build
from research.core.config import compose, resolved
from research.core.errors import ConfigError
from research.core.sparsity import layer_sparsities
from research.core.tree import paths
from research.training.sparsify import Gradual, Movement

METHODS = (Magnitude, Random, Gradient, Wanda, SparseGPT)
NAMES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[2] / "conf" / "method" / "prune").glob("*.yaml")
    if path.stem not in ("structured", "iterative")
)


def matrices(subject, tree=None):
    """{path: the kernel as inputs times outputs} by the axes alone."""
    found = {}
    for path, layer in subject.layers.items():
        if layer.kind != "embedding":
            kernel = np.asarray(get(subject.params if tree is None else tree, path))
            found[path] = kernel.reshape(math.prod(layer.shape[: layer.inputs]), -1)
    return found


def masks(subject, **changes):
    return {path: matrix == 0 for path, matrix in matrices(dataclasses.replace(subject, **changes)).items()}


FAMILIES = {"magnitude": "gpt", "random": "mlp", "gradient": "cnn", "wanda": "cnn", "sparsegpt": "gpt"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in ("gradient", "sparsegpt") else name for name in NAMES])
def test_every_config_prunes_a_model_to_its_share(name, subject):
    node = resolved(compose([f"method=prune/{name}", "method.sparsity=0.4"], verb="compress").method)
    method = build(node, where="method")
    settings = {field.name for field in dataclasses.fields(method)}
    assert settings == set(node) - {"_target_"}  # the file holds every setting
    dense = subject(FAMILIES[name])
    before = jax.tree.map(np.array, dense.params)
    pruned = method(dense)
    after = masks(pruned)
    assert set(pruned.notes) == set(after)
    for path, zero in after.items():
        # rounded down, but for SparseGPT's ties
        assert 0.4 - 1 / min(zero.shape) <= zero.mean() <= 0.4 + 2 / zero.size, path
        assert pruned.notes[path]["sparsity"] == pytest.approx(zero.mean())
    untouched = [path for path in paths(before) if path not in after]
    assert untouched
    for path in untouched:
        np.testing.assert_array_equal(get(pruned.params, path), get(before, path))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), pruned.params) == jax.tree.map(lambda x: (x.shape, x.dtype), dense.params)
    jax.tree.map(np.testing.assert_array_equal, dense.params, before)
    assert pruned.config["train"]["sparsify"]["_target_"] == "research.training.sparsify.Static"
    assert dense.config["train"].get("sparsify") is None


def test_magnitude_takes_the_smallest_of_each_layer_or_of_all(subject):
    dense = subject("cnn")
    for path, zero in masks(Magnitude(sparsity=0.3)(dense)).items():
        weights = np.abs(matrices(dense)[path])
        assert zero.sum() == int(zero.size * 0.3)
        assert weights[zero].max() <= weights[~zero].min()
    everywhere = masks(Magnitude(sparsity=0.3, scope="global")(dense))
    weights = {path: np.abs(matrix) for path, matrix in matrices(dense).items()}
    assert sum(zero.sum() for zero in everywhere.values()) == int(sum(zero.size for zero in everywhere.values()) * 0.3)
    gone, kept = (np.concatenate([weights[path][zero == which] for path, zero in everywhere.items()]) for which in (True, False))
    assert gone.max() <= kept.min()
    assert len({round(float(zero.mean()), 2) for zero in everywhere.values()}) > 1


def test_random_is_a_function_of_the_seed_and_the_path(subject):
    dense = subject("mlp")
    first, again, other = (masks(Random(seed=seed)(dense)) for seed in (0, 0, 1))
    alone = masks(Random(seed=0, only=("dense_1/*",))(dense))
    for path, mask in first.items():
        np.testing.assert_array_equal(mask, again[path])
        assert (mask != other[path]).any()
    np.testing.assert_array_equal(first["dense_1/kernel"], alone["dense_1/kernel"])


def test_the_gradient_is_that_of_one_batch_of_all_calibration_data_however_it_is_masked(subject):
    dense = subject("mlp")
    first, second = ({name: np.asarray(value) for name, value in batch.items()} for batch in dense.batches)
    first["mask"] = np.arange(16) < 3  # so that a mean of means is another number
    joined = {name: np.concatenate([first[name], second[name]]) for name in first}
    dense = dataclasses.replace(dense, batches=[first, second])

    @jax.jit
    def loss(params, joined):
        outputs, _ = dense.objective.predict(params, dense.extra, None, joined, None, dense.hyper)
        log_probs = jax.nn.log_softmax(outputs["logits"])[np.arange(32), joined["label"]]
        counts = joined["mask"].astype(np.float32)
        return -(log_probs * counts).sum() / counts.sum()

    expected = jax.grad(loss)(dense.params, joined)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), loss_gradient(dense), expected)
    kernel, zero = "dense_1/kernel", masks(Gradient(sparsity=0.5)(dense))["dense_1/kernel"]
    scores = np.abs(np.asarray(get(dense.params, kernel)) * np.asarray(get(expected, kernel)))
    assert scores[zero].max() <= scores[~zero].min() + 1e-7


def test_wanda_compares_weight_times_length_of_input_within_each_output(subject):
    dense = subject("cnn")
    seen = moments(dense.objective, dense.model, dense.batches)
    for path, zero in masks(Wanda(sparsity=0.6, sequential=False)(dense)).items():
        lengths = np.sqrt(np.diagonal(seen[path].gram))
        scores = np.abs(matrices(dense)[path]) * lengths[:, None]
        order = np.argsort(scores, axis=0, kind="stable")
        expected = np.zeros_like(zero)
        np.put_along_axis(expected, order[: int(len(scores) * 0.6)], True, 0)
        np.testing.assert_array_equal(zero, expected, err_msg=path)


@pytest.mark.parametrize(
    ("method", "pattern", "sparsity"),
    [
        (Magnitude, "2:4", 0.5),
        pytest.param(Random, "4:8", 0.5, marks=pytest.mark.slow),
        pytest.param(Gradient, "2:4", 0.5, marks=pytest.mark.slow),
        (Wanda, "2:8", 0.75),
        pytest.param(SparseGPT, "1:4", 0.75, marks=pytest.mark.slow),
    ],
)
def test_n_of_m_consecutive_inputs_are_kept_in_each_output(method, pattern, sparsity, subject):
    dense = subject("gpt", "model.depth=1")  # whose attention kernels have three axes
    kept, group = map(int, pattern.split(":"))
    for path, zero in masks(method(pattern=pattern, sparsity=sparsity)(dense)).items():
        counts = (~zero).reshape(-1, group, zero.shape[1]).sum(1)
        assert (counts == kept).all(), path


@pytest.mark.parametrize("method", [Random, Wanda, SparseGPT])
def test_blocks_fall_as_a_whole(method, subject):
    pruned = masks(method(pattern="block:4x2", sparsity=0.5, only=("block_*/attention/**",))(subject("gpt", "model.depth=1")))
    for path in (path for path in pruned if "attention" in path):
        tiles = pruned[path].reshape(pruned[path].shape[0] // 4, 4, -1, 2).transpose(0, 2, 1, 3).reshape(-1, 8)
        assert set(tiles.sum(1)) == {0, 8}
        assert 0.5 <= pruned[path].mean() <= 0.5 + 1 / len(tiles)


def test_a_block_is_judged_by_its_mean(subject):
    dense = subject("mlp")
    zero = masks(Magnitude(pattern="block:4x2", sparsity=0.25, only=("dense_1/*",))(dense))["dense_1/kernel"]
    means = np.abs(matrices(dense)["dense_1/kernel"]).reshape(4, 4, 12, 2).mean((1, 3))
    gone = zero.reshape(4, 4, 12, 2)[:, 0, :, 0]
    assert gone.sum() == 12
    assert means[gone].max() <= means[~gone].min()


def test_erk_takes_most_from_the_largest_layers(subject):
    dense = subject("cnn")
    shapes = {path: layer.shape for path, layer in dense.layers.items()}
    expected = layer_sparsities(shapes, 0.8, "erk")
    for path, zero in masks(Magnitude(sparsity=0.8, budget="erk")(dense)).items():
        assert zero.sum() == int(zero.size * expected[path])
    assert len(set(expected.values())) > 1


def test_later_blocks_are_judged_by_what_the_pruned_ones_pass_on(subject):
    dense = subject("gpt")
    sequential, at_once = (masks(Wanda(sparsity=0.6, sequential=flag)(dense)) for flag in (True, False))
    for path, zero in sequential.items():
        assert (zero == at_once[path]).all() == path.startswith("block_0"), path


def test_sparsegpt_errs_less_than_wanda_and_wanda_less_than_lots(subject):
    errors = []
    for method in (SparseGPT, Wanda, Random):
        notes = method(sparsity=0.6, only=("dense_1/*",))(subject("mlp")).notes
        errors.append(notes["dense_1/kernel"]["error"])
    assert errors == sorted(errors)
    assert 0 < errors[0] < errors[-1]


def test_the_noted_error_is_that_of_the_layers_product(subject):
    dense = subject("mlp")
    pruned = Magnitude(sparsity=0.5)(dense)
    x = np.concatenate([np.asarray(batch["image"]).reshape(16, -1) for batch in dense.batches])
    before, after = (matrices(each)["dense_0/kernel"] for each in (dense, pruned))
    expected = np.linalg.norm(x @ (before - after)) / np.linalg.norm(x @ before)
    assert pruned.notes["dense_0/kernel"]["error"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT])
def test_no_sparsity_changes_nothing(method, subject):
    dense = subject("mlp", "model.depth=1", "model.width=8")
    jax.tree.map(np.testing.assert_array_equal, method(sparsity=0.0)(dense).params, dense.params)


def masked(dense, rows):
    return dataclasses.replace(dense, batches=[{**batch, "mask": np.arange(16) < rows} for batch in dense.batches])


def test_little_data_is_told_and_none_refused(subject, caplog):
    few, none = (masked(subject("mlp"), rows) for rows in (2, 0))
    with caplog.at_level(logging.WARNING):
        SparseGPT()(few)
    assert "dense_0/kernel: 4 rows of calibration data are fewer than its 64 inputs" in caplog.text
    for method in (Gradient, Wanda, SparseGPT):
        with pytest.raises(ConfigError, match=r"no row of the data counts.*calibration.examples"):
            method()(none)
    assert "error" not in Magnitude()(none).notes["dense_0/kernel"]


def test_a_layer_that_lost_everything_is_told(subject, caplog):
    dense = subject("mlp")
    kernel = dense.params["dense_1"]["kernel"]
    dense = dense.replace(params={**dense.params, "dense_1": {**dense.params["dense_1"], "kernel": kernel * 1e-6}})
    Magnitude(sparsity=0.7, scope="global")(dense)
    assert "dense_1/kernel has lost all of its weights" in caplog.text


REFUSED = {
    "method.sparsity=1.0: must be in [0, 1)": {"sparsity": 1.0},
    "method.sparsity=-0.1: must be in [0, 1)": {"sparsity": -0.1},
    "method.pattern='2-4': must be unstructured, N:M as 2:4, or block:RxC as block:4x4": {"pattern": "2-4"},
    "method.pattern='4:4': keeps N of M, so N must be in [1, M), as 2:4": {"pattern": "4:4"},
    "method.pattern='block:0x4': a block has at least 1 input and 1 output": {"pattern": "block:0x4"},
    "method.sparsity=0.5: pattern=1:4 leaves 1 of 4; set 0.75": {"pattern": "1:4"},
    "method.budget=erk: pattern=2:4 takes the same share of every layer; use budget=uniform": {"pattern": "2:4", "budget": "erk"},
    "method.scope=global: pattern=2:4 takes the same share of every layer; use scope=layer": {"pattern": "2:4", "scope": "global"},
    "method.budget=erk says what each layer loses": {"budget": "erk", "scope": "global"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_make_no_sense_are_refused(message):
    with pytest.raises(ConfigError) as told:
        Magnitude(**REFUSED[message])
    assert message in str(told.value)


def test_a_block_or_damping_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"method.block=0: must be at least 1"):
        SparseGPT(block=0)
    with pytest.raises(ConfigError, match=r"method.damp=-1.0: must not be negative"):
        SparseGPT(damp=-1.0)


def test_a_hessian_that_cannot_be_inverted_is_told(subject):
    with pytest.raises(ConfigError, match=r"dense_0/kernel cannot be pruned by these inputs.*method.damp"):
        SparseGPT(damp=0.0)(masked(subject("mlp"), 2))


def test_a_pattern_that_does_not_divide_a_layer_names_it_and_what_would(subject):
    dense = subject("cnn")  # conv_0 has 3 x 3 x 1 inputs
    with pytest.raises(ConfigError, match=r"conv_0/kernel has 9 inputs, which 4 does not divide \(the nearest number that does is 3\)"):
        Magnitude(pattern="2:4")(dense)
    with pytest.raises(ConfigError, match=r"head/kernel has 5 outputs, which 2 does not divide \(the nearest number that does is 1\)"):
        Magnitude(pattern="block:1x2")(dense)
    pruned = masks(Magnitude(pattern="2:4", partial=True)(dense))
    assert {path for path, zero in pruned.items() if zero.any()} == set(pruned) - {"conv_0/kernel"}
    with pytest.raises(ConfigError, match="'2:4' fits none of the layers"):
        Magnitude(pattern="2:4", partial=True, only=("conv_0/*",))(dense)


def test_globs_choose_and_one_that_fits_nothing_is_refused(subject):
    dense = subject("mlp")
    pruned = masks(Wanda(skip=("head/*",))(dense))
    assert not pruned["head/kernel"].any()
    with pytest.raises(ConfigError, match=r"method.only: 'dnse_1/kernel' fits no layer; did you mean 'dense_1/kernel'?"):
        Wanda(only=("dnse_1/kernel",))(dense)


def test_a_model_whose_kernels_are_no_parameters_is_refused(subject):
    dense = subject("mlp")
    bare = dataclasses.replace(dense, params={name: {"bias": layer["bias"]} for name, layer in dense.params.items()})
    bare.__dict__["layers"] = dense.layers  # a wrapper knows its layers whatever became of their kernels
    with pytest.raises(ConfigError, match="dense_0/kernel is no parameter of Classify: prune before the weights change their form"):
        Magnitude()(bare)


@pytest.mark.parametrize(("score", "rule"), [("magnitude", Gradual), ("movement", Movement)])
def test_the_iterative_method_leaves_the_weights_and_says_how_they_are_trained(score, rule, subject):
    node = resolved(compose(["method=prune/iterative", f"method.score={score}", "method.skip=[head/kernel]"], verb="compress").method)
    method = build(node, where="method")
    assert {field.name for field in dataclasses.fields(method)} == set(node) - {"_target_"}
    assert method.trains
    dense = subject("mlp")
    changed = method(dense)
    jax.tree.map(np.testing.assert_array_equal, changed.params, dense.params)
    assert build(changed.config["train"], where="train").sparsify == rule(skip=("head/kernel",))
    with pytest.raises(ConfigError, match=r"method\.only: 'haed/kernel' fits no layer"):
        Iterative(only=("haed/kernel",))(dense)
    with pytest.raises(ConfigError, match=r"method\.sparsity=1\.0: must be in"):
        Iterative(sparsity=1.0)


def test_methods_are_equal_by_content_and_need_no_training():
    for method in METHODS:
        assert hash(method()) == hash(method())
        assert method() == method() != method(sparsity=0.6)
        assert not method.trains
