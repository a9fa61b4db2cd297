"""A thread that runs engines for requests of an asyncio event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from litgpt.errors import UserError
from litgpt.infer.engine import Engine
from litgpt.infer.requests import GeneratedToken, Request
from litgpt.infer.sequences import Sequence as EngineSequence

Event = tuple[int, GeneratedToken] | UserError
"""The number of a request among those submitted together and one of its tokens, or why they ended."""
Listener = Callable[[GeneratedToken | UserError], None]


class QueueFull(Exception):
    """More requests wait than the server allows."""


class EngineThread(threading.Thread):
    """Runs engines in turn as long as they have work; other threads submit requests.

    Args:
        engines: one for each model.
        max_waiting: the maximum number of requests that wait for their first token, of all engines.
    """

    def __init__(self, engines: Sequence[Engine], max_waiting: int) -> None:
        super().__init__(name="engine", daemon=True)
        self.engines, self.max_waiting = engines, max_waiting
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._is_closed = False
        self._listeners: dict[Engine, dict[EngineSequence, Listener]] = {engine: {} for engine in engines}
        self._submitted = 0

    @property
    def waiting(self) -> int:
        """The number of requests that wait for memory."""
        return sum(engine.waiting for engine in self.engines) + self._submitted

    @property
    def has_work(self) -> bool:
        """Whether any text is not finished."""
        return any(engine.has_work for engine in self.engines)

    def run(self) -> None:
        """Run the engines until `close` is called."""
        while True:
            with self._wake:
                while not (self._calls or self.has_work or self._is_closed):
                    self._wake.wait()
                if self._is_closed:
                    return
                calls, self._calls = self._calls, deque()
            try:
                for call in calls:
                    call()
                for engine in self.engines:
                    self._step(engine)
            except BaseException:  # a fault of the engine: clients get an error, and /health says so
                for engine in self.engines:
                    self._end_all(engine, UserError("the engine has stopped; see the log of the server"))
                raise

    def _step(self, engine: Engine) -> None:
        listeners = self._listeners[engine]
        try:
            changes = engine.step() if engine.has_work else []
        except UserError as error:  # logits are not finite, for example
            for sequence in list(listeners):
                engine.cancel(sequence)
            self._end_all(engine, error)
            return
        for sequence, token in changes:
            if (listener := listeners.get(sequence)) is not None:
                listener(token)
            if token.finish_reason is not None:
                listeners.pop(sequence, None)
        for sequence, listener in list(listeners.items()):
            if sequence.error is not None:
                listener(sequence.error)
                del listeners[sequence]

    def _end_all(self, engine: Engine, error: UserError) -> None:
        """Let all requests of an engine end with an error."""
        listeners, self._listeners[engine] = self._listeners[engine], {}
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

    async def generate(self, engine: Engine, requests: Sequence[Request]) -> AsyncIterator[tuple[int, GeneratedToken]]:
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
        sequences: list[EngineSequence] = []

        def submit() -> None:
            with self._wake:
                self._submitted -= len(requests)
            try:
                for number, request in enumerate(requests):
                    sequence = engine.submit(request)
                    sequences.append(sequence)

                    def listen(token: GeneratedToken | UserError, number: int = number) -> None:
                        event: Event = token if isinstance(token, UserError) else (number, token)
                        loop.call_soon_threadsafe(events.put_nowait, event)

                    self._listeners[engine][sequence] = listen
            except UserError as error:
                loop.call_soon_threadsafe(events.put_nowait, error)

        def cancel() -> None:
            for sequence in sequences:
                self._listeners[engine].pop(sequence, None)
                engine.cancel(sequence)

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
