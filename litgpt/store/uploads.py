"""Upload the checkpoints of a run in the background, so that neither a slow nor a lost network stops it."""

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from litgpt.phases import phase
from litgpt.store.collectives_io import Warn
from litgpt.store.object_store import describe_error


class Uploads:
    """A thread that uploads local checkpoints to one destination, in order.

    An upload that fails is reported, and the next checkpoint is uploaded all the same. A checkpoint that the run
    deletes before its turn is left out.

    Args:
        destination: for messages.
        upload: uploads the folder of a checkpoint, in several attempts.
        warn: called in the thread with one line.

    Attributes:
        uploaded: the number of checkpoints that were uploaded.
        failed: the number of those that were not.
        skipped: the number of those that were left out.
    """

    def __init__(self, destination: str, upload: Callable[[Path], None], warn: Warn) -> None:
        self.destination, self.upload, self.warn = destination, upload, warn
        self.uploaded = self.failed = self.skipped = 0
        self._waiting: deque[Path] = deque()
        self._current: Path | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name=f"uploads to {destination}", daemon=True).start()

    def add(self, folder: Path) -> None:
        """Upload a checkpoint after those that wait already."""
        with self._changed:
            self._waiting.append(folder)
            self._changed.notify_all()

    def release(self, folder: Path) -> bool:
        """Whether a checkpoint may be deleted, because it is not being uploaded; if it waits, it is left out."""
        with self._changed:
            if folder == self._current:
                return False
            if folder in self._waiting:
                self._waiting.remove(folder)
                self.skipped += 1
            return True

    def finish(self) -> None:
        """Wait until all checkpoints are uploaded, or failed to."""
        with phase(f"uploading to {self.destination}"), self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._current is None)

    def describe(self) -> str:
        """The destination, and how many checkpoints were uploaded and how many not."""
        counts = {"uploaded": self.uploaded, "failed": self.failed, "deleted before their upload": self.skipped}
        shown = (f"{count:,} {name}" for name, count in counts.items() if count or name == "uploaded")
        return f"{self.destination}: {', '.join(shown)}"

    def _run(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting)
                self._current = folder = self._waiting.popleft()
            try:
                self.upload(folder)
                self.uploaded += 1
            except Exception as error:  # of any type: the run goes on
                self.failed += 1
                reason = describe_error(error)
                self.warn(
                    f"{folder.name}: not uploaded to {self.destination} ({reason}); it is whole in {folder.parent}"
                )
