"""What the READMEs show is so: every command runs, every output is what it prints, every recipe is valid.

Outputs are of files of true size: SAM-base with seeded weights, and DeepSeek-OCR, with holes for weights, on our hub.
Commands without an output run on tiny models under the same names, the Python on SAM-base and a tiny CLIP. What the
Chinese page shows is compared with the English one's.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import test_folders
import test_mlx
import test_mmproj
import test_oracles
import test_routes
import torch
import walkthrough
import yaml
from hubserver import Repo, environment, hub_server
from inventories import inventories, sparse
from test_examples import check_schema

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import compatibility  # noqa: E402

ENGLISH = ROOT / "README.md"
PAGES = [ROOT / name for name in compatibility.PAGES]
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The settings under which DeepSeek-OCR is on a hub of ours."""
    folder = tmp_path_factory.mktemp("hub")
    name = "model-00001-of-000001.safetensors"
    file = sparse(folder / name, inventories()["deepseek-ocr"])
    with hub_server([Repo("deepseek-ai/DeepSeek-OCR", {name: file})]) as server:
        yield environment(server, folder)


@pytest.fixture
def true_size(sam_base: Path, tmp_path: Path) -> Path:
    """The folder in which the commands are run that show their outputs."""
    (tmp_path / sam_base.name).hardlink_to(sam_base)
    return tmp_path


def test_outputs_are_what_is_printed(true_size: Path, hub: dict[str, str]) -> None:
    steps = walkthrough.steps(ENGLISH)
    assert len(steps) == 4
    walkthrough.check(steps, true_size, hub)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The files that the pages name, of a few kilobytes."""
    _, sam = test_oracles.deepseek_sam()
    _, clip = test_oracles.deepseek_clip()
    test_oracles.save_zip(models.sam_meta().state_dict(), tmp_path).rename(tmp_path / "sam_vit_b_01ec64.pth")
    models.clip_hf().save_pretrained(tmp_path / "clip-vit-large-patch14")
    models.qwen2_hf().save_pretrained(tmp_path / "Qwen2-0.5B")
    (tmp_path / "DeepSeek-OCR").mkdir()
    # Its own CLIP has no position_ids.
    clip.pop("embeddings.position_ids")
    both = test_oracles.inside("model.sam_model.", sam) | test_oracles.inside("model.vision_model.", clip)
    test_oracles.save_safetensors(both, tmp_path / "DeepSeek-OCR")
    state, _ = test_oracles.clip_hf()
    theirs = {f"their.{name.replace('encoder', 'trunk')}": tensor for name, tensor in state.items()}
    test_oracles.save_safetensors(theirs, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "theirs.safetensors")
    llava = {
        f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in models.clip_hf().state_dict().items()
    }
    (tmp_path / "llava-checkpoint").mkdir()
    test_oracles.save_safetensors(llava, tmp_path / "llava-checkpoint")
    copies = {
        f"{who}.{name}": t for who in ("student", "teacher") for name, t in models.sam_meta().state_dict().items()
    }
    torch.save({"state_dict": copies, "args": argparse.Namespace(lr=0.1)}, tmp_path / "epoch_12.ckpt")
    return tmp_path


def test_commands_run(tiny: Path) -> None:
    """Line after line, but for the full verification: the models are too small for the whole chain."""
    lines = [line for block in blocks(ENGLISH, "sh") for line in block.splitlines() if line.startswith("dsocr-")]
    assert len(lines) == 15
    for line in [lines[0], *lines[2:]]:
        done = walkthrough.shell(line.partition(" #")[0].strip(), tiny)
        assert done.returncode == 0, f"{line}\n{done.stdout}"


def test_python_runs(tiny: Path, sam_base: Path) -> None:
    (code,) = blocks(ENGLISH, "python")
    # The example loads SAM into the encoder of the default sizes.
    (tiny / sam_base.name).unlink()
    (tiny / sam_base.name).hardlink_to(sam_base)
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_recipes_are_valid(tmp_path: Path) -> None:
    rules, workflow, hook = (yaml.safe_load(block) for block in blocks(ENGLISH, "yaml"))
    shipped = yaml.safe_load((ROOT / "mappings" / "clip-hf.yaml").read_text())["rules"]
    assert all(rule in shipped for rule in rules["rules"])

    steps = workflow["jobs"]["verify"]["steps"]
    (verify,) = (step for step in steps if "dsocr-convert/" in step["uses"])
    action = yaml.safe_load((ROOT / ".github" / "actions" / "verify" / "action.yml").read_text())
    assert verify["with"].keys() <= action["inputs"].keys()
    (tmp_path / "w.yml").write_text(yaml.safe_dump({"name": "x", "on": {"push": None}, **workflow}))
    check_schema("vendor.github-workflows", tmp_path / "w.yml")

    (ours,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["repos"][0]["hooks"] == [{"id": ours["id"]}]


@page
def test_the_table_is_what_the_tests_show(page: Path) -> None:
    """The cells of the tests that are in this suite; `scripts/compatibility.py` makes it of those that passed."""
    reads = {(layout, name) for _, layout, _ in test_oracles.LAYOUTS.values() for name in test_oracles.SAVERS}
    reads |= {("clip-openai", "TorchScript")}
    reads |= {(f"deepencoder-{family}", name) for family in ("sam", "clip", "qwen2") for name in test_oracles.SAVERS}
    writes = {(layout, name) for layout in test_routes.PROGRAMS for name in ("safetensors", ".pth")}
    writes |= {(layout, "folder") for layout in test_folders.WRITTEN}
    reads |= {(layout, "safetensors") for layout in test_mlx.LAYOUTS}
    writes |= {(layout, "safetensors") for layout in test_mlx.LAYOUTS}
    reads |= {(layout, "GGUF") for layout in test_mmproj.LAYOUTS}
    writes |= {(layout, name) for layout in test_mmproj.LAYOUTS for name in ("safetensors", "GGUF")}
    cells = {("reads", *cell) for cell in reads} | {("writes", *cell) for cell in writes}
    text = page.read_text(encoding="utf-8")
    assert text == compatibility.replaced(text, compatibility.table(cells, compatibility.PAGES[page.name]))


@page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_both_pages_show_the_same() -> None:
    """All code in either language is the other's, but for comments."""
    ours, theirs = ([re.sub(r" +#.*", "", code) for code in blocks(page, r"\w+")] for page in PAGES)
    assert ours == theirs


def blocks(page: Path, language: str) -> list[str]:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.M)
    return found
