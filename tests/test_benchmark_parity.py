"""The torch programs that speed is compared with have the same networks as ours."""

import json

import pytest

from research import benchmark

TINY = {
    "shakespeare_char_cpu": ["model.width=8", "model.depth=2", "model.heads=2", "data.time=8", "data.batch=2"],
    "mnist_cnn": ["data.hub=none", "model.channels=[2,3]", "model.pool=[2,2]", "model.hidden=[5]", "data.batch=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", TINY)
def test_networks_are_of_equal_size_and_both_are_timed(experiment, tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = [f"experiment={experiment}", "peer=torch", f"paths.data={tmp_path}", "steps=2", "warmup=1", "rounds=2", f"json={file}"]
    assert benchmark.main([*arguments, *TINY[experiment]]) == 0
    result = json.loads(file.read_text())
    assert result["data"] == "random"
    assert result["parameters"] == result["peer"]["parameters"]
    assert len(result["ratios"]) == 2
    assert min(result["ratios"]) > 0
    assert f"ours / torch: {result['ratio']:.2f}" in capsys.readouterr().out
