"""Fetch the files of URLs in rows: from public addresses alone, within limits, into a cache by content."""

import hashlib
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import Medium, refuse_url
from litgpt.data.read.public_urls import Deadline, receive_file
from litgpt.data.read.row_media import MediaStep, resolve_media
from litgpt.errors import UserError
from litgpt.files import sync_file, write_text
from litgpt.recipe.bounds import check_numbers
from litgpt.recipe.effect import check_effects


@dataclass(frozen=True)
class MediaUrls:
    """Media at http and https URLs, whose files are kept beside the samples."""

    enabled: bool = False
    """Fetch them when rows are prepared; only from public addresses, and not through a proxy."""
    max_mb: Annotated[float, Ge(0.001), Le(1e5)] = 20.0
    """Largest file, in MB."""
    seconds: Annotated[float, Ge(0.01), Le(86400)] = 30.0
    """Most time for a file, with its redirects and three attempts."""
    connections: Annotated[int, Ge(1), Le(256)] = 16
    """Number of files that are fetched at a time; the order of rows does not depend on it."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.media_urls.")
        other, cure = "data.media_urls.enabled: false", "set data.media_urls.enabled: true"
        names = ("max_mb", "seconds", "connections")
        check_effects(self, "data.media_urls.", *names, have_effect=self.enabled, other=other, cure=cure)

    def fingerprint_parts(self) -> list[Any]:
        """What decides which files are fetched, as JSON values; nothing if none are."""
        return ["media_urls", self.max_mb, self.seconds] if self.enabled else []


def open_fetcher(folder: Path, limits: MediaUrls) -> Callable[[Medium], Path]:
    """What finds the files of media at URLs, in a folder, or refuses them all."""
    if not limits.enabled:
        return partial(refuse_url, cure="set data.media_urls.enabled: true, or download it, and give its path")
    fetcher = UrlFetcher(folder, limits)
    return lambda medium: fetcher.fetch(medium.name)


def build_resolver(
    folder: Path, downloads: Path, urls: MediaUrls, steps: Sequence[MediaStep] = ()
) -> Callable[[Conversation], Conversation]:
    """What finds the files of the media of conversations, or raises a BadRow.

    Args:
        folder: that paths are relative to and may not leave.
        downloads: in whose folder `media` the files of URLs are kept.
        steps: change the messages then, as in `resolve_media`.
    """
    fetch = open_fetcher(downloads.absolute() / "media", urls)

    def resolve(conversation: Conversation) -> Conversation:
        if not conversation.media:
            return conversation
        return replace(conversation, messages=resolve_media(conversation.messages, folder, fetch, steps))

    return resolve


class UrlFetcher:
    """Fetches files, of which it keeps one for each content; several threads may call it.

    Args:
        folder: of the files by their SHA-256, and of that of each URL.
    """

    def __init__(self, folder: Path, limits: MediaUrls) -> None:
        self.folder, self.limits = folder, limits
        self._fetched: dict[str, Future[Path]] = {}  # those in progress, and those that failed
        self._lock = threading.Lock()

    def fetch(self, url: str) -> Path:
        """The file of a URL, which is fetched if it was not before.

        Raises:
            BadRow: if that is impossible, which is not tried again in this run.
        """
        with self._lock:
            known = self._fetched.get(url)
            fetched = self._fetched.setdefault(url, Future())
        if known is not None:
            return known.result()
        try:
            fetched.set_result(self._find(url) or self._download(url))
            del self._fetched[url]
        except BaseException as error:
            fetched.set_exception(error)
            if not isinstance(error, BadRow):
                raise
        return fetched.result()

    def _find(self, url: str) -> Path | None:
        index = self._index(url)
        name = index.read_text("latin-1") if index.is_file() else ""
        return path if re.fullmatch("[0-9a-f]{64}", name) and (path := self.folder / name).is_file() else None

    def _index(self, url: str) -> Path:
        return self.folder / "urls" / hashlib.sha256(url.encode(errors="replace")).hexdigest()

    def _download(self, url: str) -> Path:
        target = self.folder / f"{uuid.uuid4().hex}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            max_mb = self.limits.max_mb
            limit = f"data.media_urls.max_mb: {max_mb:g}"
            with Deadline(self.limits.seconds) as deadline, target.open("wb") as file:
                name = receive_file(url, file, deadline, max_bytes=int(max_mb * 1e6), limit=limit)
            sync_file(target)
            write_text(self._index(url), name)
            return target.replace(self.folder / name)
        except OSError as error:  # those of connections are bad rows
            raise UserError(
                f"{self.folder}: cannot be written ({error}); set data.cache_dir to another folder"
            ) from None
        finally:
            target.unlink(missing_ok=True)
