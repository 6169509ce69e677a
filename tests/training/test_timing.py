import os
import subprocess
import sys
import time

import pytest
from omegaconf import open_dict

from research.core.config import compose
from research.data.dataset import open_data
from research.data.loader import Loader
from research.training.assembly import assemble
from research.training.timing import Timer, settle

WAIT_S = 0.02


class Slow(Loader):
    """A loader that makes one wait for each batch."""

    def iterate(self, start, stop, put=lambda batch: batch):
        for batch in super().iterate(start, stop, put):
            time.sleep(WAIT_S)
            yield batch


@pytest.fixture(scope="module")
def run():
    """(assembly, slow loader) of a small network on digits."""
    config = compose(["experiment=digits_mlp", "train.chunk=1", "model.width=4", "model.depth=1"])
    dataset = open_data(config.data)
    with open_dict(config):
        config.data.spec = dict(dataset.spec)
    loader = Slow(dataset.split("train"), 8)
    return assemble(config, batches=len(loader)), loader


def test_the_first_steps_compile_and_later_timers_of_the_same_run_do_not(run):
    timer = Timer(*run, steps=3)
    timer.warm_up(1)
    assert timer.compile_s > 0
    again = Timer(*run, steps=3)
    again.warm_up(3)
    assert again.compile_s == 0
    assert timer.parameters == again.parameters == 64 * 4 + 4 + 4 * 10 + 10


def test_waiting_for_a_batch_is_part_of_its_step(run):
    timer = Timer(*run, steps=5)
    timer.warm_up(2)
    block = timer.block(3)
    assert len(block) == 3
    assert all(whole > waited >= WAIT_S for whole, waited in block)


def test_the_rate_counts_all_steps_and_their_waiting(run):
    timer = Timer(*run, steps=6)
    timer.warm_up(1)
    assert 0 < timer.rate(5) < 1 / WAIT_S


def test_no_more_batches_than_were_announced(run):
    timer = Timer(*run, steps=2)
    timer.warm_up(2)
    with pytest.raises(StopIteration):
        timer.rate(1)


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="only Linux says")
def test_another_program_that_computes_is_noticed():
    with subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        seen = settle()
        other.kill()
    assert 0.5 / (os.cpu_count() or 1) < seen <= 1
