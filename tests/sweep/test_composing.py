import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import OmegaConf

from research.core import folder
from research.core.config import compose
from research.sweep.composing import Once, compose_jobs

COMMON = ["experiment=digits_mlp", "model.width=[8,8]"]
SWEEPS = {
    "values": [["seed=0", "optimizer.learning_rate=0.1"], ["seed=1", "optimizer.learning_rate=0.1"], ["seed=0", "optimizer.learning_rate=0.2"]],
    "groups": [["optimizer=adam", "seed=0"], ["optimizer=sgd", "seed=0"], ["optimizer=sgd", "seed=3"]],
    "a value within another": [["optimizer={b1: 0.5}", "optimizer.b1=0.7"], ["optimizer.b1=0.8", "optimizer={b1: 0.9}"]],
    "added and removed keys": [["++data.spec.classes=7"], ["~expect"], ["seed=2"]],
    "another experiment": [["experiment=digits_cnn"], ["experiment=digits_mlp"]],
}


@pytest.mark.parametrize("name", SWEEPS)
def test_each_config_is_the_one_that_hydra_composes(name):
    jobs = [[*COMMON, *lines] if name != "another experiment" else lines for lines in SWEEPS[name]]
    compose()  # registers the resolvers
    loader = ConfigLoaderImpl(create_config_search_path(str(folder.conf())))
    master = loader.load_configuration("train", [], RunMode.MULTIRUN)
    for lines, ours in zip(jobs, compose_jobs(Once(loader), master, jobs), strict=True):
        assert OmegaConf.to_container(ours) == OmegaConf.to_container(compose(lines))


def test_jobs_that_differ_in_values_are_composed_once(monkeypatch):
    compose()
    loader = ConfigLoaderImpl(create_config_search_path(str(folder.conf())))
    master = loader.load_configuration("train", [], RunMode.MULTIRUN)
    composed, once = [], Once(loader)
    monkeypatch.setattr(loader, "load_sweep_config", lambda *given, whole=loader.load_sweep_config: composed.append(given) or whole(*given))
    configs = [once.load_sweep_config(master, [*COMMON, line]) for line in ("seed=1", "seed=2", "optimizer=sgd", "seed=3")]
    assert len(composed) == 2  # with and without another optimizer
    assert [config.seed for config in configs] == [1, 2, 0, 3]


def test_a_config_that_was_made_to_look_at_is_handed_out_once():
    compose()
    loader = ConfigLoaderImpl(create_config_search_path(str(folder.conf())))
    master = loader.load_configuration("train", [], RunMode.MULTIRUN)
    once, lines = Once(loader), [*COMMON, "seed=1"]
    seen = once.load_sweep_config(master, lines)
    first, second = once.job(master, lines), once.job(master, lines)
    assert first is seen
    assert second is not first
    assert second == first
