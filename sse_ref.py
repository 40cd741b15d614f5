# SPDX-License-Identifier: 0BSD
r"""Server-sent events on Python's http.server: one file to run, to copy and to read.

    python sse_ref.py
    curl http://localhost:8080            # prints okay, and the connection closes
    curl -N http://localhost:8080/sse     # prints data: hi there!, and stays open

An event stream is an HTTP response that does not end: the server writes an event to it
whenever there is news, and a browser reads it with `new EventSource(url)`.

    1. An event         its lines, and why no line break may escape
    2. The I/O thread   one thread that waits for all streams
    3. A stream         slow readers, readers that leave, several threads that write
    4. A channel        one event for everybody, and what a reader has missed
    5. A request        from its head to its answer, which may be a stream
    6. Who gets in      pages of other origins
    7. The server       how many connections, and an orderly end
    8. The command line

Chapters 1 to 4 are about event streams, 5 to 8 about serving them on http.server. Three
kinds of threads do the work:

  * The thread that called `run` accepts connections and starts a thread for each one.
  * The request's own thread reads the head, calls the program's `on_connection(client)`
    and then sleeps until the stream has ended.
  * The I/O thread, one per process, waits for all open streams. It writes what channels
    publish and the backlogs, sends keep-alives, notices who leaves, and ends streams.

Any thread may write to a stream, under the lock of its Client. A thread that needs
several locks takes a client's first, then a channel's, then the I/O thread's. It never
logs while it holds one. "(locked)": the caller holds the lock of the object.

"Standard" means section 9.2 of HTML, https://html.spec.whatwg.org/#server-sent-events
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import dataclasses
import errno
import fnmatch
import io
import ipaddress
import logging
import os
import re
import secrets
import selectors
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Generator
from http import HTTPStatus
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from typing import Any, Callable, Iterable, Mapping, NamedTuple
from urllib.parse import parse_qs, unquote

__all__ = ["Channel", "Client", "Refusal", "SSERequestHandler", "SSEServer"]
__all__ += ["encode_comment", "encode_event"]

__version__ = "3.0"
logger = logging.getLogger("sse_ref")
_Callback = Callable[["Client"], object]
_Headers = Mapping[str, str]


def _report(level: int, message: str, *arguments: object) -> None:
    """Log, and an error with its traceback. A log that fails must cost no answer."""
    with contextlib.suppress(Exception):
        logger.log(level, message, *arguments, exc_info=level >= logging.ERROR)


def _attempt(stream: object, step: Callable[..., object], *arguments: object) -> None:
    """Call `step(*arguments)`. If that fails, log it, and cut off `stream`, if any."""
    try:
        step(*arguments)
    except Exception:
        _report(logging.ERROR, "%s failed", step)
        if isinstance(stream, Client):
            stream._cut_off("because of an error in the server")


# --- 1. An event ------------------------------------------------------------------

# Standard, 9.2.5: a line ends with CR LF, CR or LF. str.splitlines() would also break
# lines at U+2028, form feed and others, which are ordinary characters here.
_LINE_BREAK = re.compile(r"\r\n|\r|\n")


def encode_event(
    data: str | None = None,
    *,
    event: str | None = None,
    id: str | int | None = None,
    retry: int | None = None,
) -> bytes:
    r"""Return one event as it goes over the wire: one line per field, and a blank line.

    >>> encode_event("one\ntwo", event="news", id=7)
    b'event: news\nid: 7\ndata: one\ndata: two\n\n'

    `event` is the type, by default "message". `id` becomes the reader's last event ID,
    and `retry` its reconnection time in milliseconds. Raises TypeError, or ValueError
    for what a reader would misunderstand: no field, `event` without `data`, a line
    break in `event` or `id`, NUL or outer white space in `id`, a lone surrogate.
    """
    frame = ""
    if event is not None:
        if data is None:  # Standard, 9.2.6: readers never report such an event.
            raise ValueError('an event with a type needs data, "" at least')
        frame += _field("event", event)
    if retry is not None:
        if not isinstance(retry, int) or isinstance(retry, bool):
            raise TypeError(f"retry must be int, not {type(retry).__name__}")
        if retry < 0:  # Standard, 9.2.6: readers ignore all but ASCII digits.
            raise ValueError("retry must not be negative")
        frame += f"retry: {int.__repr__(retry)}\n"  # A subclass may have another str().
    if id is not None:
        frame += _field("id", id)
    if data is not None:
        frame += _field("data", data)
    if not frame:
        raise ValueError("an event needs at least one of data, event, id and retry")
    return (frame + "\n").encode()  # Standard, 9.2.5: always UTF-8.


def encode_comment(text: str = "") -> bytes:
    """Return `text` as comment lines, which readers ignore (standard, 9.2.6)."""
    return _field("", text).encode()


def _field(name: str, value: str | int) -> str:
    """Return one line of the frame for each line of `value`."""
    if name == "id" and isinstance(value, int) and not isinstance(value, bool):
        value = int.__repr__(value)
    if not isinstance(value, str):
        advice = "; json.dumps() turns other values into one" if name == "data" else ""
        kind = type(value).__name__
        raise TypeError(f"{name or 'text'} must be str, not {kind}{advice}")
    lines = _LINE_BREAK.split(value)
    if name in ("event", "id") and len(lines) > 1:  # It would be another field.
        raise ValueError(f"{name} must not contain a line break")
    # Standard, 9.2.6: readers ignore an ID with U+0000. And an ID comes back in a
    # header, where white space at its ends is lost.
    if name == "id" and ("\0" in value or value != value.strip(" \t")):
        raise ValueError("id must not contain NUL, nor white space at its ends")
    return "".join([name + ": " + line + "\n" for line in lines])


def _encode_chunk(frames: bytes) -> tuple[bytes, ...]:
    """Return `frames` as a chunk of an HTTP/1.1 body (RFC 9112, 7.1), in parts."""
    size = b"%x\r\n" % len(frames)
    if len(frames) < 2**17:  # noqa: PLR2004 - Larger ones are not copied.
        return (size + frames + b"\r\n",)
    return size, frames, b"\r\n"


_LAST_CHUNK = b"0\r\n\r\n"  # An empty chunk ends the body, so frames are never empty.


# --- 2. The I/O thread ------------------------------------------------------------
#
# On a plain http.server, whoever writes to a slow reader waits for it, and nobody
# notices that a reader has left. Here one thread waits for all sockets at once, with a
# selector. It is a small event loop that calls these methods of streams:
#   _on_ready(events)   when the socket can be read, or takes more
#   _check(now)         several times per second
#   _send_more()        after `schedule`; channels have this one, too


class _IOThread:
    """Waits for the sockets of all open streams. It runs while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards changes of these, and start and end
        self._thread: threading.Thread | None = None  # It runs, or it was the last one.
        self._is_running = False
        self._streams: set[Client] = set()
        self._scheduled: dict[Client | Channel, None] = {}  # in this order

    def add(self, stream: Client) -> None:
        """Begin to watch a stream. Raises OSError or RuntimeError if it cannot."""
        with self._lock:
            if not self._is_running:
                self._start()
            # epoll and kqueue see it at once, poll and select with the next check.
            self._selector.register(stream._socket, selectors.EVENT_READ, stream)
            self._streams.add(stream)

    def schedule(self, each: Client | Channel) -> None:
        """Have `each._send_more()` called soon. Any thread may call this."""
        with self._lock:
            if not self._is_running:  # All streams have ended.
                return
            if not self._scheduled:
                self._waker.send(b"\0")
            self._scheduled[each] = None

    def has_room(self) -> bool:
        """Tell whether one more stream can be watched; Windows selects from 512."""
        is_select = issubclass(selectors.DefaultSelector, selectors.SelectSelector)
        return not is_select or len(self._streams) < 500  # noqa: PLR2004

    def join(self, seconds: float) -> None:
        """Wait until the thread has ended, unless there are streams."""
        if self._thread is not None and not self._streams:
            self._thread.join(seconds)

    def _start(self) -> None:
        """Start the thread (locked). If that fails, the next stream tries again."""
        with contextlib.ExitStack() as opened:
            self._selector = opened.enter_context(selectors.DefaultSelector())
            # A self-pipe: a byte into one end wakes a selector that watches the other.
            self._waker, self._wakened = socket.socketpair()
            opened.enter_context(self._waker)
            opened.enter_context(self._wakened)
            self._selector.register(self._wakened, selectors.EVENT_READ)
            thread = threading.Thread(target=self._run, name="sse_ref I/O", daemon=True)
            thread.start()  # Its first step waits for the lock that we hold.
            self._thread, self._is_running = thread, True
            self._opened = opened.pop_all()

    def watch_for_writing(self, stream: Client, is_wanted: bool) -> None:
        """Choose whether `_on_ready` is called when the socket takes more, too."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if is_wanted else 0)
        self._selector.modify(stream._socket, events, stream)

    def remove(self, stream: Client) -> None:
        """Stop watching a stream. Its socket must not be closed before this."""
        self._selector.unregister(stream._socket)
        with self._lock:
            self._streams.remove(stream)

    def _run(self) -> None:
        next_check = 0.0
        while self._serve_scheduled():
            now = time.monotonic()
            if now >= next_check:
                next_check = now + 0.25  # seconds
                for stream in list(self._streams):
                    _attempt(stream, stream._check, now)
                    del stream  # A name that stays would keep it in memory.
            _attempt(None, self._wait, next_check - now if self._streams else 0)

    def _serve_scheduled(self) -> bool:
        """Have scheduled streams and channels send more; False if nothing is left."""
        with self._lock:
            scheduled, self._scheduled = self._scheduled, {}
            if not scheduled and not self._streams:
                # Under the lock, because the next stream may start another thread.
                self._is_running = False
                self._opened.close()
                return False
        for each in scheduled:
            _attempt(each, each._send_more)
        return True

    def _wait(self, seconds: float) -> None:
        for key, events in self._selector.select(seconds):
            if key.data is None:
                self._wakened.recv(4096)
            else:
                _attempt(key.data, key.data._on_ready, events)


_io_thread = _IOThread()


# --- 3. A stream ------------------------------------------------------------------
#
# A frame is an event or a comment, in bytes. What the kernel does not take at once
# waits in the backlog. A stream is in one of these states, and only moves on:

_PENDING = 0  # Nothing was sent, not even the head: the program may still refuse.
_OPEN = 1  # Any thread may send.
_CLOSING = 2  # No more can be sent. What was sent before is delivered.
_LOST = 3  # Nothing more can be delivered.
_ENDED = 4  # The I/O thread has sent a FIN or an RST, and let go of the socket.

#   close()   CLOSING. Any thread may call it. _end() follows when all is delivered.
#   _lose()   LOST. The peer has left, or is cut off for a reason. _end() follows.
#   _end()    ENDED. Only the I/O thread calls it. A FIN goes out; an RST if cut off.


class Client:
    """One event stream, as `on_connection` gets it. All threads may use it.

    `last_event_id`: of the last event that the reader had when it connected, or "".
    `path`, `query`, `headers`: from its request. The path is without percent-encoding,
    the query a dict of lists. `address`: of the peer. `state`: the program's own.
    """

    stall_timeout = 30.0  # seconds after which a reader that takes nothing is cut off

    def __init__(self, handler: SSERequestHandler, head: bytes, is_chunked: bool):
        self.address = handler.client_address
        self.headers = handler.headers
        path, _, query = _undo_latin_1(handler.path).partition("?")
        self.path = unquote(path)
        self.query = parse_qs(query, keep_blank_values=True)
        # Polyfills of EventSource that cannot set the header use the query.
        from_header = _undo_latin_1(self.headers.get("Last-Event-ID", ""))
        self.last_event_id = from_header or self.query.get("lastEventId", [""])[-1]
        self.state: Any = None

        self._server = handler.server
        self._socket = handler.connection
        self._own_thread = threading.get_ident()
        self._log_request: Callable[[int], object] | None = handler.log_request

        # Guards writing to the socket, and changes of what follows.
        self._lock = threading.Lock()
        # Wakes the request's own thread: a new state, or the kernel has taken bytes.
        self._changed = threading.Condition(self._lock)
        self._state = _PENDING
        self._head = head
        self._retry_line = self._server._retry_line  # It goes with the first frame.
        self._is_chunked = is_chunked  # until the last chunk; HTTP/1.0 has none
        self._backlog: list[memoryview] = []
        self._backlog_size = 0  # bytes
        self._taken = 0  # bytes that the kernel has taken so far
        self._last_progress = time.monotonic()  # when the kernel took bytes
        self._watches_writing = False  # whether _on_ready is called for writing, too
        self._received = 0  # bytes from the peer, which should send none
        self._reset_reason = ""
        self._callbacks: list[_Callback] = []
        # Its channel and its place in the log (chapter 4); once closed, its last place.
        self._channel: Channel | None = None
        self._place = 0
        self._last_place = 0.0

    @property
    def closed(self) -> bool:
        """True as soon as nothing more can be sent, whichever side has closed it."""
        return self._state >= _CLOSING

    def send(
        self,
        data: str | None = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
    ) -> None:
        """Send one event. The arguments and errors are those of `encode_event`.

        In the request's own thread this waits until the kernel has taken the event, so
        a loop there runs at its reader's pace. In other threads it never waits; if more
        than `max_backlog` bytes are waiting already, the stream is cut off. Raises
        BrokenPipeError if the stream is closed; let it pass out of `on_connection`.
        """
        self._send(encode_event(data, event=event, id=id, retry=retry))

    def comment(self, text: str = "") -> None:
        """Send `text` as a comment, which readers ignore; otherwise like `send`."""
        self._send(encode_comment(text))

    def _send(self, frames: bytes) -> None:
        is_own_thread = threading.get_ident() == self._own_thread
        with self._lock:
            self._raise_if(self.closed)
            if is_own_thread or self._backlog_size <= self._server.max_backlog:
                self._write(frames)
            else:
                self._lose("its backlog is over max_backlog")
            end = self._taken + self._backlog_size  # what the kernel then has taken
            if is_own_thread:
                self._changed.wait_for(
                    lambda: self._taken >= end or self._state >= _LOST
                )
            self._raise_if(self._state >= _LOST and self._taken < end)

    def _raise_if(self, is_closed: bool) -> None:
        if is_closed:
            raise BrokenPipeError(errno.EPIPE, "the event stream is closed")

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until the stream is closed, or `timeout` seconds; return `closed`.

        In another thread than the request's own this raises RuntimeError.
        """
        if threading.get_ident() != self._own_thread:
            raise RuntimeError("wait() is for the request's own thread")
        self._log_once()
        with self._lock:
            self._write_head()
            self._changed.wait_for(lambda: self.closed, timeout)
            return self.closed

    def close(self) -> None:
        """End the stream after all that was sent or published before. Never waits."""
        with self._lock:
            self._write_head()
            if not self.closed:
                self._enter(_CLOSING)
                if self._channel is not None:
                    self._last_place = self._channel._newest
            _io_thread.schedule(self)

    def on_close(self, callback: _Callback) -> None:
        """Call `callback(client)` after the end and after `on_connection` has returned.

        If the stream has ended already, it is called at once, in the calling thread.
        """
        with self._lock:
            if self._state < _ENDED:
                self._callbacks.append(callback)
                return
        callback(self)

    def _write_head(self) -> None:
        """Send a head that is pending; proxies wait for a first byte (locked)."""
        if self._state == _PENDING:
            self._write(b"" if self._retry_line else encode_comment("ok"))

    def _write(self, frames: bytes, chunk: tuple[bytes, ...] = ()) -> None:
        """Write `frames`; `chunk` is the same, if the caller has it (locked)."""
        if self._state == _PENDING:
            self._state = _OPEN
            frames, chunk = self._retry_line + frames, ()
        parts = (chunk or _encode_chunk(frames)) if self._is_chunked else (frames,)
        for part in parts:
            self._write_bytes(self._head + part)  # The head leaves in the same packet.
            self._head = b""

    def _write_bytes(self, data: bytes | memoryview) -> None:
        """Hand `data` to the kernel, what it does not take to the backlog (locked)."""
        taken = 0
        if not self._backlog:
            try:
                taken = self._socket.send(data)
                self._last_progress = time.monotonic()
            except OSError:  # It is full. Or lost, and the I/O thread will notice that.
                taken = 0
        self._taken += taken
        if taken == len(data):
            return
        rest = memoryview(data)[taken:]
        self._backlog_size += len(rest)
        if self._backlog and len(self._backlog[-1]) + len(rest) < 2**13:  # noqa: PLR2004
            # Each part costs memory and a system call, so small ones are joined.
            rest = memoryview(b"".join((self._backlog.pop(), rest)))
        self._backlog.append(rest)
        if not self._watches_writing:
            _io_thread.schedule(self)  # It goes on when the socket takes more.

    def _write_piece(self) -> bool:
        """Write the channel's next events; False if there are none yet (locked)."""
        if self._channel is None or self._backlog or self._state >= _LOST:
            return False
        piece = self._channel._next_piece(self)
        if piece is not None:
            self._write(piece.frames, piece.chunk)
        return piece is not None

    def _enter(self, state: int) -> None:
        self._state = state
        self._changed.notify_all()

    def _lose(self, reset_reason: str) -> None:
        """Give up what was not delivered (locked)."""
        if self._state < _LOST:
            self._reset_reason = reset_reason
            self._enter(_LOST)
            _io_thread.schedule(self)

    def _end(self) -> None:
        """Let go of the socket (locked, I/O thread)."""
        _io_thread.remove(self)
        if self._channel is not None:
            self._channel._remove(self)
            self._channel = None
        self._backlog.clear()
        self._watches_writing = False
        with contextlib.suppress(OSError):
            if self._reset_reason:
                # To linger for 0 seconds is to send an RST.
                linger = struct.pack("ii", 1, 0)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self._socket.close()
            else:
                self._socket.shutdown(socket.SHUT_WR)
        self._enter(_ENDED)

    def _send_more(self) -> None:
        """Send in this order: the backlog, a piece, the last chunk (I/O thread)."""
        with self._lock:
            if self._backlog and self._state < _LOST:
                backlog, self._backlog, self._backlog_size = self._backlog, [], 0
                for part in backlog:  # What is not taken forms the new backlog.
                    self._write_bytes(part)
                self._changed.notify_all()
            may_have_more = self._write_piece()
            is_at_end = self._state == _CLOSING and self._place >= self._last_place
            if is_at_end and not self._backlog and self._is_chunked:
                self._is_chunked = False
                self._write_bytes(_LAST_CHUNK)
            watches_writing = may_have_more or bool(self._backlog)
            if self._state == _LOST or (is_at_end and not watches_writing):
                self._end()
            elif self._state < _LOST and watches_writing != self._watches_writing:
                self._watches_writing = watches_writing
                _io_thread.watch_for_writing(self, watches_writing)

    def _offer(self, piece: _Piece) -> None:
        """Send a piece that is fanned out, by few calls if it is next (I/O thread)."""
        with self._lock:
            keeps_up = self._place == piece.begin and not self._backlog
            if keeps_up and self._state == _OPEN:
                self._place = piece.end
                self._write(piece.frames, piece.chunk)
                return
        if not self._watches_writing:
            self._send_more()

    def _on_ready(self, events: int) -> None:
        """Read and send, as the socket is ready for it (I/O thread)."""
        if events & selectors.EVENT_READ:
            with self._lock:
                self._read()
        if events & selectors.EVENT_WRITE:
            self._send_more()

    def _read(self) -> None:
        """Notice that the peer has left, or sends too much (locked)."""
        try:
            received = len(self._socket.recv(4096))
        except BlockingIOError:
            return
        except OSError:
            received = 0
        self._received += received
        if not received or self._received > 2**16:  # noqa: PLR2004
            self._lose("it does not stop sending" if received else "")

    def _check(self, now: float) -> None:
        """Send a keep-alive comment, or cut the stream off, when due (I/O thread)."""
        with self._lock:
            idle = now - self._last_progress
            if self._watches_writing and idle >= self.stall_timeout:
                self._lose("it has stopped reading")
            elif not self._watches_writing and idle >= (self._server.keepalive or inf):
                if self._state == _OPEN:
                    self._write(encode_comment("keep-alive"))
                self._write_head()
        if self._watches_writing:
            # Linux calls a socket writable only when a third of its buffer is free.
            self._send_more()

    def _cut_off(self, reset_reason: str) -> None:
        with self._lock:
            self._lose(reset_reason)

    def _wait_for_end(self, timeout: float | None = None) -> None:
        with self._lock:
            self._changed.wait_for(lambda: self._state == _ENDED, timeout)

    def _refuse(self, answer: bytes) -> bool:
        """Send `answer` instead of a stream; False if it is too late for that."""
        with self._lock:
            if self._state != _PENDING:
                return False
            self._enter(_CLOSING)  # No other thread may add to the answer.
            self._head, self._is_chunked = answer, False
            self._write(b"")
            return True

    def _finish(self) -> None:
        """Close, sleep until the stream has ended, and run the on_close callbacks."""
        self.close()
        self._log_once()
        self._wait_for_end()
        while self._callbacks:
            _attempt(None, self._callbacks.pop(0), self)
        if self._reset_reason:
            _report(
                logging.WARNING, "%s: cut off, %s", self.address, self._reset_reason
            )

    def _log_once(self, status: int = HTTPStatus.OK) -> None:
        """Log the request, now that it is refused, or cannot be any more."""
        if self._log_request is not None:
            _attempt(None, self._log_request, status)
        self._log_request = None


# --- 4. A channel -----------------------------------------------------------------
#
# Published events are numbered, and the newest ones are kept in a log. A subscription
# is a place in it: the number of the last event that its client was sent. A slow reader
# and one that comes back are the same: their place is behind, and the I/O thread sends
# them the events after it, piece by piece, as they take them.
#
#        _floor                                  _fanned_out        _newest
#   -------+----------------+---------------------------+--------------+
#    dropped     place of a slow reader     place of all others    just published


class _Event(NamedTuple):
    id: str
    frame: bytes


class _Piece(NamedTuple):  # events to be sent at once: those after begin up to end
    begin: int
    end: int
    frames: bytes
    chunk: tuple[bytes, ...]  # the same, as _encode_chunk() returns it


class Channel:
    """Events for all subscribers. Clients that reconnect get what they have missed.

    The newest `history` events are kept, at least 1. A client that needs older ones
    gets an event of the type "gap", and then all that is kept. The data of the gap is
    the last event ID of a client that comes back, and empty for one that fell behind.
    """

    def __init__(self, history: int = 1000) -> None:
        if history < 1:
            raise ValueError("history must be at least 1")
        self._history = history
        self._epoch = secrets.token_hex(4)  # IDs of an earlier start are not ours.

        self._lock = threading.Lock()  # guards changes of what follows
        # Wakes publish(): the I/O thread has moved on.
        self._changed = threading.Condition(self._lock)
        # By number: the events that are kept, and the last one before them, for its ID.
        # A client with that ID has missed nothing. At first that is number 0.
        self._log = {0: _Event(f"{self._epoch}-0", b"")}
        self._numbers = {self._log[0].id: 0}  # by ID
        self._newest = 0
        self._floor = 0  # the place before all events that are kept
        self._fanned_out = 0  # the newest event that clients may be sent
        self._clients: dict[Client, None] = {}  # in the order of joining
        self._closed = False
        self._ends_streams = False

    @property
    def clients(self) -> frozenset[Client]:
        """The open streams that are subscribed at this moment."""
        return frozenset(each for each in list(self._clients) if not each.closed)

    def __contains__(self, id_: str | int) -> bool:
        """Tell whether a client with that last event ID can resume."""
        return str(id_) in self._numbers

    def publish(
        self,
        data: str | None = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
    ) -> str:
        """Send an event to all subscribers and return its ID.

        The arguments and errors are those of `encode_event`; the default is a new ID.
        This waits for no reader, only while the I/O thread is `history` events behind.
        Raises RuntimeError if the channel is closed.
        """
        with self._lock:
            self._changed.wait_for(
                lambda: self._newest - self._fanned_out < self._history or self._closed
            )
            if self._closed:
                raise RuntimeError("the channel is closed")
            number = self._newest + 1
            id = f"{self._epoch}-{number}" if id is None and data is not None else id
            frame = encode_event(data, event=event, id=id)
            sent_id = _field("id", id)[4:-1]  # type: ignore[arg-type]
            kept_id = sent_id or f"{self._epoch}-{number}"  # Who could resume from ""?
            self._log[number] = _Event(kept_id, frame)
            self._numbers[kept_id] = number
            self._newest = number
            self._floor = max(number - self._history, 0)
            dropped = self._log.pop(self._floor - 1, None)
            # The program may have given its ID to a later event, too.
            if dropped and self._numbers.get(dropped.id) == self._floor - 1:
                del self._numbers[dropped.id]
            if self._clients:
                _io_thread.schedule(self)
            else:
                self._fanned_out = number
            return sent_id

    def subscribe(
        self, client: Client, *, after: str | int | None = None, last: float = 0
    ) -> None:
        """Send `client` what it has missed, and then everything that is published.

        It has missed what came after its last event ID, or after the ID `after`. A
        client without an ID gets the newest `last` events (math.inf: all that are
        kept). Raises BrokenPipeError if the stream is closed, ValueError if it is
        subscribed to a channel already or `last` is negative.
        """
        if not last >= 0:
            raise ValueError("last must not be negative")
        last_id = client.last_event_id if after is None else str(after)
        gap = encode_event(last_id, event="gap")
        with client._lock:
            client._raise_if(client.closed)
            if client._channel is not None:
                raise ValueError("the client is subscribed to a channel already")
            with self._lock:
                first = b""
                if not last_id:
                    place = int(max(self._newest - last, self._floor))
                elif last_id in self._numbers:
                    place = self._numbers[last_id]
                else:
                    place, first = self._floor, gap
                if place == self._newest:
                    # No event follows. The ID alone is for its reconnect (9.2.6).
                    first += encode_event(id=self._log[place].id)
                client._channel, client._place, client._last_place = self, place, inf
                self._clients[client] = None
            if first:
                client._write(first)
            if client._write_piece():
                _io_thread.schedule(client)
            client._write_head()
        if self._ends_streams:
            client.close()

    def close(self, end_streams: bool = False) -> None:
        """Publish no more. With `end_streams`, all streams end after the last event."""
        with self._lock:
            self._closed = True
            self._ends_streams = self._ends_streams or end_streams
            self._changed.notify_all()
        if end_streams:
            for client in self.clients:
                client.close()

    def _next_piece(self, client: Client) -> _Piece | None:
        """Return the next events for `client`, if any, and move its place past them."""
        with self._lock:
            end = min(self._fanned_out, client._last_place)
            if client._place >= end:
                return None
            piece = self._piece_after(client._place, end)
        client._place = piece.end
        return piece

    def _piece_after(self, place: int, end: float) -> _Piece:
        """Return what a client at `place`, which is below `end`, gets next (locked)."""
        begin, frames, size = place, [], 0
        if place < self._floor:  # The events after its place are gone.
            place, frames = self._floor, [encode_event("", event="gap")]
        while place < end:
            frame = self._log[place + 1].frame
            size += len(frame)
            if size > max(len(frame), 2**18):  # One event may be larger.
                break
            frames.append(frame)
            place += 1
        joined = b"".join(frames)  # A single one is not copied.
        return _Piece(begin, place, joined, _encode_chunk(joined))

    def _remove(self, client: Client) -> None:
        with self._lock:
            del self._clients[client]
            if not self._clients:
                self._fanned_out = self._newest
                self._changed.notify_all()

    def _send_more(self) -> None:
        """Send the next piece to all clients that keep up (I/O thread)."""
        with self._lock:
            if self._fanned_out == self._newest:
                return
            piece = self._piece_after(self._fanned_out, self._newest)
            self._fanned_out = piece.end
            clients = list(self._clients)
            self._changed.notify_all()
        for client in clients:
            _attempt(client, client._offer, piece)
        if piece.end < self._newest:
            _io_thread.schedule(self)


# --- 5. A request -----------------------------------------------------------------
#
# http.server reads heads with the parser for e-mail, which is neither strict nor safe.

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
# RFC 9112, 3 and 5. A line may end in LF alone (2.2).
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~\x80-\xff]+) (HTTP/1\.[0-9])\r?\n")
_FIELD_LINE = re.compile(rf"({_TOKEN}):([^\0\r\n\u0100-\U0010ffff]*)\r?\n")
_MAX_HEAD_SIZE = 2**15  # bytes
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # RFC 9110, 9.2.1
_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",  # Some assume Latin-1.
    "Cache-Control": "no-cache, no-transform",  # Compressing would delay events.
    "X-Accel-Buffering": "no",  # nginx must not wait for more.
}


class Refusal(Exception):
    """Raise this to answer a request with another status, from 200 to 599.

    It may be raised in any method of a handler, and in `on_connection` before anything
    is sent. Status 204 tells an EventSource not to come back (standard, 9.2.3).
    """

    def __init__(self, status: int, text: str = "", headers: _Headers | None = None):
        if status not in range(200, 600):
            raise ValueError(f"status must be from 200 to 599, not {status!r}")
        for each in (headers or {}).items():
            _check_header(*each)
        phrase, _ = BaseHTTPRequestHandler.responses.get(status, ("Refused", ""))
        super().__init__(status, text or f"{phrase}\n", headers or {})


def _check_header(name: str, value: object) -> None:
    """Raise ValueError if this is not one Latin-1 header (the space exposes a CR)."""
    if not _FIELD_LINE.fullmatch(f"{name}: {value} \n"):
        raise ValueError(f"not a header: {name!r}: {value!r}")


def _undo_latin_1(text: str) -> str:
    """Return text that was sent as UTF-8 and read as Latin-1 (standard, 9.2.4)."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


class _Sink(io.BufferedIOBase):  # for what must not be sent
    def write(self, data: Any) -> int:
        return len(data)


class SSERequestHandler(BaseHTTPRequestHandler):
    """Answers a GET of the server's path with an event stream, other GETs with "okay".

    For pages of your own, override `serve_plain`. To answer other requests, define
    `do_POST` and the like, and call `read_body` and `serve_stream` there. All of them
    run in the request's own thread, and may raise Refusal.
    """

    server: SSEServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # An event must not wait for the one before it.
    _write_timeout = 30.0  # seconds for one write; reading has deadlines
    wbufsize = 0  # What a handler writes leaves at once.
    _is_answered = False
    _may_have_input = True  # that is not read yet

    def do_GET(self) -> None:
        """Serve the event stream on the server's path, `serve_plain()` elsewhere."""
        path = unquote(_undo_latin_1(self.path).partition("?")[0])
        if fnmatch.fnmatchcase(path, self.server.path):
            self.serve_stream()
        else:
            self.serve_plain()

    def do_HEAD(self) -> None:
        """Answer with the head alone; a stream's on_connection is not called."""
        self.do_GET()

    def do_OPTIONS(self) -> None:
        """Say which methods there are, and what other pages may send (Fetch, 3.2)."""
        headers = {"Allow": self._allowed_methods()}
        if _cors_origin(self):
            asked = self.headers.get("Access-Control-Request-Headers", "")
            headers["Access-Control-Allow-Methods"] = headers["Allow"]
            headers["Access-Control-Allow-Headers"] = asked
            headers["Access-Control-Max-Age"] = "600"
        self._answer(HTTPStatus.NO_CONTENT, "", headers)

    def serve_plain(self) -> None:
        """Answer a GET or HEAD that is not for the event stream; override this."""
        accept = self.headers.get("Accept", "")
        if "text/event-stream" in accept and "text/html" not in accept:
            # There is no stream here. After "okay" a client of MCP would ask again.
            raise Refusal(405, "", {"Allow": self._allowed_methods()})
        self._answer(HTTPStatus.OK, "okay", {})

    def _allowed_methods(self) -> str:
        return ", ".join(name[3:] for name in dir(self) if name.startswith("do_"))

    def serve_stream(
        self, on_connection: _Callback | None = None, headers: _Headers | None = None
    ) -> None:
        """Answer this request with an event stream, and hold it until it ends.

        `on_connection` is by default that of the server. `headers` are sent in addition
        to ours. Raises Refusal if the client does not get in.
        """
        _check_origin(self)
        if hasattr(self.connection, "do_handshake"):
            raise TypeError("a stream needs a plain socket; let a proxy do TLS")
        is_chunked = "HTTP/1.0" not in (self.request_version, self.protocol_version)
        is_refused = self._slot.is_surplus or self.server._is_closing
        has_room = _io_thread.has_room() and not is_refused
        if not has_room and self.command not in _SAFE_METHODS:
            raise Refusal(503, "", {"Retry-After": "5"})
        fields = {**(headers or {}), **_STREAM_HEADERS}
        if is_chunked:  # Without chunks urllib3 waits until its buffer is full.
            fields["Transfer-Encoding"] = "chunked"
        head = self._build_head(HTTPStatus.OK, fields)
        if has_room and self.command != "HEAD":
            on_connection = on_connection or self.server.on_connection
            self._hold_stream(Client(self, head, is_chunked), on_connection)
            return
        _attempt(None, self.log_request, HTTPStatus.OK)
        self._is_answered = True
        self.wfile.write(head)
        if self.command != "HEAD":
            # An EventSource comes back after the end of a stream, but not after 503.
            frames = encode_event(retry=5000)
            whole = b"".join([*_encode_chunk(frames), _LAST_CHUNK])
            self.wfile.write(whole if is_chunked else frames)

    def _hold_stream(self, client: Client, on_connection: _Callback | None) -> None:
        """Run the program's part, then sleep until the stream has ended."""
        self.connection.setblocking(False)
        # Linux takes a peer for lost that takes nothing for 30 s, not some 15 minutes.
        with contextlib.suppress(AttributeError, OSError):
            self.connection.setsockopt(socket.SOL_TCP, socket.TCP_USER_TIMEOUT, 30_000)
        _io_thread.add(client)
        self._is_answered = True
        self._slot.client = client
        if self.server._is_closing:  # server_close() may have missed this client.
            client.close()
        # The client reads and writes from now on. An open file would defer its RST.
        self.rfile.close()
        self.rfile = self.wfile = _Sink()
        try:
            result = on_connection(client) if on_connection else None
            if isinstance(result, (Awaitable, Generator, AsyncGenerator)):
                if isinstance(result, (Coroutine, Generator)):
                    result.close()  # A coroutine would warn that it was not awaited.
                raise TypeError("on_connection must be a plain function")
            client.wait()
        except Refusal as refusal:
            if client._refuse(self._build_text(*refusal.args)):
                client._log_once(refusal.args[0])
            elif not client.closed:
                _report(logging.ERROR, "%s: too late for %r", client.address, refusal)
        except Exception as error:
            if not (isinstance(error, BrokenPipeError) and client.closed):
                # The stream ends in good order: after 500 no EventSource comes back.
                _report(logging.ERROR, "%s: on_connection failed", client.address)
        finally:
            client._finish()
            self._may_have_input |= client._received > 0

    def read_body(self, max_size: int = 2**20) -> bytes:
        """Return the whole body of the request; b"" if there is none.

        Raises Refusal: 411 if it is chunked, 400 if its length is not one number, or if
        it ends early or is late, 413 if it is over `max_size` bytes.
        """
        if "Transfer-Encoding" in self.headers:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED)
        length, *others = set(self.headers.get_all("Content-Length", ["0"]))
        if others or not re.fullmatch("[0-9]+", length):
            raise Refusal(HTTPStatus.BAD_REQUEST, "Content-Length is not one number\n")
        length = length.lstrip("0") or "0"
        # int() is not for a number of 30,000 digits.
        if len(length) > 18 or int(length) > max_size:  # noqa: PLR2004
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if self._slot.client is not None:
            raise RuntimeError("read_body() must come before serve_stream()")
        self.connection.settimeout(self.server.body_timeout + 1)  # if nobody looks
        self._slot.deadline = time.monotonic() + self.server.body_timeout
        body = self.rfile.read(int(length))
        self._slot.deadline = inf
        self.connection.settimeout(self._write_timeout)
        if len(body) < int(length):
            raise Refusal(HTTPStatus.BAD_REQUEST, "the body is not complete\n")
        self._may_have_input = False
        return body

    def _build_head(self, status: int, headers: _Headers) -> bytes:
        """Return a head, without sending it."""
        head = io.BytesIO()
        before = self.wfile, self._is_answered
        self.wfile = head
        self._headers_buffer: list[bytes] = []  # A head that has begun is dropped.
        try:
            self.send_response_only(status)
            self.send_header("Server", self.version_string())
            self.send_header("Date", self.date_time_string())
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
        finally:
            self.wfile, self._is_answered = before
        return head.getvalue()

    def _build_text(self, status: int, text: str, headers: _Headers) -> bytes:
        """Return an answer that is a short text."""
        fields = {"Cache-Control": "no-store", **headers}
        body = b"" if status in (204, 205, 304) else text.encode(errors="replace")
        if body:
            fields["Content-Type"] = "text/plain; charset=utf-8"
            fields["Content-Length"] = str(len(body))
        head = self._build_head(status, fields)
        return head if self.command == "HEAD" else head + body

    def _answer(self, status: int, text: str, headers: _Headers) -> None:
        answer = self._build_text(status, text, headers)
        _attempt(None, self.log_request, status)
        self._is_answered = True
        self.wfile.write(answer)

    # These override methods of http.server, and say what would go wrong without them.

    def handle(self) -> None:
        """Read a head and answer it; otherwise an exception would get no answer."""
        self._slot = self.server._slots[self.request]
        self.command = self.requestline = ""
        self.request_version, self.headers = self.protocol_version, HTTPMessage()
        try:
            self.raw_requestline = self.rfile.readline(_MAX_HEAD_SIZE + 1)
            if self.raw_requestline and self.parse_request():
                method = getattr(self, "do_" + self.command, None)
                if method is None:
                    raise Refusal(HTTPStatus.NOT_IMPLEMENTED)
                method()
        except Refusal as refusal:
            self._answer_refusal(refusal)
        except Exception as error:
            # A lost connection is no fault of ours, and needs no traceback.
            is_lost = isinstance(error, ConnectionError)
            level = logging.WARNING if is_lost else logging.ERROR
            _report(level, "%s: the request failed: %r", self.client_address, error)
            self._answer_refusal(Refusal(HTTPStatus.INTERNAL_SERVER_ERROR))

    def _answer_refusal(self, refusal: Refusal) -> None:
        if not self._is_answered:
            with contextlib.suppress(OSError):  # The peer has left.
                self.connection.settimeout(self._write_timeout)
                self._answer(*refusal.args)

    def parse_request(self) -> bool:
        """Read the head, strictly, and check who is asking."""
        line = self.raw_requestline.decode("latin-1")
        self.requestline = line.rstrip("\r\n")
        if len(line) > _MAX_HEAD_SIZE:
            raise Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        words = _REQUEST_LINE.fullmatch(line)
        if words is None:
            raise Refusal(HTTPStatus.BAD_REQUEST, "malformed request line\n")
        self.command, path, self.request_version = words.groups()
        # As in http.server: a redirect to //evil would lead to another host.
        self.path = re.sub("^//+", "/", path)
        self._read_fields(_MAX_HEAD_SIZE - len(line))
        self._slot.deadline = inf
        self.connection.settimeout(self._write_timeout)
        fields = self.headers
        self._may_have_input = (
            "Content-Length" in fields or "Transfer-Encoding" in fields
        )
        _check_host(self)
        if self.command not in _SAFE_METHODS:
            _check_origin(self)
        is_waiting = fields.get("Expect", "").lower() == "100-continue"
        if is_waiting and self.request_version != "HTTP/1.0":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _read_fields(self, room: int) -> None:
        while (line := self.rfile.readline(room + 1)) not in (b"\r\n", b"\n"):
            room -= len(line)
            if room < 0:
                raise Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            field = _FIELD_LINE.fullmatch(line.decode("latin-1"))
            if field is None:  # Or the input has ended.
                raise Refusal(HTTPStatus.BAD_REQUEST, "malformed header line\n")
            # This adds a field, even if there is one of that name already.
            self.headers[field[1]] = field[2].strip(" \t")

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request; otherwise a program without standard error would fail."""
        text = re.sub(r"[^ -~]", lambda each: ascii(each[0])[1:-1], format % args)
        _report(logging.INFO, "%s %s", self.address_string(), text)

    def send_header(self, keyword: str, value: str) -> None:
        """Add a header; otherwise a line break would make it two."""
        _check_header(keyword, value)
        super().send_header(keyword, value)

    def end_headers(self) -> None:
        """Send the head; otherwise it would lack Connection and CORS."""
        self.send_header("Connection", "close")
        _send_cors_headers(self)
        super().end_headers()
        self._is_answered = True
        if self.command == "HEAD":  # It gets no body.
            self.wfile = _Sink()

    def finish(self) -> None:
        """Close in stages (RFC 9112, 9.6); otherwise an answer may be lost."""
        # Unread input would cause an RST, so send a FIN, and read up to the peer's.
        super().finish()
        if not self._may_have_input:
            return
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            self._slot.deadline = time.monotonic() + 1
            while self.connection.recv(2**16):
                pass


# --- 6. Who gets in ---------------------------------------------------------------
#
# A web page from anywhere can send requests to this server, if somebody who can reach
# it has opened that page. A browser says in two headers where a request comes from.

_NAME = r"\[[0-9a-f:.]+\]|[a-z0-9._-]+"
_HOST = re.compile(rf"({_NAME})(:[0-9]*)?")
# RFC 6454, 6.2. Packaged apps send "file://".
_ORIGIN = re.compile(rf"file://|[a-z][a-z0-9+.-]*://(({_NAME})(:[1-9][0-9]*)?)")
_HOSTS = rf"\*|{_NAME}|[0-9a-f]*:[0-9a-f]*:[0-9a-f:.]*"
_ORIGINS = rf"\*|null|{_ORIGIN.pattern}"


def _entries(option: str, pattern: str, entries: Iterable[str]) -> set[str]:
    """Return what an option lists, in lower case. Raises ValueError or TypeError."""
    if isinstance(entries, str):
        raise TypeError(f"{option} must be a list, not one str")
    entries = list(entries)
    for entry in entries:
        if not (entry.isascii() and re.fullmatch(pattern, entry.lower())):
            raise ValueError(f"{option}: no browser sends {entry!r}")
    return {entry.lower() for entry in entries}


def _check_host(handler: SSERequestHandler) -> None:
    """Refuse a request whose Host is not ours."""
    # A page could point its own host name at 127.0.0.1, to be of the same origin.
    hosts = handler.headers.get_all("Host", [])
    if len(hosts) != 1 and (hosts or handler.request_version != "HTTP/1.0"):
        raise Refusal(HTTPStatus.BAD_REQUEST, "one Host is needed\n")  # RFC 9112, 3.2
    if not hosts:
        return
    allowed = handler.server.allowed_hosts
    match = _HOST.fullmatch(hosts[0].lower())
    name = re.sub(r"\.$", "", match[1]) if match else ""
    is_local = name == "localhost" or name.endswith(".localhost")
    if is_local or name in allowed or "*" in allowed:
        return
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name.strip("[]"))
        return  # No page can have this as its name.
    # On a network a machine may have many names, and we cannot know them.
    address = handler.connection.getsockname()[0]
    if allowed or address.startswith(("127.", "::1", "::ffff:127.")):
        reason = f"Host {hosts[0]!a} is not in allowed_hosts (--allow-host)\n"
        raise Refusal(HTTPStatus.FORBIDDEN, reason)


def _check_origin(handler: SSERequestHandler) -> None:
    """Refuse a request from a page of another origin, unless that is allowed."""
    origin = handler.headers.get("Origin")
    site = handler.headers.get("Sec-Fetch-Site")
    is_own = origin is None
    if site is not None:  # Fetch Metadata: the browser itself compares the origins.
        is_own = site in ("same-origin", "none")
    elif origin is not None:
        # The scheme does not matter: a proxy in front of us may speak TLS.
        match = _ORIGIN.fullmatch(origin.lower())
        is_own = bool(match and match[1] == handler.headers.get("Host", "").lower())
    if not is_own and not _cors_origin(handler):
        reason = f"Origin {origin!a} is not in allowed_origins (--allow-origin)\n"
        raise Refusal(HTTPStatus.FORBIDDEN, reason)


def _cors_origin(handler: SSERequestHandler) -> str:
    """Return the origin as which a page may read answers, "" if it may not."""
    origin = handler.headers.get("Origin", "").lower()
    allowed = handler.server.allowed_origins
    if origin in allowed and origin != "*":
        return handler.headers["Origin"]
    is_any = origin == "null" or _ORIGIN.fullmatch(origin)
    return "*" if is_any and "*" in allowed else ""


def _send_cors_headers(handler: SSERequestHandler) -> None:
    """Let a page of an allowed origin read the answer (Fetch, 3.2)."""
    origin = _cors_origin(handler)
    if handler.server.allowed_origins:
        handler.send_header("Vary", "Origin")
    if origin:
        handler.send_header("Access-Control-Allow-Origin", origin)
    if origin not in ("", "*", "null"):  # Unknown pages get no cookies.
        handler.send_header("Access-Control-Allow-Credentials", "true")


# --- 7. The server ----------------------------------------------------------------


@dataclasses.dataclass
class _Slot:  # what the server knows about a request
    thread: threading.Thread
    is_surplus: bool  # It gets no stream.
    deadline: float  # at which its input ends
    client: Client | None = None


class SSEServer(ThreadingHTTPServer):
    """An HTTP server that holds event streams open, each in its request's own thread.

    `server_address`: host and port, IPv4 or IPv6; port 0 picks a free one.
    `on_connection`: called with each new `Client`, in the request's own thread. The
    stream stays open after it returns, and ends if it raises an exception.
    `path`: where the stream is; `*` stands for any characters (see fnmatch).
    `keepalive`: seconds of silence before a comment is sent; None: never.
    `retry`: the reconnection time that clients are told, in milliseconds.
    `max_connections`: requests and streams; further clients are told to come back.
    `max_backlog`: bytes that may wait for a slow reader when another thread sends more.
    `allowed_hosts`: names by which browsers may reach the server besides localhost, or
    `"*"`. If you give any, other names get 403, else only on loopback addresses.
    `allowed_origins`: of other pages that may read streams and send requests, such as
    `"https://app.example"`. `"*"` allows all pages, but without cookies.
    Raises ValueError or TypeError for a mistake in these, OSError if it cannot listen.
    """

    # With the 5 of http.server, many at once would have to try again a second later.
    request_queue_size = 65535
    allow_reuse_address = os.name == "posix"  # Windows would share the port.
    head_timeout = 10.0  # seconds in which the head of a request must come
    body_timeout = 30.0  # seconds in which its body must come
    closing_grace = 1.0  # seconds that server_close() gives readers, and then requests
    _is_closing = False
    _next_look = 0.0  # at late requests

    def __init__(  # noqa: PLR0913
        self,
        server_address: tuple[str, int],
        on_connection: _Callback | None = None,
        *,
        path: str = "/sse",
        keepalive: float | None = 15.0,
        retry: int | None = None,
        max_connections: int = 1000,
        max_backlog: int = 2**20,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        RequestHandlerClass: Callable[..., SSERequestHandler] = SSERequestHandler,
    ) -> None:
        _check_options(on_connection, RequestHandlerClass, keepalive)
        self.on_connection: _Callback | None = on_connection
        self.path = path
        self.keepalive = keepalive
        # Without its blank line it becomes part of the first event.
        self._retry_line = b"" if retry is None else encode_event(retry=retry)[:-1]
        self.max_connections = max_connections
        self.max_backlog = max_backlog
        self.allowed_hosts = _entries("allowed_hosts", _HOSTS, allowed_hosts)
        self.allowed_origins = _entries("allowed_origins", _ORIGINS, allowed_origins)
        self._slots: dict[socket.socket, _Slot] = {}
        # If a name has addresses of both families, take IPv4.
        host, port = server_address[:2]
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)
        found.sort(key=lambda info: info[0] != socket.AF_INET)
        self.address_family, *_, address = found[0]
        bindable: Any = (address[0], port, *address[2:])  # `address` has port % 65536.
        super().__init__(bindable, RequestHandlerClass)

    @property
    def clients(self) -> frozenset[Client]:
        """The streams that are open: not those that may still be refused."""
        clients = [slot.client for slot in list(self._slots.values())]
        return frozenset(each for each in clients if each and each._state == _OPEN)

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, then end every stream (main thread only)."""
        previous = _shut_down_by_signals(self)
        try:
            with self:
                self.serve_forever(poll_interval=0.1)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def server_close(self) -> None:
        """End every stream in good order, cut off slow ones, await the threads."""
        super().server_close()
        self._is_closing = True
        slots = list(self._slots.values())
        self._end_late_input(inf)
        clients = [slot.client for slot in slots if slot.client is not None]
        for client in clients:
            client.close()
        deadline = time.monotonic() + self.closing_grace
        for client in clients:
            client._wait_for_end(deadline - time.monotonic())
            client._cut_off("the server is closing")
        deadline = time.monotonic() + self.closing_grace
        for thread in [slot.thread for slot in slots]:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0))
        _io_thread.join(self.closing_grace)

    def server_bind(self) -> None:
        """Bind. HTTPServer would also look up the host's name, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore

    def service_actions(self) -> None:
        """End the input of requests that are late; `serve_forever` calls this often."""
        # A time-out for each read does not help: a peer may send one byte at a time.
        now = time.monotonic()
        if now >= self._next_look:  # To look at each accept would be quadratic.
            self._next_look = now + 0.2
            self._end_late_input(now)

    def _end_late_input(self, now: float) -> None:
        for connection, slot in list(self._slots.items()):
            if slot.deadline < now:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection. If there is no descriptor for it, pause a moment."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                _report(logging.WARNING, "no new connections for now: %r", error)
                time.sleep(0.2)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the request, at most 64 beyond max_connections."""
        if len(self._slots) >= self.max_connections + 64:
            self.shutdown_request(request)
            return
        target, arguments = self.process_request_thread, (request, client_address)
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        deadline = time.monotonic() + self.head_timeout
        # Decided on arrival: later, each one of a crowd would see too many others.
        is_surplus = len(self._slots) >= self.max_connections
        self._slots[request] = _Slot(thread, is_surplus, deadline)
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection, and close it."""
        self._slots.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong before or after a request."""
        if not isinstance(sys.exc_info()[1], OSError):  # That is a lost connection.
            _report(logging.ERROR, "%s: the connection failed", client_address)


def _check_options(function: Any, handler: Any, keepalive: Any) -> None:
    if isinstance(function, type) and issubclass(function, BaseHTTPRequestHandler):
        raise TypeError("a handler class goes into RequestHandlerClass=")
    if isinstance(handler, type):  # It may be a functools.partial, too.
        owners = [each for each in handler.__mro__ if "do_GET" in vars(each)]
        if not owners or not issubclass(owners[0], SSERequestHandler):
            raise TypeError("a handler class needs SSERequestHandler as its first base")
    if keepalive is not None and not keepalive > 0:
        raise ValueError("keepalive must be more than 0, or None")


def _shut_down_by_signals(server: SSEServer) -> dict[int, Any]:
    """Have SIGINT and SIGTERM call `server.shutdown()`; return the old handlers."""
    begun: list[int] = []

    def stop(*_: object) -> None:
        # shutdown() waits for serve_forever(), and this may have interrupted
        # Thread.start(). A second thread that begins at exit could crash Python.
        if not begun:
            begun.append(_thread.start_new_thread(server.shutdown, ()))

    return {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}


# --- 8. The command line ----------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the server from the command line, until SIGINT or SIGTERM."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    source = options.pop("source")
    address = options.pop("host"), options.pop("port")
    options["keepalive"] = options["keepalive"] or None
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no limit.
        import resource  # noqa: PLC0415

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = min(options["max_connections"] + 128, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    lines = Channel(history=10_000)
    serve: _Callback = lines.subscribe if source else lambda c: c.send("hi there!")
    try:
        server = SSEServer(address, serve, **options)
    except (OSError, OverflowError, ValueError) as error:
        parser.error(str(error))
    previous = _shut_down_by_signals(server)
    with server:
        host, port = server.server_name, server.server_port
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        hint = f"  curl {url}\n  curl -N {url}{server.path}"
        print(f"Starting server... {url}\n{hint}", flush=True)
        if source and sys.stdin:
            threading.Thread(target=_publish_lines, args=(lines,), daemon=True).start()
        server.serve_forever(poll_interval=0.1)
        lines.close()
    # One more signal must not kill the process before it has ended by itself.
    for number in previous:
        signal.signal(number, signal.SIG_IGN)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sse_ref", description="Serve an event stream.")
    add = parser.add_argument
    hosts: dict[str, Any] = {"action": "append", "default": [], "dest": "allowed_hosts"}
    origins = {**hosts, "dest": "allowed_origins"}
    add("source", nargs="?", choices=["-"], help="publish lines of standard input")
    add("--host", default="127.0.0.1", help="address to listen on: %(default)s")
    add("--port", type=int, default=8080, help="%(default)s; 0 picks one")
    add("--path", default="/sse", help="%(default)s; * is any characters")
    add("--keepalive", type=float, default=15, metavar="S", help="%(default)s; 0: none")
    add("--retry", type=int, metavar="MS", help="reconnection time, milliseconds")
    add("--max-connections", type=int, default=1000, metavar="N", help="%(default)s")
    add("--allow-origin", **origins, metavar="O", help="https://app.example, say, or *")
    add("--allow-host", **hosts, metavar="H", help="a name without a port, or *")
    return parser


def _publish_lines(channel: Channel) -> None:
    """Publish each line of standard input as soon as it is there, until its end."""
    # Not sys.stdin: a thread that is inside it at exit would abort the process.
    with contextlib.suppress(OSError, RuntimeError), os.fdopen(os.dup(0), "rb") as file:
        for line in file:
            channel.publish(line.decode(errors="replace").rstrip("\r\n"))


if __name__ == "__main__":
    main()
