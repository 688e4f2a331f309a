"""Render one chat template in a worker process (:mod:`byway.data.jinja.worker`), which is limited in memory and time.

A template comes with a model or an adapter that somebody sent, and a few characters of it can ask for any amount of
both. A limited process holds whatever the template does. Requests are sent ahead of the replies, so that the two
processes work at the same time.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from byway.errors import ConfigError, RunError

__all__ = ["Job", "Refused", "Renderer", "Request", "Written"]

_WORKER = Path(__file__).with_name("worker.py")
_AHEAD = 2**16
"""Bytes of requests that are sent before their replies are read."""
_PATIENCE = 60.0
"""Seconds to wait for a reply. The worker's processor time is limited to much less; a busy machine may take longer."""

Job = tuple[int, bool]
"""The number of leading messages to write, and whether the generation prompt follows."""


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation, and the texts to write of it."""

    messages: Sequence[Mapping[str, Any]]
    jobs: Sequence[Job]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def data(self) -> bytes:
        """Return the request as the worker reads it."""
        values = {"messages": self.messages, "jobs": self.jobs, "tools": self.tools, "variables": self.variables}
        return json.dumps(values, default=lambda value: f"<{type(value).__name__}>").encode()  # as transformers shows objects


@dataclass(frozen=True, slots=True)
class Written:
    """What the template wrote, and the characters that it marked with ``{% generation %}``."""

    text: str
    marks: tuple[tuple[int, int], ...] = ()


class Refused(Exception):
    """The template refuses a conversation; the message is its own."""


class Renderer:
    """A chat template. `name` is used in messages.

    Raises:
        ConfigError: the template is not valid, or exceeds a limit; here and later.
    """

    def __init__(self, source: str, name: str) -> None:
        self.name = name
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is for the parent
            )
        except OSError as error:
            raise RunError(f"{name} cannot be rendered: no process can be started ({error})") from error
        self._end = weakref.finalize(self, _end, self._process)
        os.set_blocking(_pipe(self._process.stdin).fileno(), False)
        self._received = bytearray()
        self._replies, self._either = selectors.DefaultSelector(), selectors.DefaultSelector()
        for waiting in (self._replies, self._either):
            waiting.register(_pipe(self._process.stdout), selectors.EVENT_READ)
        self._either.register(_pipe(self._process.stdin), selectors.EVENT_WRITE)
        self._send(json.dumps({"template": source}).encode())
        self.literals: tuple[str, ...] = tuple(self._receive()["literals"])
        """The texts that are written in the template itself."""

    def write(self, requests: Iterable[Request]) -> list[list[Written] | Refused]:
        """Return for each request one text for each job, or why the template refuses it.

        Raises:
            ConfigError: the template exceeds a limit.
        """
        found: list[list[Written] | Refused] = []
        ahead: deque[int] = deque()
        for request in requests:
            data = request.data()
            while ahead and sum(ahead) + len(data) > _AHEAD:
                ahead.popleft()
                found.append(self._written())
            self._send(data)
            ahead.append(len(data))
        return found + [self._written() for _ in ahead]

    def _written(self) -> list[Written] | Refused:
        results: list[dict[str, Any]] = self._receive()
        for result in results:
            self._check(result)
            if "refused" in result:
                return Refused(result["refused"])
        return [Written(result["text"], tuple((start, end) for start, end in result["marks"])) for result in results]

    def _send(self, data: bytes) -> None:
        message = memoryview(struct.pack("<I", len(data)) + data)
        try:
            while message:
                sent: int | None = _pipe(self._process.stdin).write(message)
                if sent is None:  # the pipe is full; the worker may be waiting for its replies to be read
                    self._wait(self._either)
                message = message[sent or 0 :]
        except BrokenPipeError:
            raise self._died() from None

    def _receive(self) -> Any:
        """Return the next reply. Raises ConfigError if it says, or its absence, that a limit was exceeded."""
        (size,) = struct.unpack("<I", self._read(4))
        reply = json.loads(self._read(size))
        if isinstance(reply, dict):
            self._check(reply)
        return reply

    def _read(self, size: int) -> bytes:
        """Return the next `size` bytes of the worker's output."""
        while len(self._received) < size:
            self._wait(self._replies)
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    def _wait(self, waiting: selectors.BaseSelector) -> None:
        """Wait for the worker, and take what it has written."""
        ready = waiting.select(_PATIENCE)
        if not ready:
            self._end()
            raise self._exceeded("the time that rendering may take")
        output = _pipe(self._process.stdout)
        if any(key.fileobj is output for key, _ in ready):
            part = os.read(output.fileno(), 2**16)
            if not part:
                raise self._died()
            self._received += part

    def _check(self, reply: Mapping[str, Any]) -> None:
        if "exceeded" in reply:
            self._end()
            raise self._exceeded(reply["exceeded"])
        if "invalid" in reply:
            raise ConfigError(f"{self.name} is not a valid Jinja template: {reply['invalid']}", "correct it, or set data.template")

    def _died(self) -> ConfigError:
        self._end()
        late = self._process.returncode == -signal.SIGXCPU
        return self._exceeded("the time that rendering may take" if late else "what its process can bear")

    def _exceeded(self, what: str) -> ConfigError:
        return ConfigError(f"{self.name} exceeds {what}", "look at its loops and repetitions, or use another template")


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # Popen was asked for it
    return stream


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the worker; it holds nothing that could be lost."""
    process.poll()  # keep the reason why it ended itself
    process.kill()
    for stream in (process.stdin, process.stdout):
        _pipe(stream).close()
    process.wait()
