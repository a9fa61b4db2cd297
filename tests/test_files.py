"""Files and folders are written atomically, and no file name leads out of its folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litgpt import files
from litgpt.errors import UserError
from litgpt.files import (
    check_writable,
    extend_checkpoint_dir,
    join_inside,
    staged_folder,
    verify_manifest,
    write_manifest,
    write_text,
)
from litgpt.recipe.from_yaml import read_yaml


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


READERS: dict[str, tuple[Callable[[Path], Any], str, Any]] = {
    "read_json": (files.read_json, '{"é": 1}', {"é": 1}),
    "read_mapping": (files.read_mapping, "é: 1\nb: 2\n", {"é": 1, "b": 2}),
    "read_utf8": (files.read_utf8, "é\nb", "é\nb"),
    "read_yaml": (lambda path: read_yaml(str(path)), "é: 1\nb: 2\n", {"é": 1, "b": 2}),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_accepts_utf8_alone_with_or_without_a_mark(tmp_path: Path, name: str) -> None:
    read, text, value = READERS[name]
    path = tmp_path / "a"
    for content in (text.encode(), text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode()):
        path.write_bytes(content)
        assert read(path) == value
    for encoding, reason in {"utf-16": "UTF-16, not", "utf-32": "UTF-32, not", "latin-1": "not"}.items():
        path.write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=rf"/a.*{reason} UTF-8[^\n]*$"):
            read(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "Not a directory"),
        ("file/x", "Not a directory"),
        ("dangling", "No such file"),
        ("dangling/x", "No such file"),
        ("loop", "symbolic links"),
        ("n" * 300, "name too long"),
        ("a/b/" + "n" * 300, "name too long"),
        ("nul\0", "null"),
        ("/proc/x/y", "No such file"),
        ("/dev/null/x", "Not a directory"),
    ],
)
@pytest.mark.parametrize("is_file", [False, True])
def test_an_output_that_cannot_be_written_is_named_with_its_key(
    tmp_path: Path, name: str, reason: str, is_file: bool
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    path = tmp_path / name
    if is_file and "/" not in name and len(name) < 200:
        path = path / "out.json"
    with pytest.raises(UserError, match=f"^out_dir: .* cannot be written .*{reason}.*; set another path$"):
        check_writable(path, "out_dir", is_file=is_file)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_can_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "old.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for folder in ("a/b/c", "empty", "link", "link/x", ".", tmp_path / "new"):
        check_writable(Path(folder), "out_dir")
    for file in ("a/b.json", "old.json", "empty/x.json"):
        check_writable(Path(file), "report", is_file=True)
    with pytest.raises(UserError, match="Is a directory"):
        check_writable(Path("empty"), "report", is_file=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.mkdir", refuse)  # a test may run as root, who may write anywhere
    with pytest.raises(UserError, match="Permission denied"):
        check_writable(tmp_path, "out_dir")


def test_short_names_of_folders_are_those_of_litgpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("checkpoints/org/model", "org/other", "checkpoints/org/other"):
        (tmp_path / folder).mkdir(parents=True)
    expected = {
        "org/model": "checkpoints/org/model",
        "org/other": "org/other",
        "checkpoints/org/model": "checkpoints/org/model",
        "org/none": "org/none",
        ".": ".",
        str(tmp_path / "org/model"): str(tmp_path / "org/model"),
    }
    assert {path: str(extend_checkpoint_dir(Path(path))) for path in expected} == expected
