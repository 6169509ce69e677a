"""Where the time of a step goes: a real trace, and made-up ones whose sums are known."""

import types

import jax
import jax.numpy as jnp
import pytest

from research.core.errors import ResearchError
from research.training import profile
from research.training.profile import dearest, traced


def event(name, start, duration, **stats):
    return types.SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=list(stats.items()))


def plane(name, **lines):
    found = [types.SimpleNamespace(name=line.replace("_", " "), events=events) for line, events in lines.items()]
    return types.SimpleNamespace(name=name, lines=found)


def test_a_trace_names_modules_and_counts_steps(tmp_path):
    @jax.jit
    def step(x, small, large):
        with jax.named_scope("model"):
            for i in range(2):
                with jax.named_scope(f"block_{i}/up"):
                    x = jnp.sin(x @ large)
            with jax.named_scope("head"):
                return jnp.sum(x @ small)

    gradient = jax.jit(jax.value_and_grad(lambda large, x, small: step(x, small, large)))
    x, small, large = jnp.ones((256, 512)), jnp.ones((512, 2)), jnp.ones((512, 512))
    jax.block_until_ready(gradient(large, x, small))
    with traced(tmp_path / "trace"):
        for _ in range(5):
            jax.block_until_ready(gradient(large, x, small))
    told = dearest(tmp_path / "trace", steps=5)
    products = [operation for operation in told if operation.module == "model/block_*/up"]
    assert products, told
    assert any(operation.backward for operation in products)
    assert told == sorted(told, key=lambda operation: -operation.share)
    assert told[0].module == "model/block_*/up"  # five products of 512 x 512 beside one of 512 x 2
    assert 0 < sum(operation.share for operation in told) <= 1 + 1e-9
    assert all(operation.count == int(operation.count) >= 1 for operation in told)
    assert len(dearest(tmp_path / "trace", steps=5, count=1)) == 1


def test_a_loop_is_told_by_what_is_in_it(tmp_path):
    @jax.jit
    def step(x, weights):
        with jax.named_scope("model"):
            return jax.lax.scan(lambda x, weight: (jnp.sin(x @ weight), None), x, weights)[0]

    x, weights = jnp.ones((256, 256)), jnp.ones((6, 256, 256))
    jax.block_until_ready(step(x, weights))
    with traced(tmp_path / "trace"):
        jax.block_until_ready(step(x, weights))
    spent = profile._spent(jax.profiler.ProfileData.from_file(str(next(tmp_path.rglob("*.xplane.pb")))).planes)
    assert any(name.startswith("while") for _, name in spent)
    told = dearest(tmp_path / "trace", steps=1)
    assert "while" not in {operation.operation for operation in told}
    assert {6.0} <= {operation.count for operation in told}


def test_an_operation_lasts_until_its_threads_are_done():
    host = plane(
        "/host:CPU",
        a=[event("dot.1", 0, 10, hlo_op="dot.1", hlo_module="jit_f", _p=7), event("python", 0, 900)],
        b=[event("end: dot.1", 50, 2, _c=7), event("add.2", 60, 5, hlo_op="add.2", hlo_module="jit_f", _p=8)],
    )
    assert profile._spent([host]) == {("jit_f", "dot.1"): (1, pytest.approx(52e-9)), ("jit_f", "add.2"): (1, pytest.approx(5e-9))}


def test_a_device_counts_once_and_hides_the_host():
    kernel = event("fusion.1", 0, 30, hlo_op="fusion.1", hlo_module="jit_f")
    host = plane("/host:CPU", a=[event("dot.1", 0, 10, hlo_op="dot.1", hlo_module="jit_f")])
    streams = plane("/device:GPU:0", Stream=[kernel, kernel])
    both = plane("/device:TPU:0", Stream=[kernel], XLA_Ops=[kernel])
    assert profile._spent([host, streams]) == {("jit_f", "fusion.1"): (2, pytest.approx(60e-9))}
    assert profile._spent([host, both]) == {("jit_f", "fusion.1"): (1, pytest.approx(30e-9))}


def test_names_are_read():
    read = profile._read
    assert read("jit(f)/transpose(jvp(GPT))/GPT._run/block_3/mlp/mlp._project/up/dot_general") == ("block_*/mlp/up", "dot_general", True)
    assert read("jit(f)/jvp(GPT)/while/body/closed_call/blocks/checkpoint/mlp/up/dot_general") == ("blocks/mlp/up", "dot_general", False)
    assert read("jit(f)/add") == ("", "add", False)


def test_a_folder_without_a_trace_is_refused(tmp_path):
    with pytest.raises(ResearchError, match="there is no trace"):
        dearest(tmp_path, steps=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResearchError, match="cannot be written"), traced(tmp_path / "file" / "trace"):
        pass
