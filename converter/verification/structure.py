"""Checks names, shapes and types against the target layout, that encoders load, and that all weights are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from converter.errors import LayoutError, MappingError, first_names
from converter.layouts import registry
from converter.output.names import grouped
from converter.plan.assumptions import Assumptions
from converter.plan.plan import make_plan
from converter.tensors.lazy_tensor import LazyTensor, all_source_tensors, lazy_read
from converter.tensors.tensor_info import TensorInfo
from converter.verification.families import Family, State
from converter.verification.inputs import Converted
from converter.verification.record_check import header_metadata
from converter.verification.result import FAILED, PASSED, WARNING, Check

GROUP = "structure"

_POSITION_IDS = "embeddings.position_ids"


def check_structure(target: Converted) -> list[Check]:
    """Return the checks of a converted file that need no encoder."""
    checks = []
    claimed_layout = header_metadata(target.source).get("layout")
    if claimed_layout not in (None, target.layout):
        detail = f"its header says {claimed_layout}, but its tensors have the names of {target.layout}"
        checks.append(Check(GROUP, "claim", FAILED, detail, list(target.tensors)))
    for encoder in target.encoders:
        layout = encoder.layout.name
        if encoder.layout.is_canonical and not encoder.prefix:
            checks += _check_canonical(target)
        else:
            planned = (*encoder.tensors.values(), *encoder.extra_tensors.values())
            num_tensors = len({tensor.key for tensor in all_source_tensors(planned)})
            checks.append(_check_fit(f"layout {layout}", layout, num_tensors, encoder.problem))
    # llama.cpp stores norms and biases in float32, whatever the type of the matrices.
    types = [] if "GGUF" in target.source.containers else _check_types(target.tensors)
    return [*checks, *types, *_check_values(target)]


def _check_fit(name: str, layout: str, num_tensors: int, problem: str = "") -> Check:
    """Return a check of names, shapes and types, which fails with the lines of `problem` if there are any."""
    if problems := problem.splitlines():
        return Check(GROUP, name, FAILED, f"does not fit {layout}: {problems[0]}", problems)
    return Check(GROUP, name, PASSED, f"{num_tensors} tensors have the names, shapes and types of {layout}")


def _check_canonical(target: Converted) -> list[Check]:
    """Check names, shapes and types against the canonical layout, by planning a copy of the file in this layout.

    Warn about missing tensors that the layout allows to be missing, as a strict load fails without them.
    """
    layout, tensors = registry.canonical(target.family), target.tensors
    values = {key: lazy_read(tensor) for key, tensor in tensors.items()}
    try:
        plan = make_plan(layout.mapping, "", layout, values, target.source.name)
    except MappingError as error:
        return [_check_fit("layout", layout.name, len(tensors), error.message)]
    problems = [f"missing tensor {key}" for key in plan.generated]
    problems += [f"unexpected tensor {key}" for key in plan.dropped]
    if problems:
        detail = f"does not fit {layout.name}: {'; '.join(problems)}"
        checks = [Check(GROUP, "layout", FAILED, detail, [*plan.generated, *plan.dropped])]
    else:
        checks = [_check_fit("layout", layout.name, len(tensors))]
    if plan.missing:
        reasons = "; ".join(dict.fromkeys(plan.missing.values()))
        detail = f"loading it misses exactly {', '.join(plan.missing)}: {reasons}"
        checks.append(Check(GROUP, "missing", WARNING, detail, list(plan.missing)))
    return checks


def _check_types(tensors: Mapping[str, TensorInfo]) -> list[Check]:
    by_type = grouped((tensor.dtype.name, name) for name, tensor in tensors.items() if tensor.dtype.is_float)
    if len(by_type) < 2:
        return []
    rarest = sorted(by_type.values(), key=len, reverse=True)[-1]
    counts = ", ".join(f"{len(names)} {dtype}" for dtype, names in by_type.items())
    return [Check(GROUP, "types", WARNING, f"tensors of several types: {counts}; {rarest[0]} is of the rarest", rarest)]


def _check_values(target: Converted) -> list[Check]:
    """Check for NaN and infinity; warn about constant tensors, which could be exchanged without any effect."""
    not_finite: dict[str, str] = {}
    constant: dict[str, list[str]] = {"zero": [], "constant": []}
    readable = [name for name, tensor in target.tensors.items() if tensor.dtype.bits]
    for name in readable:
        tensor = target.read(target.tensors[name])
        if not tensor.numel():
            continue
        # torch has few operations for types of one byte.
        tensor = tensor.float() if tensor.element_size() == 1 else tensor
        lowest, highest = map(float, torch.aminmax(tensor))
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            not_finite[name] = f"{name} ({int((~tensor.isfinite()).sum())} of {tensor.numel()} elements)"
        elif lowest == highest and tensor.numel() > 1:
            constant["constant" if lowest else "zero"].append(name)
    checks = [Check(GROUP, "finite", PASSED, f"no NaN and no infinity in {len(readable)} tensors")]
    if not_finite:
        names = first_names(list(not_finite.values()))
        detail = f"NaN or infinity in {len(not_finite)} of {len(readable)} tensors: {names}"
        checks = [Check(GROUP, "finite", FAILED, detail, list(not_finite))]
    for kind, tensors in constant.items():
        detail = f"{'all zero' if kind == 'zero' else kind}: {first_names(tensors)}"
        detail += "; outputs cannot show whether such tensors are exchanged"
        checks += [Check(GROUP, kind, WARNING, detail, tensors)] if tensors else []
    return checks


def check_loads(family: Family, tensors: State, assumptions: Assumptions) -> tuple[Check, Any]:
    """Check that the encoder loads the tensors strictly. Return the check and the encoder, or None if it does not load.

    Args:
        family: The encoder's family.
        tensors: The encoder's tensors by canonical names.
        assumptions: The values that no tensor shows; empty for the DeepEncoder's values.
    """
    if not _has_valid_position_ids(tensors):
        detail = f"{_POSITION_IDS} has no integer type, or an index outside of its table"
        return Check(GROUP, "loads", FAILED, detail, [_POSITION_IDS]), None
    try:
        encoder = family.load(tensors, assumptions)
    except (LayoutError, RuntimeError) as error:
        return Check(GROUP, "loads", FAILED, f"the encoder does not load it: {error}", []), None
    return Check(GROUP, "loads", PASSED, f"{type(encoder).__name__} loads it strictly"), encoder


def _has_valid_position_ids(tensors: State) -> bool:
    """Return whether position_ids select rows of the table: on a GPU, an index out of range ends the whole process."""
    ids, table = tensors.get(_POSITION_IDS), tensors.get("embeddings.position_embedding.weight")
    if ids is None or table is None or not ids.numel():
        return True
    return ids.dtype in (torch.int32, torch.int64) and int(ids.min()) >= 0 and int(ids.max()) < len(table)


def check_sizes(
    family: Family, encoder: Any, canonical: Mapping[str, LazyTensor], assumptions: Assumptions
) -> list[Check]:
    """Return a failed check if the source's tensors imply another config than the encoder's, else no check.

    Args:
        family: The encoder's family.
        encoder: The converted encoder.
        canonical: The source's tensors by canonical names.
        assumptions: The values that no tensor shows, with which the encoder was loaded.
    """
    layout, state = registry.canonical(family.name), encoder.state_dict()
    # A file for another library may lack tensors that only the DeepEncoder has.
    compared = {name: value for name, value in canonical.items() if name in state or not layout.is_optional(name)}
    expected, actual = vars(family.config(compared, assumptions)), vars(encoder.config)
    differing = [name for name, value in expected.items() if actual[name] != value]
    detail = "; ".join(f"{name} is {actual[name]}, in the source {expected[name]}" for name in differing)
    return [Check(GROUP, "sizes", FAILED, detail, [])] if differing else []
