"""Activations at named stages, and ports whose mistakes they find."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors
import torch
import torch.nn.functional as F  # noqa: N812
from command import run
from safetensors.torch import load_file, save_file
from test_docs import DOCS
from walkthrough import check, steps

import converter
from converter.api.activations import compare_activations, save_activations
from converter.encoders import DeepEncoder, DeepEncoderV2, Qwen2Config, SamConfig
from converter.errors import LayoutError, OutputError, UsageError
from converter.verification.result import Verification

State = dict[str, torch.Tensor]
# A grid of patches that is not the trained one, so that positions are resampled, and windows that need padding.
SIZE = 192


def quiet(model: Any, seed: int) -> Any:
    """Random weights under which a signal survives all blocks."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.15
        if "norm" in name and name.endswith("weight"):
            tensor.data += 1
    return model.eval()


def save(model: torch.nn.Module, path: Path) -> Path:
    state = {f"model.{name}": t for name, t in model.state_dict().items() if not name.endswith("position_ids")}
    generator = torch.Generator().manual_seed(9)
    state |= {"model.projector.layers.weight": torch.randn(6, 128, generator=generator)}
    save_file(state | {"model.projector.layers.bias": torch.randn(6, generator=generator)}, path)
    return path


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Path]:
    """A file with a DeepEncoder, the model, and its activations."""
    return saved(
        quiet(DeepEncoder(replace(models.sam_sizes(), window=5), replace(models.clip_sizes(), heads=1)), 0),
        tmp_path_factory.mktemp("first"),
    )


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Path]:
    """The same of DeepSeek-OCR-2."""
    sam = SamConfig(
        image_size=64, width=24, depth=2, heads=2, mlp=40, window=5, global_blocks=(1,), neck=16, compressor=(32, 128)
    )
    qwen2 = Qwen2Config(width=128, depth=2, heads=2, key_value_heads=1, mlp=96)
    return saved(quiet(DeepEncoderV2(sam, qwen2), 1), tmp_path_factory.mktemp("second"))


def saved(model: Any, folder: Path) -> tuple[Path, Any, Path]:
    file = save(model, folder / "model.safetensors")
    return file, model, save_activations(file, folder / "ref.safetensors", sizes=(SIZE,), device="cpu")


def compared(file: Path, tensors: State, folder: Path, metadata: dict[str, str] | None = None) -> Verification:
    path = folder / "theirs.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata=metadata)
    return compare_activations(file, path, device="cpu")


def failures(result: Verification) -> str:
    return "; ".join(check.detail for check in result.checks if check.verdict == "failed")


def hooked(model: torch.nn.Module, names: dict[str, str], pixels: torch.Tensor) -> State:
    """What modules put out, by the names of stages."""
    found: State = {}
    for stage, name in names.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, stage=stage: found.update({stage: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        output = model(pixels)
    return found | {"output": output if isinstance(output, torch.Tensor) else output.last_hidden_state}


@pytest.mark.parametrize("version", [1, 2])
def test_every_stage_is_what_transformers_computes(version: int, request: pytest.FixtureRequest) -> None:
    models.newer("UnlimitedOcrVisionModel", "transformers.models.unlimited_ocr.modeling_unlimited_ocr")
    from converter.verification.deep_encoder import build_deep_encoder_reference

    _, model, reference = request.getfixturevalue("first" if version == 1 else "second")
    found = load_file(reference)
    theirs = build_deep_encoder_reference(model, model.state_dict(), torch.device("cpu")).model
    depth = len(model.sam_model.blocks)
    names = {f"sam_model.blocks.{i}": f"sam_encoder.layers.{i}" for i in range(depth)}
    names |= {"sam_model.neck": "sam_encoder.neck", "sam_model.net_2": "sam_encoder.proj.conv1"}
    names |= {"sam_model.net_3": "sam_encoder.proj.conv2"}
    if version == 1:
        names |= {f"vision_model.transformer.layers.{i}": f"vision_encoder.encoder.layers.{i}" for i in range(3)}
        names |= {"vision_model.pre_layrnorm": "vision_encoder.pre_layrnorm"}
    else:
        names |= {f"qwen2_model.model.model.layers.{i}": f"vision_encoder.layers.{i}" for i in range(2)}
        names |= {"qwen2_model.model.model.norm": "vision_encoder.norm"}
    recorded = hooked(theirs, names, found[f"{SIZE}.pixels"])
    assert recorded.keys() == {*names, "output"}
    for stage, tensor in recorded.items():
        torch.testing.assert_close(found[f"{SIZE}.{stage}"], tensor, rtol=1e-4, atol=1e-4)
    weight, bias = found[f"{SIZE}.projector"], found[f"{SIZE}.output"]
    assert weight.shape == (*bias.shape[:2], 6)


def test_the_file_says_what_it_is(first: tuple[Path, Any, Path], second: tuple[Path, Any, Path]) -> None:
    for (_, _, reference), encoder in ((first, "DeepEncoder"), (second, "DeepEncoderV2")):
        with safetensors.safe_open(reference, "pt") as file:
            metadata, names = file.metadata(), file.keys()
        assert (metadata["encoder"], metadata["sizes"]) == (encoder, str(SIZE))
        assert metadata["normalisation"] == "mean 0.5, std 0.5" and ("mask" in metadata) == (encoder == "DeepEncoderV2")
        assert "weights.sam_model.blocks.0" in metadata and len(metadata["weights"]) == 64
        assert all(tensor.dtype is torch.float32 for tensor in load_file(reference).values())
        assert len(names) == len(set(names)) > 12


def test_stages_and_an_existing_file(first: tuple[Path, Any, Path], tmp_path: Path) -> None:
    out = tmp_path / "some.safetensors"
    save_activations(first[0], out, sizes=(SIZE,), stages=("sam_model.ne*", "output"), device="cpu")
    assert sorted(load_file(out)) == [
        f"{SIZE}.{n}" for n in ("output", "sam_model.neck", "sam_model.net_2", "sam_model.net_3")
    ]
    with pytest.raises(OutputError, match="exists already"):
        save_activations(first[0], out, sizes=(SIZE,))
    save_activations(first[0], out, sizes=(SIZE,), stages=("output",), device="cpu", force=True)
    assert sorted(load_file(out)) == [f"{SIZE}.output"]
    file = tmp_path / "model.safetensors"
    file.write_bytes(first[0].read_bytes())
    with pytest.raises(OutputError, match="is the source itself\\nchoose another path with --save-activations"):
        save_activations(file, file, sizes=(SIZE,), force=True)
    assert file.read_bytes() == first[0].read_bytes()
    with pytest.raises(UsageError, match=r"--stages neck: matches no stage\nstages: pixels, sam_model"):
        save_activations(first[0], tmp_path / "other", sizes=(SIZE,), stages=("neck",))


def test_the_projector_of_an_mmproj_is_a_stage_too(first: tuple[Path, Any, Path], tmp_path: Path) -> None:
    vectors = {f"model.{name}": torch.ones(6) for name in ("image_newline", "view_seperator")}
    save_file(load_file(first[0]) | vectors, tmp_path / "model.safetensors")
    converter.encoder(tmp_path / "model.safetensors", with_projector=True, out=tmp_path / "mmproj.gguf")
    stage = f"{SIZE}.projector"
    save_activations(tmp_path / "mmproj.gguf", tmp_path / "ref", sizes=(SIZE,), stages=("projector",), device="cpu")
    torch.testing.assert_close(load_file(tmp_path / "ref")[stage], load_file(first[2])[stage])


@pytest.mark.parametrize("prefix", ["vision.", "a.b."])
def test_the_projector_is_found_under_another_prefix(
    prefix: str, first: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    vectors = {f"model.{name}": torch.ones(6) for name in ("image_newline", "view_seperator")}
    save_file(load_file(first[0]) | vectors, tmp_path / "model.safetensors")
    out = tmp_path / "out.safetensors"
    converter.encoder(tmp_path / "model.safetensors", with_projector=True, add_prefix=prefix, out=out)
    save_activations(out, tmp_path / "ref", sizes=(SIZE,), stages=("projector",), device="cpu")
    again = tmp_path / "again.safetensors"
    converter.encoder(out, with_projector=True, out=again)
    assert load_file(again).keys() == load_file(tmp_path / "model.safetensors").keys()


def test_one_encoder_is_no_whole_one(tmp_path: Path) -> None:
    save_file(models.sam_meta().image_encoder.state_dict(), tmp_path / "sam.safetensors")
    with pytest.raises(LayoutError, match="holds SAM alone"):
        save_activations(tmp_path / "sam.safetensors", tmp_path / "out.safetensors")


# What passes ------------------------------------------------------------------------------------------------------


def test_the_saved_file_agrees(first: tuple[Path, Any, Path], second: tuple[Path, Any, Path]) -> None:
    for file, _, reference in (first, second):
        result = compare_activations(file, reference, device="cpu")
        assert result.ok and result.traces and "same weights" in result.checks[0].detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_subset_in_another_type_agrees(dtype: torch.dtype, first: tuple[Path, Any, Path], tmp_path: Path) -> None:
    file, model, reference = first
    found = load_file(reference)
    computed = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        output = computed(found[f"{SIZE}.pixels"].to(dtype))
    subset = {f"{SIZE}.sam_model.neck": found[f"{SIZE}.sam_model.neck"].to(dtype), f"{SIZE}.output": output}
    result = compared(file, subset, tmp_path)
    assert result.ok, failures(result)
    assert "2 of 16 stages agree" in result.checks[1].detail


def test_channels_last_where_marked(first: tuple[Path, Any, Path], tmp_path: Path) -> None:
    file, _, reference = first
    name = f"{SIZE}.sam_model.net_3"
    tensor = load_file(reference)[name].permute(0, 2, 3, 1)
    assert compared(file, {name: tensor}, tmp_path, {"channels_last": "all"}).ok
    assert compared(file, {name: tensor}, tmp_path, {"channels_last": "sam_model.neck,sam_model.net_3"}).ok
    assert "has shape" in failures(compared(file, {name: tensor}, tmp_path))


def test_unknown_names_are_named(first: tuple[Path, Any, Path], tmp_path: Path) -> None:
    file, _, reference = first
    result = compared(file, {**load_file(reference), f"{SIZE}.mine": torch.ones(1)}, tmp_path)
    assert result.ok and any("mine: no stages" in note for note in result.notes)


# What does not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_percent(dtype: torch.dtype, first: tuple[Path, Any, Path], tmp_path: Path) -> None:
    file, _, reference = first
    found = {name: tensor.to(dtype) for name, tensor in load_file(reference).items()}
    found[f"{SIZE}.sam_model.neck"] *= 1.01
    details = failures(compared(file, found, tmp_path))
    assert "sam_model.neck is the first of 1 stages to depart, of 16" in details and "ours times 1.01" in details


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    return lambda found: {**found, name: change(found[name])}


NECK = f"{SIZE}.sam_model.neck"
WRONG: dict[str, tuple[Callable[[State], State], str]] = {
    "nan": (changed(NECK, lambda x: x.clone().fill_(torch.nan)), "sam_model.neck is the first .*NaN or infinity"),
    "shape": (changed(NECK, lambda x: x[..., 1:]), r"sam_model.neck has shape \[1, 16, 12, 11\], expected"),
    "integers": (changed(NECK, lambda x: x.to(torch.int32)), "sam_model.neck is torch.int32"),
    "no stage": (lambda found: {"neck": found[NECK]}, "no stage in common: .*a stage is 640.sam_model.neck"),
    "blocks exchanged": (
        lambda found: {**found, f"{SIZE}.sam_model.blocks.1": found[f"{SIZE}.sam_model.blocks.2"]},
        "sam_model.blocks.1 is the first of 1 stages .*usually wrong there: window padding",
    ),
    "pixels of CLIP": (
        lambda found: {f"{SIZE}.pixels": ((found[f"{SIZE}.pixels"] / 2 + 0.5) - MEAN) / STD},
        "pixels is the first .*explained by: CLIP's mean and standard deviation",
    ),
}  # fmt: skip
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@pytest.mark.parametrize("case", WRONG)
def test_what_departs_is_named(case: str, first: tuple[Path, Any, Path], tmp_path: Path) -> None:
    file, _, reference = first
    change, words = WRONG[case]
    result = compared(file, change(load_file(reference)), tmp_path)
    assert not result.ok
    assert re.search(words, failures(result)), failures(result)


def test_other_weights_are_named_block_by_block(first: tuple[Path, Any, Path], tmp_path: Path) -> None:
    file, model, _ = first
    other = copy.deepcopy(model)
    other.sam_model.blocks[1].mlp.lin1.bias.data += 1
    theirs = saved(other, tmp_path)[2]
    details = failures(compare_activations(file, theirs, device="cpu"))
    assert "of other weights, in sam_model.blocks.1" in details and "sam_model.blocks.1 is the first" in details


# Ports ------------------------------------------------------------------------------------------------------------


def as_mlx_vlm(model: Any) -> None:
    """mlx_vlm/models/deepseekocr/vision.py: exact GELU, and an epsilon of 1e-6 in the norms of layers."""
    for layer in model.vision_model.transformer.layers:
        layer.mlp.activation = F.gelu
        for norm in (layer.layer_norm1, layer.layer_norm2):
            norm.eps = 1e-6


def as_llama_cpp(model: Any) -> None:
    """tools/mtmd/models/deepseekocr.cpp, for tiles: positions of rows 0 to 255 as one line, class token last."""
    embeddings = model.vision_model.embeddings

    def forward(patches: torch.Tensor) -> torch.Tensor:
        width, n = patches.shape[1], patches.shape[2] * patches.shape[3]
        table = embeddings.position_embedding.weight
        grid, position = table[: len(table) - 1], table[len(table) - 1]
        line = F.interpolate(grid.reshape(1, 1, len(grid), width), size=(n, width), mode="bicubic").reshape(n, width)
        tokens = torch.cat([patches.reshape(1, width, n).transpose(1, 2)[0], embeddings.class_embedding[None]])
        return (tokens + torch.cat([line, position[None]]))[None]

    embeddings.forward = forward


def as_causal(model: Any) -> None:
    """Qwen2's own mask for all tokens."""
    for layer in model.qwen2_model.model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda x, image_tokens, forward=forward: forward(x, 1)


def as_unpadded(model: Any) -> None:
    """Windows at the right and bottom edges that attend to the image alone, without the padding."""

    def attend(attention: Any, x: torch.Tensor, window: int) -> torch.Tensor:
        rows, columns = x.shape[1:3]
        q, k, v = attention.qkv(x).reshape(rows, columns, 3, attention.heads, -1).permute(2, 3, 0, 1, 4)
        scores = torch.einsum("nhwd,nijd->nhwij", q, k) / q.shape[-1] ** 0.5
        for size, table, added in (
            (rows, attention.rel_pos_h, "nhwd,hid->nhwi"), (columns, attention.rel_pos_w, "nhwd,wjd->nhwj"),
        ):  # fmt: skip
            offsets = torch.arange(size)[:, None] - torch.arange(size) + window - 1
            bias = torch.einsum(added, q, table[offsets])
            scores = scores + (bias[..., None] if table is attention.rel_pos_h else bias[..., None, :])
        weights = scores.flatten(3).softmax(-1).reshape(scores.shape)
        return attention.proj(torch.einsum("nhwij,nijd->hwnd", weights, v).flatten(2)[None])

    def forward(block: Any, x: torch.Tensor) -> torch.Tensor:
        rows = [
            torch.cat([attend(block.attn, part, block.window) for part in row.split(block.window, 2)], 2)
            for row in block.norm1(x).split(block.window, 1)
        ]
        x = x + torch.cat(rows, 1)
        return x + block.mlp(block.norm2(x))

    for block in model.sam_model.blocks:
        if block.window is not None:
            block.forward = functools.partial(forward, block)


PORTS: dict[str, tuple[str, Callable[[Any], None], str, str]] = {
    "mlx-vlm": (
        "first", as_mlx_vlm, "vision_model.transformer.layers.0", "GELU and quick_gelu exchanged and another epsilon",
    ),
    "llama.cpp": ("first", as_llama_cpp, "vision_model.embeddings", "llama.cpp's positions"),
    "window padding masked": ("first", as_unpadded, "sam_model.blocks.0", "explained by: window padding masked"),
    "a causal mask": ("second", as_causal, "qwen2_model.model.model.layers.0", "a causal mask for image tokens"),
}  # fmt: skip


@pytest.mark.parametrize("all_stages", [True, False])
@pytest.mark.parametrize("port", PORTS)
def test_the_mistake_of_a_port_is_found(
    port: str, all_stages: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With all stages, and with what the encoder returns alone."""
    fixture, change, stage, words = PORTS[port]
    file, model, reference = request.getfixturevalue(fixture)
    found = load_file(reference)
    mistaken = copy.deepcopy(model)
    change(mistaken)
    names = [name for name, _ in mistaken.named_modules() if f"{SIZE}.{name}" in found]
    computed = hooked(mistaken, dict(zip(names, names, strict=True)), found[f"{SIZE}.pixels"])
    chosen = computed if all_stages else {"output": computed["output"]}
    details = failures(compared(file, {f"{SIZE}.{name}": tensor for name, tensor in chosen.items()}, tmp_path))
    assert f"{stage if all_stages else 'output'} is the first of" in details, details
    assert words in details, details


def test_the_commands(first: tuple[Path, Any, Path], tmp_path: Path) -> None:
    verify = functools.partial(run, first[0], cwd=tmp_path, program="dsocr-verify")
    out = tmp_path / "ref.safetensors"
    done = verify("--save-activations", out, "--sizes", "128", "--stages", "output", "--device", "cpu")
    assert (done.returncode, done.stdout.strip()) == (0, str(out))
    done = verify("--activations", out, "--device", "cpu", "--quiet")
    assert (done.returncode, done.stdout.strip()) == (0, "partly verified (activations)")
    for options, words in (
        (("--activations", out, "--source", "x"), "--source: cannot be combined with --activations"),
        (("--stages", "output"), "--stages: is for --save-activations"),
        (("--activations", out, "--save-activations", out), "choose one"),
    ):
        done = verify(*options)
        assert done.returncode == 2 and words in done.stderr


def test_the_page(first: tuple[Path, Any, Path], tmp_path: Path) -> None:
    (tmp_path / "encoder.safetensors").hardlink_to(first[0])
    check(steps(DOCS / "activations.md"), tmp_path)
