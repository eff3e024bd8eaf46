"""Records the activations of a whole DeepEncoder at named stages, for comparison with other implementations.

docs/activations.md lists the stages.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from converter.errors import LayoutError
from converter.plan.projector import projector_tensors
from converter.tensors.evaluate import as_bytes, evaluate
from converter.verification import pictures
from converter.verification.deep_encoder import build_deep_encoder
from converter.verification.families import FAMILIES, Family
from converter.verification.inputs import Converted
from converter.verification.outputs import Features, exact_float32, run_in
from converter.verification.probes import Probe, ProbedEncoder
from converter.verification.structure import check_loads

PIXELS, OUTPUT, PROJECTOR = "pixels", "output", "projector"
# Stages of shape (1, channels, rows, columns). Other implementations may have the channels last.
CHANNELS_FIRST = (PIXELS, *(f"sam_model.{name}" for name in ("patch_embed.proj", "neck", "net_2", "net_3")))
# Modules whose output is a stage, in addition to the probes of their family.
_EXTRA_STAGES = {"sam": ("neck", "net_2", "net_3"), "clip": ("embeddings",), "qwen2": ("model.model.norm",)}
# The prefix of a parameter name that identifies a block or a module, whose weights have a digest.
_PART = re.compile(r"(.*?\.(?:layers|blocks)\.\d+|[^.]+\.[^.]+)")


@dataclass(frozen=True)
class StagedEncoder:
    """A DeepEncoder whose activations are recorded."""

    model: nn.Module
    weights: Mapping[str, Tensor]  # The file's tensors by DeepSeek-OCR's names, without `model.`
    projector: tuple[Tensor, Tensor] | None  # Weight and bias; None if the file has none

    def activations(self, pixels: Tensor, precision: torch.dtype, model: nn.Module | None = None) -> Features:
        """Return the activations at all stages for one image, in the order of computation.

        Args:
            pixels: The image (1, 3, size, size).
            precision: The dtype to compute in.
            model: A changed copy of the model, which is cast to the dtype; None for the model itself.
        """
        model = copy.deepcopy(self.model) if model is None else model
        encoder = ProbedEncoder("", model, _stage_probes(model), model, OUTPUT)
        with exact_float32():
            features = {PIXELS: pixels, **run_in(precision, encoder, pixels)}
            if self.projector is not None:
                weight, bias = (tensor.to(features[OUTPUT]) for tensor in self.projector)
                features[PROJECTOR] = nn.functional.linear(features[OUTPUT], weight, bias)
        return features

    @property
    def stages(self) -> list[str]:
        """The names of all stages."""
        projector = [PROJECTOR] if self.projector is not None else []
        return [PIXELS, *(probe.name for probe in _stage_probes(self.model)), OUTPUT, *projector]

    @cached_property
    def digests(self) -> dict[str, str]:
        """The SHA-256 digests of the weights in float32: `weights` of all, `weights.NAME` of each block or module."""
        total, parts = hashlib.sha256(), dict[str, Any]()
        for name, tensor in sorted(self.weights.items()):
            match = _PART.match(name)
            data = name.encode() + bytes(as_bytes(tensor.float().cpu()))
            for digest in (total, parts.setdefault(match[1] if match else name, hashlib.sha256())):
                digest.update(data)
        return {"weights": total.hexdigest(), **{f"weights.{name}": part.hexdigest() for name, part in parts.items()}}


def load_staged_encoder(target: Converted, device: torch.device) -> StagedEncoder:
    """Load the whole DeepEncoder of a file; LayoutError if it holds less, or does not load."""
    if len(target.encoders) < 2:
        raise LayoutError(
            f"{target.source.name}: holds {target.family.upper()} alone: activations are those of a whole DeepEncoder",
            "assemble one with: dsocr-convert encoder --sam ... --clip ...",
        )
    encoders: dict[Family, Any] = {}
    weights: dict[str, Tensor] = {}
    for converted in target.encoders:
        family = FAMILIES[converted.family]
        state = {name: _float32(evaluate(value, target.read), device) for name, value in converted.tensors.items()}
        check, encoder = check_loads(family, state, {})
        if encoder is None:
            raise LayoutError(f"{target.source.name}: {check.detail}", "see what is wrong: dsocr-verify FILE --fast")
        encoders[family] = encoder
        weights |= {family.prefix + name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    try:
        model = build_deep_encoder(encoders, device).model
    except ValueError as error:
        raise LayoutError(f"{target.source.name}: {error}") from None
    return StagedEncoder(model, weights, _projector(target, device))


def image_pixels(image: Image | None, size: int) -> Tensor:
    """Return an image as pixels (1, 3, size, size); by default a drawn page with noise, so that all patches differ."""
    if image is not None:
        return pictures.to_pixels(image, size)
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
    return pictures.to_pixels(pictures.draw_page(size), size) + 0.02 * noise


def _float32(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)


def _projector(target: Converted, device: torch.device) -> tuple[Tensor, Tensor] | None:
    weight, bias, *_ = projector_tensors(target.tensors, target.encoders[0].prefix).values()
    if weight is None or bias is None or not weight.dtype.is_float:
        return None
    return target.read(weight).to(device), target.read(bias).to(device)


def _stage_probes(model: nn.Module) -> list[Probe]:
    """Return the probes of all stages of a DeepEncoder, but for its pixels and output."""
    modules: dict[str, Any] = dict(model.named_modules())
    probes = list[Probe]()
    for family in FAMILIES.values():
        if encoder := modules.get(family.prefix[:-1]):
            probes += family.encoder_probes(encoder, family.prefix)
            names = [family.prefix + name for name in _EXTRA_STAGES[family.name]]
            probes += [Probe(name, modules[name]) for name in names if name in modules]
    return probes
