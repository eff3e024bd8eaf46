"""A Qwen2 next to a vision encoder is the language model of that checkpoint; one by itself is an encoder's source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_prefixes import VISION

import converter
from converter.api.verify import verify
from converter.errors import LayoutError

State = dict[str, torch.Tensor]


def renamed(state: Any, old: str, new: str) -> State:
    return {new + name.removeprefix(old): value.clone() for name, value in state.items() if name.startswith(old)}


def qwen2(prefix: str = "model.") -> State:
    return renamed(models.qwen2_hf().model.state_dict(), "", prefix)


def with_head(state: State) -> State:
    return {**state, "lm_head.weight": torch.randn(9, models.QWEN2_WIDTH)}


def deepseek(state: State) -> State:
    """The names of DeepSeek-OCR-2's own language model, which has no biases."""
    return {name: value for name, value in state.items() if not name.endswith(".bias")}


def got() -> State:
    sam = renamed(models.sam_meta().state_dict(), "image_encoder.", "model.vision_tower_high.")
    return with_head({**sam, **qwen2(), "model.mm_projector_vary.weight": torch.randn(8, 8)})


def got_hf() -> State:
    return with_head(
        {**renamed(models.got_ocr2_hf().state_dict(), "", "model.vision_tower."), **qwen2("model.language_model.")}
    )


def deepseek_ocr2(language_model: State) -> State:
    """transformers' names."""
    return with_head({**renamed(models.deepseek_ocr2_hf().state_dict(), "", "model.vision_tower."), **language_model})


def llava_qwen() -> State:
    """The authors' names of LLaVA-NeXT with Qwen2."""
    return with_head(
        {
            **renamed(models.clip_hf_vision().state_dict(), "", "model.vision_tower.vision_tower.vision_model."),
            **qwen2(),
        }
    )


def llava_hf() -> State:
    import transformers

    text = transformers.Qwen2Config(**models.QWEN2, vocab_size=99)
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**VISION), text_config=text)
    return {n: t.clone() for n, t in transformers.LlavaForConditionalGeneration(config).state_dict().items()}


def qwen2_vl() -> State:
    """A vision encoder that no family of ours is."""
    return with_head({**qwen2(), "visual.patch_embed.proj.weight": torch.randn(8, 3, 2, 14, 14)})


# The checkpoint, and the families of its encoders.
LARGER = {
    "GOT-OCR2": (got, ["sam"]),
    "GOT-OCR2 of transformers": (got_hf, ["sam"]),
    "DeepSeek-OCR-2": (lambda: deepseek_ocr2(deepseek(qwen2("model.language_model."))), ["sam", "qwen2"]),
    "DeepSeek-OCR-2 with Qwen2": (lambda: deepseek_ocr2(qwen2("model.language_model.")), ["sam", "qwen2"]),
    "LLaVA-Qwen": (llava_qwen, ["clip"]),
    "LLaVA-Qwen of transformers": (llava_hf, ["clip"]),
    "Qwen2-VL": (qwen2_vl, []),
}


@pytest.mark.parametrize("name", LARGER)
def test_a_language_model_is_no_encoder(name: str, tmp_path: Path) -> None:
    build, families = LARGER[name]
    path = tmp_path / "model.safetensors"
    save_file(build(), path)
    inspected = converter.inspect(path)
    assert [layout.family for layout in inspected.layouts] == families
    for family in families:
        converter.convert(path, family, out=tmp_path / f"{family}.safetensors")
    if "qwen2" in families:
        assert inspected.layouts[-1].layout == "qwen2-deepseek-ocr2-hf"
    else:
        with pytest.raises(LayoutError, match=r"language model.*\n.*--prefix model"):
            converter.convert(path, "qwen2", out=tmp_path / "qwen2.safetensors")
    if not families:
        with pytest.raises(LayoutError, match="no layout that dsocr-convert writes"):
            verify(path, fast=True)
        return
    verified = verify(path, fast=True)
    assert verified.ok
    assert verified.family == ("deepencoder" if len(families) > 1 else families[0])
    assert (
        not any("qwen2" in f"{check.name} {check.detail}".lower() for check in verified.checks) or "qwen2" in families
    )


@pytest.mark.parametrize("name", ["GOT-OCR2", "LLaVA-Qwen", "Qwen2-VL"])
def test_a_prefix_takes_the_language_model(name: str, tmp_path: Path) -> None:
    state = LARGER[name][0]()
    save_file(state, tmp_path / "model.safetensors")
    converter.convert(tmp_path / "model.safetensors", "qwen2", prefix="model.", out=tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert len(found) == 12 * models.QWEN2_DEPTH + 1
    assert all(torch.equal(value, state[name.removeprefix("model.")]) for name, value in found.items())


@pytest.mark.parametrize("prefix", ["model.", "", "module.model.", "student.model."])
@pytest.mark.parametrize("head", [True, False])
def test_qwen2_by_itself_is_converted(prefix: str, head: bool, tmp_path: Path) -> None:
    state = qwen2(prefix)
    if head:
        state[prefix.removesuffix("model.") + "lm_head.weight"] = torch.randn(9, models.QWEN2_WIDTH)
    save_file(state, tmp_path / "model.safetensors")
    record = converter.convert(tmp_path / "model.safetensors", "qwen2", out=tmp_path / "out.safetensors")
    assert record.mapping == "qwen2-hf"
    assert sorted(record.missing) == ["query_1024.weight", "query_768.weight"]
    assert len(record.dropped) == 1 + head
    found = load_file(tmp_path / "out.safetensors")
    assert len(found) == 12 * models.QWEN2_DEPTH + 1
    assert all(torch.equal(value, state[prefix + name.removeprefix("model.model.")]) for name, value in found.items())
    assert verify(tmp_path / "out.safetensors", tmp_path / "model.safetensors", fast=True).ok
