"""NaN payloads, infinities and zeros are converted bit by bit and reported by the verification."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from hostile.contents import ODD_BITS, odd_values
from memory import raw
from rich.console import Console
from typer.testing import CliRunner

import converter
from converter.api.verify import verify
from converter.cli.convert import app
from converter.reports import html, text
from converter.verification.result import Verification

ZERO = ("image_encoder.blocks.0.norm1.bias", "image_encoder.neck.1.bias")
BROKEN = "image_encoder.blocks.2.mlp.lin1.weight"


@pytest.mark.parametrize("dtype", ODD_BITS, ids=str)
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_every_bit_is_kept(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    """Signalling NaNs, payloads and signs are equal in source and output."""
    state = odd_values(dtype, dict(models.sam_meta().state_dict()))
    source = tmp_path / f"odd.{form}"
    torch.save(state, source) if form == "pth" else safetensors.torch.save_file(state, source)
    converter.convert(source, "sam", out=tmp_path / "out.safetensors")
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert any(not tensor.double().isfinite().all() for tensor in found.values())
    for name, tensor in found.items():
        assert tensor.dtype == dtype and raw(tensor) == raw(state[f"image_encoder.{name}"]), name


def verified(state: dict[str, torch.Tensor], folder: Path) -> Verification:
    torch.save(state, folder / "sam.pth")
    converter.convert(folder / "sam.pth", "sam", out=folder / "out.safetensors")
    return verify(folder / "out.safetensors", folder / "sam.pth", fast=True, device="cpu")


def views(found: Verification) -> list[str]:
    """The report as terminal text, HTML page and JSON."""
    terminal = io.StringIO()
    text.print_report(found, Console(file=terminal, width=400))
    return [terminal.getvalue(), html.verification_page(found, "dsocr-verify").decode(), json.dumps(found.to_json())]


@pytest.mark.parametrize("dtype", ODD_BITS, ids=str)
def test_verification_reports_tensors_that_are_not_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in models.sam_meta().state_dict().items()}
    state[BROKEN] = odd_values(dtype, {BROKEN: state[BROKEN]})[BROKEN]
    count = int((~state[BROKEN].double().isfinite()).sum())
    state |= {name: torch.zeros_like(state[name]) for name in ZERO}
    found = verified(state, tmp_path)
    verdicts = {check.name: check for check in found.checks}
    # The bytes are equal, but the weights are unusable.
    assert verdicts["tensors"].verdict == "passed" and not found.ok
    assert verdicts["finite"].verdict == "failed" and verdicts["finite"].tensors == ["blocks.2.mlp.lin1.weight"]
    assert verdicts["zero"].verdict == "warning" and verdicts["zero"].tensors == ["blocks.0.norm1.bias", "neck.1.bias"]
    for view in views(found):
        assert f"NaN or infinity in 1 of {len(found.key_map)} tensors: " in view
        assert f"blocks.2.mlp.lin1.weight ({count} of 960 elements)" in view
        assert "all zero: blocks.0.norm1.bias, neck.1.bias; outputs cannot show" in view


def test_all_zero_weights_pass_with_a_warning(tmp_path: Path) -> None:
    found = verified({name: torch.zeros_like(t) for name, t in models.sam_meta().state_dict().items()}, tmp_path)
    (zero,) = [check for check in found.checks if check.name == "zero"]
    assert found.ok and zero.verdict == "warning" and len(zero.tensors) > 40 and " more; outputs" in zero.detail


def test_constant_and_zero_tensors_are_different_warnings(tmp_path: Path) -> None:
    state = dict(models.sam_meta().state_dict())
    state["image_encoder.neck.1.weight"] = torch.ones_like(state["image_encoder.neck.1.weight"])
    found = verified(state, tmp_path)
    assert [check.tensors for check in found.checks if check.name == "constant"] == [["neck.1.weight"]]
    assert not [check for check in found.checks if check.name == "zero"]


def test_inspect_measures_values(tmp_path: Path) -> None:
    """Real numbers of every type, in several pieces, also strided and empty."""
    generator = torch.Generator().manual_seed(0)
    state = {f"{dtype}": torch.randn(7, 3, generator=generator).to(dtype) for dtype in ODD_BITS}
    state |= {"long": torch.randn(300, 301, generator=generator), "ids": torch.arange(5), "flag": torch.tensor([True])}
    state |= {"view": torch.randn(4, 6, generator=generator).T, "empty": torch.empty(0)}
    state["complex"] = torch.ones(2, dtype=torch.complex64)
    state["long"][:2, 0] = torch.tensor([torch.nan, torch.inf])
    torch.save(state, tmp_path / "x.pth")
    found = converter.inspect(tmp_path / "x.pth", values=True).to_json()["values"]
    assert found.keys() == state.keys() - {"complex"}
    assert found.pop("empty") == {"finite": 0, "non_finite": 0, "minimum": None, "maximum": None, "mean": 0.0}
    for name, values in found.items():
        numbers = state[name].double()
        finite = numbers[numbers.isfinite()]
        assert (values["finite"], values["non_finite"]) == (len(finite), numbers.numel() - len(finite))
        assert (values["minimum"], values["maximum"]) == (finite.min(), finite.max())
        assert values["mean"] == pytest.approx(float(finite.mean()), abs=1e-12)
    assert not converter.inspect(tmp_path / "x.pth").values
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "x.pth"), "--values"]).stdout
    assert "NaN or infinity in 1 tensor: long (2)" in shown and "NaN, inf" in shown.splitlines()[3]


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_bfloat16_is_widened_as_torch_does_but_without_torch(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = odd_values(torch.bfloat16, dict(models.sam_meta().state_dict()))
    source, output = tmp_path / f"odd.{form}", tmp_path / "out.safetensors"
    torch.save(state, source) if form == "pth" else safetensors.torch.save_file(state, source)
    # An import of the module that computes with torch fails.
    monkeypatch.setitem(sys.modules, "converter.tensors.evaluate", None)
    converter.convert(source, "sam", out=output, dtype="float32")
    for name, tensor in safetensors.torch.load_file(output).items():
        assert raw(tensor) == raw(state[f"image_encoder.{name}"].float()), name
