"""A law that was planted is found again, and what the report says of it follows from it."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

from research.core.errors import ConfigError
from research.sweep import page, scaling
from research.sweep.settings import Outcome

TRUE = np.array([[1.2, 30.0, 60.0, 0.40, 0.35]])  # E, A, B, a, b
SIZES, TOKENS = np.array([1e4, 4e4, 1.6e5, 6e5]), np.array([1e5, 4e5, 1.6e6, 6e6])


def planted(noise, seed=0):
    size, tokens = (axis.ravel() for axis in np.meshgrid(SIZES, TOKENS))
    loss = scaling.predict(TRUE, size, tokens)[0] * np.exp(np.random.default_rng(seed).normal(0, noise, size.size))
    return np.stack([size, tokens, loss], axis=1)


def test_exact_points_give_the_law_itself():
    law = scaling.fit(planted(0.0), resamples=2)
    np.testing.assert_allclose(law.values, TRUE[0], rtol=0.01)
    assert law.error < 1e-4
    assert law.determined


@pytest.fixture(scope="module")
def noisy():
    return scaling.fit(planted(0.004), resamples=60)


def test_noisy_points_give_intervals_that_hold_it(noisy):
    for (name, (low, high)), true in zip(noisy.intervals.items(), TRUE[0], strict=True):
        assert low < true < high, name
    low, high = noisy.intervals["a"]
    assert high - low < 0.2  # and say something
    assert 0.001 < noisy.error < 0.006


def test_the_best_size_is_where_the_loss_is_least():
    """Against a search over sizes."""
    flops, sizes = 1e14, np.geomspace(1e3, 1e8, 200_001)
    loss = scaling.predict(TRUE, sizes, flops / 6 / sizes)[0]
    np.testing.assert_allclose(scaling.optimal(TRUE, flops), sizes[loss.argmin()], rtol=1e-3)


def test_what_is_told_of_a_budget(noisy):
    told = noisy.told(noisy.largest)
    assert told["budget_flops"] == pytest.approx(6 * 6e5 * 6e6)
    assert 6 * told["parameters"] * told["tokens"] == pytest.approx(told["budget_flops"])
    assert told["parameters_interval"][0] < scaling.optimal(TRUE, noisy.largest)[0] < told["parameters_interval"][1]
    assert (told["beyond_runs"], noisy.told(2 * noisy.largest)["beyond_runs"]) == (False, True)
    assert scaling.budgets(noisy)[0] == pytest.approx(6 * 1e4 * 1e5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda points: points[points[:, 0] < 1e5], "2 different sizes"),
        (lambda points: points[points[:, 1] < 1e6], "2 different numbers of tokens"),
        (lambda points: points[[0, 5, 10]], "3 runs finished"),
        (lambda points: points * [1, 1, -1], "has no logarithm"),
    ],
)
def test_too_little_is_refused(rows, message):
    with pytest.raises(ConfigError, match=message):
        scaling.fit(rows(planted(0.0)))


def test_tokens_are_counted_from_the_run():
    config = {"data": {"batch": 12, "time": 64}}
    result = {"status": "finished", "params": 1000, "step": 50, "metrics": {"validation/loss": 2.0}}
    pruned = Outcome("b", config, {**result, "status": "interrupted"})
    found = scaling.points([Outcome("a", config, result), pruned], "validation/loss")
    np.testing.assert_array_equal(found, [[1000, 50 * 12 * 64, 2.0]])
    with pytest.raises(ConfigError, match="scaling=true: a does not know"):
        scaling.points([Outcome("a", {"data": {"batch": 12}}, result)], "validation/loss")


def test_the_verb_fits_draws_and_names_the_size(command, tmp_path):
    for number, (size, tokens, loss) in enumerate(planted(0.003)):
        run = tmp_path / "runs" / str(number)
        run.mkdir(parents=True)
        data, train = {"batch": 10, "time": 10}, {"steps": round(tokens / 100)}
        (run / "config.yaml").write_text(yaml.safe_dump({"name": "gpt", "seed": 0, "data": data, "train": train, "model": {"width": round(size)}}))
        result = {
            "status": "finished",
            "params": round(size),
            "step": train["steps"],
            "metrics": {"validation/loss": loss, "validation/accuracy": 0.5},
        }
        (run / "result.json").write_text(json.dumps(result))
    told = command("report", f"runs={tmp_path}/runs/**", f"out={tmp_path / 'out'}", "scaling=true", "budget=1e13")
    assert told.code == 0, told.err
    assert "L(N, D) = E + A / N^a + B / D^b over 16 runs: E = 1." in told.out
    assert "best size for 1e+13 FLOPs: " in told.out
    law = json.loads((tmp_path / "out" / "report.json").read_text())["comparison"]["scaling"]
    low, high = law["parameters_interval"]
    assert low < scaling.optimal(TRUE, 1e13)[0] < high
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "best size for" in (tmp_path / "out" / "report.html").read_text()


def test_a_best_size_that_no_run_comes_near_is_said_to_be_a_guess(noisy):
    sizes = dataclasses.replace(noisy, points=noisy.points * [100, 1, 1]).told(noisy.largest / 100)
    lines = page.law_lines(sizes)
    assert lines[2] == "that is fewer parameters than any run had (1,000,000 to 60,000,000): run such ones before you rely on it"
    lengths = dataclasses.replace(noisy, points=noisy.points * [1, 0.01, 1]).told(noisy.largest)
    assert page.law_lines(lengths)[-1].startswith("that is more tokens than any run had (1,000 to 60,000)")
    none = dataclasses.replace(noisy, values=noisy.values * [0, 1, 1, 1, 1] + [6.144e-6, 0, 0, 0, 0])
    assert page.law_lines(none.told(noisy.largest))[2] == "a number of the law lies at the end of its range: these runs do not determine it"
    near = noisy.told(noisy.best(1e11)[0] * 6 * 4e5)
    assert len(page.law_lines(near)) == 2
