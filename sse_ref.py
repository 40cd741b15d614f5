# SPDX-License-Identifier: 0BSD
r"""Server-sent events on Python's http.server: one file to run, to paste and to read.

    python sse_ref.py
    curl http://localhost:8080            # prints okay, and the connection closes
    curl -N http://localhost:8080/sse     # prints data: hi there!, and stays open

An event stream is an HTTP response that does not end. Whenever there is news, the
server writes an event to it. A browser reads it with `new EventSource(url)`. With
plain http.server, nine lines serve one:

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            while True:
                self.wfile.write(f"data: {time.ctime()}\n\n".encode())
                time.sleep(1)

    ThreadingHTTPServer(("127.0.0.1", 8080), Handler).serve_forever()

README.md ("How it works") turns them into ninety lines with the same kinds of threads
as this file; if you have it at hand, read those first. Chapters 1 to 6 each solve a
problem that the nine lines have:

    1. An event          text that contains line breaks
    2. One stream        slow readers, readers that leave, several writing threads
    3. Many streams      one event for everybody, and what a reader has missed
    4. A request         malformed heads, errors, a stream in answer to a POST
    5. Who gets in       pages of other origins, users
    6. The server        too many connections, slow ones, an orderly shutdown
    7. The command line

Chapters 1 to 3 are about event streams. Chapters 4 to 7 are about serving them with
http.server; you can understand event streams without them.

This is the life of a stream, and which thread does what:

  * The thread that called `run` or `serve_forever` accepts the connection and starts a
    thread for it (SSEServer.process_request).
  * The request's own thread reads the head (SSERequestHandler.parse_request) and calls
    `do_GET` (_call_do_method). It checks who is asking (serve_stream) and runs the
    program's `on_connection` (_hold_stream). Then it sleeps until the stream is closed
    (Client.wait), and until all that was sent is out (Client._finish).
  * Any thread may send an event (Client.send), publish one (Channel.publish), or close
    the stream (Client.close).
  * The fan-out thread, one per channel, writes each published event to the subscribers
    that keep up (Channel._fan_out).
  * The I/O thread, one per server, watches all open streams with a selector. It
    notices when a peer leaves (Client._read_input). It sends what the kernel would not
    take at first, and brings slow subscribers up to date (Client._continue_sending).
    Several times per second it checks the time: it sends keep-alive comments, and ends
    streams that are stuck (Client._do_what_is_due).
  * Finally the request's own thread runs the `on_close` callbacks (Client._finish), and
    closes the socket if a reset has not done so (SSEServer.shutdown_request).

"Standard" below means section 9.2 of HTML, https://html.spec.whatwg.org/#server-sent-events
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
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Tuple, Union
from urllib.parse import parse_qs

__all__ = [
    "Channel",
    "Client",
    "Refusal",
    "SSERequestHandler",
    "SSEServer",
    "encode_comment",
    "encode_event",
]

logger = logging.getLogger("sse_ref")


# --- 1. An event ------------------------------------------------------------------
#
# The nine lines write "data: " and then the text as it is. Text that contains line
# breaks would become something else: "hi\nid: 9" would change the reader's last event
# ID, and an empty line would end the event too early.

# Standard, 9.2.5: a line ends with CR LF, CR or LF. str.splitlines() would also break
# lines at U+2028, U+0085, form feed and others, which are ordinary characters here.
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

    `data` is the text of the event; `""` is an event with empty data. `event` is its
    type; the default type is "message". `id` becomes the client's last event ID; `""`
    resets it. `retry` is the reconnection time in milliseconds.

    Raises TypeError if a field has another type. Raises ValueError if no field is
    given, or if a reader would misunderstand a field: a line break in `event` or `id`,
    a NUL in `id`, a negative `retry`, a lone surrogate.
    """
    lines = []
    if event is not None:
        lines.append("event: " + _one_line("event", event))
    if retry is not None:
        if not _is_int(retry):
            raise TypeError(f"retry must be int, not {type(retry).__name__}")
        milliseconds = int(retry)
        if milliseconds < 0:  # Standard, 9.2.6: readers ignore all but ASCII digits.
            raise ValueError("retry must not be negative")
        lines.append(f"retry: {milliseconds}")
    if id is not None:
        lines.append("id: " + _id_text(id))
    if data is not None:
        # Standard, 9.2.6: the reader joins the data lines of an event with LF.
        lines += ["data: " + line for line in _lines("data", data)]
    if not lines:
        raise ValueError("an event needs at least one of data, event, id and retry")
    return "\n".join([*lines, "", ""]).encode()  # Standard, 9.2.5: always UTF-8.


def encode_comment(text: str = "") -> bytes:
    """Return `text` as comment lines, which readers ignore (standard, 9.2.6).

    No blank line follows them. By the standard it would do nothing, but some clients
    report an empty event at every blank line.

    Raises TypeError if `text` is not str, ValueError if it has a lone surrogate.
    """
    return "".join(f": {line}\n" for line in _lines("a comment", text)).encode()


def _lines(name: str, text: object) -> list[str]:
    """Return the lines of `text` as plain str.

    Even if `text` belongs to a subclass of str, its lines do not. A subclass could have
    a __format__ that brings a line break into the f-string of encode_comment.
    """
    if not isinstance(text, str):
        advice = "; json.dumps() turns other values into one" if name == "data" else ""
        raise TypeError(f"{name} must be str, not {type(text).__name__}{advice}")
    return _LINE_BREAK.split(text)


def _one_line(name: str, text: object) -> str:
    line, *more = _lines(name, text)
    if more:  # A second line would be another field.
        raise ValueError(f"{name} must not contain a line break")
    return line


def _id_text(id_: str | int) -> str:
    text = str(int(id_)) if _is_int(id_) else _one_line("id", id_)
    if "\0" in text:  # Standard, 9.2.6: readers ignore an id that contains U+0000.
        raise ValueError("id must not contain NUL")
    return text


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _encode_chunk(frames: bytes) -> bytes:
    r"""Return `frames` as one chunk of an HTTP/1.1 body (RFC 9112, 7.1).

    >>> _encode_chunk(b"data: a\n\n" + b"data: b\n\n")
    b'12\r\ndata: a\n\ndata: b\n\n\r\n'

    The size in front is hexadecimal. Each write is one chunk: a library that waited
    until a chunk is full would delay events (standard, 9.2.7).
    """
    assert frames, "an empty chunk would end the body"
    return b"%x\r\n%b\r\n" % (len(frames), frames)


_LAST_CHUNK = b"0\r\n\r\n"
_FIRST_COMMENT = b": ok\n"
_KEEPALIVE = encode_comment("keep-alive")


# --- 2. One stream ----------------------------------------------------------------
#
# In the nine lines a write blocks while the reader is slow, and so does the thread that
# writes. If two threads write to one stream, their bytes may get mixed. Nobody notices
# that a reader has left until a write fails. And proxies close a connection on which
# nothing happens for a minute. A Client solves this with a lock, a backlog, and the
# help of the I/O thread.
#
# Some words: a frame is an event or a comment in bytes. The backlog of a client is what
# was sent to it and the kernel has not taken yet. A stream is reset when it ends with a
# TCP RST: the peer sees an error, and what the kernel still holds for it is lost.
#
# A Client is in one of four states:
#
#   HEAD_PENDING --first frame--> OPEN --close()--> DRAINING --all is sent--> ENDED
#
# If the peer leaves or the stream is reset, any state leads to ENDED directly. So does
# HEAD_PENDING if the program gives another answer.
#
#   state         send()                   what is still delivered
#   -----         ------                   -----------------------
#   HEAD_PENDING  sends the head as well   everything
#   OPEN          sends                    everything
#   DRAINING      raises BrokenPipeError   what was sent or published before close()
#   ENDED         raises BrokenPipeError   what the kernel holds; nothing after a reset
#
# A stream is "closed" when nothing more can be sent on it (DRAINING or ENDED).
#
# While the head is pending, the program can still give another answer. The head is
# sent with the first frame. If there is none yet, it is sent with a comment by wait(),
# close() or subscribe(), or after half a second by the I/O thread.
#
# Every client, every channel and the server have a lock. A thread holds at most two of
# them: first a client's lock, then that of a channel or of the server.
#
# "(locked)" in a docstring means that the caller holds the lock of this object, and
# "(client locked)" that it holds the lock of the client.
#
# A signal handler may raise an exception anywhere in the main thread; that of Ctrl-C
# does. If this happens while a program sends or publishes, it may cost the stream that
# is being written to. But no lock stays held, and no log is torn.
_HEAD_PENDING = "head pending"
_OPEN = "open"
_DRAINING = "draining"
_ENDED = "ended"

# The interest mask of a stream in the I/O thread's selector.
_NOT_WATCHED = 0
_READ = selectors.EVENT_READ
_READ_AND_WRITE = selectors.EVENT_READ | selectors.EVENT_WRITE


class _Wakeup:
    """Lets one thread sleep until another thread calls `set()`.

    If `set()` comes first, the next `wait()` returns at once. So `wait()` may return
    although nothing has changed, and callers check their condition in a loop.

    The lock serves as a binary semaphore: `wait()` acquires it, `set()` releases it.
    threading.Event takes more memory, and it runs Python code while it holds a lock of
    its own: an exception of a signal handler could leave that lock held.
    """

    def __init__(self) -> None:
        self._semaphore = threading.Lock()
        self._semaphore.acquire()

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):  # It is released already.
            self._semaphore.release()

    def wait(self, timeout: float = inf) -> None:
        self._semaphore.acquire(timeout=min(max(timeout, 0), threading.TIMEOUT_MAX))


def _release_if_owned(lock: threading.RLock) -> None:
    """Release `lock` if the exception of a signal handler has left it held.

    From CPython 3.14 on, it may come after a with statement has acquired its lock and
    before its block begins; then nobody would release it. An RLock knows its owner.
    """
    with contextlib.suppress(RuntimeError):  # This thread does not hold it.
        lock.release()


class Client:
    """One open event stream, as `on_connection` gets it.

    `last_event_id`: the ID of the last event that the client had received when it
    connected, or "".
    `path`, `query`, `headers`: from its request; `path` has no query string.
    `address`: the host and port of the peer.

    A program may set attributes of its own, for example `client.user = "ada"`. Any
    thread may call any method, except `wait`; signal handlers must not call them.
    """

    stall_timeout = 30.0
    """Seconds after which a stream is reset if its backlog does not shrink."""
    head_delay = 0.5
    """Seconds after which the head is sent even if there is no event yet."""
    max_input = 2**16
    """Bytes that a client may send on an open stream; after more it is reset."""

    def __init__(  # noqa: PLR0913
        self,
        server: SSEServer,  # for its options and its I/O thread
        connection: socket.socket,
        *,
        address: Any,
        headers: Message,
        target: str,  # the path and the query, as sent
        head: bytes,  # of the answer
        is_chunked: bool,  # whether the peer understands chunks
    ) -> None:
        self.address = address
        self.headers = headers
        self.path, _, self._query = target.partition("?")
        self.last_event_id = _undo_latin_1(headers.get("Last-Event-ID", ""))

        self._server = server
        self._io_thread = server._io_thread
        self._socket = connection
        self._is_chunked = is_chunked
        self._own_thread = threading.get_ident()
        self._wakeup = _Wakeup()  # The request's own thread sleeps on it.

        # Guards writing to the socket, and all changes of the attributes below.
        self._lock = threading.RLock()  # not Lock, see _release_if_owned
        self._state = _HEAD_PENDING
        self._head = head
        retry = server.retry
        self._retry_line = b"" if retry is None else b"retry: %d\n" % retry
        self._tail = _LAST_CHUNK if is_chunked else b""
        self._backlog: list[memoryview] = []
        self._backlog_size = 0  # bytes
        # How much of the backlog must be sent before send() returns to the request's
        # own thread. Channels may add to the backlog meanwhile.
        self._awaited_size = 0
        # All time-outs count from here. It is set when the stream begins, when the
        # kernel takes bytes, and when the stream begins to wait for its reader.
        self._timer_start = time.monotonic()
        self._interest = _NOT_WATCHED
        self._received = 0  # bytes that the peer has sent on the open stream
        # The channels that it is subscribed to, and its place in each (chapter 3).
        self._subscriptions: dict[Channel, _Subscription] = {}
        self._has_resumed = False  # whether last_event_id has served its purpose
        self._reset_reason = ""
        self._callbacks: list[Callable[[Client], object]] = []

    @property
    def query(self) -> dict[str, list[str]]:
        """The values of the query string by name, blank ones included."""
        return parse_qs(self._query, keep_blank_values=True)

    @property
    def closed(self) -> bool:
        """True as soon as nothing more can be sent, whichever side has closed it."""
        return self._state in (_DRAINING, _ENDED)

    def send(
        self,
        data: str | None = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
    ) -> None:
        """Send one event. The arguments are those of `encode_event`.

        Any thread may call this. What the kernel does not take at once waits in the
        backlog, and the I/O thread sends it. Only in the request's own thread does this
        method wait until the event has left the backlog, so a loop there runs at its
        reader's pace.

        Raises BrokenPipeError if the stream is closed; let it pass out of
        `on_connection`. Raises what `encode_event` raises; then nothing is sent.
        """
        self._send_frames(encode_event(data, event=event, id=id, retry=retry))

    def comment(self, text: str = "") -> None:
        """Send `text` as a comment, which readers ignore; otherwise like `send`."""
        self._send_frames(encode_comment(text))

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until the stream is closed, at most `timeout` seconds; return `closed`.

        Only the request's own thread may call this; others get a RuntimeError.
        """
        if threading.get_ident() != self._own_thread:
            raise RuntimeError("wait() is for the request's own thread")
        deadline = inf if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._send_head()
        self._sleep_until(lambda: self.closed, deadline)
        return self.closed

    def close(self) -> None:
        """End the stream in good order, after all that was sent or published before.

        Any thread may call this, at any time. It does not wait: the I/O thread sends
        what is left. (Of a channel's events, that is what its log still holds.)
        """
        with self._lock:
            self._send_head()  # If this fails, the stream has ended.
            if self._state is _OPEN:
                self._state = _DRAINING
            if self._state is _DRAINING:  # perhaps by a call that was interrupted
                for channel, subscription in self._subscriptions.items():
                    channel._stop_after_newest(subscription)
                self._continue_sending()
        self._wakeup.set()

    def on_close(self, callback: Callable[[Client], object]) -> None:
        """Call `callback(client)` once, after the end of the stream.

        The request's own thread calls it, after `on_connection` has returned. If the
        stream has ended already, it is called at once, in the calling thread.
        """
        with self._lock:
            if self._state is not _ENDED:
                self._callbacks.append(callback)
                return
        callback(self)

    # How bytes get to the kernel:
    #
    #   send, comment --> _send_frames --.
    #                                    |--> _write_frames --.
    #   Channel._catch_up ---------------'    adds the head,  |
    #                                         makes a chunk   |
    #                                                         |--> _write --> kernel
    #   Channel._fan_out, one chunk for all ------------------'      |
    #                                                                | leaves the rest
    #                                                                v
    #   _flush_backlog <------------------------------------------ backlog
    #         '------------------------------------------------------------> kernel
    #
    # The I/O thread calls _continue_sending() when a socket that was full can take
    # more. It flushes the backlog, and then has the channels catch up. close() and
    # subscribe() call it as well, to begin with what there is.

    def _send_frames(self, frames: bytes) -> None:
        is_own_thread = threading.get_ident() == self._own_thread
        try:
            with self._lock:
                self._raise_if_closed()
                # The limit is compared with what waits already, without `frames`: a
                # single event may have any size. The request's own thread waits for its
                # bytes below, so it cannot get far ahead.
                is_over_limit = self._backlog_size > self._server.max_backlog
                if is_over_limit and not is_own_thread:
                    self._end("its backlog is over max_backlog")
                else:
                    self._write_frames(frames)
                self._raise_if_closed()  # It may have ended just now.
                if is_own_thread:
                    self._awaited_size = self._backlog_size
        except BaseException:
            _release_if_owned(self._lock)
            raise
        if is_own_thread:
            self._sleep_until(lambda: self._awaited_size <= 0 or self._state is _ENDED)
            if self._awaited_size > 0:  # It has ended, and these bytes are lost.
                self._raise_if_closed()

    def _raise_if_closed(self) -> None:
        if self.closed:
            raise BrokenPipeError(errno.EPIPE, "the event stream is closed")

    def _send_head(self) -> None:
        """Send the head if it is still pending (locked)."""
        if self._state is _HEAD_PENDING:
            # Proxies and browsers wait for the first bytes of the body.
            self._write_frames(b"" if self._retry_line else _FIRST_COMMENT)

    def _write_frames(self, frames: bytes, before: bytes = b"") -> None:
        """Write `frames` as one chunk, after the head if that is pending (locked).

        `before` are frames that come first, in the same chunk.
        """
        try:
            head = b""
            if self._state is _HEAD_PENDING:
                self._state = _OPEN
                head, self._head = self._head, b""
                # No blank line in between: it becomes a field of the first event.
                before = self._retry_line + before
            if len(frames) >= self._shared_size:
                self._write_large(head, before, frames)
            elif self._is_chunked:
                self._write(head + _encode_chunk(before + frames))
            else:
                self._write(head + before + frames)
        except BaseException:  # Ctrl-C or MemoryError: half of the chunk may be sent.
            self._end("an exception interrupted a write")
            raise

    def _write_large(self, head: bytes, before: bytes, frames: bytes) -> None:
        """Write as above, without copying `frames` (locked)."""
        if self._is_chunked:
            size = len(before) + len(frames)
            self._write(b"%b%x\r\n%b" % (head, size, before))
            self._write(frames)
            self._write(b"\r\n")
        else:
            self._write(head + before)
            self._write(frames)

    # Frames of this size or more are not copied: the same large event may be in the
    # backlogs of many slow subscribers.
    _shared_size = 2**18  # bytes
    # Smaller parts of a backlog are joined, because each one costs memory and a system
    # call.
    _joined_size = 2**13  # bytes

    def _write(self, data: bytes) -> None:
        """Hand `data` to the kernel, and add the rest to the backlog (locked)."""
        try:
            sent = 0 if self._backlog else self._hand_to_kernel(data)
            if sent < len(data) and self._state is not _ENDED:
                self._add_to_backlog(memoryview(data)[sent:])
        except BaseException:  # See _write_frames.
            self._end("an exception interrupted a write")
            raise

    def _add_to_backlog(self, rest: memoryview) -> None:
        self._backlog_size += len(rest)
        if self._backlog and len(self._backlog[-1]) + len(rest) <= self._joined_size:
            self._backlog[-1] = memoryview(b"".join((self._backlog[-1], rest)))
        else:
            self._backlog.append(rest)
        self._watch_for_writing()

    def _flush_backlog(self) -> None:
        """Hand the kernel as much of the backlog as it takes (locked)."""
        while self._backlog:
            part = self._backlog[0]
            sent = self._hand_to_kernel(part)
            self._backlog_size -= sent
            if self._awaited_size > 0:
                self._awaited_size -= sent
                self._wakeup.set()
            if self._state is _ENDED:
                return
            if sent < len(part):
                self._backlog[0] = part[sent:]
                self._watch_for_writing()
                return
            del self._backlog[0]

    def _hand_to_kernel(self, data: bytes | memoryview) -> int:
        """Return how many bytes of `data` the kernel has taken (locked).

        If that fails, the stream has ended when this returns.
        """
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # The connection is lost, or was reset.
            self._end()
            return 0
        self._timer_start = time.monotonic()
        return sent

    def _watch_for_writing(self) -> None:
        """Have the I/O thread go on when the socket takes more (locked)."""
        if self._interest == _READ:
            self._timer_start = time.monotonic()
            self._io_thread.set_interest(self, _READ_AND_WRITE)

    def _continue_sending(self) -> None:
        """Send what comes next: the backlog, missed events, the end (locked).

        Each channel writes one piece at most, so that other streams get their turn.
        """
        try:
            self._flush_backlog()
            is_behind = False
            for channel, subscription in list(self._subscriptions.items()):
                if self._backlog or self._state is _ENDED:
                    break
                if channel._catch_up(subscription):
                    is_behind = True
            if self._backlog or is_behind:
                self._watch_for_writing()
            elif self._state is _DRAINING:
                self._finish_draining()
            else:
                self._io_thread.set_interest(self, _READ)
        except BaseException:  # See _write_frames.
            self._end("an exception interrupted a write")
            raise

    def _finish_draining(self) -> None:
        """Write the last chunk, and end once that is sent (locked)."""
        tail, self._tail = self._tail, b""
        if tail:
            self._write(tail)
        if not self._backlog:
            self._end()

    # How a stream ends:
    #
    #   what happens                          methods                  the peer gets
    #   ------------                          -------                  -------------
    #   the program closes it, or raises      close, then _end         the rest, a FIN
    #   the peer leaves, or half-closes       _read_input, then _end   a FIN
    #   it is too slow, or the server fails   _end(reset_reason)       an RST
    #   on_connection raises a Refusal        _withdraw                that answer
    #
    # In each case the request's own thread calls _finish(), as soon as it returns from
    # on_connection and wait().

    def _end(self, reset_reason: str = "") -> None:
        """Enter ENDED: all is sent, or nothing more can be. Any thread may call this.

        The peer gets a FIN, or an RST if there is a reason for that. The request's own
        thread may be busy, so the socket is not left to it. `socket.close()` sends the
        RST at once, because nothing else shares the socket (SSERequestHandler.setup).

        The state changes last, so that an interrupted call can be repeated.
        """
        with self._lock:
            if self._state is _ENDED:
                self._wakeup.set()
                return
            self._reset_reason = reset_reason
            self._backlog.clear()
            self._backlog_size = 0
            for channel, subscription in self._subscriptions.items():
                channel._remove(subscription)
            self._subscriptions.clear()
            self._io_thread.remove(self)
            with contextlib.suppress(OSError):
                if reset_reason:
                    # To linger for 0 seconds means to send an RST.
                    linger = struct.pack("ii", 1, 0)
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self._socket.close()
                else:
                    self._socket.shutdown(socket.SHUT_WR)
            self._state = _ENDED
            self._wakeup.set()

    # The I/O thread calls these.

    def _on_ready(self, events: int) -> None:
        """Read from the socket or write to it, now that it is ready for that."""
        with self._lock:
            if events & selectors.EVENT_READ and self._state is not _ENDED:
                self._read_input()
            if events & selectors.EVENT_WRITE and self._state is not _ENDED:
                self._continue_sending()

    def _read_input(self) -> None:
        """Notice that the peer has left; drop what it sends (locked)."""
        try:
            received = len(self._socket.recv(4096))
        except BlockingIOError:
            return
        except OSError:
            received = 0
        self._received += received
        if not received:
            self._end()
        elif self._received > self.max_input:
            self._end("it does not stop sending")

    def _do_what_is_due(self, now: float) -> None:
        """Send the head or a keep-alive comment, or reset the stream, if it is time."""
        with self._lock:
            if self._interest == _READ_AND_WRITE:
                # Linux reports a socket as writable only when a third of its buffer is
                # free. A slow reader takes long to free that much, so try before that.
                self._continue_sending()
            seconds = now - self._timer_start
            if self._state is _HEAD_PENDING:
                if seconds >= self.head_delay:
                    self._send_head()
            elif self._interest == _READ_AND_WRITE:
                if seconds >= self.stall_timeout:
                    self._end("it has stopped reading")
            elif self._state is _DRAINING:  # An exception interrupted close().
                self.close()
            elif self._state is _OPEN and seconds >= (self._server.keepalive or inf):
                self._write_frames(_KEEPALIVE)

    # The request's own thread calls these.

    def _sleep_until(
        self, condition: Callable[[], bool], deadline: float = inf
    ) -> None:
        """Sleep until `condition()` is true. What makes it true must set `_wakeup`."""
        while not condition():
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                return
            self._wakeup.wait(seconds)

    def _withdraw(self) -> bool:
        """End the stream without having sent anything; False if it is too late."""
        with self._lock:
            if self._state is not _HEAD_PENDING:
                return False
            self._io_thread.remove(self)
            self._state = _ENDED
            return True

    def _finish(self) -> None:
        """Close, sleep until the stream has ended, then run the on_close callbacks."""
        _call_or_reset(self, self.close)
        self._sleep_until(lambda: self._state is _ENDED)
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except BaseException:
                _log_exception("%s: a callback of on_close failed", self.address)
        if self._reset_reason:
            logger.warning("%s: reset, %s", self.address, self._reset_reason)


class _IOThread:
    """Watches the sockets of all open streams, and regularly checks what is due.

    Any thread may change what is watched. epoll and kqueue notice that at once. poll()
    and select() work on a copy of the list, so they are woken through a self-pipe: a
    pair of sockets, one of which is watched like those of the streams.

    There is no lock here. What concerns a client is only changed under that client's
    lock. Each client has entries of its own in the selector and in `clients`, and
    single operations on a dict or a set are atomic.
    """

    check_interval = 0.25  # seconds between two checks of what is due

    def __init__(self) -> None:
        self.clients: set[Client] = set()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def start(self) -> None:
        """Make the selector and start the thread, unless that was done (server locked).

        This is not done when the server is made: a program may fork its workers after
        that, and each of them needs a selector and a thread of its own.
        """
        if self._thread is not None or self._stopped:
            return
        self._selector = selectors.DefaultSelector()
        kind = type(self._selector).__name__
        self._notices_changes = kind in ("EpollSelector", "KqueueSelector")
        self._self_pipe_reader, self._self_pipe_writer = socket.socketpair()
        self._self_pipe_reader.setblocking(False)
        self._self_pipe_writer.setblocking(False)
        self._selector.register(self._self_pipe_reader, selectors.EVENT_READ)
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        self._thread = thread

    def add(self, client: Client) -> bool:
        """Begin to watch a stream; False if that is impossible (client locked)."""
        if self._stopped:
            return False
        client._interest = _READ
        try:
            self._selector.register(client._socket, _READ, client)
            if isinstance(self._selector, selectors.SelectSelector):
                # Only this tells whether there are too many sockets: a ValueError.
                # Windows has no other selector, and a limit of about 500.
                with contextlib.suppress(OSError):
                    self._selector.select(0)
        except (OSError, ValueError):  # ENOSPC, for example.
            self.remove(client)
            return False
        self.clients.add(client)
        self._wake_if_needed()
        return True

    def set_interest(self, client: Client, interest: int) -> None:
        """Change what a stream is watched for, if it is watched (client locked)."""
        if client._interest in (_NOT_WATCHED, interest) or self._stopped:
            return
        self._selector.modify(client._socket, interest, client)
        client._interest = interest
        self._wake_if_needed()

    def remove(self, client: Client) -> None:
        """Stop watching a stream, before its socket is closed (client locked)."""
        if client._interest != _NOT_WATCHED:
            with contextlib.suppress(KeyError):  # An interrupted call is repeated.
                self._selector.unregister(client._socket)
        client._interest = _NOT_WATCHED
        self.clients.discard(client)

    def stop(self) -> None:
        """End the thread and close the descriptors."""
        self._stopped = True
        if self._thread is None:
            return
        self._wake()
        self._thread.join()
        self._selector.close()
        self._self_pipe_reader.close()
        self._self_pipe_writer.close()

    def _wake_if_needed(self) -> None:
        if not self._notices_changes:
            self._wake()

    def _wake(self) -> None:
        # If the pipe is full, it wakes anyway; if it is closed, so is the server.
        with contextlib.suppress(OSError):
            self._self_pipe_writer.send(b"\0")

    def _run(self) -> None:
        next_check = 0.0
        while not self._stopped:
            try:
                now = time.monotonic()
                if now >= next_check:
                    next_check = now + self.check_interval
                    self._check_all(now)
                self._wait_for_readiness(next_check - now)
            except (OSError, ValueError):
                # On Windows select() fails if a socket is closed meanwhile. By now that
                # socket is not watched any more.
                with contextlib.suppress(Exception):
                    logger.debug("select failed", exc_info=True)
                time.sleep(0.001)
            except Exception:  # MemoryError, for example; the next round may succeed.
                _log_exception("the I/O thread failed")
                time.sleep(0.1)

    # In these two no local variable of _run() keeps a client that has left.

    def _check_all(self, now: float) -> None:
        for client in self.clients.copy():
            _call_or_reset(client, client._do_what_is_due, now)

    def _wait_for_readiness(self, timeout: float) -> None:
        for key, events in self._selector.select(timeout):
            if key.data is None:
                self._self_pipe_reader.recv(4096)
            else:
                _call_or_reset(key.data, key.data._on_ready, events)


def _call_or_reset(
    client: Client, step: Callable[..., object], *arguments: object
) -> None:
    """Call `step(*arguments)`. If it fails, that costs this stream and no other."""
    try:
        step(*arguments)
    except Exception:  # MemoryError, for example.
        client._end("because of an error in the server")
        _log_exception("%s: the stream failed", client.address)


def _log_exception(message: str, *arguments: object) -> None:
    """Log the current exception. A log that fails itself must not end a thread."""
    with contextlib.suppress(Exception):
        logger.exception(message, *arguments)


# --- 3. Many streams --------------------------------------------------------------
#
# In the nine lines each stream makes its own events. To send the same event to many
# streams, a program would have to call send() for each of them, and to remember events
# for those that reconnect. A Channel does both with one log, in which each subscriber
# has a place.
#
# The events are numbered 1, 2, 3 and so on. The place of a subscriber is the number of
# the last event that was written to it. (For a new subscriber it is that of the event
# after which it begins.)
#
#       first                                 _taken             newest
#        |                                       |                 |
#   -----+----------------------+----------------+-----------------+---> log
#     older events     the place of a reader       the fan-out thread
#     are dropped      that is behind              has not taken these yet
#
# Here is an example. A and B are subscribed, and have been written events 1 to 7:
#
#   1. publish() appends event 8 to the log and wakes the fan-out thread.
#   2. The fan-out thread takes event 8. The place of A and B is 7, so this is their
#      next event. It is written to both of them, and their place is 8. B reads slowly:
#      the kernel takes only half of the event, and the other half is B's backlog.
#   3. publish() appends event 9. The fan-out thread writes it to A, whose place is now
#      9. It skips B, who has a backlog. The place of B is still 8: B is behind.
#   4. C connects, and its last event ID is that of event 6. subscribe() gives it the
#      place 6, and writes events 7 to 9 to it. The place of C is 9.
#   5. B reads on. The I/O thread flushes the backlog of B and writes event 9 to it. Now
#      all have the place 9, and wait for event 10.
#
# The ninety lines of README.md have one function for all of this, send_more(). Here
# _fan_out() serves those that keep up, because one chunk for all of them is fast. For
# those that are behind, _catch_up() makes a chunk for each.
#
# Both write and move the place under the lock of the client. So nothing is lost or
# sent twice, whichever comes first. A slow reader does not need a copy of what it has
# missed. If the log drops events that a reader still needs, its place moves past them,
# and a gap event tells the reader so.
#
# _Log knows about neither threads nor sockets. Channel connects it with both.


class _Event(NamedTuple):
    """One published event, as the log holds it."""

    id: str
    frame: bytes
    bytes_so_far: int  # the size of all events up to this one


# The place of a subscriber whose last event ID is not in the history.
_LOST = -1


class _Log:
    """The events of a channel, from number `first` to number `newest`.

    `history` is how many of them a client may get when it reconnects. The lock of the
    channel guards all changes.
    """

    def __init__(self, history: int, gap_event: str | None) -> None:
        self.history = history
        self.gap_event = gap_event
        self.first = 1
        self.newest = 0
        # By number. Entry 0 stands for the time before the first event, and stays.
        self.events = {0: _Event("", b"", 0)}
        # The numbers of events whose IDs the program has given.
        self._number_of_id: dict[str, int] = {}
        self._token = secrets.token_hex(4)

    @property
    def before_history(self) -> int:
        """The place before the history. The log may hold more events, or fewer."""
        return max(self.first - 1, self.newest - self.history)

    @property
    def _epoch(self) -> str:
        # IDs from another start of the program, or from another worker that it has
        # forked, must not be taken for ours.
        return f"{self._token}{os.getpid():x}"

    def append(self, data: str | None, event: str | None, id_: str | int | None) -> str:
        """Add an event and return its ID.

        One statement commits the event. So an exception of a signal handler, or a
        MemoryError, never leaves half an event in the log.
        """
        number = self.newest + 1
        is_named = id_ is not None
        is_empty = data is None and event is None and id_ is None
        if self.history and not is_named and not is_empty:
            id_ = f"{self._epoch}-{number}"
        frame = encode_event(data, event=event, id=id_)  # It refuses an empty event.
        id_text = "" if id_ is None else _id_text(id_)
        bytes_so_far = self.events[self.newest].bytes_so_far + len(frame)
        self.events[number] = _Event(id_text, frame, bytes_so_far)
        self.newest = number  # This commits the event.
        # If this is interrupted, a client that comes back with the ID gets a gap event.
        if self.history and is_named and id_text:
            self._number_of_id[id_text] = number
        return id_text

    def trim(self, min_size: int, keep_from: int) -> None:
        """Drop old events, except for those that may still be needed.

        These are the history (but at least the newest event), the events from number
        `keep_from` on, and the newest `min_size` bytes, for slow readers.
        """
        limit = min(self.newest - max(self.history, 1), keep_from - 1)
        size_limit = self.events[self.newest].bytes_so_far - min_size
        while self.first <= limit:
            oldest = self.events[self.first]
            if oldest.bytes_so_far > size_limit:
                return
            if self._number_of_id.get(oldest.id) == self.first:
                del self._number_of_id[oldest.id]
            # In this order: an exception in between must not leave `first` at an event
            # that is gone.
            self.first += 1
            del self.events[self.first - 1]

    def size_between(self, place: int, end: int) -> int:
        """Return the size of the events after `place` up to `end`."""
        return self.events[end].bytes_so_far - self.events[place].bytes_so_far

    def frames_after(self, place: int, end: int, max_size: int) -> tuple[bytes, int]:
        """Return frames from after `place`, at most up to `end`, and where they end.

        They have at most `max_size` bytes, unless the first one alone is larger.
        """
        frames: list[bytes] = []
        size = 0
        while place < end:
            frame = self.events[place + 1].frame
            size += len(frame)
            if frames and size > max_size:
                break
            frames.append(frame)
            place += 1
        return b"".join(frames), place  # If there is only one, it is not copied.

    def place_for(self, last_id: str, last: int) -> tuple[int, str, bytes]:
        """Return a new subscriber's place, the ID that it knows, and its first frame.

        its last event ID      its place
        -----------------      ---------
        is in the history      that event
        too old, or unknown    _LOST: a gap event comes first, then the history
        none                   `last` events back

        If no events follow its place, its first frame is the newest ID alone.
        """
        if not self.history:
            return self.newest, "", b""
        if last_id:
            place = self._find(last_id)
        else:
            place = max(self.newest - last, self.before_history)
        if place < self.before_history:
            return _LOST, last_id, b""
        if place < self.newest:
            return place, last_id, b""
        # An ID without data dispatches no event (standard, 9.2.6), but now the client
        # has an ID to come back with.
        newest_id = self.events[place].id or f"{self._epoch}-{place}"
        return place, newest_id, encode_event(id=newest_id)

    def _find(self, id_: str) -> int:
        """Return the number of the event with that ID, or _LOST."""
        named = self._number_of_id.get(id_, _LOST)
        epoch, _, digits = id_.rpartition("-")
        # int() refuses numbers of thousands of digits.
        is_short = len(digits) <= len(str(self.newest))
        if not is_short or not re.fullmatch("0|[1-9][0-9]*", digits):
            return named
        number = int(digits)
        is_ours = epoch == self._epoch and number <= self.newest
        # Published before this worker was forked, the event has another epoch.
        is_held = number in self.events and self.events[number].id == id_
        return max(named, number) if is_ours or is_held else named

    def gap_after(self, last_id: str) -> bytes:
        """Return the event that tells a client that it has missed some, or b""."""
        if self.gap_event is None or not self.history:
            return b""
        # The events that follow give the client a new ID. If nothing was published
        # yet, it gets one here: otherwise there would be a gap at every reconnect.
        id_ = None if self.newest else f"{self._epoch}-0"
        return encode_event(last_id, event=self.gap_event, id=id_)


class _Piece(NamedTuple):
    """Some events that the fan-out thread writes together, and to whom."""

    begin: int  # the place before these events
    end: int  # the place after them
    last_id: str
    frames: bytes
    chunk: bytes  # the same as a chunk; empty if it is too large to be copied
    subscriptions: list[_Subscription]


class _Subscription:
    """One client's place in the log of one channel; guarded by the client's lock."""

    __slots__ = ("client", "end", "is_active", "known_id", "place")

    def __init__(self, client: Client, place: int, known_id: str) -> None:
        self.client = client
        self.place = place
        self.known_id = known_id  # the last ID that the client knows, for a gap event
        self.end: int | None = None  # its last place, once the client is closed
        self.is_active = True  # until the client unsubscribes or its stream ends


class Channel:
    """Events for all subscribers. A client that reconnects gets what it has missed.

    >>> news = Channel()
    >>> server = SSEServer(("127.0.0.1", 8080), news.subscribe)
    >>> news.publish("hello", event="greeting")
    'b3c1a9f25e07-1'

    `history`: how many events are kept for clients that reconnect. With 0 there is no
    replay, and events have no IDs unless the program gives them.
    `gap_event`: the type of the event that tells a client that the history no longer
    holds what it has missed; its data is the client's last event ID. None: there is no
    such event, and a client that is too slow is reset.

    Any thread may call any method; signal handlers must not.
    """

    piece_size = 2**18
    """Bytes that are written to one stream at once, unless one event is larger."""
    max_pending = 2**22
    """Bytes that the fan-out thread may be behind before publish() waits for it."""
    min_log_size = 2**20
    """Bytes that the log keeps at least, for subscribers that are behind."""

    def __init__(self, history: int = 1000, gap_event: str | None = "gap") -> None:
        if history < 0:
            raise ValueError("history must not be negative")
        if gap_event is not None:
            encode_event("", event=gap_event)  # Raises if it is no type of an event.
        self._wakeup = _Wakeup()  # The fan-out thread sleeps on it.

        # Guards all changes of the attributes below.
        self._lock = threading.RLock()  # not Lock, see _release_if_owned
        self._log = _Log(history, gap_event)
        self._taken = 0  # the number of the last event that the fan-out has taken
        self._subscriptions: dict[_Subscription, None] = {}  # in the order of joining
        self._fan_out_thread: threading.Thread | None = None
        self._closed = False
        self._ends_streams = False

    @property
    def clients(self) -> frozenset[Client]:
        """The open streams that are subscribed at this moment."""
        with self._lock:
            clients = [subscription.client for subscription in self._subscriptions]
        return frozenset(client for client in clients if not client.closed)

    def publish(
        self,
        data: str | None = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
    ) -> str:
        """Send an event to all subscribers and return its ID.

        The arguments are those of `encode_event`. Without `id` the event gets a new one
        ("" if there is no history). Give IDs of your own if several replicas publish
        the same events, for example each event's offset in a log file. Then a client
        can resume on any replica.

        This never waits for a reader. It does wait while the fan-out thread has more
        than `max_pending` bytes still to take.

        Raises RuntimeError if the channel is closed, and what `encode_event` raises.
        """
        try:
            while self._has_too_much_pending():
                # Without this pause, a thread that only publishes would keep the
                # interpreter to itself, and memory would grow.
                time.sleep(0.001)
            with self._lock:
                if self._closed:
                    raise RuntimeError("the channel is closed")
                id_text = self._log.append(data, event, id)
                if self._fan_out_thread is None:  # Nobody is subscribed.
                    self._taken = self._log.newest
                # (size_between() needs the event `_taken`, too.)
                self._log.trim(self.min_log_size, keep_from=self._taken)
                return id_text
        except BaseException:
            _release_if_owned(self._lock)
            raise
        finally:
            self._wakeup.set()

    def subscribe(
        self, client: Client, *, after: str | int | None = None, last: int = 0
    ) -> None:
        """Send `client` what it has missed, and then everything that is published.

        It has missed what came after its last event ID, or after the ID `after` if that
        is given. A client without an ID gets the newest `last` events. If the history
        does not hold the ID, the client gets a gap event and then the whole history. A
        client that subscribes again after `unsubscribe` gets nothing of what it missed.

        This does not wait until all of that is sent. If the channel is closed, the
        client gets what it has missed, and after `close(end_streams=True)` its end. If
        the client is subscribed already, nothing happens.

        Raises BrokenPipeError if the stream is closed. Raises ValueError if `last` is
        negative, or if the client is subscribed to another channel with a history,
        because a client only has one last event ID.
        """
        if last < 0:
            raise ValueError("last must not be negative")
        after_id = None if after is None else _id_text(after)
        with client._lock:
            client._raise_if_closed()
            if self in client._subscriptions:
                return
            if self._log.history:
                if any(other._log.history for other in client._subscriptions):
                    raise ValueError("the client is subscribed to another history")
                if after_id is None and not client._has_resumed:
                    after_id = client.last_event_id
                client._has_resumed = True
            first_frame = self._add(client, after_id or "", last)
            # The first of these three that sends anything sends the head as well.
            if first_frame:
                client._write_frames(first_frame)
            client._continue_sending()  # what it has missed
            client._send_head()
        if self._ends_streams:
            client.close()

    def unsubscribe(self, client: Client) -> None:
        """Send `client` no more events, not even those that it has missed.

        What is in its backlog already is still delivered.
        """
        with client._lock:
            subscription = client._subscriptions.pop(self, None)
            if subscription is not None:
                self._remove(subscription)

    def close(self, end_streams: bool = False) -> None:
        """Publish no more. What was published is still delivered.

        The streams stay open; with `end_streams` each ends after its last event. This
        returns when the fan-out thread has ended.
        """
        self._close(end_streams)

    def _close(self, end_streams: bool = False, timeout: float | None = None) -> None:
        """Like `close`, but wait at most `timeout` seconds for the fan-out thread."""
        with self._lock:
            self._closed = True
            self._ends_streams = self._ends_streams or end_streams
            fan_out_thread = self._fan_out_thread
            if fan_out_thread is None:  # publish() may have been interrupted.
                self._taken = self._log.newest
        if end_streams:
            for client in self.clients:
                _call_or_reset(client, client.close)
        self._wakeup.set()
        if fan_out_thread not in (None, threading.current_thread()):
            fan_out_thread.join(timeout)

    def _has_too_much_pending(self) -> bool:
        with self._lock:
            # The fan-out thread itself may publish, if a logging handler does so.
            if self._fan_out_thread in (None, threading.current_thread()):
                return False
            pending = self._log.size_between(self._taken, self._log.newest)
            return pending > self.max_pending

    # Subscribers.

    def _add(self, client: Client, last_id: str, last: int) -> bytes:
        """Add a subscriber; return the first frame for it, or b"" (client locked)."""
        with self._lock:
            place, known_id, first_frame = self._log.place_for(last_id, last)
            self._start_fan_out()
            subscription = _Subscription(client, place, known_id)
            self._subscriptions[subscription] = None
        client._subscriptions[self] = subscription
        return first_frame

    def _catch_up(self, subscription: _Subscription) -> bool:
        """Write one piece to a subscriber that is behind (client locked).

        The client must not have a backlog. Return whether it is still behind.
        """
        client = subscription.client
        place = subscription.place
        gap = b""
        with self._lock:
            # Later events are for the fan-out thread, unless the client is closed.
            limit = self._taken if subscription.end is None else subscription.end
            if place >= limit:
                return False
            is_lost = place == _LOST
            is_overtaken = not is_lost and place + 1 < self._log.first
            if is_lost:
                place = self._log.before_history
            elif is_overtaken:  # The log has dropped its next event.
                place = self._log.first - 1
            if is_lost or is_overtaken:
                gap = self._log.gap_after(subscription.known_id)
                place = min(place, limit)
            frames, place = self._log.frames_after(place, limit, self.piece_size)
            known_id = self._log.events[place].id if frames else subscription.known_id
        if is_overtaken and not gap:  # A reset is better than a silent loss.
            client._end("the channel has dropped events before it read them")
            return False
        if gap or frames:
            client._write_frames(frames, before=gap)
        subscription.place = place
        subscription.known_id = known_id
        return place < limit

    def _stop_after_newest(self, subscription: _Subscription) -> None:
        """Send a subscriber nothing that is published from now on (client locked)."""
        if subscription.end is None:
            subscription.end = self._log.newest

    def _remove(self, subscription: _Subscription) -> None:
        """Forget a subscriber (client locked)."""
        # The fan-out thread may be about to write to it.
        subscription.is_active = False
        with self._lock:
            self._subscriptions.pop(subscription, None)
            is_last = not self._subscriptions
        if is_last:
            self._wakeup.set()  # The fan-out thread ends.

    # The fan-out thread. It runs while there are subscribers to an open channel.

    def _start_fan_out(self) -> None:
        """Start the thread if it is needed and does not run yet (locked)."""
        if self._fan_out_thread is None and not self._closed:
            thread = threading.Thread(target=self._run, daemon=True)
            thread.start()  # It waits for the lock.
            self._fan_out_thread = thread

    def _is_fan_out_needed(self) -> bool:
        """Tell whether the thread has something to do, or may get it (locked)."""
        is_done = self._closed and self._taken == self._log.newest
        return bool(self._subscriptions) and not is_done

    def _run(self) -> None:
        while True:
            try:
                with self._lock:
                    if not self._is_fan_out_needed():
                        self._taken = self._log.newest
                        self._fan_out_thread = None
                        return
                piece = self._take_piece()
                if piece is not None:
                    self._fan_out(piece)
                else:
                    # Not for ever: a signal handler may have interrupted set().
                    self._wakeup.wait(0.5)
            except Exception:  # MemoryError, for example; the next try may succeed.
                _log_exception("fan-out failed")
                time.sleep(0.1)

    def _take_piece(self) -> _Piece | None:
        """Return what is to be written next; None if there is nothing."""
        with self._lock:
            begin, newest = self._taken, self._log.newest
            if begin == newest:
                return None
            frames, end = self._log.frames_after(begin, newest, self.piece_size)
            is_large = len(frames) >= Client._shared_size
            chunk = b"" if is_large else _encode_chunk(frames)
            last_id = self._log.events[end].id
            subscriptions = list(self._subscriptions)
            piece = _Piece(begin, end, last_id, frames, chunk, subscriptions)
            self._taken = end  # Last, because all the rest may raise a MemoryError.
            return piece

    def _fan_out(self, piece: _Piece) -> None:
        """Write a piece to all subscribers that keep up.

        Since the piece was taken, _catch_up() may have written it as well. Whichever
        comes first moves the place. (This loop is the work of every delivery, so it
        calls few functions.)
        """
        begin, end, last_id, frames, chunk, subscriptions = piece
        for subscription in subscriptions:
            client = subscription.client
            try:
                with client._lock:
                    if not subscription.is_active:
                        continue
                    keeps_up = subscription.place == begin and not client._backlog
                    if keeps_up and client._state is _OPEN:
                        if chunk and client._is_chunked:
                            client._write(chunk)
                        else:
                            client._write_frames(frames)
                        subscription.place = end
                        subscription.known_id = last_id
                    elif subscription.place < end:
                        # It is behind, or its client is closed, or it subscribed in the
                        # middle of these events. _catch_up() writes what it needs.
                        client._watch_for_writing()
            except Exception:
                client._end("because of an error in the server")
                _log_exception("%s: fan-out failed", client.address)


# --- 4. A request -----------------------------------------------------------------
#
# The nine lines answer any GET, and nothing else. http.server passes the head to the
# parser for e-mail, which fails on some heads and takes quadratic time for others. And
# if the handler raises an exception, the connection closes without an answer.

# RFC 9110, 5.6.2: the names of methods and header fields are tokens.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# RFC 9112, 3: "GET /sse HTTP/1.1". http.server would split it at any white space.
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])")
# RFC 9112, 5: "Accept: */*". Neither a folded line nor a space before the colon match.
_FIELD_LINE = re.compile(rf"({_TOKEN}):([^\0\r\n]*)")
_MAX_HEAD_SIZE = 2**15  # bytes
_MAX_FIELD_LINES = 100
# RFC 9112, 3.2.2: the target of a request to a proxy, "http://host/path".
_ABSOLUTE_FORM = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)
_HTTP_METHODS = {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS"}
_HTTP_METHODS |= {"PATCH", "POST", "PUT", "TRACE"}
_METHOD_NAME = "[A-Z][A-Z-]*"  # M-SEARCH, for example
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}  # RFC 9110, 9.2.1
_FULL_RETRY = 5000  # milliseconds after which to come back to a server that is full
_STATUSES_WITHOUT_BODY = {204, 205, 304}  # RFC 9110, 15.3.5, 15.3.6 and 15.4.5

Headers = Union[Mapping[str, str], Iterable[Tuple[str, str]]]


class Refusal(Exception):
    """Raise this to answer a request with another status.

    It may be raised in any `do_*` method, in `serve_plain` and `authorize`, and in
    `on_connection` as long as nothing was sent. `status` is from 200 to 599. `text` is
    sent as text/plain. `headers` is a mapping or pairs. Status 204 tells an EventSource
    not to come back (standard, 9.2.3).

    Raises ValueError or TypeError if there cannot be such an answer.
    """

    def __init__(self, status: int, text: str = "", headers: Headers = ()) -> None:
        if not _is_int(status) or not isinstance(text, str):
            raise TypeError("a Refusal takes an int and a str")
        if not 200 <= status <= 599:  # noqa: PLR2004
            raise ValueError(f"status must be from 200 to 599, not {status}")
        super().__init__(status, text)
        self.status = int(status)
        self.text = text
        self.headers = _header_pairs(headers)


class _NoRequest(Exception):
    """There is no complete request. The connection is closed without an answer."""


def _standard_refusal(status: int) -> Refusal:
    """Return a refusal whose text is that of its status."""
    phrase, _ = BaseHTTPRequestHandler.responses.get(status, ("Refused", ""))
    return Refusal(status, f"{phrase}\n")


def _header_pairs(headers: Headers) -> list[tuple[str, str]]:
    """Return `headers` as pairs of plain str.

    Raises ValueError or TypeError if one of them is not a header that may be sent.
    """
    pairs = []
    ours = {"content-type", "content-length", "transfer-encoding", "connection"}
    for each in headers.items() if isinstance(headers, Mapping) else headers:
        if not all(isinstance(part, str) for part in each):
            raise TypeError(f"the name and value of a header are str: {each!r}")
        # With a subclass of str, what is tested could differ from what is sent.
        name, value = map(str.__str__, each)
        if not _FIELD_LINE.fullmatch(f"{name}:{value}") or ":" in name:
            raise ValueError(f"not a header field: {name!r}: {value!r}")
        if name.lower() in ours:
            raise ValueError(f"{name} is set by the server")
        value.encode("latin-1")  # UnicodeEncodeError is a ValueError.
        pairs.append((name, value))
    return pairs


def _undo_latin_1(value: str) -> str:
    """Return the text of a header that was sent as UTF-8 (standard, 9.2.4).

    Headers are read as Latin-1. A value that is not valid UTF-8 stays as it is, since
    fetch() in Node sends Latin-1.
    """
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


class _RequestReader(io.RawIOBase):
    """Reads from a connection, for a handler's rfile.

    There is one deadline for all that is read. http.server only has a time-out for each
    read: a peer that sends one byte per second could keep its thread for hours.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.deadline = inf  # as time.monotonic() has it
        self.is_late = False  # whether it has passed
        self.error: OSError | None = None  # by which the connection was lost

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._connection.fileno()

    def readinto(self, buffer: Any, /) -> int:
        if self.closed:
            raise ValueError("the connection belongs to an event stream")
        timeout = self._connection.gettimeout()  # BaseHTTPRequestHandler.timeout
        seconds = self.deadline - time.monotonic()
        try:
            if seconds <= 0:
                raise socket.timeout
            if seconds < inf:
                self._connection.settimeout(min(seconds, timeout or inf))
            return self._connection.recv_into(buffer)
        except OSError as error:
            if isinstance(error, socket.timeout) and seconds < inf:
                self.is_late = True
                return 0  # To a BufferedReader this is the end of the input.
            self.error = error
            raise
        finally:
            self._connection.settimeout(timeout)


class _AnswerWriter(io.RawIOBase):
    """Writes to a connection, for a handler's wfile.

    It remembers the error by which the connection was lost. A ConnectionError in a
    handler may also come from elsewhere, for example from the program's database.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.has_begun = False  # whether it is too late for another answer
        self.drops_body = False  # since the answer to a HEAD has none
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._connection.fileno()

    def flush(self) -> None:
        pass  # Even if it is closed, for programs that flush after each answer.

    def write(self, data: Any, /) -> int:
        if self.closed:
            raise ValueError("the connection belongs to an event stream")
        size = memoryview(data).nbytes
        if size and not self.drops_body:
            self.has_begun = True
            try:
                if self.error is not None:
                    raise self.error
                self._connection.sendall(data)
            except OSError as error:
                self.error = error
                raise
        return size


class SSERequestHandler(BaseHTTPRequestHandler):
    """Answers a GET of the server's path with an event stream, other GETs with "okay".

    To serve pages of your own beside the stream, override `serve_plain`. To answer
    other requests with a stream, define `do_POST` and the like, and call `read_body`
    and `serve_stream` there:

        class Handler(SSERequestHandler):
            def do_POST(self):
                question = json.loads(self.read_body())
                def answer(client):
                    for word in think(question):
                        client.send(word)
                    client.close()
                self.serve_stream(answer)

    These methods may raise Refusal. All of them run in the request's own thread.

    http.server calls these in turn: `setup` makes rfile and wfile, `handle_one_request`
    reads the head and calls a `do_*` method, `finish` cleans up.

    Programs may derive a class from this one and from an existing handler class. That
    is why private names are long here: the two classes must not share them.
    """

    server: SSEServer

    protocol_version = "HTTP/1.1"
    server_version = "sse_ref"
    disable_nagle_algorithm = True  # An event must not wait for the one before it.
    rfile: Any
    wfile: Any
    _may_have_unread_input = True  # See finish().
    _body_is_read = False
    _head_is_interim = False

    body_timeout = 30.0
    """Seconds after which `read_body` gives up."""
    linger = 1.0
    """Seconds to wait for the FIN of a peer that may still be sending, see `finish`."""

    # How requests are answered.

    def do_GET(self) -> None:
        """Serve the event stream on the server's path, `serve_plain()` elsewhere."""
        if self._is_for_stream():
            self.serve_stream()
        else:
            self.serve_plain()

    def do_HEAD(self) -> None:
        """Answer with the head that GET would get; `wfile` drops the body."""
        self.do_GET()

    def serve_plain(self) -> None:
        """Answer a GET or HEAD that is not for the event stream; override this.

        Write the body as for a GET: in answer to a HEAD it is dropped.
        """
        self._answer_with_text(HTTPStatus.OK, "okay")

    def serve_stream(
        self,
        on_connection: Callable[[Client], object] | None = None,
        headers: Headers = (),
    ) -> None:
        """Answer this request with an event stream, and hold it until it ends.

        The method and the path do not matter, except that a HEAD gets the head alone.
        The Origin and the server's `authorize` decide who gets in. Then
        `on_connection(client)` is called, by default that of the server; the stream
        stays open when it returns. `headers`, a mapping or pairs, are sent in addition
        to those of every stream.

        Raises ValueError if the headers cannot be sent, Refusal if the client does not
        get in, RuntimeError if the request has been answered already. (A Refusal that
        `on_connection` raises is answered here.)
        """
        head = self._build_stream_head(_header_pairs(headers))
        if self._is_answered():
            raise RuntimeError("this request has been answered already")
        _check_origin(self)
        _check_user(self)
        if self.command == "HEAD":
            self._send_head_and_body(HTTPStatus.OK, head)
            return
        self._log_answer(HTTPStatus.OK)
        client = self._hand_over_connection(head)
        if self.server._add_stream(self._connection_slot, client):
            if on_connection is None:
                on_connection = self.server.on_connection
            self._hold_stream(client, on_connection)
        else:
            self._take_back_connection()
            self._answer_as_full("no more streams can be watched\n")

    def _hand_over_connection(self, head: bytes) -> Client:
        """Return a Client, which from now on reads from the socket and writes to it."""
        # The buffer of rfile, which takes 8 KiB, is not needed any more.
        self.rfile.close()
        self.rfile = self._request_reader
        self._request_reader.close()
        self._answer_writer.close()
        self.connection.setblocking(False)
        return Client(
            self.server,
            self.connection,
            address=self.client_address,
            headers=self.headers,
            target=self._request_target,
            head=head,
            is_chunked=self._answer_is_chunked,
        )

    def _take_back_connection(self) -> None:
        """Make another answer possible, since the Client has not sent anything."""
        self.connection.settimeout(self.timeout)
        self._make_files()

    def _make_files(self) -> None:
        """Make rfile and wfile."""
        self._request_reader = _RequestReader(self.connection)
        self._answer_writer = _AnswerWriter(self.connection)
        self.rfile = io.BufferedReader(self._request_reader)
        self.wfile = self._answer_writer

    def _is_answered(self) -> bool:
        """Tell whether an answer has begun, by us or by a Client."""
        return self._answer_writer.has_begun or self._answer_writer.closed

    def _hold_stream(
        self, client: Client, on_connection: Callable[[Client], object] | None
    ) -> None:
        """Run the program's part, then sleep until the stream has ended."""
        try:
            if on_connection is not None:
                on_connection(client)
            client.wait()
        except BaseException as error:
            if isinstance(error, Refusal) and client._withdraw():
                self._take_back_connection()
                self._answer_refusal(error)
                with contextlib.suppress(OSError):  # The peer has left.
                    self.connection.shutdown(socket.SHUT_WR)
                return
            # A BrokenPipeError from send() is the normal end of a closed stream, and a
            # Refusal then makes no difference. After any other exception the stream
            # ends in good order as well: after a status like 500 an EventSource would
            # never come back.
            is_normal = isinstance(error, (BrokenPipeError, Refusal))
            if not (is_normal and client.closed):
                _log_exception("%s: on_connection failed", self.client_address)
        finally:
            client._finish()
            if client._received:
                self._may_have_unread_input = True

    def read_body(self, max_size: int = 2**20) -> bytes:
        """Return the whole body of the request, at most `max_size` bytes.

        Raises Refusal otherwise: 411 if the length is not given, 400 if it is not a
        number or the body ends early, 413 if it is over `max_size`, 408 if the body
        does not come within `body_timeout` seconds. Raises RuntimeError if the body has
        been read already, or after `serve_stream`.
        """
        if self._body_is_read or self._request_reader.closed:
            raise RuntimeError("the body can be read once, and before serve_stream()")
        lengths = set(self.headers.get_all("Content-Length", []))
        if not lengths or "Transfer-Encoding" in self.headers:
            raise _standard_refusal(HTTPStatus.LENGTH_REQUIRED)
        length = lengths.pop()
        if lengths or not re.fullmatch("[0-9]+", length):
            raise Refusal(HTTPStatus.BAD_REQUEST, "Content-Length is not one number\n")
        digits = length.lstrip("0") or "0"
        # The first test spares int() a number of 30,000 digits.
        if len(digits) > len(str(max_size)) or int(digits) > max_size:
            raise _standard_refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        size = int(digits)
        self._body_is_read = True
        self._request_reader.deadline = time.monotonic() + self.body_timeout
        body: bytes = self.rfile.read(size)
        self._request_reader.deadline = inf
        if len(body) < size:
            if self._request_reader.is_late:
                raise _standard_refusal(HTTPStatus.REQUEST_TIMEOUT)
            raise Refusal(HTTPStatus.BAD_REQUEST, "the body ends before its length\n")
        self._may_have_unread_input = False
        return body

    # From the first byte to the do_* method.

    def handle_one_request(self) -> None:
        """Read one request and answer it; each connection has only one."""
        try:
            if self.parse_request():
                self._call_do_method()
        except _NoRequest:
            pass
        except Refusal as refusal:
            self._answer_refusal(refusal)
        except BaseException as error:
            if error in (self._request_reader.error, self._answer_writer.error):
                logger.debug("%s: connection lost", self.client_address, exc_info=True)
                return
            _log_exception("%s: request failed", self.client_address)
            if not self._is_answered():
                self._answer_refusal(
                    _standard_refusal(HTTPStatus.INTERNAL_SERVER_ERROR)
                )
        finally:
            self.close_connection = True

    def parse_request(self) -> bool:
        """Read the head of the request (RFC 9112, 2 to 5); return True.

        Without this, http.server would pass it to the parser for e-mail. A program may
        override this: if it returns False, the request is not served.
        """
        self.requestline = self.command = self.path = self._request_target = ""
        self._request_host: str | None = None
        self.request_version = self.protocol_version
        self.headers = http.client.HTTPMessage()
        self._head_room = _MAX_HEAD_SIZE  # bytes that may still come
        # RFC 9112, 2.2: an empty line before the request line is ignored.
        line = self._read_head_line() or self._read_head_line()
        self._parse_request_line(line)
        while line := self._read_head_line():
            field = _FIELD_LINE.fullmatch(line)
            if field is None:
                raise Refusal(HTTPStatus.BAD_REQUEST, "malformed header line\n")
            if len(self.headers) >= _MAX_FIELD_LINES:
                raise _standard_refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            # This adds a field, even if there is one of that name already.
            self.headers[field[1]] = field[2].strip(" \t")
        self._request_reader.deadline = inf
        self.server._note_complete_head(self._connection_slot)
        if self._request_host is None:
            self._request_host = self.headers.get("Host")
        self._may_have_unread_input = (
            "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        )
        return True

    def _read_head_line(self) -> str:
        """Return the next line of the head without its end, "" for an empty line."""
        line: bytes = self.rfile.readline(self._head_room + 1)
        self._head_room -= len(line)
        if self._head_room < 0:
            raise _standard_refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        if line.endswith(b"\n"):
            # RFC 9112, 2.2: LF alone ends a line, too.
            end = 2 if line.endswith(b"\r\n") else 1
            return line[:-end].decode("latin-1")
        # The input has ended too early. Either the peer has left, or the deadline has
        # passed, or the server has called _shut_reading().
        has_begun = line or self.requestline
        if not has_begun or not self._connection_slot.is_regular:
            raise _NoRequest
        if self._request_reader.is_late:
            raise _standard_refusal(HTTPStatus.REQUEST_TIMEOUT)
        raise Refusal(HTTPStatus.BAD_REQUEST, "the head is not complete\n")

    def _parse_request_line(self, line: str) -> None:
        self.requestline = line
        words = _REQUEST_LINE.fullmatch(line)
        if words is None or words[3] == "0":
            raise Refusal(HTTPStatus.BAD_REQUEST, "malformed request line\n")
        if words[3] != "1":
            raise _standard_refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
        self.command, target = words[1], words[2]
        self.request_version = f"HTTP/1.{words[4]}"
        # HTTP/1.0 has no chunks; nginx speaks it to the servers behind it. For HTTP/1.1
        # they are needed: without them urllib3 (and so requests, and sseclient-py)
        # holds events back until its read size is full.
        versions = (self.request_version, self.protocol_version)
        self._answer_is_chunked = "HTTP/1.0" not in versions
        # A page that redirects to its own `path` must not redirect to another host, so
        # //x is /x there, as in http.server.
        self.path = re.sub("^//+", "/", target)
        # The server's path is compared with this target. There //sse stays as it is,
        # because a proxy's rules for /sse do not apply to //sse. But of the absolute
        # form, http://host/sse, only /sse is left (RFC 9112, 3.2.2).
        absolute_form = _ABSOLUTE_FORM.match(target)
        if absolute_form:
            self._request_host = absolute_form[1]
            target = target[absolute_form.end() :]
            target = target if target.startswith("/") else f"/{target}"
        self._request_target = target

    def _call_do_method(self) -> None:
        """Check who is asking, then call the do_* method for the request."""
        _check_host(self)
        if not self._connection_slot.is_regular:
            self._answer_as_full("max_connections (--max-connections) is reached\n")
            return
        if self.command not in _SAFE_METHODS:
            _check_origin(self)
        if _is_preflight(self):
            self._answer_with_text(HTTPStatus.NO_CONTENT, "", _preflight_headers(self))
            return
        # HTTP methods are in capital letters; "login" must not call a do_login().
        is_name = re.fullmatch(_METHOD_NAME, self.command)
        method = getattr(self, f"do_{self.command}", None) if is_name else None
        if method is None:
            self._answer_undefined_method()
            return
        # RFC 9110, 10.1.1: the client waits for this before it sends the body.
        expects = self.headers.get("Expect", "").lower() == "100-continue"
        has_body = self._may_have_unread_input and self.command != "HEAD"
        is_asked = expects and has_body and self.request_version != "HTTP/1.0"
        if not is_asked or self.handle_expect_100():
            method()

    def _answer_undefined_method(self) -> None:
        allow = [("Allow", ", ".join(self._defined_methods()))]
        if self.command == "OPTIONS":  # HAProxy sends it as a health check.
            self._answer_with_text(HTTPStatus.NO_CONTENT, "", allow)
        elif self.command in _HTTP_METHODS:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "not allowed here\n", allow)
        else:
            raise _standard_refusal(HTTPStatus.NOT_IMPLEMENTED)

    def _defined_methods(self) -> list[str]:
        names = [name for name in dir(self) if re.fullmatch(f"do_{_METHOD_NAME}", name)]
        defined = {name[3:] for name in names if getattr(self, name) is not None}
        return sorted(defined | {"OPTIONS"})

    def _is_for_stream(self) -> bool:
        path, _, _ = self._request_target.partition("?")
        return _matches(self.server.path, path)

    def _gets_built_in_okay(self) -> bool:
        """Tell whether "okay" is the answer, and not that of a method of a subclass."""
        is_built_in = all(
            getattr(type(self), name) is getattr(SSERequestHandler, name)
            for name in ("serve_plain", "do_GET", "do_HEAD")
        )
        is_get = self.command in ("GET", "HEAD")
        return is_get and is_built_in and not self._is_for_stream()

    # Answers.

    def _answer_with_text(
        self, status: int, text: str, headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        """Answer with a short text."""
        body = text.encode(errors="replace")
        fields = list(headers)
        if not any(name.lower() == "cache-control" for name, _ in fields):
            fields.append(("Cache-Control", "no-store"))
        if status in _STATUSES_WITHOUT_BODY:
            body = b""
        else:
            fields.append(("Content-Type", "text/plain; charset=utf-8"))
            fields.append(("X-Content-Type-Options", "nosniff"))
            fields.append(("Content-Length", str(len(body))))
        self._send_head_and_body(status, self._build_answer_head(status, fields), body)

    def _send_head_and_body(self, status: int, head: bytes, body: bytes = b"") -> None:
        self._log_answer(status)
        self.wfile.write(head if self.command == "HEAD" else head + body)

    def _log_answer(self, status: int) -> None:
        """Write a line of the request log; the answer does not depend on that."""
        try:
            self.log_request(status)
        except Exception:
            _log_exception("%s: the request log failed", self.client_address)

    def _answer_refusal(self, refusal: Refusal) -> None:
        """Answer with `refusal`, unless another answer has begun already."""
        if self._is_answered():
            logger.error("%s: %r came after the head", self.client_address, refusal)
            return
        with contextlib.suppress(OSError):  # The connection is lost.
            self._answer_with_text(refusal.status, refusal.text, refusal.headers)

    def _answer_as_full(self, reason: str) -> None:
        """Say that the server is full, in a way that makes an EventSource come back.

        It would not come back after any status but 200 (standard, 9.2.3).
        """
        logger.info("%s: refused, %s", self.client_address, reason.strip())
        accepts_stream = "text/event-stream" in self.headers.get("Accept", "")
        wants_stream = self._is_for_stream() or accepts_stream
        if self.command not in ("GET", "HEAD") or not wants_stream:
            retry_after = [("Retry-After", str(_FULL_RETRY // 1000))]
            self._answer_with_text(HTTPStatus.SERVICE_UNAVAILABLE, reason, retry_after)
            return
        body = b"retry: %d\n%b" % (_FULL_RETRY, encode_comment(reason.strip()))
        if self._answer_is_chunked:
            body = _encode_chunk(body) + _LAST_CHUNK
        self._send_head_and_body(HTTPStatus.OK, self._build_stream_head([]), body)

    def _build_stream_head(self, headers: Iterable[tuple[str, str]]) -> bytes:
        fields = [
            ("Content-Type", "text/event-stream"),
            # no-transform: a proxy that compresses would hold events back.
            ("Cache-Control", "no-cache, no-transform"),
            ("X-Accel-Buffering", "no"),  # nginx must not wait for more.
        ]
        if self._answer_is_chunked:
            fields.append(("Transfer-Encoding", "chunked"))
        return self._build_answer_head(HTTPStatus.OK, [*fields, *headers])

    def _build_answer_head(
        self, status: int, headers: Iterable[tuple[str, str]]
    ) -> bytes:
        """Return a head without sending it, because it leaves with the first frame.

        end_headers() writes to wfile, and a program may override it to add headers of
        its own. So it is called with another wfile.
        """
        # If the program has begun another head, it is dropped.
        self._headers_buffer: list[bytes] = []
        self._vary_values: list[str] = []
        head = io.BytesIO()
        wfile, self.wfile = self.wfile, head
        try:
            self.send_response_only(status)
            self.send_header("Server", self.version_string())
            self.send_header("Date", self.date_time_string())
            self.send_header("Connection", "close")
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
        finally:
            self.wfile = wfile
        # end_headers() has set this in answer to a HEAD, but the head is not sent yet.
        self._answer_writer.drops_body = False
        return head.getvalue()

    # Repairs to http.server. They override its methods.

    def setup(self) -> None:
        """Prepare the handler; http.server calls this first.

        Its own rfile is closed. Otherwise Client._end could not reset the connection:
        while a file shares a socket, socket.close() has no effect on the connection.
        """
        super().setup()
        self._connection_slot = self.server._slots[self.request]
        self.rfile.close()
        self._make_files()
        self._request_reader.deadline = time.monotonic() + self.server.head_timeout
        self._vary_values = []

    def finish(self) -> None:
        """Close in stages (RFC 9112, 9.6); http.server calls this last.

        Without this, an answer may be lost: closing a socket with unread input sends an
        RST, which may overtake the answer. So this sends our FIN, and reads up to the
        peer's FIN, for `linger` seconds at most, before the socket is closed.
        """
        super().finish()
        if not self._may_have_unread_input:
            return
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + self.linger
            while (seconds := deadline - time.monotonic()) > 0:
                self.connection.settimeout(seconds)
                if not self.connection.recv(2**16):
                    break

    def version_string(self) -> str:
        """Return the Server field. Without this, it shows the version of Python."""
        return self.server_version

    def send_response_only(self, code: int, message: str | None = None) -> None:
        """Begin a head. Without this, an interim one would count as the answer."""
        super().send_response_only(code, message)
        is_final = code >= HTTPStatus.OK or code == HTTPStatus.SWITCHING_PROTOCOLS
        self._head_is_interim = not is_final

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin a head. Without this, clients would reuse the connection."""
        super().send_response(code, message)
        self.send_header("Connection", "close")

    def send_header(self, keyword: str, value: str) -> None:
        """Add a line to the head. Without this, there could be several Vary lines."""
        if keyword.lower() == "vary":
            self._vary_values.append(value)
        else:
            super().send_header(keyword, value)

    def end_headers(self) -> None:
        """Send the head. Without this, a HEAD gets a body, and there is no CORS."""
        if self._head_is_interim:  # RFC 9110, 15.2: the answer will follow.
            super().end_headers()
            self._answer_writer.has_begun = False
            return
        if self.server.allowed_origins:
            for name, value in _cors_headers(self):
                self.send_header(name, value)
        if self._vary_values:
            super().send_header("Vary", ", ".join(dict.fromkeys(self._vary_values)))
            self._vary_values = []
        super().end_headers()
        self._answer_writer.drops_body = self.command == "HEAD"

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Answer with an error. Without this, it would be a page of HTML."""
        phrase, description = self.responses.get(code, ("", ""))
        self.log_error("code %d, message %s", code, message or phrase)
        self._answer_refusal(Refusal(code, f"{explain or message or description}\n"))


def _matches(pattern: str, path: str) -> bool:
    """Tell whether `path` is `pattern`, where `*` stands for any characters.

    >>> _matches("/a*/b", "/ax/b"), _matches("/a*/b", "/b"), _matches("a*a", "a")
    (True, False, False)

    A regular expression with several stars would backtrack, and take very long.
    """
    if "*" not in pattern:
        return path == pattern
    first, *middle, last = pattern.split("*")
    begin, end = len(first), len(path) - len(last)
    if begin > end or not (path.startswith(first) and path.endswith(last)):
        return False
    for part in middle:
        found = path.find(part, begin, end)
        if found < 0:
            return False
        begin = found + len(part)
    return True


# --- 5. Who gets in ---------------------------------------------------------------
#
# The nine lines answer everyone who can connect. That includes web pages from anywhere,
# if somebody who can connect has opened them in a browser.

# RFC 3986, 3.2. For "localhost#.evil" urlsplit() would return the host localhost.
_HOST = re.compile(
    r"""
    ( \[ (?P<address> [0-9a-f:.]+ ) \]     # [::1]
    | (?P<name> [^\s:/?#@\[\]\\]+ )        # example.org or 127.0.0.1
    )
    ( : [0-9]* )?                         # perhaps a port
    """,
    re.VERBOSE,
)
# How browsers write an origin (RFC 6454, 6.2).
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[1-9][0-9]*)?"
)
_DEFAULT_PORTS = ("http://", ":80"), ("https://", ":443")
_PREFLIGHT_SECONDS = 600


def _check_host(handler: SSERequestHandler) -> None:
    """Refuse a request whose Host is missing, ambiguous or not ours.

    A page can point its own host name at 127.0.0.1 ("DNS rebinding"). The browser then
    believes that page and server have the same origin, but its Host is that name.
    """
    hosts = handler.headers.get_all("Host", [])
    if len(hosts) > 1 or (not hosts and handler.request_version != "HTTP/1.0"):
        raise Refusal(HTTPStatus.BAD_REQUEST, "one Host is needed\n")  # RFC 9112, 3.2
    host = handler._request_host
    if host is None or handler._gets_built_in_okay():
        return
    name = _host_name(host)
    if name == "localhost" or name.endswith(".localhost") or _is_ip_address(name):
        return
    allowed = handler.server.allowed_hosts
    # On a network a machine may have many names, and we cannot know them.
    is_checked = bool(allowed) or _is_loopback(handler.connection)
    if is_checked and name not in allowed and "*" not in allowed:
        reason = f"Host {host!a} is not in allowed_hosts (--allow-host)\n"
        raise Refusal(HTTPStatus.FORBIDDEN, reason)


def _check_origin(handler: SSERequestHandler) -> None:
    """Refuse a request from a page of another origin, unless that is allowed."""
    origin = handler.headers.get("Origin")
    if origin is not None and _allowed_as(handler, origin):
        return
    # Fetch Metadata, 2.3: the browser itself says where the request comes from.
    site = handler.headers.get("Sec-Fetch-Site")
    if site is not None:
        is_own = site in ("same-origin", "none")
    elif origin is not None:
        # The scheme does not matter: a proxy in front of us may speak TLS.
        host = handler._request_host
        is_own = bool(host) and origin.lower().endswith(f"://{host}".lower())
    else:
        is_own = True
    if not is_own:
        who = "this page's origin" if origin is None else f"Origin {origin!a}"
        reason = f"{who} is not in allowed_origins (--allow-origin)\n"
        raise Refusal(HTTPStatus.FORBIDDEN, reason)


def _check_user(handler: SSERequestHandler) -> None:
    """Refuse a request for a stream unless the program's `authorize` lets it in."""
    authorize = handler.server.authorize
    answer = True if authorize is None else authorize(handler)
    if answer is True:
        return
    if not isinstance(answer, int) or answer not in range(200, 600):
        answer = HTTPStatus.FORBIDDEN
    raise _standard_refusal(answer)


def _allowed_as(handler: SSERequestHandler, origin: str) -> str:
    """Return what Access-Control-Allow-Origin says to `origin`, "" if it is refused."""
    allowed = handler.server.allowed_origins
    if origin.lower() in allowed and origin != "*":
        return origin
    is_origin = origin == "null" or _ORIGIN.fullmatch(origin.lower())
    return "*" if "*" in allowed and is_origin else ""


def _cors_headers(handler: SSERequestHandler) -> list[tuple[str, str]]:
    """Return the fields that let a page of an allowed origin read the answer.

    Fetch, 3.2. "*" and "null" stand for unknown pages. These may read, but not with
    the user's cookies.
    """
    headers = [("Vary", "Origin")]
    allowed_as = _allowed_as(handler, handler.headers.get("Origin", ""))
    if allowed_as:
        headers.append(("Access-Control-Allow-Origin", allowed_as))
    if allowed_as not in ("", "*", "null"):
        headers.append(("Access-Control-Allow-Credentials", "true"))
    return headers


def _is_preflight(handler: SSERequestHandler) -> bool:
    """Tell whether a browser is asking what a page of an allowed origin may send."""
    if handler.command != "OPTIONS":
        return False
    origin = handler.headers.get("Origin", "")
    is_asked = "Access-Control-Request-Method" in handler.headers
    return is_asked and _allowed_as(handler, origin) != ""


def _preflight_headers(handler: SSERequestHandler) -> list[tuple[str, str]]:
    """Return what a page of an allowed origin may send (Fetch, 4.8)."""
    asked = handler.headers.get("Access-Control-Request-Headers", "")
    return [
        ("Access-Control-Allow-Methods", ", ".join(handler._defined_methods())),
        ("Access-Control-Allow-Headers", asked),
        ("Access-Control-Max-Age", str(_PREFLIGHT_SECONDS)),
    ]


def _host_name(host: str) -> str:
    """Return the name in host[:port], or the address; "" if it is malformed.

    It is in lower case, and without the dot that may end a name.
    """
    match = _HOST.fullmatch(host.lower())
    if match is None:
        return ""
    return match["address"] or re.sub(r"\.$", "", match["name"])


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(connection: socket.socket) -> bool:
    """Tell whether the connection came in on a loopback address."""
    address = ipaddress.ip_address(connection.getsockname()[0].partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _allowed_host(entry: str) -> str:
    """Return an entry of allowed_hosts in its normal form; raise ValueError."""
    bare = entry[1:-1] if entry.startswith("[") and entry.endswith("]") else entry
    if entry == "*" or _is_ip_address(bare):
        return bare.lower()
    name = _host_name(entry)
    if not name or ":" in entry or "*" in entry or not entry.isascii():
        raise ValueError(f"allowed_hosts: {entry!r} is not a host without a port")
    return name


def _allowed_origin(entry: str) -> str:
    """Return an entry of allowed_origins in its normal form; raise ValueError."""
    origin = entry.lower()
    is_default = any(
        origin.startswith(scheme) and origin.endswith(port)
        for scheme, port in _DEFAULT_PORTS
    )
    is_origin = entry.isascii() and _ORIGIN.fullmatch(origin) and not is_default
    if entry in ("*", "null") or is_origin:
        return origin
    raise ValueError(f"allowed_origins: no browser sends {entry!r} as its origin")


# --- 6. The server ----------------------------------------------------------------
#
# ThreadingHTTPServer starts a thread for each connection, however many there are. A
# peer that sends half a head keeps its thread for ever. And when the program ends, its
# streams break off, perhaps in the middle of an event.

# Each connection has a slot of one of these kinds.
_REGULAR = "regular"
_SURPLUS = "surplus"  # It is over max_connections, and is told to come back later.
_LEAVING = "leaving"  # It gave way to a new one, and will be gone in a moment.
_MAX_SURPLUS = 64


class _Slot:
    """What the server knows about a connection. The server's lock guards changes."""

    __slots__ = ("awaits_head", "client", "kind", "thread")

    def __init__(self, thread: threading.Thread) -> None:
        self.thread = thread
        self.kind = _REGULAR
        self.awaits_head = True
        self.client: Client | None = None

    @property
    def is_regular(self) -> bool:
        return self.kind is _REGULAR


class SSEServer(ThreadingHTTPServer):
    """An HTTP server that holds event streams open, each in its request's own thread.

        def on_connection(client):
            client.send("hi there!")
            while not client.wait(1):  # one second, or until the client has gone
                client.send(time.ctime(), event="tick")

        SSEServer(("127.0.0.1", 8080), on_connection).run()

    `server_address`: host and port, IPv4 or IPv6; port 0 picks a free one.
    `on_connection`: called with each new `Client`, in the request's own thread. The
    stream stays open after it returns. If it raises an exception, that is logged and
    the stream ends. A BrokenPipeError from `send` on a closed stream is not logged.
    `path`: where the stream is; `*` stands for any characters, `/` included.
    `authorize`: called with the handler of each request for a stream, in its thread.
    True lets the request in, a status refuses it, and anything else means 403.
    `keepalive`: seconds of silence before a comment is sent; None: never.
    `retry`: the reconnection time that clients are told, in milliseconds.
    `max_connections`: open streams and other connections together. Further ones are
    told to come back later.
    `max_backlog`: bytes that may wait for a slow reader. If there are more when another
    thread wants to send, the stream is reset.
    `allowed_hosts`: names without a port by which browsers may reach the server,
    besides IP addresses and localhost; `"*"` allows all. If you give any, other names
    get 403 on every address, otherwise only on loopback addresses.
    `allowed_origins`: origins of other pages that may read streams and send requests,
    for example `"https://app.example"`. `"*"` allows all pages. Then they cannot read
    what needs cookies, but what they send may have cookies.

    Raises ValueError or TypeError if an argument makes no sense, OSError if the address
    is in use or does not exist.
    """

    # The listen backlog; the kernel has a limit of its own. With the 5 of http.server,
    # many clients that connect at once would have to try again a second later.
    request_queue_size = 65535
    # On Windows SO_REUSEADDR would let two servers have the same port.
    allow_reuse_address = os.name == "posix"

    head_timeout = 10.0
    """Seconds after which a request whose head is not complete is refused."""
    closing_grace = 1.0
    """Seconds that `server_close` gives slow readers to take what they were sent."""
    closing_timeout = 5.0
    """Seconds after which `server_close` returns, even if some requests still run."""

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
        if isinstance(allowed_hosts, str) or isinstance(allowed_origins, str):
            raise TypeError("allowed_hosts and allowed_origins are lists, not one str")
        self.allowed_hosts = frozenset(map(_allowed_host, allowed_hosts))
        self.allowed_origins = frozenset(map(_allowed_origin, allowed_origins))
        self._check_options(RequestHandlerClass)
        self._io_thread = _IOThread()
        # Guards all changes of the two below.
        self._lock = threading.Lock()
        self._slots: dict[socket.socket, _Slot] = {}  # the oldest first
        self._is_closing = False
        self.address_family, bindable = _resolve(server_address)
        super().__init__(bindable, RequestHandlerClass)

    def _check_options(self, handler_class: Any) -> None:
        base = socketserver.BaseRequestHandler
        if isinstance(self.on_connection, type) and issubclass(
            self.on_connection, base
        ):
            raise TypeError("a handler class goes into RequestHandlerClass=")
        is_class = isinstance(handler_class, type)
        if is_class and not issubclass(handler_class, SSERequestHandler):
            raise TypeError("the handler class must be an SSERequestHandler")
        if not self.path.startswith(("/", "*")):
            raise ValueError(f"path must start with / or *: {self.path!r}")
        if self.keepalive is not None and not self.keepalive > 0:
            raise ValueError("keepalive must be more than 0, or None")
        if self.retry is not None:
            encode_event(retry=self.retry)  # Raises what is wrong with it.
        if self.max_connections < 0 or self.max_backlog < 0:
            raise ValueError("max_connections and max_backlog must not be negative")

    @property
    def clients(self) -> frozenset[Client]:
        """The streams that are open at this moment."""
        with self._lock:
            clients = [slot.client for slot in self._slots.values()]
        return frozenset(client for client in clients if client and not client.closed)

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, then end every stream in good order.

        After the first of these signals both are ignored, even when this has returned,
        so that a second one does not interrupt the end of the program. Only the main
        thread may call this; others get a ValueError.
        """
        with self, _stopped_by_signals(self):
            self.serve_forever(poll_interval=0.1)

    def server_close(self) -> None:
        """Take no more connections, end every stream, wait for the requests' threads.

        Streams end after all that was sent and published before. A reader that has not
        taken that after `closing_grace` seconds is reset. Requests that still run after
        `closing_timeout` seconds are left to themselves.
        """
        super().server_close()
        begun = time.monotonic()
        with self._lock:
            self._is_closing = True
            slots = dict(self._slots)
        for request, slot in slots.items():
            if slot.client is not None:
                _call_or_reset(slot.client, slot.client.close)
            else:
                _shut_reading(request)  # Nothing more of a head or a body.
        threads = [slot.thread for slot in slots.values()]
        _join(threads, begun + self.closing_grace)
        for client in self._io_thread.clients.copy():
            client._end("the server is closing")
        _join(threads, begun + self.closing_timeout)
        self._io_thread.stop()

    # Connections and streams.

    def _admit(self, request: socket.socket, thread: threading.Thread) -> bool:
        """Make a slot for a new connection; False if there are too many.

        There are max_connections regular slots, and 64 surplus ones for connections
        that are told to come back later.
        """
        slot = _Slot(thread)
        with self._lock:
            if self._is_closing:
                return False
            self._io_thread.start()
            if not self._make_room(_REGULAR, self.max_connections):
                if not self._make_room(_SURPLUS, _MAX_SURPLUS):
                    return False
                slot.kind = _SURPLUS
            self._slots[request] = slot
            return True

    def _make_room(self, kind: str, limit: int) -> bool:
        """Make sure that a slot of that kind is free; False if it is not (locked).

        If all are taken, the connection whose head has been awaited longest gives way:
        peers that connect and then say nothing must not keep everyone else out.
        """
        if len(self._slots) < limit:  # This spares us the loop.
            return True
        taken = {
            request: slot for request, slot in self._slots.items() if slot.kind is kind
        }
        if len(taken) < limit:
            return True
        for request, slot in taken.items():  # the oldest first
            if slot.awaits_head:
                slot.kind = _LEAVING
                _shut_reading(request)  # Its thread finds the end of the input.
                return True
        return False

    def _note_complete_head(self, slot: _Slot) -> None:
        """Note that a connection does not have to give way any more."""
        with self._lock:
            slot.awaits_head = False

    def _add_stream(self, slot: _Slot, client: Client) -> bool:
        """Have the I/O thread watch a stream; False if it cannot."""
        # If the peer does not acknowledge what it is sent within this time, the kernel
        # ends the connection. Its default is some 15 minutes. Other connections keep
        # that: a client that pauses a download is not dead.
        timeout = min(max(30, client.stall_timeout), 86_400)
        _set_tcp_option(client._socket, "TCP_USER_TIMEOUT", int(timeout * 1000))
        with client._lock:
            if not self._io_thread.add(client):
                return False
            with self._lock:
                slot.client = client  # From now on server_close() closes it.
                is_closing = self._is_closing
            if is_closing:
                client.close()
        return True

    # What socketserver calls.

    def server_bind(self) -> None:
        """Bind. HTTPServer would also look up the host's name, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = self.server_address[1]

    def server_activate(self) -> None:
        """Listen, and have the kernel check whether silent peers still exist.

        The accepted connections inherit these options. Without them, a peer that has
        vanished would never be noticed while nothing is sent to it.
        """
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in ("KEEPIDLE", 20), ("KEEPINTVL", 10), ("KEEPCNT", 3):
            _set_tcp_option(self.socket, f"TCP_{name}", value)
        super().server_activate()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `shutdown()` is called by another thread."""
        with self._lock:
            self._io_thread.start()  # Early, while there are descriptors for it.
        super().serve_forever(poll_interval)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection. If the system has no room for it, pause a moment."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                logger.warning("no new connections for now: %s", error.strerror)
                time.sleep(0.2)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the request, unless there are too many."""
        thread = _RequestThread(self, request, client_address)
        if self._admit(request, thread):
            thread.start()
        else:
            logger.info("%s: closed, there is no slot for it", client_address)
            self.shutdown_request(request)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Make a handler, which handles the request in its __init__.

        From CPython 3.11 on, calling a class takes room on the C stack, and calling a
        Python function does not. Without the first kind of call the thread needs one
        page of its stack less, and an idle stream takes 19 kB instead of 23. That is
        also the reason for _RequestThread.
        """
        make: Any = self.RequestHandlerClass
        is_class = isinstance(make, type)
        if is_class:
            handler = make.__new__(make, request, client_address, self)
            handler.__init__(request, client_address, self)
        else:  # functools.partial, for example
            make(request, client_address, self)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and forget it."""
        super().shutdown_request(request)
        with self._lock:
            self._slots.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error from outside of handle_one_request."""
        error = sys.exc_info()[1]
        is_lost = getattr(error, "errno", None) in (errno.EINVAL, errno.ENOTCONN)
        if is_lost or isinstance(error, ConnectionError):
            logger.debug("%s: connection lost", client_address, exc_info=True)
        else:
            logger.exception("%s: request failed", client_address)


class _RequestThread(threading.Thread):
    """Like Thread(target=...), but without a C function between two Python functions.

    SSEServer.finish_request gives the reason.
    """

    def __init__(self, server: SSEServer, request: Any, client_address: Any) -> None:
        super().__init__(daemon=server.daemon_threads)
        self._arguments = server, request, client_address

    def run(self) -> None:
        server, request, client_address = self._arguments
        server.process_request_thread(request, client_address)


def _set_tcp_option(connection: socket.socket, name: str, value: int) -> None:
    """Set a TCP option if the system has it. Windows and macOS lack some of them."""
    if hasattr(socket, name):
        with contextlib.suppress(OSError):  # The peer may have gone already (macOS).
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _shut_reading(connection: socket.socket) -> None:
    """Let the thread that reads from the connection find the end of its input."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)


def _resolve(address: tuple[str, int]) -> tuple[socket.AddressFamily, Any]:
    """Find the family and the address to bind. If a name has both, take IPv4."""
    host, port = address[:2]
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except UnicodeError:  # "a..b", for example.
        raise OSError(errno.EINVAL, f"{host!r} is not the name of a host") from None
    family, _, _, _, bindable = min(found, key=lambda info: info[0] != socket.AF_INET)
    return family, bindable


def _join(threads: Iterable[threading.Thread], deadline: float) -> None:
    for thread in threads:
        # A thread that has not started yet does not matter: if it begins a stream, that
        # is closed at once or refused.
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join(max(deadline - time.monotonic(), 0))


@contextlib.contextmanager
def _stopped_by_signals(server: SSEServer) -> Iterator[None]:
    """Call `server.shutdown()` when the first SIGINT or SIGTERM comes."""
    is_stopping = False

    def stop(*_: object) -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            # shutdown() waits for serve_forever(), which runs in this thread, so it
            # needs another thread. It is not a threading.Thread, because this signal
            # may have interrupted Thread.start(), which must not be entered twice.
            _thread.start_new_thread(server.shutdown, ())

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous):
            signal.signal(number, signal.SIG_IGN if is_stopping else handler)


# --- 7. The command line ----------------------------------------------------------

_OTHER_DESCRIPTORS = 128  # for surplus connections, and what else Python opens


def main(arguments: list[str] | None = None) -> None:
    """Run the server from the command line, until SIGINT or SIGTERM."""
    if sys.stderr is None:  # It is closed; http.server writes its log there.
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    parser = _parser()
    options = parser.parse_args(arguments)
    _raise_descriptor_limit(options.max_connections + _OTHER_DESCRIPTORS)
    # While lines come fast, the thread that reads them never pauses. With this, other
    # threads wait 0.5 ms for the interpreter each time, instead of 5 ms.
    sys.setswitchinterval(0.0005)
    lines = Channel() if options.source == "-" else None
    if lines:
        lines.min_log_size = 2**23  # A file may come faster than readers take it.
    try:
        server = _make_server(options, lines.subscribe if lines else _say_hi)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    except OSError as error:
        where = f"{options.host} port {options.port}"
        sys.exit(f"sse_ref: cannot listen on {where}: {error.strerror}")
    with server, _stopped_by_signals(server):
        print(_greeting(server), flush=True)
        if lines and sys.stdin:  # It is None if it is closed.
            threading.Thread(target=_publish_lines, args=(lines,), daemon=True).start()
        server.serve_forever(poll_interval=0.1)
        if lines:
            # The streams get what was published up to here. If that is much, it must
            # not keep the program from ending, which has two seconds for everything.
            lines._close(timeout=0.5)


def _say_hi(client: Client) -> None:
    client.send("hi there!")


def _make_server(
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
    add("--port", type=_port, default=8080, help="%(default)s; 0 picks one")
    add("--path", default="/sse", help="%(default)s; * is any characters")
    add("--keepalive", type=float, default=15, metavar="S", help="%(default)s; 0: none")
    add("--retry", type=int, metavar="MS", help="reconnection time, milliseconds")
    add("--max-connections", type=int, default=1000, metavar="N", help="%(default)s")
    add("--allow-origin", **several, metavar="O", help="https://app.example, say, or *")
    add("--allow-host", **several, metavar="H", help="a name without a port, or *")
    return parser


def _port(text: str) -> int:
    port = int(text)
    if port not in range(2**16):
        raise argparse.ArgumentTypeError(f"{port} is not between 0 and 65535")
    return port


def _greeting(server: SSEServer) -> str:
    host, port = server.server_name, server.server_port
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    stream = shlex.quote(url + server.path)
    return f"Starting server... {url}\n  curl {shlex.quote(url)}\n  curl -N {stream}"


def _publish_lines(channel: Channel) -> None:
    """Publish each line of standard input as soon as it is there, until its end."""
    try:
        for line in _read_lines(sys.stdin.fileno()):
            channel.publish(line.decode(errors="replace"))
    except RuntimeError:
        pass  # The channel is closed: the server ends.
    except OSError as error:
        logger.error("standard input cannot be read: %s", error.strerror)


def _read_lines(descriptor: int) -> Iterator[bytearray]:
    # sys.stdin is not used: a thread inside it at exit would abort the process.
    rest = bytearray()
    while piece := os.read(descriptor, 2**16):
        rest += piece
        if b"\n" in piece:
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield line[:-1] if line.endswith(b"\r") else line
    if rest:
        yield rest


def _raise_descriptor_limit(needed: int) -> None:
    """Allow this process as many descriptors as it needs, if the system lets it."""
    try:
        import resource  # noqa: PLC0415 - Windows does not have it.
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        # Without a hard limit the system may still have one of its own (macOS).
        with contextlib.suppress(OSError, OverflowError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


if __name__ == "__main__":
    main()
