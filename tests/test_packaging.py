"""The wheel and the source distribution: what they hold, and that the wheel works away from the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import models
import pytest
import torch
import yaml
from packaging.version import Version

import converter

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def tracked() -> set[str]:
    """What git tracks, or would: no leftovers of earlier builds."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return {name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, tree]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return dist


def expected_modules() -> set[str]:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "converter").rglob("*.py")}
    data = {f"converter/mappings/{path.name}" for path in (ROOT / "mappings").glob("*.yaml")}
    views = {f"converter/reports/{name}" for name in ("verification.html", "difference.html", "style.css")}
    templates = {"converter/output/model_card.md", "converter/layouts/mapping.schema.json"}
    return modules | data | views | templates | {"converter/mappings/__init__.py", "converter/py.typed"}


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == expected_modules()
    assert {name.split("/")[-1] for name in metadata} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "LICENSE",
    }  # fmt: skip


def test_the_sdist_holds_the_repository(built: Path) -> None:
    """What a distribution needs to build, to test and to document it; less what serves the host alone."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    made = {name for name in names if name.startswith("dsocr_convert.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    served = (".ci/", ".github/", ".gitignore")
    assert names - made == {name for name in tracked() if not name.startswith(served)}


def test_the_metadata_says_who_and_what(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "dsocr-convert" and metadata["Version"] == converter.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert set(metadata.get_all("Provides-Extra", [])) == {"docs", "test", "verify"}
    assert metadata["Description-Content-Type"] == "text/markdown" and "dsocr-convert sam" in metadata.get_payload()
    # Other metadata than the package's own.
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == converter.__version__


def test_lower_bounds_are_what_was_run() -> None:
    oldest = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE))
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["verify"]]
    for requirement in wanted:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<[\d.]+)?", requirement).groups()
        assert Version(oldest[name]) == Version(bound), requirement


def test_the_wheel_works_elsewhere(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    work = tmp_path / "work"
    work.mkdir()
    torch.save(models.sam_meta().state_dict(), work / "sam.pth")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for arguments in (["sam", "sam.pth"], ["inspect", "sam.pth"], ["mapping", "show", "clip-hf"]):
        done = subprocess.run(
            [site / "bin" / "dsocr-convert", *arguments], cwd=work, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    code = (
        "import converter, converter.layouts.registry as c; print(converter.__file__, c.load('sam-hf').location.file)"
    )
    where = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True)
    assert where.stdout.split()[0] == str(site / "converter" / "__init__.py")


def test_a_checkout_on_the_path_works(tmp_path: Path) -> None:
    """Without an installation there is no package of mapping files."""
    for name in ("converter", "mappings"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder)]\n"
        "import converter.layouts.registry as c; print(c.__file__, c.load('sam-hf').name)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path / "converter" / "layouts" / "registry.py"), "sam-hf"], done.stderr
