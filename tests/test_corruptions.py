"""Every corruption of the catalogue is caught and named, and correct conversions pass."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import command
import correct
import corruptions
import pytest
import test_oracles
from command import script
from corruptions import ARCHITECTURE, FILE, FUNCTION, WEIGHTS, Corruption, Row, Subject

import converter
from converter.api.verify import verify
from converter.encoders import DeepEncoder
from converter.layouts import registry
from converter.verification.deep_encoder import REFERENCES
from converter.verification.families import FAMILIES
from converter.verification.result import Verification


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    """With fewer layers than in the table of the docs."""
    return corruptions.tiny_subjects(tmp_path_factory.mktemp("subjects"), depth=3)


@pytest.fixture(scope="module")
def deep_subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return corruptions.tiny_subjects(tmp_path_factory.mktemp("deep"))


def test_the_catalogue_is_large_enough() -> None:
    assert len({corruption.name for corruption in corruptions.CATALOGUE}) == len(corruptions.CATALOGUE) >= 150
    families = Counter(family for corruption in corruptions.CATALOGUE for family in corruption.families)
    assert min(families["sam"], families["clip"]) >= 60 and families["qwen2"] >= 40
    for corruption in corruptions.CATALOGUE:
        assert (corruption.kind == ARCHITECTURE) == bool(corruption.patch) == bool(corruption.tensor), corruption.name


@pytest.mark.parametrize("kind", ["sam", "clip", "compressor", "qwen2", "queries"])
def test_uncorrupted_they_pass(kind: str, subjects: dict[str, Subject], tmp_path: Path) -> None:
    row, _ = corruptions.run(Corruption("none", (kind,), WEIGHTS, "nothing"), subjects[kind], tmp_path, device="cpu")
    assert row.ok and not any(row.caught.values()) and None not in row.caught.values()
    # Not passed narrowly: the two implementations do the same steps in the same order.
    assert row.ratio is not None and row.ratio < 0.5


@pytest.mark.parametrize(("corruption", "kind"), corruptions.cases(), ids=lambda value: getattr(value, "name", value))
def test_every_corruption_is_caught_and_named(
    corruption: Corruption, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # The order of words is that of numbers below ten.
    subjects = request.getfixturevalue("deep_subjects" if corruption.name == "layers-as-words" else "subjects")
    row, found = corruptions.run(corruption, subjects[kind], tmp_path, device="cpu")
    assert not row.ok
    if row.refused:
        assert corruption.kind == FILE
        return
    assert found is not None and corruptions.unnamed(row, found) == []
    if corruption.kind == ARCHITECTURE:
        # The file is right: only outputs show the mistake, first where it is.
        assert groups(row) == ["outputs"]
        assert row.first.endswith(row.expected)
    elif corruption.kind == FUNCTION:
        _check_function(corruption, row, found)
    else:
        assert row.caught["structure"] or row.caught["bytes"]
        _check_blame(row, subjects[kind])
    if corruption.kind == WEIGHTS:
        assert row.caught["bytes"]
        # Shapes that fit no encoder cannot be run.
        assert row.caught["outputs"] in ([False] if corruption.quiet else [True, None])
        assert row.caught["outputs"] or row.quiet or row.caught["structure"]


def groups(row: Row) -> list[str]:
    """The groups of checks that caught a corruption."""
    return [group for group, caught in row.caught.items() if caught]


KEYS = {
    "config-activation": "hidden_act",
    "config-heads": "num_attention_heads",
    "config-epsilon": "layer_norm_eps",
}


def _check_function(corruption: Corruption, row: Row, found: Verification) -> None:
    """A source of another function is partly verified at most; a config that was edited contradicts the source."""
    if corruption.source:
        assert groups(row) == ["function"] and found.result == "partly verified (structure, bytes)"
    else:
        assert groups(row) == ["structure", "outputs"]
        (check,) = (check for check in found.checks if check.name == "config")
        assert check.verdict == "failed" and f"config.json: {KEYS[corruption.name]} is " in check.detail


def _check_blame(row: Row, subject: Subject) -> None:
    """The first probe to diverge is the one after the first changed tensor, if outputs show it at all."""
    if not row.caught["outputs"] or not row.changed:
        return
    family, depth = FAMILIES[subject.family], subject.names.depth
    order = [
        family.patch_conv_path,
        family.block_input_probe,
        *(f"{family.blocks_path}.{i}" for i in range(depth)),
        family.output_probe,
    ]
    # SAM's compressor only runs in the DeepEncoder, before CLIP's first block.
    order.append("vision_model.pre_layrnorm")
    first = next(probe for probe in order if probe and family.tensors_before(probe, row.changed))
    assert row.first.removeprefix(family.prefix) == first


@pytest.mark.parametrize("kind", ["sam", "clip"])
def test_a_transformers_without_the_deep_encoder(
    kind: str, subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(REFERENCES, DeepEncoder, REFERENCES[DeepEncoder][1:])
    right, _ = corruptions.run(Corruption("none", (kind,), WEIGHTS, "nothing"), subjects[kind], tmp_path, device="cpu")
    assert right.ok and right.ratio is not None and right.ratio < 0.5
    for corruption, other in corruptions.cases():
        if other == kind and (corruption.name.startswith("chain-") or "antialias" in corruption.name):
            row, found = corruptions.run(corruption, subjects[kind], tmp_path, device="cpu")
            assert found is not None and "assembled" in found.traces[-1].name
            assert row.caught["outputs"] and row.first.endswith(row.expected), corruption.name


def test_a_wrong_mapping_is_named_by_its_line(subjects: dict[str, Subject], tmp_path: Path) -> None:
    """Tensors follow the wrong mapping; the known layout and the outputs do not, and name the line."""
    text = registry.yaml_text("sam-hf")
    lines = text.splitlines()
    mapping = tmp_path / "mine.yaml"
    wrong = [line.replace("neck.layer_norm1", "neck.layer_norm@").replace("neck.layer_norm2", "neck.layer_norm1")
             .replace("neck.layer_norm@", "neck.layer_norm2") for line in lines]  # fmt: skip
    assert wrong != lines
    mapping.write_text("\n".join(wrong))
    out = tmp_path / "out.safetensors"
    source = subjects["sam"].source
    converter.convert(source, "sam", out=out, mapping=mapping)
    found = verify(str(out), source, mapping=mapping, device="cpu", sizes=subjects["sam"].sizes)
    (alone,) = [check for check in found.checks if check.group == "outputs" and check.name.startswith("transformers")][
        :1
    ]
    verdicts = {check.name: check.verdict for check in found.checks if check.group == "bytes"}
    assert verdicts == {"tensors": "passed", "mapping": "failed"}
    assert alone.verdict == "failed" and alone.tensors[0] == "neck" and "neck.1.weight" in alone.tensors
    at = [number for number, line in enumerate(wrong, 1) if "neck.layer_norm" in line and "rename" in line]
    assert at and all(f"{mapping}:{number}" in alone.detail for number in at)


# The scripts ----------------------------------------------------------------------------------------------------------


def test_the_script_for_a_gpu_on_tiny_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where torch is imported already; of the six checkpoints, SAM, CLIP and version 2."""
    gpu, table = script("verify_on_gpu"), script("corruption_table")

    def run_program(arguments: list[str], **options: Any) -> Any:
        program = Path(arguments[0]).name
        if program.startswith("dsocr-"):
            return command.run(*arguments[1:], cwd=tmp_path, program=program)
        return subprocess.run(arguments, **options)

    class Worker:
        def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
            assert arguments[0] == sys.executable and env["OMP_NUM_THREADS"]
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", arguments[1:])
                self.code = gpu.main()

        def wait(self, timeout: float) -> int:
            return self.code

    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=run_program, Popen=Worker))
    monkeypatch.setattr(gpu, "CHECKPOINTS", gpu.CHECKPOINTS[1::2])
    only = "qkv-order-kqv,sam-eps,data-truncated,mapping-neck-norms,source-heads,config-epsilon,qwen2-open"
    options = ["--tiny", "--device", "cpu", "--dtypes", "bfloat16", "--workers", "2", "--only", only]
    monkeypatch.setattr(sys, "argv", ["verify_on_gpu.py", str(tmp_path), *options])
    assert gpu.main() == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["summary"]["ok"] and results["summary"]["verified"] == 3
    assert results["summary"]["caught"] == 10
    assert results["summary"]["caught_by"] == {"structure": 2, "bytes": 3, "outputs": 7, "function": 1}
    assert {row["exit_code"] for row in results["verifications"]} == {0}
    options = ["-o", str(tmp_path / "table.md"), "--jobs", "1", "--only", only, "--gpu", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", ["corruption_table.py", *options])
    assert table.main() == 0
    text = (tmp_path / "table.md").read_text()
    assert "| `sam-eps` | norms with an eps of 1e-5 | O " in text and "10 runs, 10 caught" in text


# No false alarms ------------------------------------------------------------------------------------------------------

# A conversion of every layout; scripts/error_over_tolerance.py runs hundreds.
_LAYOUTS = len(test_oracles.LAYOUTS)
ROUNDS = [_LAYOUTS * (number % len(correct.STATISTICS)) + number for number in range(_LAYOUTS)]


@pytest.mark.parametrize("number", ROUNDS)
def test_correct_conversions_pass(number: int, tmp_path: Path) -> None:
    """With weights of every statistics, as untrained and trained encoders have them."""
    result, found = correct.run(number, tmp_path)
    assert result.problems == [] and found.ok
    assert {"structure", "bytes"} <= set(found.done)
    assert result.statistics == "trained" or found.verdict == "verified"


def test_the_rounds_have_every_layout_and_statistics() -> None:
    layouts, statistics = len(test_oracles.LAYOUTS), len(correct.STATISTICS)
    assert {number % layouts for number in ROUNDS} == set(range(layouts))
    assert {number // layouts % statistics for number in ROUNDS} == set(range(statistics))
