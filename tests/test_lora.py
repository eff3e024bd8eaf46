"""LoRA adapters, trained and saved by peft, are merged as peft's merge_and_unload does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import walkthrough
from hubserver import Repo, environment, hub_server
from lora import State, assert_merged, clip_loss, qwen2_loss, sam_loss, save_merged, save_model, train
from safetensors.torch import load_file, save_file
from test_docs import DOCS, under

import converter
from converter.cli.diff import table
from converter.errors import DsocrError
from converter.verification import merging

# Warnings of peft and transformers about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]
CLIP_ALL = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SAM_ALL = ["qkv", "proj", "lin1", "lin2"]
Q_PROJ = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj."
QKV = "transformer.layers.0.self_attn.qkv_proj.weight"
# Factors of a matrix [64, 64].
A, B = torch.ones(2, 64), torch.ones(64, 2)


def merged_and_expected(
    model: torch.nn.Module, loss: Any, family: str, folder: Path, dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[State, State, State]:
    """The tensors of our merge, of peft's, and of the model from before the training."""
    trained = train(model, loss, dtype, **config)
    trained.save_pretrained(folder / "adapter")
    base = save_model(model, folder / "base.safetensors", dtype)
    peft_merged = save_merged(trained, folder / "merged.safetensors")
    ours = converter.load(base, family, lora=folder / "adapter")
    return ours, converter.load(peft_merged, family), converter.load(base, family)


def moved(ours: State, base: State) -> set[str]:
    """The kinds of tensors that differ from the base: their names without the index of the layer."""
    return {".".join(name.split(".")[-3:]) for name, tensor in ours.items() if not torch.equal(tensor, base[name])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_linear_layers_of_clip(dtype: torch.dtype, tmp_path: Path) -> None:
    ours, expected, base = merged_and_expected(
        models.clip_hf(), clip_loss, "clip", tmp_path, dtype, target_modules=CLIP_ALL
    )
    assert_merged(ours, expected)
    assert moved(ours, base) == {
        "self_attn.qkv_proj.weight", "self_attn.out_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_linear_layers_and_the_patch_convolution_of_sam(dtype: torch.dtype, tmp_path: Path) -> None:
    targets = [*SAM_ALL, "projection", "conv1", "conv2"]
    ours, expected, base = merged_and_expected(
        models.sam_hf(), sam_loss, "sam", tmp_path, dtype, target_modules=rf"vision_encoder\..*({'|'.join(targets)})"
    )
    assert_merged(ours, expected)
    assert {"attn.qkv.weight", "mlp.lin1.weight", "neck.0.weight", "neck.2.weight", "patch_embed.proj.weight"} <= moved(
        ours, base
    )


def test_qwen2(tmp_path: Path) -> None:
    """Its projections stay apart."""
    targets = ["q_proj", "k_proj", "down_proj"]
    ours, expected, base = merged_and_expected(
        models.qwen2_hf(), qwen2_loss, "qwen2", tmp_path, torch.bfloat16, target_modules=targets
    )
    assert_merged(ours, expected)
    assert moved(ours, base) == {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.down_proj.weight"}


CONFIGS: dict[str, dict[str, Any]] = {
    "two of three parts": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["fc1"], "use_rslora": True, "r": 8},
    "patterns": {
        "target_modules": CLIP_ALL,
        "rank_pattern": {"fc1": 2, "layers.1.self_attn.q_proj": 6, r"vision_model\.encoder\.layers\.0\.mlp\.fc2": 3},
        "alpha_pattern": {"fc1": 5, "^vision_model.encoder.layers.2.self_attn.k_proj": 9},
    },
    "layers": {"target_modules": CLIP_ALL, "layers_to_transform": [1], "layers_pattern": "layers"},
    "fan_in_fan_out": {"target_modules": ["fc1", "q_proj"], "fan_in_fan_out": True},
    "embedding in bfloat16": {"target_modules": ["position_embedding"], "dtype": torch.bfloat16},
    "embedding": {"target_modules": ["position_embedding", "out_proj"]},
    "modules_to_save": {"target_modules": ["v_proj"], "modules_to_save": ["patch_embedding", "pre_layrnorm"]},
    "bias": {"target_modules": ["fc2", "q_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["fc2"], "bias": "all"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_settings(config: dict[str, Any], tmp_path: Path) -> None:
    ours, expected, base = merged_and_expected(models.clip_hf(), clip_loss, "clip", tmp_path, **config)
    assert_merged(ours, expected)
    assert moved(ours, base)


def adapter_folder(folder: Path, changes: dict[str, Any] | None = None, **factors: torch.Tensor) -> Path:
    """A folder with an adapter of q_proj in layer 0 of CLIP, by PEFT's names, and changes of its config."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base", **(changes or {})}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = factors or {Q_PROJ + "lora_A.weight": A, Q_PROJ + "lora_B.weight": B}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def clip_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(models.clip_hf(), tmp_path_factory.mktemp("base") / "clip.safetensors")


def refusal(base: Path, adapter: Path, family: str = "clip", **options: Any) -> str:
    with pytest.raises(DsocrError) as caught:
        converter.convert(base, family, lora=adapter, dry_run=True, **options)
    assert caught.value.exit_code in (2, 3) and caught.value.hint
    return str(caught.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "LoHa": ({"peft_type": "LOHA"}, "LOHA"),
    "IA3": ({"peft_type": "IA3"}, "IA3"),
    "no kind": ({"peft_type": None}, "None"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "layer_replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "target_parameters": ({"target_parameters": ["x.weight"]}, "target_parameters"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    "rank": ({"r": 3}, "rank 3"),
    "rank by pattern": ({"rank_pattern": {"q_proj": 5}}, "rank 5"),
    "rank no number": ({"r": "8"}, "rank"),
    "rank of zero": ({"r": 0}, "rank"),
    "alpha not finite": ({"lora_alpha": 1e300}, "alpha"),
    "regular expression": ({"alpha_pattern": {"(a+)+b": 3}}, "regular expression"),
    "hanging expression": ({"rank_pattern": {"(.*a){30}": 3}}, "regular expression"),
    "patterns no object": ({"rank_pattern": [1]}, "rank_pattern"),
    "rslora no flag": ({"use_rslora": "yes"}, "use_rslora"),
}


@pytest.mark.parametrize(("config", "word"), REFUSED.values(), ids=REFUSED)
def test_configs_that_are_refused(config: dict[str, Any], word: str, clip_base: Path, tmp_path: Path) -> None:
    assert word in refusal(clip_base, adapter_folder(tmp_path / "adapter", config))


def test_patterns_of_targets_are_not_run(clip_base: Path, tmp_path: Path) -> None:
    config = {"target_modules": "(a+)+$" * 99, "exclude_modules": "(.*)*x", "layers_pattern": "(.*)*"}
    adapter = adapter_folder(tmp_path / "adapter", config)
    assert converter.convert(clip_base, "clip", lora=adapter, dry_run=True).merged


FACTORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "A without B": ({"lora_A.weight": A}, "A without B"),
    "B without A": ({"lora_B.weight": B}, "B without A"),
    "ranks of A and B": ({"lora_A.weight": A, "lora_B.weight": torch.ones(64, 3)}, "[64, 3]"),
    "a shape that does not fit": ({"lora_A.weight": torch.ones(2, 63), "lora_B.weight": B}, "[2, 63]"),
    "integers": ({"lora_A.weight": A.long(), "lora_B.weight": B}, "int64"),
    "not gathered": ({"lora_A.weight": torch.ones(0), "lora_B.weight": B}, "[0]"),
    "a magnitude": (
        {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": A}, "lora_magnitude_vector"
    ),
    "a bias of B": ({"lora_A.weight": A, "lora_B.weight": B, "lora_B.bias": B}, "lora_B.bias"),
    "two adapters": (
        {f"lora_{half}.{name}.weight": tensor for half, tensor in (("A", A), ("B", B)) for name in ("one", "two")},
        "--adapter-name one",
    ),
    "no factors": ({"hada_w1_a": A}, "no factors"),
}  # fmt: skip


@pytest.mark.parametrize(("factors", "word"), FACTORS.values(), ids=FACTORS)
def test_factors_that_are_refused(factors: dict[str, torch.Tensor], word: str, clip_base: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", **{Q_PROJ + name: tensor for name, tensor in factors.items()})
    assert word in refusal(clip_base, adapter)


def test_an_adapter_of_a_file_with_several_is_chosen_by_name(clip_base: Path, tmp_path: Path) -> None:
    factors = {f"lora_{half}.{name}.weight": tensor for half, tensor in (("A", A), ("B", B)) for name in ("x", "y")}
    adapter = adapter_folder(tmp_path / "adapter", **{Q_PROJ + name: tensor for name, tensor in factors.items()})
    record = converter.convert(clip_base, "clip", lora=adapter, adapter_name="y", dry_run=True)
    assert [key for key in record.converted[QKV] if "lora" in key] == [
        f"{Q_PROJ}lora_A.y.weight", f"{Q_PROJ}lora_B.y.weight"
    ]  # fmt: skip
    assert "x, y" in refusal(clip_base, adapter, adapter_name="z")
    with pytest.raises(DsocrError, match="--lora"):
        converter.convert(clip_base, "clip", adapter_name="z")


def test_adapters_in_folders_of_their_names(clip_base: Path, tmp_path: Path) -> None:
    """As PEFT saves several."""
    for name in ("one", "two"):
        (tmp_path / "adapters").mkdir(exist_ok=True)
        adapter_folder(tmp_path / "adapters" / name)
    assert "one, two" in refusal(clip_base, tmp_path / "adapters")
    record = converter.convert(clip_base, "clip", lora=tmp_path / "adapters", adapter_name="two", dry_run=True)
    assert record.merged and "two" in record.sources[1].name


def test_what_is_no_lora_adapter(clip_base: Path, tmp_path: Path) -> None:
    """The weights of a model; as SOURCE, adapters of other kinds are named too."""
    assert "holds no factors of LoRA" in refusal(clip_base, clip_base)
    dora = adapter_folder(tmp_path / "dora", {"use_dora": True})
    with pytest.raises(DsocrError, match=r"(?s)DoRA.*merge_and_unload"):
        converter.convert(dora, "clip", dry_run=True)


def named(module: str, width: int = 64) -> dict[str, torch.Tensor]:
    factors = {"A": torch.ones(2, width), "B": torch.ones(width, 2)}
    return {f"base_model.model.{module}.lora_{half}.weight": factor for half, factor in factors.items()}


def test_an_adapter_of_other_modules_is_named(clip_base: Path, tmp_path: Path) -> None:
    """The default of trainers: the vision tower is frozen."""
    adapter = adapter_folder(tmp_path / "lm", **named("model.layers.0.self_attn.q_proj"))
    assert "trains 1 modules, none of them in the encoder: model.layers.0.self_attn.q_proj" in refusal(
        clip_base, adapter
    )
    text = adapter_folder(tmp_path / "text", **named("text_model.encoder.layers.0.self_attn.q_proj", width=32))
    assert "none of them in the encoder" in refusal(clip_base, text)
    save_file({"x": A}, adapter / "vit.safetensors")
    assert "vit.safetensors" in refusal(clip_base, adapter)


def test_a_module_that_the_encoder_lacks_is_named(clip_base: Path, tmp_path: Path) -> None:
    module = "vision_model.encoder.layers.7.self_attn.q_proj"
    error = refusal(clip_base, adapter_folder(tmp_path / "adapter", **named(module)))
    assert module in error and "[64, 2]" in error and "org/base" in error


def test_attention_of_torch_is_refused(tmp_path: Path) -> None:
    base = save_model(models.open_clip(), tmp_path / "open_clip.safetensors")
    adapter = adapter_folder(tmp_path / "adapter", **named("visual.transformer.resblocks.0.attn"))
    assert "MultiheadAttention" in refusal(base, adapter)


@pytest.mark.parametrize(
    ("prefix", "module"),
    [
        ("", "model.vision_model.encoder.layers.0.self_attn.q_proj"),
        ("model.vision_tower.", "vision_model.encoder.layers.0.self_attn.q_proj"),
        ("model.vision_tower.", "encoder.layers.0.self_attn.q_proj"),
        ("", "encoder.layers.0.self_attn.q_proj"),
    ],
)
def test_a_model_inside_another(prefix: str, module: str, tmp_path: Path) -> None:
    """The adapter was trained on a model around the source, or on a module of it."""
    state = {prefix + name: tensor for name, tensor in models.clip_hf().state_dict().items() if "vision" in name}
    save_file(state, tmp_path / "base.safetensors")
    adapter = adapter_folder(tmp_path / "adapter", **named(module))
    record = converter.convert(tmp_path / "base.safetensors", "clip", lora=adapter, dry_run=True)
    assert list(record.merged) == [module] and any("were taken for" in note for note in record.notes)


def test_a_tower_of_another_name_is_not_taken_for_the_encoder(tmp_path: Path) -> None:
    state = {f"student.{name}": tensor for name, tensor in models.clip_hf().state_dict().items() if "vision" in name}
    save_file(state, tmp_path / "base.safetensors")
    adapter = adapter_folder(tmp_path / "adapter", **named("teacher.vision_model.encoder.layers.0.self_attn.q_proj"))
    assert "none of them in the encoder" in refusal(tmp_path / "base.safetensors", adapter)


def test_a_wrapped_checkpoint(tmp_path: Path) -> None:
    """The state dict of a model with its adapter: `.base_layer.` next to the factors, in one file."""
    trained = train(models.clip_hf(), clip_loss, target_modules=["q_proj", "fc1"], modules_to_save=["pre_layrnorm"])
    torch.save(trained.state_dict(), tmp_path / "wrapped.pth")
    with pytest.raises(DsocrError, match=r"(?s)not merged.*--lora .*wrapped.pth.*adapter_config.json"):
        converter.convert(tmp_path / "wrapped.pth", "clip", dry_run=True)
    assert "adapter_config.json" in refusal(tmp_path / "wrapped.pth", tmp_path / "wrapped.pth")
    trained.peft_config["default"].save_pretrained(tmp_path)
    ours = converter.load(tmp_path / "wrapped.pth", "clip", lora=tmp_path / "wrapped.pth")
    assert_merged(ours, converter.load(save_merged(trained, tmp_path / "merged.safetensors"), "clip"))


def test_an_adapter_given_as_the_source(clip_base: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", {"base_model_name_or_path": "org/base; rm x"})
    with pytest.raises(DsocrError, match="is a LoRA adapter of org/base") as caught:
        converter.convert(adapter, "clip", dry_run=True)
    assert f"dsocr-convert clip 'org/base; rm x' --lora {adapter}" in caught.value.hint
    nearest = converter.inspect(adapter).nearest
    assert "LoRA adapter" in nearest[0] and "--lora" in nearest[1]
    save_file({"x": A}, adapter / "vit.safetensors")
    with pytest.raises(DsocrError, match=r"vit\.safetensors holds the trained vision encoder"):
        converter.convert(adapter, "clip", dry_run=True)


def test_the_record_lists_what_was_merged(clip_base: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", {"use_rslora": True})
    converter.convert(clip_base, "clip", lora=adapter, out=tmp_path / "out.safetensors", record=tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    module = Q_PROJ.removeprefix("base_model.model.").rstrip(".")
    assert document["merged"] == {module: {"tensor": f"{module}.weight", "rank": 2, "alpha": 4.0, "scale": 4 / 2**0.5}}
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert document["sources"][1]["files"][0]["sha256"] == digest
    assert {"key": Q_PROJ + "lora_A.weight", "source": 1} in document["tensors"][QKV]["from"]


@pytest.fixture(scope="module")
def trained_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a trained adapter, and the conversion of both."""
    folder = tmp_path_factory.mktemp("trained")
    trained = train(
        models.clip_hf(),
        clip_loss,
        torch.bfloat16,
        target_modules=["q_proj", "fc1", "position_embedding"],
        modules_to_save=["pre_layrnorm"],
        use_rslora=True,
    )
    trained.save_pretrained(folder / "adapter")
    base = save_model(models.clip_hf(), folder / "base.safetensors", torch.bfloat16)
    converter.convert(base, "clip", lora=folder / "adapter", out=folder / "out.safetensors")
    return folder


@pytest.mark.parametrize("library", ["peft", "torch"])
def test_verification_proves_a_merge(library: str, trained_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "torch":
        monkeypatch.setattr(merging, "_has_peft", lambda: False)
    sources = {"source": trained_clip / "base.safetensors", "lora": trained_clip / "adapter"}
    result = converter.verify(trained_clip / "out.safetensors", sources, device="cpu", sizes=[64])
    assert result.result == "verified" and result.ok, result.checks
    assert any(f"merged by {library}" in check.detail for check in result.checks)


def test_verification_allows_other_roundings(trained_clip: Path, tmp_path: Path) -> None:
    """On another processor, a few sums of 16 bits are rounded to the neighbour."""
    state = load_file(trained_clip / "out.safetensors")
    state[QKV].view(torch.int16)[0, 0] += 1
    save_file(state, tmp_path / "out.safetensors")
    sources = {"source": trained_clip / "base.safetensors", "lora": trained_clip / "adapter"}
    assert converter.verify(tmp_path / "out.safetensors", sources, device="cpu", sizes=[64]).ok
    state[QKV].view(torch.int16)[0, 0] += 2
    save_file(state, tmp_path / "out.safetensors")
    assert not converter.verify(tmp_path / "out.safetensors", sources, fast=True).ok


def test_verification_finds_a_wrong_merge(trained_clip: Path, tmp_path: Path) -> None:
    """Another scale, and a merge of only some modules."""
    config = json.loads((trained_clip / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter").mkdir()
    for name, changes in (("alpha", {"lora_alpha": 6.1}), ("rslora", {"use_rslora": False})):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        weights = tmp_path / "adapter" / "adapter_model.safetensors"
        weights.write_bytes((trained_clip / "adapter" / "adapter_model.safetensors").read_bytes())
        out = tmp_path / f"{name}.safetensors"
        converter.convert(trained_clip / "base.safetensors", "clip", lora=tmp_path / "adapter", out=out)
        sources = {"source": trained_clip / "base.safetensors", "lora": trained_clip / "adapter"}
        result = converter.verify(out, sources, fast=True)
        assert not result.ok and any(QKV in check.tensors for check in result.checks), name
    assert not converter.verify(trained_clip / "out.safetensors", trained_clip / "base.safetensors", fast=True).ok


def test_a_whole_encoder(tmp_path: Path) -> None:
    """An adapter of a model that holds both encoders, and a language model."""
    whole = deepseek_ocr(tmp_path / "whole")
    modules = {
        "model.sam_model.blocks.0.attn.proj": (models.WIDTH, models.WIDTH),
        "model.vision_model.transformer.layers.1.mlp.fc1": (models.CLIP_MLP, models.CLIP_WIDTH),
        "model.layers.0.self_attn.q_proj": (7, 7),
    }
    factors = factors_of(modules)
    adapter, out = adapter_folder(tmp_path / "adapter", **factors), tmp_path / "out.safetensors"
    record = converter.encoder(whole, lora=adapter, out=out)
    assert list(record.merged) == list(modules)[:2]
    assert any("1 others, such as model.layers.0" in note for note in record.notes)
    before, after = load_file(whole), load_file(out)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {f"{module}.weight" for module in record.merged}
    product = torch.einsum(
        "or,ri->oi", *(factors[f"base_model.model.{next(iter(modules))}.lora_{x}.weight"] for x in "BA")
    )
    name = f"{next(iter(modules))}.weight"
    torch.testing.assert_close(after[name], before[name] + 2 * product)
    assert converter.verify(out, {"source": whole, "lora": adapter}, fast=True).ok
    merged = tmp_path / "merged"
    converter.encoder(whole, into=whole.parent, lora=adapter, out=merged)
    inserted = load_file(merged / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], inserted[name])} == changed
    assert all(torch.equal(inserted[name], after[name]) for name in changed)
    assert converter.verify(merged, {"source": whole, "into": whole.parent, "lora": adapter}, fast=True).ok
    parts = {family: tmp_path / f"whole-{family}.safetensors" for family in ("sam", "clip")}
    built = tmp_path / "built.safetensors"
    converter.encoder(**parts, compressor="random:1", lora=adapter, out=built)
    assert load_file(built).keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in load_file(built).items())
    assert converter.verify(built, {**parts, "compressor": "random:1", "lora": adapter}, fast=True).ok


def test_diff_shows_the_rank_of_what_moved(trained_clip: Path, clip_base: Path, tmp_path: Path) -> None:
    """A fused matrix has the sum of its parts' ranks; that of a full fine-tune is not low."""
    trained = train(models.clip_hf(), clip_loss, target_modules=r"vision_model.*(q_proj|v_proj|fc2)", r=3)
    found = converter.diff(clip_base, save_merged(trained, tmp_path / "merged.safetensors"))
    assert {change.name: change.rank for change in found.changed}[QKV] == 6 and found.low_ranks == [3, 3, 3, 6, 6, 6]
    text = "\n".join(table(found, 100, True))
    assert "low rank: B - A has rank 3 to 6 in 6 tensors, as after a merge of LoRA" in text
    state = load_file(clip_base)
    save_file({name: tensor + torch.randn(tensor.shape) * 1e-3 if tensor.is_floating_point() else tensor
               for name, tensor in state.items()}, tmp_path / "tuned.safetensors")  # fmt: skip
    assert not converter.diff(clip_base, tmp_path / "tuned.safetensors").low_ranks
    base, out = trained_clip / "base.safetensors", trained_clip / "out.safetensors"
    assert max(converter.diff(base, out).low_ranks) <= 4


def test_the_page_on_fine_tuned_checkpoints(tmp_path: Path) -> None:
    trained = train(models.clip_hf(), clip_loss, target_modules=r"vision_model.*(q_proj|v_proj|fc2)")
    trained.save_pretrained(tmp_path / "clip-lora")
    models.clip_hf().save_pretrained(tmp_path / "clip-base")
    deepseek_ocr(tmp_path / "deepseek-ocr")
    (tmp_path / "swift-output").mkdir()
    language = {"model.layers.0.self_attn.q_proj": (7, 7)}
    both = {
        "model.sam_model.blocks.0.attn.proj": (models.WIDTH, models.WIDTH),
        "model.vision_model.transformer.layers.1.mlp.fc1": (models.CLIP_MLP, models.CLIP_WIDTH),
    }
    adapter_folder(tmp_path / "swift-output" / "checkpoint-2", **factors_of({**both, **language}))
    adapter_folder(tmp_path / "unsloth-language", **factors_of(language))
    llm = adapter_folder(tmp_path / "swift-output" / "llm", **factors_of(language))
    save_file(load_file(tmp_path / "deepseek-ocr" / "model.safetensors"), llm / "vit.safetensors")
    walkthrough.check(under(DOCS / "fine-tuned.md", "## LoRA adapters"), tmp_path)


def factors_of(modules: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Factors of rank 2 for linear layers of these sizes."""
    return {
        f"base_model.model.{module}.lora_{half}.weight": torch.randn(shape)
        for module, (rows, columns) in modules.items()
        for half, shape in (("A", (2, columns)), ("B", (rows, 2)))
    }


def deepseek_ocr(folder: Path) -> Path:
    """A small DeepSeek-OCR: both encoders, and a module of the language model."""
    folder.mkdir()
    parts = {}
    for family, model in (("sam", models.sam_hf()), ("clip", models.clip_hf())):
        parts[family] = folder.with_name(f"{folder.name}-{family}.safetensors")
        converter.convert(save_model(model, folder / "model.safetensors"), family, out=parts[family])
    converter.encoder(**parts, compressor="random:1", out=folder / "model.safetensors", force=True)
    state = {**load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight": torch.ones(7, 7)}
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_an_adapter_next_to_the_weights_is_noted(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "both")
    base = save_model(models.clip_hf(), folder / "model.safetensors")
    notes = converter.convert(folder, "clip", dry_run=True).notes
    assert any("adapter_model.safetensors next to it" in note and f"--lora {folder}" in note for note in notes)
    assert converter.convert(base, "clip", lora=folder, dry_run=True).merged


def test_an_adapter_on_a_hub(clip_base: Path, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter")
    files = {name: folder / name for name in ("adapter_model.safetensors", "adapter_config.json")}
    command = f"dsocr-convert clip {clip_base} --lora org/lora -o hub.safetensors --record card.md --json"
    with hub_server([Repo("org/lora", files)]) as server:
        done = walkthrough.shell(f"{command} --quiet", tmp_path, environment(server, tmp_path / "caches"))
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["sources"][1]["commit"]
    converter.convert(clip_base, "clip", lora=folder, out=tmp_path / "local.safetensors")
    assert (tmp_path / "hub.safetensors").read_bytes() == (tmp_path / "local.safetensors").read_bytes()
    card = (tmp_path / "card.md").read_text()
    assert "merged: 1 modules of rank 2, alpha 4" in card and "lora=hf://org/lora" in card
