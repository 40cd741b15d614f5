# SPDX-License-Identifier: 0BSD
r"""Server-sent events on Python's own http.server: a reference to run, paste and read.

    python sse_ref.py
    curl http://localhost:8080            # prints okay, and the connection closes
    curl -N http://localhost:8080/sse     # prints data: hi there!, and stays open

An event stream is an HTTP response that does not end. A browser reads it with
`new EventSource(url)`. With http.server alone it takes ten lines:

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            while True:
                self.wfile.write(f"data: {time.ctime()}\n\n".encode())
                time.sleep(1)

    ThreadingHTTPServer(("127.0.0.1", 8080), Handler).serve_forever()

The rest of this file is there for what these ten lines do not do:

    1. An event          text with line breaks, types, IDs
    2. One stream        any thread may send, slow readers, leaving at once, a good end
    3. Many streams      one publish for all, and nothing lost on a reconnect
    4. A request         malformed heads, bodies, errors, a stream in answer to a POST
    5. Who gets in       pages of other origins, users
    6. The server        too many connections, slow ones, an orderly stop
    7. The command line

Chapters 1 to 3 are about event streams. Read them first. Chapters 4 to 7 are about
serving them with http.server.

The life of a stream, and the thread that takes each step:

    step                                 method                           thread
    ----                                 ------                           ------
    accept, start a thread               SSEServer.process_request        accepting
    read the head                        SSERequestHandler._read_head     request's own
    check the Host, find do_GET          SSERequestHandler._call_method   request's own
    check the Origin and the user        SSERequestHandler.serve_stream   request's own
    run the program's part               on_connection                    request's own
    send the head and an event           Client.send                      any
    send one event to all subscribers    Channel._fan_out                 fan-out
    send what the kernel did not take    Client._advance                  I/O
    send what a slow subscriber missed   Channel._catch_up                I/O
    send a keep-alive comment            Client._check_deadline           I/O
    notice that the peer has left        Client._on_ready                 I/O
    end the stream                       Client.close                     any
    run the on_close callbacks           Client._finish                   request's own
    close the connection                 SSEServer.shutdown_request       request's own

So besides the thread that accepts connections, which called `serve_forever` or `run`,
there are three kinds of threads:

  * One thread per request runs the handler and `on_connection`. Then it sleeps until
    the stream ends.
  * One I/O thread per server watches all open streams with a selector. It also does
    what is due at a certain time, whatever the request's thread is doing.
  * One fan-out thread per channel writes each event to the channel's subscribers. It
    exists while there are subscribers.

The server, each client, each channel and the I/O thread have one lock each. A thread
that holds a client's lock may take the lock of a channel or of the I/O thread. No other
two of these locks are held together, so they cannot lead to a deadlock.

These words have one meaning each:

    frame    some whole lines: an event or a comment
    piece    several frames that are written at once
    chunk    a frame or a piece with its size in front, as HTTP/1.1 sends it
    wire     bytes as they go to the kernel
    backlog  wire that the kernel has not taken yet
    place    the number of the last event that a channel has written to a subscriber

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

# Standard, 9.2.5: a line ends with CR LF, CR or LF. str.splitlines() would also break
# at U+2028, U+0085, form feed and others, which are data.
_LINE_BREAK = re.compile(r"\r\n|\r|\n")


def encode_event(
    data: str | None = None,
    *,
    event: str | None = None,
    id: str | int | None = None,
    retry: int | None = None,
) -> bytes:
    r"""Return one event as it goes over the wire: a line per field, then a blank line.

    >>> encode_event("one\ntwo", event="news", id=7)
    b'event: news\nid: 7\ndata: one\ndata: two\n\n'

    `data` is the text of the event; `""` is an event with empty data. `event` is its
    type; without one it is a "message". `id` becomes the client's last event ID; `""`
    resets it. `retry` is the reconnection time in milliseconds.

    Raises TypeError if a field has another type. Raises ValueError if no field is
    given, and for what a reader would not get back: a line break in `event` or `id`, a
    NUL in `id`, a negative `retry`, a lone surrogate.
    """
    lines = []
    if event is not None:
        lines.append("event: " + _one_line("event", event))
    if retry is not None:
        if not _is_int(retry):
            raise TypeError(f"retry must be int, not {type(retry).__name__}")
        if retry < 0:  # The standard, 9.2.6, ignores all but ASCII digits.
            raise ValueError("retry must not be negative")
        lines.append(f"retry: {int(retry)}")
    if id is not None:
        lines.append("id: " + _id_text(id))
    if data is not None:
        # Standard, 9.2.6: the reader joins the data lines of an event with LF.
        lines += ["data: " + line for line in _lines("data", data)]
    if not lines:
        raise ValueError("an event needs at least one of data, event, id and retry")
    return "\n".join([*lines, "", ""]).encode()  # Standard, 9.2.5: always UTF-8.


def encode_comment(text: str = "") -> bytes:
    """Return `text` as comment lines, which every reader ignores (standard, 9.2.6).

    No blank line follows: it would dispatch nothing, but some clients report an empty
    event at every blank line.

    Raises TypeError if `text` is not str, ValueError if it holds a lone surrogate.
    """
    return "".join(f": {line}\n" for line in _lines("a comment", text)).encode()


def _lines(name: str, text: object) -> list[str]:
    if not isinstance(text, str):
        advice = "; json.dumps() turns other values into one" if name == "data" else ""
        raise TypeError(f"{name} must be str, not {type(text).__name__}{advice}")
    # The parts are of type str, even if `text` is of a subclass with its own __str__.
    return _LINE_BREAK.split(text)


def _one_line(name: str, text: object) -> str:
    line, *more = _lines(name, text)
    if more:  # A second line would be another field.
        raise ValueError(f"{name} must not contain a line break")
    return line


def _id_text(id_: str | int) -> str:
    text = str(int(id_)) if _is_int(id_) else _one_line("id", id_)
    if "\0" in text:  # Standard, 9.2.6: an id that contains U+0000 is ignored.
        raise ValueError("id must not contain NUL")
    return text


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _encode_chunk(frames: bytes) -> bytes:
    """Return `frames` as one chunk of a chunked body (RFC 9112, 7.1).

    The standard, 9.2.7, warns of layers that make chunks without knowing when events
    come, because they delay them. Here what is written at once becomes one chunk.
    """
    return b"%x\r\n%b\r\n" % (len(frames), frames)


_LAST_CHUNK = b"0\r\n\r\n"
_FIRST_COMMENT = b": ok\n"
_KEEPALIVE = encode_comment("keep-alive")


# --- 2. One stream ----------------------------------------------------------------


# The states of a Client, in their order. HEAD_PENDING and OPEN may lead to ENDED, too.
#
# state         entered by                 send() then             still delivered
# -----         ----------                 -----------             ---------------
# HEAD_PENDING  serve_stream()             sends the head, too     -
# OPEN          _write(): the first send,  sends                   everything
#               comment, wait, subscribe
#               or close; or the I/O
#               thread after half a second
# DRAINING      close()                    raises BrokenPipeError  what was sent or
#                                                                  published before
# ENDED         _end(): nothing is left    raises BrokenPipeError  what the kernel has,
#               to send; the peer has                              but nothing if the
#               left; or it is reset,                              stream was reset
#               because it is too slow
#
# Client.closed is True in DRAINING and ENDED: nothing more can be sent. In HEAD_PENDING
# on_connection may still raise a Refusal; then _withdraw() leads to ENDED.
_HEAD_PENDING = "head pending"
_OPEN = "open"
_DRAINING = "draining"
_ENDED = "ended"

_READ = selectors.EVENT_READ
_READ_AND_WRITE = selectors.EVENT_READ | selectors.EVENT_WRITE
_SMALL_PIECE = 2**13  # bytes; up to this size parts of the backlog are joined
_LARGE_FRAME = 2**18  # bytes; from this size on a frame is not copied


class Client:
    """One open event stream, as `on_connection` gets it.

    `last_event_id`: the ID of the last event that the client has seen, "" if none.
    `path`, `query`, `headers`: from its request; `path` has no query string.
    `address`: the host and port of the peer.

    A program may set attributes of its own, for example `client.user = "ada"`. Any
    thread may call any method, except `wait`.
    """

    stall_timeout = 30.0
    """Seconds after which a stream is ended whose backlog does not move."""
    head_delay = 0.5
    """Seconds after which the head is sent even if nothing else was sent."""
    max_input = 2**16
    """Bytes that a client may send on an open stream before it is cut off."""

    def __init__(self, handler: SSERequestHandler, head: bytes) -> None:
        self.address: Any = handler.client_address
        self.headers: Message = handler.headers
        self.path, _, self._query = handler._target.partition("?")
        self.last_event_id = _undo_latin_1(self.headers.get("Last-Event-ID", ""))

        self._server = handler.server
        self._io_thread = handler.server._start_io_thread()
        self._socket: socket.socket = handler.connection
        self._is_chunked = handler._is_chunked()
        self._own_thread = threading.get_ident()
        self._wakeup = _Wakeup()  # wakes that thread

        # Guards writing to the socket, and changes of all that follows.
        self._lock = threading.RLock()
        self._state = _HEAD_PENDING
        self._head = head
        self._last_write = time.monotonic()  # when it last wrote, or began to wait
        # The backlog: what the kernel has not taken yet. Of its first piece the kernel
        # has taken _offset bytes.
        self._backlog: list[bytes] = []
        self._backlog_size = 0  # bytes
        self._offset = 0
        # _drained counts the bytes that have left the backlog since the beginning. The
        # request's own thread sleeps until there are _awaited of them.
        self._drained = 0
        self._awaited: float = inf
        self._has_last_chunk = False  # It was sent, or is in the backlog.
        self._subscriptions: dict[Channel, _Subscription] = {}
        self._has_resumed = False  # A channel with a history has used last_event_id.
        # What the I/O thread watches the socket for: 0, _READ, or _READ_AND_WRITE
        # while there is something that the socket must take first.
        self._interest = 0
        self._received = 0  # bytes that the peer has sent on the open stream
        self._reset_reason = ""
        self._callbacks: list[Callable[[Client], object]] = []

    @property
    def query(self) -> dict[str, list[str]]:
        """The values of the query string by name, blank ones included."""
        return parse_qs(self._query, keep_blank_values=True)

    @property
    def closed(self) -> bool:
        """True as soon as nothing more can be sent, whoever has ended the stream."""
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
        backlog, and the I/O thread sends it. Only the request's own thread waits until
        what it sent has left the backlog; so a producer there keeps its reader's pace.

        Raises BrokenPipeError if the stream has ended; let it pass out of
        `on_connection`. Raises what `encode_event` raises; then nothing is sent.
        """
        self._send(encode_event(data, event=event, id=id, retry=retry))

    def comment(self, text: str = "") -> None:
        """Send `text` as a comment, which readers ignore; otherwise like `send`."""
        self._send(encode_comment(text))

    def wait(self, timeout: float | None = None) -> bool:
        """Hold the stream for `timeout` seconds, or until it ends; return `closed`.

        Without a timeout it returns when the stream ends. Only the request's own thread
        may call this; RuntimeError otherwise.
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
        the rest.
        """
        with self._lock:
            if self.closed:
                return
            self._send_head()
            if self._state is _ENDED:
                return
            self._state = _DRAINING
            for channel, subscription in self._subscriptions.items():
                # What is published later is not for this stream any more.
                subscription.stop = channel._count
            self._advance()
        self._wakeup.set()

    def on_close(self, callback: Callable[[Client], object]) -> None:
        """Call `callback(client)` once, in the request's own thread, after the end.

        If the stream has ended already, this thread calls it at once.
        """
        with self._lock:
            if self._state is not _ENDED:
                self._callbacks.append(callback)
                return
        callback(self)

    # How bytes leave. A method marked "(locked)" is called with the client's lock held.
    #
    #   send, comment -> _send -> _write -> _transmit -> the kernel, or else _backlog
    #   Channel._fan_out ------------------> _transmit
    #   the I/O thread, close, Channel.subscribe -> _advance -> _flush -> the kernel
    #                                               _advance -> _catch_up -> _write
    #
    # _write encodes: it adds the head and makes a chunk. _transmit takes bytes as they
    # are. _advance does what comes next, now that the socket takes more. _send_head,
    # keep-alive comments and the first frame for a subscriber go through _write, too.

    def _send(self, frames: bytes) -> None:
        is_own_thread = threading.get_ident() == self._own_thread
        try:
            with self._lock:
                # The test comes before the frames are added, so a frame that is larger
                # than the limit does no harm by itself.
                is_full = self._backlog_size > self._server.max_backlog
                if is_full and not is_own_thread and self._state is _OPEN:
                    self._end("its backlog is over max_backlog")
                if self.closed:
                    raise BrokenPipeError(errno.EPIPE, "the event stream has ended")
                self._write(frames)
                if self._state is _ENDED:  # The peer has left; the kernel said so.
                    raise BrokenPipeError(errno.EPIPE, "the event stream has ended")
                target = self._drained + self._backlog_size
                if is_own_thread:
                    self._awaited = target
        except BrokenPipeError:
            raise
        except BaseException:  # Ctrl-C, for example: half of a chunk may be out.
            _release_if_owned(self._lock)
            self._reset("an exception interrupted a send")
            raise
        if is_own_thread:
            self._sleep_until(lambda: self._drained >= target or self._has_ended())
            if self._drained < target:
                raise BrokenPipeError(errno.EPIPE, "the event stream has ended")

    def _send_head(self) -> None:
        """Send the head if it is still pending (locked)."""
        if self._state is _HEAD_PENDING:
            self._write(b"")

    def _write(self, frames: bytes) -> None:
        """Encode and transmit `frames`, after the head if that is pending (locked)."""
        head = b""
        if self._state is _HEAD_PENDING:
            self._state = _OPEN
            head, self._head = self._head, b""
            retry = self._server.retry
            if retry is not None:
                frames = b"retry: %d\n%b" % (retry, frames)
            elif not frames:
                # Proxies and browsers wait for the body to begin.
                frames = _FIRST_COMMENT
        if not frames:
            return
        if not self._is_chunked:
            self._transmit(head + frames)
        elif len(frames) < _LARGE_FRAME:
            self._transmit(head + _encode_chunk(frames))
        else:  # Many streams may have it in their backlog; they share one copy.
            self._transmit(b"%b%x\r\n" % (head, len(frames)))
            self._transmit(frames)
            self._transmit(b"\r\n")

    def _transmit(self, wire: bytes) -> None:
        """Hand `wire` to the kernel; what it does not take is backlog (locked)."""
        if self._state is _ENDED:
            return
        sent = 0
        if not self._backlog:
            self._last_write = time.monotonic()
            try:
                sent = self._socket.send(wire)
            except BlockingIOError:
                pass
            except OSError:
                self._end()
                return
            if sent == len(wire):
                return
            self._offset = sent
        self._backlog_size += len(wire) - sent
        if self._backlog and len(self._backlog[-1]) + len(wire) < _SMALL_PIECE:
            # Many small pieces would take more memory than they hold.
            self._backlog[-1] += wire
        else:
            self._backlog.append(wire)
        self._watch_for_writing()

    def _advance(self) -> None:
        """Send what comes next: backlog, then missed events, then the end (locked).

        It sends at most one piece of each, so that the other streams get their turn.
        """
        is_behind = False
        if self._backlog:
            self._flush()
        for channel, subscription in list(self._subscriptions.items()):
            if not self._backlog and channel._catch_up(subscription):
                is_behind = True
        if self._state is _DRAINING and not self._backlog and not is_behind:
            if self._is_chunked and not self._has_last_chunk:
                self._has_last_chunk = True
                self._transmit(_LAST_CHUNK)
            if not self._backlog:
                self._end()
        if self._backlog or is_behind:
            self._watch_for_writing()
        else:
            self._io_thread.watch(self, _READ)

    def _watch_for_writing(self) -> None:
        """Have the I/O thread call `_advance` when the socket takes more (locked)."""
        if self._interest == _READ:
            self._last_write = time.monotonic()  # From now on it may be stalled.
            self._io_thread.watch(self, _READ_AND_WRITE)

    def _flush(self) -> None:
        """Hand the kernel what it takes of the first piece of the backlog (locked)."""
        piece = self._backlog[0]
        try:
            sent = self._socket.send(memoryview(piece)[self._offset :])
        except BlockingIOError:
            return
        except OSError:
            self._end()
            return
        self._last_write = time.monotonic()
        self._backlog_size -= sent
        self._drained += sent
        self._offset += sent
        if self._offset == len(piece):
            del self._backlog[0]
            self._offset = 0
        if self._drained >= self._awaited:
            self._awaited = inf
            self._wakeup.set()

    def _end(self, reset_reason: str = "") -> None:
        """Enter ENDED: all is out, or nothing more can get out (locked).

        Without a reason the peer gets our FIN. With a reason it gets an RST, and the
        kernel drops what it holds for it (RFC 9293, 3.10.4). For that the socket is
        closed at once, because the request's own thread may be busy for long.
        """
        if self._state is _ENDED:
            return
        self._reset_reason = reset_reason
        self._state = _ENDED
        self._backlog.clear()
        self._backlog_size = 0
        for channel, subscription in self._subscriptions.items():
            channel._remove(subscription)
        self._subscriptions.clear()
        self._io_thread.remove(self)
        with contextlib.suppress(OSError):
            if reset_reason:
                _close_with_reset(self._socket)
            else:
                self._socket.shutdown(socket.SHUT_WR)
        self._wakeup.set()

    # What the I/O thread calls.

    def _on_ready(self, events: int) -> None:
        """Read from the socket, or write to it, now that this does not block."""
        with self._lock:
            if events & selectors.EVENT_READ and self._state is not _ENDED:
                self._read()
            if events & selectors.EVENT_WRITE and self._state is not _ENDED:
                self._advance()

    def _read(self) -> None:
        """Notice that the peer has left; what else it sends is of no use (locked)."""
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

    def _check_deadline(self, now: float) -> None:
        """Do what is due at `now`; called several times a second."""
        with self._lock:
            silence = now - self._last_write
            if self._state is _HEAD_PENDING:
                if silence >= self.head_delay:
                    self._send_head()
            elif self._interest == _READ_AND_WRITE:  # It waits for its reader.
                if silence >= self.stall_timeout:
                    self._end("it has stopped reading")
            elif self._state is _OPEN and silence >= (self._server.keepalive or inf):
                self._write(_KEEPALIVE)

    def _reset(self, reason: str) -> None:
        """End the stream with an RST, if it has not ended; any thread may call this."""
        with self._lock:
            self._end(reason)

    # What the request's own thread does.

    def _has_ended(self) -> bool:
        return self._state is _ENDED

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
        """Give the stream up if its head is still pending; tell whether it was."""
        with self._lock:
            is_pending = self._state is _HEAD_PENDING
            if is_pending:
                self._state = _ENDED
                self._io_thread.remove(self)
            return is_pending

    def _finish(self) -> None:
        """Close, wait until everything is out, then run the on_close callbacks."""
        self.close()
        self._sleep_until(self._has_ended)
        if self._reset_reason:
            logger.warning("%s: reset, %s", self.address, self._reset_reason)
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except BaseException:
                logger.exception("%s: a callback of on_close failed", self.address)


def _undo_latin_1(value: str) -> str:
    """Return a header's value as UTF-8, which Last-Event-ID is (standard, 9.2.4).

    http.server reads headers as Latin-1. What is not UTF-8 stays as it is: fetch() in
    Node sends Latin-1.
    """
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def _close_with_reset(connection: socket.socket) -> None:
    no_linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
    connection.close()


# --- 3. Many streams --------------------------------------------------------------


class _Event(NamedTuple):
    """One published event, as the log of a channel holds it."""

    id: str
    frame: bytes
    total: int  # bytes published on the channel, this event included


class _Subscription:
    """One client's place in the log of one channel; guarded by the client's lock."""

    __slots__ = ("client", "last_id", "place", "stop")

    def __init__(self, client: Client, place: int, last_id: str) -> None:
        self.client = client
        self.place = place  # the number of the last event that was written to it
        self.last_id = last_id  # the last ID that the client knows
        self.stop: int | None = None  # the number of the event after which it ends


class Channel:
    """Events for all subscribers. A client that reconnects gets what it missed.

    >>> news = Channel()
    >>> server = SSEServer(("127.0.0.1", 8080), news.subscribe)
    >>> news.publish("hello", event="greeting")
    'b3c1a9f2-1'

    `history`: how many events are kept for clients that reconnect. With 0 there is no
    replay, and events have no IDs but those that the program gives them.
    `gap_event`: the type of the event that tells a client that the history no longer
    holds what it has missed; its data is the client's last event ID. None: no such
    event.

    Any thread may call any method.

    How it works: the events have the numbers 1, 2, 3 and so on, and stand in a log. The
    fan-out thread takes those that were published since it last did so. Each subscriber
    has a place in the log, the number of the last event that was written to it:

         _first             the place of one         _taken            _count
           |                that is behind             |                 |
        ---+----------------------+--------------------+-----------------+---> log
           older ones are dropped    what it has missed    the next piece

    A subscriber that keeps up has its place at _taken. The fan-out thread writes the
    next piece to all of these. It leaves the others alone: they are behind, because
    their kernel buffers were full, or because they have reconnected. When the socket of
    one that is behind takes more, the I/O thread writes missed events to it, one piece
    at a time, until its place is at _taken as well. So a slow reader needs no copy of
    what it has missed, only its place. A place moves only together with a write, under
    the client's lock. That is why no event is lost or sent twice, whichever of the two
    threads comes first. If the log drops events that a subscriber has missed, it is
    told so by a gap event.
    """

    piece_size = 2**18
    """Bytes that are written to one stream at once, or one event if it is larger."""
    max_pending = 2**22
    """Bytes published and not yet taken by the fan-out, after which publish() waits."""
    min_log_size = 2**20
    """Bytes that the log keeps at least for subscribers that are behind."""

    def __init__(self, history: int = 1000, gap_event: str | None = "gap") -> None:
        if history < 0:
            raise ValueError("history must not be negative")
        if gap_event is not None:
            encode_event("", event=gap_event)  # Raises what is wrong with it.
        self._history = history
        self._gap_event = gap_event
        # IDs from an earlier start of the program must not be taken for ours.
        self._epoch = secrets.token_hex(4)
        self._fan_out_wakeup = _Wakeup()
        self._publisher_wakeup = _Wakeup()  # for one that waits for the fan-out

        # Guards all that follows.
        self._lock = threading.RLock()
        # The log. Number 0 is the beginning; it always stays. After it come the events
        # from _first to _count; the fan-out has taken those up to _taken.
        self._log = {0: _Event(f"{self._epoch}-0", b"", 0)}
        self._first = 1
        self._count = 0
        self._taken = 0
        self._count_size = self._taken_size = 0  # bytes published up to there
        self._numbers: dict[str, int] = {}  # of the events whose IDs the program named
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

        The arguments are those of `encode_event`. Without `id` the event gets one that
        no other start of the program uses ("" if there is no history). Give IDs of your
        own where several replicas publish the same events, for example their offset in
        a log; a client can then resume on any replica.

        It never waits for a reader. It does wait while more than `max_pending` bytes
        are published that the fan-out thread has not taken yet.

        Raises RuntimeError if the channel is closed, and what `encode_event` raises.
        """
        self._wait_for_fan_out()
        try:
            return self._append(data, event, id)
        except BaseException:
            _release_if_owned(self._lock)
            raise
        finally:
            self._fan_out_wakeup.set()

    def subscribe(
        self, client: Client, *, after: str | int | None = None, last: int = 0
    ) -> None:
        """Send `client` all that is published from now on, and first what it missed.

        What it missed are the events after its last event ID, or after the ID `after`
        if that is given. A client that names no ID gets the newest `last` events. If
        the history no longer holds the ID, it gets a gap event and all that is held.

        It returns as soon as the client's place is known. If the channel is closed, the
        client gets what it missed, and after `close(end_streams=True)` its end. To
        subscribe a client again changes nothing.

        Raises BrokenPipeError if the stream has ended. Raises ValueError if `last` is
        negative, or if the client is subscribed to another channel with a history:
        a client remembers one last event ID only.
        """
        if last < 0:
            raise ValueError("last must not be negative")
        with client._lock:
            last_id = "" if client._has_resumed else client.last_event_id
            if after is not None:
                last_id = _id_text(after)
            if client.closed:
                raise BrokenPipeError(errno.EPIPE, "the event stream has ended")
            if self in client._subscriptions:
                return
            others = [channel for channel in client._subscriptions if channel._history]
            if self._history and others:
                raise ValueError("the client is subscribed to another history already")
            with self._lock:
                place, last_id, greeting = self._place_of(last_id, last)
                subscription = _Subscription(client, place, last_id)
                self._start_fan_out()
                self._subscriptions[subscription] = None
                ends_streams = self._ends_streams
            client._subscriptions[self] = subscription
            client._has_resumed = client._has_resumed or bool(self._history)
            if greeting:
                client._write(greeting)
            client._advance()  # Missed events, or at least the head.
        if ends_streams:
            client.close()

    def unsubscribe(self, client: Client) -> None:
        """Send `client` no more of what is published."""
        with client._lock:
            subscription = client._subscriptions.pop(self, None)
            if subscription is not None:
                self._remove(subscription)

    def close(self, end_streams: bool = False) -> None:
        """Publish no more. What was published is still delivered.

        The streams stay open; with `end_streams` each ends after its last event. It
        returns when the fan-out thread has ended.
        """
        with self._lock:
            self._closed = True
            self._ends_streams = self._ends_streams or end_streams
            fan_out_thread = self._fan_out_thread
        if end_streams:
            for client in self.clients:
                client.close()
        self._fan_out_wakeup.set()
        if fan_out_thread is not None:
            fan_out_thread.join()

    # The log. The caller of a method marked "(locked)" holds the channel's lock.

    def _append(
        self, data: str | None, event: str | None, id_: str | int | None
    ) -> str:
        """Add an event to the log and return its ID.

        An exception in the middle, say by Ctrl-C, does no harm. Before the event is
        committed it leaves only entries that the next event overwrites, and perhaps an
        ID that belongs to no event, which _number_of() finds out.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the channel is closed")
            number = self._count + 1
            is_named = id_ is not None
            is_empty = data is None and event is None  # encode_event refuses that.
            if self._history and not is_named and not is_empty:
                id_ = f"{self._epoch}-{number}"
            frame = encode_event(data, event=event, id=id_)
            text = "" if id_ is None else _id_text(id_)
            total = self._log[self._count].total + len(frame)
            self._log[number] = _Event(text, frame, total)
            if is_named and text and self._history:
                self._numbers[text] = number
            self._count = number  # This commits the event.
            self._count_size = total
            self._trim()
            return text

    def _trim(self) -> None:
        """Drop old events that neither history nor log size keeps (locked)."""
        newest = self._log[self._count]
        # The newest event stays, and so does what the fan-out has not taken yet.
        limit = self._count - 1
        if self._fan_out_thread is not None:
            limit = min(limit, self._taken)
        while self._first <= min(limit, self._count - self._history):
            oldest = self._log[self._first]
            if newest.total - oldest.total < self.min_log_size:
                return
            if self._numbers.get(oldest.id) == self._first:
                del self._numbers[oldest.id]
            # In this order: an exception between the two must not leave _first at an
            # event that is gone.
            self._first += 1
            del self._log[self._first - 1]

    def _place_of(self, last_id: str, last: int) -> tuple[int, str, bytes]:
        """Return where a subscriber begins, its last ID, and a first frame (locked)."""
        if not self._history:
            return self._count, "", b""
        before_history = max(self._first - 1, self._count - self._history)
        if last_id:
            place = self._number_of(last_id)
        else:
            place = max(before_history, self._count - last)
        if place < before_history:
            return before_history, last_id, self._gap(last_id)
        if place < self._count:
            return place, last_id, b""
        # There is nothing to replay. An ID without data dispatches nothing (standard,
        # 9.2.6), but from now on the client has an ID to come back with.
        newest_id = self._log[place].id or f"{self._epoch}-{place}"
        return place, newest_id, encode_event(id=newest_id)

    def _number_of(self, id_: str) -> int:
        """Return the number of the newest event with that ID, or -1 (locked)."""
        number = self._numbers.get(id_, -1)
        if (
            number in self._log
            and number <= self._count
            and self._log[number].id == id_
        ):
            return number
        if number >= 0:  # It is known, but a publish() that used it was interrupted.
            numbers = range(self._count, self._first - 1, -1)
            return next((n for n in numbers if self._log[n].id == id_), -1)
        epoch, _, digits = id_.rpartition("-")
        if epoch == self._epoch and re.fullmatch("0|[1-9][0-9]{0,17}", digits):
            return int(digits) if int(digits) <= self._count else -1
        return -1

    def _gap(self, last_id: str) -> bytes:
        """Return the event which says that events after `last_id` are lost (locked)."""
        if self._gap_event is None:
            return b""
        # If nothing is held, no event follows that would give the client a new ID. With
        # this one its next reconnect finds no gap.
        id_ = None if self._count else f"{self._epoch}-0"
        return encode_event(last_id, event=self._gap_event, id=id_)

    def _frames_after(self, place: int, limit: int) -> tuple[list[bytes], int]:
        """Return at most one piece of what comes after `place` (locked)."""
        frames: list[bytes] = []
        size = 0
        while place < limit:
            frame = self._log[place + 1].frame
            size += len(frame)
            if frames and size > self.piece_size:
                break
            frames.append(frame)
            place += 1
        return frames, place

    def _catch_up(self, subscription: _Subscription) -> bool:
        """Write one piece to a subscriber that is behind; tell if it still is.

        The caller holds the client's lock, and the client has no backlog.
        """
        client, place = subscription.client, subscription.place
        frames = []
        with self._lock:
            if subscription.stop is not None:
                # The stream is draining; then the fan-out thread leaves it alone.
                limit = subscription.stop
            elif self._fan_out_thread is not None:
                limit = self._taken  # The rest is the fan-out thread's to write.
            else:
                limit = self._count
            # Has the log dropped events that the subscriber has missed?
            is_overtaken = place < min(self._first - 1, limit)
            if is_overtaken:
                frames.append(self._gap(subscription.last_id))
                place = self._first - 1
            missed, place = self._frames_after(place, limit)
            last_id = self._log[place].id if missed else subscription.last_id
        if is_overtaken and (not self._history or self._gap_event is None):
            client._end("the channel's history has overtaken it")
            return False
        client._write(b"".join([*frames, *missed]))
        subscription.place, subscription.last_id = place, last_id
        return place < limit

    # Subscribers and the fan-out thread.

    def _remove(self, subscription: _Subscription) -> None:
        """Forget a subscriber; the caller holds the client's lock."""
        # The fan-out thread may be about to write to it. At this place nothing is due.
        subscription.place = sys.maxsize
        with self._lock:
            self._subscriptions.pop(subscription, None)
            is_last = not self._subscriptions
        if is_last:
            self._fan_out_wakeup.set()  # The fan-out thread ends.

    def _start_fan_out(self) -> None:
        """Start the fan-out thread for the first subscriber (locked)."""
        if self._fan_out_thread is None and not self._closed:
            thread = threading.Thread(target=self._run, daemon=True)
            thread.start()  # It waits for the lock, so it finds the subscriber.
            self._fan_out_thread = thread
            self._taken = self._count
            self._taken_size = self._log[self._count].total

    def _wait_for_fan_out(self) -> None:
        """Wait while too much is published that the fan-out thread has not taken.

        Otherwise a publisher that never pauses keeps the interpreter to itself, and
        memory grows while next to nothing is delivered.
        """
        while self._count_size - self._taken_size > self.max_pending:
            thread = self._fan_out_thread
            if thread is None or thread is threading.current_thread():
                return
            self._publisher_wakeup.wait(1)
        self._publisher_wakeup.set()  # Another publisher may be waiting as well.

    def _run(self) -> None:
        """Deliver what is published; the fan-out thread runs this."""
        while True:
            try:
                if not self._fan_out():
                    return
            except Exception:  # MemoryError, for example; the next piece may fit.
                logger.exception("fan-out failed")
                time.sleep(0.1)

    def _fan_out(self) -> bool:
        """Write the next piece to all who are not behind; False if this was the end."""
        with self._lock:
            begin = self._taken
            subscriptions = list(self._subscriptions)
            frames, end = self._frames_after(begin, self._count)
            last_id = self._log[end].id
            # From here on _catch_up() may write this piece, too. A subscriber gets it
            # from whoever finds its place at `begin`.
            self._taken = end
            self._taken_size = self._log[end].total
            if not subscriptions or (self._closed and not frames):
                self._fan_out_thread = None
                self._publisher_wakeup.set()
                return False
        if not frames:
            self._publisher_wakeup.set()
            self._fan_out_wakeup.wait()
            return True
        try:
            plain = b"".join(frames)
            chunk = _encode_chunk(plain)
            fits = True
        except MemoryError:
            logger.exception("a piece of %d events does not fit in memory", len(frames))
            fits = False
        for subscription in subscriptions:
            client = subscription.client
            try:
                with client._lock:
                    keeps_up = subscription.place == begin and not client._backlog
                    if keeps_up and fits and client._state is _OPEN:
                        client._transmit(chunk if client._is_chunked else plain)
                        subscription.place = end
                        subscription.last_id = last_id
                    elif subscription.place < end:
                        # It is behind, or has joined in the middle of this piece.
                        client._watch_for_writing()
            except Exception:
                logger.exception("%s: fan-out failed", client.address)
                client._reset("because of an error in the server")
        return True


# The two below are needed because signal handlers may raise exceptions anywhere in the
# main thread, for example KeyboardInterrupt.


class _Wakeup:
    """Lets a thread sleep until another one calls `set()`, or has called it before.

    The sleeper tries to acquire a lock that is held already, and `set()` releases it.
    threading.Event cannot be used: it runs Python code while it holds a lock of its
    own, and an exception of a signal handler would leave that lock held for ever.
    """

    def __init__(self) -> None:
        self._held = threading.Lock()
        self._held.acquire()

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):  # It is set already.
            self._held.release()

    def wait(self, timeout: float = inf) -> None:
        self._held.acquire(timeout=min(max(timeout, 0), threading.TIMEOUT_MAX))


def _release_if_owned(lock: threading.RLock) -> None:
    """Release a lock that an exception has left held.

    From CPython 3.14 on, a signal handler may raise after a with statement has acquired
    its lock and before it guards it. An RLock knows its owner, so this can be mended.
    """
    with contextlib.suppress(RuntimeError):  # This thread does not hold it.
        lock.release()


# --- 4. A request -----------------------------------------------------------------

# RFC 9110, 5.6.2: the names of methods and header fields are tokens.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# RFC 9112, 3. http.server would also split at other white space.
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])")
# RFC 9112, 5. A folded line and one with a space before its colon do not match.
_FIELD_LINE = re.compile(rf"({_TOKEN}):([^\0\r\n]*)")
_MAX_HEAD_SIZE = 2**15  # bytes
_MAX_FIELD_LINES = 100
# RFC 9112, 3.2.2: a request for a proxy names the host before the path.
_ABSOLUTE_FORM = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)
_HTTP_METHODS = {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS"}
_HTTP_METHODS |= {"PATCH", "POST", "PUT", "TRACE"}
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}  # RFC 9110, 9.2.1
_FULL_RETRY = 5000  # milliseconds after which to come back to a server that is full
_STATUSES_WITHOUT_BODY = {204, 205, 304}  # RFC 9110, 15.3.5, 15.3.6 and 15.4.5

Headers = Union[Mapping[str, str], Iterable[Tuple[str, str]]]


class Refusal(Exception):
    """Raise this to answer a request with `status` instead.

    It may be raised in any `do_*` method, in `serve_plain` and `authorize`, and in
    `on_connection` as long as nothing was sent. `status` is from 200 to 599, `text` is
    sent as text/plain, `headers` is a mapping or pairs. 204 tells an EventSource not to
    come back (standard, 9.2.3).

    Raises ValueError or TypeError if that is no proper answer.
    """

    def __init__(self, status: int, text: str = "", headers: Headers = ()) -> None:
        if not _is_int(status) or not isinstance(text, str):
            raise TypeError("a Refusal takes an int and a str")
        if not 200 <= status <= 599:  # noqa: PLR2004
            raise ValueError(f"status must be from 200 to 599, not {status}")
        super().__init__(status, text)
        self.status = int(status)
        self.text = text
        self.headers = _check_headers(headers)


def _refusal(status: int) -> Refusal:
    """Return a refusal whose text is that of its status."""
    phrase, _ = BaseHTTPRequestHandler.responses.get(status, ("Refused", ""))
    return Refusal(status, f"{phrase}\n")


def _check_headers(headers: Headers) -> list[tuple[str, str]]:
    """Return `headers` as pairs; raise ValueError if they cannot be sent."""
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    ours = {"content-type", "content-length", "transfer-encoding", "connection"}
    for name, value in pairs:
        if not _FIELD_LINE.fullmatch(f"{name}:{value}") or ":" in name:
            raise ValueError(f"no proper header: {name!r}: {value!r}")
        if name.lower() in ours:
            raise ValueError(f"{name} is set by the server")
        value.encode("latin-1")  # UnicodeEncodeError is a ValueError.
    return pairs


class _ConnectionIO(io.RawIOBase):
    """The bytes of a connection, for a handler's rfile and wfile.

    Without this, one could not tell whether a ConnectionError means that this
    connection is lost, or another one of the program, say to its database. And one
    could not tell whether an answer has been begun.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.error: OSError | None = None  # the error by which the connection was lost
        self.has_written = False

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            return self._connection.recv_into(buffer)
        except OSError as error:
            self.error = error
            raise

    def write(self, data: Any, /) -> int:
        self.has_written = True
        try:
            self._connection.sendall(data)
        except OSError as error:
            self.error = error
            raise
        return memoryview(data).nbytes


class _Nowhere(io.RawIOBase):
    """Takes the body that a program writes in answer to HEAD."""

    def write(self, data: Any, /) -> int:
        return memoryview(data).nbytes


class SSERequestHandler(BaseHTTPRequestHandler):
    """Answers a GET of the server's path with an event stream, any other with "okay".

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

    Every method may raise Refusal. All of them run in the request's own thread.

    http.server calls these, in this order: `setup` makes rfile and wfile,
    `handle_one_request` reads the head and calls a `do_*` method, `finish` closes.
    """

    server: SSEServer

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # An event must not wait for the one before it.
    wfile: Any
    # Whether the peer may have sent what nobody has read; after the head it is known.
    _has_unread_input = True

    body_timeout = 30.0
    """Seconds within which `read_body` must have the whole body."""
    linger = 1.0
    """Seconds to wait for the FIN of a peer that may still be sending, see `finish`."""

    # What a request gets.

    def do_GET(self) -> None:
        """Serve the event stream on the server's path, `serve_plain()` elsewhere."""
        if self._is_for_stream():
            self.serve_stream()
        else:
            self.serve_plain()

    def do_HEAD(self) -> None:
        """Answer with the head that GET would get; `end_headers` drops the body."""
        self.do_GET()

    def serve_plain(self) -> None:
        """Answer a GET or HEAD that is not for the event stream; override this.

        Write the body as for a GET: in answer to a HEAD it is dropped.
        """
        self._respond(HTTPStatus.OK, "okay")

    def serve_stream(
        self,
        on_connection: Callable[[Client], object] | None = None,
        headers: Headers = (),
    ) -> None:
        """Answer this request with an event stream, and hold it until it ends.

        The method and the path do not matter; a HEAD gets the head alone. The Origin
        and the server's `authorize` decide who gets in. Then `on_connection(client)` is
        called, by default that of the server; the stream stays open when it returns.
        `headers`, a mapping or pairs, are sent besides those of every stream.

        Raises ValueError if the headers cannot be sent, Refusal if the client does not
        get in, RuntimeError if the request has been answered already.
        """
        head = self._build_stream_head(_check_headers(headers))
        if self._connection_io.has_written:
            raise RuntimeError("this request has been answered already")
        _check_origin(self)
        _check_user(self)
        if self.command == "HEAD":
            self.log_request(HTTPStatus.OK)
            self.wfile.write(head)
            return
        # From here on the client writes to the socket. The reader's buffer is not
        # needed, and there are many streams.
        self.rfile.detach()
        self.rfile = self.wfile = self._connection_io
        self._connection_io.has_written = True  # An answer is begun.
        self.connection.setblocking(False)
        client = Client(self, head)
        if self.server._add_stream(self._slot, client):
            self.log_request(HTTPStatus.OK)
            self._hold_stream(client, on_connection or self.server.on_connection)
        else:
            self._take_back_connection()
            self._refuse_as_full()

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
                raise
            # BrokenPipeError is how send() says that the stream has ended.
            is_expected = isinstance(error, (BrokenPipeError, Refusal))
            if not (is_expected and client.closed):
                logger.exception("%s: on_connection failed", self.client_address)
        finally:
            # With status 200 an EventSource reconnects, after a 500 it never does. So
            # a stream whose on_connection failed ends in good order.
            client._finish()
            self._has_unread_input = self._has_unread_input or client._received > 0

    def _take_back_connection(self) -> None:
        """Make it possible to answer in another way: the stream has sent nothing."""
        self.connection.setblocking(True)
        self._connection_io.has_written = False

    def read_body(self, max_size: int = 2**20) -> bytes:
        """Return the whole body of the request, at most `max_size` bytes.

        Raises Refusal if that is impossible. 411: the length is not given. 400: it is
        not a number, or the body ends before it. 413: it is over `max_size`. 408: the
        body has not come within `body_timeout` seconds.
        """
        lengths = set(self.headers.get_all("Content-Length", []))
        if not lengths or "Transfer-Encoding" in self.headers:
            raise _refusal(HTTPStatus.LENGTH_REQUIRED)
        length = lengths.pop()
        if lengths or not re.fullmatch("[0-9]+", length):
            raise Refusal(HTTPStatus.BAD_REQUEST, "Content-Length is not a number\n")
        digits = length.lstrip("0") or "0"
        # Without the first test a number of 30,000 digits would be converted.
        if len(digits) > len(str(max_size)) or int(digits) > max_size:
            raise _refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        size = int(digits)
        self.server._set_deadline(self._slot, self.body_timeout)
        body = self.rfile.read(size)
        is_late = self.server._end_deadline(self._slot)
        if len(body) == size:
            self._has_unread_input = False
            return body
        if is_late:
            raise _refusal(HTTPStatus.REQUEST_TIMEOUT)
        raise Refusal(HTTPStatus.BAD_REQUEST, "the body ends before its length\n")

    # From the first byte to the method.

    def handle_one_request(self) -> None:
        """Read one request and answer it; each connection has only one."""
        try:
            if self._read_head():
                self._call_method()
        except Refusal as refusal:
            self._refuse(refusal)
        except BaseException as error:
            if error is self._connection_io.error:  # Our own read or write raised it.
                logger.debug("%s: connection lost", self.client_address, exc_info=True)
                return
            logger.exception("%s: request failed", self.client_address)
            if not self._connection_io.has_written:
                self._refuse(_refusal(HTTPStatus.INTERNAL_SERVER_ERROR))
        finally:
            self.close_connection = True

    def _read_head(self) -> bool:
        """Read the head of the request (RFC 9112, 2 to 5); False if nothing came.

        http.server leaves this to the e-mail parser, which fails on some heads, needs
        quadratic time for others, and drops all lines after a malformed one.
        """
        self.requestline = self.command = self.path = self._target = ""
        self.request_version = self.protocol_version
        self.headers = http.client.HTTPMessage()
        room = _MAX_HEAD_SIZE
        line = self._read_line(room)
        if line in ("\r\n", "\n"):  # RFC 9112, 2.2: ignore an empty line before it.
            room -= len(line)
            line = self._read_line(room)
        if not line:
            return False
        self._parse_request_line(line)
        while True:
            room -= len(line)
            line = self._read_line(room)
            if line in ("\r\n", "\n"):
                break
            if not line:
                return False
            field = _FIELD_LINE.fullmatch(_without_line_end(line))
            if field is None:
                raise Refusal(HTTPStatus.BAD_REQUEST, "malformed header line\n")
            if len(self.headers) >= _MAX_FIELD_LINES:
                raise _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            self.headers[field[1]] = field[2].strip(" \t")
        # One that had to give way is told that the server is full; see _admit.
        if self.server._end_deadline(self._slot) and not self._slot.is_surplus:
            raise _refusal(HTTPStatus.REQUEST_TIMEOUT)
        self._has_unread_input = (
            "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        )
        return True

    def _read_line(self, room: int) -> str:
        """Return the next line of the head, "" if there is nothing to be answered."""
        line = self.rfile.readline(room + 1)
        if len(line) > room:
            raise _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        if not line.endswith(b"\n"):  # The peer, or the deadline, has ended it.
            is_late = self.server._end_deadline(self._slot)
            has_to_give_way = is_late and self._slot.is_surplus
            if has_to_give_way or not (line or self.requestline):
                return ""
            if is_late:
                raise _refusal(HTTPStatus.REQUEST_TIMEOUT)
            raise Refusal(HTTPStatus.BAD_REQUEST, "the head is not complete\n")
        return line.decode("latin-1")

    def _parse_request_line(self, line: str) -> None:
        self.requestline = _without_line_end(line)
        words = _REQUEST_LINE.fullmatch(self.requestline)
        if words is None or words[3] == "0":
            raise Refusal(HTTPStatus.BAD_REQUEST, "malformed request line\n")
        if words[3] != "1":
            raise _refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
        self.command, target = words[1], words[2]
        self.request_version = f"HTTP/1.{words[4]}"
        # `path` is what programs see. As in http.server it begins with one slash: if a
        # page redirected to //x, a browser would take x for a host.
        self.path = re.sub("^//+", "/", target)
        # `_target` is what the server's path is compared with, as it was sent.
        absolute_form = _ABSOLUTE_FORM.match(target)
        if absolute_form:
            target = target[absolute_form.end() :]
            target = target if target.startswith("/") else f"/{target}"
        self._target = target

    def _call_method(self) -> None:
        """Check who asks, then call the method that serves the request."""
        _check_host(self)
        if self._slot.is_surplus:
            self._refuse_as_full()
            return
        if self.command not in _SAFE_METHODS:
            _check_origin(self)
        if "Access-Control-Request-Method" in self.headers and _is_preflight(self):
            self._respond(HTTPStatus.NO_CONTENT, "", _preflight_headers(self))
            return
        # A capital name: otherwise "login" would call a helper of the name do_login.
        is_name = re.fullmatch("[A-Z]+", self.command)
        method = getattr(self, f"do_{self.command}", None) if is_name else None
        if method is None:
            self._refuse_method()
            return
        # RFC 9110, 10.1.1: the client waits for this before it sends the body.
        expects = self.headers.get("Expect", "").lower() == "100-continue"
        is_possible = self._has_unread_input and self.request_version != "HTTP/1.0"
        if expects and is_possible and self.command != "HEAD":
            self.handle_expect_100()
        method()

    def _refuse_method(self) -> None:
        allow = [("Allow", ", ".join(self._defined_methods()))]
        if self.command == "OPTIONS":
            self._respond(HTTPStatus.NO_CONTENT, "", allow)
        elif self.command in _HTTP_METHODS:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "not allowed here\n", allow)
        else:
            raise _refusal(HTTPStatus.NOT_IMPLEMENTED)

    def _defined_methods(self) -> list[str]:
        names = {name[3:] for name in dir(self) if re.fullmatch("do_[A-Z]+", name)}
        return sorted(names | {"OPTIONS"})

    def _is_for_stream(self) -> bool:
        path, _, _ = self._target.partition("?")
        return _matches(self.server.path, path)

    def _serves_okay(self) -> bool:
        """Tell whether the answer is the built-in "okay", which is for everybody."""
        names = ("serve_plain", "do_GET", "do_HEAD")
        is_own = any(
            getattr(type(self), name) is not getattr(SSERequestHandler, name)
            for name in names
        )
        is_get = self.command in ("GET", "HEAD")
        return is_get and not is_own and not self._is_for_stream()

    # Answers.

    def _respond(
        self, status: int, text: str, headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        """Answer with a short text, in one write."""
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
        head = self._build_head(status, fields)
        self.log_request(status)
        self.wfile.write(head if self.command == "HEAD" else head + body)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer with `refusal`, unless a head was sent already."""
        if self._connection_io.has_written:
            logger.error("%s: %r came after the head", self.client_address, refusal)
            return
        with contextlib.suppress(OSError):  # The connection is lost.
            self._respond(refusal.status, refusal.text, refusal.headers)

    def _refuse_as_full(self) -> None:
        """Say that the server is full, so that an EventSource comes back later.

        After any status but 200 it would never come back (standard, 9.2.3).
        """
        reason = "all of max_connections (--max-connections) are taken\n"
        logger.info("%s: refused, %s", self.client_address, reason.strip())
        accept = self.headers.get("Accept", "")
        wants_stream = self._is_for_stream() or "text/event-stream" in accept
        if self.command not in ("GET", "HEAD") or not wants_stream:
            retry_after = [("Retry-After", str(_FULL_RETRY // 1000))]
            self._respond(HTTPStatus.SERVICE_UNAVAILABLE, reason, retry_after)
            return
        body = b"retry: %d\n%b" % (_FULL_RETRY, encode_comment(reason.strip()))
        if self._is_chunked():
            body = _encode_chunk(body) + _LAST_CHUNK
        head = self._build_stream_head([])
        self.log_request(HTTPStatus.OK)
        self.wfile.write(head if self.command == "HEAD" else head + body)

    def _is_chunked(self) -> bool:
        # Without chunks urllib3 (and so requests, and sseclient-py) holds events back
        # until its read size is full. HTTP/1.0, which nginx speaks, has no chunks.
        return self.request_version != "HTTP/1.0"

    def _build_stream_head(self, headers: Iterable[tuple[str, str]]) -> bytes:
        fields = [
            ("Content-Type", "text/event-stream"),
            # no-transform: a proxy that compresses would hold events back.
            ("Cache-Control", "no-cache, no-transform"),
            ("X-Accel-Buffering", "no"),  # nginx must not wait for more.
        ]
        if self._is_chunked():
            fields.append(("Transfer-Encoding", "chunked"))
        return self._build_head(HTTPStatus.OK, [*fields, *headers])

    def _build_head(self, status: int, headers: Iterable[tuple[str, str]]) -> bytes:
        """Return a head, which is to leave together with what follows it."""
        # A program may have begun another head, which http.server keeps here.
        self._headers_buffer: list[bytes] = []
        self._vary: list[str] = []
        # end_headers() writes to wfile, and programs may override it.
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
        return head.getvalue()

    # Repairs to http.server.

    def setup(self) -> None:
        """Prepare the handler; http.server calls this first."""
        super().setup()
        self._slot = self.server._slots[self.request]
        self._connection_io: Any = _ConnectionIO(self.connection)
        self.rfile.close()
        self.rfile = io.BufferedReader(self._connection_io)
        self.wfile = self._connection_io
        self._vary = []

    def finish(self) -> None:
        """Close in stages (RFC 9112, 9.6); http.server calls this last.

        Without this, an answer may be lost: to close a socket with unread input sends
        an RST, which may overtake the answer. So we send our FIN, read up to the
        peer's, and only then close.
        """
        super().finish()
        if not self._has_unread_input:
            return
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + self.linger
            while (seconds := deadline - time.monotonic()) > 0:
                self.connection.settimeout(seconds)
                if not self.connection.recv(2**16):
                    break

    def handle_expect_100(self) -> bool:
        """Ask for the body. Without this, the 100 would get an answer's headers."""
        self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._connection_io.has_written = False  # That was not yet the answer.
        return True

    def version_string(self) -> str:
        """Return the Server field. Without this, it tells the version of Python."""
        return "sse_ref"

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin a head. Without this, clients would expect more answers after it."""
        super().send_response(code, message)
        self.send_header("Connection", "close")

    def send_header(self, keyword: str, value: str) -> None:
        """Add a line to the head. Without this, Vary could be there several times."""
        if keyword.lower() == "vary":
            self._vary.append(value)
        else:
            super().send_header(keyword, value)

    def end_headers(self) -> None:
        """Send the head. Without this, a HEAD would get a body, and CORS no headers."""
        if self.server.allowed_origins:
            for name, value in _cors_headers(self):
                self.send_header(name, value)
        if self._vary:
            super().send_header("Vary", ", ".join(dict.fromkeys(self._vary)))
            self._vary = []
        super().end_headers()
        if self.command == "HEAD":
            self.wfile = _Nowhere()

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Answer with an error. Without this, the text would be a page of HTML."""
        phrase, description = self.responses.get(code, ("", ""))
        self.log_error("code %d, message %s", code, message or phrase)
        self._refuse(Refusal(code, f"{explain or message or description}\n"))


def _without_line_end(line: str) -> str:
    """Drop CR LF, or LF alone (RFC 9112, 2.2)."""
    return line[:-2] if line.endswith("\r\n") else line[:-1]


def _matches(pattern: str, path: str) -> bool:
    """Tell whether `path` is `pattern`, where `*` stands for any characters.

    No regular expression: with several stars, a long path would make it backtrack.
    """
    first, *others = pattern.split("*")
    if not others:
        return path == pattern
    if not path.startswith(first):
        return False
    position = len(first)
    *middle, last = others
    for piece in middle:
        found = path.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return path.endswith(last) and len(path) - len(last) >= position


# --- 5. Who gets in ---------------------------------------------------------------

# RFC 3986, 3.2: an IPv6 address in brackets, or a name without the characters that end
# one; then perhaps a port. urlsplit() would take "localhost#.evil" for localhost.
_HOST = r"(?:\[([0-9a-f:.]+)\]|([^\s:/?#@\[\]\\]+?)\.?)(?::([0-9]*))?"
# The form in which browsers write an origin (RFC 6454, 6.2).
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[0-9]+)?")
_DEFAULT_PORTS = ("http://", ":80"), ("https://", ":443")
_PREFLIGHT_SECONDS = 600


def _check_host(handler: SSERequestHandler) -> None:
    """Refuse a request whose Host is missing, ambiguous or not ours.

    A page elsewhere can have a name of its own lead to 127.0.0.1 ("DNS rebinding").
    Then the browser takes us for that page's own server. But it tells us that name.
    """
    hosts = handler.headers.get_all("Host", [])
    if len(hosts) > 1 or (not hosts and handler.request_version != "HTTP/1.0"):
        raise Refusal(HTTPStatus.BAD_REQUEST, "one Host is needed\n")  # RFC 9112, 3.2
    host = _host_of(handler)
    if host is None or handler._serves_okay():
        return
    name = _host_name(host)
    if name == "localhost" or name.endswith(".localhost") or _is_ip_address(name):
        return
    allowed = handler.server.allowed_hosts
    # On other than loopback addresses a machine has many names.
    is_asked = bool(allowed) or _is_loopback(handler.connection)
    if is_asked and name not in allowed and "*" not in allowed:
        reason = f"Host {host!a} is not in allowed_hosts (--allow-host)\n"
        raise Refusal(HTTPStatus.FORBIDDEN, reason)


def _check_origin(handler: SSERequestHandler) -> None:
    """Refuse a request that a page of another origin has made, if it is not allowed."""
    origin = handler.headers.get("Origin")
    if origin is not None and _allowed_as(handler, origin):
        return
    # Fetch Metadata, 2.3: the browser says itself where the request comes from.
    site = handler.headers.get("Sec-Fetch-Site")
    if site is not None:
        is_own = site in ("same-origin", "none")
    elif origin is not None:
        # The scheme does not matter: TLS may end in a proxy before us.
        host = _host_of(handler)
        is_own = bool(host) and origin.lower().endswith(f"://{host}".lower())
    else:
        is_own = True
    if not is_own:
        who = "this page's origin" if origin is None else f"Origin {origin!a}"
        reason = f"{who} is not in allowed_origins (--allow-origin)\n"
        raise Refusal(HTTPStatus.FORBIDDEN, reason)


def _check_user(handler: SSERequestHandler) -> None:
    """Refuse whom the program's `authorize` does not let in."""
    authorize = handler.server.authorize
    answer = True if authorize is None else authorize(handler)
    if answer is True:
        return
    if not isinstance(answer, int) or answer not in range(200, 600):
        answer = HTTPStatus.FORBIDDEN
    raise _refusal(answer)


def _allowed_as(handler: SSERequestHandler, origin: str) -> str:
    """Return the entry of allowed_origins that lets `origin` in, "" if none does."""
    allowed = handler.server.allowed_origins
    if origin.lower() in allowed and origin != "*":
        return origin
    is_origin = origin == "null" or _ORIGIN.fullmatch(origin.lower())
    return "*" if "*" in allowed and is_origin else ""


def _cors_headers(handler: SSERequestHandler) -> list[tuple[str, str]]:
    """Return the fields that let a page of an allowed origin read the answer.

    Fetch, 3.2. "*" and "null" stand for pages that nobody knows: they may read, but
    not with the user's cookies.
    """
    headers = [("Vary", "Origin")]
    allowed_as = _allowed_as(handler, handler.headers.get("Origin", ""))
    if allowed_as:
        headers.append(("Access-Control-Allow-Origin", allowed_as))
    if allowed_as not in ("", "*", "null"):
        headers.append(("Access-Control-Allow-Credentials", "true"))
    return headers


def _is_preflight(handler: SSERequestHandler) -> bool:
    """Tell whether a browser asks for a page of an allowed origin what it may send."""
    origin = handler.headers.get("Origin", "")
    return handler.command == "OPTIONS" and bool(_allowed_as(handler, origin))


def _preflight_headers(handler: SSERequestHandler) -> list[tuple[str, str]]:
    """Return what a page of an allowed origin may send (Fetch, 4.8)."""
    asked = handler.headers.get("Access-Control-Request-Headers", "")
    return [
        ("Access-Control-Allow-Methods", ", ".join(handler._defined_methods())),
        ("Access-Control-Allow-Headers", asked),
        ("Access-Control-Max-Age", str(_PREFLIGHT_SECONDS)),
    ]


def _host_of(handler: SSERequestHandler) -> str | None:
    """Return the host and port that the request was sent to (RFC 9112, 3.2.2)."""
    absolute_form = _ABSOLUTE_FORM.match(handler.path)
    return absolute_form[1] if absolute_form else handler.headers.get("Host")


def _host_name(host: str) -> str:
    """Return the name in host[:port] in lower case, or the address; "" if malformed."""
    match = re.fullmatch(_HOST, host.lower())
    return match[1] or match[2] if match else ""


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
    match = re.fullmatch(_HOST, entry.lower())
    if match is None or match[2] is None or match[3] is not None:
        raise ValueError(f"allowed_hosts: {entry!r} is not a host without a port")
    return match[2]


def _allowed_origin(entry: str) -> str:
    """Return an entry of allowed_origins in its normal form; raise ValueError."""
    origin = entry.lower()
    is_default = any(
        origin.startswith(scheme) and origin.endswith(port)
        for scheme, port in _DEFAULT_PORTS
    )
    if entry in ("*", "null") or (_ORIGIN.fullmatch(origin) and not is_default):
        return origin
    raise ValueError(f"allowed_origins: no browser sends {entry!r} as its origin")


# --- 6. The server ----------------------------------------------------------------


_CHECK_INTERVAL = 0.25  # seconds
_MAX_SURPLUS = 64  # connections over max_connections that are told to come back


class _IOThread:
    """Watches the sockets of all open streams, and does what is due at a certain time.

    Any thread may change what is watched. epoll and kqueue notice that at once. poll()
    and select() work on a copy of the list, so they are woken through a self-pipe: a
    pair of sockets, one of which is watched like those of the streams.
    """

    def __init__(self, check_deadlines: Callable[[float], None]) -> None:
        self._check_deadlines = check_deadlines
        self._selector = selectors.DefaultSelector()
        kind = type(self._selector).__name__
        self._notices_changes = kind in ("EpollSelector", "KqueueSelector")
        self._is_select = kind == "SelectSelector"
        self._self_pipe, self._waker = socket.socketpair()
        self._self_pipe.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._self_pipe, selectors.EVENT_READ)
        self._stopped = False
        # Guards the selector's map and _stopped. poll() itself runs without it.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, client: Client) -> bool:
        """Begin to watch a stream; False if the selector takes no more sockets."""
        with self._lock:
            if self._stopped:
                return True  # The server is closing, and closes this stream as well.
            try:
                self._selector.register(client._socket, selectors.EVENT_READ, client)
            except (OSError, ValueError):  # ENOSPC, for example.
                return False
            if self._is_select:
                # select() says only when it is called that it has too many sockets, or
                # a number that is too high. Windows has nothing but select().
                try:
                    self._selector.select(0)
                except (OSError, ValueError):
                    self._selector.unregister(client._socket)
                    return False
            client._interest = selectors.EVENT_READ
            self._wake()
            return True

    def watch(self, client: Client, interest: int) -> None:
        """Change for which events a stream is watched; its lock is held."""
        if client._interest in (0, interest):
            return
        with self._lock:
            if not self._stopped:
                self._selector.modify(client._socket, interest, client)
                client._interest = interest
                self._wake()

    def remove(self, client: Client) -> None:
        """Watch a stream no more; its lock is held, and its socket not yet closed."""
        with self._lock:
            if client._interest and not self._stopped:
                self._selector.unregister(client._socket)
            client._interest = 0

    def stop(self) -> None:
        """End the thread and close its descriptors."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            self._wake(always=True)
        self._thread.join()
        self._selector.close()
        self._self_pipe.close()
        self._waker.close()

    def _wake(self, always: bool = False) -> None:
        if always or not self._notices_changes:
            with contextlib.suppress(BlockingIOError):  # It is full: it wakes anyway.
                self._waker.send(b"\0")

    def _run(self) -> None:
        next_check = 0.0
        while not self._stopped:
            try:
                now = time.monotonic()
                if now >= next_check:
                    next_check = now + _CHECK_INTERVAL
                    self._check_deadlines(now)
                for client, events in self._ready(max(next_check - now, 0)):
                    _take_step(client, client._on_ready, events)
            except Exception:  # MemoryError, for example; the next round may succeed.
                logger.exception("the I/O thread failed")
                time.sleep(0.1)

    def _ready(self, timeout: float) -> list[tuple[Client, int]]:
        """Wait for readiness; return the streams and what each is ready for."""
        try:
            ready = self._selector.select(timeout)
        except (OSError, ValueError):
            # On Windows select() fails if a socket is closed meanwhile. By now that
            # socket is not watched any more.
            logger.debug("select failed", exc_info=True)
            time.sleep(0.001)
            return []
        if any(key.data is None for key, _ in ready):
            self._self_pipe.recv(4096)
        return [(key.data, events) for key, events in ready if key.data is not None]


def _take_step(client: Client, step: Callable[[Any], None], argument: Any) -> None:
    """Call `step` for one stream. What it raises costs this stream only."""
    try:
        step(argument)
    except Exception:  # MemoryError, for example.
        logger.exception("%s: I/O failed", client.address)
        client._reset("because of an error in the server")


class _Slot:
    """What the server knows of a connection; guarded by the server's lock."""

    __slots__ = ("awaits_head", "client", "deadline", "is_late", "is_surplus", "thread")

    def __init__(self, thread: threading.Thread, deadline: float) -> None:
        self.thread = thread
        self.deadline = deadline  # by which the head, later the body, must have come
        self.awaits_head = True
        self.is_late = False
        self.is_surplus = False  # There was no regular place for it.
        self.client: Client | None = None


class SSEServer(ThreadingHTTPServer):
    """An HTTP server that holds event streams open, each in its request's own thread.

        def on_connection(client):
            client.send("hi there!")
            while not client.wait(1):  # one second, or until the client has gone
                client.send(time.ctime(), event="tick")

        SSEServer(("127.0.0.1", 8080), on_connection).run()

    `server_address`: host and port, IPv4 or IPv6; port 0 picks a free one.
    `on_connection`: called with each new `Client`, in the request's own thread. The
    stream stays open after it returns. If it raises, that is logged and the stream
    ends. BrokenPipeError, which `send` raises after the end, is no error.
    `path`: where the stream is; `*` stands for any characters, `/` included.
    `authorize`: called with the handler of each request for a stream, in its thread.
    True lets it in; a status is the answer; anything else is 403.
    `keepalive`: seconds of silence before a comment is sent; None: never.
    `retry`: the reconnection time that clients are told, in milliseconds.
    `max_connections`: of all kinds. One more is told to come back later.
    `max_backlog`: bytes that may wait for a slow reader. If there are more when another
    thread wants to send, the stream is reset.
    `allowed_hosts`: names by which browsers may reach the server, besides IP addresses
    and localhost, without a port; `"*"` allows any. Given, they count on every address,
    otherwise on loopback addresses only.
    `allowed_origins`: origins of other pages that may read streams and send requests,
    for example `"https://app.example"`; `"*"` allows any, but without cookies.

    Raises ValueError or TypeError if an argument makes no sense, OSError if the address
    is in use or does not exist.
    """

    # http.server's 5 would drop the connections of a burst, which their kernels then
    # try again a second later. The kernel cuts this to its own limit.
    request_queue_size = 65535
    # On Windows SO_REUSEADDR would let two servers have the same port.
    allow_reuse_address = os.name == "posix"

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
        if isinstance(allowed_hosts, str) or isinstance(allowed_origins, str):
            raise TypeError("allowed_hosts and allowed_origins are lists, not one str")
        self.allowed_hosts = frozenset(map(_allowed_host, allowed_hosts))
        self.allowed_origins = frozenset(map(_allowed_origin, allowed_origins))
        self._check_options(RequestHandlerClass)
        # Guards the next four.
        self._lock = threading.Lock()
        self._slots: dict[socket.socket, _Slot] = {}  # the oldest first
        self._surplus = 0  # how many of them are over max_connections
        self._io_thread: _IOThread | None = None  # of the process that serves
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
            clients = [each.client for each in self._slots.values()]
        return frozenset(client for client in clients if client and not client.closed)

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, then end every stream in good order.

        From the first of these signals on both are ignored, until the program ends or
        sets handlers itself: a second one must not interrupt the end. Only the main
        thread may call this; ValueError otherwise.
        """
        with self, _stopped_by_signals(self):
            self.serve_forever(poll_interval=0.1)

    def server_close(self) -> None:
        """Take no more connections, end every stream, wait for the requests' threads.

        Streams end after all that was sent and published before. A reader that has not
        taken it after `closing_grace` seconds is reset. This returns after at most
        `closing_timeout` seconds.
        """
        super().server_close()
        begun = time.monotonic()
        with self._lock:
            self._is_closing = True
            slots = dict(self._slots)
        for request, slot in slots.items():
            if slot.client is not None:
                slot.client.close()
            else:
                _shut_reading(request)  # No more of a head, or of a body.
        threads = [slot.thread for slot in slots.values()]
        _join(threads, begun + self.closing_grace)
        for slot in slots.values():
            if slot.client is not None:
                slot.client._reset("the server is closing")
        _join(threads, begun + self.closing_timeout)
        if self._io_thread is not None:
            self._io_thread.stop()

    # What socketserver calls.

    def server_bind(self) -> None:
        """Bind the socket. HTTPServer would look up the host's name, which may hang."""
        socketserver.TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = self.server_address[1]

    def server_activate(self) -> None:
        """Listen, and have the kernel ask silent peers whether they still exist.

        The accepted connections inherit the options. Without them a peer whose cable is
        out would never be noticed if nothing is sent to it.
        """
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in ("KEEPIDLE", 20), ("KEEPINTVL", 10), ("KEEPCNT", 3):
            _set_tcp_option(self.socket, f"TCP_{name}", value)
        super().server_activate()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `shutdown()` is called by another thread."""
        self._start_io_thread()  # Now there are descriptors for it.
        super().serve_forever(poll_interval)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; if the system cannot, do not ask it all the time."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                logger.warning("no new connections for now: %s", error.strerror)
                time.sleep(0.2)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the request, unless there are too many."""
        self._start_io_thread()
        thread = _RequestThread(self, request, client_address)
        with self._lock:
            is_admitted = self._admit(request, thread)
        if is_admitted:
            thread.start()
        else:
            logger.info("%s: closed, there is no place for it", client_address)
            self.shutdown_request(request)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Make a handler, which handles the request in its __init__."""
        make: Any = self.RequestHandlerClass
        is_class = isinstance(make, type)
        if is_class:  # See _RequestThread for the reason.
            handler = make.__new__(make, request, client_address, self)
            handler.__init__(request, client_address, self)
        else:  # functools.partial, for example
            make(request, client_address, self)

    def shutdown_request(self, request: Any) -> None:
        """Close the request's connection, and forget it."""
        super().shutdown_request(request)
        with self._lock:
            slot = self._slots.pop(request, None)
            if slot is not None and slot.is_surplus:
                self._surplus -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong before or after the handling of a request."""
        if isinstance(sys.exc_info()[1], OSError):  # The connection is lost.
            logger.debug("%s: connection lost", client_address, exc_info=True)
        else:
            logger.exception("%s: request failed", client_address)

    # Connections, streams and deadlines.

    def _start_io_thread(self) -> _IOThread:
        # Not at the server's birth: a program may fork its workers after that, and
        # each of them needs a thread and a selector of its own.
        with self._lock:
            if self._io_thread is None:
                self._io_thread = _IOThread(self._check_deadlines)
            return self._io_thread

    def _admit(self, request: socket.socket, thread: threading.Thread) -> bool:
        """Find a place for a new connection; False if there is none (locked).

        There are max_connections regular places, and some surplus ones, whose requests
        are only told to come back. When all of a kind are taken, the connection whose
        head has been awaited longest gives way. Otherwise a few who connect and say
        nothing could keep all others out.
        """
        slot = _Slot(thread, time.monotonic() + self.head_timeout)
        regular = len(self._slots) - self._surplus
        if regular >= self.max_connections and not self._end_silent(is_surplus=False):
            slot.is_surplus = True
            if self._surplus >= _MAX_SURPLUS and not self._end_silent(is_surplus=True):
                return False
        # Those who give way need a moment to be gone.
        if self._is_closing or self._surplus >= 2 * _MAX_SURPLUS:
            return False
        if slot.is_surplus:
            self._surplus += 1
        self._slots[request] = slot
        return True

    def _end_silent(self, is_surplus: bool) -> bool:
        """End the connection whose head is awaited longest; False if none is (locked).

        Until it is gone it counts as a surplus one.
        """
        for request, slot in self._slots.items():
            if slot.awaits_head and slot.is_surplus is is_surplus:
                if not is_surplus:
                    slot.is_surplus = True
                    self._surplus += 1
                slot.awaits_head = False
                slot.is_late = True
                _shut_reading(request)
                return True
        return False

    def _set_deadline(self, slot: _Slot, seconds: float) -> None:
        """Let the I/O thread end what the request's thread reads after `seconds`."""
        with self._lock:
            slot.deadline = time.monotonic() + seconds

    def _end_deadline(self, slot: _Slot) -> bool:
        """Say that nothing is awaited any more; tell whether it was too late."""
        with self._lock:
            slot.deadline = inf
            slot.awaits_head = False
            return slot.is_late

    def _add_stream(self, slot: _Slot, client: Client) -> bool:
        """Have the I/O thread watch a stream; False if it cannot."""
        # What is sent must be acknowledged in time, or the kernel ends the connection;
        # by itself it would take some 15 minutes. Not set on other connections: who
        # pauses a download is not dead.
        timeout = min(max(30, client.stall_timeout), 86_400)
        _set_tcp_option(client._socket, "TCP_USER_TIMEOUT", int(timeout * 1000))
        if not client._io_thread.add(client):
            return False
        with self._lock:
            slot.client = client
            is_closing = self._is_closing
        if is_closing:  # server_close() has not seen this one.
            client.close()
        return True

    def _check_deadlines(self, now: float) -> None:
        """Do what is due at `now`; the I/O thread calls this several times a second."""
        with self._lock:
            slots = list(self._slots.items())
        for request, slot in slots:
            if slot.client is not None:
                _take_step(slot.client, slot.client._check_deadline, now)
            else:
                self._check_late(request, slot, now)

    def _check_late(self, request: socket.socket, slot: _Slot, now: float) -> None:
        """End the reading of a head or a body that is late."""
        with self._lock:
            if slot.deadline <= now:
                slot.deadline = inf
                slot.is_late = True
                _shut_reading(request)  # This wakes the thread that reads.


class _RequestThread(threading.Thread):
    """A request's own thread, which touches two pages of its stack and not three.

    In CPython a call by way of Thread(target=...) or of a class uses the C stack, and
    a call of a plain function does not. This saves 4 kB of 24 per idle stream.
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
    """Have the thread that reads from the connection find its end."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)


def _resolve(address: tuple[str, int]) -> tuple[socket.AddressFamily, Any]:
    """Find the family and the address to bind; IPv4 if a name has both."""
    host, port = address[:2]
    found = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, _, _, _, bindable = min(found, key=lambda info: info[0] != socket.AF_INET)
    return family, bindable


def _join(threads: Iterable[threading.Thread], deadline: float) -> None:
    for thread in threads:
        # One that was not started yet will find that the server is closing.
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join(max(deadline - time.monotonic(), 0))


@contextlib.contextmanager
def _stopped_by_signals(server: SSEServer) -> Iterator[None]:
    """Call `server.shutdown()` when SIGINT or SIGTERM comes; once is enough."""

    def stop(*_: object) -> None:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)
        # shutdown() waits for serve_forever(), which this thread is in. Not
        # threading.Thread: this may have interrupted one that starts a thread, and
        # holds the lock which that needs.
        _thread.start_new_thread(server.shutdown, ())

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is stop:  # It was not a signal that ended it.
                signal.signal(number, previous[number])


# --- 7. The command line ----------------------------------------------------------

_OTHER_DESCRIPTORS = 128  # surplus connections, and what Python and the server open


def main(arguments: list[str] | None = None) -> None:
    """Run the server from the command line, until SIGINT or SIGTERM."""
    if sys.stderr is None:  # It is closed; http.server writes its log there.
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    parser = _parser()
    options = parser.parse_args(arguments)
    _raise_descriptor_limit(options.max_connections + _OTHER_DESCRIPTORS)
    # The thread that reads lines computes without a pause while they come fast. Others
    # then wait this long for the interpreter, by default ten times as long.
    sys.setswitchinterval(0.0005)
    lines = Channel() if options.source == "-" else None
    if lines:
        lines.min_log_size = 2**23  # A file may come faster than a reader takes it.
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
            lines.close()


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
    add("--port", type=port_number, default=8080, help="%(default)s; 0 picks one")
    add("--path", default="/sse", help="%(default)s; * is any characters")
    add("--keepalive", type=float, default=15, metavar="S", help="%(default)s; 0: none")
    add("--retry", type=int, metavar="MS", help="reconnection time, milliseconds")
    add("--max-connections", type=int, default=1000, metavar="N", help="%(default)s")
    add("--allow-origin", **several, metavar="O", help="https://app.example, say, or *")
    add("--allow-host", **several, metavar="H", help="a name without a port, or *")
    return parser


def port_number(text: str) -> int:
    """Return a port; otherwise argparse says "invalid port_number value"."""
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
        for line in _read_lines(sys.stdin.fileno()):
            channel.publish(line.decode(errors="replace"))
    except RuntimeError:
        pass  # The channel is closed: the server ends.
    except OSError as error:
        logger.error("standard input cannot be read: %s", error.strerror)


def _read_lines(descriptor: int) -> Iterator[bytearray]:
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
