"""The wheel and the source distribution hold what they must, and nothing else."""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tdm_jax import __version__

ROOT = Path(__file__).parents[1]
NAME = f"tdm_jax-{__version__}"
BESIDE_CODE = {"tdm_jax/py.typed", "tdm_jax/plotting/page.html"}
BUILD = "import setuptools.build_meta as b; print(b.build_{kind}('dist'))"


def test_the_version_is_one():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is built from, with the tests."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building needs setuptools 77 or newer, which comes with the extra test")
    folder = tmp_path_factory.mktemp("source")
    no_caches = shutil.ignore_patterns("__pycache__")
    for path in (*ROOT.glob("*.*"), ROOT / "LICENSE"):
        if path.is_file():
            shutil.copy(path, folder)
    for name in ("tdm_jax", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=no_caches)
    return folder


def build(source, kind):
    """Builds without isolation, and so without a network."""
    command = [sys.executable, "-c", BUILD.format(kind=kind)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return source / "dist" / done.stdout.split()[-1]


def modules():
    """Every Python file of the package, those of `configs` through its link too."""
    found = [*(ROOT / "tdm_jax").rglob("*.py"), *(ROOT / "tdm_jax/configs").glob("*.py")]
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.mark.slow
def test_the_wheel(source):
    with zipfile.ZipFile(build(source, "wheel")) as wheel:
        names = set(wheel.namelist())
        metadata = Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())
    about = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert names - about == modules() | BESIDE_CODE
    assert f"{NAME}.dist-info/licenses/LICENSE" in about
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert len(required) == len([line for line in lines if not line.startswith("#")])
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.slow
def test_the_source_distribution(source):
    with tarfile.open(build(source, "sdist")) as archive:
        files = {m.name.removeprefix(f"{NAME}/") for m in archive.getmembers() if m.isfile()}
        assert not any(member.issym() for member in archive.getmembers())
    own = {"pyproject.toml", "requirements.txt", "README.md", "LICENSE", "MANIFEST.in"}
    own |= {"CHANGELOG.md", "CITATION.cff", "SECURITY.md", "PKG-INFO", "setup.cfg"}
    assert {name for name in files if ".egg-info/" not in name} == modules() | BESIDE_CODE | own
