"""Compiled programs kept between processes, so that a second run of a shape starts at once."""

import contextlib
import hashlib
import os
import pathlib
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from research.core.errors import ConfigError

NAME = "ontogeny"
SETTINGS = ("compilation_cache_dir", "compilation_cache_max_size", "persistent_cache_min_compile_time_secs", "persistent_cache_enable_xla_caches")


@contextlib.contextmanager
def cached_programs(node: Mapping[str, Any] | None) -> Iterator[None]:
    """Lets JAX keep its compiled programs in a folder, of a bounded size; whatever JAX itself was told before stays.

    A folder that cannot be written costs one line on stderr, and programs are compiled as without it.

    Args:    node: the config's `cache`: `folder`, a path, "auto" or None: none; and `bytes`, beyond which what was used longest ago goes.
    Raises:  ConfigError: a size that is none.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    node = node or {}
    folder, size = node.get("folder"), node.get("bytes")
    before = {name: getattr(jax.config, f"jax_{name}") for name in SETTINGS}
    if folder is None or before["compilation_cache_dir"] is not None or not getattr(jax.config, "jax_enable_compilation_cache"):  # noqa: B009  # the checker does not know the attribute
        yield
        return
    if type(size) is not int or size < 1:
        raise ConfigError(f"cache.bytes={size!r}: must be a whole number of at least 1; cache.folder=null switches the cache off")
    path = default_folder() if folder == "auto" else pathlib.Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
    except OSError as error:
        told = f"warning: cache.folder={os.fspath(path)!r} cannot be written ({error.strerror}): programs are compiled anew"
        print(told, file=sys.stderr, flush=True)
        yield
        return
    # XLA's own caches would put the folder's name into the key of each program, and are for GPUs
    for name, value in zip(SETTINGS, (os.fspath(path), size, 0.0, "none"), strict=True):
        jax.config.update(f"jax_{name}", value)
    compilation_cache.reset_cache()  # one that has looked already, and found no folder, would not look again
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(f"jax_{name}", value)
        compilation_cache.reset_cache()


def default_folder() -> pathlib.Path:
    """The folder of this kind of machine in the user's cache: a program for one processor may use instructions that another lacks."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base) / NAME / "programs" / hashlib.sha256(_processor().encode()).hexdigest()[:12]


def _processor() -> str:
    """The architecture, and the instructions that the processor knows where the system says them."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.lower().startswith(("flags", "features")):
                return f"{platform.machine()} {line.partition(':')[2].strip()}"
    return f"{platform.machine()} {platform.processor()} {platform.node()}"
