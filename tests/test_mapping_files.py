from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from inventories import Inventory, inventories, sparse

import converter
from converter.checkpoint.open import open_checkpoint
from converter.errors import LayoutError, MappingError
from converter.layouts import registry
from converter.layouts.detect import detect_layout
from converter.layouts.parse import parse_mapping
from converter.layouts.spec import LayoutSpec
from converter.options import ConvertOptions
from converter.output.record import ConversionRecord
from converter.plan.plan import make_plan
from converter.tensors.lazy_tensor import lazy_read


@pytest.mark.parametrize("name", registry.layout_names())
def test_a_shipped_mapping_is_short_and_says_what_it_is(name: str) -> None:
    loaded, text = registry.load(name), registry.yaml_text(name)
    assert loaded.name == name
    assert name.startswith(f"{loaded.family}-") or name == f"deepencoder-{loaded.family}"
    assert loaded.is_canonical == name.startswith("deepencoder-")
    assert len(text.splitlines()) <= 80
    assert 20 <= len(loaded.description) <= 100 and "\n" not in loaded.description
    assert len(loaded.digest) == 64


def test_every_family_has_a_canonical_layout_and_mappings_to_it() -> None:
    assert registry.families() == ("sam", "clip", "qwen2")
    assert registry.versions() == [["sam", "clip"], ["sam", "qwen2"]]
    for family in registry.families():
        assert registry.canonical(family).name == f"deepencoder-{family}"
        assert len(registry.mappings(family)) >= 4


GOOD = """\
layout: clip-test
family: clip
description: a test
variables:
  layer: int
  proj: [q, k, v]
  name: name
  rest: path
  n: ["1", "2"]
prefix: model.
detect:
  a.weight: [3*width, 7, _]
rules:
  - keep: a.weight
    then: [squeeze: 2]
  - fuse: l.{layer}.{proj}
    parts: {proj: [q, k, v]}
    into: l.{layer}.qkv
  - drop: b
    because: not needed
    optional: true
  - rename: c.{rest}
    to: d.{rest}
other_rules:
  - {keep: e, optional: true}
"""

# What to replace in GOOD, by what, the line of the complaint, and what it says.
MALFORMED: dict[str, tuple[str, str, int, str]] = {
    "unknown key": ("family: clip", "familie: clip", 2, "unknown key 'familie'; expected one of .*family"),
    "no layout": ("layout: clip-test\n", "", 1, "the key 'layout' is missing"),
    "no rules": ("\nrules:", "\nextra_tensors:", 13, "unknown key 'extra_tensors'"),
    "no family": ("family: clip\n", "", 1, "the key 'family' is missing"),
    "no description": ("description: a test\n", "", 1, "the key 'description' is missing"),
    "empty description": ("description: a test", "description:", 3, "expected a one-line description, found nothing"),
    "list as description": (
        "description: a test",
        "description: [a]",
        3,
        "expected a one-line description, found a list",
    ),
    "key twice": ("family: clip", "layout: other", 2, "duplicate key 'layout'"),
    "variable twice": ("  name: name", "  layer: name", 7, "duplicate key 'layer'"),
    "list as key": ("family: clip", "? [a]\n: clip", 2, "expected a key, found a list"),
    "sizes": ("prefix: model.", "sizes: {a: 1}", 10, "unknown key 'sizes'"),
    "variable kind": ("layer: int", "layer: float", 5, "'layer': expected int, name, path, or a list .*'float'"),
    "variable map": ("layer: int", "layer: {int: 1}", 5, "expected int, name, path, or .*, found a mapping"),
    "no words": ("[q, k, v]\n  name", "[]\n  name", 6, "'proj': expected different words without dots"),
    "word with dot": ("[q, k, v]\n  name", "[q.a, k, v]\n  name", 6, "different words without dots"),
    "word twice": ("[q, k, v]\n  name", "[q, q, v]\n  name", 6, "different words without dots"),
    "word a list": ("[q, k, v]\n  name", "[[q], k, v]\n  name", 6, "expected a word, found a list"),
    "prefix a map": (
        "prefix: model.",
        "prefix: {a: b}",
        10,
        "expected a prefix, or a list of prefixes, found a mapping",
    ),
    "prefix empty": ("prefix: model.", "prefix: []", 10, "expected a prefix"),
    "other_rules without prefix": ("prefix: model.\n", "", 24, "`other_rules` applies to names without the prefix"),
    "other_rules and drop_rest": (
        "other_rules:",
        "drop_rest: text\nother_rules:",
        24,
        "`other_rules` .* or `drop_rest`, not both",
    ),
    "drop_rest blank": ("other_rules:\n  - {keep: e, optional: true}", "drop_rest: ' '", 24, "a reason in words"),
    "detect nothing": ("  a.weight: [3*width, 7, _]", "  {}", 12, "at least one name"),
    "shape a word": ("[3*width, 7, _]", "width", 12, r"expected a shape such as \[3\*width, width\], found 'width'"),
    "dim zero": ("3*width, 7", "3*width, 0", 12, "'0' is not a dimension"),
    "dim negative": ("3*width, 7", "3*width, -1", 12, "'-1' is not a dimension"),
    "dim sum": ("3*width, 7", "width+1, 7", 12, "'width\\+1' is not a dimension: write a number, a name"),
    "dim map": ("3*width, 7", "{a: b}, 7", 12, "expected a dimension, found a mapping"),
    "rules a map": (
        "other_rules:\n  - {keep: e, optional: true}",
        "other_rules: {keep: e}",
        24,
        "a list of rules, found a map",
    ),
    "rule a word": ("  - {keep: e, optional: true}", "  - keep", 25, "expected a rule, found 'keep'"),
    "verb": ("keep: e,", "copy: e,", 25, "expected a rule .keep, rename, fuse, split, drop., found 'copy', 'optional'"),
    "two verbs": ("keep: e,", "keep: e, drop: e,", 25, "unknown key 'drop'"),
    "optional": ("keep: e, optional: true", "keep: e, optional: maybe", 25, "expected true or false, found 'maybe'"),
    "keep a list": ("keep: e,", "keep: [e],", 25, "expected a name, found a list"),
    "keep nothing": ("keep: e,", "keep: ,", 25, "expected a name, found nothing"),
    "unknown variable": ("keep: e,", "keep: 'e.{depth}',", 25, "the variable 'depth', which `variables` does not"),
    "open brace": ("keep: e,", "keep: 'e.{layer',", 25, "a brace that does not enclose a variable"),
    "offset": ("keep: e,", "keep: 'e.{rest+1}',", 25, "adds to 'rest', which is not an int"),
    "ambiguous": ("keep: e,", "keep: 'e.{layer}{n}',", 25, "two variables with nothing but digits between"),
    "two paths": ("keep: e,", "keep: 'e.{name}_{n}',", 25, "a variable next to one of kind name or path"),
    "drop without because": ("    because: not needed\n", "", 19, "the key 'because' is missing"),
    "drop because blank": ("because: not needed", "because: ''", 20, "expected a reason in words"),
    "rename without to": ("    to: d.{rest}\n", "", 22, "the key 'to' is missing"),
    "other variables": ("to: d.{rest}", "to: d.{name}", 23, "use different variables: name, rest"),
    "no parts": ("    parts: {proj: [q, k, v]}\n", "", 16, "the key 'parts' is missing"),
    "parts a list": ("parts: {proj: [q, k, v]}", "parts: [q, k, v]", 17, "one variable and its words .*, found a list"),
    "parts short": ("parts: {proj: [q, k, v]}", "parts: {proj: [q, k]}", 17, "all words of the variable 'proj'"),
    "parts double": ("parts: {proj: [q, k, v]}", "parts: {proj: [q, k, k]}", 17, "all words .* each once"),
    "parts of no list": ("parts: {proj: [q, k, v]}", "parts: {layer: [q, k]}", 17, "all words of the variable 'layer'"),
    "parts elsewhere": ("parts: {proj: [q, k, v]}", "parts: {n: ['1', '2']}", 17, "does not use the variable 'n'"),
    "two parts": ("parts: {proj: [q, k, v]}", "parts: {proj: [q], n: []}", 17, "expected one variable and its words"),
    "into lacks layer": ("into: l.{layer}.qkv", "into: l.qkv", 18, "use different variables: layer"),
    "into keeps part": ("into: l.{layer}.qkv", "into: l.{layer}.{proj}", 18, "use different variables: proj"),
    "dim a word": ("    into: l.{layer}", "    dim: first\n    into: l.{layer}", 18, "a dimension, found 'first'"),
    "dim below zero": ("    into: l.{layer}", "    dim: -1\n    into: l.{layer}", 18, "a dimension, found '-1'"),
    "then a word": ("then: [squeeze: 2]", "then: squeeze", 15, "a list of operations, found 'squeeze'"),
    "op": ("squeeze: 2", "rotate: 2", 15, "unknown key 'rotate'; expected one of .*deinterleave.*squeeze"),
    "two ops": ("[squeeze: 2]", "[{squeeze: 2, unsqueeze: 2}]", 15, "expected one operation per item"),
    "squeeze twice": ("squeeze: 2", "squeeze: [0, 0]", 15, "expected different dimensions"),
    "squeeze nothing": ("squeeze: 2", "squeeze: []", 15, "expected different dimensions"),
    "squeeze a name": ("squeeze: 2", "unsqueeze: last", 15, "expected a dimension, or a list of them, found 'last'"),
    "permute": ("squeeze: 2", "permute: [0, 2]", 15, r"expected each of 0 to 1 once, found \[0, 2\]"),
    "reshape": ("squeeze: 2", "reshape: [2]", 15, r"expected \{from: .*found a list"),
    "reshape to": ("squeeze: 2", "reshape: {from: 2}", 15, "the key 'to' is missing"),
    "reshape sizes": ("squeeze: 2", "reshape: {from: [2, 3], to: [7]}", 15, "different numbers of elements"),
    "heads": ("squeeze: 2", "deinterleave: {heads: 0, parts: 3}", 15, "expected a number of heads, found 0"),
    "parts": ("squeeze: 2", "deinterleave: {heads: 4}", 15, "the key 'parts' is missing"),
    "number too long": (
        "squeeze: 2",
        "squeeze: 99999999999999999999",
        15,
        "a dimension, or a list of them, found '9+'",
    ),
    "tag": ("family: clip", "family: !!python/name:os.system clip", 2, "YAML tag .* is not allowed"),
    "tag of YAML": ("family: clip", "family: !!str clip", 2, "YAML tag .* is not allowed"),
    "anchor": ("family: clip", "family: &x clip", 2, "anchors and aliases are not allowed"),
    "merge key": ("  - {keep: e, optional: true}", "  - {<<: {keep: e}}", 25, "expected a rule"),
    "deep": ("keep: e,", "keep: " + "[" * 20 + "]" * 20 + ",", 25, "nested too deeply"),
    "not YAML": ("prefix: model.", "prefix: [model.", 11, "not valid YAML"),
    "tab": ("family: clip", "\tfamily: clip", 2, "not valid YAML"),
    "two documents": ("other_rules:", "---\nother_rules:", 24, "expected one YAML document"),
}


def mapping_of(text: str) -> LayoutSpec:
    return parse_mapping(text, "my.yaml")


def test_the_table_starts_from_a_good_file() -> None:
    mapping = mapping_of(GOOD).mapping
    assert [rule.location.line for rule in (*mapping.rules, *mapping.other_rules)] == [14, 16, 19, 22, 25]


@pytest.mark.parametrize(("old", "new", "line", "complaint"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_told_by_line_and_what_was_expected(old: str, new: str, line: int, complaint: str) -> None:
    assert GOOD.count(old) == 1
    with pytest.raises(MappingError) as caught:
        mapping_of(GOOD.replace(old, new))
    found = re.fullmatch(r"my\.yaml:(\d+): (.*)", str(caught.value))
    assert found, caught.value
    assert int(found[1]) == line
    assert re.search(complaint, found[2]), found[2]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("prefix: model.", "strip: model."),
        ("detect:", "recognise:"),
        ("other_rules:", "beside:"),
        ("other_rules:\n  - {keep: e, optional: true}", "elsewhere: text"),
        ("optional: true}", "optional: reading}"),
    ],
)
def test_a_former_key_is_an_error_that_names_the_new_one(old: str, new: str) -> None:
    line = GOOD[: GOOD.index(old)].count("\n") + 1
    key = new.strip("}").removesuffix(" model.").removesuffix(" text").removesuffix(":")
    renamed = {"strip": "prefix", "recognise": "detect", "beside": "other_rules", "elsewhere": "drop_rest"}
    renamed["optional: reading"] = "optional: on_read"
    with pytest.raises(MappingError, match=rf"^my\.yaml:{line}: .*{key}.* is now called .{renamed[key]}"):
        mapping_of(GOOD.replace(old, new))


@pytest.mark.parametrize(("old", "new"), [("extra_tensors:", "beyond:"), ("generate: arange", "fill: arange")])
def test_a_former_key_of_a_canonical_layout(old: str, new: str) -> None:
    text = registry.yaml_text("deepencoder-clip")
    with pytest.raises(
        MappingError, match=rf"^my\.yaml:\d+: .*{new.split(':')[0]}.* is now called .{old.split(':')[0]}"
    ):
        mapping_of(text.replace(old, new))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "my.yaml: empty"),
        ("# a comment\n", "my.yaml: empty"),
        ("- a\n- b\n", "my.yaml:1: expected a mapping file, found a list"),
        ("\nhello\n", "my.yaml:2: expected a mapping file, found 'hello'"),
        ("a: \x00", "my.yaml: not valid YAML"),
        ("#" * (1 << 20) + "\n", "my.yaml: larger than 1048576 characters"),
        # Each would overflow the stack of a composer that recurses.
        ("[" * 500_000, "my.yaml:1: nested too deeply"),
        ("{a: " * 200_000, "my.yaml:1: nested too deeply"),
        ("- " * 500_000, "my.yaml:1: nested too deeply"),
        ("a: &a [x]\nb: [*a, *a]\n", "my.yaml:1: YAML anchors and aliases are not allowed"),
        ("b: *a\n", "my.yaml:1: YAML anchors and aliases are not allowed"),
    ],
)
def test_what_is_no_mapping_file_is_refused(text: str, complaint: str) -> None:
    # Some releases of libyaml have a limit of their own, which they may come to first.
    own = re.escape(complaint.replace("nested too deeply", "not valid YAML: exceeded maximum nesting depth"))
    with pytest.raises(MappingError, match=f"^({re.escape(complaint)}|{own})"):
        mapping_of(text)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("shape: [width, 3, patch, patch]", "dtype: float32", "the key 'shape' is missing"),
        ("generate: arange", "generate: zeros", "expected arange, with dtype int64"),
        ("dtype: int64", "dtype: int65", "unknown element type 'int65'; expected one of float64"),
        ("positions: tokens", "positions: rows", "unknown kind 'rows'; expected one of tokens, grid, relative"),
        ("pre_layrnorm.{param}: [width]", "pre_layrnorm.{rest}: [width]", "only have int variables and lists of words"),
        ("depth: 24", "depth: all", "expected a size, found 'all'"),
        ("text_model.{rest}: CLIP's text", "text_model.{tower}: CLIP's text", "variable 'tower'"),
    ],
)
def test_a_malformed_canonical_layout_is_refused(old: str, new: str, complaint: str) -> None:
    text = registry.yaml_text("deepencoder-clip")
    assert text.count(old) == 1
    with pytest.raises(MappingError, match=rf"^my\.yaml:\d+: .*{complaint}"):
        mapping_of(text.replace(old, new))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"layout: \xff"), "not UTF-8 text"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
        (
            lambda path: path.write_text(GOOD.replace("clip\n", "vit\n")),
            "my.yaml:2: expected one of the families sam, clip, ",
        ),
        (lambda path: path.write_text(registry.yaml_text("deepencoder-sam")), "describes a canonical layout"),
    ],
)
def test_a_users_mapping_file_that_cannot_be_used(tmp_path: Path, make: object, complaint: str) -> None:
    path = tmp_path / "my.yaml"
    make(path)  # type: ignore[operator]
    with pytest.raises(MappingError, match=complaint):
        registry.load_mapping_file(path)


# What each checkpoint is known as, for each family that it can be converted to.
CONVERTS: dict[tuple[str, str], str] = {
    ("sam-meta", "sam"): "sam-meta",
    ("sam-meta-vit-h", "sam"): "sam-meta",
    ("sam-hf-bin", "sam"): "sam-hf",
    ("sam-hf-safetensors", "sam"): "sam-hf",
    ("sam-timm", "sam"): "sam-timm",
    ("mmpretrain", "sam"): "sam-mmpretrain",
    ("got-ocr2-hf-vision", "sam"): "sam-got-ocr2-hf",
    ("got-ocr2", "sam"): "sam-got-ocr2",
    ("deepseek-ocr", "sam"): "sam-deepseek-ocr",
    ("deepseek-ocr-2", "sam"): "sam-deepseek-ocr",
    ("unlimited-ocr-hf-vision", "sam"): "sam-unlimited-ocr-hf",
    ("clip-hf", "clip"): "clip-hf",
    ("clip-hf-current", "clip"): "clip-hf",
    ("clip-hf-vision-336", "clip"): "clip-hf",
    ("clip-openai", "clip"): "clip-openai",
    ("clip-open_clip", "clip"): "clip-openai",
    ("clip-timm", "clip"): "clip-timm",
    ("clip-timm-336", "clip"): "clip-timm",
    ("owlvit", "clip"): "clip-owlvit",
    ("deepseek-ocr", "clip"): "clip-deepseek-ocr",
    ("unlimited-ocr-hf-vision", "clip"): "clip-unlimited-ocr-hf",
    ("deepseek-ocr-2-vision", "sam"): "sam-deepseek-ocr",
    ("deepseek-ocr-2-sglang", "sam"): "sam-deepseek-ocr",
    ("deepseek-ocr-2-hf-vision", "sam"): "sam-unlimited-ocr-hf",
    ("deepseek-ocr-2", "qwen2"): "qwen2-deepseek-ocr2",
    ("deepseek-ocr-2-vision", "qwen2"): "qwen2-deepseek-ocr2",
    ("deepseek-ocr-2-sglang", "qwen2"): "qwen2-deepseek-ocr2-sglang",
    ("deepseek-ocr-2-hf-vision", "qwen2"): "qwen2-deepseek-ocr2-hf",
    ("qwen2-0.5b", "qwen2"): "qwen2-hf",
    ("deepseek-ocr-mlx", "sam"): "sam-mlx",
    ("deepseek-ocr-mlx", "clip"): "clip-mlx",
    ("deepseek-ocr-2-mlx", "sam"): "sam-mlx",
    ("deepseek-ocr-2-mlx", "qwen2"): "qwen2-mlx",
    ("got-ocr2-mlx", "sam"): "sam-got-ocr2-mlx",
    ("deepseek-ocr-mmproj", "sam"): "sam-mmproj",
    ("deepseek-ocr-mmproj", "clip"): "clip-mmproj",
    ("deepseek-ocr-2-mmproj", "sam"): "sam-mmproj",
    ("deepseek-ocr-2-mmproj", "qwen2"): "qwen2-mmproj",
    ("sam-hf-safetensors-mlx", "sam"): "sam-hf-mlx",
    ("clip-hf-current-mlx", "clip"): "clip-hf-mlx",
}
UNUSUAL = {
    "sam-meta-vit-h": {"depth": (32, 12), "width": (1280, 768), "mlp": (5120, 3072), "head": (80, 64)},
    "clip-hf-vision-336": {"positions": (577, 257)},
    "clip-timm-336": {"positions": (577, 257)},
}
SECOND = {"deepseek-ocr-2", *(f"deepseek-ocr-2-{kind}" for kind in ("vision", "sglang", "hf-vision", "mlx", "mmproj"))}
PORTS = {"got-ocr2-mlx", "deepseek-ocr-mlx", "deepseek-ocr-mmproj"}
WITH_COMPRESSOR = {"got-ocr2", "deepseek-ocr", "unlimited-ocr-hf-vision", *PORTS, *SECOND}


def converted(checkpoint: str, family: str, folder: Path) -> ConversionRecord:
    path = sparse(folder / "model.safetensors", inventories()[checkpoint])
    return converter.convert(str(path), family, dry_run=True)


@pytest.mark.parametrize(("checkpoint", "family"), CONVERTS)
def test_every_checkpoint_is_known_and_becomes_all_of_the_target(checkpoint: str, family: str, tmp_path: Path) -> None:
    record = converted(checkpoint, family, tmp_path)
    assert record.mapping == CONVERTS[checkpoint, family]
    assert record.target == f"deepencoder-{family}"
    narrow = {"compressed": (896, 1024)} if checkpoint in SECOND and family == "sam" else {}
    assert record.unusual == UNUSUAL.get(checkpoint, narrow)
    target = inventories()[f"deepencoder-{family}"]
    absent = set()
    if family == "sam" and checkpoint not in WITH_COMPRESSOR:
        absent = {"net_2.weight", "net_3.weight"}
    elif checkpoint == "unlimited-ocr-hf-vision" and family == "clip":
        absent = {"embeddings.patch_embedding.weight"}
    elif checkpoint == "qwen2-0.5b":
        absent = {"query_768.weight", "query_1024.weight"}
    assert set(record.missing) == absent
    if checkpoint != "sam-meta-vit-h":
        assert set(record.converted) == target.keys() - absent
    assert set(record.generated) <= {"embeddings.position_ids"}
    fates = Counter([*record.dropped, *(key for keys in record.converted.values() for key in keys)])
    assert fates == Counter(inventories()[checkpoint].keys())


@pytest.mark.parametrize("wrapper", ["module.", "model.", "_orig_mod.module."])
@pytest.mark.parametrize("checkpoint", ["sam-hf-bin", "clip-openai"])
def test_the_record_has_the_files_own_names(checkpoint: str, wrapper: str, tmp_path: Path) -> None:
    names = {wrapper + name: value for name, value in inventories()[checkpoint].items()}
    path = sparse(tmp_path / "model.safetensors", names)
    record = converter.convert(str(path), checkpoint.split("-")[0], dry_run=True)
    assert {*record.dropped, *(key for keys in record.converted.values() for key in keys)} == set(names)


def resolve(checkpoint: str, family: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of what a conversion would write."""
    opened = open_checkpoint(str(sparse(folder / "model.safetensors", inventories()[checkpoint])))
    known = detect_layout(opened, registry.layouts(family), ConvertOptions(family))
    tensors = {name: lazy_read(tensor) for name, tensor in known.tensors.items()}
    plan = make_plan(known.match.layout.mapping, known.match.prefix, registry.canonical(family), tensors, checkpoint)
    return {name: value.shape for name, value in plan.outputs.items()}


@pytest.mark.parametrize(("checkpoint", "family"), [key for key in CONVERTS if key[0] not in UNUSUAL])
def test_every_checkpoint_becomes_the_targets_shapes(checkpoint: str, family: str, tmp_path: Path) -> None:
    shapes = resolve(checkpoint, family, tmp_path)
    target = inventories()[f"deepencoder-{family}"]
    if checkpoint in SECOND and family == "sam":
        assert shapes.pop("net_3.weight") == (896, 512, 3, 3)
    assert shapes == {name: shape for name, (_, shape) in target.items() if name in shapes}


def test_larger_models_keep_their_shapes(tmp_path: Path) -> None:
    huge = resolve("sam-meta-vit-h", "sam", tmp_path)
    source = inventories()["sam-meta-vit-h"]
    assert huge == {name: source[f"image_encoder.{name}"][1] for name in huge}
    assert sum(name.startswith("image_encoder.") for name in source) == len(huge)
    for checkpoint in ("clip-hf-vision-336", "clip-timm-336"):
        wide = resolve(checkpoint, "clip", tmp_path)
        assert wide["embeddings.position_embedding.weight"] == (577, 1024)
        assert wide["embeddings.position_ids"] == (1, 577)


REFUSED = [
    (checkpoint, family)
    for checkpoint in inventories()
    for family in registry.families()
    if (checkpoint, family) not in CONVERTS
]


@pytest.mark.parametrize(("checkpoint", "family"), REFUSED)
def test_every_other_checkpoint_is_refused_with_its_reason(checkpoint: str, family: str, tmp_path: Path) -> None:
    if checkpoint == f"deepencoder-{family}":
        assert converted(checkpoint, family, tmp_path).unchanged
        return
    kinds = [kind for kind in registry.families() if (checkpoint, kind) in CONVERTS or checkpoint.endswith(f"-{kind}")]
    reason = f"is a {kinds[0].upper()} checkpoint, not {family.upper()}\nrun: dsocr-convert {kinds[0]}"
    if checkpoint in {*SECOND, "deepencoder-qwen2"}:
        reason = (
            r"has a Qwen2 in the place of CLIP.*\nits encoders convert: dsocr-convert sam \.\.\., dsocr-convert qwen2"
        )
    elif checkpoint == "qwen2-0.5b":
        reason = "is a language model without a vision encoder"
    with pytest.raises(LayoutError, match=reason):
        converted(checkpoint, family, tmp_path)


@pytest.mark.parametrize("checkpoint", inventories())
def test_inspect_says_what_convert_would_do(checkpoint: str, tmp_path: Path) -> None:
    path = sparse(tmp_path / "model.safetensors", inventories()[checkpoint])
    found = converter.inspect(str(path))
    assert found.num_tensors == len(inventories()[checkpoint])
    layouts = {entry.family: entry.layout for entry in found.layouts if entry.record}
    expected = {family: layout for (name, family), layout in CONVERTS.items() if name == checkpoint}
    if checkpoint.startswith("deepencoder-"):
        expected[checkpoint.removeprefix("deepencoder-")] = checkpoint
    assert layouts == expected
    unchanged = [entry.family for entry in found.layouts if entry.record and entry.record.unchanged]
    assert unchanged == [checkpoint.removeprefix("deepencoder-")] * checkpoint.startswith("deepencoder-")


def without(inventory: Inventory, name: str) -> Inventory:
    return {key: value for key, value in inventory.items() if key != name}


def with_shape(inventory: Inventory, name: str, *shape: int) -> Inventory:
    return {**inventory, name: (inventory[name][0], shape)}


def with_type(inventory: Inventory, name: str, dtype: str) -> Inventory:
    return {**inventory, name: (dtype, inventory[name][1])}


META, HF = inventories()["sam-meta"], inventories()["clip-hf"]
Q5 = "vision_model.encoder.layers.5.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("inventory", "family", "message"),
    [
        (without(META, "image_encoder.blocks.7.attn.qkv.bias"), "sam", "missing tensor 'blocks.7.attn.qkv.bias'"),
        (without(HF, Q5), "clip", rf"clip-hf.yaml:\d+: '{Q5}' is missing next to"),
        ({**META, "image_encoder.cls": ("float32", (1,))}, "sam", "no rule claims 'image_encoder.cls'"),
        ({**HF, "vision_model.extra.weight": ("float32", (1,))}, "clip", "no rule claims 'vision_model.extra.weight'"),
        (
            with_shape(META, "image_encoder.blocks.3.norm1.bias", 767),
            "sam",
            r"'blocks.3.norm1.bias' \(from 'image_encoder.blocks.3.norm1.bias'\) has shape \[767\]; "
            r"expected \[width\], where width = 768",
        ),
        (with_shape(HF, Q5, 1024, 1023), "clip", r"clip-hf.yaml:\d+: .*cannot fuse shapes \[1024, 1023\]"),
        (with_type(HF, Q5, "float16"), "clip", r"clip-hf.yaml:\d+: .*cannot fuse float16 with float32"),
        (with_type(META, "image_encoder.pos_embed", "int64"), "sam", "is int64; expected a floating-point type"),
        (
            with_type(HF, "vision_model.embeddings.position_ids", "int32"),
            "clip",
            "'embeddings.position_ids' .* is int32; expected int64",
        ),
        (
            {**META, "image_encoder.blocks.99999.norm1.bias": ("float32", (768,))},
            "sam",
            "layer index 99999 with only 315 tensors",
        ),
    ],
)
def test_a_checkpoint_that_is_not_quite_its_layout_is_refused(
    inventory: Inventory, family: str, message: str, tmp_path: Path
) -> None:
    path = sparse(tmp_path / "model.safetensors", inventory)
    with pytest.raises(MappingError, match=message):
        converter.convert(str(path), family, dry_run=True)
