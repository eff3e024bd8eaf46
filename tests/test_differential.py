"""Files that both dsocr-convert and torch.load(weights_only=True) or safetensors accept have equal contents."""

from __future__ import annotations

from pathlib import Path

import pytest
from differential import BOTH, OURS, REASONS, THEIRS, Outcome, reason, table, tally

DOCS = Path(__file__).resolve().parents[1] / "docs" / "differential.md"


@pytest.mark.filterwarnings("ignore")  # of torch, for unusual tensors
def test_changed_files_are_read_equally_or_refused_for_a_known_reason() -> None:
    found = tally(60, seed=6)
    assert not found.unexplained, "\n".join(table(found))
    # Enough files were compared.
    assert min(found.outcomes[kind, BOTH] for kind in ("torch", "safetensors")) > 10, found.outcomes


def test_every_reason_is_in_the_docs() -> None:
    text = DOCS.read_text()
    for entry in REASONS:
        who = entry.kind if entry.who == THEIRS else "dsocr-convert"
        assert f"| {who} only | {entry.why} |" in text, entry


@pytest.mark.parametrize("who", [BOTH, "crashed", OURS, THEIRS])
def test_an_unknown_difference_has_no_reason(who: str) -> None:
    assert reason("torch", Outcome(who, "x: bytes differ")) is None
