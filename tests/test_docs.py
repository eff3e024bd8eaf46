"""The pages of docs/: what a script writes is current, and the commands that are shown print what the pages say."""

from __future__ import annotations

import doctest
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import walkthrough
from hubserver import Repo, environment, hub_server
from safetensors.torch import save_file
from walkthrough import Step, check

from converter.encoders import ClipConfig, ClipEncoder, SamConfig, SamEncoder
from converter.layouts import registry

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def files_of(page: Path) -> list[tuple[int, str, str]]:
    """The files that a page has its reader write: fenced blocks that begin with `# name.ext`, each with its line."""
    text = page.read_text()
    found = re.finditer(r"^```\w+\n(# ([\w-]+\.\w+)\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start()) + 1, block[2], block[1]) for block in found]


def under(page: Path, heading: str) -> list[Step]:
    """The commands between a heading and the next of its rank or a higher one."""
    lines = page.read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines, start=1) if line == heading)
    rank = len(heading.partition(" ")[0])
    ends = (n for n, line in enumerate(lines, start=1) if n > start and re.match(rf"#{{1,{rank}}} ", line))
    end = next(ends, len(lines) + 1)
    return [step for step in walkthrough.steps(page) if start < step.line < end]


PAGES = sorted(DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """As GitHub shows the pages; the site's own build checks them once more."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if "://" in name:
            continue
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in headings(there), target


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_listed_on_the_first() -> None:
    index = (DOCS / "index.md").read_text()
    for page in PAGES:
        name = str(page.relative_to(DOCS).with_suffix(""))
        assert name == "index" or (f"({name}.md)" in index and f"\n{name}\n" in index), name


def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clone whose mappings can be added to, in the place of the one that is installed.
    package = tmp_path / "clone" / "converter"
    shutil.copytree(ROOT / "converter", package)
    shutil.copytree(ROOT / "mappings", package / "mappings")
    folder = tmp_path / "here"
    (folder / "dsocr-convert").mkdir(parents=True)
    (folder / "dsocr-convert" / "mappings").symlink_to(package / "mappings")
    page = DOCS / "tutorial.md"
    steps = walkthrough.steps(page)
    (added,) = (number for number, step in enumerate(steps) if step.command.startswith("cp "))
    check(steps[:added], folder, files=files_of(page))
    check(steps[added : added + 2], folder, {"PYTHONPATH": str(package.parent)})
    caches = [function for function in vars(registry).values() if hasattr(function, "cache_clear")]
    monkeypatch.setattr(registry, "_folder", lambda: package / "mappings")
    try:
        _clear(caches)
        check(steps[added + 2 :], folder)
    finally:
        _clear(caches)


def _clear(caches: list[Any]) -> None:
    for function in caches:
        function.cache_clear()


@pytest.fixture(scope="module")
def folder(sam_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SAM-base at true size, as Meta saves it."""
    path = tmp_path_factory.mktemp("docs")
    (path / sam_base.name).hardlink_to(sam_base)
    yield path
    # Two gigabytes that pytest would keep.
    shutil.rmtree(path)


# What needs CLIP at true size, or a trained SAM.
LEFT_OUT = "^dsocr-convert clip|^python"


def test_conversions_from_layout_to_layout(folder: Path) -> None:
    steps = under(DOCS / "conversions.md", "## From layout to layout")
    check([step for step in steps if not re.search(LEFT_OUT, step.command)], folder)


def test_a_refusal_as_the_security_page_has_it(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "model.pth").write_bytes(len(header).to_bytes(8, "little") + header + b"a")
    text = "layout: theirs\nfamily: sam\ndescription: !!python/object/apply:os.system [id]\n"
    (tmp_path / "theirs.yaml").write_text(text)
    check(walkthrough.steps(DOCS / "security.md"), tmp_path)


def test_errors_of_hubs(tmp_path: Path) -> None:
    repos = [
        Repo("org/gated", {"sam.pth": b"x"}, gated=True),
        Repo("org/two", {"a.pth": b"a", "b.pth": b"b"}),
        Repo("org/sam", {"sam.pth": b"x"}),
    ]
    with hub_server(repos) as server:
        settings = environment(server, tmp_path)
        names = {server.hf_endpoint: "https://huggingface.co", str(tmp_path / "hf"): "~/.cache/huggingface"}
        check(under(DOCS / "hubs.md", "## Errors"), tmp_path, settings, names=names)


def small_checkpoints(folder: Path) -> None:
    """What the examples of the API read: the true names of SAM-base and CLIP-L, in small."""
    sizes = SamConfig(image_size=64, width=24, heads=2, mlp=40, window=2, neck=16, compressor=None)
    sam = {f"image_encoder.{name}": tensor for name, tensor in SamEncoder(sizes).state_dict().items()}
    torch.save(sam, folder / "sam_vit_b_01ec64.pth")
    theirs: dict[str, torch.Tensor] = {}
    for name, tensor in ClipEncoder(ClipConfig(image_size=56, width=64, heads=1, mlp=96)).named_parameters():
        name = f"vision_model.{name}".replace("transformer.", "encoder.")
        # Drawn anew: norms and biases that are all alike would pass for each other.
        parts = zip("qkv", tensor.chunk(3), strict=True) if "qkv" in name else [("", tensor)]
        theirs |= {name.replace("qkv", part): torch.rand_like(value) for part, value in parts}
    theirs |= {f"vision_model.post_layernorm.{name}": torch.rand(64) for name in ("weight", "bias")}
    (folder / "clip-vit-large-patch14").mkdir()
    save_file(theirs, folder / "clip-vit-large-patch14" / "model.safetensors")


def test_the_examples_of_the_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    small_checkpoints(tmp_path)
    monkeypatch.chdir(tmp_path)
    page = DOCS / "api.md"
    # An output ends at an empty line, and not at the end of its block.
    text = page.read_text().replace("```", "")
    examples = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    printed: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples, out=printed.append)
    assert result.attempted >= 30 and not result.failed, "".join(printed)
