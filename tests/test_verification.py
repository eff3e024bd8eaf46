"""A verification leaves the process as it was, and its parts agree with each other."""

from __future__ import annotations

import argparse
import io
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import models
import pytest
import safetensors.torch
import torch
from corruptions import calm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import converter
from converter.api.verify import verify
from converter.encoders import ClipEncoder, Qwen2Encoder, SamEncoder
from converter.errors import ContainerError, LayoutError
from converter.layouts import registry
from converter.verification import restricted_pickle
from converter.verification.families import FAMILIES, State
from converter.verification.outputs import exact_float32
from converter.verification.probes import SkipInitialization
from converter.verification.reference_models import REFERENCES


def test_initialization_is_skipped_in_this_thread_only() -> None:
    others: list[nn.Linear] = []
    thread = threading.Thread(target=lambda: others.append(nn.Linear(64, 64)))
    with SkipInitialization():
        thread.start()
        thread.join()
        before = torch.get_rng_state()
        nn.Linear(64, 64), nn.Conv2d(3, 4, 5), nn.Embedding(6, 7)
        assert torch.equal(torch.get_rng_state(), before)
        # Constants are not random.
        assert torch.equal(nn.LayerNorm(8).weight, torch.ones(8))
    for layer in (*others, nn.Linear(64, 64)):
        weight = layer.weight.detach()
        assert float(weight.std()) > 0.05 and float(weight.abs().max()) <= 0.125


def test_buffers_are_kept() -> None:
    with SkipInitialization():
        encoder = ClipEncoder()
    assert encoder.embeddings.position_ids[0, -1] == 256


def test_tensor_float_is_disabled_and_restored() -> None:
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    try:
        matmul.allow_tf32 = convolution.allow_tf32 = True
        with exact_float32():
            if hasattr(convolution, "conv"):
                assert matmul.fp32_precision == convolution.conv.fp32_precision == "ieee"
            else:
                assert not matmul.allow_tf32 and not convolution.allow_tf32
        assert matmul.allow_tf32 and convolution.allow_tf32
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def test_every_family_has_an_entry_and_a_reference() -> None:
    assert sorted(FAMILIES) == sorted(registry.families())
    assert all(f"{name}-hf" in REFERENCES for name in FAMILIES)
    assert set(REFERENCES) <= set(registry.layout_names())


@pytest.mark.parametrize("encoder", [SamEncoder, ClipEncoder, Qwen2Encoder])
def test_probes_are_modules_of_the_encoder(encoder: type[nn.Module]) -> None:
    family = next(family for family in FAMILIES.values() if family.encoder is encoder)
    with torch.device("meta"):
        model: Any = encoder()
    names = model.state_dict().keys()
    for probe in family.encoder_probes(model):
        assert family.tensors_before(probe.name, names), probe.name


# The second version ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepseek_ocr2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ocr2") / "source.safetensors"
    save_file(calm(models.deepseek_ocr2_hf().state_dict(), 0), path)
    return path


@pytest.mark.parametrize("layout", registry.names_of_family("qwen2"))
def test_qwen2_of_every_layout_is_verified(layout: str, deepseek_ocr2: Path, tmp_path: Path) -> None:
    out, fill = tmp_path / "out.safetensors", tmp_path / "fill.safetensors"
    save_file(calm(models.qwen2_hf().model.state_dict(), 1), fill)
    converter.convert(deepseek_ocr2, "qwen2", to=layout, out=out, fill_from=fill)
    result = verify(out, {"source": deepseek_ocr2, "fill-from": fill}, sizes=[128])
    assert result.verdict == "verified" and "DeepseekOcr2VisionEncoder" in result.reference


def whole(source: Path, folder: Path) -> State:
    """The tensors of both encoders by DeepSeek-OCR-2's names."""
    found: State = {}
    for family, prefix in (("sam", "sam_model."), ("qwen2", "qwen2_model.")):
        converter.convert(source, family, out=folder / "part.safetensors", force=True)
        found |= {prefix + name: tensor for name, tensor in load_file(folder / "part.safetensors").items()}
    return found


def test_the_second_version_is_verified_at_its_sizes(deepseek_ocr2: Path, tmp_path: Path) -> None:
    out, state = tmp_path / "whole.safetensors", whole(deepseek_ocr2, tmp_path)
    save_file(state, out)
    result = verify(out, deepseek_ocr2, device="cpu")
    assert result.verdict == "verified" and "DeepseekOcr2VisionModel" in result.reference
    assert result.checks[-1].name.endswith("at 768 x 768")
    assert verify(out, sizes=[1024]).checks[-1].detail.startswith("tokens [1, 256, 256], all finite")
    state["qwen2_model.query_768.weight"] = state["qwen2_model.query_768.weight"].flip(0)
    save_file(state, out)
    wrong = verify(out, {"sam": deepseek_ocr2, "qwen2": deepseek_ocr2}, device="cpu")
    assert wrong.verdict == "not verified"
    assert (
        "qwen2_model.queries is the first" in wrong.checks[-1].detail and "query_768.weight" in wrong.checks[-1].detail
    )


# Legal files that torch.load(weights_only=True) does not read as it is called by default ------------------------------


def packed_again(path: Path) -> None:
    """Compress the members of a torch zip, whose bytes can then not be mapped into memory."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def save(state: State, path: Path, form: str) -> None:
    protocol = next((int(char) for char in form if char.isdigit()), 2)
    extra: dict[str, Any] = {"epochs": {1, 2}, "seen": frozenset([3])} if "sets" in form else {}
    if "sparse" in form:
        extra["sparse"] = torch.eye(2).to_sparse()
    torch.save(
        {"model": state, **extra} if extra else state,
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization="legacy" not in form,
    )
    if "deflated" in form:
        packed_again(path)


FORMS = ("deflated", "protocol 1", "protocol 3", "protocol 4", "protocol 5", "legacy 1", "legacy 4", "sets", "sets 4")


@pytest.mark.parametrize("form", FORMS)
def test_legal_files_are_verified(form: str, tmp_path: Path) -> None:
    source, out = tmp_path / "clip.pth", tmp_path / "out.safetensors"
    save(models.clip_hf_vision().state_dict(), source, form)
    converter.convert(source, "clip", out=out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = verify(out, source, fast=True, device="cpu")
    assert found.ok and "passed" in [check.verdict for check in found.checks if check.group == "bytes"]
    assert not caught


class Subclass(torch.Tensor):
    """A tensor of a class that only this file knows."""


OTHER_CONTENTS: dict[str, Callable[[nn.Module], Any]] = {
    "namespace": lambda model: {"model": model.state_dict(), "args": argparse.Namespace(rate=1, names=["a"])},
    "optimizer": lambda model: {"model": model.state_dict(), "optimizer": torch.optim.AdamW([nn.Parameter(ONES)])},
    "sparse": lambda model: {"model": model.state_dict(), "sparse": torch.eye(2).to_sparse(), "complex": ONES + 1j},
    "subclass": lambda model: {"model": model.state_dict(), "other": ONES.as_subclass(Subclass)},
    "module": lambda model: model,
    "modules": lambda model: {"nets": [{"epoch": 1}, model], "path": Path("x")},
}
ONES = torch.ones(2)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", OTHER_CONTENTS)
def test_objects_next_to_the_weights_do_not_matter(kind: str, legacy: bool, tmp_path: Path) -> None:
    source, out = tmp_path / "clip.pth", tmp_path / "out.safetensors"
    contents = OTHER_CONTENTS[kind](models.clip_hf_vision())
    torch.save(contents, source, pickle_protocol=4, _use_new_zipfile_serialization=not legacy)
    converter.convert(source, "clip", out=out)
    assert verify(out, source, fast=True, device="cpu").result == "partly verified (structure, bytes)"


def test_a_wrong_conversion_of_such_a_file_fails(tmp_path: Path) -> None:
    source, out = tmp_path / "clip.pth", tmp_path / "out.safetensors"
    state = models.clip_hf_vision().state_dict()
    save(state, source, "protocol 4")
    converter.convert(source, "clip", out=out)
    tensors = safetensors.torch.load_file(out)
    tensors["pre_layrnorm.bias"] = tensors["pre_layrnorm.bias"] + 1
    safetensors.torch.save_file(tensors, out)
    found = verify(out, source, fast=True, device="cpu")
    assert [check.name for check in found.checks if check.verdict == "failed"] == ["pre_layrnorm.bias"]


def test_what_a_library_does_not_read_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, out = tmp_path / "clip.pth", tmp_path / "out.safetensors"
    save(models.clip_hf_vision().state_dict(), source, "")
    converter.convert(source, "clip", out=out)
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=RuntimeError("an opcode\nof the future")))
    with pytest.raises(ContainerError, match=r"clip\.pth: .*torch zip does not read it: an opcode\n") as error:
        verify(out, source, fast=True, device="cpu")
    assert "no error of the conversion" in error.value.hint


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_an_old_torchscript_archive_is_verified(tmp_path: Path) -> None:
    """torch 1.4 lists no buffers, and current torch leaves them out of its state_dict()."""
    source, out = tmp_path / "clip.pt", tmp_path / "out.safetensors"
    state = models.clip_hf_vision().state_dict()
    ids = torch.arange(len(state["embeddings.position_embedding.weight"]))[None]
    torch.jit.script(module_of(dict(state), {"embeddings.position_ids": ids})).save(source)
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, re.sub(rb"  __buffers__ = .*\n", b"", data) if name.endswith(".py") else data)
    converter.convert(source, "clip", out=out)
    assert verify(out, source, fast=True, device="cpu").ok


def module_of(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> nn.Module:
    """A module without a forward pass, with these tensors."""
    root = nn.Module()
    for name, tensor in (parameters | buffers).items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if name in buffers:
            parent.register_buffer(last, tensor)
        else:
            parent.register_parameter(last, nn.Parameter(tensor))
    return root


class Gadget:
    """Pickled as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_the_restricted_unpickler_runs_nothing(tmp_path: Path) -> None:
    contents = {"ns": argparse.Namespace(a=1), "gadget": Gadget(tmp_path / "executed"), "a": torch.ones(2)}
    torch.save(contents, tmp_path / "x.pth")
    found = torch.load(tmp_path / "x.pth", weights_only=False, pickle_module=restricted_pickle)
    assert torch.equal(found["a"], torch.ones(2)) and found["ns"] == {"a": 1}
    assert not (tmp_path / "executed").exists() and not isinstance(found["ns"], argparse.Namespace)


def test_the_restricted_unpickler_changes_no_function_of_the_process() -> None:
    stream = pickle.PROTO + b"\x02" + b"ctorch._utils\n_rebuild_tensor_v2\n" + b"}X\x01\x00\x00\x00aK\x01sb."
    with pytest.raises(pickle.UnpicklingError, match="a function or a class"):
        restricted_pickle.load(io.BytesIO(stream))


def test_two_encoders_of_a_family_are_named(tmp_path: Path) -> None:
    """Neither is chosen, and the error names both prefixes."""
    state = models.sam_meta().state_dict()
    both = {f"{side}.{name}": tensor.clone() for side in ("student", "teacher") for name, tensor in state.items()}
    safetensors.torch.save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(LayoutError, match=r"(?s)student.*teacher"):
        verify(tmp_path / "both.safetensors", fast=True)


@pytest.mark.parametrize("canonical", [False, True])
def test_a_sparse_tensor_is_named(canonical: bool, tmp_path: Path) -> None:
    """Its values are not read; in the DeepEncoder's layout the file is no conversion at all."""
    state = dict((SamEncoder(models.sam_sizes()) if canonical else models.sam_meta()).state_dict())
    name = f"{'' if canonical else 'image_encoder.'}blocks.0.mlp.lin1.weight"
    state[name] = state[name].to_sparse()
    torch.save(state, tmp_path / "sparse.pth")
    if canonical:
        with pytest.raises(LayoutError, match="sparse"):
            verify(tmp_path / "sparse.pth", fast=True)
    else:
        found = verify(tmp_path / "sparse.pth", fast=True)
        assert found.result == "not verified" and any("sparse" in check.detail for check in found.checks)


def test_a_source_of_the_other_family_is_named(tmp_path: Path) -> None:
    safetensors.torch.save_file(models.clip_hf().state_dict(), tmp_path / "clip.safetensors")
    torch.save(dict(models.sam_meta().state_dict()), tmp_path / "sam.pth")
    converter.convert(tmp_path / "sam.pth", "sam", out=tmp_path / "out.safetensors")
    with pytest.raises(LayoutError, match="is a CLIP checkpoint") as error:
        verify(tmp_path / "out.safetensors", tmp_path / "clip.safetensors", fast=True)
    assert "converted from" in error.value.hint
