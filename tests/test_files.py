"""Files and folders are written atomically, and no file name leads out of its folder."""

from pathlib import Path

import pytest

from litgpt.errors import UserError
from litgpt.files import join_inside, staged_folder, verify_manifest, write_manifest, write_text


def test_a_folder_is_written_atomically(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with staged_folder(tmp_path / "new") as staged:
            (staged / "a").write_text("half")
            raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    with staged_folder(tmp_path / "new") as staged:
        (staged / "a").write_text("whole")
        assert not (tmp_path / "new" / "a").exists()
    assert (tmp_path / "new" / "a").read_text() == "whole"
    with pytest.raises(UserError, match="not empty"), staged_folder(tmp_path / "new"):
        raise AssertionError("the block must not begin")


def test_a_replaced_folder_is_kept_until_the_rename(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    write_text(tmp_path / "final" / "a", "old")
    with pytest.raises(ValueError, match="halfway"), staged_folder(tmp_path / "final", replace=True):
        raise ValueError("halfway")
    assert (tmp_path / "final" / "a").read_text() == "old"
    with staged_folder(tmp_path / "final", replace=True) as staged:
        (staged / "b").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "b"]


def test_a_manifest_covers_files_in_subfolders(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a", "text")
    write_manifest(tmp_path)
    verify_manifest(tmp_path)
    (tmp_path / "deep" / "a").write_text("next")
    with pytest.raises(UserError, match="deep/a"):
        verify_manifest(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "../a", "/a", "a/../../b", "a\0", "a" * 2000, "C:a", "a\\b", "out/a"])
def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(UserError, match="invalid file name"):
        join_inside(folder, name)
    assert join_inside(folder, "a/b.txt") == folder / "a" / "b.txt"
