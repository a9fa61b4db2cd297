"""Text files of every kind, sound and damaged."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from litgpt.data.read.documents import (
    TEXT_SUFFIXES,
    SkippedRows,
    convert_errors,
    fingerprint_files,
    list_text_files,
    read_documents,
)
from litgpt.data.read.fields import BadRow
from litgpt.errors import UserError

ROWS = [{"text": "first"}, {"text": "zweiter – Text", "id": 3}, {"id": 4, "text": "third\nline"}]


def write(path: Path, content: bytes) -> Path:
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(content)
    path.write_bytes(packed)
    return path


@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_every_kind(tmp_path: Path, suffix: str) -> None:
    rows = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
    if ".jsonl" in suffix:
        path, expected = write(tmp_path / f"a{suffix}", rows.encode()), [row["text"] for row in ROWS]
    else:
        path, expected = write(tmp_path / f"a.b{suffix}", b"ein\r\nText"), ["ein\nText"]
    assert list(read_documents(path)) == expected
    (tmp_path / "notes.md").write_text("not text for training")
    (tmp_path / "sub").mkdir()
    assert list_text_files(tmp_path, "input") == [path]
    assert list_text_files(path, "input") == [path]


def test_several_zstandard_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert list(read_documents(path)) == ["one two"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.jsonl.gz", "a.txt.zst"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_archive_cut_short(tmp_path: Path, name: str, policy: str) -> None:
    content = "".join(json.dumps({"text": f"row {i} {i * 7919 % 10007}"}) + "\n" for i in range(20000)).encode()
    path = write(tmp_path / name, content)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"a\.\w+\.\w+:\d+: cannot be decompressed"):
        list(read_documents(path, bad_rows=policy))  # type: ignore[arg-type]


BAD_ROWS = {
    b'{"text": "x"': "not JSON",
    b'{"txt": "x"}': '"text" is missing or empty',
    b'{"text": ""}': '"text" is missing or empty',
    b'{"text": 3}': '"text" is missing or empty',
    b'["text"]': '"text" is missing or empty',
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "surrogate",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("row", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_row(tmp_path: Path, row: bytes) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + row + b'\n\n{"text": "also good"}\n' + row)
    with pytest.raises(UserError) as caught:
        list(read_documents(path))
    assert f"{path}:2: " in str(caught.value) and BAD_ROWS[row] in str(caught.value)
    skipped = SkippedRows()
    assert list(read_documents(path, bad_rows="skip", skipped=skipped)) == ["good", "also good"]
    assert skipped.count == 2 and skipped.first.startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("content", "place"), [(b"", "1: empty"), (b"one\ntwo\nthr\xe9e\n", "3: not UTF-8 (byte 0xe9)")]
)
def test_bad_text_file(tmp_path: Path, content: bytes, place: str) -> None:
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(UserError) as caught:
        list(read_documents(path))
    assert f"{path}:{place}" in str(caught.value)
    skipped = SkippedRows()
    assert not list(read_documents(path, bad_rows="skip", skipped=skipped)) and skipped.count == 1


def test_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"^input: "):
            list_text_files(path, "input")


def test_hashes_are_remembered_but_not_of_files_just_written(tmp_path: Path) -> None:
    import os

    path, memory = write(tmp_path / "a.txt", b"aaaa"), tmp_path / "hashes.json"
    first = fingerprint_files([path], memory)
    assert not memory.exists()
    write(path, b"bbbb")  # same size, perhaps the same tick of the clock
    assert fingerprint_files([path], memory) != first
    os.utime(path, (1, 1))
    second = fingerprint_files([path], memory)
    assert memory.exists() and fingerprint_files([path], memory) == second
    write(path, b"cccc")
    assert fingerprint_files([path], memory)[0].sha256 != second[0].sha256
    memory.write_text("{")  # damaged: hashed again
    assert fingerprint_files([path], memory)[0].bytes == 4


@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_encodings(tmp_path: Path, suffix: str) -> None:
    text = '{"text": "é"}\n' if ".jsonl" in suffix else "é\nb"
    path = write(tmp_path / f"a{suffix}", text.encode())
    expected = list(read_documents(path))
    for content in (text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode()):
        assert list(read_documents(write(path, content))) == expected
    for encoding in ("utf-16", "utf-32"):
        write(path, text.encode(encoding))
        with pytest.raises(UserError, match=f"{suffix}: {encoding.upper()}, not UTF-8; convert it to UTF-8"):
            list(read_documents(path, bad_rows="skip"))


def test_errors_of_the_consumer_are_not_those_of_the_items() -> None:
    def read() -> Iterator[int]:
        yield 1
        raise OSError("broken")

    items = convert_errors(read(), OSError, lambda error: UserError(f"a.txt: {error}"))
    assert next(items) == 1
    with pytest.raises(UserError, match=r"a\.txt: broken"):
        next(items)
    items = convert_errors(read(), OSError, lambda error: UserError(f"a.txt: {error}"))
    next(items)
    with pytest.raises(OSError, match="disk full"):
        items.throw(OSError("disk full"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_documents_thrown_into_and_rows_of_images(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b'{"text": "a"}\n{"text": "b", "images": ["b.png"]}\n')
    documents = read_documents(path)
    next(documents)
    with pytest.raises(BadRow, match="mine"):  # not counted as a row of the file
        documents.throw(BadRow("mine"))  # type: ignore[attr-defined]
    if name == "a.jsonl":
        with pytest.raises(UserError, match=r"a\.jsonl:2: image data is not supported yet \(row\.images"):
            list(read_documents(path))
        assert list(read_documents(path, bad_rows="skip")) == ["a"]
