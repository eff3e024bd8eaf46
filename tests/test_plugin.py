"""A plug-in loader: `tests/plugin/` is a distribution of its own, installed for these tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import command
import models
import numpy
import pytest
import safetensors.torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which only the plug-in is installed."""
    tree = shutil.copytree(ROOT / "tests" / "plugin", tmp_path_factory.mktemp("plugin") / "tree")
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", site, tree], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return site


def run(program: str, *arguments: str, cwd: Path, site: Path | None) -> subprocess.CompletedProcess[str]:
    """Run a program in this process, with the plug-in of a folder."""
    with pytest.MonkeyPatch.context() as patch:
        if site is not None:
            patch.syspath_prepend(str(site))
        try:
            return command.run(*arguments, cwd=cwd, program=program, NO_COLOR="1")
        finally:
            sys.modules.pop("dsocr_npz", None)


def run_on_contents(code: str, path: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Open a file with the plug-in in a new process and run `code` on its `contents`."""
    opening = (
        "import json, sys; from pathlib import Path; from converter.storage.local_file import LocalFile\n"
        "from converter.formats.registry import open_file; _, contents = open_file(LocalFile(Path(sys.argv[1])))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, "-c", opening + code, path], env=environment, capture_output=True, text=True)


def arrays() -> dict[str, numpy.ndarray]:
    return {name: tensor.numpy() for name, tensor in models.sam_meta().state_dict().items()}


@pytest.mark.parametrize("save", [numpy.savez, numpy.savez_compressed], ids=["stored", "deflated"])
def test_a_file_is_converted_and_verified(save: object, site: Path, tmp_path: Path) -> None:
    save(tmp_path / "sam.npz", **arrays())
    done = run("dsocr-convert", "sam", "sam.npz", cwd=tmp_path, site=site)
    assert done.returncode == 0, done.stderr
    assert "sam.npz: npz, layout sam-meta" in done.stderr
    found = safetensors.torch.load_file(tmp_path / "deepencoder-sam.safetensors")
    expected = {name.removeprefix("image_encoder."): array for name, array in arrays().items() if "image_enc" in name}
    assert found.keys() == expected.keys()
    assert all(numpy.array_equal(found[name].numpy(), array) for name, array in expected.items())

    verified = run(
        *("dsocr-verify", "deepencoder-sam.safetensors", "--source", "sam.npz", "--fast", "--json"),
        cwd=tmp_path,
        site=site,
    )
    assert verified.returncode == 0, verified.stderr
    checks = json.loads(verified.stdout)["checks"]
    assert [check["verdict"] for check in checks if check["group"] == "bytes"] == ["passed"]


def test_without_the_plugin_the_file_is_refused(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "sam.npz", **arrays())
    done = run("dsocr-convert", "sam", "sam.npz", cwd=tmp_path, site=None)
    assert done.returncode == 3
    assert "an .npz archive of numpy arrays" in done.stderr


def test_column_major_order_and_every_dtype(site: Path, tmp_path: Path) -> None:
    """Fortran order becomes strides; dtypes have NumPy's names."""
    values = {
        "order": numpy.asfortranarray(numpy.arange(24.0).reshape(2, 3, 4)),
        "scalar": numpy.array(7, numpy.int64),
        "none": numpy.zeros((0, 3), numpy.float32),
        **{name: numpy.arange(5).astype(name) for name in ("float64", "float32", "float16", "int32", "uint8")},
    }
    numpy.savez(tmp_path / "x.npz", **values)
    code = (
        "print(json.dumps({k: [t.dtype.name, t.shape, t.strides, t.byte_offset % 64] for k, t in contents.items()}))\n"
        # Describing the tensors needs no numeric library.
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = run_on_contents(code, tmp_path / "x.npz", site)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, array in values.items():
        dtype, shape, strides, start = found[name]
        assert (dtype, shape, start) == (array.dtype.name, list(array.shape), 0)
        if array.size:
            assert strides == [step // array.itemsize for step in array.strides]


def test_damage_is_detected(site: Path, tmp_path: Path) -> None:
    numpy.savez(tmp_path / "sam.npz", **arrays())
    data = bytearray((tmp_path / "sam.npz").read_bytes())
    name = b"image_encoder.blocks.1.attn.qkv.weight.npy"
    # Past the headers of the member and of the array.
    data[data.index(name) + 600] ^= 1
    (tmp_path / "sam.npz").write_bytes(data)
    done = run("dsocr-convert", "sam", "sam.npz", cwd=tmp_path, site=site)
    assert (done.returncode, "CRC-32" in done.stderr) == (3, True)
    assert not (tmp_path / "deepencoder-sam.safetensors").exists()


def test_objects_are_refused(site: Path, tmp_path: Path) -> None:
    """NumPy pickles arrays of objects."""
    numpy.savez(tmp_path / "sam.npz", a=numpy.array([print], dtype=object))
    done = run("dsocr-convert", "sam", "sam.npz", cwd=tmp_path, site=site)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: sam.npz: a.npy: not a .npy file of a supported type\n")


def test_verification_reports_a_loader_without_reference(site: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(site, bare)
    module = bare / "dsocr_npz.py"
    module.write_text(re.sub(r"(?s)\n\ndef reference.*", "\n", module.read_text()))
    numpy.savez(tmp_path / "sam.npz", **arrays())
    run("dsocr-convert", "sam", "sam.npz", cwd=tmp_path, site=bare)
    arguments = ("deepencoder-sam.safetensors", "--source", "sam.npz", "--fast")
    done = run("dsocr-verify", *arguments, cwd=tmp_path, site=bare)
    assert done.returncode == 2
    assert "the loader of npz has no `reference`" in done.stderr


def test_the_documentation_shows_the_plugin() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", page, re.DOTALL)
    assert blocks[:2] == [(ROOT / "tests" / "plugin" / name).read_text() for name in ("dsocr_npz.py", "pyproject.toml")]
