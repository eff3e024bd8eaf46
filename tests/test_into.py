"""`encoder --into` a host of another model: found by its layouts, and loaded by transformers as the host was."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import models
import pytest
import safetensors.torch
import torch
from torch import nn

from converter.api.encoder import encoder
from converter.api.verify import verify

State = dict[str, torch.Tensor]

_TEXT = {
    "hidden_size": models.CLIP_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "vocab_size": 50,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_EXPERTS = {
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "mlp_layer_types": ["dense"],
}


def _full(name: str, vision: Any, text: dict[str, Any], **options: Any) -> nn.Module:
    """A whole model of transformers with random weights."""
    config, model = models.newer(f"{name}Config"), models.newer(f"{name}ForConditionalGeneration")
    return models.randomised(model(config(vision_config=vision, text_config=text, **options)), seed=20)


@functools.cache
def got_ocr2() -> nn.Module:
    return _full("GotOcr2", models.got_ocr2_hf().config.to_dict(), _TEXT | {"model_type": "qwen2"})


@functools.cache
def llava() -> nn.Module:
    return _full("Llava", models.clip_hf_vision().config.to_dict(), _TEXT | {"model_type": "llama"})


@functools.cache
def unlimited_ocr() -> nn.Module:
    return _full("UnlimitedOcr", models.unlimited_ocr_hf().config.to_dict(), _TEXT | _EXPERTS)


@functools.cache
def deepseek_ocr2() -> nn.Module:
    return _full("DeepseekOcr2", models.deepseek_ocr2_hf().config.to_dict(), _TEXT | _EXPERTS)


def got_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """SAM's compressed features."""
    projector = model.model.multi_modal_projector
    features = model.model.vision_tower(pixels).last_hidden_state
    return projector.conv_upsampler2(projector.conv_upsampler1(features))  # type: ignore[no-any-return]


def tower_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return model.model.vision_tower(pixels).last_hidden_state  # type: ignore[no-any-return]


class Case(NamedTuple):
    """A host, an encoder that is inserted, and what each computes from an image."""

    host: Callable[[], nn.Module]
    source: str
    features: Callable[[Any, torch.Tensor], torch.Tensor]
    expected: Callable[[torch.Tensor], Any]
    side: int  # Pixels along a side
    replaced: str  # What precedes the names that may change


CASES = {
    "got_ocr2": Case(
        got_ocr2,
        "version1",
        got_features,
        lambda pixels: models.unlimited_ocr_hf().sam_encoder(pixels),
        64,
        "vision_tower|multi_modal_projector.conv_upsampler",
    ),
    "llava": Case(
        llava, "clip", tower_features, lambda pixels: models.clip_hf_vision()(pixels), models.CLIP_IMAGE, "vision_tower"
    ),
    "unlimited_ocr": Case(
        unlimited_ocr,
        "version1",
        tower_features,
        lambda pixels: models.unlimited_ocr_hf()(pixels),
        64,
        "vision_tower|sam_model|vision_model",
    ),
    "deepseek_ocr2": Case(
        deepseek_ocr2,
        "version2",
        tower_features,
        lambda pixels: models.deepseek_ocr2_hf()(pixels),
        768,
        "vision_tower|sam_model|qwen2_model",
    ),
}
HOSTS = [name + kind for name in CASES for kind in ("", "-memory")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders as transformers saves them, and hosts in bfloat16, as they are saved and as they are in memory."""
    path = tmp_path_factory.mktemp("into")
    models.unlimited_ocr_hf().save_pretrained(path / "version1")
    models.deepseek_ocr2_hf().save_pretrained(path / "version2")
    models.clip_hf_vision().save_pretrained(path / "clip")
    for name, case in CASES.items():
        host = case.host()
        host.save_pretrained(path / name)
        host.config.save_pretrained(path / f"{name}-memory")
        # Cloned: some are tied.
        save({key: tensor.clone() for key, tensor in host.state_dict().items()}, path / f"{name}-memory")
    return path


def save(state: State, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path) -> State:
    return safetensors.torch.load_file(folder / "model.safetensors")


def insert(source: Path, host: Path, out: Path, **options: object) -> Any:
    return encoder(source, into=host, out=out, **options)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("host", HOSTS)
def test_transformers_loads_it_and_computes_the_same(host: str, sources: Path, tmp_path: Path) -> None:
    case, out = CASES[host.removesuffix("-memory")], tmp_path / "out"
    insert(sources / case.source, sources / host, out)
    if host.endswith("-memory"):
        model: Any = copy.deepcopy(case.host())
        model.load_state_dict(load(out), strict=True)
    else:
        model, loading = type(case.host()).from_pretrained(out, output_loading_info=True)
        assert not any(loading.values())
    pixels = torch.randn(1, 3, case.side, case.side)
    with torch.no_grad():
        expected = case.expected(pixels)
        features = getattr(expected, "last_hidden_state", expected)
        torch.testing.assert_close(case.features(model.eval(), pixels), features, rtol=1e-4, atol=1e-3)
    before, after = load(sources / host), load(out)
    kept = [name for name in before if not re.search(case.replaced, name)]
    assert kept and list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert not any(torch.equal(before[name], after[name]) for name in before if name not in kept)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("host", HOSTS)
def test_it_is_verified(host: str, sources: Path, tmp_path: Path) -> None:
    case, out = CASES[host.removesuffix("-memory")], tmp_path / "out"
    insert(sources / case.source, sources / host, out, dtype="float16")
    given = {"source": sources / case.source, "into": sources / host}
    assert [check for check in verify(out, given, fast=True).checks if check.verdict == "failed"] == []
    # One value of the encoder, and one of the language model.
    for part in (case.replaced, "embed_tokens"):
        state = load(out)
        name = next(name for name in state if re.search(part, name))
        state[name].view(-1)[0] += 1
        checks = verify(save(state, tmp_path / "changed"), given, fast=True).checks
        assert [check.name for check in checks if check.verdict == "failed"] == [name]
