"""A verification leaves the process as it was, and its parts agree with each other."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from converter.encoders import ClipEncoder, SamEncoder
from converter.layouts import registry
from converter.verification.families import FAMILIES
from converter.verification.outputs import exact_float32
from converter.verification.reference_models import REFERENCES
from converter.verification.skip_init import SkipInitialization


def test_initialization_is_skipped_in_this_thread_only() -> None:
    others: list[nn.Linear] = []
    thread = threading.Thread(target=lambda: others.append(nn.Linear(64, 64)))
    with SkipInitialization():
        thread.start()
        thread.join()
        before = torch.get_rng_state()
        nn.Linear(64, 64), nn.Conv2d(3, 4, 5), nn.Embedding(6, 7)
        assert torch.equal(torch.get_rng_state(), before)
        # Constants are not random.
        assert torch.equal(nn.LayerNorm(8).weight, torch.ones(8))
    for layer in (*others, nn.Linear(64, 64)):
        weight = layer.weight.detach()
        assert float(weight.std()) > 0.05 and float(weight.abs().max()) <= 0.125


def test_buffers_are_kept() -> None:
    with SkipInitialization():
        encoder = ClipEncoder()
    assert encoder.embeddings.position_ids[0, -1] == 256


def test_tensor_float_is_disabled_and_restored() -> None:
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    try:
        matmul.allow_tf32 = convolution.allow_tf32 = True
        with exact_float32():
            if hasattr(convolution, "conv"):
                assert matmul.fp32_precision == convolution.conv.fp32_precision == "ieee"
            else:
                assert not matmul.allow_tf32 and not convolution.allow_tf32
        assert matmul.allow_tf32 and convolution.allow_tf32
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def test_every_family_has_an_entry_and_a_reference() -> None:
    assert sorted(FAMILIES) == sorted(registry.families())
    assert all(f"{name}-hf" in REFERENCES for name in FAMILIES)
    assert set(REFERENCES) <= set(registry.layout_names())


@pytest.mark.parametrize("encoder", [SamEncoder, ClipEncoder])
def test_probes_are_modules_of_the_encoder(encoder: type[nn.Module]) -> None:
    family = next(family for family in FAMILIES.values() if family.encoder is encoder)
    with torch.device("meta"):
        model: Any = encoder()
    names = model.state_dict().keys()
    for probe in family.own_probes(model):
        assert family.tensors_at(probe.name, names), probe.name
