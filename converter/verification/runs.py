"""Runs of the converted encoder: by itself at its trained size, then in the whole DeepEncoder at every size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from converter.output.names import shorten
from converter.output.upload import Uploader
from converter.plan.assumptions import Assumptions, differences
from converter.storage.progress import OnProgress
from converter.tensors.evaluate import evaluate, torch_dtype
from converter.tensors.lazy_tensor import is_resampled
from converter.tensors.tensor_info import TensorInfo
from converter.verification import pictures, structure
from converter.verification.controls import mistakes_at_entry, mistakes_in_blocks, strongest
from converter.verification.deep_encoder import (
    build_deep_encoder,
    build_deep_encoder_reference,
    with_optional_tensors,
)
from converter.verification.families import FAMILIES, Family, State
from converter.verification.functions import check_config, check_function, function_notes, tested_assumptions
from converter.verification.inputs import ConvertedEncoder, Origin
from converter.verification.outputs import GROUP, Comparison, Features, MistakenFeatures, check_tokens, compare
from converter.verification.reference_models import build_reference
from converter.verification.reference_readers import Reader
from converter.verification.result import FAILED, INCONCLUSIVE, PASSED, SKIPPED, Check, Control, Picture, Trace

# A block of SAM has fourteen tensors: too many to list.
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class RunOptions:
    """How the encoders are run."""

    device: torch.device
    precision: torch.dtype
    sizes: Sequence[int]  # Pixels along a side at which the whole DeepEncoder runs; none to run nothing
    image: Image | None  # The input; None for a drawn page
    draw: bool  # Whether pictures of the features are made
    on_progress: OnProgress


@dataclass(frozen=True)
class RunResults:
    """The results of all runs of one encoder, as fields of `Verification`."""

    checks: Sequence[Check]
    traces: Sequence[Trace] = ()
    pictures: Sequence[Picture] = ()
    reference: str = ""
    notes: Sequence[str] = ()
    controls: Sequence[Control] = ()


@dataclass(frozen=True)
class Tested:
    """A converted encoder, loaded."""

    converted: ConvertedEncoder
    encoder: Any  # Our own encoder with its tensors
    own: State  # The file's tensors by the names of its layout
    assumptions: Assumptions  # What no tensor shows, as the encoder was loaded with; empty for the DeepEncoder's values


def run_encoder(
    converted: ConvertedEncoder, read: Reader, origin: Origin | None, differing: Sequence[str], options: RunOptions
) -> RunResults:
    """Load a converted encoder, run it and compare its features.

    Args:
        converted: The encoder in the converted file.
        read: Reads the file's tensors.
        origin: Its source, if one was specified.
        differing: Its tensors that differ from the source, by canonical names.
        options: How the encoders are run.
    """
    family = FAMILIES[converted.family]
    # Nothing is uploaded to a GPU if nothing runs there.
    upload = Uploader(options.device if options.sizes else torch.device("cpu"))
    state = {name: upload(evaluate(value, read)) for name, value in converted.tensors.items()}
    assumptions = tested_assumptions(converted, origin)
    loads, encoder = structure.check_loads(family, state, assumptions)
    checks, notes = [*check_config(converted, origin), loads], function_notes(converted, origin)
    obstacle = "--fast" if not options.sizes else "it does not load" if encoder is None else ""
    if origin and not obstacle:
        wrong = structure.check_sizes(family, encoder, origin.plan.outputs, assumptions)
        checks += wrong
        obstacle = "the source's encoder has other sizes" if wrong else ""
    if obstacle:
        return RunResults([*checks, Check(GROUP, "encoder", SKIPPED, f"not run: {obstacle}")], notes=notes)
    # Our own encoder runs in the DeepEncoder, the library of the layout otherwise.
    own = {} if converted.in_deep_encoder else {name: upload(read(each)) for name, each in converted.own.items()}
    comparisons = list(_compare_all(family, Tested(converted, encoder, own, assumptions), origin, options, upload))
    if origin:
        comparisons = [
            replace(each, check=_limited(_explain_failure(each.check, family, origin, differing), origin))
            for each in comparisons
        ]
    return _results(family, checks, notes, comparisons, options.draw)


def _results(
    family: Family, checks: Sequence[Check], notes: Sequence[str], comparisons: Sequence[Comparison], draw: bool
) -> RunResults:
    """Collect the results of all comparisons after the checks and notes of the encoder itself."""
    # A comparison that shows nothing would not have shown a mistake either.
    shown = [each for each in comparisons if each.check.verdict == PASSED]
    return RunResults(
        checks=[*checks, *(each.check for each in comparisons)],
        traces=[each.trace for each in comparisons if each.trace],
        pictures=[
            picture
            for each in comparisons
            if draw and each.features
            for picture in pictures.draw(each.check.name, *each.features)
        ],
        controls=strongest((control for each in shown for control in each.controls), family.prefix),
        reference=next((each.reference for each in comparisons if each.reference), ""),
        notes=[*notes, *(each.note for each in comparisons if each.note)],
    )


def _compare_all(
    family: Family, tested: Tested, origin: Origin | None, options: RunOptions, upload: Uploader
) -> Iterator[Comparison]:
    """Compare the encoder by itself, then in the DeepEncoder if it is made for it."""
    canonical: State = {}
    if origin is not None:
        own, canonical = _upload_source(origin, upload)
        try:
            yield from _compare_alone(family, tested, origin, own, canonical, options)
        except ModuleNotFoundError as error:
            yield _not_compared(type(tested.encoder).__name__, error)
    if tested.converted.in_deep_encoder:
        yield from _compare_in_deep_encoder(family, tested.encoder, canonical, options)


def _compare_in_deep_encoder(
    family: Family, encoder: Any, canonical: State, options: RunOptions
) -> Iterator[Comparison]:
    """Compare the encoder in the DeepEncoder at every size; without a source, check the tokens alone."""
    options.on_progress("outputs", 1, len(options.sizes) + 1)
    whole, reference = build_deep_encoder(family, encoder, options.device), None
    part = whole.model.get_submodule(family.prefix[:-1])
    make_mistakes = partial(mistakes_at_entry, family, part, family.prefix)
    if canonical:
        state = {**whole.model.state_dict(), **{family.prefix + name: value for name, value in canonical.items()}}
        try:
            reference = build_deep_encoder_reference(whole.model, state, options.device)
        except ModuleNotFoundError as error:
            yield _not_compared(whole.label, error)
            return
    for done, size in enumerate(options.sizes, 2):
        pixels = _pixels(options, size)
        if reference is None:
            yield Comparison(check_tokens(whole, pixels, options.precision))
        else:
            yield compare(whole, reference, pixels, options.precision, make_mistakes)
        options.on_progress("outputs", done, len(options.sizes) + 1)


def _compare_alone(
    family: Family, tested: Tested, origin: Origin, own: State, canonical: State, options: RunOptions
) -> Iterator[Comparison]:
    """Compare the encoder at its trained size with the source's own implementation.

    The reference of a DeepEncoder's part computes with the DeepEncoder's activation, heads and epsilon, which shows
    that the weights are right. Where the source computes with others, one more comparison shows how far outputs move.
    """
    encoder: Any
    encoder, canonical = with_optional_tensors(family, tested.encoder, canonical, tested.assumptions)
    plan, own = origin.reference_plan, _as_converted(own, origin)
    config, tests = family.config(canonical, plan.assumptions), family.probed(encoder)
    if not tested.converted.in_deep_encoder:
        with options.device:
            tests = build_reference(tested.converted.layout.mapping, encoder.config, tested.own, encoder.state_dict())
    tests.model.to(options.device)

    def make_mistakes(features: Features) -> Iterator[MistakenFeatures]:
        # Mistakes are made in copies of its blocks, whichever implementation ran.
        encoder.to(options.device, features[family.entry].dtype)
        yield from mistakes_at_entry(family, encoder, "", features)
        yield from mistakes_in_blocks(family, encoder, features)

    def compare_with(config: Any) -> Comparison:
        # Built where it runs: some libraries' initialisation takes seconds on a processor.
        with options.device:
            reference = build_reference(plan.mapping, config, own, canonical)
        reference.model.to(options.device)
        return compare(tests, reference, _pixels(options, encoder.config.image_size), options.precision, make_mistakes)

    if tested.converted.in_deep_encoder:
        yield compare_with(encoder.config)
        if differences(plan.assumptions):
            yield Comparison(check_function(compare_with(config).check, plan.assumptions))
    else:
        comparison = compare_with(config)
        detail = f"{tests.label} with the converted tensors: {comparison.check.detail}"
        yield replace(comparison, check=replace(comparison.check, detail=detail))


def _limited(check: Check, origin: Origin) -> Check:
    """A passed comparison shows nothing of the user's mapping if the reference was loaded by it."""
    if origin.known or check.verdict != PASSED:
        return check
    name = Path(origin.plan.mapping.location.file).name
    return replace(check, verdict=INCONCLUSIVE, detail=f"{check.detail}; the reference was loaded by {name} too")


def _not_compared(name: str, error: ModuleNotFoundError) -> Comparison:
    return Comparison(Check(GROUP, name, SKIPPED, f"not compared: {error.name} is not installed"))


def _pixels(options: RunOptions, size: int) -> Tensor:
    """The image as pixels (1, 3, size, size), with seeded noise so that blank patches differ."""
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
    image = pictures.pixels(options.image or pictures.page(size), size)
    return (image + 0.02 * noise).to(options.device)


def _upload_source(origin: Origin, upload: Uploader) -> tuple[State, State]:
    """The source's tensors by their own and by canonical names, each uploaded once."""
    uploaded = dict[TensorInfo, Tensor]()

    def load(tensor: TensorInfo) -> Tensor:
        if tensor not in uploaded:
            uploaded[tensor] = upload(origin.read(tensor))
        return uploaded[tensor]

    own = {name: load(tensor) for name, tensor in origin.own.items()}
    canonical = {
        # Resampled on a GPU, positions would be rounded otherwise than in the file.
        name: upload(evaluate(value, origin.read)) if is_resampled(value) else evaluate(value, load)
        for name, value in origin.reference_plan.outputs.items()
    }
    return own, canonical


def _as_converted(own: State, origin: Origin) -> State:
    """The source's tensors in the type of the converted ones."""
    types = {value.dtype.name for value in origin.reference_plan.outputs.values() if value.dtype.is_float}
    if len(types) > 1:
        return own
    dtype = torch_dtype(types.pop())
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in own.items()}


def _explain_failure(check: Check, family: Family, origin: Origin, differing: Sequence[str]) -> Check:
    """Add to a failed comparison the tensors used at its first diverging probe, and the rules that produced them."""
    plan = origin.plan
    used = family.tensors_at(check.tensors[0], plan.outputs) if check.verdict == FAILED and check.tensors else []
    if not used:
        return check
    wrong = [name for name in used if name in differing]
    if wrong:
        cause = f"{shorten(wrong, _NAMES_SHOWN)} {'differs' if len(wrong) == 1 else 'differ'} from the source"
    else:
        cause = f"the tensors used there match the source: {shorten(used, _NAMES_SHOWN)}"
    locations = sorted({plan.rules[name].location for name in wrong or used if name in plan.rules})
    detail = f"{check.detail}; {cause}; made by {', '.join(map(str, locations))}".removesuffix("; made by ")
    return replace(check, detail=detail, tensors=[*check.tensors, *(wrong or used)])
