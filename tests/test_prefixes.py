"""Encoders inside larger models: found under any prefix, chosen with --prefix, with everything outside dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_encoder_command import deepseek_ocr

import converter
from converter.errors import DsocrError, LayoutError, MappingError, UsageError

State = dict[str, torch.Tensor]
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "projection_dim": 32,
    "project_dim": 32,
}


def llava() -> torch.nn.Module:
    import transformers

    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))


def clipseg() -> torch.nn.Module:
    import transformers

    sizes = {"extract_layers": [0, 1], "reduce_dim": 16, "decoder_num_attention_heads": 2}
    config = transformers.CLIPSegConfig(vision_config=VISION, text_config=TEXT, projection_dim=32, **sizes)
    return transformers.CLIPSegForImageSegmentation(config)


def kosmos2() -> torch.nn.Module:
    import transformers

    text = {"vocab_size": 99, "embed_dim": 32, "layers": 1, "ffn_dim": 64, "attention_heads": 2}
    config = transformers.Kosmos2Config(vision_config=VISION, text_config=text, latent_query_num=4)
    return transformers.Kosmos2ForConditionalGeneration(config)


def classifier() -> torch.nn.Module:
    import transformers

    return transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=VISION, text_config=TEXT))


def chinese_clip() -> torch.nn.Module:
    import transformers

    return transformers.ChineseCLIPModel(transformers.ChineseCLIPConfig(vision_config=VISION, text_config=TEXT))


def alt_clip() -> torch.nn.Module:
    import transformers

    return transformers.AltCLIPModel(transformers.AltCLIPConfig(vision_config=VISION, text_config=TEXT))


def state_of(model: torch.nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in models.randomised(model).state_dict().items()}


def converted(state: State, family: str, folder: Path, **options: Any) -> tuple[State, converter.ConversionRecord]:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "in.safetensors")
    out = folder / "out.safetensors"
    record = converter.convert(folder / "in.safetensors", family, out=out, force=True, **options)
    return load_file(out), record


def assert_equal(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("make", [llava, clipseg, kosmos2, classifier, chinese_clip, alt_clip])
def test_clip_inside_a_model_of_transformers(make: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    state = state_of(make())
    key = next(name for name in state if name.endswith("embeddings.class_embedding"))
    prefix = key.removesuffix("embeddings.class_embedding")
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    found, record = converted(state, "clip", tmp_path / "whole")
    assert_equal(found, converted(inside, "clip", tmp_path / "alone")[0])
    # Every tensor is used or dropped with a reason.
    used = {name for names in record.converted.values() for name in names}
    assert used | set(record.dropped) == set(state) and not used & set(record.dropped)
    (layout,) = converter.inspect(tmp_path / "whole" / "in.safetensors").layouts
    assert layout.prefix == prefix and layout.record is not None


SAM_META, CLIP_HF, CLIP_OPENAI, CLIP_TIMM = "sam-meta", "clip-hf", "clip-openai", "clip-timm"
ENCODERS: dict[str, tuple[str, Callable[[], torch.nn.Module]]] = {
    SAM_META: ("sam", models.sam_meta),
    "sam-hf": ("sam", models.sam_hf),
    "sam-timm": ("sam", models.sam_timm),
    CLIP_HF: ("clip", models.clip_hf),
    CLIP_TIMM: ("clip", models.clip_timm),
}
PREFIXES = (
    "model.",
    "model.visual_model.",
    "model.vision_tower.vision_tower.",
    "sam.",
    "visual.trunk.",
    "student.module.backbone.",
)


@pytest.mark.parametrize("layout", ENCODERS)
def test_any_prefix(layout: str, tmp_path: Path) -> None:
    family, make = ENCODERS[layout]
    state = {name: tensor.clone() for name, tensor in make().state_dict().items()}
    expected, _ = converted(state, family, tmp_path / "plain")
    others = {"lm.layers.0.mlp.weight": torch.ones(2), "lm.head.weight": torch.ones(1), "pixel_mean": torch.ones(3)}
    for prefix in PREFIXES:
        found, record = converted(under(prefix, state) | others, family, tmp_path / "prefixed")
        assert_equal(found, expected)
        assert set(others) <= set(record.dropped)
        (mapping,) = record.sources[0].mappings
        assert mapping.prefix.startswith(prefix)


@pytest.mark.parametrize("prefixes", [("student.", "teacher."), ("", "ema."), ("model.visual.", "teacher.visual.")])
def test_several_encoders_are_listed_and_chosen(prefixes: tuple[str, str], tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in models.clip_hf().state_dict().items() if "vision" in name}
    changed = {name: tensor + 1 for name, tensor in state.items()}
    whole = under(prefixes[0], state) | under(prefixes[1], changed)
    with pytest.raises(LayoutError) as caught:
        converted(whole, "clip", tmp_path)
    for prefix in prefixes:
        assert f"{prefix}vision_model." in str(caught.value)
    assert "--prefix" in str(caught.value)
    assert len(converter.inspect(tmp_path / "in.safetensors").layouts) == 2
    chosen, record = converted(whole, "clip", tmp_path, prefix=prefixes[1])
    assert_equal(chosen, converted(changed, "clip", tmp_path / "alone")[0])
    assert set(under(prefixes[0], state)) <= set(record.dropped)
    # With the layout's own prefix, and without the dot.
    for prefix in (f"{prefixes[1]}vision_model.", prefixes[1].rstrip(".")):
        assert_equal(converted(whole, "clip", tmp_path, prefix=prefix)[0], chosen)


def test_an_encoder_without_a_prefix_is_chosen_by_a_dot(tmp_path: Path) -> None:
    """A bare encoder, a copy of it under a prefix and one in another layout: each listed prefix chooses its own."""
    bare, _ = converted(models.clip_hf_vision().state_dict(), "clip", tmp_path / "bare")
    moved = {name: tensor + tensor.is_floating_point() for name, tensor in bare.items()}
    hf = {
        name: tensor + 1 for name, tensor in models.clip_hf().state_dict().items() if name.startswith("vision_model.")
    }
    for prefixes, state in (
        ((".", "ema."), bare | under("ema.", moved)),
        ((".", "module.ema."), under("module.", bare | under("ema.", moved))),
        ((".", "vision_model."), bare | hf),
        (("student.", "student.ema."), under("student.", bare | under("ema.", moved))),
    ):
        with pytest.raises(LayoutError) as caught:
            converted(state, "clip", tmp_path)
        listed = [prefix.removeprefix("module.") for prefix in prefixes]
        assert f"prefixes {', '.join(listed)}" in caught.value.message and f"--prefix {listed[0]}" in caught.value.hint
        assert_equal(converted(state, "clip", tmp_path, prefix=listed[0])[0], bare)
        (layout,) = converter.inspect(tmp_path / "in.safetensors", prefix=listed[0]).layouts
        assert (layout.prefix or ".") == listed[0] and layout.record is not None
    assert_equal(converted(bare | under("ema.", moved), "clip", tmp_path, prefix="")[0], bare)


def test_a_prefix_that_does_not_occur(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in models.clip_hf().state_dict().items()}
    with pytest.raises(UsageError, match=r"--prefix visual: no tensor .*\n.*vision_model\."):
        converted(state, "clip", tmp_path, prefix="visual")


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (SAM_META, "image_encoder.blocks.0.MLP_Adapter.D_fc1.weight"),
        (SAM_META, "image_encoder.prompt_generator.shared.weight"),
        ("sam-hf", "vision_encoder.layers.0.layer_norm3.weight"),
        (CLIP_HF, "vision_model.encoder.layers.0.mlp.fc3.weight"),
        (CLIP_HF, "vision_model.embeddings.norm.weight"),
        (CLIP_TIMM, "blocks.0.ls1.gamma"),
        (CLIP_TIMM, "adapter.0.weight"),
    ],
)
def test_tensors_inside_the_encoder_are_refused_by_name(layout: str, name: str, tmp_path: Path) -> None:
    family, make = ENCODERS[layout]
    state = {key: tensor.clone() for key, tensor in make().state_dict().items()}
    for prefix in ("", "model."):
        with pytest.raises((MappingError, LayoutError), match=name.replace(".", r"\.")) as caught:
            converted(under(prefix, {**state, name: torch.ones(2)}), family, tmp_path)
        # A mapping could only drop an adapter.
        assert "adapter" not in name.lower() or "mapping" not in caught.value.hint


@pytest.mark.parametrize("layout", ENCODERS)
def test_tensors_outside_the_encoder_are_dropped(layout: str, tmp_path: Path) -> None:
    family, make = ENCODERS[layout]
    state = {key: tensor.clone() for key, tensor in make().state_dict().items()}
    others = {
        "classifier.weight": torch.ones(2, 2),
        "bert.encoder.layer.0.output.dense.weight": torch.ones(2),
        "hq_token.weight": torch.ones(1, 4),
        "pixel_mean": torch.ones(3, 1, 1),
        "step": torch.zeros((), dtype=torch.int64),
    }
    found, record = converted(state | others, family, tmp_path / "more")
    assert_equal(found, converted(state, family, tmp_path / "plain")[0])
    assert set(others) <= set(record.dropped)


def test_a_text_tower_with_adapters_does_not_stop_the_vision_tower(tmp_path: Path) -> None:
    """Rules for the text tower that do not fit it drop it; the full model is refused."""
    state = {name: tensor.clone() for name, tensor in models.clip_hf().state_dict().items()}
    query = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    odd = {name.replace("q_proj.", "q_proj.base."): tensor for name, tensor in state.items() if query in name}
    changed = {name: tensor for name, tensor in state.items() if name != query} | odd
    found, record = converted(changed, "clip", tmp_path / "odd")
    assert_equal(found, converted(state, "clip", tmp_path / "plain")[0])
    assert set(odd) <= set(record.dropped)
    with pytest.raises(DsocrError, match="lacks tensors of clip-openai"):
        converted(changed, "clip", tmp_path, to="clip-openai", full_model=True)


def test_whole_encoders_inside_another_model(tmp_path: Path) -> None:
    """Both encoders of one of two copies of a DeepEncoder, as `encoder` extracts them."""
    copies = [deepseek_ocr(seed) for seed in (0, 1)]
    whole = under("student.", copies[0]) | under("teacher.", copies[1])
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, tmp_path / "whole.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in copies[1].items()}, tmp_path / "alone.safetensors")
    with pytest.raises(LayoutError, match="--prefix"):
        converter.encoder(tmp_path / "whole.safetensors", out=tmp_path / "out.safetensors")
    converter.encoder(tmp_path / "whole.safetensors", prefix="teacher.", out=tmp_path / "out.safetensors")
    converter.encoder(tmp_path / "alone.safetensors", out=tmp_path / "expected.safetensors")
    assert_equal(load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "expected.safetensors"))


def test_the_encoder_alone_under_a_prefix_that_no_layout_has(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in models.sam_meta().state_dict().items()}
    encoder = {name.removeprefix("image_encoder."): t for name, t in state.items() if name.startswith("image_encoder.")}
    expected, _ = converted(state, "sam", tmp_path / "plain")
    assert_equal(converted(under("vit.", encoder), "sam", tmp_path / "other")[0], expected)
