"""The whole DeepEncoder with the converted encoder in it, at DeepSeek-OCR's sizes.

Positions are resampled at every size but the trained one, so only here does a wrong resampling show. What the converted
file lacks is seeded, and the same in the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from converter.verification.families import FAMILIES, Family, State
from converter.verification.probes import ProbedEncoder
from converter.verification.skip_init import SkipInitialization

# The probe of what a DeepEncoder returns: CLIP's channels next to SAM's.
OUTPUT = "concatenation"


def build_deep_encoder(family: Family, encoder: Any, device: torch.device) -> ProbedEncoder:
    """A DeepEncoder with the converted encoder as one of its two parts.

    Args:
        family: The encoder's family.
        encoder: The converted encoder.
        device: Where the DeepEncoder is built.
    """
    with device, SkipInitialization():
        model = family.deep_encoder(encoder.config).eval()
    _seed(model, device)
    # Not strict: SAM may come without the compressor.
    model.get_submodule(family.prefix[:-1]).load_state_dict(encoder.state_dict(), strict=False)
    parts = {part: getattr(model, part.prefix[:-1], None) for part in FAMILIES.values()}
    probes = [probe for part, module in parts.items() if module for probe in part.own_probes(module, part.prefix)]
    return ProbedEncoder(type(model).__name__, model, probes, model, OUTPUT)


def _seed(model: nn.Module, device: torch.device) -> None:
    """Set weights that keep a signal alive through all blocks."""
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in model.named_parameters():
        tensor.data.normal_(0.0, 0.02, generator=generator)
        if "norm" in name and name.endswith("weight"):
            tensor.data += 1


def with_optional_tensors(family: Family, encoder: Any, canonical: State) -> tuple[nn.Module, State]:
    """Add seeded tensors to an encoder, and to its source, that both lack and the encoder by itself needs.

    Args:
        family: The encoder's family.
        encoder: The converted encoder.
        canonical: The source's tensors by canonical names.
    """
    shapes = family.optional(encoder.config)
    if not shapes:
        return encoder, canonical
    generator, state = torch.Generator().manual_seed(0), encoder.state_dict()
    device = next(iter(state.values())).device
    seeded = {name: (torch.randn(shape, generator=generator) * 0.02).to(device) for name, shape in shapes.items()}
    return family.load({**state, **seeded}), {**canonical, **seeded}
