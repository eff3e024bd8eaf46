"""What no tensor shows (activation, heads, epsilon): read from configs, carried over, recorded, or assumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch
from test_cli import run

import converter
from converter.api.verify import verify
from converter.checkpoint import model_config
from converter.layouts import registry
from converter.output.record import ConversionRecord
from converter.plan import config_values
from converter.verification.result import INCONCLUSIVE, PASSED, Verification

SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "patch_size": 14}
GELU = {**SIZES, "hidden_act": "gelu", "num_attention_heads": 4, "layer_norm_eps": 1e-6}
OPEN_CLIP_TOWER = {"width": 64, "layers": 3, "patch_size": 14, "image_size": 56}
TIMM = "vit_tiny_patch14_clip"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A folder with transformers' CLIP vision tower, and no config."""
    folder = tmp_path / "clip"
    folder.mkdir()
    state = models.clip_hf().state_dict()
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    return folder


def converted(folder: Path, file: str = "config.json", config: Any = None, **options: Any) -> ConversionRecord:
    """The record of a conversion that is not carried out."""
    if config is not None:
        (folder / file).write_text(json.dumps(config))
    return converter.convert(folder, "clip", dry_run=True, **options)


def values(record: ConversionRecord) -> list[object]:
    return [record.assumptions[name].value for name in ("activation", "head_width", "epsilon")]


def test_without_a_config_the_familys_values_are_assumed(clip: Path) -> None:
    record = converted(clip)
    assert values(record) == ["quick_gelu", 64, 1e-5]
    assert {assumption.origin for assumption in record.assumptions.values()} == {"assumed"}
    assert not record.notes


# Configs by file, and the activation, the width of heads and the epsilon that they state.
CONFIGS: dict[str, tuple[str, Any, list[object]]] = {
    "vision tower": ("config.json", GELU, ["gelu", 16, 1e-6]),
    "both towers": (
        "config.json",
        {"vision_config": GELU, "text_config": {**SIZES, "hidden_act": "relu"}},
        ["gelu", 16, 1e-6],
    ),
    # LLaVA, where the language model may have the encoder's width and depth.
    "language model": (
        "config.json",
        {"hidden_size": 64, "num_hidden_layers": 3, "hidden_act": "silu", "vision_config": GELU},
        ["gelu", 16, 1e-6],
    ),
    "nested": ("config.json", {"model": {"encoder": GELU}}, ["gelu", 16, 1e-6]),
    "DeepSeek-OCR": (
        "config.json",
        {"vision_config": {"width": {"clip-l-14-224": {**OPEN_CLIP_TOWER, "heads": 2}}}},
        ["quick_gelu", 32, 1e-5],
    ),
    "open_clip": ("open_clip_config.json", {"model_cfg": {"vision_cfg": OPEN_CLIP_TOWER}}, ["gelu", 64, 1e-5]),
    "open_clip quickgelu": (
        "open_clip_config.json",
        {"model_cfg": {"quick_gelu": True, "vision_cfg": OPEN_CLIP_TOWER}},
        ["quick_gelu", 64, 1e-5],
    ),
    "open_clip arguments": (
        "open_clip_config.json",
        {
            "vision_cfg": OPEN_CLIP_TOWER
            | {"head_width": 32, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}
        },
        ["gelu_pytorch_tanh", 32, 1e-6],
    ),
    "timm": ("config.json", {"architecture": f"{TIMM}_224", "num_features": 64}, ["gelu", 64, 1e-5]),
    "timm quickgelu": (
        "config.json",
        {"architecture": f"{TIMM}_quickgelu_224", "num_features": 64},
        ["quick_gelu", 64, 1e-5],
    ),
    "timm openai": (
        "config.json",
        {"architecture": f"{TIMM}_224", "num_features": 64, "pretrained_cfg": {"tag": "openai"}},
        ["quick_gelu", 64, 1e-5],
    ),
}


@pytest.mark.parametrize(("file", "config", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_the_configs_of_every_library(clip: Path, file: str, config: Any, expected: list[object]) -> None:
    record = converted(clip, file, config)
    assert values(record) == expected
    assert record.assumptions["head_width"].origin.startswith(file) or expected[1] == 64
    assert len(record.notes) == (expected != ["quick_gelu", 64, 1e-5])


def test_the_warning_names_values_and_their_origin(clip: Path) -> None:
    (warning,) = converted(clip, config={"vision_config": GELU}).notes
    for words in (
        "activation gelu",
        "head width 16",
        "epsilon 1e-06",
        "config.json: vision_config.hidden_act",
        "quick_gelu",
        "differ",
    ):
        assert words in warning


def test_a_layout_without_a_config_says_that_it_has_none(clip: Path) -> None:
    (warning,) = converted(clip, config=GELU, to="clip-openai").notes
    assert "clip-openai holds no config" in warning and "gelu" in warning


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "is ignored"),
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "duplicate name"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": "' + "x" * (2 << 20) + '"}', "the limit is"),
        (json.dumps({**GELU, "hidden_size": 32}), "width 32 (not 64)"),
        (json.dumps({**SIZES, "hidden_act": "evil" * 99}), "hidden_act is 'evil"),
        (json.dumps({**SIZES, "hidden_act": ["gelu"]}), "cannot be used"),
        (json.dumps({**SIZES, "num_attention_heads": 5}), "num_attention_heads is 5"),
        (json.dumps({**SIZES, "num_attention_heads": True}), "num_attention_heads is True"),
        (json.dumps({**SIZES, "num_attention_heads": 0}), "num_attention_heads is 0"),
        (json.dumps({**SIZES, "layer_norm_eps": float("nan")}), "layer_norm_eps is nan"),
        (json.dumps({**SIZES, "layer_norm_eps": -1.0}), "layer_norm_eps is -1.0"),
        (json.dumps({"vision_cfg": {**OPEN_CLIP_TOWER, "mlp_ratio": 1e999, "head_width": "8"}}), "gelu"),
        (json.dumps({"architecture": f"{TIMM}_224", "num_features": "64"}), "width '64'"),
        (json.dumps({"architecture": "vit_pe_spatial_large_patch14_448"}), "'vit_pe_spatial_large_patch14_448' may"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_used_is_named_and_ignored(clip: Path, config: str, words: str) -> None:
    (clip / "config.json").write_text(config)
    record = converted(clip)
    assert words in "\n".join(record.notes) and len("".join(record.notes)) < 400
    assert record.assumptions["head_width"].value == 64


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_as_programs_on_windows_write_it(encoding: str, clip: Path) -> None:
    (clip / "config.json").write_text(json.dumps({**SIZES, "hidden_act": "gelu"}), encoding)
    assert converted(clip).assumptions["activation"].value == "gelu"


def test_an_unreadable_config_is_named(clip: Path) -> None:
    (clip / "config.json").symlink_to("nowhere")
    assert "config.json is ignored" in converted(clip).notes[0]


def test_configs_that_contradict_each_other(clip: Path) -> None:
    converted(clip, "open_clip_config.json", {"quick_gelu": True, "vision_cfg": OPEN_CLIP_TOWER})
    record = converted(clip, config={**SIZES, "hidden_act": "gelu"})
    assert record.assumptions["activation"].value == "gelu"
    assert any("open_clip_config.json" in note and "says quick_gelu" in note for note in record.notes)


def test_which_file_a_config_belongs_to(clip: Path) -> None:
    """A file of a standard name, or the only checkpoint in the folder; not one of several of other names."""
    (clip / "config.json").write_text(json.dumps(GELU))
    path = clip / "model.safetensors"
    assert values(converted(path))[0] == "gelu"
    other = path.rename(clip / "mine.safetensors")
    assert values(converted(other))[0] == "gelu"
    torch.save({}, clip / "other.pth")
    assert values(converted(other))[0] == "quick_gelu"
    assert values(converted(other.rename(path)))[0] == "gelu"


def test_clip_hf_carries_the_sources_values_over(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    (clip / "config.json").write_text(json.dumps({**GELU, "image_size": 56}))
    mean = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5]}
    (clip / "preprocessor_config.json").write_text(json.dumps(mean))
    record = converter.convert(clip, "clip", to="clip-hf", out=tmp_path / "out", record=tmp_path / "out.json")
    assert not record.notes
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [written[key] for key in ("hidden_act", "num_attention_heads", "layer_norm_eps")] == ["gelu", 4, 1e-6]
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert {key: processor[key] for key in mean} == mean
    document = json.loads((tmp_path / "out.json").read_text())
    origin = "config.json: hidden_act"
    assert document["assumptions"]["activation"] == {"value": "gelu", "expected": "quick_gelu", "origin": origin}
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (CLIPVisionModel.from_pretrained(folder)(pixels) for folder in (tmp_path / "out", clip))
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


def test_every_part_of_a_full_model(tmp_path: Path) -> None:
    from transformers import SamConfig, SamModel

    folder, vision = (
        tmp_path / "sam",
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 40},
    )
    vision |= {"image_size": 64, "patch_size": 16, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1]}
    vision |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_pos_feats": 8}
    decoder = {"hidden_size": 16, "num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-4, "mlp_dim": 32}
    prompts = {"hidden_size": 16, "image_size": 64, "hidden_act": "relu", "image_embedding_size": 4}
    config = SamConfig(vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompts)
    SamModel(config).save_pretrained(folder)
    converter.convert(folder, "sam", to="sam-hf", full_model=True, out=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for part, keys in {"vision": vision, "mask_decoder": decoder, "prompt_encoder": prompts}.items():
        stated = written[f"{part}_config"]
        assert {key: stated[key] for key in keys if key in stated} == {key: keys[key] for key in keys if key in stated}
    record = converter.convert(folder, "sam", dry_run=True)
    assert set(record.assumptions) == {"activation", "epsilon"}
    assert "quick_gelu" in record.notes[0]


def test_a_config_of_a_sam_with_other_heads_is_not_used(tmp_path: Path) -> None:
    """Relative positions show the heads of SAM."""
    state = {name: tensor.clone() for name, tensor in models.sam_meta().state_dict().items()}
    torch.save(state, tmp_path / "sam.pth")
    config = {"hidden_size": models.WIDTH, "patch_size": models.PATCH, "num_attention_heads": 4, "hidden_act": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    record = converter.convert(tmp_path, "sam", dry_run=True)
    assert record.assumptions["activation"].value == "gelu" and "other heads" in record.notes[0]


def test_the_warning_is_one_line_on_stderr_and_in_json(clip: Path, tmp_path: Path) -> None:
    (clip / "config.json").write_text(json.dumps(GELU))
    done = run("clip", str(clip), "-o", str(tmp_path / "out.safetensors"), "--json", cwd=tmp_path)
    (line,) = (line for line in done.stderr.splitlines() if line.strip().startswith("warning"))
    document = json.loads(done.stdout)
    assert document["notes"] == [line.strip()]
    assert document["assumptions"]["activation"]["value"] == "gelu"


def test_every_assumption_of_a_canonical_layout_can_be_read() -> None:
    for family in registry.families():
        for name in registry.canonical(family).assumptions:
            assert name.rpartition(".")[2] in config_values._PARSERS


@pytest.mark.parametrize(
    ("stated", "value"),
    [
        ({"rope_theta": 10000}, 1e4),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, None),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}}, None),
        ({"rope_theta": True}, None),
        ({}, 1e6),
    ],
)
def test_rotary_positions(stated: dict[str, Any], value: float | None, tmp_path: Path) -> None:
    state = models.qwen2_hf().model.state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    sizes = {"hidden_size": models.QWEN2_WIDTH, "num_attention_heads": 4, "rms_norm_eps": 1e-5, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **stated}))
    record = converter.convert(tmp_path, "qwen2", dry_run=True)
    assert values(record) == ["gelu", 64, 1e-5]
    theta = record.assumptions["rope_theta"]
    assert theta.value == (value or 1e6)
    assert theta.origin.startswith("assumed, as config.json: rope_") == (value is None)


# Verification ------------------------------------------------------------------------------------------------------


def verified(converted: Path, source: Path) -> Verification:
    return verify(converted, source, sizes=[64])


@pytest.fixture
def gelu(clip: Path) -> Path:
    """A folder whose config says GELU, heads of 16 and another epsilon; small weights, so that features stay near 1."""
    state = safetensors.torch.load_file(clip / "model.safetensors")
    safetensors.torch.save_file({name: tensor / 8 for name, tensor in state.items()}, clip / "model.safetensors")
    (clip / "config.json").write_text(json.dumps(GELU))
    return clip


def test_a_deepencoder_of_another_function_is_partly_verified(gelu: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    converter.convert(gelu, "clip", out=out)
    result = verified(out, gelu)
    assert result.result == "partly verified (structure, bytes)" and result.ok
    assert "activation gelu, head width 16" in result.notes[0]
    (check,) = (check for check in result.checks if check.name.startswith("source's"))
    assert check.verdict == INCONCLUSIVE and check.figures["error"] > 10 * check.figures["tolerance"]
    assert "config.json: hidden_act" in check.detail
    # The weights are right: with the DeepEncoder's function, the source's library computes the same.
    assert all(check.verdict == PASSED for check in result.checks if "CLIPVisionModel at 56" in check.name)
    assert not verify(out, gelu, sizes=[64], require=["outputs"]).ok


def test_a_value_that_cannot_be_used_leaves_outputs_open(gelu: Path, tmp_path: Path) -> None:
    """The source computes with something, and nothing shows that it is what was assumed."""
    (gelu / "config.json").write_text(json.dumps({**SIZES, "hidden_act": "mish", "num_attention_heads": 1}))
    out = tmp_path / "out.safetensors"
    record = converter.convert(gelu, "clip", out=out)
    assert record.assumptions["activation"].origin.startswith("assumed, as config.json: hidden_act is 'mish'")
    result = verified(out, gelu)
    assert result.result == "partly verified (structure, bytes)"
    assert "config.json: hidden_act is 'mish', which cannot be used" in result.not_checked[0].reason
    (gelu / "config.json").write_text(json.dumps({**GELU, "hidden_size": 128}))
    ignored = verified(out, gelu)
    assert ignored.result == "verified" and "describes another encoder: width 128" in ignored.notes[0]


def test_a_folder_that_carries_the_sources_values_is_verified(gelu: Path, tmp_path: Path) -> None:
    converter.convert(gelu, "clip", to="clip-hf", out=tmp_path / "out")
    assert verified(tmp_path / "out", gelu).result == "verified"


def test_a_file_without_a_config_computes_with_the_sources_values(gelu: Path, tmp_path: Path) -> None:
    """The source's own values are the expected ones in every library."""
    for layout in ("clip-hf", "clip-openai", "clip-timm"):
        out = tmp_path / f"{layout}.safetensors"
        converter.convert(gelu, "clip", to=layout, out=out)
        result = verified(out, gelu)
        assert result.result == "verified", result.checks


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "relu"), ("num_attention_heads", 3), ("layer_norm_eps", 1e-5), ("hidden_size", 32), ("", None)],
)
def test_a_config_edited_after_the_conversion(key: str, value: Any, gelu: Path, tmp_path: Path) -> None:
    """The record alone shows it, and so does the source; a key that says nothing about the function may change."""
    path, record = tmp_path / "out" / "config.json", tmp_path / "out.json"
    converter.convert(gelu, "clip", to="clip-hf", out=path.parent, record=record)
    path.write_text(json.dumps({**json.loads(path.read_text()), key or "note": value}))
    for result in (verify(path.parent, record=record), verify(path.parent, gelu, fast=True)):
        (check,) = (check for check in result.checks if check.name == "config")
        assert result.ok != bool(key) and result.verdict == ("not verified" if key else "partly verified")
        assert (key in check.detail or f"width {value} (not 64)" in check.detail) if key else check.verdict == PASSED


def test_the_model_card_says_what_the_encoder_computes_with(gelu: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(gelu / "model.safetensors")
    state[next(name for name in state if name.endswith("class_embedding"))][:2] = 1e6
    safetensors.torch.save_file(state, gelu / "model.safetensors")
    card = tmp_path / "card.md"
    converter.convert(gelu, "clip", out=tmp_path / "out.safetensors", dtype="float16", record=card)
    text = card.read_text()
    assert "| computes with | activation gelu (config.json: hidden_act), head width 16 (" in text
    assert "| overflows | " in text and "2 finite values infinite or NaN: embeddings.class_embedding (2)" in text


def test_loading_warns_of_another_function(gelu: Path) -> None:
    with pytest.warns(UserWarning, match="computes with activation gelu, head width 16.*the DeepEncoder computes"):
        converter.load(gelu, "clip")


def test_sizes_that_transformers_leaves_out_have_its_defaults(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    defaults = {
        "clip_vision_model": transformers.CLIPVisionConfig(),
        "sam_vision_model": transformers.SamVisionConfig(),
    }
    for kind, config in defaults.items():
        sizes = model_config.DEFAULT_SIZES[kind]
        assert sizes == {"hidden_size": config.hidden_size, "patch_size": config.patch_size}
    # The tiny model's sizes in place of the defaults.
    tiny = {"hidden_size": SIZES["hidden_size"], "patch_size": SIZES["patch_size"]}
    monkeypatch.setitem(model_config.DEFAULT_SIZES, "clip_vision_model", tiny)
    vision = {"model_type": "clip_vision_model", "hidden_act": "gelu", "num_attention_heads": 4}
    assert values(converted(clip, config={"vision_config": vision})) == ["gelu", 16, 1e-5]
    assert values(converted(clip, config={"vision_config": {**vision, "model_type": []}})) == ["quick_gelu", 64, 1e-5]
