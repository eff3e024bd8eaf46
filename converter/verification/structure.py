"""The first proof: names, shapes and types are the target's, and the weights could show a mistake."""

from __future__ import annotations

import math

import torch

from converter.encoders import ClipConfig, ClipEncoder, SamConfig, SamEncoder, clip_config_from, sam_config_from
from converter.errors import LayoutError, MappingError
from converter.layouts import registry
from converter.output.names import shorten
from converter.plan.plan import Plan, make_plan
from converter.tensors.lazy_tensor import lazy_read
from converter.tensors.tensor_info import TensorInfo
from converter.verification.inputs import Converted
from converter.verification.reference_models import uninitialised
from converter.verification.reference_readers import Reader
from converter.verification.result import Check, failed, passed, warning

GROUP = "structure"

_INDICES = "embeddings.position_ids"


def prove(target: Converted, found: Reader) -> list[Check]:
    """All that can be told without running anything; `found` gives the tensors."""
    tensors = target.state_dict.tensors
    layout, plan = _check_layout(target.source.name, target.family, tensors)
    return [layout, *_check_missing(plan), *_check_types(tensors), *_check_values(list(tensors), found)]


def _check_layout(name: str, family: str, tensors: dict[str, TensorInfo]) -> tuple[Check, Plan | None]:
    """Names, shapes and types against the target layout; the plan is what the file says it is."""
    canonical = registry.canonical(family)
    try:
        plan = make_plan(
            canonical.mapping,
            "",
            canonical,
            {key: lazy_read(tensor) for key, tensor in tensors.items()},
            name,
        )
    except MappingError as error:
        problems = error.message.splitlines()
        return failed(GROUP, "layout", f"does not fit {canonical.name}: {problems[0]}", problems), None
    lacking, extra = list(plan.generated), list(plan.dropped)
    if lacking or extra:
        detail = "; ".join([*(f"{key} is missing" for key in lacking), *(f"{key} is too much" for key in extra)])
        return failed(GROUP, "layout", f"does not fit {canonical.name}: {detail}", lacking + extra), plan
    return passed(GROUP, "layout", f"{len(tensors)} tensors have the names, shapes and types of {canonical.name}"), plan


def _check_missing(plan: Plan | None) -> list[Check]:
    """What the target has and the file may lack, which those who load it strictly should know."""
    if plan is None or not plan.missing:
        return []
    names = ", ".join(plan.missing)
    why = "; ".join(dict.fromkeys(plan.missing.values()))
    return [warning(GROUP, "missing", f"loading it misses exactly {names}: {why}", list(plan.missing))]


def _check_types(tensors: dict[str, TensorInfo]) -> list[Check]:
    """Floating-point tensors of several types, which no loader minds and no training script expects."""
    by_type: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype.is_float:
            by_type.setdefault(tensor.dtype.name, []).append(name)
    if len(by_type) < 2:
        return []
    *_, few = sorted(by_type.values(), key=len, reverse=True)
    counts = ", ".join(f"{len(names)} {dtype}" for dtype, names in by_type.items())
    return [warning(GROUP, "types", f"its tensors are of several types: {counts}; {few[0]} is of the rarest", few)]


def _check_values(names: list[str], get: Reader) -> list[Check]:
    """NaN and infinity are wrong; constant tensors are pointed out, for exchanging them would change nothing."""
    broken: dict[str, str] = {}
    zero: list[str] = []
    constant: list[str] = []
    for name in names:
        tensor = get(name)
        # Types of one byte have few operations of their own.
        tensor = tensor.float() if tensor.element_size() == 1 else tensor
        lowest, highest = _range(tensor)
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            broken[name] = f"{name} ({int((~tensor.isfinite()).sum())} of {tensor.numel()} elements)"
        elif lowest == highest and tensor.numel() > 1:
            (constant if lowest else zero).append(name)
    pointed_out = [*_pointed_out("zero", "all zero", zero), *_pointed_out("constant", "constant", constant)]
    if broken:
        detail = f"NaN or infinity in {len(broken)} of {len(names)} tensors: {shorten(list(broken.values()))}"
        return [failed(GROUP, "finite", detail, list(broken)), *pointed_out]
    return [passed(GROUP, "finite", f"no NaN and no infinity in {len(names)} tensors"), *pointed_out]


def _range(tensor: torch.Tensor) -> tuple[float, float]:
    """The lowest and the highest element, found in one pass; NaN where any is."""
    if not tensor.numel():
        return 0.0, 0.0
    lowest, highest = torch.aminmax(tensor)
    return float(lowest), float(highest)


def _pointed_out(name: str, what: str, names: list[str]) -> list[Check]:
    if not names:
        return []
    detail = f"{what}: {shorten(names)}; outputs cannot show where such tensors are exchanged"
    return [warning(GROUP, name, detail, names)]


def check_loads(family: str, tensors: dict[str, torch.Tensor]) -> tuple[Check, torch.nn.Module | None]:
    """Whether the encoder loads the tensors strictly, built as they say it is; and the loaded encoder."""
    if not _indices_fit(tensors):
        detail = f"{_INDICES} is of no integer type, or points outside its table"
        return failed(GROUP, "loads", detail, [_INDICES]), None
    try:
        # Not on the meta device: its arange would import half a second of symbolic shapes.
        with uninitialised():
            config = _config(family, tensors)
            encoder = SamEncoder(config) if isinstance(config, SamConfig) else ClipEncoder(config)
        # Assigned, not copied: the encoder takes the tensors' types, and a gigabyte is not held twice.
        encoder.load_state_dict(tensors, strict=True, assign=True)
    except (LayoutError, RuntimeError) as error:
        return failed(GROUP, "loads", f"the encoder does not load it: {error}", []), None
    return passed(GROUP, "loads", f"{type(encoder).__name__} loads it strictly"), encoder.eval()


def _config(family: str, tensors: dict[str, torch.Tensor]) -> SamConfig | ClipConfig:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return sam_config_from(shapes) if family == "sam" else clip_config_from(shapes)


def _indices_fit(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether position_ids can be run: on a GPU an index out of range ends the whole process."""
    ids, table = tensors.get(_INDICES), tensors.get("embeddings.position_embedding.weight")
    if ids is None or table is None or not ids.numel():
        return True
    return ids.dtype in (torch.int32, torch.int64) and int(ids.min()) >= 0 and int(ids.max()) < len(table)


def check_sizes(family: str, encoder: torch.nn.Module, canonical: dict[str, torch.Tensor]) -> Check | None:
    """None if the encoder is built as the source's tensors, by the canonical names, say that theirs is."""
    theirs, ours = vars(_config(family, canonical)), vars(encoder.config)
    differing = [name for name, value in theirs.items() if ours[name] != value]
    detail = "; ".join(f"{name} is {ours[name]}, the source's {theirs[name]}" for name in differing)
    return failed(GROUP, "sizes", detail, []) if differing else None
