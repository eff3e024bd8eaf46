"""Negative controls: a mistake made on purpose has the error that a file or an encoder with it gets."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import corruptions
import models
import pytest
import safetensors.torch
import torch
from corruptions import State, Subject

import converter
from converter.api.verify import verify
from converter.encoders import clip, sam
from converter.verification import controls
from converter.verification.families import FAMILIES
from converter.verification.result import Verification


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    """Correct conversions of three blocks each."""
    folder = tmp_path_factory.mktemp("subjects")
    states = {"sam": models.sam_hf().state_dict(), "clip": models.clip_hf_vision().state_dict()}
    return {kind: make_subject(folder, kind, corruptions.calm(state, 0)) for kind, state in states.items()}


def make_subject(folder: Path, kind: str, state: State) -> Subject:
    source = folder / f"{kind}.safetensors"
    safetensors.torch.save_file(state, source)
    return corruptions.subject(kind, source, {}, folder, (128,))


@pytest.fixture(scope="module")
def clean(subjects: dict[str, Subject]) -> dict[str, Verification]:
    """Verifications of the correct conversions."""
    return {kind: run(subject) for kind, subject in subjects.items()}


def run(subject: Subject, state: State | None = None, **options: Any) -> Verification:
    path = Path(subject.source).with_name(f"verified-{subject.kind}.safetensors")
    tensors = {name: tensor.clone() for name, tensor in (state or subject.state).items()}
    safetensors.torch.save_file(tensors, path)
    return verify(path, subject.source, sizes=subject.sizes, device="cpu", **options)


def test_every_family_has_mistakes() -> None:
    """They are the same in all families where they can be made."""
    assert controls.MISTAKES.keys() == FAMILIES.keys()
    for mistakes in controls.MISTAKES.values():
        assert {"k and v exchanged", "a bias of the neighbour layer", "another epsilon"} <= mistakes.blocks.keys()


# The same mistakes in the file, or in the encoder's code.

FUSED = {"sam": "blocks.0.attn.qkv", "clip": "transformer.layers.0.self_attn.qkv_proj"}


def reordered(order: str) -> Callable[[State, str], None]:
    def change(state: State, kind: str) -> None:
        for name in (f"{FUSED[kind]}.weight", f"{FUSED[kind]}.bias"):
            parts = dict(zip("qkv", state[name].chunk(3), strict=True))
            state[name] = torch.cat([parts[part] for part in order])

    return change


def neighbour_bias(state: State, kind: str) -> None:
    name = f"{FUSED[kind]}.bias"
    state[name] = state[name.replace(".0.", ".1.")]


def rel_pos_exchanged(state: State, kind: str) -> None:
    h, w = "blocks.0.attn.rel_pos_h", "blocks.0.attn.rel_pos_w"
    state[h], state[w] = state[w], state[h]


def class_position_last(state: State, kind: str) -> None:
    name = "embeddings.position_embedding.weight"
    state[name] = state[name].roll(-1, 0)


IN_THE_FILE = [
    ("sam", "q and k exchanged", reordered("kqv")),
    ("sam", "relative positions of rows and columns exchanged", rel_pos_exchanged),
    ("sam", "a bias of the neighbour layer", neighbour_bias),
    ("clip", "q and k exchanged", reordered("kqv")),
    ("clip", "k and v exchanged", reordered("qvk")),
    ("clip", "the class token's position at the end", class_position_last),
]


@pytest.mark.parametrize(("kind", "mistake", "change"), IN_THE_FILE)
def test_a_mistake_in_the_file(
    kind: str,
    mistake: str,
    change: Callable[[State, str], None],
    subjects: dict[str, Subject],
    clean: dict[str, Verification],
) -> None:
    state = dict(subjects[kind].state)
    change(state, kind)
    check_effect(clean[kind], run(subjects[kind], state), mistake)


IN_THE_ENCODER = [
    ("sam", "GELU and quick_gelu exchanged", corruptions.sam_mlp(corruptions.quick_gelu)),
    ("sam", "positions resampled bilinearly", corruptions.resampled(sam, mode="bilinear", antialias=True)),
    ("clip", "GELU and quick_gelu exchanged", corruptions.clip_mlp(torch.nn.functional.gelu)),
    ("clip", "positions resampled without antialiasing", corruptions.resampled(clip)),
]


@pytest.mark.parametrize(("kind", "mistake", "patch"), IN_THE_ENCODER)
def test_a_mistake_in_the_encoder(
    kind: str,
    mistake: str,
    patch: Callable[[], AbstractContextManager[Any]],
    subjects: dict[str, Subject],
    clean: dict[str, Verification],
) -> None:
    with patch():
        found = run(subjects[kind])
    check_effect(clean[kind], found, mistake)


def check_effect(clean: Verification, mistaken: Verification, mistake: str) -> None:
    """The control in the correct conversion has the error of the verification that fails."""
    assert clean.ok and not mistaken.ok
    control = next(control for control in clean.controls if control.mistake == mistake)
    family = FAMILIES[clean.family]
    # Mistakes in blocks are made in the encoder by itself, others also in the DeepEncoder.
    probes = {control.block} | (
        {family.prefix + family.block_input_probe} if control.block == family.block_input_probe else set()
    )
    points = [point for trace in mistaken.traces for point in trace.points if point.probe in probes]
    worst = max(points, key=lambda point: point.error / point.tolerance)
    assert (control.effect, control.tolerance) == pytest.approx((worst.error, worst.tolerance), rel=1e-3)
    assert control.seen and not worst.within_tolerance


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Verification]:
    """transformers' Qwen2 with calm weights, its conversion, and the verification of it."""
    folder = tmp_path_factory.mktemp("qwen2")
    state = models.qwen2_hf().model.state_dict()
    safetensors.torch.save_file(corruptions.calm(state, 0), folder / "source.safetensors")
    out = folder / "out.safetensors"
    converter.convert(folder / "source.safetensors", "qwen2", out=out)
    return folder / "source.safetensors", out, verify(out, folder / "source.safetensors", sizes=[128])


def test_every_mistake_of_qwen2_is_seen(qwen2: tuple[Path, Path, Verification]) -> None:
    *_, clean = qwen2
    assert clean.verdict == "verified"
    assert "Qwen2Model" in clean.reference and "DeepseekOcr2VisionModel" in clean.reference
    first = {control.mistake for control in clean.controls if control.block == "model.model.layers.0" and control.seen}
    assert first == controls.MISTAKES["qwen2"].blocks.keys()


@pytest.mark.parametrize(
    ("mistake", "one", "other"),
    [
        ("k and v exchanged", "self_attn.k_proj", "self_attn.v_proj"),
        ("gate and up exchanged", "mlp.gate_proj", "mlp.up_proj"),
    ],
)
def test_a_mistake_in_a_file_of_qwen2(
    mistake: str, one: str, other: str, qwen2: tuple[Path, Path, Verification], tmp_path: Path
) -> None:
    source, out, clean = qwen2
    block = "model.model.layers.0."
    names = {f"{block}{one}.": f"{block}{other}.", f"{block}{other}.": f"{block}{one}."}
    state = {
        next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name): tensor
        for name, tensor in safetensors.torch.load_file(out).items()
    }
    safetensors.torch.save_file(state, tmp_path / "wrong.safetensors")
    check_effect(clean, verify(tmp_path / "wrong.safetensors", source, sizes=[128]), mistake)


def test_a_comparison_that_fails_has_none(subjects: dict[str, Subject]) -> None:
    state = dict(subjects["clip"].state)
    state["pre_layrnorm.bias"] = state["pre_layrnorm.bias"] + 1
    found = run(subjects["clip"], state)
    assert not found.ok and not found.controls


def test_what_outputs_cannot_show(tmp_path: Path, subjects: dict[str, Subject]) -> None:
    """With small q and k, every query attends to all keys alike, and exchanging the two has no effect."""
    source = safetensors.torch.load_file(subjects["clip"].source)
    small = {name: tensor * 1e-4 if re.search("[qk]_proj", name) else tensor for name, tensor in source.items()}
    found = run(make_subject(tmp_path, "clip", small))
    assert found.verdict == "verified"
    assert "outputs cannot show q and k exchanged in this checkpoint" in found.all_notes
    assert not any("k and v" in note for note in found.all_notes)
    # The outputs indeed cannot show it.
    exchanged = dict(found_state := safetensors.torch.load_file(tmp_path / "correct-clip.safetensors"))
    reordered("kqv")(exchanged, "clip")
    again = run(
        Subject("clip", str(tmp_path / "clip.safetensors"), found_state, subjects["clip"].names, {}, (128,)), exchanged
    )
    assert {check.verdict for check in again.checks if check.group == "outputs"} == {"passed"}
    assert {check.group for check in again.checks if check.verdict == "failed"} == {"bytes"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_shows_less(dtype: str, subjects: dict[str, Subject], clean: dict[str, Verification]) -> None:
    found = run(subjects["sam"], dtype=dtype)
    assert [(c.mistake, c.block) for c in found.controls] == [(c.mistake, c.block) for c in clean["sam"].controls]
    shown = {(control.mistake, control.block) for control in found.controls if control.seen}
    assert ("k and v exchanged", "blocks.0") in shown and ("another epsilon", "blocks.0") not in shown


def test_the_blocks_are_the_first_and_a_late_one_of_its_kind(clean: dict[str, Verification]) -> None:
    """Block 1 of the tiny SAM attends globally."""
    assert {control.block for control in clean["sam"].controls} == {"pos_embed", "blocks.0", "blocks.2"}
    layers = {"transformer.layers.0", "transformer.layers.2"}
    assert {control.block for control in clean["clip"].controls} == {"pre_layrnorm"} | layers


def test_unchanged_tensors_are_shared_and_the_encoder_stays_as_it_was(subjects: dict[str, Subject]) -> None:
    encoder: Any = FAMILIES["clip"].load(subjects["clip"].state)
    before, modules = dict(encoder.named_parameters()), str(encoder)
    block, neighbour = encoder.transformer.layers[:2]
    for change in controls.MISTAKES["clip"].blocks.values():
        changed = dict(controls._changed(block, neighbour, change).named_parameters())
        own = [name for name, tensor in changed.items() if tensor is not block.get_parameter(name)]
        assert len(own) <= 2, own
    after = dict(encoder.named_parameters())
    assert str(encoder) == modules and all(after[name] is tensor for name, tensor in before.items())
