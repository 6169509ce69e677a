"""Makes experiments/*.yaml the config group `experiment`, wherever the configs of this project are composed: verbs, notebooks, sweeps."""

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin

GROUP = "experiment"


class ExperimentsSource(ConfigSource):
    """A folder of YAML files as one config group; a file without a package header changes the whole config."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self._files = FileConfigSource(provider, f"file://{self.path}")

    @staticmethod
    def scheme() -> str:
        """What marks such a folder in a search path: `experiments://<folder>`."""
        return "experiments"

    def available(self) -> bool:
        """Whether the folder exists."""
        return self._files.available()

    def load_config(self, config_path: str) -> ConfigResult:
        """The config of `experiment/NAME`."""
        result = self._files.load_config(self._inside(config_path) or "")
        result.header["package"] = result.header["package"] or "_global_"
        return result

    def is_group(self, config_path: str) -> bool:
        """Whether this is the top, the group, or a folder inside the group."""
        inside = self._inside(config_path)
        return config_path == "" or (inside is not None and self._files.is_group(inside))

    def is_config(self, config_path: str) -> bool:
        """Whether this is `experiment/NAME` of a file that exists."""
        inside = self._inside(config_path)
        return inside is not None and self._files.is_config(inside)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The group's name at the top; inside it, the names of its files and folders."""
        if config_path == "":
            return [] if results_filter is ObjectType.CONFIG else [GROUP]
        return self._files.list(self._inside(config_path) or "", results_filter)

    @staticmethod
    def _inside(config_path: str) -> str | None:
        """The path within the folder; None where it belongs to another group."""
        group, _, rest = config_path.partition("/")
        return rest if group == GROUP else None


class ExperimentsSearchPath(SearchPathPlugin):
    """Adds experiments/ to the search path of every app whose primary configs are this project's, and of no other app."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends the source; a user's own --config-dir stands before or after it as Hydra decides."""
        from research.core import folder  # here, since Hydra imports this file in every app of the environment

        if any(entry.provider == "main" and _path(entry.path) == str(folder.conf()) for entry in search_path.get_path()):
            search_path.append("ontogeny", f"{ExperimentsSource.scheme()}://{folder.experiments()}")


def _path(address: str | None) -> str:
    return (address or "").removeprefix("file://").rstrip("/")
