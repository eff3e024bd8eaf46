"""Whatever torch.load(weights_only=True) or safetensors accepts and we accept is the same bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from differential import OURS, REASONS, THEIRS, Outcome, reason, table, tally

DOCS = Path(__file__).resolve().parents[1] / "docs" / "differential.md"


@pytest.mark.filterwarnings("ignore")  # of torch, for the odd tensors that are made
def test_changed_files_are_read_alike_or_refused_for_a_known_reason() -> None:
    found = tally(60, seed=6)
    assert not found.unexplained, "\n".join(table(found))
    # There is something to compare.
    assert min(found.outcomes[kind, "both accept"] for kind in ("torch", "safetensors")) > 10, found.outcomes


def test_every_reason_is_in_the_docs() -> None:
    text = DOCS.read_text()
    for entry in REASONS:
        others = "torch alone" if entry.kind == "torch" else "the library alone"
        assert f"| {others if entry.who == THEIRS else 'us alone'} | {entry.why} |" in text, entry


@pytest.mark.parametrize("who", ["both accept", "died", OURS, THEIRS])
def test_what_nothing_explains_is_told(who: str) -> None:
    assert reason("torch", Outcome(who, "x: bytes differ")) is None
