"""The runs of the third proof: the encoder by itself at its trained size, then the whole chain at every size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from converter.compute import evaluate, torch_dtype
from converter.encoders import ClipConfig
from converter.loading.upload import Uploader
from converter.mapping.expr import Resample
from converter.source import Progress
from converter.verify import structure
from converter.verify.chain import build_chain, check_chain, with_patches
from converter.verify.independent import Reader
from converter.verify.opened import Converted, Origin
from converter.verify.outputs import Tested, check_encoder, images
from converter.verify.references import State, build
from converter.verify.result import Check, Picture, Trace, skipped
from converter.verify.stages import blamed, names_of, probes_of

if TYPE_CHECKING:
    from PIL.Image import Image


class Setting(NamedTuple):
    """How the encoders are run: where, in which precision, looking at which image (our page, if None)."""

    device: torch.device
    precision: torch.dtype
    sizes: Sequence[int]
    image: Image | None
    draw: bool
    progress: Progress


class Expected(NamedTuple):
    """The source's tensors by the hub's names, on the CPU, and the names of those that the file has otherwise."""

    hub: State
    faulty: list[str]


class Runs:
    """What the runs found adds up here, and the label of the reference."""

    def __init__(self, target: Converted, origin: Origin | None, expected: Expected, setting: Setting) -> None:
        self._family, self._origin, self._expected, self._setting = target.family, origin, expected, setting
        self._upload = Uploader(setting.device)
        self.reference = ""
        self.checks: list[Check] = []
        self.traces: list[Trace] = []
        self.pictures: list[Picture] = []

    def prove(self, found: Reader, names: Sequence[str]) -> None:
        """Run the tensors `names` of the converted file."""
        check, encoder = structure.check_loads(self._family, {name: self._upload(found(name)) for name in names})
        self.checks.append(check)
        if encoder is None:
            self.checks.append(skipped("outputs", "encoder", "it could not be loaded, so it was not run"))
            return
        shapes = self._expected.hub
        fault = structure.check_sizes(self._family, encoder, shapes) if shapes else None
        if fault is not None:
            self.checks += [fault, skipped("outputs", "encoder", "the source's is built otherwise, so it was not run")]
            return
        device, sizes, hub = self._setting.device, self._setting.sizes, State()
        if self._origin is not None:
            own, hub = self._uploaded(self._origin)
            self._alone(encoder, self._origin, own, hub)
        self._setting.progress("outputs", 1, len(sizes) + 1)
        chain = build_chain(self._family, encoder, hub, device)
        for done, size in enumerate(sizes):
            self._add(*check_chain(chain, self._pixels(size), self._setting.precision, self._look))
            self._setting.progress("outputs", done + 2, len(sizes) + 1)

    def _uploaded(self, origin: Origin) -> tuple[State, State]:
        """The source's tensors by its own names and by the hub's, on the device; each travels there once."""
        there: State = {}

        def load(key: str) -> Tensor:
            if key not in there:
                there[key] = self._upload(origin.read(key))
            return there[key]

        prefix = origin.known.match.prefix
        own = {name: load(tensor.key) for name, tensor in origin.known.tensors.items() if name.startswith(prefix)}
        hub: State = {}
        for name, value in origin.plan.outputs.items():
            # Resampled here, they would be other roundings of the same positions.
            on_cpu = isinstance(value, Resample)
            tensor = self._expected.hub[name] if on_cpu else evaluate(value, lambda tensor: load(tensor.key))
            hub[name] = self._upload(tensor)
        return own, hub

    def _alone(self, encoder: Any, origin: Origin, own: State, hub: State) -> None:
        """The encoder by itself against the source's own implementation."""
        config = encoder.config
        if isinstance(config, ClipConfig) and not config.patch_convolution:
            encoder, hub = with_patches(encoder, hub)
        # Made where it runs: its own initialisation, overwritten at once, takes seconds on a processor.
        with self._setting.device:
            reference = build(origin.plan.mapping, encoder.config, _as_converted(own, origin), hub)
        reference.model.eval().to(self._setting.device)
        tested, pixels = _tested(self._family, encoder), self._pixels(config.image_size)
        self._add(*check_encoder(tested, reference, pixels, self._setting.precision, self._look))
        self.reference = reference.label

    def _pixels(self, size: int) -> Tensor:
        return images(1, size, self._setting.device, torch.float32, self._setting.image)

    def _look(self, what: str, seen: Tensor, reference: Tensor, converted: Tensor) -> None:
        if self._setting.draw:
            from converter.verify.pictures import draw

            self.pictures += draw(what, seen, reference, converted)

    def _add(self, check: Check, trace: Trace | None) -> None:
        if self._origin is not None:
            check = blamed(check, self._family, self._origin.plan.rules, self._expected.faulty)
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


def _tested(family: str, encoder: Any) -> Tested:
    if family == "sam":
        names = [*names_of(family, len(encoder.blocks)), "neck"]
        return Tested(encoder, probes_of(family, encoder), names, encoder.features)
    # The last block's output is the whole's: open_clip and timm go on to layers that the DeepEncoder has not.
    return Tested(encoder, probes_of(family, encoder), names_of(family, len(encoder.transformer.layers)), encoder)
