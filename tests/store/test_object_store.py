"""Checkpoints in an object store: whole or not at all, and an earlier one if not."""

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from litgpt.errors import UserError
from litgpt.files import MANIFEST, verify_manifest, write_manifest
from litgpt.recipe.object_url import check_client, find_url, format_path
from litgpt.store import object_store
from litgpt.store.object_store import ATTEMPTS, ObjectStore, download_model, get_cache_folder, retry
from litgpt.store.uploads import Uploads

NAMES = ("progress.json", "shard-00000-of-00001.safetensors", "prompts/chat.jinja")


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def memory() -> Iterator[Any]:
    file_system = fsspec.filesystem("memory", use_listings_cache=False, skip_instance_cache=True)
    yield file_system
    file_system.store.clear()


@pytest.fixture
def store(memory: Any) -> ObjectStore:
    return ObjectStore("memory://bucket/run", memory)


def write_checkpoint(out_dir: Path, step: int, content: str = "") -> Path:
    folder = out_dir / f"step-{step:08d}"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of {step} {content}")
    write_manifest(folder)
    return folder


def die_at(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, call: int) -> list[str]:
    """Let the process end before the write or deletion of this number; returns those that were done."""
    done: list[str] = []

    def act(name: str, real: Callable[..., None], *arguments: Any) -> None:
        if len(done) == call:
            raise KilledError
        done.append(name)
        real(*arguments)

    for name in ("put_file", "pipe_file", "rm_file"):
        monkeypatch.setattr(store.files, name, partial(act, name, getattr(store.files, name)))
    return done


def test_a_checkpoint_comes_back_as_it_was(store: ObjectStore, tmp_path: Path) -> None:
    saved = write_checkpoint(tmp_path / "here", 8)
    store.upload(saved)
    assert store.list_steps() == [8] and store.is_whole(8)
    messages: list[str] = []
    loaded = store.download_latest(tmp_path / "there", messages.append)
    assert loaded == tmp_path / "there" / "step-00000008" and not messages
    assert [(loaded / name).read_text() for name in NAMES] == [(saved / name).read_text() for name in NAMES]
    verify_manifest(loaded)
    assert store.download_latest(tmp_path / "there", messages.append, after=8) is None
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["step-00000008"]


def test_an_upload_that_ends_at_any_object_is_no_checkpoint(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.upload(write_checkpoint(tmp_path / "a", 4))
    store.upload(write_checkpoint(tmp_path / "a", 8, "of an earlier run"))
    other = write_checkpoint(tmp_path / "b", 8)  # of the same size in part, and other values
    before = {path: entry.getvalue() for path, entry in store.files.store.items()}
    for call in itertools.count():
        for path, content in before.items():
            store.files.pipe_file(path, content)
        with monkeypatch.context() as patch:
            done = die_at(store, patch, call)
            try:
                store.upload(other)
            except KilledError:
                assert len(done) == call
            else:
                break
        out_dir = tmp_path / f"after-{call}"
        loaded = store.download_latest(out_dir, lambda _line: None)
        assert loaded is not None
        verify_manifest(loaded)
        text = (loaded / NAMES[0]).read_text()
        assert text == (f"{NAMES[0]} of 8 of an earlier run" if call == 0 else f"{NAMES[0]} of 4 ")
    assert call == 2 * (len(NAMES) + 1), "each of the objects is deleted and written again"
    loaded = store.download_latest(tmp_path / "end", lambda _line: None)
    assert loaded is not None and (loaded / NAMES[0]).read_text() == f"{NAMES[0]} of 8 "


@pytest.mark.parametrize("name", [*NAMES, MANIFEST])
@pytest.mark.parametrize("damage", ["removed", "cut", "changed"])
def test_a_damaged_checkpoint_is_refused_and_an_older_one_taken(
    store: ObjectStore, tmp_path: Path, name: str, damage: str
) -> None:
    for step in (4, 8):
        store.upload(write_checkpoint(tmp_path / "here", step))
    path = f"{store.root}/step-00000008/{name}"
    content = store.files.cat_file(path)
    store.files.rm_file(path)
    if damage != "removed":
        store.files.pipe_file(path, content[:-9] if damage == "cut" else content[:-3] + b"???")
    messages: list[str] = []
    loaded = store.download_latest(tmp_path / "there", messages.append)
    assert loaded == tmp_path / "there" / "step-00000004"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["step-00000004"]
    assert len(messages) == (0 if (name, damage) == (MANIFEST, "removed") else 1)


def test_only_kept_checkpoints_the_best_and_those_of_another_past_remain(store: ObjectStore, tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        store.upload(write_checkpoint(tmp_path, step))
    store.files.rm_file(f"{store.root}/step-00000006/{MANIFEST}")  # as an interrupted upload leaves it
    assert store.abandon_after(8, own_steps={12}) == [10]
    store.upload(write_checkpoint(tmp_path, 12))
    assert store.abandon_after(8, own_steps={12}) == []
    store.prune(2, best_step=2)
    assert store.list_steps() == [12, 8, 2]
    folders = {name.split("/")[0] for name in store.list_sizes()}
    assert folders == {"step-00000002", "step-00000008", "step-00000010", "step-00000012"}


def test_a_checkpoint_that_is_there_is_not_uploaded_again(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.upload(write_checkpoint(tmp_path, 4))
    die_at(store, monkeypatch, 0)
    store.upload(tmp_path / "step-00000004")


def test_what_fails_is_tried_again_with_longer_waits_and_some_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(object_store, "time", SimpleNamespace(sleep=waits.append))
    messages: list[str] = []
    results = iter([OSError("lost"), OSError("lost"), "done"])

    def act() -> str:
        if isinstance(result := next(results), OSError):
            raise result
        return result

    assert retry(act, messages.append, "the upload") == "done"
    assert messages == ["the upload failed (OSError: lost); it is tried again"]
    assert len(waits) == 2 and 0.75 <= waits[0] <= 1.25 and 1.5 <= waits[1] <= 2.5

    def fail(error: Exception) -> None:
        calls.append(error)
        raise error

    missing = type("NoCredentialsError", (Exception,), {})("x")  # of botocore
    for error, attempts in ((OSError("x"), ATTEMPTS), (PermissionError("x"), 1), (missing, 1)):
        calls: list[Exception] = []
        with pytest.raises(type(error)):
            retry(lambda error=error: fail(error), messages.append, "it")  # type: ignore[misc]
        assert len(calls) == attempts


def test_uploads_go_on_after_one_that_fails_and_leave_out_what_is_deleted(tmp_path: Path) -> None:
    started, allowed = threading.Event(), threading.Event()
    done: list[str] = []
    messages: list[str] = []

    def upload(folder: Path) -> None:
        started.set()
        allowed.wait(10)
        if folder.name == "step-00000002":
            raise OSError("the disk of the\nstore is full")
        done.append(folder.name)

    uploads = Uploads("s3://bucket/run", upload, messages.append)
    folders = [tmp_path / f"step-0000000{step}" for step in (1, 2, 3, 4)]
    for folder in folders:
        uploads.add(folder)
    assert started.wait(10)
    assert not uploads.release(folders[0]), "is being uploaded"
    assert uploads.release(folders[2]), "waits only"
    allowed.set()
    uploads.finish()
    assert uploads.release(folders[0])
    assert done == ["step-00000001", "step-00000004"]
    assert len(messages) == 1 and "step-00000002" in messages[0] and "\n" not in messages[0]
    assert uploads.describe() == "s3://bucket/run: 2 uploaded, 1 failed, 1 deleted before their upload"


def test_a_model_is_downloaded_once_without_code_and_whole_or_not(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(object_store, "connect", lambda _url: memory)
    monkeypatch.setattr(object_store, "check_client", lambda _key, _url: None)
    monkeypatch.setattr(object_store, "FIRST_WAIT", 0)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "modeling.py", "model.bin", "original/x.json"):
        memory.pipe_file(f"bucket/model/{name}", name.encode())
    real, lost = memory.get_file, ["model.safetensors"]

    def get_file(path: str, target: str) -> None:
        if path.endswith(tuple(lost)):
            lost.clear()
            raise ConnectionError("reset by peer")
        assert not get_cache_folder("memory://bucket/model").exists()
        real(path, target)

    monkeypatch.setattr(memory, "get_file", get_file)
    messages: list[str] = []
    folder = download_model("checkpoint_dir", "memory://bucket/model", messages.append)
    assert folder == Path("checkpoints/memory/bucket/model") and len(messages) == 1
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    memory.store.clear()
    assert download_model("checkpoint_dir", "memory://bucket/model", messages.append) == folder
    with pytest.raises(UserError, match=r"checkpoint_dir: memory://bucket/none holds no \.safetensors files"):
        download_model("checkpoint_dir", "memory://bucket/none", messages.append)
    assert [path.name for path in Path("checkpoints/memory/bucket").iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["../../out.safetensors", "/etc/out.safetensors", "a\\b.safetensors"])
def test_a_manifest_cannot_lead_out_of_its_folder(store: ObjectStore, tmp_path: Path, name: str) -> None:
    entries = {name: {"bytes": 1, "sha256": ""}}
    manifest = {"files": entries, "sha256": object_store.hash_entries(entries)}
    store.files.pipe_file(f"{store.root}/step-00000004/{MANIFEST}", json.dumps(manifest).encode())
    store.files.pipe_file(f"{store.root}/step-00000004/{name}", b"x")
    assert store.download_latest(tmp_path / "out", lambda _line: None) is None
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("s3://bucket/run/", "s3://bucket/run"),
        (Path("s3://bucket/a/b"), "s3://bucket/a/b"),
        ("gs://bucket", "gs://bucket"),
        ("out/s3", None),
        ("s3://", None),
        ("s3:///run", None),
        ("http://host/run", None),
        ("", None),
    ],
)
def test_which_values_are_urls(value: str | Path, url: str | None) -> None:
    assert find_url(value) == url
    assert format_path(value) == (url or str(value))


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litgpt.recipe.object_url.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"checkpoint.upload_to: gs://b needs gcsfs; run: pip install 'litgpt\[gcs\]'"):
        check_client("checkpoint.upload_to", "gs://b")
