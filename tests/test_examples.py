"""What users copy into their CI: the pre-commit hook, the example workflow, and their own schemas' word on them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
WORKFLOW = ROOT / "docs" / "examples" / "convert-and-verify.yml"


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("vendor.github-workflows", WORKFLOW),
        ("vendor.github-workflows", ROOT / ".github" / "workflows" / "test.yml"),
        ("vendor.github-actions", ROOT / ".github" / "actions" / "verify" / "action.yml"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_github_would_read_it(schema: str, path: Path) -> None:
    check_schema(schema, path)


def check_schema(schema: str, path: Path) -> None:
    """AssertionError where GitHub's own schema does not allow a file."""
    command = [BIN / "check-jsonschema", "--builtin-schema", schema, path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_workflow_converts_and_verifies(tmp_path: Path) -> None:
    """Its own commands, then the Action's with the inputs that it gives."""
    models.clip_hf().save_pretrained(tmp_path / "clip")
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["convert"]
    steps = {step.get("name", step.get("uses")): step for step in job["steps"]}
    inputs = {"source": "clip", "family": "clip"}
    environment = {name: generated(value, inputs, {}) for name, value in job["env"].items()}
    everything = {**os.environ, **environment, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    shell(steps["Convert"]["run"], tmp_path, everything)
    assert json.loads((tmp_path / "conversion.json").read_text())["output"] == environment["CONVERTED"]

    action = yaml.safe_load((ROOT / ".github" / "actions" / "verify" / "action.yml").read_text())
    given = {name: generated(value, inputs, environment) for name, value in steps["Verify"]["with"].items()}
    assert given.keys() <= action["inputs"].keys()
    settings = {name: str(about.get("default", "")) for name, about in action["inputs"].items()} | given
    # The stand-in is too large to run a reference at 512 pixels quickly.
    settings["fast"], settings["require"] = "true", "structure,bytes"
    verify = action["runs"]["steps"][1]
    own = {name: generated(value, settings, {}) for name, value in verify["env"].items()}
    own |= {"BIN": str(BIN), "GITHUB_OUTPUT": str(tmp_path / "o"), "GITHUB_STEP_SUMMARY": str(tmp_path / "s.md")}
    shell(verify["run"], tmp_path, {**everything, **own})
    assert (tmp_path / "o").read_text() == "verdict=partly verified (structure, bytes)\n"
    kept = steps["Keep the report, whatever it says"]["with"]["path"].split()
    kept += [generated(name, {}, environment) for name in job["steps"][-1]["with"]["path"].splitlines()]
    assert [name for name in kept if not (tmp_path / name).is_file()] == []


def generated(value: object, inputs: dict[str, str], env: dict[str, str]) -> str:
    """GitHub's expressions, as far as these files use them."""
    known = {"inputs": inputs, "env": env}
    return re.sub(r"\$\{\{ (\w+)\.(\w+) \}\}", lambda found: known.get(found[1], {}).get(found[2], ""), str(value))


def shell(script: str, cwd: Path, environment: dict[str, str]) -> None:
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's repository with the hook in it, run with the programs that are installed here."""
    hooks, repository = tmp_path_factory.mktemp("hooks"), tmp_path_factory.mktemp("repository")
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    for folder in (hooks, repository):
        git("init", "-q", cwd=folder)
    git("add", "-A", cwd=hooks)
    git("commit", "-qm", "hooks", cwd=hooks)
    revision = git("rev-parse", "HEAD", cwd=hooks)
    hook = {"id": "dsocr-mapping", "language": "system"}
    config = {"repos": [{"repo": str(hooks), "rev": revision, "hooks": [hook]}]}
    (repository / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    (repository / "mappings").mkdir()
    for name in ("sam-hf", "clip-hf", "deepencoder-sam"):
        shutil.copy(ROOT / "mappings" / f"{name}.yaml", repository / "mappings")
    (repository / "other.yaml").write_text("no: mapping\n")
    return repository


def git(*arguments: str, cwd: Path) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    done = subprocess.run(["git", *settings, *arguments], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit_check(repository: Path, home: Path) -> subprocess.CompletedProcess[str]:
    git("add", "-A", cwd=repository)
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PRE_COMMIT_HOME": str(home)}
    command = [BIN / "pre-commit", "run", "--all-files", "--verbose", "--color", "never"]
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)


def test_the_hook_passes_good_files_and_names_what_is_wrong_in_others(hooked: Path, tmp_path: Path) -> None:
    good = commit_check(hooked, tmp_path / "home")
    assert good.returncode == 0, good.stdout + good.stderr
    assert good.stdout.count(", valid") == 3
    broken = (ROOT / "mappings" / "sam-timm.yaml").read_text().replace("rename:", "renam:", 1)
    (hooked / "mappings" / "broken.yaml").write_text(broken)
    bad = commit_check(hooked, tmp_path / "home")
    assert bad.returncode == 1
    assert re.search(r"error: mappings/broken.yaml:\d+: expected a rule", bad.stdout), bad.stdout
    # The others are still checked.
    assert bad.stdout.count(", valid") == 3
