"""llama.cpp's mmproj: GGUF files of DeepSeek-OCR's vision encoder, read in every way, and written."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hostile import ggufs
from inventories import inventories, mmproj_name, random_state, sparse
from test_docs import DOCS
from test_docs import under as under_heading
from test_mlx import State, check_equal, deepseek, deepseek_2, save
from walkthrough import check

import converter
from converter.assembly.arrange import arrange
from converter.assembly.mmproj import make_header
from converter.assembly.parts import extract_encoder
from converter.checkpoint.open import open_checkpoint
from converter.errors import DsocrError, LayoutError, UsageError
from converter.layouts import registry

PROJECTOR = (
    "model.projector.layers.weight",
    "model.projector.layers.bias",
    "model.image_newline",
    "model.view_seperator",
)
# By layout: its family, its counterpart in torch's containers, and a checkpoint with the latter.
LAYOUTS: dict[str, tuple[str, str, Callable[[], State]]] = {
    "sam-mmproj": ("sam", "sam-deepseek-ocr", deepseek),
    "clip-mmproj": ("clip", "clip-deepseek-ocr", deepseek),
    "qwen2-mmproj": ("qwen2", "qwen2-deepseek-ocr2", deepseek_2),
}


def with_projector(state: State, hidden: int = 32) -> State:
    """A checkpoint with its projector and vectors; the first version has a newline."""
    torch.manual_seed(3)
    is_second = any(".qwen2_model." in name for name in state)
    width = state["model.sam_model.net_3.weight"].shape[0] * (1 if is_second else 2)
    shapes = dict(zip(PROJECTOR, ((hidden, width), (hidden,), (hidden,), (hidden,)), strict=True))
    if is_second:
        del shapes["model.image_newline"]
    return state | {name: torch.randn(shape) for name, shape in shapes.items()}


def to_mmproj(state: State) -> State:
    """llama.cpp's names and shapes."""
    named = {mmproj_name(name): tensor for name, tensor in state.items()}
    return {name: tensor[None] if name.endswith("view_seperator") else tensor for name, tensor in named.items()}


def put(state: State, path: Path) -> Path:
    path.write_bytes(ggufs.written(ggufs.described(state)))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_mmproj_is_read_as_its_torch_checkpoint_and_written_back(
    layout: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("reads", f"{layout}/GGUF")
    record_property("writes", f"{layout}/safetensors")
    family, torchs, make = LAYOUTS[layout]
    state = with_projector(make())
    file, plain = put(to_mmproj(state), tmp_path / "mmproj.gguf"), save(state, tmp_path / "plain.safetensors")
    out, expected = tmp_path / "out.safetensors", tmp_path / "expected.safetensors"
    assert converter.convert(file, family, out=out).mapping == layout
    assert converter.convert(plain, family, out=expected).mapping == torchs
    check_equal(safetensors.torch.load_file(out), safetensors.torch.load_file(expected))
    check_equal(converter.load(file, family), safetensors.torch.load_file(expected))
    assert converter.diff(put(to_mmproj(make()), tmp_path / "b.gguf"), save(make(), tmp_path / "b.safetensors")).equal
    back = tmp_path / "back.safetensors"
    converter.convert(out, family, to=layout, out=back)
    prefix = registry.load(layout).prefixes[0]
    names = {name for name in to_mmproj(make()) if name.startswith(prefix)}
    written = safetensors.torch.load_file(back)
    assert written.keys() == {name for name in names if prefix == "v.sam." or not name.startswith("v.sam.")}
    check_equal(written, {name: to_mmproj(state)[name] for name in written})


def test_an_encoder_is_taken_out_of_an_mmproj(tmp_path: Path) -> None:
    state = with_projector(deepseek())
    file = put(to_mmproj(state), tmp_path / "mmproj.gguf")
    record = converter.encoder(file, out=tmp_path / "out.safetensors", with_projector=True)
    check_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), state)
    assert record.mapping == "sam-mmproj + clip-mmproj" and not record.dropped
    assert converter.diff(file, tmp_path / "out.safetensors").equal
    assert converter.diff(tmp_path / "out.safetensors", file).equal


def test_inspect_finds_both_encoders(tmp_path: Path) -> None:
    file = put(to_mmproj(with_projector(deepseek())), tmp_path / "mmproj.gguf")
    assert [match.layout for match in converter.inspect(file).layouts] == ["sam-mmproj", "clip-mmproj"]
    file = put(to_mmproj(with_projector(deepseek_2())), tmp_path / "mmproj.gguf")
    assert [match.layout for match in converter.inspect(file).layouts] == ["sam-mmproj", "qwen2-mmproj"]


def test_quantised_parts_are_refused_only_where_they_are_needed(tmp_path: Path) -> None:
    described = ggufs.described(to_mmproj(with_projector(deepseek())))
    data = ggufs.written(
        each._replace(type=8, shape=(32, 6), data=bytes(6 * 34)) if each.name == b"v.blk.0.attn_out.weight" else each
        for each in described
    )
    (tmp_path / "mmproj.gguf").write_bytes(data)
    converter.convert(tmp_path / "mmproj.gguf", "sam", out=tmp_path / "sam.safetensors")
    with pytest.raises(LayoutError, match=r"quantised weights \(Q8_0\).*attn_out.*\n.*dequantise"):
        converter.convert(tmp_path / "mmproj.gguf", "clip", out=tmp_path / "clip.safetensors")


# ---- writing

GGML = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# llama.cpp takes these from the names of folders and from a README.
GUESSED = [f"general.{key}" for key in ["name", "basename", "version", "size_label", "license", "tags", "languages"]]
HALF = [0.5, 0.5, 0.5]
SAM_CONFIG = {"downsample_channels": [512, 1024], "heads": 12, "layers": 12, "width": 768}
CLIP_CONFIG = {"heads": 16, "image_size": 224, "layers": 24, "patch_size": 14, "width": 1024}
ARCHITECTURES = {"deepseek-ocr": "DeepseekOCRForCausalLM", "deepseek-ocr-2": "DeepseekOCR2ForCausalLM"}
MODELS = {"deepseek-ocr": deepseek, "deepseek-ocr-2": deepseek_2}


def config(model: str, **vision: Any) -> dict[str, Any]:
    """The config of DeepSeek's checkpoint, as far as llama.cpp reads it, with other values in vision_config."""
    second = {"clip-l-14-224": CLIP_CONFIG} if model == "deepseek-ocr" else {"qwen2-0-5b": {"dim": 896}}
    vision = {"image_size": 1024, "mlp_ratio": 3.7362, "width": {**second, "sam_vit_b": SAM_CONFIG}} | vision
    return {"architectures": [ARCHITECTURES[model]], "hidden_size": 32, "vision_config": vision}


PROCESSOR = {"image_mean": HALF, "image_std": HALF}


def folder(
    path: Path,
    model: str,
    dtype: torch.dtype = torch.float32,
    configs: dict[str, Any] | None = None,
    state: State | None = None,
) -> Path:
    """A tiny checkpoint, or one of another state, with the configs of DeepSeek's."""
    path.mkdir()
    state = state or with_projector(MODELS[model]())
    save({name: tensor.to(dtype) for name, tensor in state.items()}, path / "model.safetensors")
    configs = {"config.json": config(model), "processor_config.json": PROCESSOR} if configs is None else configs
    for name, content in configs.items():
        (path / name).write_text(json.dumps(content))
    return path


def write(source: Path, out: Path, **options: Any) -> Path:
    converter.encoder(source, with_projector=True, out=out, **options)
    return out


@cache
def table(model: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a checkpoint of true size: tensors and keys."""
    text = gzip.decompress((Path(__file__).parent / "data" / "mmproj.json.gz").read_bytes())
    return dict(json.loads(text)[model])


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[list[int], str, bytes]]]:
    """Keys with types and values, and tensors, as the package gguf reads them."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    keys = {
        key: [field.types[0].name, field.contents()]
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and key not in GUESSED
    }
    return keys, {t.name: (t.shape.tolist(), t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}


@pytest.mark.parametrize("dtype", GGML)
@pytest.mark.parametrize("model", MODELS)
def test_an_mmproj_has_llama_cpps_names_types_and_keys(
    model: str, dtype: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    for family in ("sam", "qwen2" if model == "deepseek-ocr-2" else "clip"):
        record_property("writes", f"{family}-mmproj/GGUF")
    out = write(folder(tmp_path / "in", model), tmp_path / "mmproj.gguf", dtype=dtype)
    keys, tensors = read(out)
    expected, column = table(model), 1 + list(GGML).index(dtype)
    file_type = {"float32": 0, "float16": 1, "bfloat16": 32}[dtype]
    small = {"general.file_type": ["UINT32", file_type], "clip.vision.projection_dim": ["UINT32", 32]}
    assert keys == expected["keys"] | small
    state = to_mmproj(with_projector(MODELS[model]()))
    assert tensors.keys() == state.keys()
    for name, (shape, kind, data) in tensors.items():
        assert (kind, len(shape)) == (expected["tensors"][name][column], len(expected["tensors"][name][0])), name
        value = state[name].to({ours: getattr(torch, torchs) for torchs, ours in GGML.items()}[kind])
        assert shape == list(reversed(value.shape))
        assert data == bytes(value.contiguous().flatten().view(torch.uint8).tolist()), name
    verification = converter.verify(out, tmp_path / "in", fast=True)
    assert verification.ok and not any("ignored" in note for note in verification.notes)
    counts = [int(each.detail.split()[0]) for each in verification.checks if each.name.startswith("layout ")]
    assert sum(counts) == len(MODELS[model]())


@pytest.mark.parametrize("dtype", GGML)
@pytest.mark.parametrize("model", MODELS)
def test_an_mmproj_of_true_size_has_the_tensors_of_the_table(model: str, dtype: str, tmp_path: Path) -> None:
    source = sparse(tmp_path / "model.safetensors", inventories()[model])
    with closing(open_checkpoint(source)) as opened:
        parts = extract_encoder(opened, with_projector=True)
        outputs = arrange(parts, "mmproj", "", dtype).outputs
        keys = make_header(parts, dtype).keys
    column = 1 + list(GGML).index(dtype)
    assert {name: [list(value.shape[::-1]), GGML[value.dtype.name]] for name, value in outputs.items()} == {
        name: [entry[0], entry[column]] for name, entry in table(model)["tensors"].items()
    }
    # Without a config, the values are DeepSeek's.
    assert keys.keys() - {"general.file_type"} == table(model)["keys"].keys()
    for key, (_, value) in table(model)["keys"].items():
        assert keys[key] == (pytest.approx(value) if isinstance(value, float) else value), key


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_without_dtype_the_matrices_keep_their_type(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "in", "deepseek-ocr", dtype)
    _, tensors = read(write(source, tmp_path / "mmproj.gguf"))
    assert tensors["v.blk.0.attn_qkv.weight"][1] == kind
    assert tensors["v.sam.patch_embd.weight"][1] == ("F16" if kind == "F16" else "F32")
    # A file of llama.cpp keeps its own, too.
    again = write(tmp_path / "mmproj.gguf", tmp_path / "again.gguf")
    assert read(again)[1] == tensors


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another mean in processor_config.json": (
        {"processor_config.json": {"image_mean": [0.25, 0.5, 0.75], "image_std": [1, 1, 1]}},
        {"clip.vision.image_mean": [0.25, 0.5, 0.75], "clip.vision.image_std": [1.0, 1.0, 1.0]},
    ),
    "one in an object": (
        {"processor_config.json": {"image_processor": {"image_mean": [0.25] * 3, "image_std": HALF}}},
        {"clip.vision.image_mean": [0.25] * 3},
    ),
    "one in preprocessor_config.json": (
        {"preprocessor_config.json": {"image_mean": [0.25] * 3, "image_std": HALF}},
        {"clip.vision.image_mean": [0.25] * 3},
    ),
    "in both files": (
        {"preprocessor_config.json": {"image_mean": [0.75] * 3, "image_std": HALF}, "processor_config.json": PROCESSOR},
        {"clip.vision.image_mean": HALF},
    ),
    "more image tokens": (
        {"processor_config.json": {**PROCESSOR, "image_seq_length": 64}},
        {"clip.vision.projector.scale_factor": 2},
    ),
    "Unlimited-OCR": (
        {"config.json": {**config("deepseek-ocr"), "architectures": ["UnlimitedOCRForCausalLM"]}},
        {"clip.vision.preproc_max_tiles": 32},
    ),
    "other sizes": (
        {
            "config.json": config(
                "deepseek-ocr",
                window_size=7,
                layer_norm_eps=1e-5,
                width={
                    "clip-l-14-224": {"heads": 8, "image_size": 56, "layers": 3, "patch_size": 14, "width": 64},
                    "sam_vit_b": {"heads": 2, "layers": 3, "width": 24},
                },
            )
        },
        {
            "clip.vision.attention.head_count": 8, "clip.vision.feed_forward_length": 32,
            "clip.vision.block_count": 3, "clip.vision.embedding_length": 64, "clip.vision.window_size": 7,
            "clip.vision.attention.layer_norm_epsilon": 1e-5, "clip.vision.sam.head_count": 2,
            "clip.vision.sam.block_count": 3, "clip.vision.sam.embedding_length": 24, "clip.vision.image_size": 56,
        },
    ),
    "no config": (
        {},
        {"clip.vision.block_count": 3, "clip.vision.attention.head_count": 16, "clip.vision.image_mean": HALF},
    ),
    "values that are no sizes": (
        {"config.json": {"vision_config": {"image_size": -1, "patch_size": 2**40, "width": [1], "heads": True}}},
        {"clip.vision.image_size": 224, "clip.vision.patch_size": 14, "clip.vision.attention.head_count": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_values_come_from_the_configs(name: str, tmp_path: Path) -> None:
    configs, values = CONFIGS[name]
    source = folder(tmp_path / "in", "deepseek-ocr", configs=configs)
    record = converter.encoder(source, with_projector=True, out=tmp_path / "mmproj.gguf")
    keys, _ = read(tmp_path / "mmproj.gguf")
    assert {key: keys[key][1] for key in values} == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in values.items()
    }
    # The record says which file states a value.
    changed = {key for key in values if record.assumptions.get(key) and name not in ("no config", "in both files")}
    stated = {key for key in changed if record.assumptions[key].value != record.assumptions[key].expected}
    assert all(record.assumptions[key].origin in configs for key in stated)
    assert any(note.startswith("llama.cpp's header: ") for note in record.notes)


MEAN = ggufs.array(ggufs.FLOAT, 3, struct.pack("<3f", 0.25, 0.5, 0.75))
OTHER_KEYS = [
    ggufs.ARCHITECTURE,
    ggufs.key("general.alignment", ggufs.UINT32, ggufs.u32(64)),
    ggufs.key("general.name", ggufs.STRING, ggufs.text("mine")),
    ggufs.key("general.languages", ggufs.ARRAY, ggufs.array(ggufs.STRING, 2, ggufs.text("en") + ggufs.text("zh"))),
    ggufs.key("clip.vision.image_mean", ggufs.ARRAY, MEAN),
    ggufs.key("clip.vision.preproc_max_tiles", ggufs.UINT32, ggufs.u32(32)),
    ggufs.key("clip.vision.patch_size", ggufs.STRING, ggufs.text("14")),
]


def test_the_header_of_an_mmproj_is_kept(tmp_path: Path) -> None:
    """Before what a config says; a value of another kind is not."""
    source = tmp_path / "mmproj.gguf"
    source.write_bytes(ggufs.written(ggufs.described(to_mmproj(with_projector(deepseek()))), OTHER_KEYS, alignment=64))
    (tmp_path / "config.json").write_text(json.dumps(config("deepseek-ocr", window_size=7)))
    (tmp_path / "processor_config.json").write_text(json.dumps(PROCESSOR))
    record = converter.encoder(source, with_projector=True, out=tmp_path / "out.gguf", dtype="bfloat16")
    keys, _ = read(tmp_path / "out.gguf")
    expected = {"clip.vision.image_mean": [0.25, 0.5, 0.75], "clip.vision.preproc_max_tiles": 32}
    expected |= {"clip.vision.patch_size": 14, "general.file_type": 32, "clip.vision.image_std": HALF}
    assert {key: keys[key][1] for key in expected} == expected
    assert "general.alignment" not in keys and "clip.vision.projector.scale_factor" not in keys
    fields = pytest.importorskip("gguf").GGUFReader(tmp_path / "out.gguf").fields
    assert (fields["general.name"].contents(), fields["general.languages"].contents()) == ("mine", ["en", "zh"])
    mean = record.assumptions["clip.vision.image_mean"]
    assert (mean.value, mean.origin) == ([0.25, 0.5, 0.75], "the source's header")
    notes = "\n".join(record.notes)
    assert "clip.vision.patch_size is ignored" in notes and "image_mean from the source's header" in notes
    assert "4 more values as in the source: general.architecture, general.name, general.languages" in notes


@pytest.mark.parametrize("model", MODELS)
def test_an_encoder_is_put_into_an_mmproj(model: str, tmp_path: Path) -> None:
    """The header and the types stay; the projector stays, too, unless another one is given."""
    host, source, out = tmp_path / "mmproj.gguf", tmp_path / "new.safetensors", tmp_path / "out.gguf"
    old = with_projector(MODELS[model]())
    mixed = {name: t.bfloat16() if name.endswith("attn_out.weight") else t for name, t in to_mmproj(old).items()}
    host.write_bytes(ggufs.written(ggufs.described(mixed), OTHER_KEYS, alignment=64))
    save(new := {name: tensor + 1 for name, tensor in old.items()}, source)
    for with_new in (False, True):
        record = converter.encoder(source, with_projector=with_new, into=host, out=out, force=True)
        assert record.format == "gguf"
        keys, tensors = read(out)
        before = read(host)
        assert keys == {key: value for key, value in before[0].items() if key != "general.alignment"}
        assert {name: entry[:2] for name, entry in tensors.items()} == {n: e[:2] for n, e in before[1].items()}
        state = new if with_new else new | {name: old[name] for name in PROJECTOR if name in old}
        for name, tensor in to_mmproj(state).items():
            value = tensor.to(mixed[name].dtype).contiguous()
            assert tensors[name][2] == bytes(value.flatten().view(torch.uint8).tolist()), name
        assert converter.verify(out, {"source": source, "into": host}, fast=True).ok


def test_leading_dimensions_that_ggml_drops(tmp_path: Path) -> None:
    """Its own writer stores no more dimensions than the last that is larger than 1, which is torch's first."""
    state = with_projector(deepseek())
    stored = {n: t[0] if t.shape[0] == 1 else t for n, t in to_mmproj(state).items()}
    assert {n for n in stored if stored[n].dim() < to_mmproj(state)[n].dim()} == {
        "v.sam.pos_embd.weight", "v.view_seperator",
    }  # fmt: skip
    file, out = put(stored, tmp_path / "mmproj.gguf"), tmp_path / "out.safetensors"
    converter.encoder(file, out=out, with_projector=True)
    check_equal(safetensors.torch.load_file(out), state)
    assert converter.verify(out, file, fast=True).ok
    assert converter.diff(file, out).equal
    new = save({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "new.safetensors")
    converter.encoder(new, into=file, out=tmp_path / "new.gguf", with_projector=True)
    _, before = read(file)
    assert {n: entry[0] for n, entry in read(tmp_path / "new.gguf")[1].items()} == {n: e[0] for n, e in before.items()}
    assert converter.verify(tmp_path / "new.gguf", {"source": new, "into": file}, fast=True).ok
    # In other containers the axis belongs to the layout.
    save({n: t[0] if n.endswith("pos_embed") else t for n, t in state.items()}, new)
    with pytest.raises(DsocrError, match=r"pos_embed.* has shape \[4, 4, 24\]"):
        converter.convert(new, "sam", out=tmp_path / "sam.safetensors")


def test_what_an_mmproj_of_into_refuses(tmp_path: Path) -> None:
    host, source = tmp_path / "mmproj.gguf", save(with_projector(deepseek()), tmp_path / "new.safetensors")
    described = ggufs.described(to_mmproj(with_projector(deepseek())))
    host.write_bytes(ggufs.written(described))
    with pytest.raises(UsageError, match=r"keeps its types, which llama\.cpp needs\nleave it out"):
        converter.encoder(source, into=host, out=tmp_path / "out.gguf", dtype="float16")
    with pytest.raises(UsageError, match=r"end its name in \.gguf"):
        converter.encoder(source, into=host, out=tmp_path / "out.safetensors")
    name, packed = b"v.blk.0.attn_out.weight", {"type": 8, "shape": (32, 6), "data": bytes(6 * 34)}
    host.write_bytes(ggufs.written(each._replace(**packed) if each.name == name else each for each in described))
    with pytest.raises(DsocrError, match=r"Q8_0.*\n.*dequantise"):
        converter.encoder(source, into=host, out=tmp_path / "out.gguf")


def test_overflow_of_float16_is_counted(tmp_path: Path) -> None:
    state = with_projector(deepseek())
    state["model.vision_model.transformer.layers.0.mlp.fc1.weight"][0, :3] = 1e6
    state["model.vision_model.transformer.layers.0.mlp.fc1.bias"][:3] = 1e6
    save(state, tmp_path / "model.safetensors")
    record = converter.encoder(
        tmp_path / "model.safetensors", with_projector=True, out=tmp_path / "mmproj.gguf", dtype="float16"
    )
    assert record.overflows == {"v.blk.0.ffn_up.weight": 3}


def test_what_is_not_written(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "in", "deepseek-ocr"), tmp_path / "mmproj.gguf"
    bare = save(deepseek(), tmp_path / "bare.safetensors")

    def refused(run: Callable[..., object], *arguments: object, **options: object) -> DsocrError:
        with pytest.raises((UsageError, LayoutError)) as caught:
            run(*arguments, out=out, **options)
        return caught.value

    without = refused(converter.encoder, source)
    assert "includes the projector" in without.message and "--with-projector" in without.hint
    lacking = refused(converter.encoder, bare, with_projector=True)
    assert "holds no projector.layers.weight" in lacking.message and "deepseek-ai/DeepSeek-OCR" in lacking.hint
    assert "encoder SOURCE --with-projector" in refused(converter.convert, source, "sam").hint
    assert (
        "--output in .gguf" in refused(converter.encoder, source, with_projector=True, to="mmproj", format="pth").hint
    )
    assert "--output in .safetensors" in refused(converter.encoder, source, with_projector=True, to="mlx").hint
    assert not out.exists()


def test_a_damaged_mmproj_is_not_verified(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", "deepseek-ocr", torch.bfloat16)
    record = tmp_path / "record.json"
    out = write(source, tmp_path / "mmproj.gguf", record=record)
    assert converter.verify(out, source, record=record, fast=True).ok
    with closing(open_checkpoint(out)) as opened:
        offset = opened.contents["v.blk.0.attn_qkv.weight"].storage.offset
    data = bytearray(out.read_bytes())
    data[offset] ^= 1
    out.write_bytes(data)
    for options in ({"record": record}, {}):
        failed = [
            check for check in converter.verify(out, source, fast=True, **options).checks if check.verdict == "failed"
        ]
        assert failed and all("attn_qkv" in str(check) for check in failed)


# llama.cpp's converter, which scripts/test installs: each argument is a list of its own arguments, as JSON.
ORACLE = Path(sys.prefix) / "oracles" / "llama.cpp"
CONVERT = """
import json, sys
import convert_hf_to_gguf
for sys.argv in map(json.loads, sys.argv[1:]):
    convert_hf_to_gguf.main()
"""


@pytest.mark.skipif(not (ORACLE / "installed").exists(), reason="bash scripts/test installs llama.cpp's converter")
@pytest.mark.parametrize("size", ["tiny", pytest.param("true", marks=pytest.mark.true_size)])
def test_every_byte_and_key_is_llama_cpps(size: str, tmp_path: Path) -> None:
    """For both versions and all types; theirs in one process, as it imports torch."""
    for model in MODELS:
        if size == "tiny":
            folder(tmp_path / model, model, torch.bfloat16)
            continue
        vision = {name: entry for name, entry in inventories()[model].items() if mmproj_name(name)}
        configs = {"config.json": config(model) | {"hidden_size": 1280}, "processor_config.json": PROCESSOR}
        folder(tmp_path / model, model, torch.bfloat16, configs, random_state(vision))
    theirs = {(model, dtype): tmp_path / f"{model}.{dtype}.gguf" for model in MODELS for dtype in GGML}
    runs = [
        ["convert", str(tmp_path / model), "--mmproj", "--outtype", GGML[dtype].lower(), "--outfile", str(out)]
        for (model, dtype), out in theirs.items()
    ]
    command = [sys.executable, "-c", CONVERT, *map(json.dumps, runs)]
    # Its own release of gguf comes first.
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ORACLE)}, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for (model, dtype), path in theirs.items():
        keys, tensors = read(write(tmp_path / model, tmp_path / "ours.gguf", dtype=dtype, force=True))
        expected = read(path)
        assert keys == expected[0], (model, dtype)
        assert tensors.keys() == expected[1].keys(), (model, dtype)
        for name, tensor in tensors.items():
            # No comparison of gigabytes by pytest, which would print them.
            assert (tensor == expected[1][name]) is True, (model, dtype, name)
        if dtype != "float16":
            back = tmp_path / "back.safetensors"
            converter.encoder(path, with_projector=True, dtype="bfloat16", out=back, force=True)
            assert converter.diff(back, tmp_path / model).equal


def test_the_page_of_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for name in ("DeepSeek-OCR", "trained"):
        folder(tmp_path / name, "deepseek-ocr", torch.bfloat16)
    check(under_heading(DOCS / "ports.md", "## llama.cpp"), tmp_path)
