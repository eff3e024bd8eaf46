"""Folders for transformers: what from_pretrained loads, and that they appear whole or not at all."""

from __future__ import annotations

import copy
import errno
import functools
import json
import math
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from command import run, script
from torch import Tensor, nn

import converter
from converter.checkpoint.open import open_checkpoint
from converter.errors import ContainerError, LayoutError, OutputError, UsageError
from converter.layouts import registry
from converter.options import ConvertOptions
from converter.output.pretrained_config import config_files, sam_documents
from converter.plan.assumptions import default_assumptions
from converter.plan.planner import resolve
from converter.storage import atomic_output

State = dict[str, Tensor]
FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def imagenet() -> tuple[Tensor, Tensor]:
    """Mean and deviation of ImageNet's channels, from 0 to 255."""
    return (
        torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1),
        torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1),
    )


@functools.cache
def sam() -> nn.Module:
    """Meta's SAM with the eight heads in its decoder that no tensor tells."""
    from segment_anything.modeling import MaskDecoder, Sam, TwoWayTransformer

    whole = copy.deepcopy(models.sam_meta())
    transformer = TwoWayTransformer(depth=2, embedding_dim=models.NECK, mlp_dim=32, num_heads=8)
    decoder = MaskDecoder(
        transformer_dim=models.NECK, transformer=transformer, iou_head_depth=3, iou_head_hidden_dim=models.NECK
    )
    model = models.randomised(Sam(whole.image_encoder, whole.prompt_encoder, decoder), seed=3)
    # What was drawn for them, too, is no part of a checkpoint.
    model.pixel_mean, model.pixel_std = imagenet()
    for module in model.image_encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return model.eval()


@functools.cache
def clip() -> nn.Module:
    """CLIP with heads of 64 channels, which no tensor tells."""
    from transformers import CLIPConfig, CLIPModel

    layers = {"num_hidden_layers": 2, "intermediate_size": 96}
    text = {"hidden_size": 64, "num_attention_heads": 1, "vocab_size": 99, "max_position_embeddings": 9, **layers}
    vision = {"hidden_size": 128, "num_attention_heads": 2, "image_size": 56, "patch_size": 14, **layers}
    text |= {"eos_token_id": 98, "bos_token_id": 97}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return models.randomised(model, seed=4).eval()


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    return save(sam().state_dict(), tmp_path / "sam.pth")


def save(state: State, path: Path) -> Path:
    torch.save(state, path)
    return path


def loaded(kind: type, folder: Path) -> nn.Module:
    """The model, of which every tensor was in the folder, and which has a place for each."""
    # As it is stored, which is what transformers does unasked from 5 on.
    stored = {"torch_dtype": "auto"} if models.OLD_TRANSFORMERS else {}
    model, info = kind.from_pretrained(folder, output_loading_info=True, **stored)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


# Layouts that `from_pretrained` reads, each shown below.
WRITTEN = ("sam-hf", "clip-hf")

# What loads them --------------------------------------------------------------------------------------------------


def test_a_whole_sam_from_metas_file_and_back(
    meta: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("writes", "sam-hf/folder")
    from transformers import SamModel, SamProcessor

    record = converter.convert(meta, "sam", to="sam-hf", full_model=True, out=tmp_path / "sam")
    assert record.output == str(tmp_path / "sam")
    assert sorted(path.name for path in (tmp_path / "sam").iterdir()) == FILES
    assert record.num_tensors == len(safetensors.torch.load_file(tmp_path / "sam" / "model.safetensors"))

    side = models.GRID * models.PATCH
    processor = SamProcessor.from_pretrained(tmp_path / "sam")
    picture = torch.randint(0, 256, (3, 40, side), dtype=torch.uint8)
    inputs = processor(picture, input_points=[[[[20, 10], [30, 30]]]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, side, side)
    model = loaded(SamModel, tmp_path / "sam")
    with torch.no_grad():
        out = model(pixel_values=inputs["pixel_values"], input_points=inputs["input_points"].float())
        record = {
            "image": picture.float(),
            "original_size": (40, side),
            "point_coords": inputs["input_points"][0].float(),
            "point_labels": torch.ones(1, 2),
        }
        expected = sam()([record], multimask_output=True)[0]
    torch.testing.assert_close(out.pred_masks[0], expected["low_res_logits"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out.iou_scores[0], expected["iou_predictions"], rtol=1e-3, atol=1e-3)

    converter.convert(tmp_path / "sam", "sam", to="sam-meta", full_model=True, out=tmp_path / "back.pth", format="pth")
    returned = torch.load(tmp_path / "back.pth", weights_only=True)
    assert returned.keys() == sam().state_dict().keys()
    assert all(torch.equal(returned[name], tensor) for name, tensor in sam().state_dict().items())


def test_sams_encoder_alone(meta: Path, tmp_path: Path) -> None:
    vision = models.newer("SamVisionModel")
    converter.convert(meta, "sam", to="sam-hf", out=tmp_path / "encoder")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = loaded(vision, tmp_path / "encoder")(pixels).last_hidden_state
        torch.testing.assert_close(features, sam().image_encoder(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_clips_vision_tower(dtype: str, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionModel

    path = save(clip().state_dict(), tmp_path / "clip.pth")
    converter.convert(path, "clip", to="clip-hf", out=tmp_path / "clip", dtype=dtype)
    assert sorted(path.name for path in (tmp_path / "clip").iterdir()) == FILES
    model = loaded(CLIPVisionModel, tmp_path / "clip")
    assert model.dtype == (torch.float32 if dtype == "keep" else torch.bfloat16)
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "clip")
    pixels = processor(torch.randint(0, 256, (3, 80, 70), dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 56, 56)
    if dtype == "keep":
        with torch.no_grad():
            torch.testing.assert_close(model(pixels)[:2], clip().vision_model(pixels)[:2])


def test_a_whole_clip_through_openais_names(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("writes", "clip-hf/folder")
    from transformers import CLIPModel

    path = save(clip().state_dict(), tmp_path / "clip.pth")
    converter.convert(path, "clip", to="clip-openai", full_model=True, out=tmp_path / "openai.pth", format="pth")
    converter.convert(tmp_path / "openai.pth", "clip", to="clip-hf", full_model=True, out=tmp_path / "clip")
    model = loaded(CLIPModel, tmp_path / "clip")
    inputs = {"pixel_values": torch.randn(2, 3, 56, 56), "input_ids": torch.tensor([[97, 5, 6, 98], [97, 7, 98, 98]])}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits_per_image, clip()(**inputs).logits_per_image)


def test_resampled_positions_are_in_the_config(tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    path = save(clip().state_dict(), tmp_path / "clip.pth")
    converter.convert(path, "clip", to="clip-hf", out=tmp_path / "clip", image_size=84)
    assert loaded(CLIPVisionModel, tmp_path / "clip").config.image_size == 84


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("vit-b", {}),
        ("vit-l", {"hidden_size": 1024, "mlp_dim": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}),
        ("vit-h", {"hidden_size": 1280, "mlp_dim": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}),
    ],
)
def test_sams_config_is_that_of_its_size(size: str, expected: dict[str, object]) -> None:
    """What transformers fills in for a key that is not there must be what the file says, too."""
    from transformers import SamConfig, SamImageProcessor

    names = script("make_checkpoints").inventory("sam-meta", size)
    shapes = {name.removeprefix("image_encoder."): shape for name, (_, shape) in names.items()}
    document, preprocessor = sam_documents(shapes, default_assumptions(registry.canonical("sam")), full_model=True)
    blocks = {"vit-b": [2, 5, 8, 11], "vit-l": [5, 11, 17, 23], "vit-h": [7, 15, 23, 31]}[size]
    usual = SamConfig()
    for name, value in {**expected, "global_attn_indexes": blocks}.items():
        setattr(usual.vision_config, name, value)
    found = SamConfig(**document).to_dict()
    for name in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        for key, value in getattr(usual, name).to_dict().items():
            assert key in ("scale", "transformers_version") or found[name][key] == value, key
    default = json.loads(SamImageProcessor().to_json_string())
    assert {key: default[key] for key in preprocessor if key in default and "type" not in key} == {
        key: value for key, value in preprocessor.items() if key in default and "type" not in key
    }
    assert preprocessor.keys() - default.keys() <= {"processor_class", "image_processor_type"}


def test_clips_config_is_openais(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor

    names = script("make_checkpoints").inventory("clip-hf", "vit-l-14")
    path = tmp_path / "clip.safetensors"
    header, end = {}, 0
    for name, (dtype, shape) in names.items():
        start, end = end, end + math.prod(shape) * (8 if dtype == "int64" else 4)
        header[name] = {"dtype": "I64" if dtype == "int64" else "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    # All zeros, and no free space on the disk.
    os.truncate(path, 8 + len(text) + end)
    with closing(open_checkpoint(path)) as opened:
        plan = resolve(opened, ConvertOptions("clip", "clip-hf", full_model=True), None).plan
    assert len(plan.outputs) == 590
    (tmp_path / "clip").mkdir()
    for name, data in config_files(plan, True, {}).items():
        (tmp_path / "clip" / name).write_bytes(data)
    found = CLIPConfig.from_pretrained(tmp_path / "clip")
    assert found.projection_dim == 768
    text, vision = found.text_config, found.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers) == (768, 12, 12)
    assert (text.intermediate_size, text.vocab_size) == (3072, 49408)
    assert (text.bos_token_id, text.eos_token_id) == (49406, 49407)
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (1024, 16, 24)
    assert (vision.intermediate_size, vision.image_size, vision.patch_size) == (4096, 224, 14)
    assert (text.hidden_act, vision.hidden_act) == ("quick_gelu", "quick_gelu")
    found = json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text())
    default = json.loads(CLIPImageProcessor().to_json_string())
    assert {key: default[key] for key in found} == found


# Which outputs are folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.pt", "x.bin"])
def test_a_weight_files_suffix_means_a_file(name: str, meta: Path, tmp_path: Path) -> None:
    converter.convert(meta, "sam", to="sam-hf", full_model=True, out=tmp_path / name)
    assert (tmp_path / name).is_file()


def test_layouts_that_nothing_loads_from_a_folder(meta: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"out: names a folder, but sam-timm is written to one file\n.*\.safetensors"
    ) as error:
        converter.convert(meta, "sam", to="sam-timm", out=tmp_path / "out")
    assert error.value.exit_code == 2
    with pytest.raises(UsageError, match=r"names a folder, which needs safetensors, not pth\n"):
        converter.convert(meta, "sam", to="sam-hf", out=tmp_path / "out", format="pth")
    assert list(tmp_path.iterdir()) == [meta]


def test_heads_that_no_tensor_tells(tmp_path: Path) -> None:
    path = save(models.open_clip().state_dict(), tmp_path / "clip.pth")
    with pytest.raises(LayoutError, match=r"32 channels, expected a multiple .*\n.*end --output in \.safetensors"):
        converter.convert(path, "clip", to="clip-hf", full_model=True, out=tmp_path / "clip", dry_run=True)


def test_a_dry_run_writes_no_folder(meta: Path, tmp_path: Path) -> None:
    converter.convert(meta, "sam", to="sam-hf", out=tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == [meta]


# All at once, or not at all ---------------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_by_force(meta: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "pytorch_model.bin").write_text("older")
    with pytest.raises(OutputError, match="exists already"):
        converter.convert(meta, "sam", to="sam-hf", out=out)
    assert [path.name for path in out.iterdir()] == ["pytorch_model.bin"]
    converter.convert(meta, "sam", to="sam-hf", out=out, force=True)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert sorted(tmp_path.iterdir()) == [out, meta]


@pytest.mark.parametrize("swap", [True, False], ids=["at once", "in two steps"])
def test_a_folder_is_never_half_replaced(
    swap: bool, meta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails, at every step, leaves the old folder as it was and no other file."""
    out = tmp_path / "out"
    converter.convert(meta, "sam", to="sam-hf", out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if not swap:
        monkeypatch.setattr(atomic_output, "_exchange", lambda one, other: False)
    steps = 0

    def failing(real: object, at: int) -> object:
        def step(*args: object, **options: object) -> object:
            nonlocal steps
            steps += 1
            if steps == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)  # type: ignore[operator]

        return step

    real = {name: getattr(os, name) for name in ("fsync", "write", "rename")}
    at = 0
    while True:
        at, steps = at + 1, 0
        with monkeypatch.context() as patch:
            for name, function in real.items():
                patch.setattr(os, name, failing(function, at))
            try:
                converter.convert(meta, "sam", to="sam-hf", full_model=True, out=out, force=True)
            except OutputError as error:
                assert "No space left" in str(error) and str(out) in str(error)
            found = {path.name: path.read_bytes() for path in out.iterdir()}
            assert sorted(tmp_path.iterdir()) == [out, meta]
            if found != before:
                break
    # The last fsync, that of the rename, may fail after the new folder is in place.
    assert sorted(found) == FILES
    assert b"SamModel" in found["config.json"]
    assert at > 8


def test_a_source_that_is_damaged_leaves_no_folder(meta: Path, tmp_path: Path) -> None:
    def grow(what: str, done: int, total: int) -> None:
        with meta.open("ab") as file:
            file.write(b"more")

    with pytest.raises(ContainerError, match="changed while it was being read"):
        converter.convert(meta, "sam", to="sam-hf", out=tmp_path / "out", on_progress=grow)
    assert list(tmp_path.iterdir()) == [meta]


def test_a_folder_that_appears_meanwhile_is_left_as_it_is(meta: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(what: str, done: int, total: int) -> None:
        out.mkdir(exist_ok=True)

    with pytest.raises(OutputError, match="was created meanwhile"):
        converter.convert(meta, "sam", to="sam-hf", out=out, on_progress=appear)
    assert sorted(tmp_path.iterdir()) == [out, meta]
    assert list(out.iterdir()) == []


def test_folders_that_hold_more_than_a_model_are_not_replaced(
    meta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (out / ".git").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"is not replaced, as it has the subfolder \.git"):
        converter.convert(meta, "sam", to="sam-hf", out=out, force=True)
    (out / ".git").rmdir()
    monkeypatch.chdir(out)
    for name in (".", "..", str(tmp_path)):
        with pytest.raises(OutputError, match=r"is the current folder|holds the source"):
            converter.convert(meta, "sam", to="sam-hf", out=name, force=True)
    assert sorted(tmp_path.iterdir()) == [out, meta]


def test_a_source_is_not_replaced_by_what_is_made_of_it(meta: Path, tmp_path: Path) -> None:
    converter.convert(meta, "sam", to="sam-hf", full_model=True, out=tmp_path / "sam")
    with pytest.raises(OutputError, match="holds the source"):
        converter.convert(tmp_path / "sam", "sam", to="sam-hf", out=tmp_path / "sam", force=True)


def test_a_file_stands_where_the_folder_should(meta: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file\n"):
        converter.convert(meta, "sam", to="sam-hf", out=tmp_path / "out", force=True)


def test_a_link_to_a_folder_is_replaced_and_not_the_folder(meta: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").write_text("kept")
    (tmp_path / "out").symlink_to("there")
    converter.convert(meta, "sam", to="sam-hf", out=tmp_path / "out", force=True)
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "there" / "kept").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sam.pth", "there"]


def test_the_umask_is_respected(meta: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        converter.convert(meta, "sam", to="sam-hf", out=tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_the_command(meta: Path, tmp_path: Path) -> None:
    command = ["sam", meta, "--to", "sam-hf", "--full-model", "-o", "folder"]
    done = run(*command, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("folder\n", 0), done.stderr
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == FILES
    done = run(*command, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("", 4)
    done = run(*command, "--to", "sam-timm", cwd=tmp_path)
    assert done.returncode == 2, done.stderr


def test_repeated_runs_give_the_same_bytes(meta: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        converter.convert(meta, "sam", to="sam-hf", full_model=True, out=tmp_path / name)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
