import time

import numpy as np
import pytest

from research.core.errors import ConfigError, DataError
from research.data.dataset import Arrays
from research.data.loader import Loader
from research.data.preprocess import Preprocessor
from research.data.text import Windows

SOURCE = Arrays({"label": np.arange(100, 123, dtype=np.int32)}, Preprocessor({}))


def same(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and (a[name] == b[name]).all() for name in a)


def test_each_epoch_counts_every_example_once_and_fills_the_last_batch_up():
    loader = Loader(SOURCE, 5, seed=1)
    assert len(loader) == 5
    for epoch in range(2):
        batches = [loader[epoch * 5 + i] for i in range(5)]
        assert all(batch["label"].shape == batch["mask"].shape == (5,) for batch in batches)
        counted = np.concatenate([batch["index"][batch["mask"]] for batch in batches])
        assert sorted(counted.tolist()) == list(range(23))
        assert all((batch["label"] == batch["index"] + 100).all() for batch in batches)
        assert batches[-1]["mask"].tolist() == [True, True, True, False, False]
    assert loader[0]["index"].dtype == np.int32
    assert (loader[0]["index"] != loader[5]["index"]).any()


def test_a_batch_is_a_function_of_seed_and_step_alone():
    first, second = Loader(SOURCE, 4, seed=3), Loader(SOURCE, 4, seed=3)
    later = [first[step] for step in (17, 2, 40, 0)]
    assert all(same(second[step], batch) for step, batch in zip((17, 2, 40, 0), later, strict=True))
    assert not same(first[0], Loader(SOURCE, 4, seed=4)[0])


@pytest.mark.parametrize("threads", [0, 3, None])
def test_iterating_gives_the_same_batches_as_asking_for_them(threads):
    loader = Loader(SOURCE, 4, seed=3, threads=threads)
    batches = list(loader.iterate(4, 21))
    assert len(batches) == 17
    assert all(same(batch, loader[step]) for step, batch in enumerate(batches, 4))
    assert list(loader.iterate(5, 5)) == []


def test_a_loop_over_a_loader_ends_after_one_epoch():
    assert [batch["mask"].sum() for batch in Loader(SOURCE, 10, shuffle=False)] == [10, 10, 3]


def test_two_batches_are_put_ahead_of_the_one_in_use():
    put = []
    for step, batch in enumerate(Loader(SOURCE, 4).iterate(0, 6, lambda batch: put.append(batch) or len(put) - 1)):
        assert batch == step
        assert len(put) == min(step + 3, 6)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shards_are_equal_parts_of_the_same_batch(parts):
    whole = Loader(SOURCE, 8, seed=2)
    shards = [Loader(SOURCE, 8, seed=2, shard=(i, parts)) for i in range(parts)]
    for step in range(7):
        joined = {name: np.concatenate([shard[step][name] for shard in shards]) for name in whole[step]}
        assert same(joined, whole[step])
        assert (shards[-1].indices(step) == whole.indices(step)).all()


def test_indices_are_the_examples_that_count():
    loader = Loader(SOURCE, 10, seed=2)
    assert [len(loader.indices(step)) for step in range(4)] == [10, 10, 3, 10]
    assert (loader.indices(5) == loader[5]["index"][loader[5]["mask"]]).all()
    with pytest.raises(IndexError, match=r"-1"):
        loader.indices(-1)


def test_the_whole_split_can_be_one_batch():
    loader = Loader(SOURCE, "all", shuffle=False)
    assert len(loader) == 1
    assert loader[0]["label"].tolist() == list(range(100, 123))
    assert loader[0]["mask"].all()
    parts = [Loader(SOURCE, "all", shuffle=False, shard=(i, 4)) for i in range(4)]
    assert sum(int(part[0]["mask"].sum()) for part in parts) == 23


@pytest.mark.parametrize("batch", ["all", 64])
def test_the_same_whole_split_again_keeps_its_order(batch):
    def orders(source=SOURCE, **more):
        return [Loader(source, batch, seed=1, **more).indices(epoch).tolist() for epoch in range(2)]

    first, second = orders()
    assert first == second != list(range(23))
    first, second = orders(microbatches=2)  # a batch norm must not see the same parts for ever
    assert first != second
    assert sorted(first) == sorted(second)
    first, second = orders(Windows(np.arange(40, dtype=np.int32), 4, overlap=True))  # ten of the windows that overlap
    assert sorted(first) != sorted(second)


def test_a_batch_larger_than_the_split_is_filled_up():
    batch = Loader(SOURCE, 64)[0]
    assert batch["mask"].sum() == 23
    assert len(batch["mask"]) == 64


def test_a_mask_of_tokens_is_cut_by_the_mask_of_examples():
    tokens = Windows(np.arange(12, dtype=np.int32), 4, overlap=False)  # predicts 11 tokens in 3 windows
    batch = Loader(tokens, 2, shuffle=False)[1]
    assert batch["mask"].tolist() == [[True, True, True, False], [False] * 4]


@pytest.mark.parametrize("batch", [0, -4, 2.5, True, "some"])
def test_a_batch_that_is_no_count_is_refused(batch):
    with pytest.raises(ConfigError, match=rf"data.batch={batch!r}"):
        Loader(SOURCE, batch)


def test_a_batch_that_cannot_be_shared_out_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"data.batch=10 .* 4 equal parts; .* 8"):
        Loader(SOURCE, 10, shard=(0, 4))


def test_an_empty_split_one_too_long_to_number_and_a_negative_seed_are_refused():
    with pytest.raises(DataError, match=r"no examples"):
        Loader(Arrays({"label": np.zeros(0, np.int32)}, Preprocessor({})), 4)
    with pytest.raises(DataError, match=r"2147483648 examples"):
        Loader(Windows(np.broadcast_to(np.int32(0), (2**31 + 4,)), 4, overlap=True), 4)
    with pytest.raises(ConfigError, match=r"seed=-1"):
        Loader(SOURCE, 4, seed=-1)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_in_the_source_reaches_the_loop(threads):
    class Broken(Arrays):
        def take(self, indices):
            raise DataError("row 7 is damaged")

    with pytest.raises(DataError, match=r"row 7"):
        next(Loader(Broken(SOURCE.raw, SOURCE.preprocessor), 4, threads=threads).iterate(0, 3))


def test_a_tiny_batch_costs_the_loop_next_to_nothing():
    loader = Loader(Windows(np.arange(10**5, dtype=np.int32), 64, overlap=True), 12)
    seconds, batches = [], loader.iterate(0, 400)
    for _ in range(400):
        began = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - began)
    assert np.median(seconds) < 0.3e-3
