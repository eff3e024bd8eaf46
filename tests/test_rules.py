from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inventories import inventories
from memory import copied, expr

from converter.errors import MappingError
from converter.layouts import registry
from converter.layouts.parse import parse_mapping
from converter.layouts.spec import Rule, invert
from converter.plan.apply import Applied, apply
from converter.tensors.evaluate import tensor_bytes
from converter.tensors.lazy_tensor import LazyTensor, byte_ranges, source_tensors

HEAD: dict[str, Any] = {
    "layout": "clip-test",
    "family": "clip",
    "description": "a test",
    "variables": {"layer": "int", "proj": ["q", "k", "v"], "param": ["weight", "bias"], "name": "name", "rest": "path"},
    "detect": {"a": ["_"]},
}


def rules_of(*rules: dict[str, Any]) -> tuple[Rule, ...]:
    """Rules as a mapping file has them: JSON is YAML too."""
    return parse_mapping(json.dumps({**HEAD, "rules": rules}), "test.yaml").mapping.rules


def state_dict(shapes: dict[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """Tensors of these shapes, no two of which have the same bytes."""
    made, first = {}, 1
    for key, shape in shapes.items():
        count = math.prod(shape)
        made[key] = expr(torch.arange(first, first + count, dtype=torch.int32).reshape(shape), key)
        first += count
    return made


def contents(values: dict[str, LazyTensor]) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: (value.shape, bytes(tensor_bytes(value))) for name, value in values.items()}


def assert_nothing_lost(applied: Applied, tensors: dict[str, LazyTensor]) -> None:
    """Every source tensor was converted whole or dropped, never both, never twice."""
    made = Counter(number for value in applied.values.values() for number in bytes_of(value))
    kept = [key for key in tensors if key not in applied.dropped]
    assert set(applied.dropped) <= set(tensors)
    assert {tensor.key for value in applied.values.values() for tensor in source_tensors(value)} == set(kept)
    assert made == Counter(number for key in kept for number in bytes_of(tensors[key]))
    assert applied.values.keys() == applied.rules.keys()


def bytes_of(value: LazyTensor) -> list[int]:
    return list(memoryview(bytes(tensor_bytes(value))).cast("i"))


@st.composite
def modules(draw: st.DrawFn, number: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A rule, and the names and shapes of the tensors it is for."""
    stem = f"{draw(st.text('ab_', max_size=2))}{number}" + draw(st.sampled_from(["", ".x", ".0.y"]))
    new = draw(st.sampled_from([f"new.{stem}", f"{number}", f"h.{number}_{stem}"]))
    layers = range(draw(st.integers(1, 3)))
    rows = draw(st.integers(1, 3))
    dim = draw(st.integers(0, 1))
    verb = draw(st.sampled_from(["keep", "rename", "offset", "flip", "squeeze", "heads", "fuse", "split", "drop"]))
    plain = {f"{stem}.{i}.{param}": (rows, 2) for i in layers for param in ("weight", "bias")}
    name = f"{stem}.{{layer}}.{{param}}"
    to = f"{new}.{{layer}}.{{param}}"
    if verb == "fuse":
        parts = {f"{stem}.{i}.{proj}_w": (rows, 2) for i in layers for proj in "qkv"}
        order = draw(st.permutations("qkv"))
        return {
            "fuse": f"{stem}.{{layer}}.{{proj}}_w",
            "parts": {"proj": order},
            "into": f"{new}.{{layer}}",
            "dim": str(dim),
        }, parts
    if verb == "split":
        whole = {f"{stem}.{i}": (6, 3) for i in layers}
        order = draw(st.permutations("qkv"))
        return {
            "split": f"{stem}.{{layer}}",
            "parts": {"proj": order},
            "into": f"{new}.{{layer}}.{{proj}}",
            "dim": str(dim),
        }, whole
    if verb == "heads":
        then = [{"deinterleave": {"heads": "2", "parts": "3"}}, {"unsqueeze": "1"}]
        return {"rename": name, "to": to, "then": then}, dict.fromkeys(plain, (6, 2))
    return {
        "keep": {"keep": f"{stem}.{{rest}}"},
        "rename": {"rename": f"{stem}.{{layer}}.{{name}}", "to": f"{new}.{{name}}.{{layer}}"},
        "offset": {"rename": name, "to": f"{new}.{{layer+1}}.{{param}}"},
        "flip": {"rename": name, "to": to, "then": [{"permute": ["1", "0"]}]},
        "squeeze": {"rename": name, "to": to, "then": [{"unsqueeze": ["0", "3"]}, {"squeeze": "3"}]},
        "drop": {"drop": [f"{stem}.{{layer}}.weight", f"{stem}.{{layer}}.bias"], "because": "unused"},
    }[verb], plain


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[Rule, ...], dict[str, LazyTensor]]:
    """Rules and a state dict that they are for, its tensors in any order."""
    made = [draw(modules(number)) for number in range(draw(st.integers(1, 5)))]
    shapes = {key: shape for _, part in made for key, shape in part.items()}
    keys = draw(st.permutations(sorted(shapes)))
    return rules_of(*(rule for rule, _ in made)), state_dict({key: shapes[key] for key in keys})


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_no_tensor_is_lost_and_the_way_back_gives_the_same(
    layout: tuple[tuple[Rule, ...], dict[str, LazyTensor]],
) -> None:
    rules, tensors = layout
    applied = apply(rules, tensors, "test")
    assert_nothing_lost(applied, tensors)
    back = apply(invert(rules), applied.values, "back")
    assert not back.dropped
    kept = {key: value for key, value in tensors.items() if key not in applied.dropped}
    assert contents(back.values) == contents(kept)
    assert invert(invert(rules)) == tuple(rule for rule in rules if rule.targets)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.data())
def test_one_name_more_or_less_is_noticed(
    layout: tuple[tuple[Rule, ...], dict[str, LazyTensor]], data: st.DataObject
) -> None:
    rules, tensors = layout
    changed = dict(tensors)
    victim = data.draw(st.sampled_from(sorted(tensors)))
    changed[f"other.{victim}"] = changed[victim]
    with pytest.raises(MappingError, match="no rule claims 'other"):
        apply(rules, changed, "test")


# A checkpoint for every mapping that ships.
SHIPPED = {
    "clip-deepseek-ocr": ["deepseek-ocr"],
    "clip-hf": ["clip-hf", "clip-hf-current", "clip-hf-vision-336"],
    "clip-hf-mlx": ["clip-hf-current-mlx"],
    "clip-mlx": ["deepseek-ocr-mlx"],
    "clip-mmproj": ["deepseek-ocr-mmproj"],
    "clip-openai": ["clip-openai", "clip-open_clip"],
    "clip-owlvit": ["owlvit"],
    "clip-timm": ["clip-timm", "clip-timm-336"],
    "clip-unlimited-ocr-hf": ["unlimited-ocr-hf-vision"],
    "qwen2-deepseek-ocr2": ["deepseek-ocr-2"],
    "qwen2-deepseek-ocr2-hf": ["deepseek-ocr-2-hf-vision"],
    "qwen2-deepseek-ocr2-sglang": ["deepseek-ocr-2-sglang"],
    "qwen2-hf": ["qwen2-0.5b"],
    "qwen2-mlx": ["deepseek-ocr-2-mlx"],
    "qwen2-mmproj": ["deepseek-ocr-2-mmproj"],
    "sam-deepseek-ocr": ["deepseek-ocr", "deepseek-ocr-2"],
    "sam-got-ocr2": ["got-ocr2"],
    "sam-got-ocr2-hf": ["got-ocr2-hf-vision"],
    "sam-got-ocr2-mlx": ["got-ocr2-mlx"],
    "sam-hf": ["sam-hf-bin", "sam-hf-safetensors"],
    "sam-hf-mlx": ["sam-hf-safetensors-mlx"],
    "sam-meta": ["sam-meta", "sam-meta-vit-h"],
    "sam-mlx": ["deepseek-ocr-mlx", "deepseek-ocr-2-mlx"],
    "sam-mmpretrain": ["mmpretrain"],
    "sam-mmproj": ["deepseek-ocr-mmproj", "deepseek-ocr-2-mmproj"],
    "sam-timm": ["sam-timm"],
    "sam-unlimited-ocr-hf": ["unlimited-ocr-hf-vision"],
}


def test_every_mapping_that_ships_is_tested_there_and_back() -> None:
    assert set(SHIPPED) == {name for name in registry.layout_names() if not name.startswith("deepencoder-")}


@pytest.mark.parametrize(
    ("layout", "checkpoint"), [(layout, name) for layout, names in SHIPPED.items() for name in names]
)
def test_there_and_back_again(layout: str, checkpoint: str) -> None:
    mapping = registry.load(layout).mapping
    names = inventories()[checkpoint]
    prefix = next(prefix for prefix in mapping.prefixes if any(name.startswith(prefix) for name in names))
    # The real names, the shapes a few elements each: the rules ask for ones and for equal parts.
    shapes = {
        name: tuple(size if size == 1 else 2 + size % 2 for size in shape)
        for name, (_, shape) in names.items()
        if not mapping.drop_rest or name.startswith(prefix)
    }
    tensors = state_dict(shapes)
    rules = mapping.rules_for(prefix)
    applied = apply(rules, tensors, checkpoint)
    assert_nothing_lost(applied, tensors)
    back = apply(invert(rules), applied.values, "back")
    kept = {key: value for key, value in tensors.items() if key not in applied.dropped}
    assert contents(back.values) == contents(kept)
    computed = {"visual.proj", "text_projection"}
    for name in kept.keys() - computed:
        assert copied(byte_ranges(back.values[name]) or ()) == bytes(tensor_bytes(kept[name]))


def test_a_drop_has_no_inverse() -> None:
    (rule,) = rules_of({"drop": "a", "because": "it is not needed"})
    assert rule.reason == "it is not needed"
    assert invert((rule,)) == ()


# Rules, the shapes they are applied to, and all that the message must say.
ERRORS: dict[str, tuple[str, dict[str, tuple[int, ...]], list[str]]] = {
    "unclaimed": ("- keep: a", {"a": (1,), "b": (1,)}, ["ckpt: ", "no rule claims 'b'"]),
    "dead": ("- keep: a\n- rename: b.{layer}\n  to: c.{layer}", {"a": (1,)}, [":11", "b.{layer} -> c.{layer}"]),
    "dead drop": ("- keep: a\n- drop: [a1, b]\n  because: x", {"a": (1,), "a1": (1,)}, [":11", "drop b"]),
    "claimed twice": ("- keep: a.{rest}\n- keep: a.{name}", {"a.b": (1,)}, [":10", ":11", "'a.b' is claimed by two"]),
    "kept and dropped": (
        "- keep: a\n- drop: '{rest}'\n  because: x",
        {"a": (1,)},
        [":10", ":11", "drop {rest}", "'a'"],
    ),
    "made twice": (
        "- keep: a\n- rename: b\n  to: a",
        {"a": (1,), "b": (1,)},
        ["'a' is produced twice: by test.yaml:10 and by test.yaml:11, from 'b'"],
    ),
    "missing part": (
        "- fuse: h.{layer}.{proj}\n  parts: {proj: [q, k, v]}\n  into: h.{layer}.qkv",
        {"h.0.q": (1,), "h.0.k": (1,), "h.0.v": (1,), "h.1.q": (1,), "h.1.v": (1,)},
        [":10", "'h.1.k' is missing next to 'h.1.q'"],
    ),
    "shapes": (
        "- fuse: h.{proj}\n  parts: {proj: [q, k, v]}\n  into: h",
        {"h.q": (1, 2), "h.k": (2, 2), "h.v": (1, 2)},
        [":10", "'h.q'", "cannot fuse shapes [1, 2] and [2, 2]"],
    ),
    "negative": ("- rename: h.{layer}\n  to: h.{layer-1}", {"h.0": (1,)}, [":10", "'h.0'", "{layer-1} is negative"]),
    "rank": ("- keep: a\n  then: [permute: [1, 0]]", {"a": (2,)}, [":10", "'a'", "cannot permute shape [2]"]),
    "odd split": (
        "- split: a\n  parts: {proj: [q, k, v]}\n  into: a.{proj}",
        {"a": (4,)},
        [":10", "'a'", "shape [4] into 3 equal parts"],
    ),
}


def applied_text(rules: str, tensors: dict[str, LazyTensor]) -> Applied:
    """What rules make of tensors; the first rule is in line 10."""
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in HEAD.items())
    mapping = parse_mapping(f"{head}\n\n# Rules.\n\nrules:\n{rules}", "test.yaml").mapping
    return apply(mapping.rules, tensors, "ckpt")


@pytest.mark.parametrize(("rules", "shapes", "words"), ERRORS.values(), ids=ERRORS)
def test_disagreement_names_line_rule_and_tensor(
    rules: str, shapes: dict[str, tuple[int, ...]], words: list[str]
) -> None:
    with pytest.raises(MappingError) as caught:
        applied_text(rules, state_dict(shapes))
    for part in words:
        assert (f"test.yaml{part}" if part.startswith(":") else part) in str(caught.value)


def test_types_that_differ_cannot_be_fused() -> None:
    types = {"q": torch.float32, "k": torch.float16, "v": torch.float32}
    tensors = {f"h.{proj}": expr(torch.ones(2, dtype=dtype)) for proj, dtype in types.items()}
    with pytest.raises(MappingError, match=r"test.yaml:10: 'h.q': cannot fuse float32 with float16"):
        applied_text("- fuse: h.{proj}\n  parts: {proj: [q, k, v]}\n  into: h", tensors)


def test_optional_rules_may_match_nothing_but_not_a_part_only() -> None:
    fuse = "- keep: a\n- fuse: h.{proj}\n  parts: {proj: [q, k, v]}\n  into: h\n  optional: true"
    assert list(applied_text(fuse, state_dict({"a": (1,)})).values) == ["a"]
    with pytest.raises(MappingError, match=r"'h.k', 'h.v' is missing next to 'h.q'"):
        applied_text(fuse, state_dict({"a": (1,), "h.q": (1,)}))


def test_five_problems_are_told_and_the_rest_counted() -> None:
    with pytest.raises(MappingError) as caught:
        applied_text("- keep: a", state_dict({"a": (1,), **{f"b{i}": (1,) for i in range(9)}}))
    assert str(caught.value).count("no rule claims") == 5
    assert str(caught.value).endswith("and 4 more")


def test_rules_for_other_names_apply_only_beside_a_prefix() -> None:
    mapping = registry.load("clip-openai").mapping
    assert mapping.rules_for("") == mapping.rules
    locations = {rule.location for rule in mapping.rules_for("visual.")}
    assert locations == {rule.location for rule in (*mapping.rules, *mapping.other_rules)}
