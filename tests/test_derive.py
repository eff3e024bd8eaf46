"""Mapping files derived from pairs of checkpoints: every layout that ships is found again, and ones never seen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import safetensors.torch
import test_oracles as oracles
import torch
from inventories import inventories, sparse
from test_oracles import LAYOUTS, State, check_equal

import converter
from converter.api.derive import Derived, derive
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


def check_converts(found: Derived, expected: State, folder: Path) -> None:
    """The derived mapping makes of the source what is expected, byte for byte."""
    assert found.written and not found.unmatched
    out = folder / "out.safetensors"
    converter.convert(folder / "source.pth", found.family, mapping=folder / "my.yaml", out=out)
    check_equal(safetensors.torch.load_file(out), expected)


def templates(found: Derived) -> list[str]:
    """The rules of a derived mapping, a line each."""
    mapping = registry.load_file(Path(found.output))
    return [rule.text for rule in (*mapping.rules, *mapping.other_rules)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_that_ships_is_found_again(layout: str, tmp_path: Path) -> None:
    family, name, make = LAYOUTS[layout]
    state, expected = make()
    found = derived(state, expected, tmp_path)
    check_converts(found, expected, tmp_path)
    assert set(found.found) == {"values"} and not found.guessed
    assert found.family == family and found.known == [name]
    shipped = registry.load(name)
    assert found.rules <= 2 * len(shipped.rules)  # type: ignore[union-attr]
    assert 20 <= len(found.text.splitlines()) <= 60
    assert max(map(len, found.text.splitlines())) <= 120


@pytest.mark.parametrize("layout", LAYOUTS)
def test_and_by_its_names_and_shapes_alone(layout: str, tmp_path: Path) -> None:
    family, name, make = LAYOUTS[layout]
    state, expected = make()
    for target in (f"deepencoder-{family}", name):
        found = derived(state, target, tmp_path, force=True)
        check_converts(found, expected, tmp_path)
        assert set(found.found) == {"shape and name"}
        (tmp_path / "out.safetensors").unlink()
    assert "Guessed by shape and name" in found.text


@pytest.mark.parametrize(
    ("checkpoint", "family"),
    [("sam-hf-bin", "sam"), ("sam-meta-vit-h", "sam"), ("clip-open_clip", "clip"), ("unlimited-ocr-hf-vision", "sam")],
)
def test_the_names_of_real_checkpoints(checkpoint: str, family: str, tmp_path: Path) -> None:
    """Of files of true size that hold no weights: towers of other depths and sizes beside what is meant."""
    path = sparse(tmp_path / "model.safetensors", inventories()[checkpoint])
    found = derive(path, f"deepencoder-{family}", out=tmp_path / "my.yaml")
    shipped = converter.convert(path, family, dry_run=True)
    ours = converter.convert(path, family, mapping=tmp_path / "my.yaml", dry_run=True)
    assert (ours.converted, ours.missing) == (shipped.converted, shipped.missing)
    assert found.rules <= 12


def flax_clip() -> tuple[State, State]:
    """Kernels the other way round, q, k and v apart with a dimension for heads, layers from 1, other names, a head."""
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
    """q, k and v head by head, both relative positions in one tensor, linear weights transposed, stages from 1."""
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
    """q, k and v of every head as a tensor of its own; blocks numbered by tens within a word."""
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


@pytest.fixture(params=[flax_clip, interleaved_sam, heads_apart], ids=lambda make: make.__name__)
def unseen(request: pytest.FixtureRequest) -> Callable[[], tuple[State, State]]:
    """A layout that no file describes."""
    make: Callable[[], tuple[State, State]] = request.param
    return make


RULES = {
    flax_clip: [
        "cls -> embeddings.class_embedding",
        " + ".join(f"Transformer.encoderblock_{{layer+1}}.MHA.{part}.kernel" for part in ("query", "key", "value"))
        + " -> transformer.layers.{layer}.self_attn.qkv_proj.weight",
        "Transformer.encoderblock_{layer+1}.MLP.Dense_{i}.bias -> transformer.layers.{layer}.mlp.fc{i+1}.bias",
    ],
    interleaved_sam: [
        "stage{layer+1}.att.w_{param} -> blocks.{layer}.attn.qkv.{param}",
        "stage{layer+1}.att.rel -> blocks.{layer}.attn.rel_pos_h + blocks.{layer}.attn.rel_pos_w",
        "fpn.{rest} -> neck.{rest}",
    ],
    heads_apart: ["enc.b{layer}_norm{n}.{param} -> blocks.{layer}.norm{n}.{param}"],
}


def test_a_layout_never_seen(unseen: Callable[[], tuple[State, State]], tmp_path: Path) -> None:
    state, hub = unseen()
    found = derived(state, hub, tmp_path)
    check_converts(found, hub, tmp_path)
    assert set(found.found) == {"values"} and not found.known
    assert set(RULES[unseen]) <= set(templates(found))
    assert found.rules <= 15 and len(found.text.splitlines()) <= 60


def zeroed(state: State, hub: State, chosen: Callable[[str], bool]) -> tuple[State, State]:
    """Both with some of the hub's tensors, and whatever of the state they are made of, all zeros."""
    values = {}
    for tensor in (tensor for name, tensor in hub.items() if chosen(name)):
        for parts in (1, 3, 3 * models.HEADS):
            for part in tensor.chunk(parts) if len(tensor) % parts == 0 else ():
                values[tuple(part.flatten().sort().values.tolist())] = True
    blank = [
        {n: torch.zeros_like(t) if tuple(t.flatten().sort().values.tolist()) in values else t for n, t in side.items()}
        for side in (state, hub)
    ]
    return blank[0], blank[1]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("make", [flax_clip, interleaved_sam, *{make for _, _, make in LAYOUTS.values()}])
def test_tensors_that_are_alike_are_told_apart_by_their_neighbours(
    make: Callable[[], tuple[State, State]], norms: bool, tmp_path: Path
) -> None:
    """As before training: all biases are equal, or the norms' weights too; the rules are those of trained weights."""
    state, hub = make()
    (tmp_path / "trained").mkdir()
    expected = derived(state, hub, tmp_path / "trained")
    constant = zeroed(state, hub, lambda name: name.endswith("bias") or (norms and "norm" in name.replace("layr", "n")))
    found = derived(*constant, tmp_path)
    check_converts(found, constant[1], tmp_path)
    assert sorted(templates(found)) == sorted(templates(expected))
    assert found.found["values that several tensors have, and name"] > 10


def test_a_target_in_another_layout_is_reached_by_it(tmp_path: Path) -> None:
    """The text tower and the projections, which the DeepEncoder lacks, are led to their names too."""
    state, _ = oracles.open_clip()
    torch.save(state, tmp_path / "known.pth")
    target = tmp_path / "hf.safetensors"
    converter.convert(tmp_path / "known.pth", "clip", to="clip-hf", full_model=True, out=target)
    ours = {re.sub("resblocks", "stack", name).replace("ln_", "gain_"): tensor for name, tensor in state.items()}
    torch.save(ours, tmp_path / "source.pth")
    found = derive(tmp_path / "source.pth", target, out=tmp_path / "my.yaml", name="clip-stack")
    assert found.written and set(found.found) == {"values"} and not found.dropped
    options = {"mapping": tmp_path / "my.yaml", "to": "clip-hf", "full_model": True}
    options["out"] = tmp_path / "out.safetensors"
    card = converter.convert(tmp_path / "source.pth", "clip", **options)  # type: ignore[arg-type]
    assert card.mapping == "clip-stack"
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), safetensors.torch.load_file(target))
    assert "\nother_rules:\n" in found.text


def test_a_tensor_under_two_names_is_used_once(tmp_path: Path) -> None:
    state, hub = oracles.sam_timm()
    found = derived({**state, "tied": state["pos_embed"]}, hub, tmp_path)
    check_converts(found, hub, tmp_path)
    assert "because: the same tensor as pos_embed" in found.text


def test_what_is_recognised_is_no_other_layout(unseen: Callable[[], tuple[State, State]], tmp_path: Path) -> None:
    state, hub = unseen()
    mapping = registry.load_file(Path(derived(state, hub, tmp_path).output))
    for name, inventory in inventories().items():
        path = sparse(tmp_path / f"{name}.safetensors", inventory)
        with pytest.raises(LayoutError):
            converter.convert(path, mapping.family, mapping=tmp_path / "my.yaml", dry_run=True)


def test_a_target_of_two_families_needs_a_choice(tmp_path: Path) -> None:
    both = models.unlimited_ocr_hf().state_dict()
    with pytest.raises(UsageError, match="holds sam and clip\nchoose one with --family"):
        derived(both, both, tmp_path)
    assert derived(both, both, tmp_path, family="clip").family == "clip"


def test_a_target_of_no_known_layout_is_refused(tmp_path: Path) -> None:
    state, _ = flax_clip()
    with pytest.raises(
        LayoutError, match="fits no layout that is known\nTARGET is to be a checkpoint in one of: deepenc"
    ):
        derived(state, state, tmp_path)


def test_what_is_not_found_is_told_and_nothing_written(tmp_path: Path) -> None:
    state, hub = oracles.clip_hf()
    lost = "transformer.layers.1.layer_norm1.bias"
    found = derived(state, {**hub, lost: torch.randn_like(hub[lost])}, tmp_path)
    assert found.unmatched == [lost] and not found.written and not (tmp_path / "my.yaml").exists()
    found = derived(state, {**hub, lost: torch.randn_like(hub[lost])}, tmp_path, partial=True)
    assert found.written and registry.load_file(tmp_path / "my.yaml").name == "my"


def test_other_types_have_no_equal_values(tmp_path: Path) -> None:
    state, hub = oracles.sam_meta()
    found = derived(state, {name: tensor.half() for name, tensor in hub.items()}, tmp_path)
    assert found.notes == ["SOURCE is float32, TARGET float16: no values can be equal"]


def test_names_that_yaml_would_misread_are_quoted(tmp_path: Path) -> None:
    state, hub = oracles.sam_timm()
    odd = {f"a: b #{name}".replace("blocks", "- 'no\"\té"): tensor for name, tensor in state.items()}
    check_converts(derived(odd, hub, tmp_path, name="yes: #1"), hub, tmp_path)


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    state, hub = flax_clip()
    torch.save(state, tmp_path / "source.pth")
    saved(hub, tmp_path / "target.safetensors")
    texts = set()
    for seed in ("1", "2"):
        done = run("source.pth", "target.safetensors", "--force", folder=tmp_path, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        texts.add((tmp_path / "my.yaml").read_text())
    assert len(texts) == 1


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from converter.cli.main import convert; sys.exit(convert())"
    command = [sys.executable, "-c", code, "mapping", "derive", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_command(tmp_path: Path) -> None:
    state, hub = interleaved_sam()
    torch.save(state, tmp_path / "source.pth")
    saved(hub, tmp_path / "target.safetensors")
    done = run("source.pth", "target.safetensors", "-o", "new.yaml", "--name", "sam-new", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "new.yaml\n")
    assert "sam-new: 51 of 51 tensors of target.safetensors, in 12 rules" in done.stderr
    assert "51 by values (certain)" in done.stderr
    done = run("source.pth", "target.safetensors", "-o", "new.yaml", folder=tmp_path)
    assert done.returncode == 4 and "exists already" in done.stderr
    saved({**hub, "pos_embed": hub["pos_embed"] + 1}, tmp_path / "target.safetensors")
    done = run("source.pth", "target.safetensors", "--json", folder=tmp_path)
    assert done.returncode == 3 and json.loads(done.stdout)["unmatched"] == ["pos_embed"]
    assert "no match for 1 tensor of target.safetensors (nothing was written" in done.stderr
    assert not (tmp_path / "my.yaml").exists()


def test_an_existing_file_is_asked_about_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        derive(tmp_path / "absent", tmp_path / "absent", out=tmp_path / "my.yaml")
    assert (tmp_path / "my.yaml").read_text() == "mine"


def test_names_that_mislead_are_found_out(tmp_path: Path) -> None:
    """A tensor of the wrong shape under the right name: nothing is written, unless to be finished by hand."""
    state, _ = oracles.sam_timm()
    state = {**state, "neck.3.bias": torch.randn(models.NECK + 1)}
    found = derived(state, "deepencoder-sam", tmp_path)
    assert found.unmatched == ["neck.3.bias"] and not found.written
    assert derived(state, "deepencoder-sam", tmp_path, partial=True).written


def test_a_source_that_has_nothing_of_the_target(tmp_path: Path) -> None:
    _, hub = oracles.sam_meta()
    found = derived({"a.weight": torch.randn(3, 3)}, hub, tmp_path, partial=True)
    assert len(found.unmatched) == len(hub) and not found.written and found.rules == 1


def test_one_of_several_state_dicts_is_chosen(tmp_path: Path) -> None:
    state, hub = oracles.sam_timm()
    torch.save({"model": {n: t + 1 for n, t in state.items()}, "ema": state}, tmp_path / "source.pth")
    saved(hub, tmp_path / "target.safetensors")
    ask = (tmp_path / "source.pth", tmp_path / "target.safetensors")
    with pytest.raises(LayoutError, match=r"holds 2 state dicts of 51 tensors: model, ema\nchoose one, such as"):
        derive(*ask, out=tmp_path / "my.yaml")
    assert derive(*ask, out=tmp_path / "my.yaml", state_dict="ema").written


def test_tensors_that_stand_there_twice_are_told(tmp_path: Path) -> None:
    """What is fused of q, k and v could be made of either; all else is as good from one as from the other."""
    state, expected = oracles.clip_hf()
    found = derived({**state, **{f"ema.{name}": tensor for name, tensor in state.items()}}, expected, tmp_path)
    assert not found.written and all("qkv_proj" in name for name in found.unmatched)
    (note,) = found.notes
    assert "have another's values" in note and "save one of each alone" in note


def test_a_name_that_no_template_can_write_is_told(tmp_path: Path) -> None:
    state, expected = oracles.clip_hf()
    braced = {name.replace("mlp", "m{l}p"): tensor for name, tensor in state.items()}
    with pytest.raises(MappingError, match=r"'.*m\{l\}p.*' has a brace in its name"):
        derived(braced, expected, tmp_path)
    (tmp_path / "my.yaml").unlink(missing_ok=True)
    # Beside what is converted it is of no consequence.
    assert derived({**{f"clip.{n}": t for n, t in state.items()}, "other{}": torch.ones(3)}, expected, tmp_path).written


def test_many_tensors_beside_it_take_no_time_to_speak_of(tmp_path: Path) -> None:
    """By names alone: 5,000 tensors of a language model took minutes when each was looked at for every missing one."""
    inventory = inventories()["clip-hf-vision-336"]
    words = ("q", "k", "v", "o", "up", "down", "gate", "norm1", "norm2")
    beside = {f"language.layers.{i // 9}.{words[i % 9]}.weight": ("float32", (16, 16)) for i in range(5000)}
    path = sparse(tmp_path / "model.safetensors", {**inventory, **beside})  # type: ignore[dict-item]
    began = time.process_time()
    found = derive(path, "deepencoder-clip", out=tmp_path / "my.yaml", partial=True)
    assert found.found == {"shape and name": 288} and time.process_time() - began < 60
