"""The ledger against hand counts, exact means and a closed form of the bootstrap."""

import contextlib
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from research.compression import ledger
from research.compression.adapt import Adapt
from research.core import cost
from research.core.tree import paths, sha256


def array(*values, dtype=jnp.float32):
    return jnp.asarray(values, dtype)


def test_bytes_follow_the_bits_of_each_type():
    params = {"kernel": jnp.ones((6, 4), jnp.int4), "scale": jnp.ones((4,), jnp.float32)}
    extra, frozen = {"mean": jnp.ones((4,), jnp.bfloat16)}, {"base": jnp.ones((3, 8), jnp.float8_e4m3fn), "keep": jnp.ones((16,), jnp.bool_)}
    found = ledger.sizes((params, extra, frozen))
    assert found["bytes"] == 12 + 16 + 8 + 24 + 2
    assert found["bytes_by_type"] == {"int4": 12, "float32": 16, "bfloat16": 8, "float8_e4m3fn": 24, "bool": 2}
    assert found["parameters"] == found["nonzeros"] == 24 + 4 + 4 + 24 + 16
    assert found["bytes_by_form"] == {"dense": found["bytes"]}


@pytest.mark.parametrize(
    ("kept", "form", "bits"),
    [(1024, "dense", 1024 * 32), (1000, "dense", 1024 * 32), (512, "mask", 512 * 32 + 1024), (10, "places", 10 * (32 + 10)), (0, "places", 0)],
)
def test_a_sparse_array_is_counted_in_its_smallest_form(kept, form, bits):
    kernel = np.zeros(1024, np.float32)
    kernel[np.random.RandomState(0).permutation(1024)[:kept]] = 0.5
    found = ledger.sizes({"kernel": jnp.asarray(kernel.reshape(32, 32))})
    assert found["bytes_by_form"] == {form: -(-bits // 8)}
    assert found["nonzeros"] == kept


def test_a_vector_of_zeros_is_no_sparse_model():
    assert ledger.sizes({"bias": jnp.zeros(100)})["bytes"] == 400


def test_originals_that_no_prediction_reads_are_not_counted(subject):
    base = subject("mlp")
    whole = ledger.needed(base.objective, base.model, base.batches[0])
    assert sha256(whole["params"]) == sha256(base.params)
    changed = Adapt(rank=2, train=("head/**",))(base)
    found = paths(ledger.needed(changed.objective, changed.model, changed.batches[0]))
    every = paths(dict(zip(("params", "extra", "frozen"), changed.model[:3], strict=True)))
    assert set(every) - set(found) == {"frozen/own/head/kernel", "frozen/own/head/bias"}
    adapters = sum(leaf.size for leaf in jax.tree.leaves(changed.params["adapters"]))
    assert ledger.sizes(found)["parameters"] == ledger.sizes(whole)["parameters"] + adapters


def test_bytes_on_disk_are_those_of_all_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one").write_bytes(b"12345")
    (tmp_path / "two").write_bytes(b"123")
    assert ledger.disk_bytes(tmp_path) == 8


@pytest.mark.parametrize("family", ["mlp", "gpt"])
def test_scores_of_single_examples_add_up_to_those_of_the_split(subject, family):
    made = subject(family)
    counts = np.arange(16) < 13

    def with_padding(batch):
        keep = counts.reshape(16, *[1] * (batch["mask"].ndim - 1))
        return jax.tree.map(jnp.asarray, {**batch, "mask": batch["mask"] & keep})

    padded = [with_padding(batch) for batch in made.batches]
    found = ledger.scores(made.objective, made.model, padded)

    @jax.jit
    def sums(batch):
        return made.objective(*made.model[:3], batch, None, made.hyper, train=False)[0].metrics

    together = [sums(batch) for batch in padded]
    for name, (total, weight) in found.items():
        assert len(total) == len(weight) == 26
        assert total.sum() == pytest.approx(sum(float(part[name][0]) for part in together), rel=1e-5)
        assert weight.sum() == pytest.approx(sum(float(part[name][1]) for part in together), rel=1e-6)
    once = 16 * cost.flops_per_example(made.objective, made.model, padded[0])
    assert cost.flops(functools.partial(ledger._score, made.objective), *made.model, padded[0]) == once  # the model runs once for all examples
    alone = jax.tree.map(lambda x: x[4:5], padded[0])
    loss, weight = sums(alone)["loss"]
    assert found["loss"][0][4] == pytest.approx(float(loss), rel=1e-5)
    assert found["loss"][1][4] == float(weight)


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    x = np.random.RandomState(0).exponential(size=2000)
    value, low, high = ledger.interval({"loss": (x, np.ones(2000))}, "loss")
    error = x.std() / 2000**0.5
    assert value == pytest.approx(x.mean())
    assert [low, high] == pytest.approx([x.mean() - 1.96 * error, x.mean() + 1.96 * error], abs=0.15 * error)


def test_a_change_is_paired_and_weighted():
    random = np.random.RandomState(0)
    weight = random.randint(1, 9, 500).astype(np.float64)
    before = {"loss": (10 * random.rand(500) * weight, weight)}
    after = {"loss": (before["loss"][0] + 0.5 * weight, weight)}
    row = ledger.metrics(before, after)["loss"]
    assert row["change"] == pytest.approx((0.5, 0.5, 0.5))  # every example is worse by just as much, however wide the spread
    assert row["before"][2] - row["before"][1] > 0.3
    assert row["after"][0] == pytest.approx(after["loss"][0].sum() / weight.sum())
    assert row["examples"] == 500


@dataclasses.dataclass(frozen=True)
class Sleeper:
    """An objective whose predictions take as long as one says."""

    seconds: float

    def predict(self, params, extra, frozen, batch, key, hyper, *, edits=None):
        def wait(x):
            time.sleep(self.seconds)
            return x

        x = jax.pure_callback(wait, jax.ShapeDtypeStruct(batch["x"].shape, jnp.float32), batch["x"] @ params)
        return {"value": x}, {}


def test_latency_is_what_a_program_takes(monkeypatch):
    monkeypatch.setattr(ledger, "ROUNDS", 5)
    model, batch = (jnp.eye(2), {}, None, {}), {"x": np.ones((4, 2), np.float32), "mask": np.ones(4, bool)}
    found = ledger.costs((Sleeper(0.012), model), (Sleeper(0.006), model), batch)
    assert found["flops_per_example"] == {"before": 8, "after": 8}
    assert list(found["latency"]) == ["1", "4"]
    for row in found["latency"].values():
        middle, low, high = row["speedup"]
        assert low <= middle <= high
        assert 1.2 < middle < 2.5
        assert 12 <= row["before"]["median_ms"] <= row["before"]["p95_ms"]
        assert row["after"]["median_ms"] >= 6
    assert found["latency"]["4"]["before"]["examples_per_s"] == pytest.approx(4000 / found["latency"]["4"]["before"]["median_ms"])


def test_energy_is_what_was_used_while_a_model_ran_over_its_examples(monkeypatch):
    spent = []

    @contextlib.contextmanager
    def measured(country, where):
        before, used = sum(spent), {}
        yield used
        used |= {"energy_kwh": (sum(spent) - before) / 3.6e6, "energy_method": f"a count, {country}"}

    monkeypatch.setattr(ledger, "measured", measured)
    monkeypatch.setattr(ledger, "program", lambda joules, model, batch: lambda: spent.append(joules))
    monkeypatch.setattr(ledger, "SECONDS", 0.01)
    batch = {"mask": np.ones(4, bool)}
    found = ledger.energy((3.0, None), (1.0, None), batch, "FRA")
    assert found == {"rows": 4, "before": pytest.approx(3 / 4), "after": pytest.approx(1 / 4), "method": "a count, FRA"}


def report(**more):
    sizes = {"parameters": 100, "nonzeros": 100, "bytes": 400, "bytes_by_type": {"float32": 400}, "bytes_by_form": {"dense": 400}}
    small = {"parameters": 100, "nonzeros": 50, "bytes": 212, "bytes_by_type": {"float32": 212}, "bytes_by_form": {"mask": 212}}
    row = {"before": [0.9, 0.8, 1.0], "after": [0.8, 0.7, 0.9], "change": [-0.1, -0.2, 0.0], "examples": 1234}
    return {"method": "prune/wanda", "split": "test", "metrics": {"accuracy": row}, "sizes": {"before": sizes, "after": small}, **more}


def shown(content, width=200):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(*ledger.tables(content), sep="\n")
    return capture.get()


def test_the_tables_show_what_was_measured_and_nothing_else():
    text = shown(report())
    for part in ("prune/wanda, test, 1,234 examples", "-0.1000", "-0.2000 to +0.0000", "53.0%", "float32 100%; non-zeros and mask"):
        assert part in text
    for part in ("x as fast", "ms", "FLOPs", "disk", "error"):
        assert part not in text
    timed = {"median_ms": 2.0, "p95_ms": 3.0, "examples_per_s": 500.0}
    latency = {"1": {"before": timed, "after": {**timed, "median_ms": 1.0}, "speedup": [2.0, 1.9, 2.1]}}
    layers = {f"block_{i}/kernel": {"error": i / 100, "sparsity": 0.5} for i in range(12)} | {"head/kernel": {"sparsity": 0.0}}
    energy = {"rows": 64, "before": 0.02, "after": 0.01, "method": "codecarbon"}
    text = shown(report(latency=latency, flops_per_example={"before": 2000, "after": 1000}, layers=layers, energy=energy))
    assert next(line for line in text.splitlines() if line.startswith("J an example, batch 64")).split()[5:] == ["0.02", "0.01", "50.0%"]
    assert "energy by codecarbon" in text
    for part in ("2.00x as fast (1.90 to 2.10)", "FLOPs per example", "layers with the largest error, 10 of 12", "block_11/kernel"):
        assert part in text
    for part in ("block_1/kernel", "head/kernel"):
        assert part not in text


def test_a_title_is_one_line_of_a_narrow_terminal():
    chain = [{"method": name} for name in ("prune/structured", "quantize/int8")]
    assert shown(report(stages=chain), 80).splitlines()[0].strip() == "prune/structured + quantize/int8, test, 1,234 examples"


def test_the_ledger_is_drawn(tmp_path):
    ledger.draw(report(flops_per_example={"before": 2000, "after": 1000}), tmp_path / "ledger.png")
    assert (tmp_path / "ledger.png").read_bytes().startswith(b"\x89PNG")
