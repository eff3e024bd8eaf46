"""What differs between two checkpoints: nothing across layouts and containers, and each thing that was changed."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from command import run
from hubserver import Repo, environment, hub_server
from test_verify_views import CHROMIUM, Outline, browse

import converter
from converter.api.diff import diff
from converter.cli import diff as cli
from converter.comparison.difference import Block, Difference, block_of, summarize
from converter.comparison.measure import measure_differences
from converter.comparison.streams import BUFFER
from converter.errors import ContainerError, LayoutError, UsageError, natural_sort_key
from converter.reports import html

State = dict[str, torch.Tensor]

SAM = ["deepencoder-sam", "sam-meta", "sam-hf", "sam-timm", "sam-got-ocr2-hf"]
CLIP = ["deepencoder-clip", "clip-hf", "clip-timm"]
LAYER = "transformer.layers.1.mlp.fc1.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAM and CLIP in every layout and container, made from one set of weights each."""
    path = tmp_path_factory.mktemp("diff")
    sam = {name: value for name, value in models.sam_meta().state_dict().items() if name.startswith("image_encoder.")}
    torch.save(sam, path / "sam.pth")
    torch.save(models.clip_hf_vision().state_dict(), path / "clip.pth")
    made = {"sam": SAM, "clip": CLIP}
    for family, layouts in made.items():
        (path / family).mkdir()
        for layout, kind in itertools.product(layouts, ["safetensors", "pth"]):
            out = path / family / f"{layout}.{kind}"
            converter.convert(path / f"{family}.pth", family, out=out, format=kind, to=layout)
            # A file that has the layout already is not written anew.
            if not out.exists():
                shutil.copy(path / f"{family}.pth", out)
        state = torch.load(path / f"{family}.pth", weights_only=True)
        torch.save(state, path / family / "legacy.pth", _use_new_zipfile_serialization=False)
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path / family / "wrapped.pth")
    return path


@pytest.mark.parametrize("family", ["sam", "clip"])
def test_every_layout_and_container_is_equal_to_every_other(family: str, folder: Path) -> None:
    files = sorted((folder / family).iterdir())
    assert len(files) == 2 * len({"sam": SAM, "clip": CLIP}[family]) + 2
    for a, b in itertools.product(files, files):
        found = diff(a, b)
        # A DeepEncoder holds no norm after the blocks.
        lacks = {"post_layernorm.bias", "post_layernorm.weight"} if family == "clip" else set()
        hub = ["deepencoder" in path.name for path in (a, b)]
        assert set(found.removed) == (lacks if hub == [False, True] else set()), (a, b)
        assert set(found.added) == (lacks if hub == [True, False] else set()), (a, b)
        assert not found.changed and not found.renamed and found.names == [f"deepencoder-{family}"]
        assert found.equal is (hub[0] == hub[1] or not lacks)
        assert len(found.same) >= (40 if family == "clip" else 50)


def test_position_ids_that_were_made_up_are_no_difference_and_said(folder: Path) -> None:
    # Converted files hold them, today's transformers' do not.
    found = diff(folder / "clip/deepencoder-clip.safetensors", folder / "clip/clip-hf.pth")
    assert found.notes == ["B has no embeddings.position_ids, which is not required: taken as 0, 1, 2, ..."]
    assert "embeddings.position_ids" in found.same and not found.removed
    assert not diff(folder / "clip/clip-hf.pth", folder / "clip/clip-timm.pth").notes


@pytest.fixture
def state(folder: Path) -> State:
    return safetensors.torch.load_file(folder / "clip/deepencoder-clip.safetensors")


def compared(before: State, after: State, tmp_path: Path) -> Difference:
    """Before in safetensors, after as torch saves it."""
    safetensors.torch.save_file(before, tmp_path / "a.safetensors")
    torch.save(after, tmp_path / "b.pth")
    return diff(tmp_path / "a.safetensors", tmp_path / "b.pth")


def test_one_changed_element(state: State, tmp_path: Path) -> None:
    after = {**state, LAYER: state[LAYER].clone()}
    after[LAYER][3, 5] += 0.5
    found = compared(state, after, tmp_path)
    (change,) = found.changed
    assert (change.name, change.differing, change.maximum) == (LAYER, 1, pytest.approx(0.5))
    a, b = state[LAYER].double(), after[LAYER].double()
    assert change.relative == pytest.approx(float((a - b).norm() / a.norm()))
    assert change.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-12)
    assert len(found.same) == len(state) - 1 and not found.equal
    moved = {block.name: block for block in found.blocks if block.differing}
    assert list(moved) == ["transformer.layers.1"] and moved["transformer.layers.1"].num_tensors == 12


def test_a_fine_tuned_block_moved_as_far_as_all_its_weights(folder: Path, tmp_path: Path) -> None:
    loaded = torch.load(folder / "sam.pth", weights_only=True)
    state = {name.removeprefix("image_encoder."): value for name, value in loaded.items()}
    generator = torch.Generator().manual_seed(1)
    names = [name for name in state if name.startswith("blocks.2.") and "norm" not in name]
    after = {**state, **{n: state[n] + 0.01 * torch.randn(state[n].shape, generator=generator) for n in names}}
    torch.save({f"image_encoder.{name}": value for name, value in after.items()}, tmp_path / "b.pth")
    found = diff(folder / "sam/sam-got-ocr2-hf.safetensors", tmp_path / "b.pth")
    assert {change.name for change in found.changed} == set(names)
    whole = [n for n in state if n.startswith("blocks.2.")]
    gap = sum(float((after[n] - state[n]).double().square().sum()) for n in whole)
    norm = sum(float(state[n].double().square().sum()) for n in whole)
    blocks = {block.name: block for block in found.blocks}
    assert blocks["blocks.2"].relative == pytest.approx(math.sqrt(gap / norm))
    assert blocks["blocks.1"].relative == 0 and blocks["blocks.2"].differing == len(names)
    assert found.moved[0].relative == max(change.relative or 0 for change in found.changed)


def test_names_on_one_side(state: State, tmp_path: Path) -> None:
    after = {name: value for name, value in state.items() if not name.startswith("transformer.layers.2.")}
    after["head.weight"] = torch.ones(3)
    found = compared(state, after, tmp_path)
    assert len(found.removed) == 12 and found.added == ["head.weight"] and not found.changed
    assert found.names == ["deepencoder-clip"]
    assert compared(after, state, tmp_path).removed == ["head.weight"]


def test_a_missing_tensor_leaves_the_names_as_they_are(state: State, tmp_path: Path) -> None:
    found = compared(state, {name: value for name, value in state.items() if name != LAYER}, tmp_path)
    assert found.removed == [LAYER] and found.names == []
    assert "compared under their own names" in found.notes[0] and f"missing tensor '{LAYER}'" in found.notes[0]


def test_a_tensor_under_another_name(state: State, tmp_path: Path) -> None:
    found = compared({**state, "old": torch.arange(7.0)}, {**state, "new": torch.arange(7.0)}, tmp_path)
    assert found.renamed == {"old": "new"} and not found.removed and not found.added and not found.equal
    other = compared({**state, "old": torch.arange(7.0)}, {**state, "new": torch.arange(7.0) + 1}, tmp_path)
    assert not other.renamed and other.removed == ["old"] and other.added == ["new"]


def test_a_tensor_under_a_second_name(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    found = compared({"embed": shared}, {"embed": shared, "head": shared}, tmp_path)
    assert found.equal and found.notes == ["B's head shares its bytes with embed: not counted"]


def test_types_are_compared_by_value(state: State, tmp_path: Path) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    found = compared(state, half, tmp_path)
    assert len(found.changed) == len(state) - 1 and found.same == ["embeddings.position_ids"]
    for change in found.changed:
        assert change.dtypes == ["float32", "float16"]
        a, b = state[change.name].double(), half[change.name].double()
        assert (change.differing, change.maximum) == (int((a != b).sum()), float((a - b).abs().max()))
    same = compared({n: v.float() for n, v in half.items()}, {n: v.double() for n, v in half.items()}, tmp_path)
    assert not same.equal and all(change.differing == 0 and change.relative == 0 for change in same.changed)


def test_shapes(state: State, tmp_path: Path) -> None:
    found = compared({"a": torch.ones(2, 3), "b": torch.ones(4)}, {"a": torch.ones(3, 2), "b": torch.ones(4)}, tmp_path)
    (change,) = found.reshaped
    assert (change.shapes, change.differing, change.relative) == ([[2, 3], [3, 2]], None, None)
    assert found.same == ["b"] and found.moved == [] and found.names == []


def test_unknown_layouts_by_their_own_names(tmp_path: Path) -> None:
    state = {f"stage.{i}.{kind}": torch.randn(5, 5) for i in range(3) for kind in ("w.weight", "w.bias")}
    found = compared({f"net.{name}": value for name, value in state.items()}, state, tmp_path)
    assert found.equal and found.layouts == [[], []] and found.names == []
    assert found.notes == ["compared without the prefix net. of A's names"]
    assert not compared({"a": torch.ones(1)}, {"b": torch.zeros(1)}, tmp_path).same


def whole_model(folder: Path) -> State:
    """As DeepSeek-OCR: both encoders and a language model."""
    sam = safetensors.torch.load_file(folder / "sam/deepencoder-sam.safetensors")
    clip = safetensors.torch.load_file(folder / "clip/deepencoder-clip.safetensors")
    clip.pop("embeddings.position_ids")
    neck = models.NECK
    sam |= {"net_2.weight": torch.randn(2 * neck, neck, 3, 3), "net_3.weight": torch.randn(8, 2 * neck, 3, 3)}
    state = {f"model.sam_model.{name}": value for name, value in sam.items()}
    state |= {f"model.vision_model.{name}": value for name, value in clip.items()}
    language = {f"model.layers.{i}.mlp.experts.{k}.up_proj.weight": torch.randn(6, 6) for i in (0, 1) for k in (0, 1)}
    return {**state, **language, "lm_head.weight": torch.randn(9, 6)}


def test_whole_models_with_all_that_is_no_encoder(folder: Path, tmp_path: Path) -> None:
    state = whole_model(folder)
    expert = "model.layers.1.mlp.experts.0.up_proj.weight"
    key = "model.vision_model.transformer.layers.0.mlp.fc1.bias"
    found = compared(state, {**state, expert: state[expert] + 1, key: state[key] * 2}, tmp_path)
    assert found.names == ["deepencoder-sam", "deepencoder-clip"]
    assert [change.name for change in found.changed] == [expert, key.removeprefix("model.")]
    assert [block.name for block in found.blocks if block.differing] == [
        "model.layers.1", "vision_model.transformer.layers.0",
    ]  # fmt: skip
    assert len(found.same) == len(state) - 2
    alone = diff(folder / "clip/clip-timm.pth", tmp_path / "a.safetensors")
    assert not alone.changed and "lm_head.weight" in alone.added and "model.sam_model.pos_embed" in alone.added


def test_a_model_around_an_encoder_is_compared_too(tmp_path: Path) -> None:
    tower = {
        f"model.vision_tower.vision_tower.{name}": value for name, value in models.clip_hf_vision().state_dict().items()
    }
    state = {**tower, "model.layers.0.mlp.up_proj.weight": torch.ones(4, 4), "lm_head.weight": torch.ones(9, 4)}
    found = compared(state, {**state, "lm_head.weight": torch.zeros(9, 4)}, tmp_path)
    assert found.names == ["deepencoder-clip"] and [change.name for change in found.changed] == ["lm_head.weight"]
    assert len(found.same) >= len(state) - 2 * models.CLIP_DEPTH * 6 and compared(state, state, tmp_path).equal


def test_nan_equals_itself_alone(tmp_path: Path) -> None:
    a = torch.tensor([math.nan, math.inf, 1.0, 0.0])
    assert compared({"x": a}, {"x": a.clone()}, tmp_path).equal
    (change,) = compared({"x": a}, {"x": torch.tensor([math.nan, math.inf, 3.0, -0.0])}, tmp_path).changed
    assert (change.differing, change.maximum, change.relative) == (2, 2.0, 2.0)
    (change,) = compared({"x": a}, {"x": torch.tensor([1.0, math.inf, 1.0, 0.0])}, tmp_path).changed
    assert change.differing == 1 and math.isnan(change.maximum or 0)
    (change,) = compared({"x": torch.zeros(3)}, {"x": torch.ones(3)}, tmp_path).changed
    assert change.relative == math.inf and math.isnan(change.cosine or 0)
    (change,) = compared({"x": a}, {"x": a.double()}, tmp_path).changed
    assert change.differing == 0


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_read_are_not_equal(tmp_path: Path) -> None:
    odd = {"s": torch.eye(2).to_sparse(), "q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}
    plain = {"x.weight": torch.ones(2)}
    files: dict[str, dict[str, object]] = {
        "a": {**plain, **odd},
        "b": {**plain, **odd, "s": torch.eye(2)},
        "c": {"x.weight": torch.zeros(2), **odd},
        "d": {**plain, **{f"new_{name}": value for name, value in odd.items()}},
    }
    for name, value in files.items():
        torch.save(value, tmp_path / f"{name}.pth")
    same, dense, changed, renamed = (diff(tmp_path / "a.pth", tmp_path / f"{name}.pth") for name in "abcd")
    for found, verdict in ((same, "not compared"), (dense, "not compared"), (changed, "different")):
        assert found.uncompared == {"q": "quantized", "s": "sparse"} and found.verdict == verdict and not found.equal
        assert "not compared: 2 tensors (quantized, sparse): q, s" in "\n".join(cli.names(found))
    assert same.same == dense.same == ["x.weight"] and [change.name for change in changed.changed] == ["x.weight"]
    assert sorted(renamed.removed) == ["q", "s"] and not renamed.renamed
    done = run("diff", "a.pth", "a.pth", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "not compared\n"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2])
def test_types_without_real_numbers_are_compared_by_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    values = [torch.full((16,), number, dtype=torch.uint8).view(dtype) for number in (1, 2)]
    for name, value in zip("ab", values, strict=True):
        torch.save({"x.weight": value}, tmp_path / f"{name}.pth")
    found = diff(tmp_path / "a.pth", tmp_path / "b.pth")
    assert [change.name for change in found.unmeasured] == ["x.weight"] and not found.moved and not found.reshaped
    assert any("is not measured: 1 tensor: x.weight" in line for line in cli.names(found))
    assert diff(tmp_path / "a.pth", tmp_path / "a.pth").equal


def test_tensors_across_the_buffers_edges(tmp_path: Path) -> None:
    sizes = [BUFFER // 4 - 1, 3, 0, BUFFER // 2, 1, 7]
    before = {f"{i}.x": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    for name, value in before.items():
        if len(value):
            after = {**before, name: value.clone()}
            after[name][-1] += 1
            (change,) = compared(before, after, tmp_path).changed
            assert (change.name, change.differing, change.maximum) == (name, 1, 1.0)
    assert compared(before, before, tmp_path).equal


def test_strided_tensors_are_compared_as_they_are_meant(tmp_path: Path) -> None:
    value = torch.randn(6, 4)
    assert compared({"x": value}, {"x": value.T.contiguous().T}, tmp_path).equal


@pytest.mark.parametrize("number", range(2))
def test_a_damaged_member_of_a_zip_is_an_error_not_a_difference(number: int, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
    data[member.header_offset + 400] ^= 1
    (tmp_path / "b.pth").write_bytes(data)
    files = [tmp_path / "a.pth", tmp_path / "b.pth"]
    with pytest.raises(ContainerError, match="do not match the file's own CRC-32"):
        diff(files[number], files[1 - number])


def test_one_of_several_state_dicts(state: State, tmp_path: Path) -> None:
    torch.save({"model": state, "ema": {n: v + (v.is_floating_point()) for n, v in state.items()}}, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.pth")
    files = (tmp_path / "a.pth", tmp_path / "b.pth")
    with pytest.raises(LayoutError, match="such as --state-dict model"):
        diff(*files)
    assert diff(*files, state_dict="model").equal and not diff(*files, state_dict="ema").equal
    assert len(diff(files[0], files[0], state_dict="model,ema").changed) == len(state) - 1
    with pytest.raises(UsageError, match="has no such state dict"):
        diff(*files, state_dict="none")
    torch.save({"model": state, "head": {"w": torch.ones(1)}}, tmp_path / "a.pth")
    assert diff(*files).notes == [f"{files[0]}: state dict model is compared, not 1 more, such as head"]


def test_one_of_several_prefixes(state: State, tmp_path: Path) -> None:
    """A prefix is for the side that has it, or for both; with a comma, each side has its own."""
    tuned = {name: value + value.is_floating_point() for name, value in state.items()}
    both = {f"{prefix}{n}": v for prefix, side in (("", state), ("tuned.", tuned)) for n, v in side.items()}
    torch.save({**both, "tuned.lm_head.weight": torch.ones(2)}, tmp_path / "both.pth")
    torch.save(state, tmp_path / "plain.pth")
    files = (tmp_path / "both.pth", tmp_path / "plain.pth")
    assert not diff(*files).equal and diff(*files, prefix=".,.").equal
    assert diff(*files, prefix=".").equal and diff(*files, prefix="").equal
    found = diff(*files, prefix="tuned.")
    assert len(found.changed) == len(state) - 1 and not found.added and not found.removed
    assert found.notes[0] == f"{files[0]}: only the encoder under the prefix tuned. is compared"
    assert diff(files[0], files[0], prefix="tuned").equal
    assert len(diff(files[0], files[0], prefix="tuned.,.").changed) == len(state) - 1
    assert diff(*files, prefix="tuned.transformer.layers.0.,transformer.layers.0.").names == []
    for wrong in ("none.", "tuned.,none.", "a,b,c", "tuned.,", ",tuned.", ","):
        with pytest.raises(UsageError, match="--prefix"):
            diff(*files, prefix=wrong)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.attn.qkv.weight", "blocks.3"),
        ("model.vision_model.transformer.layers.11.mlp.fc1.bias", "model.vision_model.transformer.layers.11"),
        ("model.layers.5.mlp.experts.7.up_proj.weight", "model.layers.5"),
        ("neck.0.weight", "neck"),
        ("net_2.weight", "net_2"),
        ("embeddings.patch_embedding.weight", "embeddings.patch_embedding"),
        ("pos_embed", "pos_embed"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("0.weight", "0"),
    ],
)
def test_blocks(name: str, block: str) -> None:
    assert block_of(name) == block


def test_one_sentence_says_what_a_training_changed(folder: Path, tmp_path: Path) -> None:
    """Also of names that a training did not choose: with braces, and of blocks that became NaN."""
    sam, clip = (torch.load(folder / f"{family}.pth", weights_only=True) for family in ("sam", "clip"))
    base = {f"sam_model.{n.removeprefix('image_encoder.')}": v for n, v in sam.items()}
    base |= {f"vision_model.{n.removeprefix('vision_model.')}": v for n, v in clip.items()}
    base |= {"head.{0.}.x": torch.ones(2), "head.3.x": torch.ones(2)}

    def summary(change: dict[str, torch.Tensor]) -> str:
        safetensors.torch.save_file(base, tmp_path / "a.safetensors")
        safetensors.torch.save_file({**base, **change}, tmp_path / "b.safetensors")
        return summarize(diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))

    same = "the SAM encoder is bit for bit A's; the CLIP encoder is bit for bit A's"
    assert summary({}) == f"no block moved; {same}"
    layers = {n: v * 1.5 for n, v in base.items() if re.match(r"vision_model.*layers\.[12]\.", n)}
    tuned = summary(layers | {"head.{0.}.x": torch.full((2,), 2.0)})
    blocks = "vision_model.transformer.layers.1..2 by 5.0e-01"
    assert tuned.startswith(f"moved, relative to A: head.{{0.}} by 1.0e+00, {blocks}; not at all (frozen): ")
    assert tuned.endswith("; the SAM encoder is bit for bit A's; the CLIP encoder is not A's")
    # Every value is exact in both types.
    exact = {n: v.bfloat16().float() for n, v in base.items()}
    safetensors.torch.save_file(exact, tmp_path / "a.safetensors")
    safetensors.torch.save_file({n: v.bfloat16() for n, v in exact.items()}, tmp_path / "b.safetensors")
    cast = summarize(diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert cast.startswith("no block moved; the SAM encoder is A's in value, but not in type; ")
    # One encoder was trained, the other only cast.
    trained = {n: (v * 1.5 if n.startswith("vision_model.") else v).bfloat16() for n, v in exact.items()}
    safetensors.torch.save_file(trained, tmp_path / "b.safetensors")
    difference = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (difference.encoders, difference.cast) == ({"sam": False, "clip": False}, ["sam"])
    sentence = summarize(difference)
    assert sentence.endswith("; the SAM encoder is A's in value, but not in type; the CLIP encoder is not A's")
    assert "head by nan" in summary({"head.3.x": torch.full((2,), math.nan)})
    run_ = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json", cwd=tmp_path)
    first, document = run_.stderr.splitlines()[0], json.loads(run_.stdout)
    assert first == document["summary"] and first.endswith(same)
    assert document["encoders"] == {"sam": True, "clip": True}


def test_names_are_in_the_order_of_their_numbers() -> None:
    names = ["a.10.b", "a.9.c", "a", "3.x", "a.9"]
    assert sorted(names, key=natural_sort_key) == ["3.x", "a", "a.9", "a.9.c", "a.10.b"]


# Views ------------------------------------------------------------------------------------------------------------


def moved(relative: float, count: int = 3) -> Difference:
    blocks = [Block(f"layers.{i}", 2, int(i > 0), relative * i, 0.1) for i in range(count)]
    return Difference("a", "b", [["x"], ["x"]], [[], []], [], [], [], [], [], [], {}, blocks, {}, {}, [])


@pytest.mark.parametrize("width", [40, 80, 140])
def test_bars_fit_the_terminal(width: int, state: State, tmp_path: Path) -> None:
    after = {n: v * (1 + 0.01 * len(n)) if v.is_floating_point() else v for n, v in state.items()}
    found = compared(state, after, tmp_path)
    for fine in (True, False):
        lines = list(cli.table(found, width, fine))
        bars = [line for line in lines if line.startswith("transformer.layers") and "  12/12  " in line]
        assert len(bars) == 3 and max(map(len, bars)) <= max(width, 58)
        assert all(line.isascii() for line in lines) is not fine
    assert [cli._bar(length, True) for length in (0, 0.01, 1, 2.5)] == ["", "▏", "█", "██▌"]


@pytest.mark.parametrize("relative", [0.0, 1e-9, 0.03, 1.0, 7e12, math.inf, math.nan])
def test_a_chart_keeps_every_bar_within_it(relative: float) -> None:
    bars = html.bars(moved(relative, 60).blocks)
    assert len(bars) == 60 and all(0 <= bar.width <= 100 for bar in bars)


HOSTILE = "<script>alert('x')</script>\x1b[31m\u202e.1.w.weight"


@pytest.fixture
def page(tmp_path: Path) -> tuple[str, Difference]:
    before = {HOSTILE: torch.ones(3), "other.weight": torch.ones(2)}
    before |= {f"layers.{i}.w.weight": torch.ones(2) for i in range(12)}
    after = {**before, **{f"layers.{i}.w.weight": torch.ones(2) + i / 10 for i in range(1, 12)}}
    after[HOSTILE], after["new.weight"] = torch.full((3,), math.nan), torch.ones(1)
    found = compared(before, after, tmp_path)
    facts = [cli.in_both(found), *cli.names(found)]
    return html.difference_page(found, facts, "dsocr-convert diff a b").decode(), found


def test_the_page_is_well_formed_self_contained_and_passive(page: tuple[str, Difference]) -> None:
    text, _ = page
    outline = Outline(text)
    assert not {tag for tag, _ in outline.tags} & {"script", "link", "iframe", "img", "object"}
    assert "url(" not in text and "\x1b" not in text and "\u202e" not in text
    marks = [mark["class"] for mark in outline.find("span") if str(mark.get("class")).startswith("moved")]
    assert marks.count("moved") == 11 and marks.count("moved infinite") == 1
    shown = "".join(outline.data)
    assert "only in B: 1 tensor: new.weight" in shown and "dsocr-convert diff a b" in shown


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_in_a_browser(page: tuple[str, Difference], dark: bool, tmp_path: Path) -> None:
    from PIL import Image

    text, _ = page
    (tmp_path / "page.html").write_text(text)
    assert browse(tmp_path, "--dump-dom", dark=dark).count('class="moved') == 12
    browse(tmp_path, f"--screenshot={tmp_path / 'page.png'}", dark=dark)
    with Image.open(tmp_path / "page.png") as image:
        counts = {value: count for count, value in image.convert("RGB").getcolors(1 << 24)}
    assert max(counts, key=lambda value: counts[value]) == ((15, 19, 24) if dark else (255, 255, 255))
    # The bars, and the one that is not finite.
    assert counts.get((130, 177, 255) if dark else (11, 87, 208), 0) > 2000
    assert counts.get((255, 138, 128) if dark else (179, 38, 30), 0) > 2000


# The command ------------------------------------------------------------------------------------------------------


def test_equal(folder: Path, tmp_path: Path) -> None:
    done = run("diff", folder / "sam/sam-timm.pth", folder / "sam/deepencoder-sam.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "equal\n")
    assert "compared under the names of deepencoder-sam\n" in done.stderr
    assert "51 tensors in both, equal in every bit\n" in done.stderr
    quiet = run("diff", folder / "sam/sam-timm.pth", folder / "sam/wrapped.pth", "--quiet", cwd=tmp_path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "equal\n", "")


def test_different_as_table_json_and_page(folder: Path, state: State, tmp_path: Path) -> None:
    torch.save({**state, LAYER: state[LAYER].masked_fill(state[LAYER] > 0, math.nan)}, tmp_path / "b.pth")
    done = run("diff", folder / "clip/clip-hf.pth", "b.pth", "--json", "--html", "r.html", cwd=tmp_path, COLUMNS="80")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["equal"] is False and document["layouts"] == [["clip-hf"], ["deepencoder-clip"]]
    (change,) = document["changed"]
    assert (change["name"], change["maximum"]) == (LAYER, None) and change["differing"] > 0
    assert set(document["removed"]) == {"post_layernorm.bias", "post_layernorm.weight"}
    assert len(document["same"]) == len(state) - 1
    assert "only in A: 2 tensors: post_layernorm.bias, post_layernorm.weight\n" in done.stderr
    assert "nan" in done.stderr and "A has no embeddings.position_ids" in done.stderr
    assert (tmp_path / "r.html").read_text().count("<tr><td") >= len(document["blocks"])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("sam.pth",), 2, "Missing argument 'B'"),
        (("sam.pth", "none.pth"), 3, "none.pth: no such file or folder"),
        (("sam.pth", "sam.pth", "--html", "none/r.html"), 4, "there is no folder none"),
    ],
)
def test_errors(arguments: tuple[str, ...], code: int, words: str, folder: Path) -> None:
    done = run("diff", *arguments, cwd=folder)
    assert done.returncode == code and words in done.stderr + done.stdout and "Traceback" not in done.stderr


# The peak of this program alone: getrusage's is no lower than that of the process that started it.
PEAK = """
import re, sys
from pathlib import Path
if "torch" in sys.argv:
    import torch
from converter.api.diff import diff
for folder in ("small", "large"):
    found = diff(f"{folder}/a.safetensors", f"{folder}/b.pth")
    assert found.equal is ("torch" not in sys.modules)
    print(int(re.search(r"VmHWM:\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize("equal", [True, False])
def test_memory_does_not_grow_and_equal_checkpoints_take_no_torch(equal: bool, tmp_path: Path) -> None:
    for name, size in (("small", 1 << 20), ("large", 1 << 24)):
        folder = tmp_path / name
        folder.mkdir()
        state = {"a.weight": torch.zeros(size), "b.weight": torch.ones(7)}
        safetensors.torch.save_file(state, folder / "a.safetensors")
        torch.save(state if equal else {name: value.bfloat16() + 1 for name, value in state.items()}, folder / "b.pth")
    command = [sys.executable, "-c", PEAK, *(() if equal else ("torch",))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())
    # The files have 90 MiB more; torch's threads and the allocator take some MiB that vary.
    assert large - small < 24


def test_figures_agree_with_torch_over_many_pieces() -> None:
    import memory

    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(300_000, generator=generator) for _ in range(2))
    b[:1000] = a[:1000]
    before = torch.get_num_threads()
    figures = measure_differences({"x": (memory.expr(a), memory.expr(b))}, lambda done: None)["x"]
    assert torch.get_num_threads() == before
    x, y = a.double(), b.double()
    assert (figures.differing, figures.maximum) == (299_000, float((x - y).abs().max()))
    assert figures.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-12)
    assert figures.cosine == pytest.approx(float(x.dot(y) / x.norm() / y.norm()), abs=1e-12)


def test_a_checkpoint_on_a_hub(folder: Path, tmp_path: Path) -> None:
    whole = {**torch.load(folder / "clip.pth", weights_only=True), "text_model.final_layer_norm.bias": torch.ones(64)}
    torch.save(whole, tmp_path / "pytorch_model.bin")
    repo = Repo("org/clip", {"pytorch_model.bin": tmp_path / "pytorch_model.bin"})
    with hub_server([repo]) as server:
        done = run("diff", "hf://org/clip", folder / "clip/clip-hf.pth", cwd=tmp_path, **environment(server, tmp_path))
    assert (done.returncode, done.stdout) == (1, "different\n"), done.stderr
    assert "only in A: 1 tensor: text_model.final_layer_norm.bias\n" in done.stderr
    assert "equal in every bit" in done.stderr
