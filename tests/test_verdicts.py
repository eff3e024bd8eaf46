"""Verdicts of real runs: a check that could not fail is inconclusive, and what is missing is said first."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import converter
from converter.api.verify import verify
from converter.cli.verify import app
from converter.errors import UsageError
from converter.verification.families import FAMILIES
from converter.verification.outputs import KeepFloat64, compare
from converter.verification.probes import ProbedEncoder
from converter.verification.reference_models import segment_anything_sam

POSITIONS, BIAS = "image_encoder.pos_embed", "image_encoder.blocks.0.mlp.lin2.bias"


def sam_with_noise(size: float) -> dict[str, torch.Tensor]:
    """A SAM whose first block cancels positions of a size, so that only what a type keeps of them is left."""
    state = dict(models.sam_meta().state_dict())
    return state | {POSITIONS: state[POSITIONS] + size, BIAS: state[BIAS] - size}


def converted(state: dict[str, torch.Tensor], folder: Path) -> tuple[Path, Path]:
    """A SAM as the pair of converted file and source."""
    torch.save(state, folder / "sam.pth")
    converter.convert(folder / "sam.pth", "sam", out=folder / "out.safetensors", force=True)
    return folder / "out.safetensors", folder / "sam.pth"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return converted(dict(models.sam_meta().state_dict()), tmp_path_factory.mktemp("pair"))


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `dsocr-verify`."""
    done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--device", "cpu", "--sizes", "192")])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout.strip(), done.stderr


# What was done ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "result"),
    [
        (["--source"], "verified"),
        (["--source", "--fast"], "partly verified (structure, bytes)"),
        ([], "partly verified (structure)"),
        (["--fast"], "partly verified (structure)"),
    ],
)
def test_the_result_says_what_was_done(options: list[str], result: str, pair: tuple[Path, Path]) -> None:
    file, source = pair
    options = [str(source) if option == "--source" else option for option in options]
    arguments = [file, *(["--source"] if options[:1] == [str(source)] else []), *options]
    code, out, err = run(*arguments)
    assert (code, out) == (0, result)
    done = result == "verified"
    assert run(*arguments, "--require", "structure")[:2] == (0, result)
    code, out, err = run(*arguments, "--require", "structure,bytes,outputs")
    assert (code, out) == (0 if done else 1, result)
    assert ("required, but" in err) is not done and ("--fast" in options) is ("outputs not checked" in err)


def test_a_record_alone(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Digests of another layout are compared, and nothing else."""
    converter.convert(pair[1], "sam", out=tmp_path / "hf.safetensors", to="sam-hf", record=tmp_path / "hf.json")
    code, out, err = run(tmp_path / "hf.safetensors", "--record", tmp_path / "hf.json")
    assert (code, out) == (0, "partly verified (record)")
    assert err.count("only compared with its record") >= 3
    assert run(tmp_path / "hf.safetensors", "--record", tmp_path / "hf.json", "--require", "bytes")[0] == 1


@pytest.mark.parametrize("value", ["", "all", "bytes,", "bytes outputs", "record"])
def test_a_requirement_is_one_of_the_parts(value: str, pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="expected some of structure, bytes, outputs"):
        run(pair[0], "--require", value)


def test_a_wrong_conversion_is_not_verified(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    file, _ = converted(sam_with_noise(1), tmp_path)
    code, out, _ = run(file, "--source", pair[1])
    assert (code, out) == (1, "not verified")


# Checks that could not fail ---------------------------------------------------------------------------------------


def test_float64_where_the_noise_would_hide_a_mistake(tmp_path: Path) -> None:
    file, source = converted(sam_with_noise(1e8), tmp_path)
    found = verify(file, source, device="cpu", sizes=[192])
    assert found.result == "verified"
    assert any("compared in float64, as the noise floor in float32 is" in note for note in found.all_notes)
    assert all(point.noise_floor < 1e-5 for trace in found.traces for point in trace.points)
    # The mistake is as small as the noise in float32.
    tensors = dict(converter.load(source, "sam", device="cpu"))
    tensors["blocks.1.attn.proj.bias"] = tensors["blocks.1.attn.proj.bias"] + 0.1
    safetensors.torch.save_file(tensors, tmp_path / "wrong.safetensors")
    wrong = verify(tmp_path / "wrong.safetensors", source, device="cpu", sizes=[192])
    assert [part.state for part in wrong.parts] == ["done", "failed", "failed"]


def test_a_type_that_overflows_is_compared_in_float64(tmp_path: Path) -> None:
    """The weights are those of the file then, not rounded ones."""
    found = verify(*converted(sam_with_noise(1e6), tmp_path), device="cpu", sizes=[192], dtype="float16")
    assert found.result == "verified" and "the noise floor in float16 is inf" in " ".join(found.all_notes)


def test_noise_in_float64_too_is_inconclusive(tmp_path: Path) -> None:
    file, source = converted(sam_with_noise(1e18), tmp_path)
    found = verify(file, source, device="cpu", sizes=[192], require=["outputs"])
    assert found.result == "partly verified (structure, bytes)" and not found.ok
    assert [part.name for part in found.not_checked] == ["outputs"]
    assert "in float64 too" in found.not_checked[0].reason


def test_our_own_code_is_no_reference() -> None:
    tested, other, image = sam_and_reference()
    own = replace(sam_and_reference()[0], label="another name 1.0")
    check = compare(tested, own, image, torch.float32).check
    assert check.verdict == "inconclusive" and "our own code" in check.detail
    assert compare(tested, other, image, torch.float32).check.verdict == "passed"


def sam_and_reference() -> tuple[ProbedEncoder, ProbedEncoder, torch.Tensor]:
    """A SAM of ours, the same in segment-anything, and pixels."""
    family = FAMILIES["sam"]
    state = {name.removeprefix("image_encoder."): value for name, value in models.sam_meta().state_dict().items()}
    state = {name: value for name, value in state.items() if name.startswith(("blocks", "neck", "patch", "pos"))}
    reference = segment_anything_sam(family.config_from({name: value.shape for name, value in state.items()}), state)
    return (
        family.probed(family.load(state)),
        reference,
        torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    )


@pytest.mark.parametrize("wrong", [False, True])
def test_errors_near_the_tolerance_are_compared_in_float64(wrong: bool) -> None:
    """Layers can amplify rounding errors to more than the tolerance; a mistake of that size is a mistake in float64."""
    tested, reference, image = sam_and_reference()
    block = tested.model.get_submodule("blocks.0")

    def round_more(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
        return output * (1 + 4e-6 * noise) if wrong or output.dtype is torch.float32 else output

    block.register_forward_hook(round_more)
    found = compare(tested, reference, image, torch.float32)
    assert "near the tolerance" in found.note
    assert found.check.verdict == ("failed" if wrong else "passed")


def test_a_comparison_keeps_the_weights() -> None:
    """Those of a following comparison in float64 are not rounded."""
    for encoder in (encoders := sam_and_reference())[:2]:
        before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
        compare(*encoders, torch.bfloat16)
        assert all(torch.equal(before[name], value) for name, value in encoder.model.state_dict().items())


def test_a_product_with_positions_stays_in_float64() -> None:
    """Rotary embeddings of transformers 5.17 multiply frequencies by positions, both cast to float32."""
    frequencies, positions = torch.rand(1, 4, 1, dtype=torch.float64), torch.arange(3)[None, None, :]
    with KeepFloat64():
        product = frequencies.float() @ positions.float()
    assert torch.equal(product, frequencies @ positions.double())


# Requirements -----------------------------------------------------------------------------------------------------


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make imports of packages fail as if they were not installed."""
    for name in {*packages, *(name for name in sys.modules if name.partition(".")[0] in packages)}:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("hidden", "result", "notices"),
    [
        (["segment_anything"], "verified", ["pip install segment-anything"]),
        (["transformers"], "verified", ["the whole DeepEncoder is not compared"]),
        (
            ["transformers", "segment_anything"],
            "partly verified (structure, bytes)",
            ["the whole DeepEncoder is not compared", "the encoder is not compared"],
        ),
    ],
)
def test_what_is_missing_is_said_first(
    hidden: list[str], result: str, notices: list[str], pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that can be compared is left out for the sake of what cannot."""
    hide(monkeypatch, *hidden)
    events: list[str] = []
    found = verify(
        *pair,
        device="cpu",
        sizes=[192],
        on_progress=lambda what, done, total: events.append(what),
        on_notice=lambda line: events.append(line),
    )
    assert len(notices) == sum("--fast" in event for event in events[: len(notices)]), events
    assert all(notice in event for notice, event in zip(notices, events, strict=False))
    assert found.result == result and found.checks[-1].verdict in ("skipped", "passed")
    if hidden == ["transformers"]:
        assert "segment-anything" in found.reference
        assert any("transformers is not installed" in note for note in found.all_notes)


def test_a_library_of_the_written_layout_is_looked_for_first(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what would be used: no DeepEncoder runs for a file of another library."""
    out = tmp_path / "out.safetensors"
    converter.convert(pair[1], "sam", to="sam-timm", out=out)
    hide(monkeypatch, "timm", "transformers")
    events: list[str] = []
    progress = {"on_progress": lambda what, done, total: events.append(what), "on_notice": events.append}
    verify(out, pair[1], device="cpu", sizes=[192], **progress)
    (notice,) = (event for event in events if "--fast" in event)
    assert events[0] == notice and "pip install timm" in notice


def test_a_missing_gpu_is_said_first(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="torch finds 0 GPUs") as error:
        verify("no such file", device="cuda")
    assert "--device cpu" in error.value.hint and "--fast" in error.value.hint
    assert verify(*pair, device="cuda", fast=True).result == "partly verified (structure, bytes)"
