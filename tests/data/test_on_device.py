import jax
import numpy as np
import pytest

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
