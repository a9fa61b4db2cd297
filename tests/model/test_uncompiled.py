import subprocess
import sys
from pathlib import Path

import pytest

from litgpt.model.uncompiled import WITH_TRITON, has_accelerator_files

PROGRAM = (
    "import sys, litgpt.commands.pretrain, litgpt.plan.out_of_memory; print(*(name in sys.modules for name in {}))"
)


@pytest.mark.skipif(has_accelerator_files(), reason="Triton is imported for the accelerator of this machine")
def test_the_compiler_is_imported_without_triton() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format([*WITH_TRITON, "triton"])], check=True, capture_output=True, text=True
    )
    assert not run.stderr
    assert run.stdout.split() == ["True", "True", "False"]


@pytest.mark.skipif(sys.platform != "linux", reason="device files of Linux")
def test_an_accelerator_is_known_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "null").touch()
    assert not has_accelerator_files(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert has_accelerator_files(tmp_path)
