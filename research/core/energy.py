"""The energy that a command uses and the carbon dioxide that this stands for, as codecarbon estimates them."""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any

from research.core.errors import ConfigError, nearest


def check(country: str | None, where: str = "logger.energy") -> None:
    """Refuses a country whose energy cannot be told; None is none.

    Raises:  ConfigError: codecarbon is not installed, or knows no such country.
    """
    if country is None:
        return
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    try:
        source = importlib.import_module("codecarbon.input").DataSource()
    except ImportError as error:
        raise ConfigError(f"{where}={country}: codecarbon is not installed; pip install 'ontogeny[energy]'") from error
    countries = source.get_global_energy_mix_data()
    if country not in countries:  # codecarbon would take the mean of the world
        raise ConfigError(f"{where}={country!r} is no country that codecarbon knows{nearest(str(country).upper(), countries)}")


@contextlib.contextmanager
def measured(country: str | None, where: str = "logger.energy") -> Iterator[dict[str, Any]]:
    """A dict that holds {energy_kwh, co2_g, energy_method} once the context has ended; it stays empty where country is None.

    The whole machine counts, other programs included. Nothing is sent anywhere and no file is written. Where the processor tells its power
    (RAPL) that is read; else it is estimated from its load and its nominal power, as `energy_method` says.

    Args:    country: ISO 3166 code of three letters: whose mix of power plants.  where: the setting that asks for it.
    Raises:  ConfigError: as `check`.
    """
    found: dict[str, Any] = {}
    if country is None:
        yield found
        return
    check(country, where)
    codecarbon = importlib.import_module("codecarbon")
    tracker = codecarbon.OfflineEmissionsTracker(
        country_iso_code=country, tracking_mode="machine", output_methods=[], allow_multiple_runs=True, log_level="error"
    )
    tracker.start()
    try:
        yield found
    finally:
        tracker.stop()
    used, parts = tracker.final_emissions_data, ", ".join(tracker._conf["hardware"])
    found |= {
        "energy_kwh": used.energy_consumed,
        "co2_g": 1000 * used.emissions,
        "energy_method": f"codecarbon {codecarbon.__version__}, whole machine, {parts}, country {country}",
    }
