"""Energy by codecarbon, for which a small module of the same interface stands in: what is asked of it, and what we make of its answer."""

import json
import sys
import types

import pytest

from research.core.energy import measured
from research.core.errors import ConfigError


@pytest.fixture
def codecarbon(monkeypatch):
    """The calls that the stand-in received."""
    calls = []

    class OfflineEmissionsTracker:
        def __init__(self, **settings):
            calls.append(settings)
            self._conf = {"hardware": ["RAM()", "CPU(Cpu Load)"]}

        def start(self):
            calls.append("start")

        def stop(self):
            calls.append("stop")
            self.final_emissions_data = types.SimpleNamespace(energy_consumed=0.25, emissions=0.014)  # kWh, kg

    module, source = types.ModuleType("codecarbon"), types.ModuleType("codecarbon.input")
    module.OfflineEmissionsTracker, module.__version__ = OfflineEmissionsTracker, "3.9"
    source.DataSource = lambda: types.SimpleNamespace(get_global_energy_mix_data=lambda: {"FRA": {}, "DEU": {}})
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    monkeypatch.setitem(sys.modules, "codecarbon.input", source)
    return calls


def test_energy_and_carbon_dioxide_come_with_their_method(codecarbon):
    with measured("FRA") as used:
        assert used == {}
        assert codecarbon[1:] == ["start"]
    assert used == {
        "energy_kwh": 0.25,
        "co2_g": pytest.approx(14),
        "energy_method": "codecarbon 3.9, whole machine, RAM(), CPU(Cpu Load), country FRA",
    }
    settings, *said = codecarbon
    assert said == ["start", "stop"]
    assert settings["output_methods"] == []  # no file, no network
    assert settings["country_iso_code"] == "FRA"


def test_the_tracker_ends_with_what_it_tracks(codecarbon):
    with pytest.raises(KeyboardInterrupt), measured("FRA"):
        raise KeyboardInterrupt
    assert codecarbon[-1] == "stop"


def test_no_country_asks_for_nothing(codecarbon):
    with measured(None) as used:
        pass
    assert used == {}
    assert codecarbon == []


def test_a_missing_extra_and_an_unknown_country_are_told(codecarbon, monkeypatch):
    with pytest.raises(ConfigError, match=r"logger.energy='FRE' is no country that codecarbon knows; did you mean 'FRA'\?"), measured("FRE"):
        pass
    monkeypatch.setitem(sys.modules, "codecarbon.input", None)
    with pytest.raises(ConfigError, match=r"logger.energy=FRA: codecarbon is not installed; pip install 'ontogeny\[energy\]'"), measured("FRA"):
        pass


RUN = ("experiment=digits_mlp", "train.chunk=1", "model.width=4", "model.depth=1", "train.steps=2", "train.eval_every=null", "train.log_every=2")
QUIET = ("logger.figures=false", "logger.tensorboard=false", "logger.progress=none")


def test_a_run_writes_down_what_it_used(codecarbon, command, tmp_path):
    told = command("train", *RUN, *QUIET, "logger.energy=FRA", f"run_dir={tmp_path}")
    assert told.code == 0, told.err
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["energy_kwh"], result["co2_g"]) == (0.25, pytest.approx(14))
    assert result["energy_method"].endswith("country FRA")
    assert codecarbon[1:] == ["start", "stop"]


def test_a_country_is_refused_before_anything_is_written(codecarbon, command, tmp_path):
    told = command("train", *RUN, *QUIET, "logger.energy=XYZ", f"run_dir={tmp_path / 'run'}")
    assert told.code == 2
    assert "logger.energy='XYZ'" in told.err[-1]
    assert not (tmp_path / "run").exists()
