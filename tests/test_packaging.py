"""The wheel and the source distribution: what they hold, and that the wheel works away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import models
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions, built from what git tracks or would: no leftovers of earlier builds."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, tree]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return dist


def expected_modules() -> set[str]:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "converter").rglob("*.py")}
    data = {f"converter/mappings/{path.name}" for path in (ROOT / "mappings").glob("*.yaml")}
    views = {f"converter/verify/views/{name}" for name in ("page.html", "movement.html", "axis.html", "style.css")}
    return modules | data | views | {"converter/mappings/__init__.py", "converter/py.typed"}


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == expected_modules()
    assert {name.split("/")[-1] for name in metadata} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "LICENSE",
    }  # fmt: skip


def test_the_sdist_can_be_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "mappings/sam-hf.yaml", "converter/pipeline.py"} <= names


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
    code = "import converter, converter.catalogue as c; print(converter.__file__, c.load('sam-hf').place.file)"
    where = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True)
    assert where.stdout.split()[0] == str(site / "converter" / "__init__.py")


def test_built_in_loaders_enter_through_the_entry_point_group() -> None:
    from importlib.metadata import distribution

    from converter import loaders

    entries = distribution("dsocr-convert").entry_points.select(group="dsocr_convert.loaders")
    # The quick reading of our own metadata agrees with the library's.
    assert sorted(loaders._built_in()) == sorted((entry.name, entry.value) for entry in entries)
    assert {entry.value for entry in entries} == {
        f"converter.loaders.{name}" for name in ("safetensors", "torch_zip", "torch_legacy", "torchscript")
    }
