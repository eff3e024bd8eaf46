"""The JSON Schema of mapping files, compared with the parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import mappings as hostile
from jsonschema import Draft202012Validator
from test_cli import run
from test_mapping_files import GOOD, MALFORMED

from converter.errors import MappingError
from converter.layouts import parse, registry, template, yaml_tree
from converter.tensors.dtypes import BY_NAME

ROOT = Path(__file__).resolve().parent.parent
SCHEMA: dict[str, Any] = json.loads(registry.schema())
DEFINITIONS: dict[str, Any] = SCHEMA["$defs"]
VALIDATOR = Draft202012Validator(SCHEMA)
CANONICAL = registry.yaml_text("deepencoder-clip")


def parser_accepts(text: str) -> bool:
    try:
        parse.parse_mapping(text, "m.yaml")
    except MappingError:
        return False
    return True


def schema_accepts(text: str) -> bool:
    return VALIDATOR.is_valid(yaml.safe_load(text))


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_the_command_prints_it(tmp_path: Path) -> None:
    assert run("mapping", "schema", cwd=tmp_path).stdout == registry.schema()


def test_it_has_the_keys_of_the_parser() -> None:
    for name, keys in {
        "mapping": parse.MAPPING_PARSERS,
        "canonical": parse.CANONICAL_PARSERS,
        "tensor": parse.TENSOR_KEYS,
    }.items():
        assert set(DEFINITIONS[name]["properties"]) == set(keys)
    assert set(DEFINITIONS["operation"]["properties"]) == set(parse.OP_PARSERS)
    assert DEFINITIONS["rule"]["anyOf"] == [{"$ref": f"#/$defs/{action}"} for action in parse.ACTIONS]
    for action, (required, optional) in parse.ACTIONS.items():
        assert DEFINITIONS[action]["required"] == [action, *required]
        assert set(DEFINITIONS[action]["properties"]) == {action, *required, *optional, "optional"}


def test_it_has_the_limits_of_the_parser() -> None:
    assert DEFINITIONS["kind"]["anyOf"][0]["enum"] == list(parse.VARIABLE_KINDS)
    assert DEFINITIONS["tensor"]["properties"]["dtype"]["enum"] == list(BY_NAME)
    assert DEFINITIONS["word"]["maxLength"] == template.MAX_WORD_CHARS
    assert DEFINITIONS["template"]["maxLength"] == template.MAX_NAME_CHARS
    assert DEFINITIONS["numbers"]["anyOf"][1]["maxItems"] == yaml_tree.MAX_DIMS


def test_every_key_has_a_description() -> None:
    for name in ("mapping", "canonical", "tensor", "operation", *parse.ACTIONS):
        definition = DEFINITIONS[name]
        described = {
            key: form.get("description", definition.get("description"))
            for key, form in definition["properties"].items()
        }
        assert all(described.values()), described


@pytest.mark.parametrize("name", registry.layout_names())
def test_a_shipped_mapping_is_valid(name: str) -> None:
    VALIDATOR.validate(yaml.safe_load(registry.yaml_text(name)))


# Aliases that expand to a billion values, which a validator would follow without end.
EXPLODING = {"a billion laughs", "merge keys that double"}


@pytest.mark.parametrize("name", [*MALFORMED, *hostile.REFUSED])
def test_the_parser_refuses_what_the_schema_refuses(name: str, tmp_path: Path) -> None:
    if name in MALFORMED:
        old, new, _, _ = MALFORMED[name]
        content = GOOD.replace(old, new).encode()
    else:
        hostile.REFUSED[name][0](tmp_path)
        content = (tmp_path / "m.yaml").read_bytes()
    if name in EXPLODING or len(content) > 100_000:
        pytest.skip("too large for editors")
    try:
        text = content.decode()
        valid = schema_accepts(text)
    # A file that is not YAML has no values for a schema.
    except (yaml.YAMLError, RecursionError, ValueError):
        return
    assert valid or not parser_accepts(text)


# Mistakes that a schema cannot find: they involve two places of a file, or YAML reads the value in another way.
NOT_FOUND = {
    "key twice", "variable twice", "two verbs of one", "unknown variable", "offset", "ambiguous", "two paths",
    "other variables", "parts short", "parts of no list", "parts elsewhere", "into lacks layer", "into keeps part",
    "permute", "reshape sizes", "anchor", "merge key", "tag of YAML", "other_rules without prefix",
}  # fmt: skip


def test_the_schema_finds_most_mistakes() -> None:
    missed = set()
    for name, (old, new, _, _) in MALFORMED.items():
        try:
            if schema_accepts(GOOD.replace(old, new)):
                missed.add(name)
        except yaml.YAMLError:
            continue
    assert missed <= NOT_FOUND, missed - NOT_FOUND


NEW_KEY = "not_a_key: 1"


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (GOOD, "layout: clip-test", f"layout: clip-test\n{NEW_KEY}"),
        (CANONICAL, "family: clip", f"family: clip\n{NEW_KEY}"),
        (CANONICAL, "    positions: tokens", f"    positions: tokens\n    {NEW_KEY}"),
        (GOOD, "{keep: e, optional: true}", "{keep: e, not_a_key: 1}"),
        (GOOD, "    because: not needed", f"    because: not needed\n    {NEW_KEY}"),
        (GOOD, "    to: d.{rest}", f"    to: d.{{rest}}\n    {NEW_KEY}"),
        (GOOD, "then: [squeeze: 2]", f"then: [{{{NEW_KEY}}}]"),
        (GOOD, "squeeze: 2", "reshape: {from: 1, to: 1, by: 1}"),
        (GOOD, "squeeze: 2", "deinterleave: {heads: 2, parts: 3, tails: 1}"),
        # A key of another action.
        (GOOD, "{keep: e, optional: true}", "{keep: e, because: it is}"),
        (GOOD, "    because: not needed", "    because: not needed\n    then: []"),
        (GOOD, "prefix: model.", "sizes: {width: 1}"),
        (CANONICAL, "family: clip", "family: clip\nrules: []"),
    ],
)
def test_both_refuse_an_unknown_key(text: str, old: str, new: str) -> None:
    assert text.count(old) == 1
    assert parser_accepts(text) and schema_accepts(text)
    changed = text.replace(old, new)
    assert not parser_accepts(changed) and not schema_accepts(changed)


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
        ("into: l.{layer}.qkv", "into: l.{layer+1}.qkv\n    dim: 1\n    then: []"),
        ("[3*width, 7, _]", "[]"),
        ("other_rules:\n  - {keep: e, optional: true}", "drop_rest: a language model"),
        ("    because: not needed\n    optional: true", "    because: 1"),
        ("prefix: model.", "prefix: model.\nlanguage_model: true"),
        ("prefix: model.", "prefix: model.\naliases: other"),
        ("prefix: model.", "prefix: model.\naliases: [other, third]"),
    ],
)
def test_both_accept_a_correct_file(old: str, new: str) -> None:
    assert GOOD.count(old) == 1, old
    changed = GOOD.replace(old, new)
    assert parser_accepts(changed) and schema_accepts(changed)


REQUIRED_KEYS = {GOOD: {*parse.REQUIRED_KEYS, "rules"}, CANONICAL: set(DEFINITIONS["canonical"]["required"])}


@pytest.mark.parametrize(("text", "name"), [(text, name) for text in REQUIRED_KEYS for name in yaml.safe_load(text)])
def test_both_require_the_same_keys(text: str, name: str) -> None:
    document = yaml.safe_load(text)
    del document[name]
    # Without `variables` or `prefix` other keys are wrong.
    if name in ("variables", "prefix"):
        return
    assert VALIDATOR.is_valid(document) == parser_accepts(yaml.safe_dump(document))
    assert VALIDATOR.is_valid(document) == (name not in REQUIRED_KEYS[text])


def test_the_reference_page_has_every_key_and_the_example() -> None:
    page = (ROOT / "docs" / "rules.md").read_text()
    keys = {*parse.MAPPING_PARSERS, *parse.CANONICAL_PARSERS, *parse.TENSOR_KEYS, *parse.OP_PARSERS, *parse.ACTIONS}
    keys |= {key for required, optional in parse.ACTIONS.values() for key in (*required, *optional)}
    assert {key for key in keys if f"`{key}`" not in page} == set()
    assert registry.yaml_text("sam-meta") in page
