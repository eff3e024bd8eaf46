"""Files of every command are verified with their sources, and a mapping is not its own witness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch
from torch import Tensor

import converter
from converter.api.verify import verify
from converter.errors import DsocrError, LayoutError, UsageError
from converter.layouts import registry
from converter.verification.result import Verification

SIZES = (128,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources: Meta's SAM, transformers' CLIP, and its vision tower alone."""
    path = tmp_path_factory.mktemp("sources")
    torch.save(models.sam_meta().state_dict(), path / "sam.pth")
    clip = models.clip_hf().state_dict()
    torch.save(clip, path / "clip.pth")
    torch.save({k: v for k, v in clip.items() if k.startswith("vision_model.")}, path / "tower.pth")
    return path


def states(found: Verification) -> dict[str, str]:
    return {part.name: part.state for part in found.parts}


def changed(path: Path, out: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, out)
    return out


def add_one(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name] + 1})


# A mapping -----------------------------------------------------------------------------------------------------------


def mapping(path: Path, *changes: tuple[str, str]) -> Path:
    """The mapping of clip-hf under another name, with changes."""
    text = registry.yaml_text("clip-hf")
    for old, new in (("layout: clip-hf", "layout: mine"), *changes):
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


EXCHANGED = ("parts: {proj: [q, k, v]}", "parts: {proj: [k, q, v]}")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("layout", ["mine", "clip-hf"])
def test_a_wrong_mapping_of_a_known_layout_fails(fast: bool, layout: str, folder: Path, tmp_path: Path) -> None:
    wrong, out = (
        mapping(tmp_path / "wrong.yaml", EXCHANGED, ("layout: mine", f"layout: {layout}")),
        tmp_path / "out.pth",
    )
    converter.convert(folder / "clip.pth", "clip", out=out, mapping=wrong)
    found = verify(out, folder / "clip.pth", mapping=wrong, fast=fast, sizes=SIZES, device="cpu")
    assert found.result == "not verified"
    (check,) = [check for check in found.checks if check.name == "mapping"]
    assert check.verdict == "failed" and "clip-hf" in check.detail and f"{wrong}:" in check.detail
    assert all(name.endswith(("qkv_proj.weight", "qkv_proj.bias")) for name in check.tensors)
    assert fast or {check.verdict for check in found.checks if check.group == "outputs"} == {"failed"}


def test_a_right_mapping_of_a_known_layout_is_verified(folder: Path, tmp_path: Path) -> None:
    """The layout's own library loads the source, and bytes are held against our own mapping."""
    # The same tensors by another expression.
    twice = ("keep: pre_layrnorm.{param}", "rename: pre_layrnorm.{param}\n    to: pre_layrnorm.{param}")
    right, out = mapping(tmp_path / "right.yaml", twice), tmp_path / "out.pth"
    converter.convert(folder / "clip.pth", "clip", out=out, mapping=right)
    found = verify(out, folder / "clip.pth", mapping=right, sizes=SIZES, device="cpu")
    assert found.result == "verified" and "loaded through" not in found.reference
    assert "right.yaml makes the same tensors as clip-hf" in " ".join(check.detail for check in found.checks)


def test_a_mapping_of_an_unknown_layout_is_not_checked(folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "theirs.pth", tmp_path / "out.pth"
    torch.save({k.replace("encoder.layers", "trunk"): v for k, v in torch.load(folder / "tower.pth").items()}, source)
    mine = mapping(tmp_path / "mine.yaml")
    mine.write_text(mine.read_text().replace("encoder.layers", "trunk"))
    converter.convert(source, "clip", out=out, mapping=mine)
    found = verify(out, source, mapping=mine, sizes=SIZES, device="cpu")
    assert found.result == "partly verified (structure, bytes by mine.yaml)" and found.ok
    assert any("mapping mine.yaml itself was not checked" in note for note in found.notes)
    outputs = [check for check in found.checks if check.group == "outputs"]
    assert len(outputs) == 2 and {check.verdict for check in outputs} == {"inconclusive"}
    # Nor would these outputs have shown a mistake.
    assert found.controls == []


# Other layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "to", "options"),
    [
        ("sam", "sam-hf", {}),
        ("sam", "sam-hf", {"full_model": True}),
        ("clip", "clip-openai", {}),
        ("clip", "clip-openai", {"full_model": True}),
        ("clip", "clip-timm", {"dtype": "bfloat16"}),
        ("clip", "clip-hf", {"image_size": 84}),
    ],
)
def test_other_layouts_are_verified(
    family: str, to: str, options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    source, out = folder / f"{family}.pth", tmp_path / "out.safetensors"
    converter.convert(source, family, to=to, out=out, **options)
    assert verify(out, source, device="cpu").result == "verified"
    norms = [name for name in safetensors.torch.load_file(out) if name.endswith(("norm1.weight", "ln_1.weight"))]
    name = next(name for name in norms if not name.startswith(("transformer.", "mask_decoder.", "prompt_encoder.")))
    wrong = verify(changed(out, tmp_path / "wrong.safetensors", add_one(name)), source, device="cpu")
    assert states(wrong) == {"structure": "done", "bytes": "failed", "outputs": "failed"}
    assert [check.name for check in wrong.checks if check.group == "bytes"] == [name]


def test_a_folder_for_transformers_is_verified(folder: Path, tmp_path: Path) -> None:
    converter.convert(folder / "sam.pth", "sam", to="sam-hf", out=tmp_path / "sam-hf")
    found = verify(tmp_path / "sam-hf", folder / "sam.pth", device="cpu")
    assert found.result == "verified"
    (check,) = [check for check in found.checks if check.group == "outputs"]
    # Two libraries, each with its own names.
    assert "segment-anything" in check.name and "SamVisionEncoder" in check.detail


def test_tensors_of_a_donor_are_compared_or_named(folder: Path, tmp_path: Path) -> None:
    source, donor, out = folder / "tower.pth", folder / "clip.pth", tmp_path / "out.pth"
    converter.convert(source, "clip", to="clip-openai", full_model=True, fill_from=donor, out=out)
    both = verify(out, {"source": source, "fill-from": donor}, fast=True, device="cpu")
    assert both.result == "partly verified (structure, bytes)"
    alone = verify(out, source, fast=True, device="cpu")
    assert alone.result == "partly verified (structure)"
    (check,) = [check for check in alone.checks if check.verdict == "inconclusive"]
    assert "token_embedding.weight" in check.tensors and "fill-from=" in check.detail


def test_one_of_two_encoders_is_compared_with_its_own(folder: Path, tmp_path: Path) -> None:
    tower = torch.load(folder / "tower.pth")
    both = {f"student.{k}": v for k, v in tower.items()} | {f"teacher.{k}": v + 1 for k, v in tower.items()}
    torch.save(both, tmp_path / "both.pth")
    out = tmp_path / "out.safetensors"
    converter.convert(tmp_path / "both.pth", "clip", prefix="student.", out=out)
    right = verify(out, tmp_path / "both.pth", prefix="student.", fast=True, device="cpu")
    wrong = verify(out, tmp_path / "both.pth", prefix="teacher.", fast=True, device="cpu")
    assert (states(right)["bytes"], states(wrong)["bytes"]) == ("done", "failed")
    # The user's mapping is compared with the layout of the encoder that it converts.
    mine = mapping(tmp_path / "mine.yaml")
    found = verify(out, tmp_path / "both.pth", mapping=mine, prefix="student.", fast=True, device="cpu")
    assert "mapping" in [check.name for check in found.checks if check.verdict == "passed"]


# Whole encoders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    out = folder / "encoder.safetensors"
    converter.encoder(sam=folder / "sam.pth", clip=folder / "clip.pth", compressor="random:3", out=out)
    return out


def roles(folder: Path, **more: str | Path) -> Mapping[str, str | Path]:
    return {"sam": folder / "sam.pth", "clip": folder / "clip.pth", **more}


def test_an_encoder_is_verified_with_two_sources(whole: Path, folder: Path, tmp_path: Path) -> None:
    sources = roles(folder, compressor="random:3")
    found = verify(whole, sources, sizes=SIZES, device="cpu")
    assert found.result == "verified" and found.family == "deepencoder"
    assert "ImageEncoderViT" in found.reference and "CLIPVisionModel" in found.reference
    assert len({(check.group, check.name) for check in found.checks}) == len(found.checks)
    name = "model.vision_model.transformer.layers.1.layer_norm2.weight"
    wrong = verify(changed(whole, tmp_path / "x.safetensors", add_one(name)), sources, sizes=SIZES, device="cpu")
    failed = [check for check in wrong.checks if check.verdict == "failed"]
    # CLIP by itself, and CLIP on SAM's features: both encoders run together.
    _, clip, both = found.reference.split(" + ")
    assert [check.name.partition(" at ")[0] for check in failed] == [name, f"clip: {clip}", both]
    assert "layers.1.layer_norm2.weight differs from the source" in failed[-1].detail


def test_encoders_that_do_not_fit_together(whole: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.sam_model.net_3.weight"
        tensors[name] = torch.cat([tensors[name]] * 2)

    found = verify(changed(whole, tmp_path / "x.safetensors", widen), sizes=SIZES, device="cpu")
    (check,) = (check for check in found.checks if check.verdict == "failed")
    assert check.group == "structure" and "must end in CLIP's" in check.detail


def test_an_encoder_of_another_compressor_is_not(whole: Path, folder: Path) -> None:
    found = verify(whole, roles(folder, compressor="random:4"), fast=True, device="cpu")
    failed = [check.name for check in found.checks if check.verdict == "failed"]
    assert failed == ["model.sam_model.net_2.weight", "model.sam_model.net_3.weight"]


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"sam": "sam.pth"}, UsageError, "--source clip=CHECKPOINT"),
        ({"sam": "sam.pth", "clip": "clip.pth"}, LayoutError, "--source compressor="),
        (
            {"source": "sam.pth", "fill-from": "sam.pth"},
            UsageError,
            "expected source, sam, clip, compressor, queries, into",
        ),
    ],
)
def test_what_is_missing_is_said(
    given: Mapping[str, str], error: type[DsocrError], says: str, whole: Path, folder: Path
) -> None:
    with pytest.raises(error) as raised:
        verify(whole, {role: folder / name for role, name in given.items()}, fast=True, device="cpu")
    assert says in str(raised.value)


def test_an_encoder_of_several_is_verified_with_its_prefix(whole: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(whole)
    several = {f"student.{name}": tensor for name, tensor in tensors.items()}
    several |= {f"teacher.{name}": tensor + 1 for name, tensor in tensors.items()}
    safetensors.torch.save_file(several, tmp_path / "several.safetensors")
    out = tmp_path / "out.safetensors"
    converter.encoder(tmp_path / "several.safetensors", prefix="student.", out=out)
    source = tmp_path / "several.safetensors"
    assert states(verify(out, source, prefix="student.", fast=True))["bytes"] == "done"
    assert states(verify(out, source, prefix="teacher.", fast=True))["bytes"] == "failed"
    with pytest.raises(LayoutError, match="2 SAM encoders"):
        verify(out, source, fast=True)


def test_a_file_of_two_state_dicts_is_not_verified_by_one_of_them(whole: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(whole)
    ema = {name: tensor + 1 for name, tensor in tensors.items()}
    torch.save({"model": tensors, "ema": ema}, tmp_path / "state.pth")
    with pytest.raises(LayoutError, match="model, ema") as raised:
        verify(tmp_path / "state.pth", whole, fast=True)
    assert "verify the output" in str(raised.value)


@pytest.mark.parametrize("option", ["mapping", "state_dict"])
def test_an_encoder_has_no_options_of_single_ones(option: str, whole: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}"):
        verify(whole, roles(folder, compressor="random:3"), fast=True, **{option: "model"})


def test_an_encoder_is_not_its_own_source(whole: Path) -> None:
    with pytest.raises(UsageError, match="is the converted file itself"):
        verify(whole, whole, fast=True)


def test_an_encoder_is_verified_with_its_checkpoint_and_its_host(whole: Path, folder: Path, tmp_path: Path) -> None:
    host = {name: tensor.bfloat16() * 2 for name, tensor in safetensors.torch.load_file(whole).items()}
    width = len(host["model.vision_model.pre_layrnorm.weight"])
    host |= {"model.projector.layers.weight": torch.ones(8, 2 * width), "model.projector.layers.bias": torch.ones(8)}
    host |= {
        "model.image_newline": torch.ones(8),
        "model.view_seperator": torch.ones(8),
        "lm_head.weight": torch.ones(9, 8),
    }
    (tmp_path / "host").mkdir()
    safetensors.torch.save_file(host, tmp_path / "host" / "model.safetensors")
    converter.encoder(
        tmp_path / "host", with_projector=True, add_prefix="", dtype="float32", out=tmp_path / "taken.pth"
    )
    assert verify(tmp_path / "taken.pth", tmp_path / "host", sizes=SIZES, device="cpu").result == "verified"
    converter.encoder(whole, into=tmp_path / "host", out=tmp_path / "new")
    sources = {"source": whole, "into": tmp_path / "host"}
    assert verify(tmp_path / "new", sources, fast=True, device="cpu").result == "partly verified (structure, bytes)"
    assert verify(tmp_path / "host", sources, fast=True, device="cpu").result == "not verified"
    # Tensors that are nobody's encoder are the host's.
    changed(tmp_path / "new" / "model.safetensors", tmp_path / "new" / "model.safetensors", add_one("lm_head.weight"))
    found = verify(tmp_path / "new", sources, fast=True, device="cpu")
    assert [check.name for check in found.checks if check.verdict == "failed"] == ["lm_head.weight"]
