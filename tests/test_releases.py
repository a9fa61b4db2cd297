"""What a tag publishes: the version is the same everywhere, and the notes are its part of the changelog."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from litgpt.version import __version__

ROOT = Path(__file__).parents[1]
FILES = (".ci/release", "litgpt/version.py", "CITATION.cff", "CHANGELOG.md")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the files that a release reads, whose changelog has a section of the version."""
    for file in FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    text = (ROOT / "CHANGELOG.md").read_text()
    text = text.replace("## [Unreleased]", f"## [{__version__}] - 2027-01-31", 1)
    link = f"[{__version__}]: ../../releases/tag/v{__version__}\n"
    (tmp_path / "CHANGELOG.md").write_text(f"{text}{link}[0.0.1]: ../../releases/tag/v0.0.1\n")
    return tmp_path


def release(checkout: Path, tag: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ".ci/release", tag], cwd=checkout, text=True, capture_output=True)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_notes_are_the_part_of_the_version(checkout: Path) -> None:
    replace(checkout / "CHANGELOG.md", "[Unreleased]: ", "## [0.0.1] - 2026-01-01\n\nOlder.\n\n[Unreleased]: ")
    run = release(checkout, f"v{__version__}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("The first version.") and "### Added" in run.stdout
    assert "Older" not in run.stdout and "../../" not in run.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("litgpt/version.py", __version__, "9.9", "litgpt/version.py: has version 9.9, but the tag is v"),
        ("CITATION.cff", f"version: {__version__}", "version: 9.9", "CITATION.cff: has version 9.9"),
        ("CHANGELOG.md", f"## [{__version__}]", "## [Unreleased]", "CHANGELOG.md: has no section"),
        ("CHANGELOG.md", f"\n[{__version__}]: ", "\n[other]: ", "CHANGELOG.md: has no link"),
    ],
)
def test_a_version_that_differs_somewhere_is_refused(
    checkout: Path, file: str, old: str, new: str, message: str
) -> None:
    replace(checkout / file, old, new)
    run = release(checkout, f"v{__version__}")
    assert run.returncode == 1 and message in run.stderr and run.stdout == ""


def test_workflows_run_the_checks_of_the_checkout() -> None:
    for path in (ROOT / ".github/workflows").glob("*.yaml"):
        (job,) = yaml.safe_load(path.read_text())["jobs"].values()
        lines = [step.get("run", "").split(" ")[0] for step in job["steps"]]
        assert ".ci/run" in lines
        assert all((ROOT / line).is_file() for line in lines if line.startswith(".ci/"))
