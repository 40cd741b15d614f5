# SPDX-License-Identifier: 0BSD
"""Server-sent events on Python's own http.server: a reference to run, paste and read.

    python sse_ref.py
    curl http://localhost:8080            # prints "okay"; the server closes
    curl -N http://localhost:8080/sse     # prints "data: hi there!"; and stays

An event stream is an HTTP response that does not end. The server answers a GET with
`Content-Type: text/event-stream`, keeps the connection, and writes a frame of text
whenever it has something to say. A browser reads it with `new EventSource(url)`, and
connects again by itself when it ends, naming the last event it has seen.

The text below has five chapters, each resting only on those above it:

    1. The frame        what an event looks like on the wire
    2. One stream       Client: one open response, and the thread that holds it
    3. Many streams     Channel: one publish for all, and nothing lost on a reconnect
    4. HTTP             SSERequestHandler: what a request is answered
    5. The server       SSEServer: who is connected, how it ends; the command line

Each request has a thread of its own, as in http.server; it sleeps while its stream is
idle. Any thread may send to any stream: it hands the bytes to the kernel at once and
never waits for the reader. What the kernel does not take waits in that stream's
backlog, and the stream's own thread carries it out.

Each stream, each channel, the server and its watch have a lock each. No thread ever
holds two of them, so there is no order to get wrong.

"Standard" below means HTML's section 9.2, https://html.spec.whatwg.org/#server-sent-events
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import errno
import http.client
import io
import ipaddress
import logging
import os
import re
import secrets
import selectors
import shlex
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import deque
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping
from urllib.parse import parse_qs

__all__ = [
    "Channel",
    "Client",
    "SSERequestHandler",
    "SSEServer",
    "encode_comment",
    "encode_event",
]

logger = logging.getLogger("sse_ref")


# --- 1. The frame -----------------------------------------------------------------

# Standard, 9.2.5: end-of-line = ( cr lf / cr / lf ). Not str.splitlines(), which also
# breaks at U+2028, U+0085, form feed and more: those are data.
_LINE_BREAK = re.compile(r"\r\n|\r|\n")


def encode_event(
    data: str | None = None,
    *,
    event: str | None = None,
    id: str | int | None = None,
    retry: int | None = None,
) -> bytes:
    r"""Return one event as it goes over the wire: a line a field, then a blank line.

    >>> encode_event("one\ntwo", event="news", id=7)
    b'event: news\nid: 7\ndata: one\ndata: two\n\n'

    `data` is the text of the event; `""` is an event with empty data. `event` is its
    type ("message" where there is none). `id` becomes the client's last event ID;
    `""` resets it. `retry` is the reconnection time in milliseconds.

    TypeError: a field is of another type. ValueError: there is no field at all, or a
    reader would not get back what was given: a line break in `event` or `id`, a NUL
    in `id`, a negative `retry`, a lone surrogate.
    """
    lines = []
    if event is not None:
        lines.append(f"event: {_one_line('event', event)}")
    if retry is not None:
        # 9.2.6: a retry that is anything but ASCII digits is ignored.
        if not _is_int(retry):
            raise TypeError(f"retry must be int, not {type(retry).__name__}")
        if retry < 0:
            raise ValueError("retry must not be negative")
        lines.append(f"retry: {retry:d}")
    if id is not None:
        lines.append(f"id: {_id_text(id)}")
    if data is not None:
        # 9.2.6: the reader joins the data lines of an event with LF.
        lines += [f"data: {line}" for line in _lines("data", data)]
    if not lines:
        raise ValueError("an event needs at least one of data, event, id and retry")
    return "\n".join([*lines, "", ""]).encode()  # 9.2.5: always UTF-8


def encode_comment(text: str = "") -> bytes:
    """Return `text` as comment lines, which every reader ignores (standard, 9.2.6).

    No blank line follows, so nothing is dispatched. 9.2.7 advises such a comment
    "every 15 seconds or so", because proxies drop connections that stay silent.

    TypeError: `text` is not str. ValueError: it holds a lone surrogate.
    """
    return "".join(f": {line}\n" for line in _lines("a comment", text)).encode()


def _lines(name: str, text: object) -> list[str]:
    if not isinstance(text, str):
        advice = "; json.dumps() turns other values into one" if name == "data" else ""
        raise TypeError(f"{name} must be str, not {type(text).__name__}{advice}")
    return _LINE_BREAK.split(text)


def _one_line(name: str, text: object) -> str:
    line, *more = _lines(name, text)
    if more:  # it would end the field and start another one
        raise ValueError(f"{name} must not contain a line break")
    return line


def _id_text(id_: str | int) -> str:
    text = _one_line("id", f"{id_:d}" if _is_int(id_) else id_)
    if "\0" in text:  # 9.2.6: an id that contains U+0000 is ignored
        raise ValueError("id must not contain NUL")
    return text


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _encode_chunk(frames: bytes) -> bytes:
    # RFC 9112, 7.1. The standard (9.2.7) warns of chunking by a layer that does not
    # know the timing of the events. This one does: a chunk is what is written at once.
    return b"%x\r\n%b\r\n" % (len(frames), frames)


_LAST_CHUNK = b"0\r\n\r\n"
_KEEPALIVE = encode_comment("keep-alive")


# --- 2. One stream ----------------------------------------------------------------


class _Watch:
    """One thread that watches the sockets of all sleeping clients, and wakes them.

    Why does a request's thread not sleep in a selector of its own? Because another
    thread that leaves it a backlog would have to wake it, and poll() and select() do
    not notice a change made while they sleep. A descriptor to wake it by (or an epoll
    object, which does notice) would make two descriptors a stream.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of all that follows
        self._closed = True  # until open()
        self._thread: threading.Thread | None = None  # started when first needed
        self._selector: selectors.BaseSelector
        self._bell: socket.socket
        self._button: socket.socket
        self._hears: bool

    def open(self) -> None:
        """Get the descriptors; at the server's start, while there are some."""
        self._selector = selectors.DefaultSelector()
        # These live in the kernel, where a sleeper learns of a change; poll() and
        # select() know what they were called with.
        kind = type(self._selector).__name__
        self._hears = kind in ("EpollSelector", "KqueueSelector")
        self._bell, self._button = socket.socketpair()
        self._button.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._closed = False

    def arm(self, client: Client, events: int) -> None:
        """Wake `client` once, when its socket is ready for one of `events`."""
        with self._lock:
            if self._closed or client._armed == events:
                return
            if self._thread is None:
                self._start()
            if client._armed:
                self._selector.modify(client._socket, events, client)
            else:
                self._selector.register(client._socket, events, client)
            client._armed = events
            if not self._hears:
                self._press()

    def disarm(self, client: Client) -> None:
        """Forget `client`; needed before its socket is closed."""
        with self._lock:
            if client._armed and not self._closed:
                self._selector.unregister(client._socket)
                client._armed = 0

    def close(self) -> None:
        """End the thread and give the descriptors back."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._press()
        if self._thread is not None:
            self._thread.join()
        for each in (self._selector, self._bell, self._button):
            each.close()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        self._thread = thread

    def _press(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will ring all the same
            self._button.send(b"\0")

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                client = key.data
                if client is None:
                    self._bell.recv(4096)
                    continue
                # Once only: else a client that sends more than we read, or leaves
                # while its thread is busy, would have us go round and round.
                self.disarm(client)
                client._wake()


class Client:
    """One open event stream, as `on_connection` is given it.

    `last_event_id`: the id of the last event that the client has seen; "" if none.
    `path`, `query`, `headers`: of its request. `address`: the peer's host, port etc.

    Any thread may use it, but for `wait`, which is for the request's own.
    """

    stall_timeout = 30.0
    """Seconds for which a backlog may stand still before its stream is ended."""

    __slots__ = (
        "_armed",
        "_backlog",
        "_callbacks",
        "_chunked",
        "_closed",
        "_keepalive",
        "_lock",
        "_max_backlog",
        "_moved",
        "_owner",
        "_query",
        "_reason",
        "_sleep",
        "_socket",
        "_watch",
        "_written",
        "address",
        "headers",
        "last_event_id",
        "path",
    )

    def __init__(
        self,
        handler: BaseHTTPRequestHandler,
        watch: _Watch,
        *,
        chunked: bool,
        keepalive: float | None,
        max_backlog: int,
    ) -> None:
        self.address: Any = handler.client_address
        self.headers: Message = handler.headers
        self.path, self._query = _split_target(handler.path)
        self.last_event_id = _utf8(self.headers.get("Last-Event-ID", ""))

        self._socket = handler.connection
        self._chunked = chunked
        self._keepalive = inf if keepalive is None else keepalive
        self._max_backlog = max_backlog
        self._owner = threading.get_ident()

        self._lock = threading.Lock()  # of the next six, and of writing at all
        self._backlog = bytearray()  # what the kernel has not taken yet
        self._moved = 0.0  # when the kernel last took some of it
        self._written = time.monotonic()  # when anything was last written
        self._closed = False  # nothing is to be added to the stream any more
        self._reason = ""  # why it was we who cut it off, for the log
        self._callbacks: list[Callable[[Client], object]] = []

        # The own thread sleeps by acquiring a lock that is never free; who wakes it
        # releases that. (threading.Event does it too, for ten times the memory.)
        self._sleep = threading.Lock()
        self._sleep.acquire()
        self._watch = watch
        self._armed = 0  # the watch's note: the events it is watching for

    @property
    def query(self) -> dict[str, list[str]]:
        """The values of the query string by name, blank ones too."""
        return parse_qs(self._query, keep_blank_values=True)

    @property
    def closed(self) -> bool:
        """True once the stream has ended, by either side."""
        return self._closed

    def send(
        self,
        data: str | None = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
    ) -> None:
        """Send one event; the arguments are those of `encode_event`.

        From any other thread than the request's own this never waits. In that one it
        returns when the kernel has all, so a producer is slowed to its reader's pace.

        BrokenPipeError: the stream has ended; let it pass out of `on_connection`.
        """
        self._send(encode_event(data, event=event, id=id, retry=retry))

    def comment(self, text: str = "") -> None:
        """Send `text` as a comment, which readers ignore; else like `send`."""
        self._send(encode_comment(text))

    def wait(self, timeout: float | None = None) -> bool:
        """Hold the stream open for `timeout` seconds; True as soon as it has ended.

        This is where the backlog moves, the keep-alive is sent and the peer's leaving
        is noticed, so do your waiting here. None: until the stream ends.

        RuntimeError: called from another thread than the request's own.
        """
        if not self._in_own_thread():
            raise RuntimeError("wait() is for the request's own thread")
        deadline = inf if timeout is None else time.monotonic() + timeout
        while not self._closed:
            self._turn(deadline)
            if time.monotonic() >= deadline:
                break
        return self._closed

    def close(self) -> None:
        """End the stream in good order, after all that was sent before.

        From any thread, at any time; returns at once. What is in the backlog is still
        carried out.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._chunked:
                self._write(_LAST_CHUNK)
            self._flush()
        self._wake()

    def on_close(self, callback: Callable[[Client], object]) -> None:
        """Call `callback(client)` once, in the request's own thread, at the end.

        Where the stream has ended already it is called at once, by this thread.
        """
        with self._lock:
            if not self._closed:
                self._callbacks.append(callback)
                return
        callback(self)

    # --- inside; "(locked)" means that the caller holds the lock ---

    def _send(self, frames: bytes) -> None:
        taken = self._offer(_encode_chunk(frames) if self._chunked else frames)
        if self._backlog and self._in_own_thread():
            self._drain()
            taken = not self._closed
        if not taken:
            raise BrokenPipeError(errno.EPIPE, "the event stream has ended")

    def _offer(self, wire: bytes) -> bool:
        """Write `wire`, if that is still possible."""
        with self._lock:
            # Found over the limit by who wants to add more: so a piece larger than
            # the limit drops nobody who keeps up.
            if len(self._backlog) > self._max_backlog and not self._in_own_thread():
                self._lose("it reads too slowly")
            if not self._closed:
                self._write(wire)
            return not self._closed

    def _write(self, wire: bytes) -> None:
        """Hand `wire` to the kernel; what it does not take waits (locked)."""
        if self._backlog:
            self._backlog += wire
            return
        self._written = time.monotonic()
        try:
            sent = self._socket.send(wire)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lose()
            return
        if sent < len(wire):
            self._backlog += memoryview(wire)[sent:]
            self._moved = self._written
            self._wake()

    def _flush(self) -> None:
        """Hand the kernel what it takes of the backlog, the FIN at the end (locked).

        One send and no loop: nobody else may write meanwhile.
        """
        try:
            if self._backlog:
                del self._backlog[: self._socket.send(self._backlog)]
                self._written = self._moved = time.monotonic()
            if self._closed and not self._backlog:
                self._socket.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            self._lose()

    def _listen(self) -> None:
        """Notice that the peer has left; nothing else it may say matters (locked)."""
        try:
            if not self._socket.recv(4096):
                self._lose()
        except BlockingIOError:
            pass
        except OSError:
            self._lose()

    def _lose(self, reason: str = "") -> None:
        """Give the stream up; with a reason it is we who cut it off (locked)."""
        self._closed = True
        self._backlog = bytearray()
        if reason:
            self._reason = reason
            # RST instead of FIN: the kernel keeps nothing for a reader that is stuck.
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._wake()

    def _cut_off(self, reason: str) -> None:
        """Give up what its reader has not taken; from any thread."""
        with self._lock:
            if self._backlog:
                self._lose(reason)

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is awake already, or about to be
            self._sleep.release()

    def _in_own_thread(self) -> bool:
        return threading.get_ident() == self._owner

    def _drain(self) -> None:
        """Wait until the backlog is empty, or given up."""
        while self._backlog:
            self._turn(inf)

    def _turn(self, until: float) -> None:
        """Sleep until there is something to see to, at most `until`; see to it.

        All that the own thread can wait for: the peer's leaving, the backlog moving or
        standing still, the keep-alive, somebody's `close`, the caller's time.
        """
        with self._lock:
            if self._backlog:
                events = selectors.EVENT_READ | selectors.EVENT_WRITE
                until = min(until, self._moved + self.stall_timeout)
            else:
                events = selectors.EVENT_READ
                until = min(until, self._written + self._keepalive)
        self._watch.arm(self, events)
        seconds = min(max(until - time.monotonic(), 0), threading.TIMEOUT_MAX)
        self._sleep.acquire(timeout=seconds)
        with self._lock:
            self._listen()
            self._flush()
            now = time.monotonic()
            if self._backlog:
                if now >= self._moved + self.stall_timeout:
                    self._lose("it has stopped reading")
            elif now >= self._written + self._keepalive and not self._closed:
                self._write(_encode_chunk(_KEEPALIVE) if self._chunked else _KEEPALIVE)

    def _end(self) -> None:
        """Finish the stream, in its own thread; the socket is the caller's to close."""
        self.close()
        for callback in self._callbacks:
            try:
                callback(self)
            except Exception:
                logger.exception("%s: a callback of on_close failed", self.address)
        self._drain()
        self._watch.disarm(self)
        if self._reason:
            logger.warning("%s: dropped, %s", self.address, self._reason)


_ABSOLUTE_FORM = re.compile(r"\Ahttps?://([^/?]*)", re.IGNORECASE)  # RFC 9112, 3.2.2


def _split_target(target: str) -> tuple[str, str]:
    """Split a request target (RFC 9112, 3.2) into its path and its query string."""
    path, _, query = _ABSOLUTE_FORM.sub("", target).partition("?")
    return f"/{path.lstrip('/')}" if path.startswith("//") else path or "/", query


def _utf8(value: str) -> str:
    """Undo http.server's reading of a header as Latin-1: Last-Event-ID is UTF-8.

    Standard, 9.2.4. What is not UTF-8 stays: Node's fetch sends Latin-1.
    """
    value = value.strip(" \t")  # not more: 0xA0 and 0x85 end letters in UTF-8
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


# --- 3. Many streams --------------------------------------------------------------


class Channel:
    """Events for all who subscribe; who reconnects gets what it has missed.

    `history`: how many events are held for that. 0: none, nor ids of our own.
    `gap_event`: the type of the event that tells a client that what it missed is no
    longer held; its data is the client's last event ID. None: do not tell.

    >>> news = Channel()
    >>> server = SSEServer(("127.0.0.1", 8080), news.subscribe)
    >>> news.publish("hello", event="greeting")
    'b3c1a9f2-1'

    Any thread may call any method. Events have numbers, 1, 2, 3 and so on. A client has
    a place: the number of the last event that it has, or does not want.
    """

    piece_size = 2**18
    """Bytes after which no more events join those that are written at once."""

    def __init__(self, history: int = 1000, gap_event: str | None = "gap") -> None:
        if history < 0:
            raise ValueError("history must not be negative")
        if gap_event is not None:
            encode_event("", event=gap_event)  # raises what is wrong with it
        self._history = history
        self._gap_event = gap_event
        # Ids of an earlier start must not be taken for ours.
        self._epoch = secrets.token_hex(4)

        self._lock = threading.Lock()  # of all that follows
        self._news = threading.Condition(self._lock)  # _pending or _closed has changed
        self._count = 0  # the number of the last event
        self._held: dict[int, tuple[str, bytes]] = {}  # id and frame by number
        self._numbers = {f"{self._epoch}-0": 0}  # by id; 0 is the beginning
        self._pending: list[bytes] = []  # frames up to _count, not yet delivered
        self._clients: dict[Client, int] = {}  # the place at which each has joined
        self._thread: threading.Thread | None = None  # started when first needed
        self._closed = False

    @property
    def clients(self) -> frozenset[Client]:
        """The open streams that are subscribed at this moment."""
        with self._lock:
            return frozenset(client for client in self._clients if not client.closed)

    def publish(
        self,
        data: str | None = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
    ) -> str:
        """Send an event to all subscribers, and return its id; never waits for them.

        The arguments are those of `encode_event`. Without `id` the event gets one that
        no other start of the program uses. Give your own where several replicas
        publish the same events, say the offset in a log: a client can then resume on
        any of them.

        RuntimeError: the channel is closed. What `encode_event` raises.
        """
        with self._news:
            self._check_open()
            if id is None and self._history and not (data is None and event is None):
                id = f"{self._epoch}-{self._count + 1}"
            frame = encode_event(data, event=event, id=id)
            self._count += 1
            name = "" if id is None else _id_text(id)
            self._remember(name, frame)
            if self._clients or self._pending:
                self._pending.append(frame)
                self._start()
                self._news.notify()
        return name

    def subscribe(self, client: Client) -> None:
        """Have `client` get all that is published from now on.

        A client that names a last event ID first gets what was published since. Do call
        it in the request's own thread: it is slowed to the client's pace meanwhile.

        RuntimeError: the channel is closed. BrokenPipeError: the client has gone.
        """
        place, last_id = None, client.last_event_id
        while True:
            with self._lock:
                self._check_open()
                if client in self._clients:
                    return
                if place is None:
                    place = self._place_of(last_id)
                frames, place, last_id = self._missed(place, last_id)
                if not frames:
                    # Nothing can come in between: the next event is for us, too.
                    self._clients[client] = place
                    break
            client._send(b"".join(frames))
        client.on_close(self.unsubscribe)  # at once, if it has left meanwhile

    def unsubscribe(self, client: Client) -> None:
        """Let `client` have no more of what is published from now on."""
        with self._lock:
            self._clients.pop(client, None)

    def close(self) -> None:
        """Publish no more; what was published is delivered, streams stay open."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join()

    # --- inside; "(locked)" means that the caller holds the lock ---

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the channel is closed")

    def _remember(self, name: str, frame: bytes) -> None:
        """Add the event just counted to the history, and drop the oldest (locked)."""
        if not self._history:
            return
        self._held[self._count] = name, frame
        if name:  # "" resets the client's last event ID: nobody will ask for it
            self._numbers[name] = self._count
        oldest = self._count - self._history
        if oldest > 0:
            name, _ = self._held.pop(oldest)
            if self._numbers.get(name) == oldest:  # not published again since
                del self._numbers[name]

    def _place_of(self, last_id: str) -> int:
        """Tell where in the order of events a new subscriber is; -1: lost (locked)."""
        if self._history and last_id:
            return self._numbers.get(last_id, -1)
        return self._count

    def _missed(self, place: int, last_id: str) -> tuple[list[bytes], int, str]:
        """Return frames from after `place`, and where they lead to (locked).

        Some at a time: a slow client's backlog is not to hold the history as well.
        """
        frames = []
        before_held = self._count - len(self._held)
        if place < before_held:
            if self._gap_event is not None:
                # With nothing held yet, the next reconnect is to find no gap.
                beginning = None if self._held else f"{self._epoch}-0"
                frames = [encode_event(last_id, event=self._gap_event, id=beginning)]
            place = before_held
        size = 0
        while place < self._count and size < self.piece_size:
            place += 1
            last_id, frame = self._held[place]
            frames.append(frame)
            size += len(frame)
        return frames, place, last_id

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, daemon=True)
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        """Deliver what was published, until the channel is closed: the one thread."""
        while True:
            with self._news:
                while not self._pending and not self._closed:
                    self._news.wait()
                if not self._pending:
                    return
                begin = self._count - len(self._pending)
                frames = self._take()
                clients = list(self._clients.items())
            self._deliver(frames, begin, clients)

    def _take(self) -> list[bytes]:
        """Take what has gathered, up to a piece (locked)."""
        size = number = 0
        while number < len(self._pending) and size < self.piece_size:
            size += len(self._pending[number])
            number += 1
        frames = self._pending[:number]
        del self._pending[:number]
        return frames

    def _deliver(
        self, frames: list[bytes], begin: int, clients: list[tuple[Client, int]]
    ) -> None:
        """Write the events after place `begin` to each client in one piece."""
        whole = b"".join(frames)
        chunk = _encode_chunk(whole)
        for client, place in clients:
            if place <= begin:
                wire = chunk if client._chunked else whole
            elif place < begin + len(frames):  # it joined meanwhile
                rest = b"".join(frames[place - begin :])
                wire = _encode_chunk(rest) if client._chunked else rest
            else:
                continue
            client._offer(wire)  # one that has gone is unsubscribed by its own thread


# --- 4. HTTP ----------------------------------------------------------------------


class _Input(io.BufferedReader):
    """What a request sends, of which the head must not be too long."""

    head_left: float = 2**17  # more than http.server's limit for the first line

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        self.head_left -= len(line)
        if self.head_left < 0:
            raise http.client.HTTPException("the head is too long")  # becomes a 431
        return line


class _Nowhere(io.BufferedIOBase):
    """Where a body goes that is not to be sent."""

    def write(self, data: Any, /) -> int:
        return memoryview(data).nbytes


class SSERequestHandler(BaseHTTPRequestHandler):
    """Answers a GET of the server's path with an event stream, any other with "okay".

    To serve pages of your own beside the stream, override `serve_plain`:

        class Handler(SSERequestHandler):
            def serve_plain(self):
                page = b"<script>new EventSource('/sse')</script>"
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

        SSEServer(("127.0.0.1", 8080), RequestHandlerClass=Handler).serve_forever()
    """

    server: SSEServer

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an event is not to wait for the one before it
    wbufsize = -1  # buffered, so that a head leaves together with what follows it

    linger = 1.0
    """Seconds to wait for the peer's FIN after ours, see `finish`."""
    _may_be_unread = True  # input that was not asked for

    def do_GET(self) -> None:
        """Serve the event stream on the server's path, `serve_plain()` elsewhere."""
        if self._is_for_stream():
            self._serve_stream()
        else:
            self.serve_plain()

    def do_HEAD(self) -> None:
        """Answer with the head that GET would get; `end_headers` drops the rest."""
        self.do_GET()

    def do_OPTIONS(self) -> None:
        """Answer the preflight of a page that may read the stream (Fetch, 4.8)."""
        if "Access-Control-Request-Method" in self.headers and self._is_for_stream():
            self._serve_preflight()
        else:
            self._refuse_method()

    def _refuse_method(self) -> None:
        text = f"{self.command} is not allowed here, only GET and HEAD are\n"
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, text, {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_CONNECT = do_TRACE = _refuse_method

    def serve_plain(self) -> None:
        """Answer a GET or HEAD that is not for the event stream; override to serve.

        Write the body as for GET: it is not sent to a HEAD.
        """
        self._answer(HTTPStatus.OK, "okay")

    # --- what http.server calls ---

    def setup(self) -> None:
        """Limit the head: http.server alone takes a hundred lines of 64 KiB."""
        super().setup()
        self.rfile = _Input(self.rfile.detach())

    def parse_request(self) -> bool:
        """Read the head; refuse what took too long to come, and folded lines."""
        if not super().parse_request():
            return False
        self.rfile.head_left = inf  # type: ignore[attr-defined]
        if not self.server._in_time(self.connection):
            self.send_error(HTTPStatus.REQUEST_TIMEOUT)
            return False
        if any("\n" in value for value in self.headers.values()):  # RFC 9112, 5.2
            self.send_error(HTTPStatus.BAD_REQUEST, "folded header lines are obsolete")
            return False
        fields = self.headers
        self._may_be_unread = (
            "Content-Length" in fields or "Transfer-Encoding" in fields
        )
        return True

    def handle_expect_100(self) -> bool:
        """Ask for a body, but not for that of a HEAD: its head is still to come."""
        return self.command == "HEAD" or super().handle_expect_100()

    def version_string(self) -> str:
        """Return what the Server header says: not which Python this is."""
        return "sse_ref"

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin a head, with the word that the connection is closed after it."""
        super().send_response(code, message)
        self.send_header("Connection", "close")

    def end_headers(self) -> None:
        """End a head; after one that answers HEAD no body follows."""
        super().end_headers()
        if self.command == "HEAD":
            self.wfile.close()
            self.wfile = _Nowhere()

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Answer with an error in one line of text."""
        if not self.command:  # not understood; http.server would answer as HTTP/0.9
            self.request_version = self.protocol_version
        phrase, description = self.responses.get(code, ("", ""))
        self.log_error("code %d, message %s", code, message or phrase)
        self._answer(code, f"{explain or message or description}\n")

    def finish(self) -> None:
        """Close in stages, so that the peer gets the answer (RFC 9112, 9.6).

        To close a socket that holds unread input sends an RST, which may overtake the
        answer. So: our FIN, then read up to the peer's, and only then close.
        """
        super().finish()
        if not self._may_be_unread:
            return
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + self.linger
            while (seconds := deadline - time.monotonic()) > 0:
                self.connection.settimeout(seconds)
                if not self.connection.recv(8192):
                    break

    # --- inside ---

    def _is_for_stream(self) -> bool:
        path, _ = _split_target(self.path)
        return _matches(self.server.path, path)

    def _answer(
        self, status: int, text: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with a short text."""
        body = text.encode()
        self.send_response(status)
        self._send_headers(headers or {})
        if status != HTTPStatus.NO_CONTENT:  # RFC 9110, 8.6 and 15.3.5: not in a 204
            self._send_headers(
                {"Content-Type": "text/plain", "Content-Length": str(len(body))}
            )
        self.end_headers()
        if status != HTTPStatus.NO_CONTENT:
            self.wfile.write(body)

    def _send_headers(self, headers: Mapping[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name, value)

    def _serve_stream(self) -> None:
        refusal = self._refuse_host() or self._refuse_origin() or self._refuse_user()
        if refusal:
            self._answer(*refusal, self._cors())
            return
        # Without chunks urllib3 (so requests, sseclient-py) holds events back until
        # its read size is full. An HTTP/1.0 client, as nginx is, knows none.
        chunked = self.request_version >= "HTTP/1.1"
        self.send_response(HTTPStatus.OK)
        self._send_headers(
            {
                "Content-Type": "text/event-stream",
                # no-transform: a proxy that compresses would hold events back.
                "Cache-Control": "no-cache, no-transform",
                "X-Accel-Buffering": "no",  # nginx is not to wait for more
                **({"Transfer-Encoding": "chunked"} if chunked else {}),
                **self._cors(),
            }
        )
        self.end_headers()
        retry = self.server.retry
        first = b": ok\n\n" if retry is None else encode_event(retry=retry)
        self.wfile.write(_encode_chunk(first) if chunked else first)
        if self.command == "GET":
            self._hold_stream(chunked)

    def _serve_preflight(self) -> None:
        refusal = self._refuse_host() or self._refuse_origin()
        headers = self._cors()
        if headers:
            headers["Access-Control-Allow-Methods"] = "GET, HEAD"
            headers["Access-Control-Allow-Headers"] = self.headers.get(
                "Access-Control-Request-Headers", ""
            )
        self._answer(*(refusal or (HTTPStatus.NO_CONTENT, "")), headers)

    def _refuse_host(self) -> tuple[int, str] | None:
        """Refuse a name that is not this machine's to a connection within it.

        A page elsewhere may have its own name lead to 127.0.0.1 ("DNS rebinding"): then
        the browser takes us for the page's own server. But it tells that name.
        """
        host, hosts = self._host(), self.headers.get_all("Host", [])
        if len(hosts) > 1 or (host is None and self.request_version >= "HTTP/1.1"):
            return HTTPStatus.BAD_REQUEST, "one Host is needed\n"  # RFC 9112, 3.2
        if host is None or self._knows(host):
            return None
        if not _is_loopback(self.connection.getsockname()[0]):
            return None
        reason = f"Host {host!a} is not in allowed_hosts (--allow-host)\n"
        return HTTPStatus.FORBIDDEN, reason

    def _knows(self, host: str) -> bool:
        name, _ = _split_host(host)
        allowed = self.server.allowed_hosts
        return name == "localhost" or _is_loopback(name) or bool({name, "*"} & allowed)

    def _refuse_origin(self) -> tuple[int, str] | None:
        """Refuse to be read by pages from elsewhere, but for those allowed."""
        origin = self.headers.get("Origin")
        if origin is None or self._cors():
            return None
        # Only host and port count: TLS may end in a proxy before us.
        scheme, host = origin.partition("://")[0], self._host() or ""
        if _normal_origin(origin) == _normal_origin(f"{scheme}://{host}") != "":
            return None
        reason = f"Origin {origin!a} is not in allowed_origins (--allow-origin)\n"
        return HTTPStatus.FORBIDDEN, reason

    def _refuse_user(self) -> tuple[int, str] | None:
        """Refuse whom `authorize` does not let in."""
        answer: object = True
        if self.server.authorize is not None:
            try:
                answer = self.server.authorize(self)
            except Exception:
                logger.exception("%s: authorize failed", self.client_address)
                answer = HTTPStatus.INTERNAL_SERVER_ERROR
        if answer is True:
            return None
        if not isinstance(answer, int) or answer not in range(200, 600):
            answer = HTTPStatus.FORBIDDEN
        return answer, "the server's authorize does not let you in\n"

    def _cors(self) -> dict[str, str]:
        """Return the fields that let an allowed page read the answer (Fetch, 3.2)."""
        origin = self.headers.get("Origin", "")
        normal, allowed = _normal_origin(origin), self.server.allowed_origins
        if not normal or not {normal, "*"} & allowed:
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Credentials": "true",
            "Vary": "Origin",
        }

    def _host(self) -> str | None:
        """Return the host and port that the request was sent to (RFC 9112, 3.2.2)."""
        absolute_form = _ABSOLUTE_FORM.match(self.path)
        return absolute_form[1] if absolute_form else self.headers.get("Host")

    def _hold_stream(self, chunked: bool) -> None:
        server = self.server
        client = Client(
            self,
            server._watch,
            chunked=chunked,
            keepalive=server.keepalive,
            max_backlog=server.max_backlog,
        )
        # Now the head and the first frame leave, in one write. Nothing that takes time
        # comes between this and on_connection: who has the head should miss nothing.
        self.connection.setblocking(False)
        self.wfile.close()
        self.rfile.close()  # and the buffers need not live as long as the stream
        self.rfile = self.wfile = io.BytesIO()  # http.server still flushes and closes
        self._may_be_unread = False  # the client reads what comes
        server._hold(client)


def _matches(pattern: str, path: str) -> bool:
    """Tell whether `path` is `pattern`, where `*` stands for any characters.

    No regular expression: a path made for it would have several stars backtrack.
    """
    first, *others = pattern.split("*")
    if not others:
        return path == pattern
    *middle, last = others
    position = len(first)
    for piece in middle:
        found = path.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    fits = len(path) - len(last) >= position
    return fits and path.startswith(first) and path.endswith(last)


# host[:port], RFC 3986, 3.2: an address in brackets, or a name without what ends one.
# urllib's urlsplit() would take "localhost#.evil" for localhost.
_HOST = r"(?:\[([0-9a-f:.]+)\]|([^\s:/?#@\[\]\\]+?)\.?)(?::([0-9]*))?"
_SCHEME = r"([a-z][a-z0-9+.-]*)://"
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def _split_host(host: str) -> tuple[str, str]:
    """Split host[:port] into the name in lower case, and the port; "" for none."""
    match = re.fullmatch(_HOST, host.lower())
    if match is None:
        return "", ""
    address, name, port = match.groups("")
    return address or name, port


def _normal_host(host: str) -> str:
    """Return the name of a host that is given without a port, "" for what is none."""
    name, port = _split_host(host)
    return "" if port else name or _split_host(f"[{host}]")[0]  # IPv6 without brackets


def _normal_origin(origin: str) -> str:
    """Return an origin in lower case and with its port, "" for what is none."""
    match = re.fullmatch(_SCHEME + _HOST, origin.lower())
    if match is None:
        return "null" if origin == "null" else ""
    scheme, address, name, port = match.groups("")
    return f"{scheme}://{address or name}:{port or _DEFAULT_PORTS.get(scheme, '')}"


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


# --- 5. The server ----------------------------------------------------------------


class SSEServer(ThreadingHTTPServer):
    """An HTTP server that holds event streams open, each in its request's thread.

        def on_connection(client):
            client.send("hi there!")
            while not client.wait(1):  # one second, or until the client has gone
                client.send(time.ctime(), event="tick")

        SSEServer(("127.0.0.1", 8080), on_connection).serve_forever()

    `server_address`: host and port, IPv4 or IPv6; port 0 picks a free one.
    `on_connection`: called with each new `Client`, in the request's own thread. The
    stream stays open after it returns; an exception in it is logged and ends that
    stream. BrokenPipeError, which `send` raises once the client has gone, is no error.
    `path`: where the stream is; `*` stands for any characters, also for `/`.
    `authorize`: called with the handler of a request for the stream, in its thread.
    True lets it in; a status is the answer (204 tells EventSource to stop); anything
    else is 403.
    `keepalive`: seconds of silence before a comment is sent; None: never.
    `retry`: the reconnection time to tell clients, in milliseconds.
    `max_backlog`: bytes; who asks for more while that much waits for a slow reader
    ends its stream.
    `max_connections`: of all kinds; one more is answered with 503.
    `allowed_hosts`: names, besides those of this machine itself, by which browsers in
    it may reach the stream; without a port. `"*"`: any.
    `allowed_origins`: of pages from elsewhere that may read the stream, as in
    `"https://app.example"`, or `"null"`. `"*"`: all.

    ValueError, TypeError: an argument makes no sense. OSError: the address is taken, or
    there is none of that name.
    """

    request_queue_size = 1024  # socketserver's 5 would have a burst of clients refused
    head_timeout = 10.0
    """Seconds within which the whole head of a request must have come."""
    closing_grace = 1.0
    """Seconds that `server_close` gives slow readers to take what they were sent."""
    closing_timeout = 5.0
    """Seconds after which `server_close` returns, whatever still runs."""

    def __init__(  # noqa: PLR0913
        self,
        server_address: tuple[str, int],
        on_connection: Callable[[Client], object] | None = None,
        *,
        path: str = "/sse",
        authorize: Callable[[SSERequestHandler], object] | None = None,
        keepalive: float | None = 15.0,
        retry: int | None = None,
        max_connections: int = 1000,
        max_backlog: int = 2**20,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        RequestHandlerClass: Callable[..., SSERequestHandler] = SSERequestHandler,
    ) -> None:
        self.on_connection: Callable[[Client], object] | None = on_connection
        self.path = path
        self.authorize = authorize
        self.keepalive = keepalive
        self.retry = retry
        self.max_connections = max_connections
        self.max_backlog = max_backlog
        self.allowed_hosts = _allowed("hosts", allowed_hosts, _normal_host)
        self.allowed_origins = _allowed("origins", allowed_origins, _normal_origin)
        self._check_options()
        self._open_books()
        self.address_family, bindable = _resolve(server_address)
        super().__init__(bindable, RequestHandlerClass)

    @property
    def clients(self) -> frozenset[Client]:
        """The streams that are open at this moment."""
        with self._lock:
            return frozenset(client for client in self._clients if not client.closed)

    def server_close(self) -> None:
        """Take no more connections, end every stream, wait for their threads.

        Streams end after what was sent before, but a reader that is stuck is cut off
        after `closing_grace`. It takes no longer than `closing_timeout`.
        """
        super().server_close()
        begun = time.monotonic()
        with self._lock:
            self._closing = True
            clients = self._clients.copy()
            requests = self._requests.copy()
        for client in clients:
            client.close()
        for request in requests.keys() - {client._socket for client in clients}:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RD)  # no more of a head, or of a body
        _join(requests.values(), begun + self.closing_grace)
        for client in clients:
            client._cut_off("the server is closing")
        _join(requests.values(), begun + self.closing_timeout)
        self._watch.close()
        while self._refused:
            self._refused.popleft()[1].close()

    # --- what socketserver calls ---

    def server_bind(self) -> None:
        """Bind the socket, without HTTPServer's reverse look-up of the host's name."""
        self._watch.open()
        socketserver.TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = self.server_address[1]

    def server_activate(self) -> None:
        """Listen; and have the kernel end connections whose peer is out of reach.

        By itself it would take some 15 minutes. What is sent, such as a keep-alive
        comment, is to be acknowledged within 30 s; where nothing is, the kernel asks.
        """
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_USER_TIMEOUT", 30_000),  # milliseconds; the others are in seconds
            ("TCP_KEEPIDLE", 20),
            ("TCP_KEEPINTVL", 10),
            ("TCP_KEEPCNT", 3),
        ):
            if hasattr(socket, name):  # not every system has each
                option = getattr(socket, name)
                # Connections inherit it from the socket that accepts them.
                self.socket.setsockopt(socket.IPPROTO_TCP, option, value)
        super().server_activate()

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; where the system can't, do not ask it all the time."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                logger.warning("no new connections for now: %s", error.strerror)
                time.sleep(0.2)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the request, or refuse one that is too many."""
        with self._lock:
            if self._closing or len(self._requests) >= self.max_connections:
                thread = None
            else:
                thread = _RequestThread(self, request, client_address)
                self._requests[request] = thread
                self._deadlines[request] = time.monotonic() + self.head_timeout
        if thread is None:
            self._turn_away(request)
        else:
            thread.start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Have a handler handle the request."""
        make: Any = self.RequestHandlerClass
        is_class = isinstance(make, type)
        if is_class:
            # What make(...) does, but see _RequestThread for the reason.
            handler = make.__new__(make, request, client_address, self)
            handler.__init__(request, client_address, self)
        else:  # functools.partial, say
            make(request, client_address, self)

    def shutdown_request(self, request: Any) -> None:
        """Close the request's connection, and forget it."""
        super().shutdown_request(request)
        with self._lock:
            self._requests.pop(request, None)
            self._deadlines.pop(request, None)

    def service_actions(self) -> None:
        """End what has had its time; `serve_forever` calls this several times a second.

        A thread that reads a late head gets its end. Who was refused has had a second
        to read why; what it sent is read first, because to close a socket with unread
        input would reset the connection, and the answer might be lost.
        """
        now = time.monotonic()
        with self._lock:
            for request, deadline in self._deadlines.items():
                if deadline > now:
                    break
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RD)
        while self._refused and (
            self._refused[0][0] <= now or len(self._refused) > _REFUSED_AT_A_TIME
        ):
            _, request = self._refused.popleft()
            with contextlib.suppress(OSError), request:
                request.recv(2**20)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a request's thread did not catch; a lost connection is no error."""
        if isinstance(
            sys.exc_info()[1], (ConnectionError, TimeoutError, socket.timeout)
        ):
            logger.debug("%s: connection lost", client_address, exc_info=True)
        else:
            logger.exception("%s: request failed", client_address)

    # --- inside ---

    def _check_options(self) -> None:
        if isinstance(self.on_connection, type) and issubclass(
            self.on_connection, socketserver.BaseRequestHandler
        ):
            raise TypeError("a handler class goes into RequestHandlerClass=")
        if not self.path.startswith(("/", "*")):
            raise ValueError(f"path must start with / or *: {self.path!r}")
        if self.keepalive is not None and not self.keepalive > 0:
            raise ValueError("keepalive must be more than 0, or None")
        if self.retry is not None:
            encode_event(retry=self.retry)  # raises what is wrong with it
        if self.max_connections < 0 or self.max_backlog < 0:
            raise ValueError("max_connections and max_backlog must not be negative")

    def _open_books(self) -> None:
        self._watch = _Watch()
        self._refused: deque[tuple[float, socket.socket]] = deque()  # closing
        self._lock = threading.Lock()  # of all that follows
        self._requests: dict[socket.socket, threading.Thread] = {}
        self._deadlines: dict[socket.socket, float] = {}  # of heads, the nearest first
        self._clients: set[Client] = set()
        self._closing = False

    def _turn_away(self, request: socket.socket) -> None:
        """Answer a connection that is too many, without a thread or waiting."""
        logger.info("a connection was refused: there are max_connections already")
        request.setblocking(False)
        with contextlib.suppress(OSError):
            request.send(_TOO_MANY)
            request.shutdown(socket.SHUT_WR)
        self._refused.append((time.monotonic() + 1, request))

    def _in_time(self, request: socket.socket) -> bool:
        """Tell whether a head that has been read, or cut short, came in time."""
        with self._lock:
            return time.monotonic() < self._deadlines.pop(request, inf)

    def _hold(self, client: Client) -> None:
        """Hold a stream open, in its own thread, from its head to its end."""
        with self._lock:
            self._clients.add(client)
            closing = self._closing
        if closing:  # server_close has not seen this one
            client.close()
        try:
            if self.on_connection is not None and not closing:
                self.on_connection(client)
            client.wait()
        except BrokenPipeError:
            pass
        except Exception:
            logger.exception("%s: on_connection failed", client.address)
        finally:
            client._end()
            with self._lock:
                self._clients.discard(client)


class _RequestThread(threading.Thread):
    """A request's thread, on two pages of stack instead of three.

    Since 3.11 CPython stays in one C frame while plain Python functions call each
    other. A call by way of Thread(target=...) or of a class needs a C frame more, and
    http.server reads heads deep inside: without either, a stream needs 4 kB less.
    """

    def __init__(self, server: SSEServer, request: Any, client_address: Any) -> None:
        super().__init__(daemon=server.daemon_threads)
        self._request = server, request, client_address

    def run(self) -> None:
        server, request, client_address = self._request
        server.process_request_thread(request, client_address)


_REFUSED_AT_A_TIME = 32  # connections that are open only to be read why
_TOO_MANY_TEXT = b"all of max_connections (--max-connections) are taken\n"
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\n"
    b"Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b"
) % (len(_TOO_MANY_TEXT), _TOO_MANY_TEXT)


def _allowed(
    what: str, values: Iterable[str], normal: Callable[[str], str]
) -> frozenset[str]:
    """Check and normalize allowed_hosts or allowed_origins."""
    if isinstance(values, str):
        raise TypeError(f"allowed_{what} must be a list or the like, not one str")
    normals = {value: "*" if value == "*" else normal(value) for value in values}
    for value, normalized in normals.items():
        if not normalized:
            raise ValueError(f"allowed_{what}: {value!r} is none")
    return frozenset(normals.values())


def _resolve(address: tuple[str, int]) -> tuple[socket.AddressFamily, Any]:
    """Find the family and the address to bind; IPv4 where a name has both."""
    host, port = address[:2]
    found = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, _, _, _, bindable = min(found, key=lambda info: info[0] != socket.AF_INET)
    return family, bindable


def _join(threads: Iterable[threading.Thread], deadline: float) -> None:
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(deadline - time.monotonic(), 0))


def main(arguments: list[str] | None = None) -> None:
    """Run the server from the command line, until SIGINT or SIGTERM."""
    if sys.stderr is None:  # closed; http.server writes its log there
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    parser = _parser()
    options = parser.parse_args(arguments)
    _raise_descriptor_limit(options.max_connections + _DESCRIPTORS)
    lines = Channel() if options.source == "-" else None
    try:
        server = _server(options, lines.subscribe if lines else _greet)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    except OSError as error:
        where = f"{options.host} port {options.port}"
        sys.exit(f"sse_ref: cannot listen on {where}: {error.strerror}")
    with server:
        _stop_on_signals(server)
        print(_greeting(server), flush=True)
        if lines and sys.stdin:  # None where it is closed
            threading.Thread(target=_publish_lines, args=(lines,), daemon=True).start()
        server.serve_forever(poll_interval=0.1)
        if lines:
            lines.close()


def _greet(client: Client) -> None:
    client.send("hi there!")


def _server(
    options: argparse.Namespace, on_connection: Callable[[Client], object]
) -> SSEServer:
    return SSEServer(
        (options.host, options.port),
        on_connection,
        path=options.path,
        keepalive=options.keepalive or None,
        retry=options.retry,
        max_connections=options.max_connections,
        allowed_hosts=options.allow_host,
        allowed_origins=options.allow_origin,
    )


def _parser() -> argparse.ArgumentParser:
    description = "Serve an event stream; answer other GETs with okay."
    parser = argparse.ArgumentParser(prog="sse_ref", description=description)
    add = parser.add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    add("source", nargs="?", choices=["-"], help="publish lines of standard input")
    add("--host", default="127.0.0.1", help="address to listen on: %(default)s")
    add("--port", type=port_number, default=8080, help="%(default)s; 0 picks one")
    add("--path", default="/sse", help="%(default)s; * is any characters")
    add("--keepalive", type=float, default=15, metavar="S", help="%(default)s; 0: none")
    add("--retry", type=int, metavar="MS", help="reconnection time, milliseconds")
    add("--max-connections", type=int, default=1000, metavar="N", help="%(default)s")
    add("--allow-origin", **several, metavar="O", help="https://app.example, say, or *")
    add("--allow-host", **several, metavar="H", help="a name without a port, or *")
    return parser


def port_number(text: str) -> int:
    """Return a port; argparse says "invalid port_number value" of what is none."""
    port = int(text)
    if port not in range(2**16):
        raise ValueError
    return port


def _greeting(server: SSEServer) -> str:
    host, port = server.server_name, server.server_port
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    stream = shlex.quote(url + server.path)
    return f"Starting server... {url}\n  curl {shlex.quote(url)}\n  curl -N {stream}"


def _publish_lines(channel: Channel) -> None:
    """Publish each line of standard input as soon as it is there, until its end."""
    try:
        for line in _lines_of(sys.stdin.fileno()):
            channel.publish(line.decode(errors="replace"))
    except RuntimeError:
        pass  # the channel is closed: the server ends
    except OSError as error:
        logger.error("standard input cannot be read: %s", error.strerror)


def _lines_of(descriptor: int) -> Iterator[bytearray]:
    # From the descriptor: at exit, a thread inside sys.stdin would abort the process.
    rest = bytearray()
    while piece := os.read(descriptor, 2**16):
        rest += piece
        if b"\n" in piece:
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield line[:-1] if line.endswith(b"\r") else line
    if rest:
        yield rest


def _stop_on_signals(server: SSEServer) -> None:
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop(*_: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)  # once is enough
        # shutdown() waits for serve_forever(), which this thread is in; and a handler
        # may have interrupted the start of another thread, whose lock Thread() takes.
        _thread.start_new_thread(server.shutdown, ())

    for each in signals:
        signal.signal(each, stop)


def _raise_descriptor_limit(needed: int) -> None:
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        # Without a hard limit the system may still have one of its own, as macOS has.
        with contextlib.suppress(OSError, OverflowError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


_DESCRIPTORS = 64  # what Python and the server have open besides

if __name__ == "__main__":
    main()
