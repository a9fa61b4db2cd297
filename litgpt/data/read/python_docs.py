"""Read the documentation of Python's standard library from its source files, without importing them."""

import ast
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from litgpt.errors import UserError
from litgpt.files import find_surrogate, lock_folder, staged_folder

SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "site-packages", "dist-packages", "lib2to3", "idlelib", "distutils", "encodings")
)


def write_python_docs(folder: Path) -> tuple[Path, Path]:
    """Write a training and a validation .jsonl file for this Python version to `folder`, unless they exist.

    About one document in thirteen, selected by its hash, is for validation.
    """
    texts = folder / f"python-{platform.python_version()}"
    with lock_folder(folder):
        if not texts.is_dir():
            rows = {"train": list[str](), "val": list[str]()}
            for text in read_python_docs():
                split = "val" if hashlib.sha256(text.encode()).digest()[0] < 20 else "train"
                rows[split].append(json.dumps({"text": text}) + "\n")
            with staged_folder(texts) as staged:
                for split, lines in rows.items():
                    (staged / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return texts / "train.jsonl", texts / "val.jsonl"


def read_python_docs() -> Iterator[str]:
    """Read the help topics of `pydoc`, then the docstrings of each module, sorted by name, without duplicates.

    Raises:
        UserError: if this Python was installed without source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for text in _read_topics(root / "pydoc_data" / "topics.py"):
        if text not in seen:
            seen.add(text)
            yield text
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            new = [text for text in _read_docstrings(path) if text not in seen]
            seen.update(new)
            if new:
                yield "\n\n".join(new) + "\n"
    if not seen:
        raise UserError(f"data: PythonDocs: no source files in {root}; use TextFiles with your own text")


def _read_topics(path: Path) -> Iterator[str]:
    """Read the texts of pydoc's help topics."""
    if not path.is_file():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            yield from (topics[name].strip("\n") + "\n" for name in sorted(topics))


def _read_docstrings(path: Path) -> list[str]:
    """Read the docstrings of a source file that have at least 40 characters, verbatim."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other Python versions
        return []
    texts = (ast.get_docstring(node) for node in _iter_definitions(tree))
    return [text.strip() for text in texts if text and len(text) >= 40 and find_surrogate(text) is None]


def _iter_definitions(node: ast.AST) -> "Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]":
    """Iterate over the module, classes and functions of a tree; expressions are skipped for speed."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for name in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, name, ()):
            yield from _iter_definitions(child)
