"""Packs of MLX, whose convolutions are stored channels last."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from inventories import is_convolution, mlx_name
from test_docs import DOCS
from test_docs import under as under_heading
from walkthrough import check

import converter
from converter.encoders import ClipEncoder, Qwen2Encoder, SamEncoder
from converter.errors import LayoutError, MappingError, UsageError
from converter.layouts import registry

State = dict[str, torch.Tensor]
PATCHES = "vision_model.embeddings.patch_embedding.weight"


@functools.cache
def deepseek() -> State:
    """DeepSeek-OCR's encoder under its own names, without the constant that its checkpoints lack."""
    sam = models.randomised(SamEncoder(models.sam_sizes())).state_dict()
    clip = models.randomised(ClipEncoder(models.clip_sizes()), 1).state_dict()
    del clip["embeddings.position_ids"]
    return under("model.sam_model.", sam) | under("model.vision_model.", clip)


@functools.cache
def deepseek_2() -> State:
    """The same of DeepSeek-OCR-2."""
    sam = models.randomised(SamEncoder(replace(models.sam_sizes(), compressor=(2 * models.NECK, models.QWEN2_WIDTH))))
    qwen2 = models.randomised(Qwen2Encoder(models.qwen2_sizes()), 1).state_dict()
    return under("model.sam_model.", sam.state_dict()) | under("model.qwen2_model.", qwen2)


def got_ocr2() -> State:
    return under("model.vision_tower_high.", only("model.sam_model.", deepseek()))


def sam_hf() -> State:
    return dict(models.sam_hf().state_dict())


def clip_hf() -> State:
    return dict(models.clip_hf().state_dict())


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def only(prefix: str, state: State) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def to_mlx(state: State) -> State:
    """mlx-vlm's `sanitize`, as transposes by hand."""
    return {mlx_name(name): channels_last(name, tensor) for name, tensor in state.items()}


def channels_last(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1).contiguous() if is_convolution(name, tuple(tensor.shape)) else tensor


def save(state: State, path: Path) -> Path:
    unshared = {name: tensor.clone() for name, tensor in state.items()}
    safetensors.torch.save_file(unshared, path, metadata={"format": "mlx"})
    return path


def check_equal(found: State, expected: State) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# By layout: its family, and a checkpoint in torch's order with a layout of the same names.
LAYOUTS: dict[str, tuple[str, str, Callable[[], State]]] = {
    "sam-mlx": ("sam", "sam-deepseek-ocr", deepseek),
    "clip-mlx": ("clip", "clip-deepseek-ocr", deepseek),
    "qwen2-mlx": ("qwen2", "qwen2-deepseek-ocr2", deepseek_2),
    "sam-got-ocr2-mlx": ("sam", "sam-got-ocr2", got_ocr2),
    "sam-hf-mlx": ("sam", "sam-hf", sam_hf),
    "clip-hf-mlx": ("clip", "clip-hf", clip_hf),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pack_is_read_as_its_torch_checkpoint_and_written_back(
    layout: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    for way in ("reads", "writes"):
        record_property(way, f"{layout}/safetensors")
    family, torchs, make = LAYOUTS[layout]
    pack, plain = save(to_mlx(make()), tmp_path / "pack.safetensors"), save(make(), tmp_path / "plain.safetensors")
    out, expected = tmp_path / "out.safetensors", tmp_path / "expected.safetensors"
    assert converter.convert(pack, family, out=out).mapping == layout
    assert converter.convert(plain, family, out=expected).mapping == torchs
    check_equal(safetensors.torch.load_file(out), safetensors.torch.load_file(expected))
    check_equal(converter.load(pack, family), safetensors.torch.load_file(expected))
    back = tmp_path / "back.safetensors"
    converter.convert(out, family, to=layout, out=back, fill_from=pack)
    prefix = registry.load(layout).prefixes[0]
    check_equal(safetensors.torch.load_file(back), under(prefix, only(prefix, to_mlx(make()))))


@pytest.mark.parametrize("layout", ["sam-mlx", "clip-hf-mlx"])
def test_a_pack_is_verified_against_its_torch_checkpoint(layout: str, tmp_path: Path) -> None:
    """With other values in one convolution, the tensor is named."""
    family, _, make = LAYOUTS[layout]
    pack, plain = save(to_mlx(make()), tmp_path / "pack.safetensors"), save(make(), tmp_path / "plain.safetensors")
    converter.convert(pack, family, out=tmp_path / "out.safetensors")
    assert converter.verify(tmp_path / "out.safetensors", plain, fast=True).ok
    assert converter.verify(tmp_path / "out.safetensors", pack, fast=True).ok


def test_diff_sees_no_difference_from_the_torch_checkpoint(tmp_path: Path) -> None:
    pack, plain = save(to_mlx(deepseek()), tmp_path / "pack"), save(deepseek(), tmp_path / "plain")
    assert converter.diff(pack, plain).equal


def quantised(bits: int) -> State:
    """A pack whose language model is quantised, with its vision part in bfloat16."""
    vision = {name: tensor.bfloat16() for name, tensor in to_mlx(deepseek()).items()}
    names = ("language_model.model.layers.0.self_attn.q_proj", "language_model.model.embed_tokens", "projector.layers")
    groups = {"scales": torch.ones(64, 1, dtype=torch.bfloat16), "biases": torch.ones(64, 1, dtype=torch.bfloat16)}
    packed = torch.ones(64, 2 * bits, dtype=torch.int32).view(torch.uint32)
    return vision | {
        f"{name}.{part}": tensor for name in names for part, tensor in {"weight": packed, **groups}.items()
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_pack_gives_its_encoder(bits: int, tmp_path: Path) -> None:
    pack = save(quantised(bits), tmp_path / "pack.safetensors")
    assert [match.layout for match in converter.inspect(pack).layouts] == ["sam-mlx", "clip-mlx"]
    record = converter.encoder(pack, out=tmp_path / "out.safetensors")
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    check_equal(found, {name: tensor.bfloat16() for name, tensor in deepseek().items()})
    assert {reason for name, reason in record.dropped.items() if "language_model" in name} == {
        "not part of the DeepEncoder (language model, projector)"
    }


def test_a_quantised_projector_is_refused_by_name(tmp_path: Path) -> None:
    others = ("projector.layers.bias", "image_newline", "view_separator")
    pack = save(quantised(4) | dict.fromkeys(others, torch.ones(4)), tmp_path / "pack")
    with pytest.raises(LayoutError, match=r"'projector.layers.weight' is quantised \(uint32\)"):
        converter.encoder(pack, out=tmp_path / "out.safetensors", with_projector=True)


# Tensors in torch's order in a pack whose other convolutions are MLX's, and what the message says of them.
HALF: dict[str, tuple[str, ...]] = {
    "one of the neck": ("sam_model.neck.2.weight",),
    "the compressor": ("sam_model.net_2.weight", "sam_model.net_3.weight"),
    "the patches": ("sam_model.patch_embed.proj.weight",),
    "most": ("sam_model.patch_embed.proj.weight", "sam_model.neck.0.weight", "sam_model.neck.2.weight"),
}


@pytest.mark.parametrize("case", HALF)
def test_a_half_transposed_pack_is_refused_by_name(case: str, tmp_path: Path) -> None:
    torchs = {mlx_name(name): tensor for name, tensor in deepseek().items()}
    pack = save(to_mlx(deepseek()) | {name: torchs[name] for name in HALF[case]}, tmp_path / "pack.safetensors")
    for convert in (functools.partial(converter.convert, family="sam"), converter.encoder):
        with pytest.raises(LayoutError, match=r"some convolutions channels (first|last)") as error:
            convert(pack, out=tmp_path / "out.safetensors")
        for name in HALF[case] if case != "most" else ("sam_model.net_2.weight", "sam_model.net_3.weight"):
            assert name in error.value.message
        assert not (tmp_path / "out.safetensors").exists()


def test_encoders_in_different_orders_are_refused(tmp_path: Path) -> None:
    pack = save(to_mlx(deepseek()) | {PATCHES: deepseek()[f"model.{PATCHES}"]}, tmp_path / "pack.safetensors")
    with pytest.raises(LayoutError, match=f"some convolutions channels first, as torch does .'{PATCHES}'"):
        converter.encoder(pack, out=tmp_path / "out.safetensors")


def test_a_shape_that_does_not_show_its_order_is_decided_by_the_others(tmp_path: Path) -> None:
    """Patches of three pixels: as many as there are colours."""
    name = f"model.{PATCHES}"
    state = deepseek() | {name: torch.randn(models.CLIP_WIDTH, 3, 3, 3)}
    for layout, made in (("clip-mlx", to_mlx(state)), ("clip-deepseek-ocr", state)):
        source = save(made, tmp_path / "pack.safetensors")
        record = converter.convert(source, "clip", out=tmp_path / "out.safetensors", force=True)
        assert record.mapping == layout
        found = safetensors.torch.load_file(tmp_path / "out.safetensors")
        assert torch.equal(found["embeddings.patch_embedding.weight"], state[name])


def test_an_incomplete_pack_is_not_refused_for_its_order(tmp_path: Path) -> None:
    pack = to_mlx(deepseek())
    del pack["sam_model.blocks.1.attn.qkv.bias"]
    with pytest.raises(MappingError, match=r"missing tensor 'blocks\.1\.attn\.qkv\.bias'"):
        converter.convert(save(pack, tmp_path / "pack.safetensors"), "sam", out=tmp_path / "out.safetensors")


# Names that MLX's programs do not use: the layout in torch's order, and the changes that the hint asks for.
PERMUTED = "then: [permute: [0, 3, 1, 2]]}"
TRANSPOSED: dict[str, tuple[str, Callable[[], State], dict[str, str]]] = {
    "clip-timm": (
        "clip", lambda: dict(models.clip_timm().state_dict()),
        {"patch_embedding.weight}": f"patch_embedding.weight, {PERMUTED}"},
    ),
    "sam-timm": (
        "sam", lambda: dict(models.sam_timm().state_dict()),
        {
            "[width, 3, patch, patch]": "[width, patch, patch, 3]", "[neck, width, 1, 1]": "[neck, 1, 1, width]",
            "- keep: patch_embed.proj.{param}": f"- {{keep: patch_embed.proj.weight, {PERMUTED}\n"
            "  - keep: patch_embed.proj.bias",
            "- keep: neck.0.weight": f"- {{keep: neck.0.weight, {PERMUTED}",
            "- keep: neck.2.weight": f"- {{keep: neck.2.weight, {PERMUTED}",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", TRANSPOSED)
def test_other_names_with_channels_last_and_what_the_hint_says(layout: str, tmp_path: Path) -> None:
    family, make, changes = TRANSPOSED[layout]
    plain = save(make(), tmp_path / "plain.safetensors")
    pack = save({name: channels_last(name, tensor) for name, tensor in make().items()}, tmp_path / "pack.safetensors")
    with pytest.raises(LayoutError, match=r"channels last, as MLX does.*\n.*add then: \[permute: \[0, 3, 1, 2\]\]"):
        converter.convert(pack, family, out=tmp_path / "out.safetensors")
    mapping = (Path(registry.__file__).parents[2] / "mappings" / f"{layout}.yaml").read_text()
    for old, new in changes.items():
        assert mapping.count(f"{old}\n") == 1
        mapping = mapping.replace(old, new)
    (tmp_path / "mine.yaml").write_text(mapping)
    converter.convert(pack, family, mapping=tmp_path / "mine.yaml", out=tmp_path / "out.safetensors")
    converter.convert(plain, family, out=tmp_path / "expected.safetensors")
    found, expected = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("out", "expected"))
    check_equal(found, expected)


def projector() -> State:
    tensors = {"projector.layers.weight": torch.randn(4, 8), "projector.layers.bias": torch.randn(4)}
    return under("model.", tensors | {"image_newline": torch.randn(4), "view_seperator": torch.randn(4)})


@pytest.mark.parametrize("out", ["pack.safetensors", "pack"])
@pytest.mark.parametrize("make", [deepseek, deepseek_2], ids=["version 1", "version 2"])
def test_an_encoder_is_written_as_a_pack(make: Callable[[], State], out: str, tmp_path: Path) -> None:
    """Byte for byte what a transpose by hand gives, in a file or a folder, and back."""
    source = save(make(), tmp_path / "model.safetensors")
    record = converter.encoder(source, to="mlx", out=tmp_path / out)
    assert (record.target, record.family) == ("mlx", "deepencoder")
    path = tmp_path / out / "model.safetensors" if out == "pack" else tmp_path / out
    check_equal(safetensors.torch.load_file(path), to_mlx(make()))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "mlx"
    converter.encoder(tmp_path / out, out=tmp_path / "back.safetensors")
    check_equal(safetensors.torch.load_file(tmp_path / "back.safetensors"), make())
    assert converter.verify(tmp_path / out, source, fast=True).ok


def test_a_pack_has_the_projector_and_the_type_that_were_chosen(tmp_path: Path) -> None:
    state = deepseek() | projector()
    out = tmp_path / "pack.safetensors"
    source = save(state, tmp_path / "model.safetensors")
    converter.encoder(source, to="mlx", out=out, with_projector=True, dtype="bfloat16")
    check_equal(safetensors.torch.load_file(out), {name: tensor.bfloat16() for name, tensor in to_mlx(state).items()})
    converter.encoder(out, out=tmp_path / "back.safetensors", with_projector=True)
    expected = {name: tensor.bfloat16() for name, tensor in state.items()}
    check_equal(safetensors.torch.load_file(tmp_path / "back.safetensors"), expected)


def test_a_written_pack_is_verified(tmp_path: Path) -> None:
    """One convolution whose rows and columns are exchanged has the right shape, and is named."""
    source, out = save(deepseek() | projector(), tmp_path / "model.safetensors"), tmp_path / "pack.safetensors"
    converter.encoder(source, to="mlx", out=out, with_projector=True, record=tmp_path / "pack.json")
    assert converter.verify(out, source, fast=True, record=tmp_path / "pack.json").ok
    wrong = safetensors.torch.load_file(out)
    wrong["sam_model.net_3.weight"] = wrong["sam_model.net_3.weight"].transpose(1, 2).contiguous()
    check = next(
        check
        for check in converter.verify(save(wrong, tmp_path / "wrong.safetensors"), source, fast=True).checks
        if check.group == "bytes" and check.verdict == "failed"
    )
    assert "sam_model.net_3.weight" in check.tensors


def test_an_encoder_is_put_into_a_pack(tmp_path: Path) -> None:
    """The quantised language model stays as it is."""
    pack = save(quantised(4), tmp_path / "pack.safetensors")
    new = {name: tensor + 1 for name, tensor in deepseek().items()}
    source = save(new, tmp_path / "model.safetensors")
    converter.encoder(source, into=pack, out=tmp_path / "out.safetensors")
    expected = quantised(4) | {name: tensor.bfloat16() for name, tensor in to_mlx(new).items()}
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), expected)


ERRORS: dict[str, tuple[dict[str, str], str]] = {
    "unknown": ({"to": "coreml"}, "to 'coreml': expected one of mlx"),
    "prefix": ({"to": "mlx", "add_prefix": "a."}, "--add-prefix: cannot be combined with --to mlx"),
    "pth": ({"to": "mlx", "out": "pack.pth"}, "--to mlx: is read from safetensors, not pth"),
    "into": ({"to": "mlx", "into": "host", "out": "out"}, "--to: cannot be combined with --into"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_usage(case: str, tmp_path: Path) -> None:
    options, message = ERRORS[case]
    with pytest.raises(UsageError, match=message):
        converter.encoder(tmp_path / "absent.safetensors", **options)


def test_clip_without_its_patches_is_no_pack(tmp_path: Path) -> None:
    state = deepseek()
    source = save({name: state[name] for name in state if not name.endswith(PATCHES)}, tmp_path / "model.safetensors")
    with pytest.raises(MappingError, match=f"lacks tensors of clip-mlx: {PATCHES}"):
        converter.encoder(source, to="mlx", out=tmp_path / "pack.safetensors")


def save_example(folder: Path) -> None:
    """The checkpoints of docs/ports.md: DeepSeek-OCR, a pack of 4 bits of it, and what was trained from it."""
    language = {"model.layers.0.mlp.up_proj.weight": torch.ones(8, 4), "lm_head.weight": torch.ones(8, 4)}
    original = {name: tensor.bfloat16() for name, tensor in (deepseek() | projector() | language).items()}
    trained = original | {name: tensor + 1 for name, tensor in original.items() if name.startswith("model.sam_model.")}
    for name, state in {"DeepSeek-OCR": original, "DeepSeek-OCR-4bit": quantised(4), "trained": trained}.items():
        (folder / name).mkdir()
        save(state, folder / name / "model.safetensors")


def test_the_page_of_ports(tmp_path: Path) -> None:
    save_example(tmp_path)
    check(under_heading(DOCS / "ports.md", "## MLX"), tmp_path)
