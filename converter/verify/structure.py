"""The first proof: names, shapes and types are the target's, and the weights could show a mistake."""

from __future__ import annotations

import torch

from converter import catalogue
from converter.checkpoint import Tensor
from converter.errors import LayoutError, MappingError
from converter.mapping.expr import read
from converter.mapping.parse import parse_mapping
from converter.mapping.plan import Plan, make_plan
from converter.mapping.rules import Mapping
from converter.verify.independent import Reader
from converter.verify.result import Check, failed, noted, passed

PROOF = "structure"

# A converted file's own layout as a mapping, so that the planner's checks hold for it too.
_IDENTITY = """\
layout: deepencoder-{family}
family: {family}
description: itself
variables: {{rest: path}}
recognise: {{"{key}": [_]}}
rules:
  - keep: "{{rest}}"
"""


def check_layout(name: str, family: str, tensors: dict[str, Tensor]) -> tuple[Check, Plan | None]:
    """Names, shapes and types against the target layout; the plan is what the file says it is."""
    hub = catalogue.hub(family)
    identity = parse_mapping(_IDENTITY.format(family=family, key="any"), "identity")
    assert isinstance(identity, Mapping)
    try:
        plan = make_plan(identity, "", hub, {key: read(tensor) for key, tensor in tensors.items()}, name)
    except MappingError as error:
        lines = str(error).split("\n")
        return failed(PROOF, "layout", f"does not fit {hub.name}: {lines[0]}", lines), None
    lacking, extra = list(plan.filled), list(plan.dropped)
    if lacking or extra:
        detail = "; ".join([*(f"{key} is missing" for key in lacking), *(f"{key} is too much" for key in extra)])
        return failed(PROOF, "layout", f"does not fit {hub.name}: {detail}", lacking + extra), plan
    return passed(PROOF, "layout", f"{len(tensors)} tensors have the names, shapes and types of {hub.name}"), plan


def check_missing(plan: Plan) -> Check | None:
    """What the target has and the file may lack, which those who load it strictly should know."""
    if not plan.missing:
        return None
    names = ", ".join(plan.missing)
    why = "; ".join(dict.fromkeys(plan.missing.values()))
    return noted(PROOF, "missing", f"loading it misses exactly {names}: {why}", list(plan.missing))


def check_loads(family: str, tensors: dict[str, torch.Tensor]) -> tuple[Check, torch.nn.Module | None]:
    """Whether the encoder loads the tensors strictly, built as they say it is; and the loaded encoder."""
    from converter.encoders import ClipEncoder, SamEncoder, clip_config_from, sam_config_from

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):
            encoder = SamEncoder(sam_config_from(shapes)) if family == "sam" else ClipEncoder(clip_config_from(shapes))
        # Assigned, not copied: the encoder takes the tensors' types, and a gigabyte is not held twice.
        encoder.load_state_dict(tensors, strict=True, assign=True)
    except (LayoutError, RuntimeError) as error:
        return failed(PROOF, "loads", f"the encoder does not load it: {error}", []), None
    return passed(PROOF, "loads", f"{type(encoder).__name__} loads it strictly"), encoder.eval()


def check_values(names: list[str], get: Reader) -> list[Check]:
    """NaN and infinity are wrong; constant tensors are pointed out, for exchanging them would change nothing."""
    broken, constant = [], []
    for name in names:
        tensor = get(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
            broken.append(name)
        elif tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all()):
            constant.append(name)
    if broken:
        detail = f"{len(broken)} tensors hold NaN or infinity, {broken[0]} first"
        return [failed(PROOF, "finite", detail, broken), *_constant(constant)]
    return [passed(PROOF, "finite", f"no NaN and no infinity in {len(names)} tensors"), *_constant(constant)]


def _constant(names: list[str]) -> list[Check]:
    if not names:
        return []
    detail = f"{len(names)} tensors are constant, {names[0]} first: outputs cannot show where they are exchanged"
    return [noted(PROOF, "constant", detail, names)]
