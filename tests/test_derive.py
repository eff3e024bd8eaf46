"""Mapping files derived from pairs of checkpoints, and from names alone."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import test_oracles as oracles
import torch
from command import run, run_installed
from inventories import inventories, sparse
from test_oracles import LAYOUTS, State, check_equal

import converter
from converter.api.derive import derive
from converter.derivation.mapping import Derived
from converter.errors import LayoutError, MappingError, OutputError, UsageError
from converter.layouts import registry


def saved(state: State, path: Path) -> Path:
    safetensors.torch.save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    return path


def derived(source: State, target: State | str, folder: Path, **options: object) -> Derived:
    """What is derived from two checkpoints, the source as torch saves it."""
    torch.save(source, folder / "source.pth")
    other = target if isinstance(target, str) else saved(target, folder / "target.safetensors")
    return derive(folder / "source.pth", other, out=folder / "my.yaml", **options)  # type: ignore[arg-type]


def check_converts(found: Derived, expected: State, folder: Path, **options: object) -> None:
    """The derived mapping makes of the source what is expected, byte for byte."""
    assert found.written and not found.unmatched
    out = folder / "out.safetensors"
    converter.convert(folder / "source.pth", found.family, mapping=folder / "my.yaml", out=out, force=True, **options)
    check_equal(safetensors.torch.load_file(out), expected)


def templates(found: Derived) -> list[str]:
    """The rules of a derived mapping, a line each."""
    mapping = registry.load_mapping_file(Path(found.output))
    return [rule.text for rule in (*mapping.rules, *mapping.other_rules)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shipped_layouts_are_found_by_values(layout: str, tmp_path: Path) -> None:
    family, name, make = LAYOUTS[layout]
    state, expected = make()
    found = derived(state, expected, tmp_path)
    check_converts(found, expected, tmp_path)
    assert (found.family, found.method) == (family, "values")
    assert found.num_rules <= 2 * len(registry.load(name).mapping.rules)
    assert len(found.text.splitlines()) <= 60


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shipped_layouts_are_found_by_names_under_another_prefix(layout: str, tmp_path: Path) -> None:
    family, _, make = LAYOUTS[layout]
    state, expected = make()
    inside = {f"tower.{name}": tensor for name, tensor in state.items()}
    found = derived({**inside, "lm_head.weight": torch.ones(2, 2)}, f"deepencoder-{family}", tmp_path)
    check_converts(found, expected, tmp_path)
    assert "by comparing names" in found.text and "lm_head.weight" in found.dropped


@pytest.mark.parametrize(
    ("checkpoint", "family"),
    [("sam-hf-bin", "sam"), ("sam-meta-vit-h", "sam"), ("clip-open_clip", "clip"), ("unlimited-ocr-hf-vision", "sam")],
)
def test_names_of_real_checkpoints(checkpoint: str, family: str, tmp_path: Path) -> None:
    """Files of real size without weights, which hold other towers too."""
    path = sparse(tmp_path / "model.safetensors", inventories()[checkpoint])
    found = derive(path, f"deepencoder-{family}", out=tmp_path / "my.yaml")
    shipped = converter.convert(path, family, dry_run=True)
    ours = converter.convert(path, family, mapping=tmp_path / "my.yaml", dry_run=True)
    assert (ours.converted, ours.missing) == (shipped.converted, shipped.missing)
    assert found.num_rules <= 14


def flax_clip() -> tuple[State, State]:
    """Transposed kernels; separate q, k and v with a dimension for heads; layers counted from 1; a head."""
    _, hub = oracles.clip_hf()
    width, heads = models.CLIP_WIDTH, models.CLIP_HEADS
    state: State = {
        "img.cls": hub["embeddings.class_embedding"].reshape(1, 1, -1),
        "img.stem.kernel": hub["embeddings.patch_embedding.weight"].permute(2, 3, 1, 0),
        "img.posemb": hub["embeddings.position_embedding.weight"][None],
        "img.norm_in.scale": hub["pre_layrnorm.weight"],
        "img.norm_in.bias": hub["pre_layrnorm.bias"],
        "head.kernel": torch.randn(4, 4),
        "t": torch.randn(()),
    }
    names = {"layer_norm1": "LN_a", "layer_norm2": "LN_b", "self_attn.out_proj": "MHA.out", "mlp.fc1": "MLP.Dense_0"}
    names["mlp.fc2"] = "MLP.Dense_1"
    for layer in range(models.CLIP_DEPTH):
        ours, theirs = f"img.Transformer.encoderblock_{layer + 1}", f"transformer.layers.{layer}"
        for module, name in names.items():
            weight = hub[f"{theirs}.{module}.weight"]
            state[f"{ours}.{name}.{'kernel' if weight.dim() == 2 else 'scale'}"] = weight.t()
            state[f"{ours}.{name}.bias"] = hub[f"{theirs}.{module}.bias"]
        for leaf in ("weight", "bias"):
            parts = hub[f"{theirs}.self_attn.qkv_proj.{leaf}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                shape = (width, heads, -1) if leaf == "weight" else (heads, -1)
                turned = part.T if leaf == "weight" else part
                state[f"{ours}.MHA.{name}.{'kernel' if leaf == 'weight' else leaf}"] = turned.reshape(shape)
    return state, hub


def interleaved_sam() -> tuple[State, State]:
    """q, k and v interleaved by head; relative positions fused; linear weights transposed; stages counted from 1."""
    _, hub = oracles.sam_meta()
    state: State = {}
    for name, tensor in hub.items():
        layer, _, rest = name.removeprefix("blocks.").partition(".")
        stage = f"backbone.stage{int(layer) + 1}" if name.startswith("blocks.") else ""
        leaf = name.rpartition(".")[2]
        if not stage:
            state["backbone." + name.replace("neck", "fpn").replace("pos_embed", "abs_pos")] = tensor
        elif "qkv" in rest:
            heads = tensor.reshape(3, models.HEADS, -1, *tensor.shape[1:]).transpose(0, 1)
            state[f"{stage}.att.w_{leaf}"] = heads.reshape(tensor.shape)
        elif rest == "attn.rel_pos_h":
            state[f"{stage}.att.rel"] = torch.cat([tensor, hub[name[:-1] + "w"]])
        elif rest.startswith("norm"):
            state[f"{stage}.{'preAtt' if '1' in rest else 'preFfn'}.{leaf}"] = tensor
        elif "lin" in rest:
            state[f"{stage}.ffn.{'up' if '1' in rest else 'down'}.{leaf}"] = tensor.T if leaf == "weight" else tensor
        elif "rel_pos" not in rest:
            state[f"{stage}.{rest.replace('attn', 'att')}"] = tensor
    return state, hub


def heads_apart() -> tuple[State, State]:
    """q, k and v of every head in a tensor of its own; the block's number within a word."""
    _, hub = oracles.sam_meta()
    state: State = {}
    for name, tensor in hub.items():
        name = re.sub(r"blocks\.(\d+)\.", r"enc.b\1_", name)
        if "qkv" not in name:
            state[f"net.{name}"] = tensor
            continue
        for i, part in enumerate(tensor.chunk(3 * models.HEADS)):
            state[f"net.{name.replace('qkv', 'qkv'[i // models.HEADS] + f'_head{i % models.HEADS}')}"] = part
    return state, hub


def fused_transposed(order: str) -> tuple[State, State]:
    """q, k and v in one matrix, in another order and transposed; layers counted from 1."""
    _, hub = oracles.clip_hf()
    state: State = {}
    for name, tensor in hub.items():
        number = re.match(r"transformer\.layers\.(\d+)\.", name)
        name = f"vit.{name}" if number is None else f"vit.stack.{int(number[1]) + 1}.{name[number.end() :]}"
        if "qkv_proj" in name:
            parts = dict(zip("qkv", tensor.chunk(3), strict=True))
            tensor = torch.cat([parts[part] for part in order])
        state[name] = tensor.T if name.endswith("qkv_proj.weight") else tensor
    return state, hub


def fused_kvq() -> tuple[State, State]:
    """The order k, v, q."""
    return fused_transposed("kvq")


@pytest.fixture(params=[flax_clip, interleaved_sam, heads_apart, fused_kvq], ids=lambda make: make.__name__)
def unseen(request: pytest.FixtureRequest) -> Callable[[], tuple[State, State]]:
    """A layout that does not ship."""
    make: Callable[[], tuple[State, State]] = request.param
    return make


RULES = {
    flax_clip: [
        "cls -> embeddings.class_embedding",
        " + ".join(f"Transformer.encoderblock_{{layer+1}}.MHA.{part}.kernel" for part in ("query", "key", "value"))
        + " -> transformer.layers.{layer}.self_attn.qkv_proj.weight",
        "Transformer.encoderblock_{layer+1}.MLP.Dense_0.bias -> transformer.layers.{layer}.mlp.fc1.bias",
    ],
    interleaved_sam: [
        "stage{layer+1}.att.w_{param} -> blocks.{layer}.attn.qkv.{param}",
        "stage{layer+1}.att.rel -> blocks.{layer}.attn.rel_pos_h + blocks.{layer}.attn.rel_pos_w",
        "fpn.{layer}.weight -> neck.{layer}.weight",
    ],
    heads_apart: ["enc.b{layer}_norm{n_2}.{param} -> blocks.{layer}.norm{n_2}.{param}"],
    fused_kvq: [
        "stack.{layer+1}.self_attn.qkv_proj.weight -> transformer.layers.{layer}.self_attn.qkv_proj.weight",
        "stack.{layer+1}.mlp.fc{n}.{param} -> transformer.layers.{layer}.mlp.fc{n}.{param}",
    ],
}


def test_unknown_layouts_are_found_by_values(unseen: Callable[[], tuple[State, State]], tmp_path: Path) -> None:
    state, hub = unseen()
    found = derived(state, hub, tmp_path)
    check_converts(found, hub, tmp_path)
    assert set(RULES[unseen]) <= set(templates(found))
    assert found.num_rules <= 17


# Ways to store a fused matrix [parts, heads, rows, inputs].
TRANSPOSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "[in, 3*out]": lambda matrix: matrix.permute(3, 0, 1, 2).flatten(1),
    "[in, 3, heads, rows]": lambda matrix: matrix.permute(3, 0, 1, 2),
    "[3, in, out]": lambda matrix: matrix.permute(0, 3, 1, 2).flatten(2),
    "[heads, in, 3*rows]": lambda matrix: matrix.permute(1, 3, 0, 2).flatten(2),
    "[in, heads*3*rows]": lambda matrix: matrix.permute(3, 1, 0, 2).flatten(1),
}


@pytest.mark.parametrize("order", ["".join(order) for order in itertools.permutations("qkv")])
@pytest.mark.parametrize("form", TRANSPOSED)
def test_fused_transposed_parts_in_any_order(form: str, order: str, tmp_path: Path) -> None:
    state, hub = fused_transposed(order)
    by_head = form.startswith("[heads") or "heads*3" in form
    for name in [name for name in state if "qkv_proj" in name]:
        if name.endswith("weight"):
            state[name] = TRANSPOSED[form](state[name].T.reshape(3, models.CLIP_HEADS, -1, models.CLIP_WIDTH))
        elif by_head:
            state[name] = state[name].reshape(3, models.CLIP_HEADS, -1).transpose(0, 1).flatten()
    found = derived(state, hub, tmp_path)
    check_converts(found, hub, tmp_path)
    assert ("reorder:" in found.text) == (order != "qkv") and "permute: [" in found.text
    assert ("deinterleave:" in found.text) == by_head
    assert "stack.{layer+1}.mlp.fc{n}.{param} -> transformer.layers.{layer}.mlp.fc{n}.{param}" in templates(found)


@pytest.mark.parametrize("order", ["".join(order) for order in itertools.permutations("qkv")])
def test_separate_parts_are_fused_in_the_order_of_their_values(order: str, tmp_path: Path) -> None:
    """Names that say nothing: the first part may be q, k or v."""
    _, hub = oracles.clip_hf()
    state: State = {}
    for name, tensor in hub.items():
        parts = dict(zip("qkv", tensor.chunk(3), strict=True)) if "qkv_proj" in name else {}
        state.update({name.replace("qkv_proj", f"part{i}"): parts[order[i]].t() for i in range(3) if parts})
        state.update({} if parts else {name: tensor})
    check_converts(derived(state, hub, tmp_path), hub, tmp_path)


# Ties and leftovers -----------------------------------------------------------------------------------------------


def test_copies_of_the_model_are_a_tie(tmp_path: Path) -> None:
    state, hub = oracles.clip_hf()
    copies = {f"ema.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(LayoutError, match=r"'vision_model\.(\S+)' and 'ema\.vision_model\.\1' for"):
        derived({**state, **copies}, hub, tmp_path)
    assert not (tmp_path / "my.yaml").exists()
    # Other values are no tie: the model has the target's.
    found = derived({**state, **{name: tensor + 1 for name, tensor in copies.items()}}, hub, tmp_path)
    check_converts(found, hub, tmp_path)
    assert set(copies) <= set(found.dropped)


def test_one_tensor_under_two_names_is_a_tie(tmp_path: Path) -> None:
    state, hub = oracles.sam_timm()
    with pytest.raises(LayoutError, match="'pos_embed' and 'tied' for 'pos_embed'"):
        derived({**state, "tied": state["pos_embed"]}, hub, tmp_path, allow_partial=True)


def test_biases_of_zeros_are_a_tie(tmp_path: Path) -> None:
    """Before training all biases are zeros: their values do not tell which is which."""
    state, hub = oracles.clip_hf()
    blank = [
        {name: torch.zeros_like(tensor) if name.endswith("bias") else tensor for name, tensor in side.items()}
        for side in (state, hub)
    ]
    with pytest.raises(LayoutError, match=r"'\S+k_proj\.bias' and '\S+v_proj\.bias' .*\n.*untrained weights"):
        derived(blank[0], blank[1], tmp_path)


def test_a_copy_of_a_tensor_that_is_split_is_a_tie(tmp_path: Path) -> None:
    state, hub = interleaved_sam()
    fused = "backbone.stage2.att.rel"
    with pytest.raises(LayoutError, match=f"'{fused}' and 'frozen.rel' for 'blocks.1.attn.rel_pos_h'"):
        derived({**state, "frozen.rel": state[fused]}, hub, tmp_path)


def test_similar_norms_in_half_precision_are_no_tie(tmp_path: Path) -> None:
    """Sums of 16-bit patterns around 1.0 are often equal."""
    state, _ = oracles.clip_hf()
    for name in [name for name in state if "norm" in name]:
        state[name] = 1 + torch.randint(0, 40, state[name].shape) / 128
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "source.pth")
    target = tmp_path / "target.safetensors"
    converter.convert(tmp_path / "source.pth", "clip", out=target)
    found = derive(tmp_path / "source.pth", target, out=tmp_path / "my.yaml")
    check_converts(found, safetensors.torch.load_file(target), tmp_path)


def test_position_ids_of_a_teacher_are_no_tie(tmp_path: Path) -> None:
    state, hub = oracles.clip_hf()
    ids = torch.arange(len(hub["embeddings.position_embedding.weight"]))[None]
    student = {f"student.{name}": tensor for name, tensor in state.items()}
    teacher = {f"teacher.{name}": tensor * 2 for name, tensor in state.items() if tensor.is_floating_point()}
    buffers = {f"{prefix}.vision_model.embeddings.position_ids": ids for prefix in ("student", "teacher")}
    found = derived({**student, **teacher, **buffers}, hub, tmp_path)
    assert set(teacher) < set(found.dropped) and "prefix: student.vision_model." in found.text
    converter.convert(tmp_path / "source.pth", "clip", mapping=tmp_path / "my.yaml", out=tmp_path / "out.safetensors")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out.safetensors")["embeddings.position_ids"], ids)


def test_prefix_chooses_one_of_two_copies(tmp_path: Path) -> None:
    state, hub = oracles.clip_hf()
    towers = {prefix + name: tensor for prefix in ("online.", "ema.") for name, tensor in state.items()}
    for target in (hub, "deepencoder-clip"):
        with pytest.raises(LayoutError, match=r"(online.*ema|ema.*online).*\n.*--prefix"):
            derived(towers, target, tmp_path, force=True)
        found = derived(towers, target, tmp_path, prefix="ema", force=True)
        check_converts(found, hub, tmp_path)
        assert {name for name in towers if name.startswith("online.")} <= set(found.dropped)


def test_a_dot_chooses_the_copy_without_a_prefix(tmp_path: Path) -> None:
    state, hub = oracles.clip_hf()
    towers = {prefix + name: tensor for prefix in ("", "ema.") for name, tensor in state.items()}
    for target in (hub, "deepencoder-clip"):
        with pytest.raises(LayoutError, match="--prefix"):
            derived(towers, target, tmp_path, force=True)
        found = derived(towers, target, tmp_path, prefix=".", force=True)
        assert "prefix: vision_model." in found.text
        assert {name for name in towers if name.startswith("ema.")} <= set(found.dropped)


def test_an_encoder_with_adapters_and_a_plain_copy_are_a_tie_by_names(tmp_path: Path) -> None:
    state, _ = oracles.sam_meta()
    student = {f"student.{name.replace('attn.qkv.', 'attn.qkv.base_layer.')}": value for name, value in state.items()}
    teacher = {f"teacher.{name}": value for name, value in state.items()}
    with pytest.raises(LayoutError, match=r"'student\.image_encoder\.', 'teacher\.image_encoder\.'"):
        derived({**student, **teacher}, "deepencoder-sam", tmp_path)


def test_state_dicts_of_other_sizes_with_the_same_names_are_a_tie(tmp_path: Path) -> None:
    state, hub = oracles.sam_timm()
    both: Any = {"model": {**state, "head.weight": torch.ones(2)}, "ema": {f"module.{n}": t for n, t in state.items()}}
    for target in (hub, "deepencoder-sam"):
        with pytest.raises(LayoutError, match=r"state dicts model and ema have the same names\n.*--state-dict model"):
            derived(both, target, tmp_path, force=True)
        found = derived(both, target, tmp_path, state_dict="ema", force=True)
        check_converts(found, hub, tmp_path, state_dict="ema")


@pytest.mark.parametrize("prefixes", [("model.visual.", "teacher.visual."), ("student.", "teacher.")])
def test_two_subtrees_with_the_same_names_are_a_tie(prefixes: tuple[str, str], tmp_path: Path) -> None:
    state, _ = oracles.clip_hf_vision()
    towers = {prefix + name: tensor for prefix in prefixes for name, tensor in state.items()}
    with pytest.raises(LayoutError, match=f"2 subtrees fit .*: '{prefixes[0]}', '{prefixes[1]}'"):
        derived(towers, "deepencoder-clip", tmp_path, allow_partial=True)
    assert not (tmp_path / "my.yaml").exists()


ADAPTERS = {
    "lora": ["blocks.0.attn.qkv.linear_a_q.weight", "blocks.1.attn.qkv.linear_b_v.weight"],
    "adapter": ["blocks.1.MLP_Adapter.D_fc1.weight"],
    "outside blocks": ["patch_embed.proj.lora_A"],
}


@pytest.mark.parametrize("by_names", [False, True])
@pytest.mark.parametrize("names", ADAPTERS.values(), ids=ADAPTERS)
def test_tensors_left_over_inside_matched_modules_are_refused(names: list[str], by_names: bool, tmp_path: Path) -> None:
    state, hub = oracles.sam_meta()
    extra = {f"image_encoder.{name}": torch.randn(4, 4) for name in names}
    with pytest.raises(LayoutError) as caught:
        derived({**state, **extra}, "deepencoder-sam" if by_names else hub, tmp_path, allow_partial=True)
    assert all(repr(name) in str(caught.value) for name in extra)
    assert "LoRA" in caught.value.hint and not (tmp_path / "my.yaml").exists()


def test_tensors_left_over_outside_are_dropped_with_a_reason(tmp_path: Path) -> None:
    state, hub = oracles.clip_hf()
    found = derived({**state, "head.0.lora.weight": torch.randn(4, 4)}, hub, tmp_path)
    check_converts(found, hub, tmp_path)
    reasons = converter.convert(tmp_path / "source.pth", "clip", mapping=tmp_path / "my.yaml", dry_run=True).dropped
    assert reasons["head.0.lora.weight"] == "not part of CLIP"
    assert reasons["vision_model.post_layernorm.weight"] == "no tensor of target.safetensors has these values"


# Targets, names and files ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_tensors_of_types_that_no_encoder_has_are_left_out(tmp_path: Path) -> None:
    _, _, make = LAYOUTS["sam-meta"]
    state, expected = make()
    odd = [torch.eye(2).to_sparse(), torch.ones(4, dtype=torch.complex128)[::2], torch.ones(2, device="meta")]
    renamed = {f"net.{name}": tensor for name, tensor in state.items()}
    found = derived({**renamed, **{f"odd.{i}": tensor for i, tensor in enumerate(odd)}}, expected, tmp_path)
    check_converts(found, expected, tmp_path)
    assert found.method == "values"


def test_the_target_may_be_a_full_model(tmp_path: Path) -> None:
    """The text tower and the projections, which the DeepEncoder lacks, have rules too."""
    state, _ = oracles.open_clip()
    torch.save(state, tmp_path / "known.pth")
    target = tmp_path / "hf.safetensors"
    converter.convert(tmp_path / "known.pth", "clip", to="clip-hf", full_model=True, out=target)
    ours = {re.sub("resblocks", "stack", name).replace("ln_", "gain_"): tensor for name, tensor in state.items()}
    torch.save(ours, tmp_path / "source.pth")
    found = derive(tmp_path / "source.pth", target, out=tmp_path / "my.yaml", name="clip-stack")
    assert found.written and found.method == "values" and not found.dropped
    options = {
        "mapping": tmp_path / "my.yaml",
        "to": "clip-hf",
        "full_model": True,
        "out": tmp_path / "out.safetensors",
    }
    record = converter.convert(tmp_path / "source.pth", "clip", **options)  # type: ignore[arg-type]
    assert record.mapping == "clip-stack"
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), safetensors.torch.load_file(target))
    assert "\nother_rules:\n" in found.text


def test_derived_mappings_detect_no_other_layout(unseen: Callable[[], tuple[State, State]], tmp_path: Path) -> None:
    state, hub = unseen()
    mapping = registry.load_mapping_file(Path(derived(state, hub, tmp_path).output))
    for name, inventory in inventories().items():
        path = sparse(tmp_path / f"{name}.safetensors", inventory)
        with pytest.raises(LayoutError):
            converter.convert(path, mapping.family, mapping=tmp_path / "my.yaml", dry_run=True)


def test_a_target_of_two_families_needs_a_choice(tmp_path: Path) -> None:
    both = models.unlimited_ocr_hf().state_dict()
    with pytest.raises(UsageError, match="contains sam and clip\nchoose one with --family"):
        derived(both, both, tmp_path)
    assert derived(both, both, tmp_path, family="clip").family == "clip"


def test_a_target_without_a_known_layout_is_refused(tmp_path: Path) -> None:
    state, _ = flax_clip()
    with pytest.raises(LayoutError, match="TARGET has no known layout"):
        derived(state, state, tmp_path)


def test_an_incomplete_mapping_is_written_with_partial_only(tmp_path: Path) -> None:
    state, hub = oracles.clip_hf()
    lost = "transformer.layers.1.layer_norm1.bias"
    found = derived(state, {**hub, lost: torch.randn_like(hub[lost])}, tmp_path)
    assert found.unmatched == [lost] and not found.written and not (tmp_path / "my.yaml").exists()
    found = derived(state, {**hub, lost: torch.randn_like(hub[lost])}, tmp_path, allow_partial=True)
    assert found.written and registry.load_mapping_file(tmp_path / "my.yaml").name == "my"


def test_no_match_at_all_is_refused(tmp_path: Path) -> None:
    state, hub = oracles.sam_meta()
    with pytest.raises(LayoutError, match="one element type"):
        derived(state, {name: tensor.half() for name, tensor in hub.items()}, tmp_path)
    with pytest.raises(LayoutError, match="known layout"):
        derived({"a.weight": torch.randn(3, 3)}, "deepencoder-sam", tmp_path, allow_partial=True)


def test_odd_names_are_quoted(tmp_path: Path) -> None:
    state, hub = oracles.sam_timm()
    odd = {f"a: b #{name}".replace("blocks", "- 'no\"\té"): tensor for name, tensor in state.items()}
    check_converts(derived(odd, hub, tmp_path, name="yes: #1"), hub, tmp_path)


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    """Also in a process that hashes strings otherwise."""
    state, hub = flax_clip()
    found = derived(state, hub, tmp_path)
    given = ("source.pth", "target.safetensors", "-o", "other.yaml", "--name", "my")
    run_installed("mapping", "derive", *given, cwd=tmp_path, PYTHONHASHSEED="1")
    assert (tmp_path / "other.yaml").read_text() == found.text


def test_the_command(tmp_path: Path) -> None:
    state, hub = interleaved_sam()
    torch.save(state, tmp_path / "source.pth")
    saved(hub, tmp_path / "target.safetensors")
    derive_from = partial(run, "mapping", "derive", "source.pth", "target.safetensors", cwd=tmp_path)
    done = derive_from("-o", "new.yaml", "--name", "sam-new")
    assert (done.returncode, done.stdout) == (0, "new.yaml\n")
    assert "sam-new: matched 51 of 51 tensors of target.safetensors with 13 rules" in done.stderr
    assert "51 matched by values" in done.stderr
    done = derive_from("-o", "new.yaml")
    assert done.returncode == 4 and "exists already" in done.stderr
    saved({**hub, "pos_embed": hub["pos_embed"] + 1}, tmp_path / "target.safetensors")
    done = derive_from("--json")
    assert done.returncode == 3 and json.loads(done.stdout)["unmatched"] == ["pos_embed"]
    assert "no match for 1 tensor of target.safetensors; use --partial" in done.stderr
    assert len(done.stderr.splitlines()) <= 12
    assert not (tmp_path / "my.yaml").exists()


def test_existing_files_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        derive(tmp_path / "absent", tmp_path / "absent", out=tmp_path / "my.yaml")
    assert (tmp_path / "my.yaml").read_text() == "mine"


def test_wrong_shapes_under_right_names_are_refused(tmp_path: Path) -> None:
    state, _ = oracles.sam_timm()
    with pytest.raises(MappingError, match=r"neck\.3\.bias.* has shape"):
        derived({**state, "neck.3.bias": torch.randn(models.NECK + 1)}, "deepencoder-sam", tmp_path)


def test_one_of_several_state_dicts_is_chosen(tmp_path: Path) -> None:
    state, hub = oracles.sam_timm()
    torch.save({"model": {n: t + 1 for n, t in state.items()}, "ema": state}, tmp_path / "source.pth")
    saved(hub, tmp_path / "target.safetensors")
    ask = (tmp_path / "source.pth", tmp_path / "target.safetensors")
    with pytest.raises(LayoutError, match=r"holds 2 state dicts of 51 tensors: model, ema\nchoose one, such as"):
        derive(*ask, out=tmp_path / "my.yaml")
    assert derive(*ask, out=tmp_path / "my.yaml", state_dict="ema").written


def test_names_with_braces_are_refused(tmp_path: Path) -> None:
    state, expected = oracles.clip_hf()
    braced = {name.replace("mlp", "m{l}p"): tensor for name, tensor in state.items()}
    with pytest.raises(MappingError, match=r"m\{l\}p"):
        derived(braced, expected, tmp_path)
    # Outside the encoder they do not matter.
    assert derived({**{f"clip.{n}": t for n, t in state.items()}, "other{}": torch.ones(3)}, expected, tmp_path).written


def test_large_models_around_the_encoder_take_little_time(tmp_path: Path) -> None:
    inventory = inventories()["clip-hf-vision-336"]
    words = ("q", "k", "v", "o", "up", "down", "gate", "norm1", "norm2")
    others = {f"language.layers.{i // 9}.{words[i % 9]}.weight": ("float32", (16, 16)) for i in range(5000)}
    path = sparse(tmp_path / "model.safetensors", {**inventory, **others})  # type: ignore[dict-item]
    began = time.process_time()
    found = derive(path, "deepencoder-clip", out=tmp_path / "my.yaml", allow_partial=True)
    assert found.num_matched == 293 and time.process_time() - began < 60
