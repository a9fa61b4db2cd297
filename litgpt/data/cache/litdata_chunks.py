"""Tokens in a folder that litdata's `optimize` wrote for its TokensLoader, memory-mapped.

A folder holds index.json (names, tokens and format of the chunks) and chunk files: uint32 number of items, uint32 byte
offset of each item and of the end, then the tokens.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from litgpt.files import DamagedFileError, join_inside, read_json

# the indices of integer types in litdata's two tables
_TENSOR_TYPES = {11: "u1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
_ARRAY_TYPES = dict(enumerate(["i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8"]))


class ChunkFolder:
    """All chunks of a folder as one text; every item is a document.

    Raises:
        DamagedFileError: if the index or a chunk is missing, truncated or of another type.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_json(folder / "index.json")
        try:
            self._dtype = _read_token_type(index["config"])
            self._chunks = [
                (join_inside(folder, c["filename"]), int(c["dim"]), int(c["chunk_size"])) for c in index["chunks"]
            ]
        except (KeyError, TypeError, ValueError):
            raise DamagedFileError(
                f"{folder / 'index.json'}: not an index of uncompressed tokens (TokensLoader)"
            ) from None
        for path, tokens, items in self._chunks:
            if not path.is_file() or path.stat().st_size != (items + 2) * 4 + tokens * self._dtype.itemsize:
                raise DamagedFileError(f"{path}: missing, or its size differs from index.json")
        self._ends = np.cumsum([tokens for _, tokens, _ in self._chunks], dtype=np.int64)
        self.total = int(self._ends[-1]) if self._chunks else 0
        self.documents = sum(items for _, _, items in self._chunks)
        self.fingerprint = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()[:20]
        self._maps: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read tokens start .. stop-1."""
        parts = [self._tokens(chunk)[low:high] for chunk, low, high in self._locate(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def find_document_starts(self, start: int, stop: int) -> np.ndarray:
        """Find the first tokens of documents among start .. stop-1."""
        starts = [np.zeros(0, np.int64)]
        for chunk, low, high in self._locate(start, stop):
            path, tokens, items = self._chunks[chunk]
            offsets = np.memmap(path, dtype="<u4", mode="r", offset=4, shape=(items + 1,))
            chunk_starts = (offsets[:-1].astype(np.int64) - (items + 2) * 4) // self._dtype.itemsize
            in_range = (chunk_starts >= low) & (chunk_starts < high)
            starts.append(chunk_starts[in_range] + int(self._ends[chunk]) - tokens)
        return np.unique(np.concatenate(starts))

    def _locate(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Find the chunks that contain start .. stop-1, and the range within each."""
        parts, chunk = [], int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[chunk]) - self._chunks[chunk][1]
            end = min(stop, int(self._ends[chunk]))
            parts.append((chunk, start - begin, end - begin))
            start, chunk = end, chunk + 1
        return parts

    def _tokens(self, chunk: int) -> np.ndarray:
        if chunk not in self._maps:
            path, _, items = self._chunks[chunk]
            self._maps[chunk] = np.memmap(path, dtype=self._dtype, mode="r", offset=(items + 2) * 4)
        return self._maps[chunk]


def is_memory_mappable(folder: Path) -> bool:
    """Whether the chunks of a folder can be memory-mapped: neither compressed nor encrypted."""
    config = read_json(folder / "index.json").get("config", {})
    return not config.get("compression") and not config.get("encryption")


def _read_token_type(config: dict[str, Any]) -> np.dtype:
    kind, _, number = config["data_format"][0].partition(":")
    tables = {"no_header_tensor": _TENSOR_TYPES, "no_header_numpy": _ARRAY_TYPES}
    return np.dtype(tables[kind][int(number)])
