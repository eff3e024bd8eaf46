"""Requirements: the libraries that outputs are compared with, looked for before any work begins."""

from __future__ import annotations

from converter.layouts.spec import LayoutMapping
from converter.verification import deep_encoder
from converter.verification.inputs import Converted, Expected
from converter.verification.reference_models import REFERENCES

# Names on the package index, where they are not those of the modules.
_DISTRIBUTIONS = {"segment_anything": "segment-anything", "open_clip": "open_clip_torch"}


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
