"""`encoder --into` a host of another model: found by its layouts, and loaded by transformers as the host was."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import models
import pytest
import safetensors.torch
import torch
from inventories import inventories, sparse
from torch import nn

import converter
from converter.api.encoder import encoder
from converter.api.verify import verify
from converter.encoders import DeepEncoder
from converter.errors import DsocrError, LayoutError, UsageError

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
        save(host.state_dict(), path / f"{name}-memory")
    return path


def save(state: State, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    # Cloned: some are tied.
    cloned = {name: tensor.clone() for name, tensor in state.items()}
    safetensors.torch.save_file(cloned, folder / "model.safetensors", {"format": "pt"})
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


# Hosts under their authors' names ---------------------------------------------------------------------------------


def deep_encoder(seed: int) -> State:
    """A DeepEncoder by its own names."""
    state = models.randomised(DeepEncoder(models.sam_sizes(), models.clip_sizes()), seed).state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}


def renamed(state: State, part: str, prefix: str) -> State:
    return {prefix + name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}


def got_authors(seed: int) -> State:
    rest = {name: torch.randn(3, 3) + seed for name in ("lm_head.weight", "model.embed_tokens.weight")}
    projector = {f"model.mm_projector_vary.{name}": torch.randn(4) + seed for name in ("weight", "bias")}
    return renamed(deep_encoder(seed), "sam_model.", "model.vision_tower_high.") | projector | rest


def llava_authors(tower: str = "model.vision_tower.vision_tower.") -> State:
    clip = models.clip_hf().state_dict()
    return renamed(clip, "vision_model.", f"{tower}vision_model.") | {"model.mm_projector.0.weight": torch.randn(3, 3)}


def assert_same(found: State, expected: State) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def verdicts(out: Path, host: Path, **sources: Path | str) -> set[str]:
    verification = verify(out, {"into": host, **sources}, fast=True)
    return {check.verdict for check in verification.checks if check.group in ("structure", "bytes")}


@pytest.mark.parametrize("with_projector", [False, True])
def test_got_ocr2_takes_sam_and_the_projector(with_projector: bool, tmp_path: Path) -> None:
    host, source = save(got_authors(1), tmp_path / "host"), save(got_authors(2), tmp_path / "source")
    record = insert(source, host, tmp_path / "out", with_projector=with_projector)
    parts = ("vision_tower_high", "mm_projector_vary") if with_projector else ("vision_tower_high",)
    new = {name: tensor for name, tensor in load(source).items() if any(part in name for part in parts)}
    assert_same(load(tmp_path / "out"), load(host) | new)
    assert {key for keys in record.converted.values() for key in keys} == set(new)
    assert set(record.dropped) == load(source).keys() - new.keys()
    assert verdicts(tmp_path / "out", host, source=source) == {"passed"}


def test_the_projector_of_got_ocr2_by_transformers(sources: Path, tmp_path: Path) -> None:
    """From the authors' names to transformers'."""
    names = {
        f"mm_projector_vary.{name}": f"multi_modal_projector.multimodal_projector.{name}" for name in ("weight", "bias")
    }
    before = load(sources / "got_ocr2")
    projector = {name: torch.randn_like(before[other]) for name, other in names.items()}
    state = got_authors(2) | {f"model.{name}": tensor for name, tensor in projector.items()}
    insert(save(state, tmp_path / "source"), sources / "got_ocr2", tmp_path / "out", with_projector=True)
    after = load(tmp_path / "out")
    assert all(torch.equal(after[names[name]], tensor) for name, tensor in projector.items())
    host_nets = [f"multi_modal_projector.conv_upsampler{i}.weight" for i in (1, 2)]
    nets = [state[f"model.vision_tower_high.net_{i}.weight"] for i in (2, 3)]
    assert all(torch.equal(after[name], net) for name, net in zip(host_nets, nets, strict=True))


@pytest.mark.parametrize("options", [{}, {"compressor": "random:3"}, {"compressor": "other"}], ids=str)
def test_sam_alone_and_its_compressor(options: dict[str, str], tmp_path: Path) -> None:
    host, sam = save(got_authors(1), tmp_path / "host"), tmp_path / "sam.pth"
    torch.save(models.sam_meta().state_dict(), sam)
    other = save(deep_encoder(4), tmp_path / "other")
    given = {"compressor": other if options["compressor"] == "other" else "random:3"} if options else {}
    record = encoder(sam=sam, into=host, out=tmp_path / "out", **given)  # type: ignore[arg-type]
    after, prefix = load(tmp_path / "out"), "model.vision_tower_high."
    converter.convert(sam, "sam", out=tmp_path / "sam.safetensors")
    expected = renamed(safetensors.torch.load_file(tmp_path / "sam.safetensors"), "", prefix)
    nets = {name: after[name] for name in load(host) if ".net_" in name}
    assert_same(after, load(host) | expected | nets)
    if options.get("compressor") == "other":
        assert torch.equal(nets[f"{prefix}net_3.weight"], load(other)["sam_model.net_3.weight"])
    elif options:
        assert set(record.generated) == set(nets)
    else:
        assert all(torch.equal(net, load(host)[name]) for name, net in nets.items())
        assert f"kept {', '.join(nets)}: the encoder has none" in record.notes and record.missing == {}
    assert verdicts(tmp_path / "out", host, sam=sam, **given) == {"passed"}


@pytest.mark.parametrize("tower", ["model.vision_tower.vision_tower.", "model.vision_tower.", "encoder.clip."])
def test_llava_takes_clip(tower: str, tmp_path: Path) -> None:
    """Its q, k and v apart; with the last norm where the source has it."""
    host = save(llava_authors(tower), tmp_path / "host")
    new = {name: tensor + 1 for name, tensor in models.clip_hf().state_dict().items()}
    record = encoder(clip=save(new, tmp_path / "clip"), into=host, out=tmp_path / "out")
    vision = renamed(new, "vision_model.", f"{tower}vision_model.")
    vision = {name: tensor for name, tensor in vision.items() if name in load(host)}
    assert_same(load(tmp_path / "out"), load(host) | vision)
    assert f"its CLIP: layout clip-hf, prefix {tower}vision_model." in record.notes
    assert not any("post_layernorm" in name for name in record.dropped)
    assert verdicts(tmp_path / "out", host, clip=tmp_path / "clip") == {"passed"}


def test_vary_takes_both(tmp_path: Path) -> None:
    host = save(got_authors(1) | llava_authors("model.vision_tower."), tmp_path / "host")
    record = insert(save(deep_encoder(7), tmp_path / "source"), host, tmp_path / "out")
    after, new = load(tmp_path / "out"), deep_encoder(7)
    assert {name for name in after if not torch.equal(after[name], load(host)[name])} == {
        name for name in after if "vision_tower" in name and "post_layernorm" not in name
    }
    qkv = [after[f"model.vision_tower.vision_model.encoder.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(qkv), new["vision_model.transformer.layers.1.self_attn.qkv_proj.weight"])
    assert any("post_layernorm" in note and note.startswith("kept ") for note in record.notes)
    assert verdicts(tmp_path / "out", host, source=tmp_path / "source") == {"passed"}


def test_one_of_two_encoders(tmp_path: Path) -> None:
    """A DeepSeek-OCR keeps its CLIP; the verification compares it with the host's."""
    host = save(renamed(deep_encoder(1), "", "model."), tmp_path / "host")
    record = insert(save(got_authors(2), tmp_path / "source"), host, tmp_path / "out")
    new = renamed(deep_encoder(2), "sam_model.", "model.sam_model.")
    assert_same(load(tmp_path / "out"), load(host) | new)
    assert "kept its CLIP: the encoder has none" in record.notes
    assert verdicts(tmp_path / "out", host, source=tmp_path / "source") == {"passed"}
    state = load(tmp_path / "out")
    state["model.vision_model.pre_layrnorm.bias"][0] += 1
    assert "failed" in verdicts(save(state, tmp_path / "changed"), host, source=tmp_path / "source")


@pytest.mark.parametrize("host", ["deepseek_ocr2", "deepseek_ocr2-memory"])
def test_qwen2_alone_and_its_queries(host: str, sources: Path, tmp_path: Path) -> None:
    """From a language model, with untrained queries of the host's sizes; SAM and the projector stay."""
    models.qwen2_hf().save_pretrained(tmp_path / "qwen2")
    given: dict[str, Any] = {"qwen2": tmp_path / "qwen2", "queries": "random:0"}
    record = encoder(into=sources / host, out=tmp_path / "out", **given)
    before, after = load(sources / host), load(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.search(r"qwen2_model|vision_encoder|tower.query", name)}
    assert len(record.generated) == 2 and all("query_" in name for name in record.generated)
    assert "kept its SAM: the encoder has none" in record.notes
    assert verdicts(tmp_path / "out", sources / host, **given) == {"passed"}


def test_the_projector_of_version_2(sources: Path, tmp_path: Path) -> None:
    """From transformers' names to the authors'; there is no image_newline."""
    source = {name: tensor + 1 for name, tensor in load(sources / "deepseek_ocr2-memory").items()}
    save(source, tmp_path / "source")
    record = insert(tmp_path / "source", sources / "deepseek_ocr2", tmp_path / "out", with_projector=True)
    after = load(tmp_path / "out")
    assert torch.equal(after["model.projector.layers.weight"], source["model.multi_modal_projector.weight"])
    assert torch.equal(after["model.view_seperator"], source["model.view_separator"])
    assert not any(note.startswith(("left out", "kept ")) for note in record.notes)
    assert verdicts(tmp_path / "out", sources / "deepseek_ocr2", source=tmp_path / "source") == {"passed"}


def test_its_own_encoder(tmp_path: Path) -> None:
    host = save(got_authors(1), tmp_path / "host")
    record = insert(host, host, tmp_path / "out")
    assert "the encoder is the checkpoint's own: nothing changes" in record.notes
    assert_same(load(tmp_path / "out"), load(host))
    assert not any("nothing changes" in note for note in insert(host, host, tmp_path / "half", dtype="float16").notes)


def test_another_activation_is_a_warning(tmp_path: Path) -> None:
    """Of the source's config and the host's, not of the DeepEncoder."""
    host, source = (
        save(llava_authors(), tmp_path / "host"),
        save(dict(models.clip_hf().state_dict()), tmp_path / "clip"),
    )
    vision = models.clip_hf().config.vision_config.to_dict() | {"num_attention_heads": models.CLIP_WIDTH // 64}
    activations = {host: "gelu", source: "quick_gelu"}
    for folder, activation in activations.items():
        config = {"model_type": "clip", "vision_config": vision | {"hidden_act": activation}}
        (folder / "config.json").write_text(json.dumps(config))
    for reverse in (False, True):
        record = encoder(clip=source, into=host, out=tmp_path / f"out{reverse}")
        warnings = [note for note in record.notes if note.startswith("warning: the source computes with activation")]
        assert len(warnings) == (not reverse) and record.target == "clip-hf"
        assert reverse or warnings[0].endswith("the checkpoint of --into with activation gelu: change its config")
        (source / "config.json").write_bytes((host / "config.json").read_bytes())


@pytest.mark.parametrize("host", ["got_ocr2", "llava"])
def test_outputs_are_compared(host: str, sources: Path, tmp_path: Path) -> None:
    source = sources / CASES[host].source
    insert(source, sources / host, tmp_path / "out")
    assert verify(tmp_path / "out", {"source": source, "into": sources / host}).verdict == "verified"


def test_a_host_without_the_patch_embedding(sources: Path, tmp_path: Path) -> None:
    """transformers' Unlimited-OCR, which never runs it."""
    source = save(deep_encoder(3), tmp_path / "source")
    record = insert(source, sources / "unlimited_ocr-memory", tmp_path / "out")
    name = "vision_model.embeddings.patch_embedding.weight"
    assert f"left out {name}: the checkpoint has none" in record.notes
    assert record.dropped == {name: "the checkpoint of --into has no such tensor"}
    assert len(load(tmp_path / "out")) == len(load(sources / "unlimited_ocr-memory"))


@pytest.mark.parametrize(
    ("host", "prefix", "replaced"),
    [
        ("deepencoder-sam", "model.vision_tower_high.", 179),
        ("got-ocr2-hf-vision", "vision_tower.", 177),
        ("unlimited-ocr-hf-vision", "model.vision_tower.", 567),
        ("clip-hf-vision-336", "model.vision_tower.vision_tower.vision_model.", 0),
        ("deepseek-ocr-mlx", "", 472),
    ],
)
def test_names_at_true_size(host: str, prefix: str, replaced: int, tmp_path: Path) -> None:
    """DeepSeek-OCR's encoder into hosts of true names and sizes; at 336 pixels, CLIP has other positions."""
    names = inventories()
    (tmp_path / "host").mkdir()
    source = sparse(tmp_path / "ocr.safetensors", names["deepseek-ocr"])
    sparse(tmp_path / "host" / "model.safetensors", {prefix + name: tensor for name, tensor in names[host].items()})
    if not replaced:
        with pytest.raises(UsageError, match=r"has shape \[577, 1024\]; the encoder's has \[257, 1024\]"):
            insert(source, tmp_path / "host", tmp_path / "out", dry_run=True)
        return
    record = insert(source, tmp_path / "host", tmp_path / "out", dry_run=True)
    assert record.notes[0].startswith(f"replaced {replaced} tensors; ")
    assert not any(note.startswith("kept ") for note in record.notes) and not (tmp_path / "out").exists()


def with_adapters(state: State) -> State:
    return {name.replace("qkv.weight", "qkv.base_layer.weight"): tensor for name, tensor in state.items()} | {
        name.replace("qkv.weight", f"qkv.lora_{factor}.default.weight"): torch.ones(2, 2)
        for name in state
        if name.endswith("qkv.weight")
        for factor in "AB"
    }


def two_encoders(state: State) -> State:
    return renamed(state, "", "student.") | renamed(state, "", "teacher.")


REFUSED: dict[str, tuple[Callable[[State], State], dict[str, str], int, str]] = {
    "two encoders": (two_encoders, {}, 3, "has 2 SAM encoders, under the prefixes student.model.vision_tower_high., "),
    "no encoder": (lambda state: renamed(state, "lm_head.", "lm_head."), {}, 3, "has no encoder of a known layout"),
    "adapters": (with_adapters, {}, 3, "holds LoRA adapters that are not merged"),
    "a gap": (
        lambda state: {name: tensor for name, tensor in state.items() if "blocks.1.norm1.bias" not in name},
        {},
        3,
        "missing tensor 'blocks.1.norm1.bias'\ninsert into a checkpoint whose encoder is whole and unchanged",
    ),
    "another family": (
        lambda state: llava_authors(),
        {"source": "got"},
        3,
        "has SAM, but the checkpoint of --into has",
    ),
    "no CLIP": (lambda state: state, {"clip": "clip"}, 3, "has no CLIP, but SAM\nleave out --clip"),
    "compressor alone": (lambda state: llava_authors(), {"clip": "clip", "compressor": "random:0"}, 2, "needs --sam"),
    "no compressor": (
        lambda state: (
            renamed(state, "model.vision_tower_high.blocks.", "image_encoder.blocks.")
            | renamed(state, "model.vision_tower_high.neck.", "image_encoder.neck.")
            | renamed(state, "model.vision_tower_high.p", "image_encoder.p")
        ),
        {"sam": "got", "compressor": "random:0"},
        2,
        "the checkpoint of --into has no compressor",
    ),
    "another version": (lambda state: state, {"source": "version2"}, 2, "net_3.weight' has shape [64, 32, 3, 3]; the "),
    "queries without a place": (
        lambda state: state,
        {"qwen2": "version2", "queries": "random:0"},
        3,
        "has no QWEN2, but SAM",
    ),
    "fewer layers": (
        lambda state: {name: tensor for name, tensor in state.items() if ".blocks.2." not in name},
        {},
        2,
        "the SAM has 3 layers; the checkpoint's has 2",
    ),
    "a file's name": (lambda state: state, {"out": "x.safetensors"}, 2, "the copy of a folder is a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_inserted(case: str, tmp_path: Path) -> None:
    change, options, code, words = REFUSED[case]
    host = save(change(got_authors(1)), tmp_path / "host")
    save(got_authors(2), tmp_path / "got")
    save(dict(models.clip_hf().state_dict()), tmp_path / "clip")
    save(dict(models.deepseek_ocr2_hf().state_dict()), tmp_path / "version2")
    paths = {name: tmp_path / value if (tmp_path / value).exists() else value for name, value in options.items()}
    if not paths.keys() & {"sam", "clip", "qwen2", "source"}:
        paths["source"] = tmp_path / "got"
    out = tmp_path / str(paths.pop("out", "out"))
    with pytest.raises(DsocrError) as caught:
        encoder(into=host, out=out, **paths)  # type: ignore[arg-type]
    assert words in f"{caught.value}" and caught.value.exit_code == code
    assert not out.exists()


def test_files_and_folders(tmp_path: Path) -> None:
    """A training state in safetensors leaves its optimizer behind; torch's files are refused."""
    host = save(got_authors(1), tmp_path / "host")
    torch.save({"state": {0: torch.ones(3)}}, host / "optimizer.pt")
    (host / "trainer_state.json").write_text("{}")
    record = insert(host, host, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "trainer_state.json"}
    assert "left out optimizer.pt: other weights, which may hold the old encoder" in record.notes
    with pytest.raises(UsageError, match="the copy of a single file is a file"):
        insert(host, host / "model.safetensors", tmp_path / "copy")
    torch.save({"model": got_authors(1), "optimizer": {}}, tmp_path / "state.pt")
    with pytest.raises(LayoutError, match="--into supports only safetensors and GGUF") as caught:
        insert(host, tmp_path / "state.pt", tmp_path / "copy")
    assert "save_pretrained" in caught.value.hint


def test_a_copy_that_lost_a_tensor(tmp_path: Path) -> None:
    host, source = save(got_authors(1), tmp_path / "host"), save(got_authors(2), tmp_path / "source")
    insert(source, host, tmp_path / "out")
    state = load(tmp_path / "out")
    del state["model.mm_projector_vary.bias"], state["model.vision_tower_high.net_2.weight"]
    verification = verify(save(state, tmp_path / "less"), {"into": host, "source": source}, fast=True)
    missing = {check.name for check in verification.checks if "is missing, though" in check.detail}
    assert missing == {"model.mm_projector_vary.bias", "model.vision_tower_high.net_2.weight"}


def test_verification_names_the_missing_source(tmp_path: Path) -> None:
    host = save(got_authors(1), tmp_path / "host")
    insert(host, host, tmp_path / "out")
    with pytest.raises(UsageError, match="the source of the encoder is missing"):
        verify(tmp_path / "out", {"into": host}, fast=True)


def test_verification_without_the_host_names_its_option(tmp_path: Path) -> None:
    host = save(unlimited_ocr().state_dict(), tmp_path / "host")
    insert(host, host, tmp_path / "out")
    first = next(check for check in verify(tmp_path / "out", host, fast=True).checks if check.verdict == "failed")
    assert "--source into=HOST" in first.detail
