"""Reports of a verification: complete, and safe with hostile names."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import junitparser
import models
import pytest
import torch
import yaml
from command import run
from PIL import Image
from rich.console import Console

import converter
from converter import reports
from converter.errors import ContainerError, OutputError, printable
from converter.reports import github, html, junit, text, words
from converter.verification import pictures
from converter.verification.result import (
    FAILED,
    INCONCLUSIVE,
    PASSED,
    SKIPPED,
    WARNING,
    Check,
    Control,
    Picture,
    Trace,
    TracePoint,
    Verification,
)

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium")
HOSTILE = "<script>alert('x')</script>]]>\x1b[31m\r\n::set-env name=a::b%0A|`c`[d](http://e.f)\u202e\x00&amp;"

PROBES = [*(f"blocks.{i}" for i in range(12)), "neck"]


def trace(errors: list[float], name: str = "reference at 224 x 224", probe: str = "{}") -> Trace:
    points = [TracePoint(probe.format(p), error, 6e-7, 2.4e-6) for p, error in zip(PROBES, errors, strict=True)]
    return Trace(name, points)


GOOD = trace([3e-7] * 13)
BAD = trace([0.0] + [3e-7] * 5 + [1e-2] * 6 + [math.inf])


def verification(**changes: object) -> Verification:
    checks = [
        Check("structure", "layout", PASSED, "294 tensors have the names, shapes and types of deepencoder-clip"),
        Check("structure", "missing", WARNING, "loading it misses exactly net_2.weight", ["net_2.weight"]),
        Check("bytes", "tensors", PASSED, "294 tensors equal their sources in every bit"),
        Check("outputs", GOOD.name, PASSED, "relative error 3e-07", figures={"error": 3e-7, "tolerance": 2.4e-6}),
    ]
    found = Verification(
        converted="deepencoder-clip.safetensors",
        source="clip",
        family="clip",
        mapping="clip-hf",
        reference="transformers 5.0 CLIPVisionModel",
        device="CPU, 2 threads",
        dtype="float32",
        environment={"dsocr-convert": "1.0", "torch": "2.9"},
        checks=checks,
        traces=[GOOD],
        seconds={"structure": 0.1, "bytes": 0.5, "outputs": 12.3},
        key_map={f"layers.{i}.qkv.weight": [f"h.{i}.{part}" for part in "qkv"] for i in range(3)}
        | {"position_ids": []},
    )
    return replace(found, **changes)


def wrong(count: int = 40, name: str = "layers.{}.weight") -> Verification:
    """A verification with `count` wrong tensors."""
    names = [name.format(i) for i in range(count)]
    faults = [Check("bytes", n, FAILED, f"{n} differs from its source", [n], {"error": math.nan}) for n in names]
    at_fault = Check("outputs", "chain", FAILED, "blocks.6 is the first to diverge", ["blocks.6", "blocks.7", "rule 3"])
    return verification(checks=[*verification().checks[:2], *faults, at_fault], traces=[BAD])


def hostile() -> Verification:
    """Hostile text wherever text goes."""
    found = wrong(3, HOSTILE + "{}")
    texts = dict.fromkeys(("converted", "source", "family", "mapping", "reference", "device", "dtype"), HOSTILE)
    return replace(
        found,
        **texts,
        environment={"torch": HOSTILE},
        checks=[
            *found.checks,
            Check("outputs", HOSTILE, SKIPPED, HOSTILE),
            Check("structure", HOSTILE, WARNING, HOSTILE, [HOSTILE]),
        ],
        traces=[replace(BAD, name=HOSTILE, points=[replace(point, probe=HOSTILE) for point in BAD.points])],
        key_map={HOSTILE: [HOSTILE]},
        pictures=[Picture(HOSTILE, HOSTILE, b"")],
    )


LAYOUT = Check("structure", "layout", PASSED, "names fit")
NO_SOURCE = Check("bytes", "tensors", SKIPPED, "no --source")
FAST = Check("outputs", "encoder", SKIPPED, "--fast")
NO_REFERENCE = Check("outputs", "encoder", INCONCLUSIVE, "no second implementation")
DIGESTS = Check("record", "tensors", PASSED, "digests fit")


def partly() -> Verification:
    """A part that was not checked, one that is inconclusive, and both required."""
    return verification(checks=[LAYOUT, NO_SOURCE, NO_REFERENCE], required=["structure", "bytes", "outputs"])


ALL = {
    "good": verification,
    "partly": partly,
    "wrong": wrong,
    "hostile": hostile,
    "empty": lambda: verification(checks=[], traces=[]),
}


@pytest.fixture(params=ALL)
def found(request: pytest.FixtureRequest) -> Verification:
    return ALL[request.param]()


# Words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checks", "result", "line"),
    [
        (None, "verified", "VERIFIED: 3 checks passed, none failed"),
        (
            [LAYOUT, NO_SOURCE],
            "partly verified (structure)",
            "PARTLY VERIFIED (structure): 1 check passed, none failed",
        ),
        ([DIGESTS], "partly verified (record)", "PARTLY VERIFIED (record): 1 check passed, none failed"),
        ([], "not verified", "NOT VERIFIED: no check was made"),
        ([NO_SOURCE, FAST], "not verified", "NOT VERIFIED: no check was made"),
        (
            [LAYOUT, replace(DIGESTS, verdict=FAILED)],
            "not verified",
            "NOT VERIFIED: 1 check failed, first record: tensors",
        ),
    ],
)
def test_the_verdict_says_what_was_done(checks: list[Check] | None, result: str, line: str) -> None:
    found = verification() if checks is None else verification(checks=checks)
    assert found.result == result and words.verdict_line(found) == line
    assert found.to_json()["verdict"] == result.split(" (")[0]
    assert found.ok is (result != "not verified")


@pytest.mark.parametrize("verdict", [FAILED, INCONCLUSIVE, SKIPPED])
def test_a_part_with_an_open_check(verdict: str) -> None:
    """A comparison that failed or proves nothing leaves the outputs undone; one that is left out becomes a note."""
    open_check = Check("outputs", "DeepEncoder at 512 x 512", verdict, "a reason")
    found = verification(checks=[*verification().checks, open_check], required=["outputs"])
    state = {FAILED: FAILED, INCONCLUSIVE: INCONCLUSIVE, SKIPPED: "done"}[verdict]
    words_of_verdict = {FAILED: "not verified", INCONCLUSIVE: "partly verified (structure, bytes)", SKIPPED: "verified"}
    assert found.result == words_of_verdict[verdict]
    assert [part.state for part in found.parts] == ["done", "done", state]
    assert [(part.name, part.reason) for part in found.not_checked] == [("outputs", "a reason")] * (
        verdict == INCONCLUSIVE
    )
    assert found.ok is (verdict == SKIPPED)
    assert found.all_notes == ["DeepEncoder at 512 x 512: a reason"] * (verdict == SKIPPED)


def test_a_required_part_is_an_error_in_every_report() -> None:
    found = verification(checks=[LAYOUT, NO_SOURCE, FAST], required=["structure", "bytes"])
    assert found.result == "partly verified (structure)" and not found.ok
    assert "required, but not checked: bytes" in words.verdict_notes(found)
    assert "::error title=dsocr-verify%2C required%3A bytes::not checked: no --source" in github.command_lines(found)
    suites = {suite.name: suite for suite in junitparser.JUnitXml.fromstring(junit.junit_xml(found))}
    assert (suites["dsocr-verify.required"].tests, suites["dsocr-verify.required"].failures) == (2, 1)
    assert "not checked: no --source" in html.verification_page(found).decode()
    assert found.to_json()["unmet"] == ["bytes"]


def test_mistakes_that_no_output_shows_are_in_the_verdict() -> None:
    controls = [Control("an exchanged q and k", "layers.0", 1e-7, 2e-6), Control("GELU", "layers.0", 1e-3, 2e-6)]
    found = verification(controls=controls, qualifiers={"bytes": "by mine.yaml"}, notes=["a note"])
    line = "outputs cannot show an exchanged q and k in this checkpoint"
    assert found.all_notes == ["a note", line] and found.done[1] == "bytes by mine.yaml"
    assert [control["seen"] for control in found.to_json()["controls"]] == [False, True]
    page = html.verification_page(found).decode()
    assert page.count("? no") == 1 and page.count("✓ yes") == 1 and line in page and line in shown(found)


def test_affected_tensors_are_mentioned_once() -> None:
    check = Check("outputs", "chain", FAILED, "layers.10 is the first to diverge", ["layers.10", "layers.1", "chain"])
    assert words.unmentioned_tensors(check) == "layers.1"


# Terminal ---------------------------------------------------------------------------------------------------------


def shown(found: Verification, **options: object) -> str:
    file = io.StringIO()
    text.print_report(found, Console(file=file, width=150, markup=False, **options))
    return file.getvalue()


def test_terminal_without_colours_has_no_escapes(found: Verification, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(found)
    assert text.replace("\n", "").isprintable()
    assert printable(words.verdict_line(found)) in text
    # No line that GitHub would take for a command.
    assert not any(line.lstrip().startswith("::") for line in text.splitlines())


def test_terminal_has_colours_where_it_can() -> None:
    assert "\x1b[1;31mNOT VERIFIED" in shown(wrong(1), force_terminal=True, color_system="standard", no_color=False)


def test_terminal_folds_many_failures_and_lists_affected_tensors() -> None:
    text = shown(wrong(40))
    assert "layers.11.weight" in text and "layers.12.weight" not in text and "and 28 more" in text
    assert "also: blocks.7, rule 3" in text
    for part in ("structure 0.1 s, bytes 0.5 s, outputs 12.3 s", "CPU, 2 threads, float32", "CLIPVisionModel"):
        assert part in text


def test_terminal_writes_to_stderr_alone(capfd: pytest.CaptureFixture[str]) -> None:
    text.print_report(verification())
    out, err = capfd.readouterr()
    assert out == "" and "VERIFIED: 3 checks passed" in err


# JSON -------------------------------------------------------------------------------------------------------------


def test_json_is_strict_and_complete(found: Verification) -> None:
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["verdict"] == found.verdict and "pictures" not in document
    assert [check["name"] for check in document["checks"]] == [check.name for check in found.checks]
    assert document["key_map"] == found.key_map
    for written, trace in zip(document["traces"], found.traces, strict=True):
        errors = [point.error if math.isfinite(point.error) else None for point in trace.points]
        assert [point["error"] for point in written["points"]] == errors


# JUnit ------------------------------------------------------------------------------------------------------------


def test_junit_parses_back_with_every_check(found: Verification) -> None:
    report = junitparser.JUnitXml.fromstring(junit.junit_xml(found))
    cases = [case for suite in report for case in suite]
    kinds = {"failed": junitparser.Failure, "skipped": junitparser.Skipped, "inconclusive": junitparser.Skipped}
    ordered = [check for checks in words.by_group(found).values() for check in checks]
    assert [case.name for case in cases] == [printable(check.name) for check in ordered]
    assert len(cases) == report.tests == len(found.checks) + len(found.required)
    for case, check in zip(cases, ordered, strict=True):
        assert [type(result) for result in case.result] == ([kinds[check.verdict]] if check.verdict in kinds else [])
        if check.verdict in ("passed", "warning"):
            assert printable(check.detail, keep="\n") in case.system_out
    assert report.failures == sum(check.verdict == "failed" for check in ordered)
    assert report.skipped == sum(check.verdict in ("skipped", "inconclusive") for check in ordered)


def test_junit_has_suites_affected_tensors_times_and_properties() -> None:
    report = junitparser.JUnitXml.fromstring(junit.junit_xml(wrong(1)))
    suites = {suite.name: suite for suite in report}
    assert list(suites) == ["dsocr-verify.structure", "dsocr-verify.bytes", "dsocr-verify.outputs"]
    assert suites["dsocr-verify.outputs"].time == 12.3
    (case,) = suites["dsocr-verify.outputs"]
    assert "affected: rule 3" in case.result[0].text
    properties = {entry.name: entry.value for entry in suites["dsocr-verify.bytes"].properties()}
    assert properties["reference"] == "transformers 5.0 CLIPVisionModel" and properties["torch"] == "2.9"
    assert properties["device"] == "CPU, 2 threads"


# GitHub -----------------------------------------------------------------------------------------------------------


def test_github_escapes_as_its_toolkit_does() -> None:
    assert github.escape_data("50%\r\na:b,c") == "50%25%0D%0Aa:b,c"
    assert github.escape_property("50%\r\na:b,c") == "50%25%0D%0Aa%3Ab%2Cc"


def test_github_commands_are_one_line_each_and_no_more_than_it_shows(found: Verification) -> None:
    lines = github.command_lines(found)
    assert all(
        re.fullmatch(r"::(error|notice) title=[^:,\n\r]*::[^\n\r]*", line) and line.isprintable() for line in lines
    )
    assert sum(line.startswith("::error") for line in lines) <= 10


def test_github_counts_what_it_does_not_show() -> None:
    lines = github.command_lines(wrong(40))
    assert lines[9] == "::error title=dsocr-verify::and 32 more checks failed"
    assert lines[0] == (
        "::error title=dsocr-verify%2C bytes%3A layers.0.weight::layers.0.weight differs from its source"
    )


def test_github_annotates_stderr_and_appends_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    github.annotate(wrong(1))
    out, err = capfd.readouterr()
    assert out == "" and err.count("::error ") == 2 and err.count("::notice ") == 1
    text = path.read_text()
    assert text.startswith("before\n## ❌ NOT VERIFIED") and text.count("✗ failed") == 2
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    with pytest.raises(OutputError, match="step summary"):
        github.annotate(wrong(1))


def test_github_summary_has_no_markup_from_names() -> None:
    text = github.summary(hostile())
    assert "<script" not in text and "`" not in text and "](" not in text and "http:" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(hostile().checks) and all(row.count("|") == 5 for row in rows)


# HTML -------------------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "line", "link", "input", "hr", "polyline", "circle", "path"}


class Outline(HTMLParser):
    """Tags, with what they hold; every tag is closed by its own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.data: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data.append(data)

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_html_is_well_formed_self_contained_and_passive(found: Verification) -> None:
    text = html.verification_page(found).decode()
    outline = Outline(text)
    names = {tag for tag, _ in outline.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in outline.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    shown = "".join(outline.data)
    assert printable(words.verdict_line(found), keep="\n").replace("\n", "") in shown.replace("\n", "")
    assert "\x1b" not in text and "\u202e" not in text and "\x00" not in text


def test_html_shows_every_probe_once(found: Verification) -> None:
    outline = Outline(html.verification_page(found).decode())
    marks = [str(a["class"]) for a in outline.find("span") if str(a.get("class")).startswith("error") and "style" in a]
    points = [point for trace in found.traces for point in trace.points]
    assert len(marks) == len(points)
    assert sum("over" in mark for mark in marks) == sum(not point.within_tolerance for point in points)
    assert all(image["alt"] for image in outline.find("img"))


def test_html_folds_layers_and_gives_the_command() -> None:
    text = html.verification_page(verification(), "dsocr-verify a --source b").decode()
    assert "dsocr-verify a --source b" in text
    assert ">layers.{}.qkv.weight<" in text and ">h.{}.v<" in text and ">position_ids<" in text
    # No result shows all options: without a command line, none is shown.
    assert "<pre>" not in html.verification_page(verification()).decode()


@pytest.mark.parametrize("error", [0.0, math.nan, math.inf, 1e-300, 1e300])
def test_a_plot_keeps_every_mark_within_it(error: float) -> None:
    drawn = html.Plot(trace([error] * 13))
    values = [value for point in drawn.trace.points for value in (point.error, point.noise_floor, point.tolerance)]
    assert len(values) == 39 and all(0 <= drawn.position(value) <= 100 for value in values)
    assert drawn.ticks and all(0 < position < 100 for _, position in drawn.ticks)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("make", "colour"), [(verification, (26, 127, 55)), (wrong, (179, 38, 30))])
def test_html_in_a_browser(make: object, colour: tuple[int, int, int], dark: bool, tmp_path: Path) -> None:
    assert callable(make)
    found = make()
    seen, reference = pictures.to_pixels(pictures.draw_page(64), 64), torch.randn(1, 16, 8, 8)
    found = replace(found, pictures=pictures.draw_features("encoder at 64 x 64", seen, reference, reference))
    reports.write_files(found, html=tmp_path / "page.html")
    shot = tmp_path / "page.png"
    dom = browse(tmp_path, "--dump-dom", dark=dark)
    assert words.verdict_line(found) in dom and dom.count("<tr>") > 13
    browse(tmp_path, f"--screenshot={shot}", dark=dark)
    with Image.open(shot) as image:
        pixels = image.convert("RGB")
    counts = {value: count for count, value in pixels.getcolors(1 << 24)}
    background = max(counts, key=lambda value: counts[value])
    assert background == ((15, 19, 24) if dark else (255, 255, 255))
    # The verdict's edge in its colour, the plot's lines and points, the pictures: all drawn.
    verdict = {(26, 127, 55): (87, 196, 111), (179, 38, 30): (255, 138, 128)}[colour] if dark else colour
    assert counts.get(verdict, 0) > 400
    assert counts.get((130, 177, 255) if dark else (11, 87, 208), 0) > 100
    assert len(counts) > 1000


QUIET = [
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "hide-scrollbars", "window-size=1000,2600",
]  # fmt: skip


def browse(folder: Path, *options: str, dark: bool) -> str:
    """What headless Chromium prints of the folder's page."""
    assert CHROMIUM is not None
    quiet = [f"--{name}" for name in QUIET]
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *quiet, *scheme, profile, *options, (folder / "page.html").as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout


# Files ------------------------------------------------------------------------------------------------------------


def test_files_replace_older_ones_whole_or_not_at_all(tmp_path: Path) -> None:
    page, report = tmp_path / "a.html", tmp_path / "a.xml"
    page.write_text("old")
    reports.write_files(verification(), html=page, junit=report)
    assert page.read_bytes().startswith(b"<!DOCTYPE html>") and report.read_bytes().startswith(b"<?xml")
    assert sorted(tmp_path.iterdir()) == [page, report]


def test_a_file_that_cannot_be_written_is_an_error_before_and_after(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "a.html", tmp_path):
        with pytest.raises(OutputError):
            reports.check_files(None, path)
        with pytest.raises(OutputError):
            reports.write_files(verification(), html=path)
    reports.check_files(None, tmp_path / "a.html")


# Pictures ---------------------------------------------------------------------------------------------------------


def test_the_page_is_normalised_and_the_same_at_every_size() -> None:
    small, large = (pictures.to_pixels(pictures.draw_page(size), size) for size in (128, 512))
    assert small.shape == (1, 3, 128, 128) and large.shape == (1, 3, 512, 512)
    assert -1 <= large.min() < -0.6 and 0.9 < large.max() <= 1
    shrunk = torch.nn.functional.interpolate(large, size=128, mode="area")
    assert (shrunk - small).abs().mean() < 0.05
    assert torch.equal(large, pictures.to_pixels(pictures.draw_page(512), 512))


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (1, 8, 8, 16), (1, 64, 16), (1, 65, 16)])
def test_features_have_the_colours_of_the_source(shape: tuple[int, ...]) -> None:
    seen, reference = pictures.to_pixels(pictures.draw_page(64), 64), torch.randn(shape)
    other = reference.clone()
    other[0, -1] += 5
    drawn = {picture.name: picture.png for picture in pictures.draw_features("run", seen, reference, reference)}
    assert list(drawn) == ["image", "source", "converted", "difference"] and drawn["source"] == drawn["converted"]
    assert Image.open(io.BytesIO(drawn["difference"])).getextrema() == ((0, 0),) * 3
    changed = {picture.name: picture.png for picture in pictures.draw_features("run", seen, reference, other)}
    assert changed["source"] == drawn["source"] != changed["converted"]
    assert Image.open(io.BytesIO(changed["difference"])).getextrema()[0][1] > 200


def test_features_without_a_grid_or_not_finite() -> None:
    seen = torch.zeros(1, 3, 32, 32)
    assert pictures.draw_features("run", seen, torch.randn(1, 7, 4), torch.randn(1, 7, 4)) == []
    assert len(pictures.draw_features("run", seen, torch.zeros(1, 16, 4), torch.full((1, 16, 4), math.nan))) == 4
    assert len(pictures.draw_features("run", seen, torch.randn(1, 16, 2), torch.randn(1, 16, 2))) == 4


def test_an_image_file(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 20), (255, 0, 0, 255)).save(tmp_path / "a.png")
    values = pictures.to_pixels(pictures.load_image(tmp_path / "a.png"), 64)
    assert values[0, :, 32, 32].tolist() == [1, -1, -1] and abs(float(values[0, 0, 0, 0])) < 0.01
    (tmp_path / "b.png").write_text("none")
    for name in ("b.png", "c.png"):
        with pytest.raises(ContainerError, match="cannot be read as an image"):
            pictures.load_image(tmp_path / name)


# The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, converted, and one in which q and k have been exchanged."""
    path = tmp_path_factory.mktemp("views")
    torch.save(models.clip_hf().state_dict(), path / "clip.bin")
    converter.convert(path / "clip.bin", "clip", out=path / "good.safetensors")
    converter.convert(path / "clip.bin", "clip", out=path / "bad.pth", format="pth")
    state = torch.load(path / "bad.pth", weights_only=True)
    key = "transformer.layers.1.self_attn.qkv_proj.weight"
    q, k, v = state[key].chunk(3)
    torch.save({**state, key: torch.cat([k, q, v])}, path / "bad.pth")
    return path


@pytest.mark.parametrize(("name", "code"), [("good.safetensors", 0), ("bad.pth", 1)])
def test_every_report_of_one_run_agrees(name: str, code: int, folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 50), "#336699").save(tmp_path / "mine.png")
    options = ["--sizes", "128", "--device", "cpu", "--image", "mine.png", "--html", "r.html", "--junit", "r.xml"]
    arguments = [folder / name, "--source", folder / "clip.bin", *options, "--json", "--github"]
    done = run(*arguments, cwd=tmp_path, program="dsocr-verify", GITHUB_STEP_SUMMARY=str(tmp_path / "s.md"))
    assert done.returncode == code, done.stderr
    document = json.loads(done.stdout)
    faults = [check for check in document["checks"] if check["verdict"] == "failed"]
    assert document["verdict"] == ("not verified" if code else "verified") and bool(faults) is (code == 1)
    qkv = [f"vision_model.encoder.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    assert document["key_map"]["transformer.layers.1.self_attn.qkv_proj.weight"] == qkv
    report = junitparser.JUnitXml.fromfile(str(tmp_path / "r.xml"))
    assert (report.tests, report.failures) == (len(document["checks"]), len(faults))
    assert done.stderr.count("::error ") == len(faults)
    assert ("❌" if code else "✅") in (tmp_path / "s.md").read_text()
    outline = Outline((tmp_path / "r.html").read_text())
    assert len(document["traces"]) == 2
    assert len(outline.find("img")) == 8
    assert f"dsocr-verify {folder / name} --source" in "".join(outline.data)


def test_a_report_that_cannot_be_written_costs_no_verification(folder: Path, tmp_path: Path) -> None:
    done = run(folder / "good.safetensors", "--fast", "--html", "none/r.html", cwd=tmp_path, program="dsocr-verify")
    assert (done.returncode, done.stdout) == (4, "") and "there is no folder none" in done.stderr


def test_the_action_runs_the_command(folder: Path, tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / ".github" / "actions" / "verify" / "action.yml").read_text())
    install, verify = action["runs"]["steps"]
    # Inputs reach the script by its environment alone: text pasted into a script could be one.
    assert "${{" not in install["run"] + verify["run"]
    taken = {
        name for value in {**install["env"], **verify["env"]}.values() for name in re.findall(r"inputs\.(\w+)", value)
    }
    assert taken == set(action["inputs"])
    for name, code in (("good.safetensors", 0), ("bad.pth", 1)):
        inputs = {
            "BIN": str(Path(sys.executable).parent), "CONVERTED": str(folder / name),
            "SOURCE": str(folder / "clip.bin"), "FAST": "true", "REQUIRE": "bytes", "SIZES": "", "DEVICE": "cpu",
            "JUNIT": "r.xml", "HTML": "",
            "GITHUB_OUTPUT": str(tmp_path / name), "GITHUB_STEP_SUMMARY": str(tmp_path / "s.md"),
        }  # fmt: skip
        assert set(verify["env"]) <= set(inputs)
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", verify["run"]]
        done = subprocess.run(shell, cwd=tmp_path, env={**os.environ, **inputs}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        verdict = "not verified" if code else "partly verified (structure, bytes)"
        assert (tmp_path / name).read_text() == f"verdict={verdict}\n"
        assert (tmp_path / "r.xml").is_file()
