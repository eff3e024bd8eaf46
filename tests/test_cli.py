"""The command line as a user meets it: results on stdout, words on stderr, exit codes, nothing slow imported."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from command import run, run_installed
from typer.testing import CliRunner

import converter
from converter.cli import convert as cli
from converter.layouts import registry


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints: SAM as Meta saves it, CLIP in a folder as transformers does."""
    path = tmp_path_factory.mktemp("cli")
    torch.save(models.sam_meta().state_dict(), path / "sam.pth")
    models.clip_hf().save_pretrained(path / "clip")
    return path


def test_sam(folder: Path, tmp_path: Path) -> None:
    done = run("sam", folder / "sam.pth", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "deepencoder-sam.safetensors\n")
    assert "layout sam-meta" in done.stderr
    assert "missing net_2.weight, net_3.weight: DeepSeek's own compressor" in done.stderr
    assert "not the DeepEncoder's size: depth 3 (not 12), width 24 (not 768)" in done.stderr
    assert "and 119 more:" in done.stderr and "draws no masks" in done.stderr
    with safetensors.safe_open(tmp_path / "deepencoder-sam.safetensors", "pt") as file:
        assert file.metadata()["tool"] == f"dsocr-convert {converter.__version__}"
        assert file.metadata()["mapping"] == "sam-meta" and len(file.metadata()["mapping_sha256"]) == 64


def test_clip_from_a_folder_as_pth(folder: Path, tmp_path: Path) -> None:
    done = run("clip", folder / "clip", "--format", "pth", "-q", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "deepencoder-clip.pth\n", "")
    assert len(torch.load(tmp_path / "deepencoder-clip.pth", weights_only=True)) == 6 + 12 * 3


def test_json_is_one_document_and_the_record(folder: Path, tmp_path: Path) -> None:
    done = run("sam", folder / "sam.pth", "--json", cwd=tmp_path)
    record = json.loads(done.stdout)
    assert record["written"] and record["num_tensors"] == len(record["converted"]) == 51
    assert record["converted"]["pos_embed"] == ["image_encoder.pos_embed"]
    assert record["sources"][0]["files"] == {str(folder / "sam.pth"): (folder / "sam.pth").stat().st_size}


def test_dry_run_writes_nothing_and_shows_what_each_tensor_is_made_of(folder: Path, tmp_path: Path) -> None:
    done = run("clip", folder / "clip", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    fused = " + ".join(f"vision_model.encoder.layers.{{}}.self_attn.{part}_proj.weight" for part in "qkv")
    assert "transformer.layers.{}.self_attn.qkv_proj.weight (x 3)" in done.stdout
    assert fused in done.stdout
    assert "would write deepencoder-clip.safetensors" in done.stderr


def test_an_existing_output_is_kept_unless_forced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    done = run("sam", folder / "sam.pth", "-o", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (4, "")
    assert (
        done.stderr == "error: out: exists already\n  choose another path with --output, or replace it with --force\n"
    )
    assert (tmp_path / "out").read_text() == "mine"
    assert run("sam", folder / "sam.pth", "-o", "out", "--force", cwd=tmp_path).returncode == 0
    assert len(safetensors.torch.load_file(tmp_path / "out")) == 51


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "Usage"),
        (("sam",), 2, "Missing argument 'SOURCE'"),
        (("sam", "sam.pth", "--dtype", "float8"), 2, "is not one of"),
        (("sam", "no-such-file"), 3, "no such file or folder"),
        (("clip", "sam.pth"), 3, "is a SAM checkpoint, not CLIP\n  run: dsocr-convert sam ..."),
        (("sam", "clip"), 3, "is a CLIP checkpoint, not SAM"),
        (("sam", "other.pth"), 3, "no SAM layout fits its 2 tensors"),
        (("sam", "page.bin"), 3, "page.bin: a web page, not weights"),
        (("sam", "sam.pth", "-o", "no/such/folder/out"), 4, "there is no folder"),
        (("sam", "sam.pth", "-o", "clip"), 4, "is a folder"),
        (("sam", "sam.pth", "--state-dict", "ema"), 2, "has no such state dict\n  it has: . (188 tensors)"),
        (("sam", "sam.pth", "--mapping", "none.yaml"), 3, "none.yaml: cannot be read"),
        (("clip", "clip", "--image-size", "225"), 2, "not a multiple of the patch size, 14"),
        (("mapping", "show", "sam-none"), 3, "unknown layout 'sam-none'"),
        (("inspect", "page.bin"), 3, "page.bin"),
    ],
)
def test_errors_have_a_code_a_cause_and_no_traceback(
    arguments: tuple[str, ...], code: int, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.ones(2), "b\x1b[31m": torch.ones(2)}, folder / "other.pth")
    (folder / "page.bin").write_text("<!DOCTYPE html><html><body>Log in</body></html>")
    before = sorted(folder.iterdir())
    done = run(*arguments, cwd=folder)
    assert done.returncode == code
    text = done.stderr + (done.stdout if code == 2 else "")
    assert words in text and "Traceback" not in text and "\x1b" not in text
    assert sorted(folder.iterdir()) == before


def test_names_in_a_file_do_not_steer_the_terminal(folder: Path) -> None:
    torch.save({"a": torch.ones(2), "b\x1b[31m": torch.ones(2)}, folder / "other.pth")
    for command in ("sam", "inspect"):
        done = run(command, "other.pth", cwd=folder)
        assert "\x1b" not in done.stdout + done.stderr and "\\x1b[31m" in done.stdout + done.stderr


def test_inspect_folds_layers_and_says_what_would_happen(folder: Path, tmp_path: Path) -> None:
    done = run("inspect", folder / "clip", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    name = "vision_model.encoder.layers.{}.mlp.fc1.{weight,bias}"
    row = next(line for line in done.stdout.splitlines() if line.startswith(name))
    assert row.split() == [name, "0..2", "float32", "[256,", "64],", "[256]", "199.7", "kB"]
    assert "clip: layout clip-hf" in done.stdout
    assert "`dsocr-convert clip` would write 42 tensors" in done.stdout
    assert "CLIP's text tower; the DeepEncoder reads images only" in done.stdout


def test_inspect_of_an_unknown_checkpoint_names_the_nearest_layout(tmp_path: Path) -> None:
    state = models.sam_timm().state_dict()
    state["blocks.0.mlp.fc9.weight"] = state.pop("blocks.0.mlp.fc1.weight")
    torch.save(state, tmp_path / "odd.pth")
    done = run("inspect", "odd.pth", cwd=tmp_path)
    assert "nearest is sam-timm" in done.stdout
    assert "sam-timm has no rule for 'blocks.0.mlp.fc9.weight'" in done.stdout
    done = run("sam", "odd.pth", cwd=tmp_path)
    assert done.returncode == 3 and "sam-timm has no rule for 'blocks.0.mlp.fc9.weight'" in done.stderr


def test_inspect_json(folder: Path, tmp_path: Path) -> None:
    found = json.loads(run("inspect", folder / "sam.pth", "--json", cwd=tmp_path).stdout)
    assert (found["num_tensors"], found["containers"], found["dtypes"]) == (188, ["torch zip"], {"float32": 188})
    (fits,) = found["layouts"]
    assert fits["layout"] == "sam-meta" and fits["record"]["num_tensors"] == 51
    assert sum(group["num_tensors"] for group in found["groups"]) == 188


def test_own_mapping(folder: Path, tmp_path: Path) -> None:
    state = {name.replace("image_encoder.", "vit:"): t for name, t in models.sam_meta().state_dict().items()}
    torch.save(state, tmp_path / "mine.pth")
    done = run("sam", "mine.pth", cwd=tmp_path)
    assert done.returncode == 3
    (tmp_path / "mine.yaml").write_text(
        """\
layout: mine
family: sam
description: ours
variables: {rest: path}
prefix: "vit:"
detect: {neck.0.weight: [neck, width, 1, 1]}
rules:
  - keep: "{rest}"
drop_rest: decoder and prompts
"""
    )
    assert run("mapping", "check", "mine.yaml", "mine.pth", cwd=tmp_path).returncode == 0
    done = run("sam", "mine.pth", "--mapping", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(
        safetensors.torch.load_file(tmp_path / "deepencoder-sam.safetensors")["pos_embed"], state["vit:pos_embed"]
    )


def test_mapping_list_and_show(tmp_path: Path) -> None:
    listed = run("mapping", "list", cwd=tmp_path).stdout
    for line in listed.splitlines():
        shown = run("mapping", "show", line.split()[0], cwd=tmp_path).stdout if "timm" in line else ""
        assert not shown or f"layout: {line.split()[0]}" in shown
    assert len(listed.splitlines()) == len(registry.layout_names())


def test_version_and_completion(tmp_path: Path) -> None:
    assert run_installed("--version", cwd=tmp_path).stdout == f"dsocr-convert {converter.__version__}\n"
    complete = partial(run_installed, cwd=tmp_path, _DSOCR_CONVERT_COMPLETE="complete_bash")
    done = complete(COMP_WORDS="dsocr-convert in", COMP_CWORD="1")
    assert "inspect" in done.stdout.split()
    done = complete(COMP_WORDS="dsocr-convert mapping show clip-t", COMP_CWORD="3")
    assert done.stdout.split() == ["clip-timm"]


def test_repeated_runs_are_byte_identical(folder: Path, tmp_path: Path) -> None:
    for form in ("safetensors", "pth"):
        for name in ("a", "b"):
            assert run("sam", folder / "sam.pth", "-o", name, "-f", "--format", form, cwd=tmp_path).returncode == 0
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_plain_conversion_imports_nothing_slow(folder: Path, tmp_path: Path) -> None:
    code = """
import sys
from converter.cli import console
from converter.cli.convert import app
code = console.run(app)
slow = {"torch", "numpy", "rich", "safetensors"} & set(sys.modules)
sys.exit(f"imported {slow}" if slow else code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "sam", folder / "sam.pth"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_progress_bar_is_drawn_at_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from converter.cli import console

    monkeypatch.setattr(console, "_BAR_DELAY", 0)
    with console.Bar(enabled=True) as bar:
        bar("file", 1, 2)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.Bar(enabled=True) as bar:
        bar("file", 1, 2)
        bar("file", 2, 2)
    assert "file" in capfd.readouterr().err


def test_interruption_leaves_nothing_and_returns_130(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("converter.output.write.write_safetensors", interrupt)
    done = CliRunner().invoke(cli.app, ["sam", str(folder / "sam.pth")])
    assert done.exit_code == 130
    assert not list(tmp_path.iterdir())


def test_mapping_check_takes_several_files_and_checks_all(tmp_path: Path) -> None:
    good = Path(__file__).parent.parent / "mappings" / "sam-hf.yaml"
    (tmp_path / "bad.yaml").write_text("layout: x\nfoo: 1\n")
    done = run("mapping", "check", "bad.yaml", good, "none.yml", cwd=tmp_path)
    assert done.returncode == 3
    assert "sam-hf, 34 rules, valid" in done.stdout
    assert "bad.yaml:2: unknown key 'foo'" in done.stderr and "none.yml: cannot be read" in done.stderr
    hub = run("mapping", "check", good.with_name("deepencoder-sam.yaml"), cwd=tmp_path)
    assert (hub.returncode, "deepencoder-sam, a canonical layout, valid" in hub.stdout) == (0, True)
    for more in (["a.pth", "b.pth"], [good, "a.pth"]):
        two = run("mapping", "check", good, *more, cwd=tmp_path)
        assert two.returncode == 2 and "one mapping file and one checkpoint" in two.stderr
