"""Every layout to every other of its family: loaded strictly by the library that reads it, with the same features."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import models
import pytest
import safetensors.torch
import torch
from memory import raw
from test_oracles import SAVERS
from torch import Tensor, nn

import converter
from converter.checkpoint.open import open_checkpoint
from converter.encoders import ClipEncoder, Qwen2Encoder, SamEncoder
from converter.errors import MappingError, UsageError
from converter.options import ConvertOptions
from converter.plan.planner import resolve
from converter.tensors.lazy_tensor import byte_ranges
from converter.verification.outputs import KeepFloat64

State = dict[str, Tensor]

SAM_SIZES, CLIP_SIZES = models.sam_sizes(), models.clip_sizes()


# What the libraries have ------------------------------------------------------------------------------------------


def sam_vision() -> nn.Module:
    return models.newer("SamVisionModel")(models.sam_hf().config.vision_config)


def owlvit_vision() -> nn.Module:
    from transformers import OwlViTVisionModel

    config: Any = models.owlvit().config
    return OwlViTVisionModel(config.vision_config)


def timm_clip() -> nn.Module:
    """Without a head, which no other layout has, and with the activation that CLIP was trained with."""
    from timm.layers import QuickGELU

    model = copy.deepcopy(models.clip_timm())
    model.reset_classifier(0)
    for block in model.blocks:
        block.mlp.act = QuickGELU()
    return model


class Program(NamedTuple):
    """The module that reads a layout, and the prefix that its names carry in a whole model.

    `watched` names submodules by what they compute; outputs of the same kind are compared. `extras` are the tensors
    that other layouts of the family lack, in the order of HUB_EXTRAS. With `patches`, CLIP takes these for pixels.
    """

    build: Callable[[], nn.Module]
    watched: dict[str, str]
    prefix: str = ""
    extras: tuple[str, ...] = ()
    patches: bool = False


def own_sam() -> nn.Module:
    return SamEncoder(SAM_SIZES)


COMPRESSOR = ("net_2.weight", "net_3.weight")
BLOCKS = f"transformer.layers.{models.CLIP_DEPTH - 1}"
HF_BLOCKS = f"encoder.layers.{models.CLIP_DEPTH - 1}"
POST = ("post_layernorm.weight", "post_layernorm.bias")
PATCH = ("embeddings.patch_embedding.weight",)

SAM: dict[str, Program] = {
    "sam-meta": Program(lambda: models.sam_meta().image_encoder, {"neck": "neck"}, "image_encoder."),
    "sam-hf": Program(sam_vision, {"neck": "vision_encoder.neck"}),
    "sam-timm": Program(models.sam_timm, {"neck": "neck"}),
    "sam-mmpretrain": Program(models.sam_mmpretrain, {"neck": "neck"}, "backbone."),
    "sam-got-ocr2": Program(own_sam, {"neck": "neck", "compressed": "net_3"}, "model.vision_tower_high.", COMPRESSOR),
    "sam-got-ocr2-hf": Program(models.got_ocr2_hf, {"neck": "neck"}, "vision_tower."),
    "sam-deepseek-ocr": Program(own_sam, {"neck": "neck", "compressed": "net_3"}, "model.sam_model.", COMPRESSOR),
    "sam-unlimited-ocr-hf": Program(
        lambda: models.unlimited_ocr_hf().sam_encoder,
        {"neck": "neck", "compressed": "proj.conv2"},
        "model.vision_tower.sam_encoder.",
        ("proj.conv1.weight", "proj.conv2.weight"),
    ),
    "deepencoder-sam": Program(own_sam, {"neck": "neck", "compressed": "net_3"}, "", COMPRESSOR),
}
CLIP: dict[str, Program] = {
    "clip-hf": Program(
        models.clip_hf_vision, {"blocks": HF_BLOCKS, "normed": "post_layernorm"}, "vision_model.", (*PATCH, *POST)
    ),
    "clip-openai": Program(
        lambda: models.open_clip().visual,
        {"blocks": f"transformer.resblocks.{models.CLIP_DEPTH - 1}", "normed": "ln_post"},
        "visual.",
        ("conv1.weight", "ln_post.weight", "ln_post.bias", "proj"),
    ),
    "clip-owlvit": Program(
        owlvit_vision,
        {"blocks": f"vision_model.{HF_BLOCKS}", "normed": "vision_model.post_layernorm"},
        "owlvit.",
        tuple(f"vision_model.{name}" for name in (*PATCH, *POST)),
    ),
    "clip-timm": Program(
        timm_clip,
        {"blocks": f"blocks.{models.CLIP_DEPTH - 1}", "normed": "norm"},
        "",
        ("patch_embed.proj.weight", "norm.weight", "norm.bias"),
    ),
    "clip-deepseek-ocr": Program(
        lambda: ClipEncoder(CLIP_SIZES), {"blocks": BLOCKS}, "model.vision_model.", PATCH, patches=True
    ),
    "clip-unlimited-ocr-hf": Program(
        lambda: models.unlimited_ocr_hf().vision_encoder,
        {"blocks": HF_BLOCKS},
        "model.vision_tower.vision_encoder.",
        patches=True,
    ),
    "deepencoder-clip": Program(lambda: ClipEncoder(CLIP_SIZES), {"blocks": BLOCKS}, "", PATCH, patches=True),
}


class SglangQwen2(Qwen2Encoder):
    """Our own, which computes what SGLang's does, with names that have one `model.` less."""

    def __init__(self) -> None:
        super().__init__(models.qwen2_sizes())
        self.model = self.model.model

    def encode(self, x: Tensor, image_tokens: int | None = None) -> Tensor:
        for layer in self.model.layers:
            x = layer(x, image_tokens)
        normed: Tensor = self.model.norm(x)
        return normed


def qwen2_model() -> nn.Module:
    return models.qwen2_hf().model


def deepseek_ocr2_qwen2() -> nn.Module:
    """transformers' DeepSeek-OCR-2 without its SAM."""
    model = copy.deepcopy(models.deepseek_ocr2_hf())
    del model.sam_encoder
    return model


QUERIES = ("query_768.weight", "query_1024.weight")
EMBEDDINGS = "embed_tokens.weight"
QWEN2: dict[str, Program] = {
    "qwen2-hf": Program(qwen2_model, {"normed": "norm"}, "model.", (EMBEDDINGS,)),
    "qwen2-deepseek-ocr2": Program(
        lambda: Qwen2Encoder(models.qwen2_sizes()), {"normed": "model.model.norm"}, "model.qwen2_model.", QUERIES
    ),
    "qwen2-deepseek-ocr2-hf": Program(
        deepseek_ocr2_qwen2,
        {"normed": "vision_encoder.norm"},
        "model.vision_tower.",
        ("query_768_resolution.weight", "query_1024_resolution.weight"),
    ),
    "qwen2-deepseek-ocr2-sglang": Program(SglangQwen2, {"normed": "model.norm"}, "qwen2_model.", QUERIES),
    "deepencoder-qwen2": Program(
        lambda: Qwen2Encoder(models.qwen2_sizes()), {"normed": "model.model.norm"}, "", QUERIES
    ),
}
FAMILIES = {"sam": SAM, "clip": CLIP, "qwen2": QWEN2}
PROGRAMS = {**SAM, **CLIP, **QWEN2}
HUB_EXTRAS = {
    "sam": COMPRESSOR,
    "clip": (*PATCH, *POST, "visual_projection.weight"),
    "qwen2": (*QUERIES, f"model.model.{EMBEDDINGS}"),
}
# The epsilon that the weights were trained with; libraries' classes have others for defaults.
EPS = {"sam": 1e-6, "clip": 1e-5, "qwen2": 1e-6}


# The shapes of an encoder's input: images, or image tokens and as many queries.
INPUTS = {
    "sam": (1, 3, models.GRID * models.PATCH, models.GRID * models.PATCH),
    "clip": (1, 3, models.CLIP_IMAGE, models.CLIP_IMAGE),
    "qwen2": (1, 12, models.QWEN2_WIDTH),
}


def family_of(layout: str) -> str:
    return next(family for family, programs in FAMILIES.items() if layout in programs)


@functools.cache
def weights(layout: str, seed: int) -> State:
    """A checkpoint as the layout's library saves it; DeepSeek's released files lack the position indices."""
    program = PROGRAMS[layout]
    state = models.randomised(copy.deepcopy(program.build()), seed).state_dict()
    if layout == "clip-deepseek-ocr":
        del state["embeddings.position_ids"]
    return {program.prefix + name: tensor for name, tensor in state.items()}


def strictly(layout: str, state: State) -> nn.Module:
    """The library's own module with exactly these tensors."""
    program = PROGRAMS[layout]
    assert all(name.startswith(program.prefix) for name in state)
    model = copy.deepcopy(program.build())
    own = {name.removeprefix(program.prefix): tensor for name, tensor in state.items()}
    if layout == "clip-deepseek-ocr":
        # A constant of DeepSeek's class, which its released files lack.
        own["embeddings.position_ids"] = model.state_dict()["embeddings.position_ids"]
    model.load_state_dict(own, strict=True)
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = EPS[family_of(layout)]
    return model.double().eval()


def convolved(layout: str, state: State, pixels: Tensor) -> Tensor | None:
    """CLIP's patches, which the DeepEncoder's classes take instead of pixels; None for a checkpoint that makes none."""
    program = PROGRAMS[layout]
    if not program.extras:
        return None
    weight = state[program.prefix + program.extras[0]]
    return nn.functional.conv2d(pixels, weight.double(), stride=models.CLIP_PATCH)


def run_qwen2_model(model: Any, x: Tensor) -> None:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    mask[: x.shape[1] // 2, : x.shape[1] // 2] = True
    model(inputs_embeds=x, attention_mask=mask[None, None])


def run_deepseek_ocr2(model: Any, x: Tensor) -> None:
    model.vision_encoder(inputs_embeds=x, num_patches=x.shape[1] // 2)


# How encoders run that take no image.
RUNS: dict[str, Callable[[Any, Tensor], object]] = {
    **dict.fromkeys(QWEN2, lambda model, x: model.encode(x)),
    "qwen2-hf": run_qwen2_model,
    "qwen2-deepseek-ocr2-hf": run_deepseek_ocr2,
}


def features(layout: str, state: State, pixels: Tensor, patches: Tensor | None) -> State:
    """What the watched modules put out, by kind; of a sequence, the class token for what follows the blocks."""
    model, found = strictly(layout, state), {}
    for kind, name in PROGRAMS[layout].watched.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, kind=kind: found.update({kind: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad(), KeepFloat64():
        if run := RUNS.get(layout):
            run(model, pixels)
        elif layout == "clip-unlimited-ocr-hf":
            model(patches)
        elif PROGRAMS[layout].patches:
            model(None, patches)
        else:
            model(pixels)
    if layout in CLIP and "normed" in found and found["normed"].ndim == 3:
        found["normed"] = found["normed"][:, 0]
    return found


# The matrix -------------------------------------------------------------------------------------------------------


def pairs() -> list[tuple[str, str]]:
    found = [pair for family in FAMILIES.values() for pair in itertools.product(family, repeat=2)]
    return [(a, b) for a, b in found if not a == b == f"deepencoder-{family_of(a)}"]


def save(state: State, path: Path) -> Path:
    torch.save(state, path)
    return path


def donor(family: str, folder: Path) -> Path:
    """A checkpoint of other weights that has all that any layout's encoder has."""
    layout = {"sam": "sam-deepseek-ocr", "clip": "clip-openai", "qwen2": "qwen2-deepseek-ocr2-sglang"}[family]
    state = weights(layout, seed=1)
    if family == "qwen2":
        # No file has both queries and embeddings: those of the canonical names may.
        state = {name.replace("qwen2_model.model.", "model.model."): t for name, t in state.items()}
        state = {name.removeprefix("qwen2_model."): t for name, t in state.items()}
        state[f"model.model.{EMBEDDINGS}"] = torch.randn(9, models.QWEN2_WIDTH)
    return save(state, folder / "donor.pth")


def lacking(source: str, target: str) -> list[str]:
    """The target's names of the tensors that it has and the source lacks."""

    def extras(layout: str) -> dict[str, str]:
        names = HUB_EXTRAS[family_of(layout)]
        if layout == "qwen2-hf":
            return {names[-1]: EMBEDDINGS}
        return dict(zip(names, PROGRAMS[layout].extras, strict=False))

    return [PROGRAMS[target].prefix + own for hub, own in extras(target).items() if hub not in extras(source)]


def same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


@pytest.mark.parametrize(("source", "target"), pairs())
def test_every_layout_becomes_every_other(
    source: str, target: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Loaded strictly by the target's library, the same features as the source's, and back the same bytes."""
    record_property("writes", f"{target}/safetensors")
    family, state = family_of(source), weights(source, seed=0)
    lent = donor(family, tmp_path) if lacking(source, target) else None
    there = tmp_path / "there.safetensors"
    record = converter.convert(save(state, tmp_path / "a.pth"), family, to=target, out=there, fill_from=lent)
    assert (record.mapping, record.target, record.missing) == (source, target, {})
    found = safetensors.torch.load_file(there)

    pixels, patches = torch.randn(INPUTS[family], dtype=torch.float64), None
    if family == "clip":
        made = [convolved(source, state, pixels), convolved(target, found, pixels)]
        patches = next((one for one in made if one is not None), torch.randn(1, models.CLIP_WIDTH, 4, 4).double())
    before, after = features(source, state, pixels, patches), features(target, found, pixels, patches)
    assert before.keys() & after.keys()
    for kind in before.keys() & after.keys():
        torch.testing.assert_close(after[kind], before[kind], rtol=1e-5, atol=1e-5)

    # And back: what the target has no place for comes from the source itself.
    lost = lacking(target, source)
    back = converter.convert(
        there, family, to=source, out=tmp_path / "back.safetensors", fill_from=tmp_path / "a.pth" if lost else None
    )
    assert back.mapping == target
    # A file that has the layout already is not written anew.
    assert (tmp_path / "back.safetensors").exists() is (source != target)
    returned = safetensors.torch.load_file(tmp_path / "back.safetensors") if source != target else found
    same(returned, state)


@pytest.mark.parametrize("target", PROGRAMS)
def test_every_layout_is_written_for_torch_load(
    target: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The very tensors that are written as safetensors."""
    record_property("writes", f"{target}/.pth")
    family = family_of(target)
    path = donor(family, tmp_path)
    for out in (tmp_path / "out.safetensors", tmp_path / "out.pth"):
        converter.convert(path, family, to=target, out=out)
    # A file that has the layout already is not written anew.
    out = tmp_path / "out.pth"
    found = torch.load(out if out.exists() else path, weights_only=True)
    same(found, safetensors.torch.load_file(tmp_path / "out.safetensors"))
    strictly(target, found)


@pytest.mark.parametrize("container", SAVERS)
@pytest.mark.parametrize("target", ["sam-meta", "clip-openai", "qwen2-deepseek-ocr2"])
def test_the_deepencoder_from_every_container(
    target: str, container: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    family = family_of(target)
    source = f"deepencoder-{family}"
    record_property("reads", f"{source}/{container}")
    path = SAVERS[container](weights(source, seed=0), tmp_path)
    fill = donor(family, tmp_path)
    record = converter.convert(path, family, to=target, out=tmp_path / "out.safetensors", fill_from=fill)
    assert (record.mapping, record.target) == (source, target)
    strictly(target, safetensors.torch.load_file(tmp_path / "out.safetensors"))


@pytest.mark.parametrize(("source", "target"), [pair for pair in pairs() if lacking(*pair)])
def test_what_the_source_lacks_is_named(source: str, target: str, tmp_path: Path) -> None:
    path, family = save(weights(source, seed=0), tmp_path / "a.pth"), family_of(source)
    if target.startswith("deepencoder-"):
        # The DeepEncoder may lack what it never runs, or what no file of the family holds: said, and no error.
        record = converter.convert(path, family, out=tmp_path / "out.safetensors")
        assert sorted(record.missing) == sorted(lacking(source, target))
        return
    with pytest.raises(MappingError) as error:
        converter.convert(path, family, to=target, out=tmp_path / "out.safetensors")
    assert error.value.exit_code == 3
    first, second = str(error.value).splitlines()
    start, names = first.split(f": lacks tensors of {target}: ")
    assert start == str(path)
    assert sorted(names.split(", ")) == sorted(lacking(source, target))
    assert second == "take them from a checkpoint that has them, with --fill-from"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("source", "target"), pairs())
def test_only_openais_projection_takes_more_than_copying(source: str, target: str, tmp_path: Path) -> None:
    family = family_of(source)
    lent = donor(family, tmp_path) if lacking(source, target) else None
    with (
        closing(open_checkpoint(save(weights(source, seed=0), tmp_path / "a.pth"))) as opened,
        closing(open_checkpoint(lent or tmp_path / "a.pth")) as lending,
    ):
        outputs = resolve(opened, ConvertOptions(family, target), lending if lent else None).plan.outputs
        computed = {name for name, value in outputs.items() if byte_ranges(value) is None}
    assert computed <= {"visual.proj"}
    # Turned twice is not turned at all.
    assert not (computed and source == target)


# Whole models -----------------------------------------------------------------------------------------------------


WHOLE: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "sam-meta": ("sam-hf", models.sam_meta),
    "sam-hf": ("sam-meta", models.sam_hf),
    "clip-hf": ("clip-openai", models.clip_hf),
    "clip-openai": ("clip-hf", models.open_clip),
}
# One tensor under two names, which safetensors does not store twice.
TIED = "prompt_encoder.shared_embedding.positional_embedding"


@pytest.mark.parametrize("source", WHOLE)
def test_whole_models_there_and_back(source: str, tmp_path: Path) -> None:
    target, build = WHOLE[source]
    state = models.randomised(copy.deepcopy(build()), seed=2).state_dict()
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    path, family = save(state, tmp_path / "a.pth"), family_of(source)
    converter.convert(path, family, to=target, full_model=True, out=there)
    expected = WHOLE[target][1]().state_dict()
    found = safetensors.torch.load_file(there)
    if target == "sam-hf":
        found[TIED] = found["shared_image_embedding.positional_embedding"]
    if source.startswith("sam"):
        copy.deepcopy(WHOLE[target][1]()).load_state_dict(found, strict=True)
    else:
        # The text towers of the tests' models are of two sizes.
        assert found.keys() == expected.keys()
    converter.convert(there, family, to=source, full_model=True, out=back)
    same(safetensors.torch.load_file(back), {name: tensor for name, tensor in state.items() if name != TIED})


def test_a_decoder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    """Of a part that the hub only passes on, as of the encoder: no tensor is left out unnoticed."""
    victims = (
        "mask_decoder.transformer.layers.1.cross_attn_token_to_image.v_proj.bias",
        "mask_decoder.output_hypernetworks_mlps.2.layers.1.weight",
        "prompt_encoder.not_a_point_embed.weight",
    )
    state = {name: tensor for name, tensor in models.sam_meta().state_dict().items() if name not in victims}
    path = save(state, tmp_path / "a.pth")
    with pytest.raises(MappingError) as error:
        converter.convert(path, "sam", to="sam-hf", full_model=True, out=tmp_path / "out.safetensors")
    # By the target's names.
    assert victims[0] in str(error.value)
    assert "mask_decoder.output_hypernetworks_mlps.2.layers.0.weight" in str(error.value)
    assert victims[2] in str(error.value)
    save(models.sam_meta().state_dict(), tmp_path / "whole.pth")
    converter.convert(
        path, "sam", to="sam-hf", full_model=True, fill_from=tmp_path / "whole.pth", out=tmp_path / "out.safetensors"
    )


def test_a_text_tower_that_is_lacking_is_named(tmp_path: Path) -> None:
    path = save(models.clip_hf_vision().state_dict(), tmp_path / "a.pth")
    with pytest.raises(
        MappingError, match=r"lacks tensors of clip-hf: visual_projection\.weight, .*text_model\.embeddings.* more\n"
    ):
        converter.convert(path, "clip", to="clip-hf", full_model=True, out=tmp_path / "out.safetensors")


def test_the_prompt_encoder_comes_from_another_file(tmp_path: Path) -> None:
    """A whole SAM from a DeepEncoder, whose own tensors are kept, and Meta's file for the rest."""
    own = weights("sam-deepseek-ocr", seed=0)
    path, meta = save(own, tmp_path / "a.pth"), models.sam_meta().state_dict()
    fill = save(meta, tmp_path / "meta.pth")
    converter.convert(path, "sam", to="sam-meta", full_model=True, fill_from=fill, out=tmp_path / "out.safetensors")
    prefix = PROGRAMS["sam-deepseek-ocr"].prefix
    encoder = {f"image_encoder.{name.removeprefix(prefix)}": t for name, t in own.items() if "net_" not in name}
    same(safetensors.torch.load_file(tmp_path / "out.safetensors"), {**meta, **encoder})


LOST = {
    "clip-openai": (
        "clip-hf",
        {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")},
    ),
    "clip-timm": ("clip-openai", {"head.weight": torch.randn(5, 64), "head.bias": torch.randn(5)}),
    "clip-hf": ("clip-timm", {"vision_model.embeddings.position_ids": torch.arange(17)[None]}),
    "sam-got-ocr2": ("sam-meta", {"lm_head.weight": torch.randn(5, 3)}),
}


@pytest.mark.parametrize("source", LOST)
def test_what_is_lost_has_a_reason(source: str, tmp_path: Path) -> None:
    """All that does not come back: what one program alone has, and positions that are counted anew."""
    target, lost = LOST[source]
    state, family = weights(source, seed=0), family_of(source)
    path = save({**state, **lost}, tmp_path / "a.pth")
    lent = donor(family, tmp_path)
    there = converter.convert(path, family, to=target, fill_from=lent, out=tmp_path / "there.safetensors")
    assert all(there.dropped[name] for name in lost)
    # Which comes back from the source itself.
    no_place = lacking(target, source) if source != "clip-openai" else ["visual.proj"]
    assert there.dropped.keys() == lost.keys() | set(no_place)
    converter.convert(
        tmp_path / "there.safetensors", family, to=source, fill_from=path, out=tmp_path / "back.safetensors"
    )
    same(safetensors.torch.load_file(tmp_path / "back.safetensors"), state)


def test_filling_from_a_model_of_another_size(tmp_path: Path) -> None:
    small = SamEncoder(replace(SAM_SIZES, neck=8, compressor=(16, 64)))
    fill = save(small.state_dict(), tmp_path / "small.pth")
    path = save(weights("sam-meta", seed=0), tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"--fill-from .*small\.pth: has other sizes: neck 8 \(not 16\)"):
        converter.convert(path, "sam", to="sam-got-ocr2", fill_from=fill, out=tmp_path / "out.safetensors")


# As the libraries save them today ---------------------------------------------------------------------------------


def clip_vision() -> nn.Module:
    from transformers import CLIPVisionModel

    return CLIPVisionModel(models.clip_hf().config.vision_config)


def unlimited_vision() -> nn.Module:
    return models.unlimited_ocr_hf()


def got_ocr2() -> nn.Module:
    config, model = (models.newer(name) for name in ("GotOcr2Config", "GotOcr2ForConditionalGeneration"))
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 2}
    vision = models.got_ocr2_hf().config.to_dict()
    return model(config(vision_config=vision, text_config=text | heads))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "layouts"),
    [
        (models.clip_hf, ["clip-hf"]),
        (clip_vision, ["clip-hf"]),
        (models.sam_hf, ["sam-hf"]),
        (sam_vision, ["sam-hf"]),
        (models.got_ocr2_hf, ["sam-got-ocr2-hf"]),
        # Its language model is a Qwen2, which is no encoder.
        (got_ocr2, ["sam-got-ocr2-hf"]),
        # transformers renames its own tensors back as it saves them.
        (unlimited_vision, ["sam-deepseek-ocr", "clip-deepseek-ocr"]),
        # But not those of DeepSeek-OCR-2's vision model alone.
        (models.deepseek_ocr2_hf, ["sam-unlimited-ocr-hf", "qwen2-deepseek-ocr2-hf"]),
        (models.qwen2_hf, ["qwen2-hf"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_transformers_saves_is_known(build: Callable[[], nn.Module], layouts: list[str], tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "saved")
    found = converter.inspect(tmp_path / "saved")
    assert [entry.layout for entry in found.layouts] == layouts
    assert [entry.problem for entry in found.layouts] == [""] * len(layouts)


@pytest.mark.filterwarnings("ignore")
def test_written_names_are_those_that_transformers_saves(tmp_path: Path) -> None:
    got_ocr2().save_pretrained(tmp_path / "saved")
    names = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors").keys()
    path = save(weights("sam-meta", seed=0), tmp_path / "a.pth")
    converter.convert(path, "sam", to="sam-got-ocr2-hf", out=tmp_path / "out.safetensors")
    assert {name for name in names if "vision_tower" in name} == safetensors.torch.load_file(
        tmp_path / "out.safetensors"
    ).keys()


CONVERSIONS = """
import json, sys
import converter
for source, family, options in json.loads(sys.argv[1]):
    converter.convert(source, family, **options)
print(json.dumps([name for name in ("torch", "numpy", "transformers", "safetensors") if name in sys.modules]))
"""


def test_moving_bytes_imports_no_torch(tmp_path: Path) -> None:
    sam = save(models.sam_meta().state_dict(), tmp_path / "sam.pth")
    clip = save(weights("clip-openai", seed=0), tmp_path / "clip.pth")
    jobs = [
        (str(sam), "sam", {"to": "sam-hf", "full_model": True, "out": str(tmp_path / "folder")}),
        (str(sam), "sam", {"to": "sam-timm", "out": str(tmp_path / "timm.safetensors")}),
        (str(clip), "clip", {"to": "clip-timm", "out": str(tmp_path / "clip-timm.safetensors")}),
        (str(clip), "clip", {"to": "clip-hf", "out": str(tmp_path / "clip-hf.pth"), "format": "pth"}),
    ]
    done = subprocess.run(
        [sys.executable, "-c", CONVERSIONS, json.dumps(jobs)], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
