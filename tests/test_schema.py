"""The JSON Schema of mapping files, beside the parser: what one of them refuses, and which keys both know."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path

import pytest
import yaml
from hostile import mappings as hostile
from jsonschema import Draft202012Validator
from test_cli import run
from test_mapping_files import GOOD, MALFORMED

from converter.errors import MappingError
from converter.layouts import parse, registry, schema

ROOT = Path(__file__).resolve().parent.parent
VALIDATOR = Draft202012Validator(schema.schema())
CANONICAL = registry.text("deepencoder-clip")


def parser_takes(text: str) -> bool:
    try:
        parse.parse_mapping(text, "m.yaml")
    except MappingError:
        return False
    return True


def schema_takes(text: str) -> bool:
    return VALIDATOR.is_valid(yaml.safe_load(text))


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(schema.schema())


def test_the_published_copy_is_what_the_command_prints(tmp_path: Path) -> None:
    printed = run("mapping", "schema", cwd=tmp_path).stdout
    assert json.loads(printed) == schema.schema()
    assert (ROOT / "docs" / "mapping.schema.json").read_text() == printed, (
        "dsocr-convert mapping schema > docs/mapping.schema.json"
    )


def test_every_key_of_the_parser_has_its_sentence_and_no_other() -> None:
    assert list(schema.VERBS) == list(parse.VERBS)
    assert list(schema.OPS) == list(parse.OPS)
    assert set(schema.FILE) == {*parse.MAPPING, *parse.CANONICAL}
    assert list(schema.TENSOR) == list(parse.TENSOR)
    assert {*schema.KEYS} == {
        "optional",
        *chain.from_iterable(needed + spare for needed, spare in parse.VERBS.values()),
    }


@pytest.mark.parametrize("name", registry.layout_names())
def test_a_shipped_mapping_fits(name: str) -> None:
    VALIDATOR.validate(yaml.safe_load(registry.text(name)))


def test_no_mapping_that_ships_has_an_operation_without_inverse() -> None:
    # As docs/rules.md says.
    shipped = [mapping for family in parse.FAMILIES for mapping in registry.mappings(family)]
    assert not [rule for mapping in shipped for rule, _ in mapping.lossy() if rule.targets]


@pytest.mark.parametrize("said", schema.VERBS.values(), ids=schema.VERBS)
def test_the_example_of_a_verb_is_a_rule(said: schema.Said) -> None:
    rule = "\n    ".join(said.example.splitlines())
    variables = "{layer: int, proj: [q, k, v], half: [k, v], param: [weight, bias]}"
    head = "layout: x\nfamily: clip\ndescription: d\ndetect: {a: [_]}"
    text = f"{head}\nvariables: {variables}\nrules:\n  - {rule}\n"
    assert parser_takes(text) and schema_takes(text)


@pytest.mark.parametrize("name", [*schema.FILE])
def test_the_example_of_a_key_fits(name: str) -> None:
    said = schema.FILE[name]
    if said.example:
        form = {"$defs": schema.schema()["$defs"], **said.form}
        Draft202012Validator(form).validate(yaml.safe_load(said.example)[name])


# Aliases that stand for a billion values, which a validator that follows them never comes to the end of.
EXPLODING = {"a billion laughs", "merge keys that double"}


@pytest.mark.parametrize("name", [*MALFORMED, *hostile.REFUSED])
def test_what_the_schema_refuses_the_parser_refuses(name: str, tmp_path: Path) -> None:
    if name in MALFORMED:
        old, new, _, _ = MALFORMED[name]
        content = GOOD.replace(old, new).encode()
    else:
        hostile.REFUSED[name][0](tmp_path)
        content = (tmp_path / "m.yaml").read_bytes()
    if name in EXPLODING or len(content) > 100_000:
        pytest.skip("an editor has given up before")
    try:
        text = content.decode()
        fits = schema_takes(text)
    # What cannot be read has no values that a schema could judge.
    except (yaml.YAMLError, RecursionError, ValueError):
        return
    assert fits or not parser_takes(text)


# Of those, what takes more than one place to see; or what YAML says otherwise than our reader.
UNSEEN = {
    "key twice", "variable twice", "two verbs of one", "unknown variable", "offset", "ambiguous", "two paths",
    "other variables", "parts short", "parts of no list", "parts elsewhere", "into lacks layer", "into keeps part",
    "permute", "reshape sizes", "anchor", "merge key", "tag of YAML", "beside without strip",
}  # fmt: skip


def test_most_of_what_the_parser_refuses_an_editor_shows() -> None:
    missed = set()
    for name, (old, new, _, _) in MALFORMED.items():
        try:
            if schema_takes(GOOD.replace(old, new)):
                missed.add(name)
        except yaml.YAMLError:
            continue
    assert missed <= UNSEEN, missed - UNSEEN


OWN_KEY = "not_a_key: 1"


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (GOOD, "layout: clip-test", f"layout: clip-test\n{OWN_KEY}"),
        (CANONICAL, "family: clip", f"family: clip\n{OWN_KEY}"),
        (CANONICAL, "    positions: true", f"    positions: true\n    {OWN_KEY}"),
        (GOOD, "{keep: e, optional: true}", "{keep: e, not_a_key: 1}"),
        (GOOD, "    because: not needed", f"    because: not needed\n    {OWN_KEY}"),
        (GOOD, "    to: d.{rest}", f"    to: d.{{rest}}\n    {OWN_KEY}"),
        (GOOD, "then: [squeeze: 2]", f"then: [{{{OWN_KEY}}}]"),
        (GOOD, "squeeze: 2", "reshape: {from: 1, to: 1, by: 1}"),
        (GOOD, "squeeze: 2", "deinterleave: {heads: 2, parts: 3, tails: 1}"),
        # A verb's key that is another's.
        (GOOD, "{keep: e, optional: true}", "{keep: e, because: it is}"),
        (GOOD, "    because: not needed", "    because: not needed\n    then: []"),
        (GOOD, "prefix: model.", "sizes: {width: 1}"),
        (CANONICAL, "family: clip", "family: clip\nrules: []"),
    ],
)
def test_an_unknown_key_is_refused_by_both(text: str, old: str, new: str) -> None:
    assert text.count(old) == 1
    assert parser_takes(text) and schema_takes(text)
    changed = text.replace(old, new)
    assert not parser_takes(changed) and not schema_takes(changed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  - {keep: e, optional: true}", "  - {keep: e, optional: on_read}"),
        ("because: not needed\n    optional: true", "because: not needed\n    optional: on_read"),
        ("prefix: model.", 'prefix: [model., ""]'),
        ('["1", "2"]', "[1, 2]"),
        ("- drop: b", "- drop: [b, b.2]"),
        ("squeeze: 2", "squeeze: [2, 3]"),
        ("squeeze: 2", "unsqueeze: 0"),
        ("squeeze: 2", "permute: []"),
        ("squeeze: 2", "permute: [2, 1, 0]"),
        ("squeeze: 2", "reshape: {from: 6, to: [2, 3]}"),
        ("squeeze: 2", "deinterleave: {heads: 2, parts: 3}"),
        ("squeeze: 2", "reorder: [2, 0, 1]"),
        ("squeeze: 2", "cast: bfloat16"),
        ("squeeze: 2", "resample: 24"),
        ("into: l.{layer}.qkv", "into: l.{layer+1}.qkv\n    dim: 1\n    then: []"),
        ("[3*width, 7, _]", "[]"),
        ("other_rules:\n  - {keep: e, optional: true}", "drop_rest: a language model"),
        ("    because: not needed\n    optional: true", "    because: 1"),
    ],
)
def test_what_is_right_is_right_to_both(old: str, new: str) -> None:
    assert GOOD.count(old) == 1, old
    changed = GOOD.replace(old, new)
    assert parser_takes(changed) and schema_takes(changed)


@pytest.mark.parametrize("name", re.findall(r"^(\w+):", CANONICAL, re.MULTILINE))
def test_a_key_that_a_canonical_layout_needs_is_missed_by_both(name: str) -> None:
    document = yaml.safe_load(CANONICAL)
    needed = name in (*parse.NEEDED, "sizes", "tensors")
    del document[name]
    changed = yaml.safe_dump(document)
    if name in ("layout", "family", "description", "detect", "sizes"):
        assert not parser_takes(changed)
    assert VALIDATOR.is_valid(document) is not needed
