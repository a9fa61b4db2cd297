"""Fetch the files at URLs of requests: in threads of their own, within limits of size and time for each request."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO

from litgpt.data.read.fields import BadRow
from litgpt.data.read.public_urls import TOO_LARGE, TOO_SLOW, Deadline, receive_file
from litgpt.infer.server.errors import ApiError


@dataclass(frozen=True)
class FetchLimits:
    """Limits of the files at URLs.

    Attributes:
        megabytes: of all files of a request together.
        seconds: for all of them.
        requests: whose files are fetched or read at a time.
        waiting: requests that wait for that; more are refused.
    """

    megabytes: float
    seconds: float
    requests: int
    waiting: int


class UrlFiles:
    """Fetches the files of requests into memory, and keeps none."""

    def __init__(self, limits: FetchLimits) -> None:
        self.limits, self._waiting = limits, 0
        self._threads = ThreadPoolExecutor(limits.requests, "fetch")
        self._free = asyncio.Semaphore(limits.requests)

    @asynccontextmanager
    async def fetch(self, urls: Sequence[str]) -> AsyncIterator[dict[str, bytes]]:
        """The files of URLs, for the block, in which they count as fetched; what is left ends if this is cancelled.

        The slot is free for another request when both the block and its thread have ended; the thread may end later if
        this is cancelled.

        Raises:
            ApiError: if one cannot be fetched, or too many requests wait.
        """
        if not urls:
            yield {}
            return
        if self._waiting >= self.limits.waiting:
            message = f"{self._waiting} requests with URLs wait already; try again later"
            raise ApiError(429, message, kind="rate_limit_error", code="queue_full")
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            deadline = Deadline(self.limits.seconds)
            received = asyncio.get_running_loop().run_in_executor(self._threads, self._receive, urls, deadline)
        except BaseException:
            self._free.release()
            raise
        try:
            with deadline:
                files = await asyncio.shield(received)
            yield files
        finally:
            received.add_done_callback(self._free_slot)

    def _free_slot(self, received: "asyncio.Future[dict[str, bytes]]") -> None:
        if not received.cancelled():
            received.exception()  # which nobody waits for any more
        self._free.release()

    def _receive(self, urls: Sequence[str], deadline: Deadline) -> dict[str, bytes]:
        files, left = dict[str, bytes](), int(self.limits.megabytes * 1e6)
        details = {
            TOO_LARGE: f": all files are more than max_fetch_mb: {self.limits.megabytes:g}",
            TOO_SLOW: f": not all of it after fetch_seconds: {self.limits.seconds:g}",
        }
        for url in urls:
            file = BytesIO()
            try:
                receive_file(url, file, deadline, max_bytes=left, limit="max_fetch_mb")
            except BadRow as error:  # whose text may name addresses of this network
                detail = details.get(error.reason, "")
                message = f"messages: {url[:80]!r}: {error.reason}{detail}; send the file itself, in a data URL"
                raise ApiError(400, message, param="messages") from None
            files[url] = file.getvalue()
            left -= len(files[url])
        return files
