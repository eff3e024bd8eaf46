"""`dsocr-convert encoder` for DeepSeek-OCR-2: SAM, compressor, Qwen2 and queries."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from statistics import NormalDist
from typing import Any

import models
import pytest
import safetensors.torch
import torch
from command import run
from corruptions import calm
from inventories import inventories, sparse
from safetensors.torch import load_file, save_file
from test_encoder_command import assert_same, is_encoder

import converter
from converter.api.verify import verify
from converter.encoders import DeepEncoderV2
from converter.errors import LayoutError

State = dict[str, torch.Tensor]

QUERIES = ("query_768.weight", "query_1024.weight")
# transformers' names under `model.vision_tower.` and the authors' under `model.`, one after another.
AUTHORS = (
    (r"^sam_encoder\.", "sam_model."),
    (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
    (r"^(sam_model)\.layers\.", r"\1.blocks."),
    (r"^(sam_model\.blocks.*)\.layer_norm", r"\1.norm"),
    (r"\.neck\.conv1\.", ".neck.0."),
    (r"\.neck\.layer_norm1\.", ".neck.1."),
    (r"\.neck\.conv2\.", ".neck.2."),
    (r"\.neck\.layer_norm2\.", ".neck.3."),
    (r"\.proj\.conv1\.", ".net_2."),
    (r"\.proj\.conv2\.", ".net_3."),
    (r"^vision_encoder\.", "qwen2_model.model.model."),
    (r"^query_(\d+)_resolution\.", r"qwen2_model.query_\1."),
)


def vision() -> State:
    """Version 2's encoder under transformers' names."""
    return {name: tensor.bfloat16() for name, tensor in calm(models.deepseek_ocr2_hf().state_dict(), 0).items()}


def authors_name(name: str) -> str:
    for pattern, new in AUTHORS:
        name = re.sub(pattern, new, name)
    return name


def encoder_state(prefix: str = "model.") -> State:
    """The same under the authors' names, in which an encoder is written."""
    return {prefix + authors_name(name): tensor for name, tensor in vision().items()}


def projector() -> State:
    names = ("projector.layers.weight", "projector.layers.bias", "view_seperator")
    shapes = ((12, models.QWEN2_WIDTH), (12,), (12,))
    return {f"model.{name}": torch.randn(shape).bfloat16() for name, shape in zip(names, shapes, strict=True)}


def language_model(prefix: str) -> State:
    """Names of DeepSeek's language model; more tensors than the encoder has would only take time."""
    shapes = {"embed_tokens": (9, 12), "layers.0.self_attn.q_proj": (12, 12), "layers.0.mlp.gate_proj": (8, 12)}
    state = {f"{prefix}{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    return {**state, "lm_head.weight": torch.randn(9, 12).bfloat16()}


def write(state: State, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources: SAM, Qwen2, and a DeepSeek-OCR-2 under the authors' and transformers' names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("v2")
    write(calm(models.sam_meta().state_dict(), 1), path / "sam.safetensors")
    write(calm(models.qwen2_hf().model.state_dict(), 2), path / "qwen2.safetensors")
    rest = projector()
    write({**encoder_state(), **rest, **language_model("model.")}, path / "ocr2.safetensors")
    renamed = {
        "model.multi_modal_projector.weight": rest["model.projector.layers.weight"],
        "model.multi_modal_projector.bias": rest["model.projector.layers.bias"],
        "model.view_separator": rest["model.view_seperator"],
    }
    hf = {f"model.vision_tower.{name}": tensor for name, tensor in vision().items()}
    write({**hf, **renamed, **language_model("model.language_model.")}, path / "ocr2-hf.safetensors")
    # Of other sizes, and without what joins the encoders.
    net_3 = torch.zeros(1024, 2 * models.NECK, 3, 3)
    write({"net_2.weight": torch.zeros(2 * models.NECK, models.NECK, 3, 3), "net_3.weight": net_3}, path / "wide.pth")
    write({name: torch.zeros(9, models.QWEN2_WIDTH) for name in QUERIES}, path / "few.safetensors")
    return path


def put_together(folder: Path, out: Path, **options: Any) -> State:
    sources = {"sam": folder / "sam.safetensors", "qwen2": folder / "qwen2.safetensors"}
    given = {**sources, "compressor": "random:7", "queries": "random:7", **options}
    return load_file(converter.encoder(out=out, **given).output)


@pytest.mark.parametrize("name", ["ocr2", "ocr2-hf"])
@pytest.mark.parametrize("with_projector", [False, True])
def test_it_is_extracted(name: str, with_projector: bool, folder: Path, tmp_path: Path) -> None:
    source = folder / f"{name}.safetensors"
    record = converter.encoder(source, with_projector=with_projector, out=tmp_path / "out.safetensors")
    torch.manual_seed(0)
    expected = {**encoder_state(), **(load_projector(folder) if with_projector else {})}
    assert_same(load_file(record.output), expected)
    used = {key for keys in record.converted.values() for key in keys}
    assert used | set(record.dropped) == set(load_file(source)) and not used & set(record.dropped)
    assert record.missing == {} and record.generated == {}


def load_projector(folder: Path) -> State:
    state = load_file(folder / "ocr2.safetensors")
    return {name: state[name] for name in projector()}


def test_it_is_put_together_and_loads(folder: Path, tmp_path: Path) -> None:
    found = put_together(folder, tmp_path / "out.safetensors", add_prefix="")
    model = DeepEncoderV2(
        models.sam_sizes().__class__(
            **{**vars(models.sam_sizes()), "compressor": (2 * models.NECK, models.QWEN2_WIDTH)}
        ),
        models.qwen2_sizes(),
    )
    model.load_state_dict(found, strict=True)
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["compressor"].startswith("random:7: untrained, uniform")
    assert metadata["queries"] == "random:7: untrained, normal with mean 0 and standard deviation 1"
    assert metadata["mapping"] == "sam-meta + qwen2-hf"
    sam = load_file(folder / "sam.safetensors")["image_encoder.pos_embed"]
    assert torch.equal(found["sam_model.pos_embed"], sam)
    q_proj = "layers.1.self_attn.q_proj.bias"
    assert torch.equal(found[f"qwen2_model.model.model.{q_proj}"], load_file(folder / "qwen2.safetensors")[q_proj])


def test_seeded_queries_are_the_same_everywhere(folder: Path, tmp_path: Path) -> None:
    """The definition in `additions`, written a second time: an Embedding's normal distribution."""
    found = put_together(folder, tmp_path / "out.safetensors")
    for name, rows in zip(QUERIES, (144, 256), strict=True):
        tensor = found[f"model.qwen2_model.{name}"]
        assert tensor.shape == (rows, models.QWEN2_WIDTH) and tensor.dtype == torch.float32
        assert abs(tensor.mean()) < 0.02 and abs(tensor.std() - 1) < 0.02
        stream = hashlib.shake_128(f"7/{name}".encode()).digest(tensor.nbytes)
        numbers = [int.from_bytes(stream[i : i + 4], "little") for i in range(0, 4000, 4)]
        drawn = torch.tensor([NormalDist().inv_cdf((number + 0.5) / 2**32) for number in numbers])
        assert torch.equal(tensor.flatten()[:1000], drawn)
    # As the encoder that they belong to.
    half = write(
        {n: t.half() for n, t in load_file(folder / "qwen2.safetensors").items()}, tmp_path / "half.safetensors"
    )
    halved = put_together(folder, tmp_path / "halved.safetensors", qwen2=half)
    name = f"model.qwen2_model.{QUERIES[0]}"
    assert torch.equal(halved[name], found[name].half())


@pytest.mark.parametrize("holder", ["ocr2", "ocr2-hf"])
def test_trained_parts_of_another_checkpoint(holder: str, folder: Path, tmp_path: Path) -> None:
    source = folder / f"{holder}.safetensors"
    found = put_together(folder, tmp_path / "out.safetensors", compressor=source, queries=source)
    expected = encoder_state()
    for name in ("sam_model.net_2.weight", "sam_model.net_3.weight", *(f"qwen2_model.{name}" for name in QUERIES)):
        assert torch.equal(found[f"model.{name}"], expected[f"model.{name}"])
    # Its encoders bring them.
    own = put_together(folder, tmp_path / "own.safetensors", sam=source, qwen2=source, compressor=None, queries=None)
    assert_same(own, expected)
    record = converter.encoder(sam=source, qwen2=source, queries="random:0", dry_run=True)
    assert set(record.generated) == {f"model.qwen2_model.{name}" for name in QUERIES}
    assert list(record.dropped.values()).count("--queries random:0 replaces it") == 2
    # Trained ones of the very checkpoint replace nothing.
    record = converter.encoder(sam=source, qwen2=source, queries=source, dry_run=True)
    assert len(record.sources) == 1 and not any("replaces" in reason for reason in record.dropped.values())


def test_sam_under_another_name_of_its_layout(folder: Path, tmp_path: Path) -> None:
    """transformers' names are those of Unlimited-OCR's SAM, and written as the other library's."""
    out = tmp_path / "sam.safetensors"
    record = converter.convert(folder / "ocr2.safetensors", "sam", to="sam-deepseek-ocr2-hf", out=out)
    assert record.target == "sam-unlimited-ocr-hf"
    expected = {f"model.vision_tower.{name}": tensor for name, tensor in vision().items() if name.startswith("sam_")}
    assert_same(load_file(out), expected)
    assert verify(out, folder / "ocr2-hf.safetensors", fast=True).ok


def test_names_at_true_size(tmp_path: Path) -> None:
    found = inventories()
    for name in ("sam-meta", "qwen2-0.5b", "deepseek-ocr-2", "deepseek-ocr-2-hf-vision", "deepseek-ocr"):
        sparse(tmp_path / f"{name}.safetensors", found[name])
    sam, qwen2 = tmp_path / "sam-meta.safetensors", tmp_path / "qwen2-0.5b.safetensors"
    record = converter.encoder(sam=sam, qwen2=qwen2, compressor="random:0", queries="random:0", dry_run=True)
    names = {name for name in found["deepseek-ocr-2"] if name.startswith(("model.sam_model.", "model.qwen2_model."))}
    assert len(names) == 470 and set(record.converted) == names and record.unusual == {}
    for name in ("deepseek-ocr-2", "deepseek-ocr-2-hf-vision"):
        record = converter.encoder(tmp_path / f"{name}.safetensors", dry_run=True)
        # A compressor of 896 channels is what Qwen2 requires.
        assert set(record.converted) == names and record.unusual == {}
    for kind in ("compressor", "queries"):
        options = {"compressor": "random:0", "queries": "random:0", kind: tmp_path / "deepseek-ocr.safetensors"}
        with pytest.raises(LayoutError, match="deepseek-ai/DeepSeek-OCR-2"):
            converter.encoder(sam=sam, qwen2=qwen2, dry_run=True, **options)


SAM, QWEN2 = ("--sam", "sam.safetensors"), ("--qwen2", "qwen2.safetensors")
BOTH, NETS = (*SAM, *QWEN2), ("--compressor", "random:0")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((*BOTH, "--clip", "x"), 2, "--qwen2: cannot be combined with --clip"),
        ((*SAM, "--clip", "x", "--queries", "random:0"), 2, "--queries: is for Qwen2: cannot be combined with --clip"),
        ((*SAM, "--queries", "random:0"), 2, "--queries: needs --qwen2"),
        (QWEN2, 2, "or one for each, with --sam and --clip, or --sam and --qwen2"),
        (("ocr2.safetensors", *QWEN2), 2, "--qwen2: cannot be combined with SOURCE"),
        (("ocr2.safetensors", "--queries", "random:0"), 2, "--queries: cannot be combined with SOURCE"),
        ((*BOTH, "--with-projector", *NETS), 2, "--with-projector: is for a SOURCE"),
        ((*BOTH, *NETS, "--queries", "random:x"), 2, "--queries random:x: expected a seed, such as random:0"),
        (BOTH, 3, "sam.safetensors: holds no net_2.weight, net_3.weight: the compressor"),
        (BOTH, 3, "--compressor deepseek-ai/DeepSeek-OCR-2, or start with --compressor random:0"),
        ((*BOTH, *NETS), 3, "qwen2.safetensors: holds no query_768.weight, query_1024.weight: the queries"),
        ((*BOTH, *NETS), 3, "--queries deepseek-ai/DeepSeek-OCR-2, or start with --queries random:0"),
        ((*BOTH, "--compressor", "wide.pth"), 3, "has shape [1024, 32, 3, 3], but these encoders need [256, 32, 3, 3]"),
        ((*BOTH, "--compressor", "wide.pth"), 3, "such as --compressor deepseek-ai/DeepSeek-OCR-2"),
        ((*BOTH, *NETS, "--queries", "few.safetensors"), 3, "has shape [9, 256], but these encoders need [144, 256]"),
        ((*BOTH, *NETS, "--queries", "few.safetensors"), 3, "or start with --queries random:0"),
        ((*BOTH, *NETS, "--queries", "wide.pth"), 3, "holds no query set (query_768.weight, query_1024.weight)"),
        (("qwen2.safetensors",), 3, "SOURCE must hold both SAM and CLIP, or SAM and Qwen2"),
        (
            ("ocr2-part.safetensors", "--with-projector"),
            3,
            "holds no projector.layers.weight, projector.layers.bias, view_seperator",
        ),
    ],
)
def test_errors(arguments: tuple[str, ...], code: int, words: str, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    write(encoder_state(), tmp_path / "ocr2-part.safetensors")
    before = sorted(tmp_path.iterdir())
    done = run("encoder", *arguments, cwd=tmp_path)
    assert done.returncode == code and words in " ".join(done.stderr.split()) and done.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_the_record_and_the_chain_are_verified(folder: Path, tmp_path: Path) -> None:
    """Against the sources, against a whole DeepSeek-OCR-2, and against the record alone."""
    given = {"sam": folder / "sam.safetensors", "qwen2": folder / "qwen2.safetensors"}
    joined = {"compressor": "random:7", "queries": folder / "ocr2.safetensors"}
    out, record = tmp_path / "out.safetensors", tmp_path / "out.json"
    converter.encoder(**given, **joined, out=out, record=[record, tmp_path / "out.md"])
    result = verify(out, {**given, **joined}, record=record, fast=True)
    assert result.verdict == "partly verified" and result.family == "deepencoder"
    assert [check.verdict for check in verify(out, record=record, fast=True).checks if check.group == "record"] == [
        "passed",
        "passed",
    ]
    with pytest.raises(LayoutError, match="--source queries=deepseek-ai/DeepSeek-OCR-2"):
        verify(out, {**given, "compressor": "random:7"}, fast=True)
    assert verify(out, {**given, **joined, "queries": "random:1"}, fast=True).verdict == "not verified"
    converter.encoder(folder / "ocr2-hf.safetensors", with_projector=True, out=out, force=True)
    result = verify(out, folder / "ocr2.safetensors", sizes=[768])
    assert result.verdict == "verified" and "DeepseekOcr2VisionModel" in result.reference


def test_into_a_deepseek_ocr_2(folder: Path, tmp_path: Path) -> None:
    found = put_together(folder, tmp_path / "new.safetensors", into=folder / "ocr2.safetensors")
    host = load_file(folder / "ocr2.safetensors")
    expected = put_together(folder, tmp_path / "alone.safetensors", dtype="bfloat16")
    assert_same(found, {**host, **expected})
    assert not any(map(is_encoder, set(host) - set(expected)))
