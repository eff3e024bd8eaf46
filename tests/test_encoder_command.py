"""`dsocr-convert encoder`: DeepEncoders put together, taken out of a checkpoint and put back into one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from command import run
from hubserver import Repo, environment, hub_server
from inventories import inventories, sparse
from memory import raw

import converter
from converter.api.encoder import encoder
from converter.api.verify import verify
from converter.assembly.additions import COMPRESSOR
from converter.encoders import DeepEncoder
from converter.errors import DsocrError, LayoutError, OutputError, UsageError
from converter.tensors.lazy_tensor import Generated

State = dict[str, torch.Tensor]

IDS = "vision_model.embeddings.position_ids"
PATCHES = "model.vision_model.embeddings.patch_embedding.weight"
NETS = ("net_2.weight", "net_3.weight")


def deepencoder() -> DeepEncoder:
    """Of the sizes of `models`."""
    return DeepEncoder(models.sam_sizes(), models.clip_sizes())


def deepseek_ocr(seed: int = 5) -> State:
    """A DeepSeek-OCR of those sizes as it is released: bfloat16, without position_ids."""
    model = torch.nn.Module()
    model.model = deepencoder()
    model.model.projector = torch.nn.Module()
    model.model.projector.layers = torch.nn.Linear(2 * models.CLIP_WIDTH, 12)
    model.model.layers = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(3))
    model.lm_head = torch.nn.Linear(12, 7, bias=False)
    for name in ("image_newline", "view_seperator"):
        model.model.register_parameter(name, torch.nn.Parameter(torch.zeros(12)))
    state = models.randomised(model, seed).bfloat16().state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith(IDS)}


def is_encoder(name: str) -> bool:
    return name.startswith(("model.sam_model.", "model.vision_model."))


def save(folder: Path, state: State, shards: int = 3) -> Path:
    """A checkpoint as it is on a hub: shards whose order of names is their own, an index, and other files."""
    folder.mkdir()
    names = sorted(state, reverse=True)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        safetensors.torch.save_file({name: state[name] for name in names[i::shards]}, folder / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in state.values())
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}
    text = json.dumps({"metadata": {"total_size": total, "by": "hand"}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text('{"model_type": "deepseek_vl_v2"}')
    (folder / "assets").mkdir()
    (folder / "assets" / "fig1.png").write_bytes(b"a picture")
    return folder


def load(folder: Path) -> State:
    return {name: t for file in folder.glob("*.safetensors") for name, t in safetensors.torch.load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def assert_same(found: State, expected: State) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAM as Meta saves it, CLIP as transformers does, both also in the DeepEncoder's layout, and a DeepSeek-OCR."""
    path = tmp_path_factory.mktemp("encoder")
    torch.save(models.sam_meta().state_dict(), path / "sam.pth")
    models.clip_hf().save_pretrained(path / "clip")
    for family, name in (("sam", "sam.pth"), ("clip", "clip")):
        converter.convert(path / name, family, out=path / f"{family}.safetensors")
    save(path / "ocr", deepseek_ocr())
    return path


def parts(sources: Path) -> State:
    """What of an encoder the two sources give."""
    found = {}
    for family, place in (("sam", "model.sam_model."), ("clip", "model.vision_model.")):
        state = safetensors.torch.load_file(sources / f"{family}.safetensors")
        found |= {place + name: tensor for name, tensor in state.items()}
    del found[f"model.{IDS}"]
    return found


def put_together(sources: Path, out: Path, **options: object) -> State:
    given = {"sam": sources / "sam.pth", "clip": sources / "clip", "compressor": "random:7", **options}
    record = encoder(out=out, **given)  # type: ignore[arg-type]
    assert record.written and record.output == str(out)
    return torch.load(out) if out.suffix == ".pth" else safetensors.torch.load_file(out)


def test_it_is_put_together_and_loads(sources: Path, tmp_path: Path) -> None:
    found = put_together(sources, tmp_path / "out.safetensors")
    nets = {f"model.sam_model.{name}": found[f"model.sam_model.{name}"] for name in NETS}
    assert_same(found, {**parts(sources), **nets})
    model = deepencoder()
    inner = {name.removeprefix("model."): tensor for name, tensor in found.items()}
    assert model.load_state_dict(inner, strict=False) == ([IDS], [])
    assert set(found) == {f"model.{name}" for name in model.state_dict() if name != IDS}
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["compressor"].startswith("random:7: untrained")
        assert file.metadata()["mapping"] == "sam-meta + clip-hf"


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_prefix_format_and_type(prefix: str, sources: Path, tmp_path: Path) -> None:
    whole = put_together(sources, tmp_path / "out.safetensors")
    found = put_together(sources, tmp_path / "out.pth", add_prefix=prefix, format="pth", dtype="bfloat16")
    assert_same(found, {name.replace("model.", prefix, 1): tensor.bfloat16() for name, tensor in whole.items()})
    # What was written is itself a source.
    record = encoder(tmp_path / "out.pth", out=tmp_path / "again.safetensors")
    assert_same(safetensors.torch.load_file(record.output), {name: tensor.bfloat16() for name, tensor in whole.items()})


def test_a_seeded_compressor_is_the_same_everywhere(sources: Path, tmp_path: Path) -> None:
    """The definition in `additions`, written a second time."""
    found = put_together(sources, tmp_path / "out.safetensors")
    for name, fan_in in zip(NETS, (9 * models.NECK, 18 * models.NECK), strict=True):
        tensor, bound = found[f"model.sam_model.{name}"], 1 / math.sqrt(fan_in)
        stream = hashlib.shake_128(f"7/{name}".encode()).digest(tensor.nbytes)
        numbers = torch.frombuffer(bytearray(stream), dtype=torch.int32).double()
        assert torch.equal(tensor.flatten(), (numbers * (bound / 2**31)).float())
        assert tensor.abs().max() <= bound and abs(tensor.std() - bound / 3**0.5) < 0.03 * bound
    digest = hashlib.sha256(b"".join(seeded_bytes("random:7"))).hexdigest()
    assert digest == "b8475cb72a46a6102eed3d8ebca4c332d210a893fff6964eb12d75f912bc3917"
    assert seeded_bytes("random:8") != seeded_bytes("random:7") == seeded_bytes("random:07")


def seeded_bytes(name: str) -> list[bytes]:
    sizes = {"sam": {"neck": models.NECK}, "clip": {"width": models.CLIP_WIDTH}}
    values = COMPRESSOR.seeded(name, COMPRESSOR.shapes(sizes)).values()
    return [value.make() for value in values if isinstance(value, Generated)]


def test_torch_starts_a_convolution_within_the_same_bounds() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Conv2d(64, 128, 3, bias=False).weight
    assert 0.999 < weight.abs().max() * (9 * 64) ** 0.5 <= 1


def test_a_seeded_compressor_has_the_type_of_sam(sources: Path, tmp_path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in models.sam_meta().state_dict().items()}, tmp_path / "half.pth")
    whole = put_together(sources, tmp_path / "whole.safetensors")
    found = put_together(sources, tmp_path / "out.safetensors", sam=tmp_path / "half.pth")
    name = "model.sam_model.net_3.weight"
    assert torch.equal(found[name], whole[name].half())


def got_ocr2_hf() -> tuple[str, str]:
    config = models.newer("GotOcr2Config")(
        text_config={"model_type": "qwen2", "hidden_size": models.CLIP_WIDTH},
        vision_config={"output_channels": models.NECK},
    )
    projector = models.newer("GotOcr2MultiModalProjector", "transformers.models.got_ocr2.modeling_got_ocr2")(config)
    names = [name for name, tensor in projector.state_dict().items() if tensor.dim() == 4]
    x = torch.randn(1, models.NECK, 8, 8)
    # It is the same computation: two convolutions with a stride of 2 and nothing between them.
    y = torch.nn.functional.conv2d(x, projector.conv_upsampler1.weight, stride=2, padding=1)
    y = torch.nn.functional.conv2d(y, projector.conv_upsampler2.weight, stride=2, padding=1)
    torch.testing.assert_close(projector(x), projector.multimodal_projector(y.flatten(2).permute(0, 2, 1)))
    return f"model.multi_modal_projector.{names[0]}", f"model.multi_modal_projector.{names[1]}"


HOLDERS: dict[str, Callable[[], tuple[str, str]]] = {
    "DeepSeek-OCR": lambda: ("model.sam_model.net_2.weight", "model.sam_model.net_3.weight"),
    "GOT-OCR2 and Vary": lambda: ("model.vision_tower_high.net_2.weight", "model.vision_tower_high.net_3.weight"),
    "GOT-OCR2 by transformers": got_ocr2_hf,
    "Unlimited-OCR by transformers": lambda: (
        "model.vision_tower.sam_encoder.proj.conv1.weight",
        "model.vision_tower.sam_encoder.proj.conv2.weight",
    ),
    "alone": lambda: NETS,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_trained_compressor(holder: str, sources: Path, tmp_path: Path) -> None:
    shapes = ((2 * models.NECK, models.NECK, 3, 3), (models.CLIP_WIDTH, 2 * models.NECK, 3, 3))
    nets = dict(zip(HOLDERS[holder](), map(torch.randn, shapes), strict=True))
    # Others that end alike and are none.
    others = {"x.net_2.weight": torch.ones(3), "x.net_3.weight": torch.ones(3), "lm_head.weight": torch.ones(3, 3)}
    torch.save({**others, **nets}, tmp_path / "trained.pth")
    found = put_together(sources, tmp_path / "out.safetensors", compressor=tmp_path / "trained.pth")
    placed = {f"model.sam_model.{name}": tensor for name, tensor in zip(NETS, nets.values(), strict=True)}
    assert_same(found, {**parts(sources), **placed})


def test_a_sam_with_a_compressor_needs_none(sources: Path, tmp_path: Path) -> None:
    ocr = sources / "ocr"
    found = put_together(sources, tmp_path / "own.safetensors", sam=ocr, compressor=None)
    expected = deepseek_ocr()
    for name in NETS:
        assert torch.equal(found[f"model.sam_model.{name}"], expected[f"model.sam_model.{name}"])
    record = encoder(sam=ocr, clip=sources / "clip", compressor="random:0", dry_run=True)
    assert record.dropped["model.sam_model.net_3.weight"] == "--compressor random:0 replaces it"
    assert record.converted["model.sam_model.net_3.weight"] == []


def test_one_checkpoint_may_be_given_for_both(sources: Path, tmp_path: Path) -> None:
    record = encoder(sam=sources / "ocr", clip=sources / "ocr", compressor="random:0", out=tmp_path / "out.safetensors")
    expected = {name: tensor for name, tensor in deepseek_ocr().items() if is_encoder(name)}
    found = safetensors.torch.load_file(record.output)
    assert_same(found, {**expected, **{name: found[name] for name in expected if "sam_model.net_" in name}})
    used = {key for keys in record.converted.values() for key in keys}
    assert used | set(record.dropped) == set(deepseek_ocr()) and not used & set(record.dropped)


def test_an_encoder_is_taken_out(sources: Path, tmp_path: Path) -> None:
    state = deepseek_ocr()
    record = encoder(sources / "ocr", out=tmp_path / "out.safetensors")
    assert_same(safetensors.torch.load_file(record.output), {n: t for n, t in state.items() if is_encoder(n)})
    # Each name of the source is used or dropped for a reason.
    assert {key for keys in record.converted.values() for key in keys} | set(record.dropped) == set(state)
    assert set(record.dropped.values()) == {"not part of the DeepEncoder (language model, projector)"}
    record = encoder(sources / "ocr", with_projector=True, out=tmp_path / "more.safetensors")
    rest = ("model.layers.", "lm_head.")
    assert_same(safetensors.torch.load_file(record.output), {n: t for n, t in state.items() if not n.startswith(rest)})


def test_names_at_true_size(tmp_path: Path) -> None:
    found = inventories()
    for name in ("sam-meta", "clip-hf", "deepseek-ocr"):
        sparse(tmp_path / f"{name}.safetensors", found[name])
    whole = [name for name in found["deepseek-ocr"] if is_encoder(name)]
    sam, clip, ocr = (tmp_path / f"{name}.safetensors" for name in ("sam-meta", "clip-hf", "deepseek-ocr"))
    record = encoder(sam=sam, clip=clip, compressor=ocr, dry_run=True)
    assert sorted(record.converted) == sorted(whole) and record.unusual == {} and not record.written
    assert record.dtypes == {"float32": 470, "bfloat16": 2}
    assert sorted(encoder(ocr, dry_run=True).converted) == sorted(whole)
    more = encoder(ocr, with_projector=True, dry_run=True).converted
    assert set(more) - set(whole) == {
        "model.projector.layers.weight",
        "model.projector.layers.bias",
        "model.image_newline",
        "model.view_seperator",
    }
    # 896 channels, not 1024.
    second = sparse(tmp_path / "deepseek-ocr-2.safetensors", found["deepseek-ocr-2"])
    with pytest.raises(LayoutError, match=r"net_3\.weight has shape \[896, .* need \[1024, .* CLIP of width 1024"):
        encoder(sam=sam, clip=clip, compressor=second, dry_run=True)


def new_encoder(sources: Path, tmp_path: Path) -> tuple[Path, State]:
    """In float32, to be put into checkpoints of bfloat16."""
    out = tmp_path / "new.safetensors"
    return out, put_together(sources, out)


def test_an_encoder_is_put_back(sources: Path, tmp_path: Path) -> None:
    new, state = new_encoder(sources, tmp_path)
    ocr, out = sources / "ocr", tmp_path / "out"
    before = digests(ocr)
    record = encoder(new, into=ocr, out=out)
    assert digests(ocr) == before
    expected = {name: state[name].bfloat16() if is_encoder(name) else old for name, old in deepseek_ocr().items()}
    assert_same(load(out), expected)
    # Names, their order, types, places and all other files are as they were.
    for path in ocr.glob("*.safetensors"):
        assert header(out / path.name) == header(path)
    shards = {path.name for path in ocr.glob("*.safetensors")}
    assert digests(out).items() - before.items() == {(name, digests(out)[name]) for name in shards}
    assert (record.num_tensors, len(record.converted)) == (len(expected), len(state))
    assert f"replaced {len(state)} tensors; kept 11 and 3 other files as they were" in record.notes
    assert not list(tmp_path.glob(".*"))


def test_another_type_is_another_size(sources: Path, tmp_path: Path) -> None:
    new, state = new_encoder(sources, tmp_path)
    encoder(new, into=sources / "ocr", out=tmp_path / "out", dtype="float32")
    found = load(tmp_path / "out")
    assert_same(found, {name: state.get(name, old) for name, old in deepseek_ocr().items()})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in found.values()), "by": "hand"}
    for path in (sources / "ocr").glob("*.safetensors"):
        old, new_ = (json.loads(header(where / path.name)[8:]) for where in (path.parent, tmp_path / "out"))
        assert list(old) == list(new_) and old["__metadata__"] == new_["__metadata__"]


def test_parts_and_projector_are_put_back(sources: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", deepseek_ocr(seed=6))
    encoder(other, with_projector=True, into=sources / "ocr", out=tmp_path / "out")
    theirs = deepseek_ocr(seed=6)
    kept = ("model.layers.", "lm_head.")
    expected = {name: old if name.startswith(kept) else theirs[name] for name, old in deepseek_ocr().items()}
    assert_same(load(tmp_path / "out"), expected)
    encoder(
        sam=sources / "sam.pth", clip=sources / "clip", compressor=other, into=sources / "ocr", out=tmp_path / "parts"
    )
    assert torch.equal(load(tmp_path / "parts")[PATCHES], parts(sources)[PATCHES].bfloat16())


def test_position_ids_are_replaced_where_there_are_some(sources: Path, tmp_path: Path) -> None:
    count = (models.CLIP_IMAGE // models.CLIP_PATCH) ** 2 + 1
    state = {**deepseek_ocr(), f"model.{IDS}": torch.arange(count)[None]}
    encoder(sources / "ocr", into=save(tmp_path / "ocr", state), out=tmp_path / "out")
    assert_same(load(tmp_path / "out"), state)


def test_a_single_file(sources: Path, tmp_path: Path) -> None:
    new, state = new_encoder(sources, tmp_path)
    safetensors.torch.save_file(deepseek_ocr(), tmp_path / "one.safetensors", {"format": "pt", "note": "mine"})
    record = encoder(new, into=tmp_path / "one.safetensors", out=tmp_path / "out.safetensors")
    assert header(tmp_path / "out.safetensors") == header(tmp_path / "one.safetensors")
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert torch.equal(found[PATCHES], state[PATCHES].bfloat16())
    assert record.notes[0] == f"replaced {len(state)} tensors; kept 11 as they were"


def test_only_files_of_the_folder_are_copied(sources: Path, tmp_path: Path) -> None:
    new, _ = new_encoder(sources, tmp_path)
    ocr = save(tmp_path / "ocr", deepseek_ocr())
    (tmp_path / "secret").write_text("not theirs")
    (ocr / "README.md").symlink_to(tmp_path / "secret")
    (ocr / "tokenizer.json").symlink_to("config.json")
    (ocr / "pytorch_model.bin").write_bytes(b"the old encoder")
    (ocr / ".git").mkdir()
    (ocr / ".git" / "HEAD").write_text("ref")
    (ocr / "elsewhere").symlink_to(tmp_path)
    record = encoder(new, into=ocr, out=tmp_path / "out")
    assert "left out README.md: it is not a file in this folder" in record.notes
    assert "left out pytorch_model.bin: other weights, which may hold the old encoder" in record.notes
    others = {name for name in digests(tmp_path / "out") if not name.startswith("model")}
    assert others == {"config.json", "tokenizer.json", "assets/fig1.png"}
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_the_cache_of_a_hub(sources: Path, tmp_path: Path) -> None:
    """huggingface_hub's folders: names are links to files that are called by their digests."""
    new, _ = new_encoder(sources, tmp_path)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0a1b", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for path in [path for path in (sources / "ocr").rglob("*") if path.is_file()]:
        name = snapshot / path.relative_to(sources / "ocr")
        name.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        name.symlink_to(Path(*[".."] * (len(name.relative_to(tmp_path).parts) - 2), "blobs", blob.name))
    encoder(new, into=snapshot, out=tmp_path / "out")
    encoder(new, into=sources / "ocr", out=tmp_path / "plain")
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_another_shape_is_refused(sources: Path, tmp_path: Path) -> None:
    state = deepseek_ocr()
    ocr = save(tmp_path / "ocr", {**state, PATCHES: state[PATCHES][:, :, :7, :7].contiguous()})
    with pytest.raises(UsageError, match=r"has shape \[64, 3, 7, 7\]; the encoder's has \[64, 3, 14, 14\]"):
        encoder(sources / "ocr", into=ocr, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda state: without(state, PATCHES), f"left out {PATCHES.removeprefix('model.')}: the checkpoint has none"),
        (lambda state: {n: t for n, t in state.items() if "sam_model" not in n}, "replaced 41 tensors; kept 11 and 3 "),
    ],
    ids=["a tensor", "SAM"],
)
def test_what_a_checkpoint_lacks_is_left_out(
    change: Callable[[State], State], note: str, sources: Path, tmp_path: Path
) -> None:
    host = change(deepseek_ocr())
    record = encoder(save(tmp_path / "new", deepseek_ocr(6)), into=save(tmp_path / "ocr", host), out=tmp_path / "out")
    assert any(line.startswith(note) for line in record.notes)
    theirs = deepseek_ocr(6)
    assert_same(load(tmp_path / "out"), {n: theirs[n] if is_encoder(n) else tensor for n, tensor in host.items()})
    unused = {name for name in theirs if is_encoder(name)} - host.keys()
    assert {record.dropped[name].split(" has no ")[0] for name in unused} == {"the checkpoint of --into"}


def test_what_an_encoder_lacks_is_kept(sources: Path, tmp_path: Path) -> None:
    state = without({name: t for name, t in deepseek_ocr(6).items() if is_encoder(name)}, PATCHES)
    safetensors.torch.save_file(state, tmp_path / "part.safetensors")
    record = encoder(tmp_path / "part.safetensors", into=sources / "ocr", out=tmp_path / "out")
    assert f"kept {PATCHES}: the encoder has none" in record.notes
    assert_same(load(tmp_path / "out"), {**deepseek_ocr(), **state})


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_the_folder_appears_whole_or_not_at_all(
    error: BaseException | type[BaseException], sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    before = digests(sources / "ocr")
    monkeypatch.setattr("converter.assembly.insert._write_other_file", fail)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        encoder(sources / "ocr", into=sources / "ocr", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [] and digests(sources / "ocr") == before


def test_a_source_that_changes_midway_gives_no_folder(sources: Path, tmp_path: Path) -> None:
    ocr = save(tmp_path / "ocr", deepseek_ocr())

    def grow(what: str, done: int, total: int) -> None:
        with next(ocr.glob("*.safetensors")).open("ab") as file:
            file.write(b"more")

    with pytest.raises(DsocrError, match="changed while it was being read"):
        encoder(sources / "ocr", into=ocr, out=tmp_path / "out", on_progress=grow)
    assert [path.name for path in tmp_path.iterdir()] == ["ocr"]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("ocr", "holds the source"),
        ("ocr/new", "is inside the checkpoint's own folder"),
        ("no/such/out", "there is no folder"),
        ("clip", "exists already"),
    ],
)
def test_the_source_and_what_stands_there_are_safe(out: str, words: str, sources: Path, tmp_path: Path) -> None:
    save(tmp_path / "ocr", deepseek_ocr())
    (tmp_path / "clip").mkdir()
    before = digests(tmp_path)
    with pytest.raises(OutputError, match=words):
        encoder(sources / "ocr", into=tmp_path / "ocr", out=tmp_path / out)
    with pytest.raises(OutputError, match=r"checkpoint's own folder|holds the source"):
        encoder(sources / "ocr", into=tmp_path / "ocr", out=tmp_path / "ocr", force=True)
    assert digests(tmp_path) == before


def test_of_a_compressor_on_a_hub_two_tensors_are_fetched(sources: Path, tmp_path: Path) -> None:
    nets = {
        f"model.vision_tower_high.{name}": tensor
        for name, tensor in zip(
            NETS,
            map(torch.ones, ((2 * models.NECK, models.NECK, 3, 3), (models.CLIP_WIDTH, 2 * models.NECK, 3, 3))),
            strict=True,
        )
    }
    large = {f"lm_head.{i}": torch.zeros(1 << 20) for i in range(4)}
    safetensors.torch.save_file({**large, **nets}, tmp_path / "model.safetensors")
    given = ("--sam", sources / "sam.pth", "--clip", sources / "clip", "--compressor", "org/got", "--json")
    with hub_server([Repo("org/got", {"model.safetensors": tmp_path / "model.safetensors"})]) as server:
        done = run("encoder", *given, cwd=tmp_path, **environment(server, tmp_path / "caches"))
    record = json.loads(done.stdout)
    assert list(record["fetched"]) == ["hf://org/got/model.safetensors"]
    assert sum(record["fetched"].values()) < 1 << 19
    commits = [bool(re.fullmatch("[0-9a-f]{40}", source["commit"])) for source in record["sources"]]
    assert commits == [False, False, True]
    found = safetensors.torch.load_file(tmp_path / "deepencoder.safetensors")
    assert found["model.sam_model.net_3.weight"].eq(1).all()


def test_the_command_prints_as_the_others_do(sources: Path, tmp_path: Path) -> None:
    given = ("--sam", sources / "sam.pth", "--clip", sources / "clip", "--compressor", "random:0")
    done = run("encoder", *given, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "deepencoder.safetensors\n"), done.stderr
    assert "layout sam-meta\n" in done.stderr and "layout clip-hf\n" in done.stderr and "draws no masks" in done.stderr
    assert "generated model.sam_model.net_2.weight: random:0: untrained, uniform within 1/sqrt(144)" in done.stderr
    done = run("encoder", *given, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert re.search(r"model.sam_model.pos_embed +<- image_encoder.pos_embed\n", done.stdout)
    done = run(
        "encoder", "deepencoder.safetensors", "--into", sources / "ocr", "-o", "new", "--json", "-q", cwd=tmp_path
    )
    record = json.loads(done.stdout)
    assert (done.stderr, record["written"], record["output"], record["family"]) == ("", True, "new", "deepencoder")
    # Written once more, it is the same.
    first = digests(tmp_path)
    assert run("encoder", *given, "-q", "--force", cwd=tmp_path).returncode == 0
    assert run("encoder", "new", "--into", sources / "ocr", "-o", "new2", "-q", cwd=tmp_path).returncode == 0
    assert digests(tmp_path).items() >= first.items() and digests(tmp_path / "new2") == digests(tmp_path / "new")


SAM, CLIP = ("--sam", "sam.pth"), ("--clip", "clip")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "name a checkpoint that holds both encoders, or one for each, with --sam and --clip"),
        (SAM, 2, "or one for each"),
        (("sam.pth",), 3, "is a SAM checkpoint, not CLIP\n  SOURCE must hold both SAM and CLIP"),
        ((*SAM, *CLIP), 3, "sam.pth: holds no net_2.weight, net_3.weight: the compressor, which the DeepEncoder has"),
        ((*SAM, *CLIP), 3, "--compressor deepseek-ai/DeepSeek-OCR, or start with --compressor random:0"),
        ((*SAM, *CLIP, "--compressor", "random:x"), 2, "expected a seed, such as random:0"),
        ((*SAM, *CLIP, "--compressor", "random"), 2, "--compressor random: expected a seed, such as random:0"),
        ((*SAM, *CLIP, "--compressor", "seed=7"), 2, "--compressor seed=7: expected a seed, such as random:0"),
        ((*SAM, *CLIP, "--compressor", "clip"), 3, "holds no compressor (net_2.weight, net_3.weight)"),
        ((*SAM, *CLIP, "--compressor", "two.pth"), 3, "holds 2 compressors: a.net_3.weight, b.net_3.weight"),
        (
            (*SAM, *CLIP, "--compressor", "neck.pth"),
            3,
            "has shape [16, 8, 3, 3], but these encoders need [32, 16, 3, 3]",
        ),
        (
            (*SAM, *CLIP, "--compressor", "wide.pth"),
            3,
            "has shape [65, 32, 3, 3], but these encoders need [64, 32, 3, 3]",
        ),
        ((*SAM, *CLIP, "--with-projector"), 2, "--with-projector: is for a SOURCE that holds both encoders"),
        ((*SAM, *CLIP, "--compressor", "random:0", "-o", "clip"), 4, "clip: holds the source"),
        (
            (*SAM, *CLIP, "--compressor", "random:0", "--revision", "main"),
            2,
            "is a local path: --revision only applies",
        ),
        (("ocr", *SAM), 2, "--sam: cannot be combined with SOURCE"),
        (("sam.pth",), 3, "to combine two checkpoints, name them with --sam and --clip"),
        (("deepencoder", "--with-projector"), 3, "holds no projector.layers.weight, projector.layers.bias"),
        (("ocr", "--into", "ocr"), 2, "--into: name the output with --output"),
        (("ocr", "--into", "ocr", "-o", "x", "--add-prefix", "a."), 2, "--add-prefix: cannot be combined with --into"),
        (("ocr", "--into", "ocr", "-o", "x", "--format", "pth"), 2, "--format: cannot be combined with --into"),
        (("ocr", "--into", "org/name", "-o", "x"), 2, "no such file or folder\n  download the checkpoint first"),
        (("ocr", "--into", "ocr.pth", "-o", "x"), 3, "torch zip: --into supports only safetensors"),
    ],
)
def test_errors(arguments: tuple[str, ...], code: int, words: str, sources: Path, tmp_path: Path) -> None:
    def nets(neck: int, width: int, prefix: str = "") -> State:
        shapes = ((2 * neck, neck, 3, 3), (width, 2 * neck, 3, 3))
        return {prefix + name: torch.ones(shape) for name, shape in zip(NETS, shapes, strict=True)}

    for name in ("sam.pth", "clip", "ocr"):
        (tmp_path / name).symlink_to(sources / name)
    torch.save({**nets(16, 64, "a."), **nets(16, 64, "b.")}, tmp_path / "two.pth")
    torch.save(nets(8, 64), tmp_path / "neck.pth")
    torch.save(nets(16, 65), tmp_path / "wide.pth")
    torch.save(deepseek_ocr(), tmp_path / "ocr.pth")
    (tmp_path / "deepencoder").mkdir()
    state = {name: tensor for name, tensor in deepseek_ocr().items() if is_encoder(name)}
    safetensors.torch.save_file(state, tmp_path / "deepencoder" / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    done = run("encoder", *arguments, cwd=tmp_path)
    assert done.returncode == code and words in done.stderr and done.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_gigabytes_in_constant_memory(tmp_path: Path) -> None:
    """DeepSeek-OCR with four layers of its language model, its data one hole: an encoder is put in, the hole stays."""
    (tmp_path / "ocr").mkdir()
    later = re.compile(r"model\.layers\.([4-9]|1\d)\.")
    inventory = {name: entry for name, entry in inventories()["deepseek-ocr"].items() if not later.match(name)}
    source = sparse(tmp_path / "ocr" / "model.safetensors", inventory)
    code = """
import sys
from converter.api.encoder import encoder
encoder("ocr", into="ocr", out="out")
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"
    assert int(done.stdout.split()[0]) < 80 << 10  # KiB
    out = tmp_path / "out" / "model.safetensors"
    assert out.stat().st_size == source.stat().st_size > 2_000_000_000
    assert 512 * out.stat().st_blocks < 4 << 20
    with safetensors.safe_open(out, "pt") as new, safetensors.safe_open(source, "pt") as old:
        assert list(new.keys()) == list(old.keys())


# The record -----------------------------------------------------------------------------------------------------------


def proved(converted: Path, record: Path) -> list[str]:
    """The verdicts of a verification against the record alone."""
    return [check.verdict for check in verify(converted, record=record, fast=True).checks if check.group == "record"]


def test_the_record_of_an_encoder(sources: Path, tmp_path: Path) -> None:
    """It names every source, and what was seeded; a verification against it sees one changed bit."""
    out, record = tmp_path / "e.safetensors", tmp_path / "e.json"
    options = {"sam": sources / "sam.pth", "clip": sources / "clip", "compressor": "random:3", "out": out}
    encoder(**options, record=[record, tmp_path / "e.md"])  # type: ignore[arg-type]
    document = json.loads(record.read_bytes())
    assert [source["name"] for source in document["sources"]] == ["sam.pth", "model.safetensors"]
    for name, tensor in safetensors.torch.load_file(out).items():
        entry = document["tensors"][name]
        assert entry["sha256"] == hashlib.sha256(raw(tensor)).hexdigest()
        assert ("random:3" in entry.get("generated", "")) == (name.split(".")[-2] in ("net_2", "net_3"))
    assert document["metadata"]["compressor"].startswith("random:3")
    assert "dsocr-verify e.safetensors --record e.json" in (tmp_path / "e.md").read_text()
    assert proved(out, record) == ["passed", "passed"]
    with out.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([out.read_bytes()[-1] ^ 1]))
    assert "failed" in proved(out, record)


def test_the_record_of_a_whole_checkpoint(sources: Path, tmp_path: Path) -> None:
    """Of all its tensors, those of the language model too, in however many shards."""
    out, record = tmp_path / "new", tmp_path / "new.json"
    encoder(sources / "ocr", into=sources / "ocr", out=out, record=record)
    document = json.loads(record.read_bytes())
    found = load(out)
    assert document["tensors"].keys() == found.keys() and document["metadata"] is None
    assert all(document["tensors"][name]["sha256"] == hashlib.sha256(raw(t)).hexdigest() for name, t in found.items())
    assert proved(out, record) == ["passed"]
    with pytest.raises(OutputError, match="is inside the output"):
        encoder(sources / "ocr", into=sources / "ocr", out=tmp_path / "b", record=tmp_path / "b" / "record.json")
