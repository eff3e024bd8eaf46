"""Mapping files from strangers: YAML's own traps, rules that contradict each other, and sizes made to be slow."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch

from converter.layouts import registry
from hostile.case import Accepted, Build, Case, Refused, clip, marker, sam

GOOD = registry.yaml_text("sam-meta")
HEAD = "layout: x\nfamily: sam\ndescription: d\ndetect: {image_encoder.pos_embed: [_, _, _, _]}\n"
CHECK = ("mapping", "check")
# What can be written in place of the rule for `pos_embed`, so that all else fits still.
OWN, PATCHES = "  - keep: pos_embed\n", "  - keep: patch_embed.{rest}\n"
LONG = "x" * 900_000


def _source(folder: Path) -> Path:
    path = folder / "sam.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in sam().items()}, path)
    return path


def _checked(content: str | bytes) -> Build:
    """The file alone, for `mapping check`."""

    def build(folder: Path) -> Path:
        path = folder / "m.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return build


def _used(content: str | bytes) -> Build:
    """A checkpoint, and the file to convert it by."""
    return lambda folder: [_source(folder), "--mapping", _checked(content)(folder)]


def _special(make: Callable[[Path], object]) -> Build:
    """A checkpoint, and something that is no regular file."""

    def build(folder: Path) -> Sequence[str | Path]:
        make(folder / "m.yaml")
        return [_source(folder), "--mapping", folder / "m.yaml"]

    return build


def _changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def _canary(text: str) -> Build:
    return lambda folder: _checked(_changed("description: Meta", f"description: {text} Meta"))(folder)


def _executing(tag: str) -> Build:
    """A tag that an unsafe loader runs."""

    def build(folder: Path) -> Path:
        text = f'description: !!python/{tag} ["touch {marker(folder)}"]\nignored: Meta'
        return _checked(_changed("description: Meta", text))(folder)

    return build


def _laughs(merge: bool) -> str:
    first, each = ("a0: &a0 {x: y}", "{{<<: *a{0}, k{1}: *a{0}}}") if merge else ("a0: &a0 [x, x]", "[*a{0}, *a{0}]")
    return "\n".join([first, *(f"a{i + 1}: &a{i + 1} " + each.format(i, i) for i in range(40))]) + "\n" + GOOD


def _rules(*rules: str, variables: str = "") -> str:
    return (
        HEAD + (f"variables: {{{variables}}}\n" if variables else "") + "rules:\n" + "".join(f"- {r}\n" for r in rules)
    )


def _then(operation: str) -> str:
    """Something done to the patch embedding's bias."""
    return _changed(PATCHES, f"{PATCHES.replace('{rest}', 'proj.weight')}  - keep: patch_embed.proj.bias\n"
                             f"    then: [{operation}]\n")  # fmt: skip


# Text that no checkpoint is needed to refuse, with the line and the cause.
REFUSED: dict[str, tuple[Build, tuple[str, ...]]] = {
    **{
        f"tag that runs, {tag}": (_executing(tag), ("m.yaml:3", "tag", f"python/{tag}"))
        for tag in ("object/apply:os.system", "object/new:subprocess.Popen", "module:os")
    },
    "tag that names a function": (_canary("!!python/name:os.system"), ("m.yaml:3", "tag", "os.system")),
    "tag of no known kind": (_canary("!include /etc/passwd"), ("m.yaml:3", "tag '!include'")),
    "tag of YAML's own": (_canary("!!str"), ("m.yaml:3", "tag", "org,2002:str")),
    "tag under another handle": (
        _checked(f"%TAG !p! tag:yaml.org,2002:python/\n---\n{GOOD.replace('family: ', 'family: !p!name:os.system ')}"),
        ("m.yaml:4", "tag", "os.system"),
    ),
    "a billion laughs": (_checked(_laughs(False)), ("m.yaml:1:", "anchors and aliases")),
    "merge keys that double": (_checked(_laughs(True)), ("m.yaml:1:", "anchors and aliases")),
    "a list that holds itself": (_canary("&a [*a]\nignored:"), ("m.yaml:3", "anchors and aliases")),
    "merge key without alias": (_checked("<<: {a: b}\n" + GOOD), ("m.yaml:1:", "unknown key '<<'", "expected one of")),
    "lists in lists, 100,000": (_checked("a: " + "[" * 100_000), ("m.yaml:1:", "nest")),
    "mappings in mappings, 100,000": (_checked("{a: " * 100_000), ("m.yaml:1:", "nest")),
    "blocks in blocks, 100,000": (_checked("- " * 100_000), ("m.yaml:1:", "nest")),
    "17 levels": (_checked(_changed("pos_embed\n", "[" * 17 + "]" * 17 + "\n")), ("m.yaml:18", "nested too deeply")),
    "a key twice": (_checked(GOOD + "family: clip\n"), ("m.yaml:28", "duplicate key 'family'")),
    "a variable twice": (
        _checked(_changed("rest: path", "rest: path\n  rest: int")), ("m.yaml:7", "duplicate key 'rest'"),
    ),
    "a key twice in a rule": (
        _checked(_changed(OWN, "  - {keep: a, keep: b}\n")), ("m.yaml:18", "duplicate key 'keep'"),
    ),
    "unknown field": (_checked(GOOD + "run: id\n"), ("m.yaml:28", "unknown key 'run'", "detect")),
    "misspelt field": (_checked(_changed("family:", "familly:")), ("m.yaml:2", "unknown key 'familly'", "family")),
    "unknown operation": (_checked(_then("exec: id")), ("m.yaml:21", "unknown key 'exec'", "permute")),
    "unknown family": (_checked(_changed("family: sam", "family: vit")), ("m.yaml:2", "sam, clip", "'vit'")),
    **{
        f"{name} of another type": (_checked(_changed(old, new)), (f"m.yaml:{line}", found))
        for name, old, new, line, found in (
            ("name", "layout: sam-meta", "layout: [sam-meta]", 1, "found a list"),
            ("family", "family: sam", "family: {a: b}", 2, "found a mapping"),
            ("variables", "  rest: path", "  - rest", 6, "found a list"),
            ("prefix", "prefix: image_encoder.", "prefix: {a: b}", 8, "found a mapping"),
            ("shape", "[width, 3, patch, patch]", "width", 10, "found 'width'"),
            ("size", "[width, 3, patch, patch]", "[.inf, 3, patch, patch]", 10, "'.inf' is not a dimension"),
            ("rule", OWN, "  - pos_embed\n", 18, "found 'pos_embed'"),
            ("template", "keep: pos_embed", "keep: [pos_embed]", 18, "found a list"),
            ("flag", OWN, f"{OWN}    optional: 1\n", 19, "expected true or false, found '1'"),
        )
    },
    **{
        f"the number {number[:9]}": (_checked(_then(f"unsqueeze: {number}")), ("m.yaml:21", f"found '{number[:9]}"))
        for number in (".nan", ".inf", "-1", "1.0", "1e0", "0x1", "0o1", "010", "1_0", "\u0663", "1" * 5000)
    },
    "permutation of 100,000 numbers": (
        _checked(_then(f"permute: [{', '.join(map(str, range(100_000)))}]")),
        ("m.yaml:21", "found 100000 numbers"),
    ),
    "reshape to a number of 9,000 digits": (
        _checked(_then(f"reshape: {{from: [{'999999999, ' * 1000}], to: [1]}}")),
        ("m.yaml:21", "found 1000 numbers"),
    ),
    "no heads": (_checked(_then("deinterleave: {heads: 0, parts: 3}")), ("m.yaml:21", "found 0")),
    "variables that touch": (
        _checked(_rules("keep: '{a}{b}'", variables="a: int, b: int")),
        ("m.yaml:7", "two variables with nothing but digits between"),
    ),
    "100 variables side by side": (
        _checked(_rules("keep: '" + "".join(f"{{v{i}}}" for i in range(100)) + "'",
                        variables=", ".join(f"v{i}: name" for i in range(100)))),
        ("m.yaml:7", "two variables with nothing but digits between"),
    ),
    "words that can be read in two ways": (
        _checked(_rules("keep: '{a}x{b}'", variables="a: [a, axa], b: [b, axb]")),
        ("m.yaml:7", "can match one name in two ways"),
    ),
    "a million readings": (
        _checked(_rules("keep: '{a}x{b}'", variables=", ".join(
            f"{name}: [{', '.join(f'{name}{i}' for i in range(1000))}]" for name in "ab"))),
        ("m.yaml:7", "more than 1000 combinations"),
    ),
    "words of 100,000 characters": (
        _checked(_rules("keep: '{a}'", variables=f"a: [{'a' * 100_000}, b]")), ("m.yaml:5", "'a'", "at most 100"),
    ),
    "20 rules of 20,000 words": (
        _checked(_rules(*(f"keep: '{{a}}.{i}'" for i in range(20)),
                        variables=f"a: [{', '.join(f'w{i}' for i in range(20_000))}]")),
        ("m.yaml:7", "the rules have more than"),
    ),
    "a template of 3,000 variables": (
        _checked(_rules(f"keep: '{'.'.join(f'{{v{i}}}' for i in range(3000))}'",
                        variables=", ".join(f"v{i}: name" for i in range(3000)))),
        ("m.yaml:7", "'{v0}.{v1}", "the limit is 1000"),
    ),
    "60,000 rules": (_checked(_rules(*("keep: a" for _ in range(60_000)))), ("m.yaml:6", "more than 4096 rules")),
    "one drop of 60,000 names": (
        _checked(_rules(f"{{because: x, drop: [{'a, ' * 60_000}]}}")), ("m.yaml:6", "more than 4096 rules")
    ),
    "a variable that is nowhere": (_checked(_rules("keep: '{a}'")), ("m.yaml:6", "'a', which `variables` does not")),
    "braces in braces": (_checked(_rules("keep: '{{a}}'", variables="a: int")), ("m.yaml:7", "a brace")),
    "a value of 900,000 characters": (_checked(f"layout: x\nfamily: {LONG}\n"), ("m.yaml:1:", "'description'")),
    "a key of 900,000 characters": (_checked(f"? {LONG}\n: v\n{GOOD}"), ("m.yaml:1:", "unknown key 'xxx")),
    "an error of 900,000 characters": (_checked(_changed("family: sam", f"family: {LONG}")), ("m.yaml:2", "xxx")),
    "over a megabyte": (_checked("#" * (1 << 20) + "\n" + GOOD), ("m.yaml: larger than 1048576",)),
    "binary": (_checked(bytes(range(256)) * 40), ("m.yaml: not UTF-8",)),
    "a PNG": (_checked(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), ("m.yaml: not UTF-8",)),
    "Latin-1": (_checked(GOOD.encode() + b"# caf\xe9\n"), ("m.yaml: not UTF-8",)),
    "half of a surrogate pair": (_checked(GOOD.encode() + b"# \xed\xa0\x80\n"), ("m.yaml: not UTF-8",)),
    "UTF-16": (_checked(GOOD.encode("utf-16")), ("m.yaml: not UTF-8",)),
    "UTF-16 without a mark": (_checked("a: b".encode("utf-16-le")), ("m.yaml: not valid YAML",)),
    "NUL": (_checked(GOOD + "\0"), ("m.yaml", "not valid YAML")),
    "an escape sequence as it is": (_checked(GOOD + "# \x1b]0;owned\x07\n"), ("m.yaml", "not valid YAML")),
    "an escape sequence, quoted": (
        _checked(_changed("family: sam", '"\\e[31m\\u202E": sam')), ("m.yaml:2", "unknown key '\\x1b[31m\\u202e'"),
    ),
    "two documents": (_checked(GOOD + "---\n" + GOOD), ("m.yaml:28", "expected one YAML document")),
    "empty": (_checked(""), ("m.yaml: empty",)),
    "comments alone": (_checked("# a\n# b\n"), ("m.yaml: empty",)),
    "null": (_checked("~\n"), ("m.yaml:1:", "expected a mapping file, found '~'")),
    "a list": (_checked("- a\n"), ("m.yaml:1:", "expected a mapping file, found a list")),
    "tabs": (_checked(_changed("family: sam", "\tfamily: sam")), ("m.yaml:2", "not valid YAML")),
    "JSON that ends early": (_checked('{"layout": "x", '), ("m.yaml:2", "not valid YAML")),
}  # fmt: skip

# Rules that are well-formed, and that a tiny SAM contradicts.
CONTRADICTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "a canonical layout": (registry.yaml_text("deepencoder-sam"), ("m.yaml", "describes a canonical layout")),
    "two rules for one name": (
        _changed(OWN, f"{OWN}  - keep: pos_embed\n"),
        ("'image_encoder.pos_embed' is claimed by two rules", "m.yaml:18", "m.yaml:19"),
    ),
    "many names become one": (
        _changed("  - keep: neck.{rest}", "  - {rename: neck.0.weight, to: neck.1.weight}\n  - keep: neck.{rest}"),
        ("'image_encoder.neck.0.weight' is claimed by two rules",),
    ),
    "a name made twice": (
        _changed(OWN, "  - {rename: pos_embed, to: patch_embed.proj.weight}\n"),
        ("'patch_embed.proj.weight' is produced twice", "m.yaml:18", "m.yaml:19"),
    ),
    "a rule that matches nothing": (
        _changed(OWN, f"{OWN}  - keep: rel_pos\n"), ("m.yaml:19", "the rule matches nothing", "image_encoder.rel_pos"),
    ),
    "a rule that matches nothing, of many lines": (
        _changed(OWN, OWN + '  - keep: "a' + "\\nerror: \\e[2J" * 50 + '"\n'),
        ("m.yaml:19", "the rule matches nothing", "a\\nerror: \\x1b[2J"),
    ),
    "no rule for a tensor": (_changed(OWN, ""), ("no rule claims 'image_encoder.pos_embed'",)),
    "a name the target has not": (
        _changed(OWN, "  - {rename: pos_embed, to: positions}\n"),
        ("has no tensor 'positions'", "m.yaml:18", "missing tensor 'pos_embed'"),
    ),
    "a name that is dropped and needed": (
        _changed(OWN, "  - {drop: pos_embed, because: why not}\n"), ("missing tensor 'pos_embed'",),
    ),
    "recognised by a tensor that is not there": (
        _changed("  neck.0.weight: [neck", "  net_2.weight: [neck"), ("no SAM layout fits", "nearest is sam-meta"),
    ),
    "fuses tensors of two shapes": (
        _changed(PATCHES, "  - {fuse: 'patch_embed.proj.{p}', parts: {p: [weight, bias]}, into: a}\n")
        .replace("rest: path", "rest: path\n  p: [weight, bias]"),
        ("m.yaml:20", "cannot fuse shapes"),
    ),
    "permutes too many dimensions": (_then("permute: [1, 0]"), ("m.yaml:20", "cannot permute shape [24]")),
    "a reshape that overflows 64 bits": (
        _then(f"reshape: {{from: [{'999999999, ' * 60}], to: [{'999999999, ' * 60}]}}"),
        ("m.yaml:20", "'image_encoder.patch_embed.proj.bias'", "found [24]"),
    ),
    "a dimension beyond all": (_then("unsqueeze: 999999999"), ("m.yaml:20", "cannot insert dimension 999999999")),
    "a billion heads": (_then("deinterleave: {heads: 999999999, parts: 999999999}"), ("m.yaml:20", "999999999 heads")),
    "a shape that the target has not": (
        _then("unsqueeze: 0"), ("'patch_embed.proj.bias'", "has shape [1, 24]; expected [width]"),
    ),
    "a negative layer": (
        _changed("  - keep: blocks.{rest}", "  - {rename: 'blocks.{i}.{rest}', to: 'blocks.{i-1}.{rest}'}")
        .replace("  rest: path", "  rest: path\n  i: int"),
        ("m.yaml:21", "{i-1} is negative where i is 0"),
    ),
    "layers from 900": (
        _changed("  - keep: blocks.{rest}", "  - {rename: 'blocks.{i}.{rest}', to: 'blocks.{i+900}.{rest}'}")
        .replace("  rest: path", "  rest: path\n  i: int"),
        ("layer index 902 with only",),
    ),
}  # fmt: skip

ODD: dict[str, Build] = {
    "shipped": _used(GOOD),
    "a byte order mark": _used(b"\xef\xbb\xbf" + GOOD.encode()),
    "Windows line ends": _used(GOOD.replace("\n", "\r\n")),
    "an end-of-document mark": _used("---\n" + GOOD + "...\n"),
    "a symbolic link": lambda folder: [
        _source(folder), "--mapping", _linked(folder, _checked(GOOD)(folder)),
    ],
    "4,000 rules for nothing": _used(
        _changed(OWN, OWN + "".join(f"  - {{keep: 'x{i}.{{rest}}', optional: true}}\n" for i in range(4000)))
    ),
    "open-ended segments": _used(
        _changed("  rest: path", "  rest: path" + "".join(f"\n  n{i}: name" for i in range(60)))
        .replace(OWN, f"{OWN}  - drop: '{{rest}}.{'.'.join(f'{{n{i}}}' for i in range(60))}.x'\n"
                      "    because: x\n    optional: true\n")
    ),
}  # fmt: skip


def _linked(folder: Path, path: Path) -> Path:
    link = folder / "link.yaml"
    link.symlink_to(path.name)
    return link


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


# What --mapping names, where that is no file of text.
NO_FILES: dict[str, tuple[Build, tuple[str, ...]]] = {
    "a folder": (_special(Path.mkdir), ("m.yaml: cannot be read: Is a directory",)),
    "a pipe": (_special(os.mkfifo), ("m.yaml: is not a file",)),
    "nothing": (_special(str), ("m.yaml: cannot be read: No such file",)),
    "a link to nowhere": (_special(lambda path: path.symlink_to("none")), ("m.yaml: cannot be read: No such file",)),
    "a link to itself": (_special(lambda path: path.symlink_to(path)), ("m.yaml: cannot be read: ",)),
    "a terabyte of nothing": (_special(_huge), ("m.yaml: larger than 1048576",)),
    "/dev/zero": (lambda folder: [_source(folder), "--mapping", "/dev/zero"], ("/dev/zero: is not a file",)),
    "/dev/null": (lambda folder: [_source(folder), "--mapping", "/dev/null"], ("/dev/null: is not a file",)),
    "the checkpoint": (lambda folder: [_source(folder), "--mapping", folder / "sam.safetensors"], ("not UTF-8",)),
}


def _wild_tensor(folder: Path) -> Sequence[str | Path]:
    """A tensor without elements, whose zero rows any number of heads divides."""
    state = {**sam(), "image_encoder.empty": sam()["image_encoder.pos_embed"].new_empty(0)}
    path = folder / "sam.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    text = _changed(OWN, f"{OWN}  - keep: empty\n    then: [deinterleave: {{heads: 999999999, parts: 999999999}}]\n")
    return [path, "--mapping", _checked(text)(folder)]


def _other_family(folder: Path) -> Sequence[str | Path]:
    path = folder / "clip.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in clip().items()}, path)
    return [path, "--mapping", _checked(GOOD)(folder)]


CASES = [
    *(Case(f"mapping: {name}", build, Refused(words), CHECK) for name, (build, words) in REFUSED.items()),
    *(Case(f"mapping: {name}", _used(text), Refused(words)) for name, (text, words) in CONTRADICTED.items()),
    *(Case(f"mapping: {name}", build, Refused(words)) for name, (build, words) in NO_FILES.items()),
    *(Case(f"mapping: odd, {name}", build, Accepted(sam)) for name, build in ODD.items()),
    Case("mapping: a billion heads of no rows", _wild_tensor, Refused(("m.yaml:19", "999999999 heads"))),
    Case(
        "mapping: the other family's",
        _other_family,
        Refused(("is for the family 'sam', not 'clip'", "dsocr-convert sam"), code=2),
        ("clip",),
    ),
    Case(
        "mapping: tag in use",
        _used(_changed("family: sam", "family: !!python/object/apply:os.system [id] sam")),
        Refused(("m.yaml:2", "tag")),
    ),
]
