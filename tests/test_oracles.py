"""Checkpoints saved by the libraries that define the layouts, converted, and compared with the rules done by hand."""

from __future__ import annotations

import collections
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch
from inventories import mmpretrain_name

import converter
from converter.errors import LayoutError, MappingError

State = dict[str, torch.Tensor]


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    """Names rewritten one regular expression after another, as a notebook would do it."""
    result = {}
    for name, tensor in state.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def only(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


# transformers' names for SAM's encoder to Meta's.
HF_TO_META = (
    (r"^layers\.", "blocks."),
    (r"layer_norm([12])\.", r"norm\1."),
    (r"projection", "proj"),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.norm2", "neck.3"),
    (r"^proj\.conv1", "net_2"),
    (r"^proj\.conv2", "net_3"),
)


def fused(state: State) -> State:
    """q, k and v of transformers' CLIP concatenated, its encoder called transformer."""
    result = {}
    for name, tensor in state.items():
        name = re.sub(r"^encoder\.", "transformer.", name)
        if "q_proj" in name:
            parts = [
                tensor,
                *(state[name.replace("transformer", "encoder").replace("q_proj", p)] for p in ("k_proj", "v_proj")),
            ]
            result[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            result[name] = tensor
    return result


def with_positions(state: State) -> State:
    count = state["embeddings.position_embedding.weight"].shape[0]
    return {**state, "embeddings.position_ids": torch.arange(count)[None]}


def without(state: State, *prefixes: str) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def sam_meta() -> tuple[State, State]:
    state = models.sam_meta().state_dict()
    return state, only(state, "image_encoder.")


def sam_hf() -> tuple[State, State]:
    state = models.sam_hf().state_dict()
    return state, renamed(only(state, "vision_encoder."), *HF_TO_META)


def sam_timm() -> tuple[State, State]:
    state = models.sam_timm().state_dict()
    return state, renamed(state, (r"mlp\.fc", "mlp.lin"))


def sam_mmpretrain() -> tuple[State, State]:
    _, expected = sam_meta()
    named = {f"backbone.{mmpretrain_name(name)}": tensor for name, tensor in expected.items()}
    return {**named, "head.fc.weight": torch.ones(2)}, expected


def got_ocr2_hf() -> tuple[State, State]:
    state = models.got_ocr2_hf().state_dict()
    return state, renamed(state, *HF_TO_META)


def unlimited_sam() -> tuple[State, State]:
    state = models.unlimited_ocr_hf().state_dict()
    return state, renamed(only(state, "sam_encoder."), *HF_TO_META)


def unlimited_clip() -> tuple[State, State]:
    state = models.unlimited_ocr_hf().state_dict()
    return state, with_positions(fused(only(state, "vision_encoder.")))


def clip_hf() -> tuple[State, State]:
    state = models.clip_hf().state_dict()
    return state, with_positions(without(fused(only(state, "vision_model.")), "post_layernorm"))


def clip_hf_old() -> tuple[State, State]:
    """As openai/clip-vit-large-patch14 was saved: with position_ids."""
    state, expected = clip_hf()
    ids = expected["embeddings.position_ids"]
    text_ids = torch.arange(77)[None]
    return {
        **state,
        "vision_model.embeddings.position_ids": ids,
        "text_model.embeddings.position_ids": text_ids,
    }, expected


def clip_hf_vision() -> tuple[State, State]:
    state = models.clip_hf_vision().state_dict()
    return state, with_positions(without(fused(state), "post_layernorm"))


def clip_owlvit() -> tuple[State, State]:
    state = models.owlvit().state_dict()
    inside = {
        name.replace("pre_layernorm", "pre_layrnorm"): t for name, t in only(state, "owlvit.vision_model.").items()
    }
    return state, with_positions(without(fused(inside), "post_layernorm"))


OPENAI = (
    (r"^transformer\.resblocks\.", "transformer.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"attn\.in_proj_", "self_attn.qkv_proj."),
    (r"attn\.out_proj", "self_attn.out_proj"),
    (r"c_fc", "fc1"),
    (r"c_proj", "fc2"),
    (r"^ln_pre", "pre_layrnorm"),
    (r"^class_embedding", "embeddings.class_embedding"),
    (r"^conv1", "embeddings.patch_embedding"),
    (r"^positional_embedding", "embeddings.position_embedding.weight"),
)


def open_clip() -> tuple[State, State]:
    state = models.open_clip().state_dict()
    return state, with_positions(without(renamed(only(state, "visual."), *OPENAI), "ln_post", "proj"))


def clip_timm() -> tuple[State, State]:
    state = models.clip_timm().state_dict()
    expected = renamed(
        without(state, "head", "norm."),
        (r"^blocks\.", "transformer.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"attn\.qkv", "self_attn.qkv_proj"),
        (r"attn\.proj", "self_attn.out_proj"),
        (r"^norm_pre", "pre_layrnorm"),
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^cls_token", "embeddings.class_embedding"),
        (r"^pos_embed", "embeddings.position_embedding.weight"),
    )
    expected["embeddings.class_embedding"] = expected["embeddings.class_embedding"][0, 0]
    expected["embeddings.position_embedding.weight"] = expected["embeddings.position_embedding.weight"][0]
    return state, with_positions(expected)


def inside(prefix: str, state: State) -> State:
    """An encoder inside a larger model."""
    language = {"model.embed_tokens.weight": torch.randn(5, 3), "lm_head.weight": torch.randn(5, 3)}
    return {**language, **{prefix + name: tensor for name, tensor in state.items()}}


def deepseek_sam() -> tuple[State, State]:
    _, encoder = unlimited_sam()
    return inside("model.sam_model.", encoder), encoder


def got_ocr2_sam() -> tuple[State, State]:
    _, encoder = unlimited_sam()
    return inside("model.vision_tower_high.", encoder), encoder


def deepseek_clip() -> tuple[State, State]:
    _, encoder = clip_hf()
    return inside("model.vision_model.", without(encoder, "embeddings.position_ids")), encoder


def qwen2_hf() -> tuple[State, State]:
    """With embeddings that are tied, and saved under both names."""
    state = models.qwen2_hf().state_dict()
    return state, renamed(without(state, "lm_head.", "model.embed_tokens."), (r"^", "model."))


def qwen2_hf_model() -> tuple[State, State]:
    """Without the head, and so without a prefix."""
    state, expected = qwen2_hf()
    return only(state, "model."), expected


def deepseek_ocr2_hf() -> tuple[State, State]:
    state = models.deepseek_ocr2_hf().state_dict()
    names = (r"^vision_encoder\.", "model.model."), (r"_resolution\.", ".")
    return state, renamed(without(state, "sam_encoder."), *names)


def language_model(width: int) -> State:
    """A layer of DeepSeek-OCR-2's language model: Qwen2's names, but no bias."""
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    layer = {f"self_attn.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    mlp = {f"mlp.{name}_proj.weight": torch.randn(8, width) for name in ("gate", "up")}
    norms = {"input_layernorm.weight": torch.randn(width), "mlp.down_proj.weight": torch.randn(width, 8)}
    return {f"model.layers.0.{name}": tensor for name, tensor in {**layer, **mlp, **norms}.items()}


def deepseek_ocr2() -> tuple[State, State]:
    _, encoder = deepseek_ocr2_hf()
    return {**inside("model.qwen2_model.", encoder), **language_model(models.QWEN2_WIDTH)}, encoder


def deepseek_ocr2_sglang() -> tuple[State, State]:
    _, encoder = deepseek_ocr2_hf()
    return inside("qwen2_model.", renamed(encoder, (r"^model\.model\.", "model."))), encoder


LAYOUTS: dict[str, tuple[str, str, Callable[[], tuple[State, State]]]] = {
    "sam-meta": ("sam", "sam-meta", sam_meta),
    "sam-hf": ("sam", "sam-hf", sam_hf),
    "sam-timm": ("sam", "sam-timm", sam_timm),
    "sam-mmpretrain": ("sam", "sam-mmpretrain", sam_mmpretrain),
    "sam-got-ocr2": ("sam", "sam-got-ocr2", got_ocr2_sam),
    "sam-got-ocr2-hf": ("sam", "sam-got-ocr2-hf", got_ocr2_hf),
    "sam-deepseek-ocr": ("sam", "sam-deepseek-ocr", deepseek_sam),
    "sam-unlimited-ocr-hf": ("sam", "sam-unlimited-ocr-hf", unlimited_sam),
    "clip-hf": ("clip", "clip-hf", clip_hf),
    "clip-hf with position_ids": ("clip", "clip-hf", clip_hf_old),
    "clip-hf without prefix": ("clip", "clip-hf", clip_hf_vision),
    "clip-openai": ("clip", "clip-openai", open_clip),
    "clip-owlvit": ("clip", "clip-owlvit", clip_owlvit),
    "clip-timm": ("clip", "clip-timm", clip_timm),
    "clip-deepseek-ocr": ("clip", "clip-deepseek-ocr", deepseek_clip),
    "clip-unlimited-ocr-hf": ("clip", "clip-unlimited-ocr-hf", unlimited_clip),
    "qwen2-hf": ("qwen2", "qwen2-hf", qwen2_hf),
    "qwen2-hf without prefix": ("qwen2", "qwen2-hf", qwen2_hf_model),
    "qwen2-deepseek-ocr2": ("qwen2", "qwen2-deepseek-ocr2", deepseek_ocr2),
    "qwen2-deepseek-ocr2-hf": ("qwen2", "qwen2-deepseek-ocr2-hf", deepseek_ocr2_hf),
    "qwen2-deepseek-ocr2-sglang": ("qwen2", "qwen2-deepseek-ocr2-sglang", deepseek_ocr2_sglang),
}


def save_zip(state: State, folder: Path) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def save_legacy(state: State, folder: Path) -> Path:
    torch.save(state, folder / "weights.bin", _use_new_zipfile_serialization=False)
    return folder / "weights.bin"


def save_safetensors(state: State, folder: Path) -> Path:
    unshared = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(unshared, folder / "model.safetensors")
    return folder


def save_sharded(state: State, folder: Path) -> Path:
    from huggingface_hub import save_torch_state_dict

    total = sum(tensor.nbytes for tensor in state.values())
    save_torch_state_dict({name: tensor.clone() for name, tensor in state.items()}, folder, max_shard_size=total // 3)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def save_sharded_bin(state: State, folder: Path) -> Path:
    from huggingface_hub import save_torch_state_dict

    total = sum(tensor.nbytes for tensor in state.values())
    save_torch_state_dict(state, folder, max_shard_size=total // 3, safe_serialization=False)
    assert len(list(folder.glob("*.bin"))) > 2
    return folder


# By what the table of compatibility calls the container.
SAVERS: dict[str, Callable[[State, Path], Path]] = {
    "torch zip": save_zip,
    "torch legacy": save_legacy,
    "safetensors": save_safetensors,
    "safetensors shards": save_sharded,
    "torch shards": save_sharded_bin,
}


def check_equal(found: State, expected: State) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("container", SAVERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_from_every_container(
    layout: str, container: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    family, mapping, make = LAYOUTS[layout]
    record_property("reads", f"{mapping}/{container}")
    state, expected = make()
    source = SAVERS[container](state, tmp_path)
    record = converter.convert(str(source), family, out=tmp_path / "out.safetensors")
    assert record.mapping == mapping
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), expected)
    # Nothing is lost without a word: each name of the source is used or dropped with a reason.
    used = {key for keys in record.converted.values() for key in keys}
    assert used | set(record.dropped) == set(state) and not used & set(record.dropped)
    assert all(record.dropped.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pth_output_is_what_torch_loads(layout: str, tmp_path: Path) -> None:
    family, _, make = LAYOUTS[layout]
    state, expected = make()
    converter.convert(str(save_zip(state, tmp_path)), family, out=tmp_path / "out.pth", format="pth")
    check_equal(torch.load(tmp_path / "out.pth", weights_only=True), expected)
    check_equal(torch.load(tmp_path / "out.pth", weights_only=True, mmap=True), expected)


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore::torch.jit.TracerWarning")
def test_openai_torchscript_archive(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """OpenAI's file is a traced, mostly float16 model with three integers next to its weights."""
    record_property("reads", "clip-openai/TorchScript")
    half = copy.deepcopy(models.open_clip().visual).half()
    jit: Any = torch.jit
    visual = jit.trace(half, torch.randn(1, 3, models.CLIP_IMAGE, models.CLIP_IMAGE).half())

    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = visual
            for name, number in (("input_resolution", 56), ("context_length", 8), ("vocab_size", 99)):
                self.register_buffer(name, torch.tensor(number))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.visual(x)
            return y

    jit.script(Archive()).save(tmp_path / "ViT-L-14.pt")
    record = converter.convert(str(tmp_path / "ViT-L-14.pt"), "clip", out=tmp_path / "out.safetensors")
    assert (record.sources[0].containers, record.mapping) == (["TorchScript"], "clip-openai")
    assert {"input_resolution", "context_length", "vocab_size"} < set(record.dropped)
    _, expected = open_clip()
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in expected.items()}
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), halved)


WRAPPERS: dict[str, Callable[[State], object]] = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "lr": 0.1},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "ordered": lambda state: collections.OrderedDict(state),
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
    "lightning": lambda state: {"state_dict": {f"net.{name}": tensor for name, tensor in state.items()}},
    "deep": lambda state: {"a": {"b": {"c": state}}},
    "compiled part": lambda state: {
        name.replace("image_encoder.", "image_encoder._orig_mod."): tensor for name, tensor in state.items()
    },
    "parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_state_dicts(wrapper: str, tmp_path: Path) -> None:
    state, expected = sam_meta()
    torch.save(WRAPPERS[wrapper](state), tmp_path / "weights.pth")
    converter.convert(str(tmp_path / "weights.pth"), "sam", out=tmp_path / "out.safetensors")
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), expected)


def test_two_equally_good_state_dicts_need_a_choice(tmp_path: Path) -> None:
    state, expected = sam_meta()
    shifted = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": shifted, "ema": state}, tmp_path / "weights.pth")
    with pytest.raises(LayoutError, match=r"model \(188 tensors\), ema \(188 tensors\)\n.*--state-dict model"):
        converter.convert(str(tmp_path / "weights.pth"), "sam", out=tmp_path / "out.safetensors")
    converter.convert(str(tmp_path / "weights.pth"), "sam", out=tmp_path / "out.safetensors", state_dict="ema")
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("family", ["sam", "clip"])
def test_a_converted_checkpoint_is_not_converted_again(family: str, tmp_path: Path) -> None:
    _, _, make = LAYOUTS[{"sam": "sam-meta", "clip": "clip-hf"}[family]]
    _, converted = make()
    source = save_zip(converted, tmp_path)
    assert converter.convert(source, family, out=tmp_path / "out.pth").unchanged
    assert not (tmp_path / "out.pth").exists()
    assert converter.convert(source, family, out=tmp_path / "out.safetensors").written
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), converted)


@pytest.mark.parametrize("layout", ["sam-meta", "sam-hf", "clip-hf", "clip-timm"])
def test_an_incomplete_checkpoint_is_refused_by_name(layout: str, tmp_path: Path) -> None:
    family, _, make = LAYOUTS[layout]
    state, _ = make()
    victim = next(name for name in reversed(list(state)) if "norm2" in name and "decoder" not in name and ".1." in name)
    partial = {name: tensor for name, tensor in state.items() if name != victim}
    with pytest.raises(MappingError, match=r"missing tensor '(blocks|transformer.layers)\.1\..*norm2"):
        converter.convert(str(save_zip(partial, tmp_path)), family, out=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["sam-meta", "clip-hf", "clip-openai"])
def test_dtype_casts_as_torch_does(layout: str, dtype: str, tmp_path: Path) -> None:
    family, _, make = LAYOUTS[layout]
    state, expected = make()
    source = save_zip({name: t.double() if t.is_floating_point() else t for name, t in state.items()}, tmp_path)
    converter.convert(str(source), family, out=tmp_path / "out.safetensors", dtype=dtype)
    cast = {n: t.double().to(getattr(torch, dtype)) if t.is_floating_point() else t for n, t in expected.items()}
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), cast)


@pytest.mark.parametrize("pixels", [28, 56, 70, 112])
def test_image_size_resamples_positions(pixels: int, tmp_path: Path) -> None:
    state, expected = clip_hf_old()
    converter.convert(str(save_zip(state, tmp_path)), "clip", out=tmp_path / "out.safetensors", image_size=pixels)
    table = expected["embeddings.position_embedding.weight"]
    side, grid = models.CLIP_IMAGE // models.CLIP_PATCH, pixels // models.CLIP_PATCH
    if grid != side:
        image = table[1:].T.reshape(1, -1, side, side)
        image = torch.nn.functional.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
        expected["embeddings.position_embedding.weight"] = torch.cat([table[:1], image[0].flatten(1).T])
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), with_positions(expected))


def test_true_size_sam_base(tmp_path: Path) -> None:
    from segment_anything import sam_model_registry

    state = sam_model_registry["vit_b"]().state_dict()
    torch.save(state, tmp_path / "sam_vit_b_01ec64.pth")
    record = converter.convert(str(tmp_path / "sam_vit_b_01ec64.pth"), "sam", out=tmp_path / "out.safetensors")
    assert (record.num_tensors, record.nbytes, record.unusual) == (177, 358_683_648, {})
    assert sorted(record.missing) == ["net_2.weight", "net_3.weight"]
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), only(state, "image_encoder."))


@pytest.mark.true_size
def test_true_size_clip_large(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    # Counted up, as random initialisation of this size takes seconds.
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=14, **sizes))
    model.to_empty(device="cpu")
    for i, parameter in enumerate(model.parameters()):
        parameter.data = torch.arange(i, i + parameter.numel(), dtype=torch.float32).view(parameter.shape)
    model.save_pretrained(tmp_path / "clip", max_shard_size="700MB")
    record = converter.convert(str(tmp_path / "clip"), "clip", out=tmp_path / "out.safetensors")
    assert (record.num_tensors, record.nbytes, record.unusual, record.missing) == (294, 1_212_712_968, {}, {})
    # transformers before 5 has a prefix in its names.
    state = getattr(model, "vision_model", model).state_dict()
    expected = with_positions(without(fused(state), "post_layernorm"))
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), expected)
