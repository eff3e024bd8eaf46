"""Runs the converted encoders: each by itself at its trained size, then all in the DeepEncoder at every size."""

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
from converter.verification.controls import mistakes_before_blocks, mistakes_in_blocks
from converter.verification.families import FAMILIES, Family, State
from converter.verification.inputs import Converted, ConvertedEncoder, Expected, Origin
from converter.verification.outputs import GROUP, Comparison, Features, MistakenFeatures, check_tokens, compare
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


class _LoadedEncoder(NamedTuple):
    """A converted encoder with its tensors in memory, and those of its source. States are empty without a source."""

    family: Family
    converted: ConvertedEncoder
    origin: Origin | None  # None without a source
    module: Any  # Our own implementation with the converted tensors
    assumptions: Assumptions  # The values that `module` computes with; empty for the DeepEncoder's values
    native_state: State  # The file's tensors by the names of its layout; empty for a file for the DeepEncoder
    source_native_state: State  # The source's tensors by the names of its layout
    source_state: State  # The source's tensors by canonical names


def run_encoders(
    target: Converted, expected: Expected | None, checks: Sequence[Check], options: RunOptions
) -> Iterator[Comparison]:
    """Load the converted encoders, run each by itself and then all in the DeepEncoder, and compare their features.

    Args:
        target: The converted file.
        expected: The expected output of the conversion; None without a source.
        checks: The checks of the file's bytes, which explain failures.
        options: How the encoders are run.
    """
    # Nothing is uploaded to a GPU if nothing runs there.
    upload = Uploader(options.device if options.sizes else torch.device("cpu"))
    encoders: list[_LoadedEncoder] = []
    for converted in target.encoders:
        origin = expected.origins[converted.family] if expected else None
        encoder, comparisons = _load(converted, target.read, origin, options, upload)
        if encoder:
            encoders.append(encoder)
            comparisons += _explain(_compare_alone(encoder, options), [encoder], checks)
        prefix = f"{converted.family}: " if len(target.encoders) > 1 else ""
        yield from (_prefix_names(prefix, comparison) for comparison in comparisons)
    if encoders and encoders[0].converted.in_deep_encoder:
        yield from _explain(_compare_in_deep_encoder(encoders, options), encoders, checks)


def _load(
    converted: ConvertedEncoder, read: Reader, origin: Origin | None, options: RunOptions, upload: Uploader
) -> tuple[_LoadedEncoder | None, list[Comparison]]:
    """Load an encoder. Return it, or None if it cannot be run, and the checks of its structure."""
    family = FAMILIES[converted.family]
    state = {name: upload(evaluate(value, read)) for name, value in converted.tensors.items()}
    assumptions = functions.tested_assumptions(converted, origin)
    load_check, module = structure.check_loads(family, state, assumptions)
    comparisons = [Comparison(check) for check in functions.check_config(converted, origin)]
    comparisons.append(Comparison(load_check, note=functions.function_note(converted, origin)))
    obstacle = ""
    if not options.sizes:
        obstacle = "--fast"
    elif module is None:
        obstacle = "it does not load"
    elif origin and (failed := structure.check_sizes(family, module, origin.plan.outputs, assumptions)):
        comparisons += map(Comparison, failed)
        obstacle = "the source's encoder has other sizes"
    if obstacle:
        return None, [*comparisons, Comparison(Check(GROUP, "encoder", SKIPPED, f"not run: {obstacle}"))]
    native_state = {}
    # A file for the layout's own library is run by this library, not by our own implementation.
    if not converted.in_deep_encoder:
        native_state = {name: upload(read(tensor)) for name, tensor in converted.native_tensors.items()}
    source_states = _upload_source(origin, upload) if origin else ({}, {})
    return _LoadedEncoder(family, converted, origin, module, assumptions, native_state, *source_states), comparisons


def _prefix_names(prefix: str, comparison: Comparison) -> Comparison:
    """Put a prefix before the names of a comparison's check and trace."""
    trace = comparison.trace and replace(comparison.trace, name=prefix + comparison.trace.name)
    return replace(comparison, check=replace(comparison.check, name=prefix + comparison.check.name), trace=trace)


def _compare_in_deep_encoder(encoders: Sequence[_LoadedEncoder], options: RunOptions) -> Iterator[Comparison]:
    """Compare the encoders in the DeepEncoder at every size; without a source, only check its tokens."""
    options.on_progress("outputs", 1, len(options.sizes) + 1)
    modules = {encoder.family: encoder.module for encoder in encoders}
    try:
        whole = deep_encoder.build_deep_encoder(modules, options.device)
    except ValueError as error:
        yield Comparison(Check(structure.GROUP, "DeepEncoder", FAILED, str(error)))
        return
    reference = None
    if all(encoder.source_state for encoder in encoders):
        state = dict(whole.model.state_dict())
        for encoder in encoders:
            state |= {encoder.family.prefix + name: tensor for name, tensor in encoder.source_state.items()}
        try:
            reference = deep_encoder.build_deep_encoder_reference(whole.model, state, options.device)
        except ModuleNotFoundError as error:
            yield _not_compared(whole.label, error)
            return

    def make_mistakes(features: Features) -> Iterator[MistakenFeatures]:
        for family in modules:
            yield from mistakes_before_blocks(family, whole.model, family.prefix, features)

    for done, size in enumerate(options.sizes, 2):
        pixels = _pixels(options, size)
        if reference is None:
            yield Comparison(check_tokens(whole, pixels, options.precision))
        else:
            yield compare(whole, reference, pixels, options.precision, make_mistakes)
        options.on_progress("outputs", done, len(options.sizes) + 1)


def _compare_alone(encoder: _LoadedEncoder, options: RunOptions) -> Iterator[Comparison]:
    """Compare an encoder by itself with its source, if there is one."""
    try:
        if encoder.origin:
            yield from _compare_with_source(encoder, encoder.origin, options)
    except ModuleNotFoundError as error:
        yield _not_compared(type(encoder.module).__name__, error)


def _compare_with_source(encoder: _LoadedEncoder, origin: Origin, options: RunOptions) -> Iterator[Comparison]:
    """Compare an encoder with its reference.

    The reference of a DeepEncoder's part computes with the DeepEncoder's activation, heads and epsilon, which shows
    that the weights are right. If the source computes with others, one more comparison shows how far outputs move.
    """
    family, plan, in_deep_encoder = encoder.family, origin.reference_plan, encoder.converted.in_deep_encoder
    module: Any
    module, source_state = deep_encoder.with_optional_tensors(
        family, encoder.module, encoder.source_state, encoder.assumptions
    )
    source_config = family.config(source_state, plan.assumptions)
    if in_deep_encoder:
        configs = [module.config, source_config] if differences(plan.assumptions) else [module.config]
        tested = family.probed(module)
    else:
        configs = [source_config]
        mapping = encoder.converted.layout.mapping
        with options.device:
            tested = build_reference(mapping, module.config, encoder.native_state, module.state_dict())
    tested.model.to(options.device)
    source_native_state = _cast_like_outputs(encoder.source_native_state, origin)
    pixels = family.input(module.config, lambda size: _pixels(options, size)).to(options.device)

    def make_mistakes(features: Features) -> Iterator[MistakenFeatures]:
        # Mistakes are made in copies of the module's blocks, even if another implementation was tested.
        module.to(options.device, features[family.block_input_probe].dtype)
        yield from mistakes_before_blocks(family, module, "", features)
        yield from mistakes_in_blocks(family, module, features)

    for config in configs:
        # Built where it runs: some libraries' initialisation takes seconds on a processor.
        with options.device:
            reference = build_reference(plan.mapping, config, source_native_state, source_state)
        reference.model.to(options.device)
        comparison = compare(tested, reference, pixels, options.precision, make_mistakes)
        if not in_deep_encoder:
            detail = f"{tested.label} with the converted tensors: {comparison.check.detail}"
            comparison = replace(comparison, check=replace(comparison.check, detail=detail))
        if config is not configs[0]:
            comparison = Comparison(functions.check_function(comparison.check, plan.assumptions))
        yield comparison
    yield from map(Comparison, functions.check_unusable_values(plan.assumptions))


def _not_compared(name: str, error: ModuleNotFoundError) -> Comparison:
    return Comparison(Check(GROUP, name, SKIPPED, f"not compared: {error.name} is not installed"))


def _pixels(options: RunOptions, size: int) -> Tensor:
    """Return the image as pixels (1, 3, size, size), with seeded noise so that blank patches differ."""
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
    image = pictures.to_pixels(options.image or pictures.draw_page(size), size)
    return (image + 0.02 * noise).to(options.device)


def _upload_source(origin: Origin, upload: Uploader) -> tuple[State, State]:
    """Return the source's tensors by the names of its layout and by canonical names, each uploaded once."""
    load = functools.cache(lambda tensor: upload(origin.read(tensor)))
    native_state = {name: load(tensor) for name, tensor in origin.native_tensors.items()}
    canonical_state = {
        # Positions are resampled on the CPU, as a GPU would round differently from the conversion.
        name: upload(evaluate(value, origin.read)) if is_resampled(value) else evaluate(value, load)
        for name, value in origin.reference_plan.outputs.items()
    }
    return native_state, canonical_state


def _cast_like_outputs(state: State, origin: Origin) -> State:
    """Cast the source's tensors to the floating-point type of the converted ones, if these have only one."""
    types = {value.dtype.name for value in origin.reference_plan.outputs.values() if value.dtype.is_float}
    if len(types) > 1:
        return state
    dtype = torch_dtype(types.pop())
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _explain(
    comparisons: Iterable[Comparison], encoders: Sequence[_LoadedEncoder], checks: Sequence[Check]
) -> Iterator[Comparison]:
    """Add the causes of failures; mark comparisons as inconclusive if the user's mapping loaded the reference too."""
    origin = encoders[0].origin
    for comparison in comparisons:
        check = comparison.check
        if check.verdict == FAILED and check.tensors:
            check = _add_cause(check, encoders, checks)
        elif check.verdict == PASSED and origin and not origin.builtin_plan:
            detail = f"{check.detail}; the reference was loaded by {Path(origin.plan.mapping.location.file).name} too"
            check = replace(check, verdict=INCONCLUSIVE, detail=detail)
        yield replace(comparison, check=check)


def _add_cause(check: Check, encoders: Sequence[_LoadedEncoder], checks: Sequence[Check]) -> Check:
    """Add to a failed comparison the tensors used at its first diverging probe, and the rules that produced them."""
    used, wrong, rules = list[str](), list[str](), dict[str, Rule]()
    for encoder in encoders:
        if encoder.origin:
            plan, differing = encoder.origin.plan, differing_tensors(encoder.converted, checks)
            names = encoder.family.tensors_before(check.tensors[0], plan.outputs)
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
    """Return a sentence for each library that is not installed, on what is not compared without it."""
    for_libraries = [encoder for encoder in target.encoders if not encoder.in_deep_encoder]
    runs = [(origin.reference_plan.mapping, bool(origin.native_tensors)) for origin in expected.origins.values()]
    runs += [(encoder.layout.mapping, bool(encoder.native_tensors)) for encoder in for_libraries]
    notices = [] if for_libraries else [_missing_for_deep_encoders()]
    notices += [_missing_for_encoder(mapping, has_native) for mapping, has_native in runs]
    return [notice for notice in dict.fromkeys(notices) if notice]


def _missing_for_deep_encoders() -> str:
    references = [reference for candidates in deep_encoder.REFERENCES.values() for reference in candidates]
    if any(reference.installed for reference in references):
        return ""
    return _sentence([references[-1].module], "the whole DeepEncoder is not compared")


def _missing_for_encoder(mapping: LayoutMapping, has_native: bool) -> str:
    """Return what is not compared, or not directly; `has_native` says if the layout's library can load the tensors."""
    native, general = REFERENCES.get(mapping.name) if has_native else None, REFERENCES[f"{mapping.family}-hf"]
    best = native or general
    if best.installed:
        return ""
    if general.installed:
        return _sentence([best.module], f"{mapping.name} is compared with {general.module} through our own mapping")
    return _sentence(list(dict.fromkeys((best.module, general.module))), "the encoder is not compared")


def _sentence(modules: list[str], effect: str) -> str:
    packages = [module.partition(".")[0] for module in modules]
    commands = " or ".join(f"pip install {_DISTRIBUTIONS.get(package, package)}" for package in packages)
    return f"{' and '.join(packages)} not installed: {effect}. To compare: {commands}; to run nothing: --fast"
