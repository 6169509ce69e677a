"""Eight devices give the losses of one, dropout and batch statistics included."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from research.core.errors import ConfigError
from research.training.parallel import Pmap

PROGRAM = """
    import json, sys, jax, numpy as np, optax
    from research.models.mlp import MLP
    from research.objectives.classify import Classify
    from research.training.optimizer import Optimizer
    from research.training.parallel import Jit, Pmap, create
    from research.training.schedule import Constant
    from research.training.step import Step, means

    random = np.random.default_rng(0)
    batches = [
        {
            "features": random.normal(size=(32, 5)).astype(np.float32),
            "label": random.integers(0, 3, 32).astype(np.int32),
            "mask": random.random(32) > 0.4,
            "index": np.arange(32, dtype=np.int32) + 32 * i,
        }
        for i in range(20)
    ]

    def run(parallel, norm, accumulate):
        objective = Classify(MLP(outputs=3, width=16, depth=2, dropout=0.3, norm=norm))
        step = Step(objective, Optimizer(optax.adam), Constant(), steps=20, accumulate=accumulate, axis=parallel.axis)
        state = parallel.place(create(step, jax.random.key(0), batches[0], {"learning_rate": 1e-2}))
        losses, train = [], parallel.train(step)
        for batch in batches:
            state, metrics = train(state, None, parallel.put(batch))
            losses.append(means(jax.device_get(parallel.one(metrics)))["loss"])
        return losses

    pair = json.loads(sys.argv[1])
    print(json.dumps([run(Jit(), *pair), run(Pmap(), *pair)]), jax.local_device_count())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "accumulate"), [(None, 2), ("batch", 1)], ids=["microbatches", "batch statistics"])
def test_pmap_on_eight_devices_equals_jit_on_one(norm, accumulate):
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps([norm, accumulate])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    text, devices = done.stdout.rsplit(maxsplit=1)
    assert int(devices) == 8
    one, eight = json.loads(text)
    assert max(abs(a - b) for a, b in zip(one, eight, strict=True)) < 1e-6
    assert abs(one[0] - one[-1]) > 1e-3


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match=r"parallel.devices=99: this machine has 1"):
        Pmap(devices=99)
