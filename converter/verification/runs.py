"""The runs of the third proof: the encoder by itself at its trained size, then the whole chain at every size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from converter.encoders import ClipConfig
from converter.output.upload import Uploader
from converter.storage.progress import OnProgress
from converter.tensors.evaluate import evaluate, torch_dtype
from converter.tensors.lazy_tensor import Resample
from converter.verification import structure
from converter.verification.deep_encoder import build_chain, check_chain, with_patches
from converter.verification.inputs import Converted, Origin
from converter.verification.outputs import check_encoder, pixels_of
from converter.verification.probes import at_fault, names_of, probes
from converter.verification.reference_models import Runner, State, build
from converter.verification.reference_readers import Reader
from converter.verification.result import Check, Picture, Trace, skipped

if TYPE_CHECKING:
    from PIL.Image import Image


class Setting(NamedTuple):
    """How the encoders are run: where, in which precision, looking at which image (our page, if None)."""

    device: torch.device
    precision: torch.dtype
    sizes: Sequence[int]
    image: Image | None
    draw: bool
    on_progress: OnProgress


class Runs:
    """What the runs found adds up here, and the label of the reference.

    `canonical` are the source's tensors by canonical names, on the CPU; `faulty` names those that differ in the file.
    """

    def __init__(
        self, target: Converted, origin: Origin | None, canonical: State, faulty: list[str], setting: Setting
    ) -> None:
        self._target, self._origin, self._canonical, self._faulty, self._setting = (
            target,
            origin,
            canonical,
            faulty,
            setting,
        )
        self._upload = Uploader(setting.device)
        self.reference = ""
        self.checks: list[Check] = []
        self.traces: list[Trace] = []
        self.pictures: list[Picture] = []

    def prove(self, found: Reader) -> None:
        """Run the tensors of the converted file, which `found` gives."""
        family, setting = self._target.family, self._setting
        tensors = {name: self._upload(found(name)) for name in self._target.state_dict.tensors}
        check, encoder = structure.check_loads(family, tensors)
        self.checks.append(check)
        if encoder is None:
            self.checks.append(skipped("outputs", "encoder", "it could not be loaded, so it was not run"))
            return
        fault = structure.check_sizes(family, encoder, self._canonical) if self._canonical else None
        if fault is not None:
            self.checks += [fault, skipped("outputs", "encoder", "the source's is built otherwise, so it was not run")]
            return
        canonical = State()
        if self._origin is not None:
            own, canonical = self._uploaded(self._origin)
            self._alone(encoder, self._origin, own, canonical)
        setting.on_progress("outputs", 1, len(setting.sizes) + 1)
        chain = build_chain(family, encoder, canonical, setting.device)
        for done, size in enumerate(setting.sizes):
            self._add(*check_chain(chain, self._pixels(size), setting.precision, self._look))
            setting.on_progress("outputs", done + 2, len(setting.sizes) + 1)

    def _uploaded(self, origin: Origin) -> tuple[State, State]:
        """The source's tensors by its own and by canonical names, on the device; each is copied there once."""
        there: State = {}

        def load(key: str) -> Tensor:
            if key not in there:
                there[key] = self._upload(origin.read(key))
            return there[key]

        own = {name: load(tensor.key) for name, tensor in origin.own.items()}
        canonical: State = {}
        for name, value in origin.plan.outputs.items():
            # Resampled here, they would be other roundings of the same positions.
            on_cpu = isinstance(value, Resample)
            tensor = self._canonical[name] if on_cpu else evaluate(value, lambda tensor: load(tensor.key))
            canonical[name] = self._upload(tensor)
        return own, canonical

    def _alone(self, encoder: Any, origin: Origin, own: State, canonical: State) -> None:
        """The encoder by itself against the source's own implementation."""
        config = encoder.config
        if isinstance(config, ClipConfig) and not config.patch_convolution:
            encoder, canonical = with_patches(encoder, canonical)
        # Made where it runs: its own initialisation, overwritten at once, takes seconds on a processor.
        with self._setting.device:
            reference = build(origin.plan.mapping, encoder.config, _as_converted(own, origin), canonical)
        reference.model.eval().to(self._setting.device)
        tested, names = _tested(self._target.family, encoder)
        pixels = self._pixels(config.image_size)
        self._add(*check_encoder(tested, names, reference, pixels, self._setting.precision, self._look))
        self.reference = reference.label

    def _pixels(self, size: int) -> Tensor:
        return pixels_of(self._setting.image, size, self._setting.device)

    def _look(self, what: str, seen: Tensor, reference: Tensor, converted: Tensor) -> None:
        if self._setting.draw:
            from converter.verification.pictures import draw

            self.pictures += draw(what, seen, reference, converted)

    def _add(self, check: Check, trace: Trace | None) -> None:
        if self._origin is not None:
            check = at_fault(check, self._target.family, self._origin.plan.rules, self._faulty)
        self.checks.append(check)
        if trace is not None:
            self.traces.append(trace)


def _as_converted(own: State, origin: Origin) -> State:
    """The source's tensors in the type that the converted ones have been given.

    None of them where positions were resampled: the source's own library cannot run what was made of it.
    """
    if origin.resampled:
        return {}
    cast = {value.dtype.name for value in origin.plan.outputs.values() if value.dtype.is_float}
    if len(cast) > 1:
        return own
    dtype = torch_dtype(cast.pop())
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in own.items()}


def _tested(family: str, encoder: Any) -> tuple[Runner, list[str]]:
    """Our own encoder, and what its places and its end are called."""
    label = type(encoder).__name__
    if family == "sam":
        places = probes(encoder.patch_embed.proj, encoder.blocks)
        return Runner(label, encoder, places, encoder.features), [*names_of(family, len(encoder.blocks)), "neck"]
    # The last block's output is the whole's: open_clip and timm go on to layers that the DeepEncoder has not.
    layers = encoder.transformer.layers
    places = probes(encoder.embeddings.patch_embedding, layers)
    return Runner(label, encoder, places, encoder), names_of(family, len(layers))
