"""A small classifier with everything that could break exactness: dropout, batch statistics where asked for, uneven masks."""

import struct

import jax
import numpy as np
import optax
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from research.models.mlp import MLP
from research.objectives.classify import Classify
from research.training.optimizer import Optimizer
from research.training.schedule import Cosine
from research.training.step import Step


@pytest.fixture
def make_step():
    """Builds a step: a new but equal one at each call."""

    def make(accumulate=1, norm=None, dropout=0.3, axis=None, clip=1.0):
        objective = Classify(MLP(outputs=3, width=16, depth=2, dropout=dropout, norm=norm), label_smoothing=0.1)
        optimizer = Optimizer(optax.adamw, (("weight_decay", 0.01),), clip=clip)
        return Step(objective, optimizer, Cosine(warmup=2), steps=20, accumulate=accumulate, axis=axis)

    return make


@pytest.fixture
def batches():
    """Eight batches of 16 with uneven masks."""
    random = np.random.default_rng(0)

    def batch():
        mask = random.random(16) > 0.4
        mask[:4] = False  # the first of four microbatches counts nothing
        return {
            "features": random.normal(size=(16, 5)).astype(np.float32),
            "label": random.integers(0, 3, 16).astype(np.int32),
            "mask": mask,
            "index": random.permutation(1000)[:16].astype(np.int32),
        }

    return [batch() for _ in range(8)]


@pytest.fixture
def train():
    """Runs a step over batches: (state, [metrics])."""

    def run(step, batches, hyper=None, seed=0, state=None):
        compiled = jax.jit(step)
        if state is None:
            state = step.create(jax.random.key(seed), batches[0], hyper or {"learning_rate": 1e-2})
        history = []
        for batch in batches:
            state, metrics = compiled(state, None, batch)
            history.append(jax.device_get(metrics))
        return state, history

    return run


@pytest.fixture
def read_events():
    """read_events(folder): the events of its files, oldest file first, by their own format: length, checksum, record, checksum."""

    def read(folder):
        found = []
        for path in sorted(folder.glob("events.out.tfevents.*")):
            data = path.read_bytes()
            while data:
                (length,) = struct.unpack("<Q", data[:8])
                assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
                record = data[12 : 12 + length]
                assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked_crc32c(record),)
                found.append(event_pb2.Event.FromString(record))
                data = data[16 + length :]
        return found

    return read
