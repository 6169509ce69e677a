import importlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

import research

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(code, **options):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_installed_version_is_the_packages():
    assert importlib.metadata.version("ontogeny") == research.__version__


def test_importing_the_package_and_its_plugins_loads_no_jax():
    code = "import sys, research, hydra_plugins.ontogeny.experiments; print([m for m in ('jax', 'flax', 'optax') if m in sys.modules])"
    assert python(code) == ["[]"]


def test_composing_loads_no_jax_and_finds_the_configs_from_anywhere(tmp_path):
    code = "import sys, research; print(research.compose(['seed=3']).seed, 'jax' in sys.modules)"
    assert python(code, cwd=tmp_path) == ["3", "False"]


def test_writing_events_leaves_torch_where_it_is(tmp_path):
    (tmp_path / "torch.py").write_text("print('loaded')")  # found before an installed one
    code = "import sys, research.training.events; print('torch' in sys.modules); import torch"
    assert python(code, cwd=tmp_path) == ["False", "loaded"]


def test_garbage_is_looked_for_again_once_a_command_has_imported_what_it_needs():
    code = """import gc, sys
sys.argv[0], sys.orig_argv = "-m", ["python", "-m", "research.train"]
import research; print(gc.isenabled())
from research.core import app
app.main(lambda config: print(gc.isenabled(), gc.get_freeze_count() > 0), "train", ["seed=1"])"""
    assert python(code)[:3] == ["False", "True", "True"]


def test_another_program_that_imports_the_package_keeps_its_search_for_garbage(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import research")  # while Python looks for what `-m` runs
    (tmp_path / "mine" / "work.py").write_text("import gc; print(gc.isenabled())")
    done = subprocess.run([sys.executable, "-m", "mine.work"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "True\n", done.stderr


def test_training_starts_without_what_only_its_first_checkpoint_needs():
    assert python("import sys, research.train; print('orbax.checkpoint' in sys.modules)") == ["False"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'compoze'"):
        _ = research.compoze


SCRIPTS = sorted(PROJECT["scripts"])


def script(name, *arguments, **environment):
    path = pathlib.Path(sys.executable).with_name(name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_console_script_completes_without_loading_jax(name):
    done = script(name, "-sc", "query=bash", COMP_LINE=f"{name} debug.", COMP_POINT="99", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    assert "debug.nans=" in done.stdout.split()
    assert not re.search(r"\| +jax$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_console_script_has_its_verb(name):
    verb = importlib.import_module(name.replace("-", ".", 1))
    assert verb.main(["--cfg", "job", "--package", "debug"]) == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that is built here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_every_config_module_and_plugin_once(wheel):
    wheel = zipfile.ZipFile(wheel).namelist()
    for folder, place in (("conf", "research/conf"), ("experiments", "research/experiments")):
        for path in (ROOT / folder).rglob("*.yaml"):
            assert f"{place}/{path.relative_to(ROOT / folder)}" in wheel
    for path in (ROOT / "research").rglob("*.py"):
        name = str(path.relative_to(ROOT)).replace("research/sweep/plugins/", "")
        assert wheel.count(name) == 1
    assert "hydra_plugins/ontogeny/experiments.py" in wheel
    assert not [name for name in wheel if "sweep/plugins" in name or name.split("/")[0] in ("conf", "experiments", "tests")]


def test_a_wheel_installed_elsewhere_finds_its_configs_from_any_working_directory(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    code = "import research, research.train; print(research.__file__); research.train.main(['experiment=digits_mlp', '--cfg', 'job', '-p', 'expect'])"
    printed = python(code, cwd=tmp_path / "work", env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert printed[0] == str(tmp_path / "site" / "research" / "__init__.py")
    assert printed[1:3] == ["#", "@package"]
    assert "test/accuracy" in printed


def test_constraints_hold_what_is_installed():
    """The versions that tests ran with are those that everybody gets."""
    pinned = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert len(pinned) > 100
    differing = {}
    for name, version in pinned.items():
        try:
            installed = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        if installed != version:
            differing[name] = (version, installed)
    assert differing == {}


def test_every_direct_dependency_is_pinned():
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)}
    extras = PROJECT["optional-dependencies"]
    wanted = {
        re.split(r"[^\w.-]", line)[0].lower().replace("_", "-")
        for line in (*PROJECT["dependencies"], *extras["dev"], *extras["parity"], *extras["hub"])
    }
    assert wanted <= pinned
