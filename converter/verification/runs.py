"""Runs of the converted encoders: each by itself at its trained size, then all in the DeepEncoder at every size."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from converter.errors import first_names
from converter.layouts.spec import LayoutMapping, Rule
from converter.output.memory import Uploader
from converter.plan.assumptions import Assumptions, differences
from converter.storage.progress import OnProgress
from converter.tensors.evaluate import evaluate, torch_dtype
from converter.tensors.lazy_tensor import is_resampled
from converter.verification import deep_encoder, functions, pictures, structure
from converter.verification.controls import mistakes_at_entry, mistakes_in_blocks
from converter.verification.families import FAMILIES, Family, State
from converter.verification.inputs import Converted, ConvertedEncoder, Expected, Origin
from converter.verification.outputs import GROUP, Comparison, Features, Mistaken, check_tokens, compare
from converter.verification.reference_models import REFERENCES, build_reference
from converter.verification.reference_readers import Reader
from converter.verification.result import FAILED, INCONCLUSIVE, PASSED, SKIPPED, Check
from converter.verification.weights import differing_tensors

# A block of SAM has fourteen tensors: too many to list.
_NAMES_SHOWN = 4
# Names on the package index, where they are not those of the modules.
_DISTRIBUTIONS = {"segment_anything": "segment-anything", "open_clip": "open_clip_torch"}


@dataclass(frozen=True)
class RunOptions:
    """How the encoders are run."""

    device: torch.device
    precision: torch.dtype
    sizes: Sequence[int]  # Pixels along a side at which the whole DeepEncoder runs; none to run nothing
    image: Image | None  # The input; None for a drawn page
    draw: bool  # Whether pictures of the features are made
    on_progress: OnProgress


class _Tested(NamedTuple):
    """A converted encoder, loaded, and its source's tensors."""

    family: Family
    converted: ConvertedEncoder
    origin: Origin | None
    encoder: Any  # Our own encoder with its tensors
    assumptions: Assumptions  # What no tensor shows, as the encoder was loaded with; empty for the DeepEncoder's values
    own: State  # The file's tensors by the names of its layout, for its library; none for the DeepEncoder
    source_own: State  # The source's tensors by the names of its layout
    source: State  # The source's tensors by canonical names; none without a source


def run_encoders(
    target: Converted, expected: Expected | None, checks: Sequence[Check], options: RunOptions
) -> Iterator[Comparison]:
    """Load the converted encoders, run each by itself and then all in the DeepEncoder, and compare their features.

    Args:
        target: The converted file.
        expected: What should have been written, if a source was specified.
        checks: The checks of the file's bytes.
        options: How the encoders are run.
    """
    # Nothing is uploaded to a GPU if nothing runs there.
    upload = Uploader(options.device if options.sizes else torch.device("cpu"))
    loaded: list[_Tested] = []
    for converted in target.encoders:
        origin = expected.origins[converted.family] if expected else None
        tested, comparisons = _load(converted, target.read, origin, options, upload)
        if tested:
            loaded.append(tested)
            comparisons += _explained(_compare_alone(tested, options), [tested], checks)
        prefix = f"{converted.family}: " if len(target.encoders) > 1 else ""
        yield from (_named(prefix, comparison) for comparison in comparisons)
    if loaded and loaded[0].converted.in_deep_encoder:
        yield from _explained(_compare_in_deep_encoder(loaded, options), loaded, checks)


def _load(
    converted: ConvertedEncoder, read: Reader, origin: Origin | None, options: RunOptions, upload: Uploader
) -> tuple[_Tested | None, list[Comparison]]:
    """Load an encoder; None if it cannot be run, and its checks with the reason."""
    family = FAMILIES[converted.family]
    state = {name: upload(evaluate(value, read)) for name, value in converted.tensors.items()}
    assumptions = functions.tested_assumptions(converted, origin)
    loads, encoder = structure.check_loads(family, state, assumptions)
    comparisons = [Comparison(check) for check in functions.check_config(converted, origin)]
    comparisons.append(Comparison(loads, note=functions.function_note(converted, origin)))
    obstacle = "--fast" if not options.sizes else "it does not load" if encoder is None else ""
    if origin and not obstacle:
        wrong = structure.check_sizes(family, encoder, origin.plan.outputs, assumptions)
        comparisons += map(Comparison, wrong)
        obstacle = "the source's encoder has other sizes" if wrong else ""
    if obstacle:
        return None, [*comparisons, Comparison(Check(GROUP, "encoder", SKIPPED, f"not run: {obstacle}"))]
    # Our own encoder runs in the DeepEncoder, the library of the layout otherwise.
    own = {} if converted.in_deep_encoder else {name: upload(read(each)) for name, each in converted.own.items()}
    sources = _upload_source(origin, upload) if origin else ({}, {})
    return _Tested(family, converted, origin, encoder, assumptions, own, *sources), comparisons


def _named(prefix: str, comparison: Comparison) -> Comparison:
    trace = comparison.trace and replace(comparison.trace, name=prefix + comparison.trace.name)
    return replace(comparison, check=replace(comparison.check, name=prefix + comparison.check.name), trace=trace)


def _compare_in_deep_encoder(tested: Sequence[_Tested], options: RunOptions) -> Iterator[Comparison]:
    """Compare the encoders in the DeepEncoder at every size; without a source, check the tokens alone."""
    options.on_progress("outputs", 1, len(options.sizes) + 1)
    try:
        whole = deep_encoder.build_deep_encoder({each.family: each.encoder for each in tested}, options.device)
    except ValueError as error:
        yield Comparison(Check(structure.GROUP, "DeepEncoder", FAILED, str(error)))
        return
    reference = None
    if all(each.source for each in tested):
        canonical = {each.family.prefix + name: value for each in tested for name, value in each.source.items()}
        try:
            state = {**whole.model.state_dict(), **canonical}
            reference = deep_encoder.build_deep_encoder_reference(whole.model, state, options.device)
        except ModuleNotFoundError as error:
            yield _not_compared(whole.label, error)
            return

    def make_mistakes(features: Features) -> Iterator[Mistaken]:
        for each in tested:
            yield from mistakes_at_entry(each.family, whole.model, each.family.prefix, features)

    for done, size in enumerate(options.sizes, 2):
        pixels = _pixels(options, size)
        if reference is None:
            yield Comparison(check_tokens(whole, pixels, options.precision))
        else:
            yield compare(whole, reference, pixels, options.precision, make_mistakes)
        options.on_progress("outputs", done, len(options.sizes) + 1)


def _compare_alone(tested: _Tested, options: RunOptions) -> Iterator[Comparison]:
    try:
        if tested.origin:
            yield from _compare_with_source(tested, tested.origin, options)
    except ModuleNotFoundError as error:
        yield _not_compared(type(tested.encoder).__name__, error)


def _compare_with_source(tested: _Tested, origin: Origin, options: RunOptions) -> Iterator[Comparison]:
    """Compare an encoder with its reference.

    The reference of a DeepEncoder's part computes with the DeepEncoder's activation, heads and epsilon, which shows
    that the weights are right. Where the source computes with others, one more comparison shows how far outputs move.
    """
    family, plan, in_deep_encoder = tested.family, origin.reference_plan, tested.converted.in_deep_encoder
    encoder: Any
    encoder, canonical = deep_encoder.with_optional_tensors(family, tested.encoder, tested.source, tested.assumptions)
    configs, tests = [family.config(canonical, plan.assumptions)], family.probed(encoder)
    if in_deep_encoder:
        configs = [encoder.config, *(configs if differences(plan.assumptions) else [])]
    else:
        with options.device:
            tests = build_reference(tested.converted.layout.mapping, encoder.config, tested.own, encoder.state_dict())
    tests.model.to(options.device)
    own = _as_converted(tested.source_own, origin)
    pixels = family.input(encoder.config, lambda size: _pixels(options, size)).to(options.device)

    def make_mistakes(features: Features) -> Iterator[Mistaken]:
        # Mistakes are made in copies of its blocks, whichever implementation ran.
        encoder.to(options.device, features[family.entry].dtype)
        yield from mistakes_at_entry(family, encoder, "", features)
        yield from mistakes_in_blocks(family, encoder, features)

    for config in configs:
        # Built where it runs: some libraries' initialisation takes seconds on a processor.
        with options.device:
            reference = build_reference(plan.mapping, config, own, canonical)
        reference.model.to(options.device)
        comparison = compare(tests, reference, pixels, options.precision, make_mistakes)
        if not in_deep_encoder:
            detail = f"{tests.label} with the converted tensors: {comparison.check.detail}"
            comparison = replace(comparison, check=replace(comparison.check, detail=detail))
        if config is not configs[0]:
            comparison = Comparison(functions.check_function(comparison.check, plan.assumptions))
        yield comparison
    yield from map(Comparison, functions.check_assumed(plan.assumptions))


def _not_compared(name: str, error: ModuleNotFoundError) -> Comparison:
    return Comparison(Check(GROUP, name, SKIPPED, f"not compared: {error.name} is not installed"))


def _pixels(options: RunOptions, size: int) -> Tensor:
    """The image as pixels (1, 3, size, size), with seeded noise so that blank patches differ."""
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
    image = pictures.pixels(options.image or pictures.page(size), size)
    return (image + 0.02 * noise).to(options.device)


def _upload_source(origin: Origin, upload: Uploader) -> tuple[State, State]:
    """The source's tensors by their own and by canonical names, each uploaded once."""
    load = functools.cache(lambda tensor: upload(origin.read(tensor)))
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


def _explained(
    comparisons: Iterable[Comparison], tested: Sequence[_Tested], checks: Sequence[Check]
) -> Iterator[Comparison]:
    """Comparisons with the causes of failures, and inconclusive where the user's mapping loaded the reference too."""
    origin = tested[0].origin
    for comparison in comparisons:
        check = comparison.check
        if check.verdict == FAILED and check.tensors:
            check = _with_cause(check, tested, checks)
        elif check.verdict == PASSED and origin and not origin.known:
            detail = f"{check.detail}; the reference was loaded by {Path(origin.plan.mapping.location.file).name} too"
            check = replace(check, verdict=INCONCLUSIVE, detail=detail)
        yield replace(comparison, check=check)


def _with_cause(check: Check, tested: Sequence[_Tested], checks: Sequence[Check]) -> Check:
    """Add to a failed comparison the tensors used at its first diverging probe, and the rules that produced them."""
    used, wrong, rules = list[str](), list[str](), dict[str, Rule]()
    for each in tested:
        if each.origin:
            plan, differing = each.origin.plan, differing_tensors(each.converted, checks)
            names = each.family.tensors_at(check.tensors[0], plan.outputs)
            used += names
            wrong += [name for name in names if name in differing]
            rules |= {name: plan.rules[name] for name in names if name in plan.rules}
    if not used:
        return check
    if wrong:
        cause = f"{first_names(wrong, _NAMES_SHOWN)} {'differs' if len(wrong) == 1 else 'differ'} from the source"
    else:
        cause = f"the tensors used there match the source: {first_names(used, _NAMES_SHOWN)}"
    locations = sorted({rules[name].location for name in wrong or used if name in rules})
    detail = f"{check.detail}; {cause}; made by {', '.join(map(str, locations))}".removesuffix("; made by ")
    return replace(check, detail=detail, tensors=[*check.tensors, *(wrong or used)])


def missing_requirements(target: Converted, expected: Expected) -> list[str]:
    """A sentence for each library that is missing: what is not compared for want of it."""
    others = [encoder for encoder in target.encoders if not encoder.in_deep_encoder]
    sides = [(origin.reference_plan.mapping, bool(origin.own)) for origin in expected.origins.values()]
    sides += [(encoder.layout.mapping, bool(encoder.own)) for encoder in others]
    found = [] if others else [_missing_for_deep_encoders()]
    found += [_missing_for_encoder(mapping, has_own) for mapping, has_own in sides]
    return [notice for notice in dict.fromkeys(found) if notice]


def _missing_for_deep_encoders() -> str:
    references = [reference for candidates in deep_encoder.REFERENCES.values() for reference in candidates]
    if any(reference.installed for reference in references):
        return ""
    return _sentence([references[-1].module], "the whole DeepEncoder is not compared")


def _missing_for_encoder(mapping: LayoutMapping, has_own: bool) -> str:
    """What is not compared, or compared less directly; `has_own`: whether the layout's library can load the tensors."""
    own, general = REFERENCES.get(mapping.name) if has_own else None, REFERENCES[f"{mapping.family}-hf"]
    best = own or general
    if best.installed:
        return ""
    if general.installed:
        return _sentence([best.module], f"{mapping.name} is compared with {general.module} through our own mapping")
    return _sentence(list(dict.fromkeys((best.module, general.module))), "the encoder is not compared")


def _sentence(modules: list[str], effect: str) -> str:
    packages = [module.partition(".")[0] for module in modules]
    commands = " or ".join(f"pip install {_DISTRIBUTIONS.get(package, package)}" for package in packages)
    return f"{' and '.join(packages)} not installed: {effect}. To compare: {commands}; to run nothing: --fast"
