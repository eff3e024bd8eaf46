"""Where features are compared on their way through an encoder, and which tensors are at work before each place.

Every implementation has the same places, whatever its modules are called: what the patch convolution gives, what enters
the first block (positions added, CLIP's class token and norm), and what each block gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from converter.layouts.spec import Rule
from converter.output.names import shorten
from converter.verification.result import FAILED, Check

# What an encoder's names begin with in the chain.
PART = {"sam": "sam_model.", "clip": "vision_model."}
# Tensors at work before a place that does not bear their names, by family and place.
_BEFORE = {
    ("clip", "pre_layrnorm"): ("embeddings.class_embedding", "embeddings.position_", "pre_layrnorm."),
    # In the chain, what enters CLIP's first block has come through the end of SAM.
    ("sam", "vision_model.pre_layrnorm"): ("neck.", "net_2.", "net_3."),
}
# A block of SAM has fourteen tensors; where all are named, none is.
_NAMED = 4


class Probe(NamedTuple):
    """A module whose output is looked at; with `entering`, what goes into it instead."""

    module: nn.Module
    entering: bool = False


def probes(patches: nn.Module, *stacks: Iterable[nn.Module]) -> list[Probe]:
    """The places of an encoder with a patch convolution and one stack of blocks or, in the chain, two."""
    found = [Probe(patches)]
    for stack in map(list, stacks):
        found += [Probe(stack[0], entering=True), *map(Probe, stack)]
    return found


def names_of(family: str, depth: int) -> list[str]:
    """What the places of an encoder of `depth` blocks are called."""
    if family == "sam":
        return ["patch_embed", "pos_embed", *(f"blocks.{i}" for i in range(depth))]
    return ["embeddings.patch_embedding", "pre_layrnorm", *(f"transformer.layers.{i}" for i in range(depth))]


def at_work(family: str, place: str, tensors: Iterable[str]) -> list[str]:
    """Those of a family's tensors that are used between the place before and this one."""
    local = place.removeprefix(PART[family])
    wanted = _BEFORE.get((family, local), (local,) if local == "pos_embed" else (f"{local}.",))
    return [name for name in tensors if name.startswith(wanted)]


def at_fault(check: Check, family: str, rules: dict[str, Rule], faulty: Sequence[str]) -> Check:
    """A failed comparison with the tensors that are at work where it first shows, and the rules that made them.

    `rules` gives each converted tensor its rule, `faulty` names those that are not what the source gives.
    """
    if check.verdict != FAILED or not check.tensors:
        return check
    there = at_work(family, check.tensors[0], rules)
    if not there:
        return check
    wrong = [name for name in there if name in faulty]
    if wrong:
        words = f"there, {shorten(wrong, _NAMED)} {'differs' if len(wrong) == 1 else 'differ'} from the source"
    else:
        words = f"the tensors at work there are what the mapping makes of the source: {shorten(there, _NAMED)}"
    made = sorted({rules[name].place for name in wrong or there})
    detail = f"{check.detail}; {words}; made by {', '.join(map(str, made))}"
    return replace(check, detail=detail, tensors=[*check.tensors, *(wrong or there)])
