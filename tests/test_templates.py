from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from converter.layouts.template import Bindings, Kind, Template

VARIABLES: dict[str, Kind] = {
    "layer": "int",
    "i": "int",
    "module": "name",
    "other": "name",
    "rest": "path",
    "more": "path",
    "proj": ("q", "k", "v"),
    "n": ("1", "2", "12"),
    "loose": ("a", "aa"),
}


@pytest.mark.parametrize(
    ("template", "name", "expected"),
    [
        ("a.b", "a.b", {}),
        ("a.b", "a.bc", None),
        ("a.b", "xa.b", None),
        ("a.b", "a-b", None),
        ("a.b", "a.b\n", None),
        ("h.{layer}.w", "h.0.w", {"layer": "0"}),
        ("h.{layer}.w", "h.10.w", {"layer": "10"}),
        ("h.{layer}.w", "h.01.w", None),
        ("h.{layer}.w", "h.-1.w", None),
        ("h.{layer}.w", "h.1_0.w", None),
        ("h.{layer}.w", "h.\u0663.w", None),
        ("h.{layer}.w", "h.1000000.w", None),
        ("h.{layer}.w", "h..w", None),
        ("{module}.w", "a.w", {"module": "a"}),
        ("{module}.w", "a.b.w", None),
        ("{module}.w", ".w", None),
        ("pre{module}post", "preApost", {"module": "A"}),
        ("{rest}", "a.b.c", {"rest": "a.b.c"}),
        ("{rest}", "", None),
        ("{rest}", "a\n.b", {"rest": "a\n.b"}),
        ("{rest}.w", "a.b.w", {"rest": "a.b"}),
        ("{rest}.{module}", "a.b.c", {"rest": "a.b", "module": "c"}),
        ("{module}.{rest}", "a.b.c", {"rest": "b.c", "module": "a"}),
        ("{proj}_proj", "q_proj", {"proj": "q"}),
        ("{proj}_proj", "o_proj", None),
        ("n{n}.w", "n12.w", {"n": "12"}),
        ("n{n}.w", "n21.w", None),
        ("h.{layer+1}.w", "h.1.w", {"layer": "0"}),
        ("h.{layer+1}.w", "h.0.w", None),
        ("h.{layer-1}.w", "h.0.w", {"layer": "1"}),
        ("h.{layer+10}.{i}", "h.12.7", {"layer": "2", "i": "7"}),
    ],
)
def test_matches_the_whole_name_or_nothing(template: str, name: str, expected: Bindings | None) -> None:
    assert Template.parse(template, VARIABLES).match(name) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{unknown}", "'unknown', which `variables` does not list"),
        ("{proj+1}", "adds to 'proj', which is not an int"),
        ("{rest-1}", "adds to 'rest', which is not an int"),
        ("{layer", "brace"),
        ("layer}", "brace"),
        ("{}", "brace"),
        ("{{layer}}", "brace"),
        ("{Layer}", "brace"),
        ("{layer + 1}", "brace"),
        ("{layer}.{layer+1}", "a variable twice"),
        ("{layer}{i}", "nothing but digits between"),
        ("{layer}7{i}", "nothing but digits between"),
        ("{rest}.x.{more}", "two variables that span dots"),
        ("{module}_{other}", "no dot between"),
        ("{module}_{proj}", "no dot between"),
        ("{proj}x{rest}", "no dot between"),
        ("{layer}_{rest}", "no dot between"),
    ],
)
def test_what_could_be_ambiguous_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        Template.parse(text, VARIABLES)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        # axaxb is (a, axb) and (axa, b).
        ("{u}x{v}", {"u": ("a", "axa"), "v": ("b", "axb")}),
        # xa1ba0by is (x, 1, a0by) and (xa1b, 0, y).
        ("{u}a{i}b{v}", {"u": ("x", "xa1b"), "v": ("y", "a0by"), "i": "int"}),
    ],
)
def test_words_that_can_be_read_in_two_ways_are_refused(text: str, variables: Mapping[str, Kind]) -> None:
    with pytest.raises(ValueError, match=r"can match one name in two ways|words with digits"):
        Template.parse(text, variables)


def test_a_fused_variable_becomes_literal_text_and_a_prefix_goes_before_all() -> None:
    template = Template.parse("h.{layer+1}.{proj}_{i}", VARIABLES).bind("proj", "q").prefixed("m.")
    assert template.text == "m.h.{layer+1}.q_{i}"
    assert template == Template.parse("m.h.{layer+1}.q_{i}", VARIABLES)
    assert template.match("m.h.1.q_2") == {"layer": "0", "i": "2"}


def test_no_name_for_a_negative_layer() -> None:
    with pytest.raises(ValueError, match=r"\{layer-2\} is negative where layer is 1"):
        Template.parse("h.{layer-2}", VARIABLES).fill({"layer": "1"})


# Few letters, so that words, literals and separators collide as often as can be.
letters = st.text("ab1_", min_size=1, max_size=3)
kinds: st.SearchStrategy[Kind] = st.one_of(
    st.sampled_from(["int", "name", "path"]), st.lists(letters, min_size=1, max_size=3, unique=True).map(tuple)
)
variable_sets = st.dictionaries(st.sampled_from("uvwxy"), kinds, min_size=1, max_size=4)


@st.composite
def templates(draw: st.DrawFn) -> tuple[Template, dict[str, Kind]]:
    """A template that `parse` accepts, and its variables."""
    variables = draw(variable_sets)
    text = draw(st.sampled_from(["", "a", "b.", "1"]))
    for name in draw(st.permutations(sorted(variables))):
        offset = draw(st.sampled_from(["", "", "+1", "-1", "+12"])) if variables[name] == "int" else ""
        text += f"{{{name}{offset}}}" + draw(st.sampled_from([".", "a", "b", "_", ".a.", "a.", ".b", "1a", ""]))
    try:
        return Template.parse(text, variables), variables
    except ValueError:
        assume(False)
        raise


def values(kind: Kind) -> st.SearchStrategy[str]:
    if isinstance(kind, tuple):
        return st.sampled_from(kind)
    if kind == "int":
        return st.integers(1, 900_000).map(str)
    segment = st.text("ab1_", min_size=1, max_size=4)
    return segment if kind == "name" else st.lists(segment, min_size=1, max_size=3).map(".".join)


@settings(deadline=None)
@given(templates(), st.data())
def test_matching_undoes_filling(made: tuple[Template, dict[str, Kind]], data: st.DataObject) -> None:
    template, variables = made
    bindings = {field.name: data.draw(values(variables[field.name])) for field in template.fields}
    assume(not any(int(bindings[field.name]) + field.offset < 0 for field in template.fields if field.offset))
    assert template.match(template.fill(bindings)) == bindings


@settings(deadline=None)
@given(templates(), st.lists(st.sampled_from(["a", "b", "1", "0", "12", "_", "."]), max_size=9).map("".join))
def test_filling_undoes_matching(made: tuple[Template, dict[str, Kind]], name: str) -> None:
    bindings = made[0].match(name)
    if bindings is not None:
        assert made[0].fill(bindings) == name


@settings(deadline=None)
@given(templates())
def test_a_template_reads_as_it_was_written(made: tuple[Template, dict[str, Kind]]) -> None:
    template, variables = made
    assert Template.parse(template.text, variables) == template


@pytest.mark.parametrize(
    "text",
    [
        "{rest}.{module}.{other}.w",
        "{module}.{rest}.{other}",
        "a{rest}a.a{module}a.a{other}a",
        "{rest}.{layer}.{n}.{loose}x",
        "{loose}_{proj}_{layer}.{rest}",
    ],
)
@pytest.mark.parametrize("segment", ["a", ".", "a.", "1.", "aa.aa", "a_1_", "12", ".w"])
def test_no_name_makes_a_template_hang(text: str, segment: str) -> None:
    template = Template.parse(text, VARIABLES)
    name = segment * (200_000 // len(segment))
    began = time.process_time()
    template.match(name)
    template.match(name + "!")
    assert time.process_time() - began < 1


def test_no_list_of_words_makes_parsing_hang() -> None:
    words = tuple(f"w{'a' * i}" for i in range(2000))
    with pytest.raises(ValueError, match="more than 1000 combinations"):
        Template.parse("{u}x{v}x{w}", {"u": words, "v": words, "w": words})
