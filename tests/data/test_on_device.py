import jax
import numpy as np
import pytest

from research.core.errors import ConfigError
from research.data.dataset import Arrays
from research.data.loader import Loader
from research.data.on_device import OnDevice, TokensOnDevice, place
from research.data.preprocess import Preprocessor, standardise
from research.data.text import Windows


def test_batches_from_the_device_have_the_bits_of_batches_from_the_host(pixels):
    preprocessor = Preprocessor({"image": [6, 5, 3]}, None, standardise("image", pixels))
    images = Arrays({"image": pixels, "label": np.arange(20, dtype=np.int32)}, preprocessor)
    tokens = np.arange(99, dtype=np.int32)
    for kind, source in ((OnDevice, images), (OnDevice, Windows(tokens, 8, overlap=False)), (TokensOnDevice, Windows(tokens, 8, overlap=True))):
        host, device = Loader(source, 8, seed=1), Loader(kind(source), 8, seed=1)
        assert isinstance(device[0].get("image", device[0].get("tokens")), jax.Array)
        for step in range(2 * len(host)):
            a, b = host[step], jax.device_get(device[step])
            assert a.keys() == b.keys()
            assert all(a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a)


class Device:
    """One with this much memory."""

    def __init__(self, size):
        self.size = size

    def memory_stats(self):
        return None if self.size is None else {"bytes_limit": self.size}


@pytest.mark.parametrize("memory", [None, 10**9])
def test_chunks_of_steps_have_the_split_on_any_device_with_room(monkeypatch, pixels, memory):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(memory)])
    images = Arrays({"image": pixels}, Preprocessor({"image": [6, 5, 3]}))
    windows = Windows(np.arange(999, dtype=np.int32), 8, overlap=True)
    assert isinstance(place(images, 5), OnDevice)
    assert isinstance(place(windows, 5), TokensOnDevice)
    for held, picks in Loader(place(images, 5), 8).chunks(5, 15, 5):
        assert held.fields["image"].shape == (20, 6, 5, 3)
        assert picks["index"].shape == picks["keep"].shape == (5, 8)
        assert picks["keep"].sum() in (5 * 8 - 4, 5 * 8 - 8)  # 20 examples: each third batch has 4


def test_chunks_of_what_cannot_lie_there_are_refused_with_the_reason(monkeypatch, pixels):
    images = Arrays({"image": pixels}, Preprocessor({"image": [6, 5, 3]}))
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(20_000)])
    with pytest.raises(ConfigError, match=r"train.chunk=5: the training split takes 7.2e-06 GB on the device, more than the 5e-06 GB"):
        place(images, 5)
    images.__dict__["draws"] = 10
    with pytest.raises(ConfigError, match=r"train.chunk=5: the examples of Arrays overlap"):
        place(images, 5)
    with pytest.raises(TypeError, match="Windows does not lie on the device"):
        next(Loader(Windows(np.arange(99, dtype=np.int32), 8, overlap=True), 8).chunks(0, 5, 5))


@pytest.mark.parametrize(("memory", "moved"), [(None, False), ({"bytes_limit": 1000}, False), ({"bytes_limit": 10**9}, True)])
def test_only_an_accelerator_with_room_gets_the_data(monkeypatch, pixels, memory, moved):
    class Device:
        def memory_stats(self):
            return memory

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    source = Arrays({"image": pixels}, Preprocessor({"image": [6, 5, 3]}))
    assert isinstance(place(source), OnDevice) == moved
    windows = Windows(np.arange(999, dtype=np.int32), 8, overlap=True)
    assert isinstance(place(windows), TokensOnDevice) == moved
