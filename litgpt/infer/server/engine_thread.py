"""A thread that runs an engine for requests of an asyncio event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from litgpt.errors import UserError
from litgpt.infer import engine as engines
from litgpt.infer.requests import GeneratedToken, Request

Event = tuple[int, GeneratedToken] | UserError
"""The number of a request among those submitted together and one of its tokens, or why they ended."""


class QueueFull(Exception):
    """More requests wait than the server allows."""


class EngineThread(threading.Thread):
    """Runs an engine as long as it has work; other threads submit requests.

    Args:
        max_waiting: the maximum number of requests that wait for their first token.
    """

    def __init__(self, engine: engines.Engine, max_waiting: int) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine, self.max_waiting = engine, max_waiting
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._is_closed = False
        self._listeners: dict[engines.Sequence, Callable[[GeneratedToken | UserError], None]] = {}
        self._submitted = 0

    @property
    def waiting(self) -> int:
        """The number of requests that wait for memory."""
        return self.engine.waiting + self._submitted

    def run(self) -> None:
        """Run the engine until `close` is called."""
        while True:
            with self._wake:
                while not (self._calls or self.engine.has_work or self._is_closed):
                    self._wake.wait()
                if self._is_closed:
                    return
                calls, self._calls = self._calls, deque()
            try:
                for call in calls:
                    call()
                self._step()
            except BaseException:  # a fault of the engine: clients get an error, and /health says so
                self._end_all(UserError("the engine has stopped; see the log of the server"))
                raise

    def _step(self) -> None:
        try:
            changes = self.engine.step()
        except UserError as error:  # logits are not finite, for example
            for sequence in list(self._listeners):
                self.engine.cancel(sequence)
            self._end_all(error)
            return
        for sequence, token in changes:
            if (listener := self._listeners.get(sequence)) is not None:
                listener(token)
            if token.finish_reason is not None:
                self._listeners.pop(sequence, None)
        for sequence, listener in list(self._listeners.items()):
            if sequence.error is not None:
                listener(sequence.error)
                del self._listeners[sequence]

    def _end_all(self, error: UserError) -> None:
        """Let all requests end with an error."""
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener(error)

    def _call(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._calls.append(call)
            self._wake.notify()

    def close(self) -> None:
        """Stop the thread, and wait until it has stopped."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self.join()

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, GeneratedToken]]:
        """Yield the tokens of requests as they are generated; the requests are cancelled if the iterator is closed.

        Raises:
            QueueFull: if too many requests wait.
            UserError: if a request does not fit, or logits are not finite.
        """
        with self._wake:
            if self.waiting + len(requests) > self.max_waiting:
                raise QueueFull
            self._submitted += len(requests)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        sequences: list[engines.Sequence] = []

        def submit() -> None:
            with self._wake:
                self._submitted -= len(requests)
            try:
                for number, request in enumerate(requests):
                    sequence = self.engine.submit(request)
                    sequences.append(sequence)

                    def listen(token: GeneratedToken | UserError, number: int = number) -> None:
                        event: Event = token if isinstance(token, UserError) else (number, token)
                        loop.call_soon_threadsafe(events.put_nowait, event)

                    self._listeners[sequence] = listen
            except UserError as error:
                loop.call_soon_threadsafe(events.put_nowait, error)

        def cancel() -> None:
            for sequence in sequences:
                self._listeners.pop(sequence, None)
                self.engine.cancel(sequence)

        self._call(submit)
        missing = len(requests)
        try:
            while missing:
                event = await events.get()
                if isinstance(event, UserError):
                    raise event
                missing -= event[1].finish_reason is not None
                yield event
        finally:
            self._call(cancel)
