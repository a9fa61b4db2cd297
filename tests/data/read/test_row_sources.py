"""Rows read from files of every kind, and their names in recipes."""

import json
from pathlib import Path
from typing import Any

import pytest

from litgpt.data.read.conversation import to_conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.row_sources import parse_source, read_rows, split_sample
from litgpt.errors import UserError
from tests.data.conversation_rows import rows, write


def test_a_name_with_a_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "a#3.jsonl", rows(2))
    assert split_sample(str(path)) == (str(path), None)
    assert split_sample(f"{path}#7") == (str(path), 7)
    assert parse_source({"path": f"{path}#7", "channel": "x"}).sample == 7
    with pytest.raises(UserError, match="sets a sample size"):
        parse_source({"path": f"{path}#7", "sample": 3})


def test_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    import csv
    import gzip

    import pyarrow
    import pyarrow.parquet

    lines = [
        {"query": f"number 0-{n}", "response": text} for n, text in enumerate(["NA", "null", "é😀", 'a,"b"\nc', "1"])
    ]
    write(tmp_path / "a.jsonl", lines)
    (tmp_path / "b.json").write_text(json.dumps(lines))
    write(tmp_path / "c.json", lines)
    (tmp_path / "d.json").write_text(json.dumps({"rows": lines}))
    with (tmp_path / "e.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["query", "response"])
        table.writeheader()
        table.writerows(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "f.parquet")
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for path in sorted(tmp_path.iterdir()):
        assert [row for _, row in read_rows(path)] == lines, path
    for broken in ("[{", '[{"a": 1} {"b": 2}]', '[{"a": 1}', '[{"a": 1}] x', "3", "[" * 3000, '[{"a": "\udcff"}]'):
        (tmp_path / "broken.json").write_bytes(broken.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=r"broken\.json:(1:)? [^\n]*$"):
            list(read_rows(tmp_path / "broken.json"))
    long = [{"query": "q" * 3_000_000, "response": "é" * 10}, 12, 3.5, None, {"a": []}, {"query": "r", "response": "s"}]
    for text in (json.dumps(long, ensure_ascii=False), json.dumps(long, indent=2), "\ufeff [ ]\n", "[1, 2]"):
        (tmp_path / "long.json").write_text(text)
        assert [row for _, row in read_rows(tmp_path / "long.json")] == json.loads(text.lstrip("\ufeff"))
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(UserError, match=r"broken\.json"):
        list(read_rows(tmp_path / "broken.json"))


def test_tools_of_other_shapes_survive_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    tools = [[{"name": "f", "parameters": {"city": {"type": "string"}}}], [{"name": "g", "parameters": {"x": 1}}]]
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [{"messages": said, "tools": json.dumps(text)} for text in tools]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "t.parquet")
    read = [to_conversation(row).tools for _, row in read_rows(tmp_path / "t.parquet")]
    assert [json.loads(text or "") for text in read] == tools


TEXTS = {
    "a.jsonl": '{"query": "é", "response": "a"}\n{"query": "r", "response": "b"}\n',
    "a.json": '[{"query": "é", "response": "a"},\n{"query": "r", "response": "b"}]\n',
    "b.json": '{"query": "é", "response": "a"}\n{"query": "r", "response": "b"}\n',
    "a.csv": "query,response\né,a\nr,b\n",
    "a.txt": "é\na\n",
}


@pytest.mark.parametrize("name", [*TEXTS, "a.jsonl.gz", "a.json.zst", "a.csv.gz", "a.txt.zst"])
def test_encodings_of_every_kind_of_file(tmp_path: Path, name: str) -> None:
    import gzip

    import zstandard

    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    text, path = TEXTS[name.removesuffix(".gz").removesuffix(".zst")], tmp_path / name

    def read(content: bytes) -> list[Any]:
        path.write_bytes(pack(content))
        return [row for _, row in read_rows(path)]

    expected = read(text.encode())
    assert expected[0] in ({"query": "é", "response": "a"}, {"text": "é\na\n"})
    assert read(text.encode("utf-8-sig")) == read(text.replace("\n", "\r\n").encode()) == expected
    for encoding in ("utf-16", "utf-32"):
        with pytest.raises(UserError, match=f"{name}: {encoding.upper()}, not UTF-8; convert it to UTF-8"):
            read(text.encode(encoding))
    path.write_bytes(pack(text.encode().replace(b"a", b"\xe9", 1) if "txt" in name else text.encode("latin-1")))
    if name in ("a.json", "a.json.zst"):  # a list has no rows that could be left out
        with pytest.raises(UserError, match=rf"{name}:1: not UTF-8 \(byte 0xe9\); convert"):
            list(read_rows(path))
    else:
        located = [(location, row) for location, row in read_rows(path) if isinstance(row, BadRow)]
        number = 1 if "json" in name else 2
        assert [(location, row.reason) for location, row in located] == [(f"{path}:{number}", "not UTF-8")]
