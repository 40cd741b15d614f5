# SPDX-License-Identifier: 0BSD
# ruff: noqa: PLR2004 - in a test the number is the point
"""What you may rely on when you use sse_ref: each test is one promise.

    python -m unittest              # in the folder of sse_ref.py
    python test_sse_ref.py bench    # measures this machine, see `bench` at the end

Streams are read here by a parser of the tests' own, written from the HTML standard's
section 9.2.6 and RFC 9112's section 7.1, so that the module is not measured by itself.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import gc
import http.client
import inspect
import io
import logging
import os
import queue
import random
import re
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request
import weakref
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler
from pathlib import Path
from unittest import mock

import sse_ref
from sse_ref import (
    Channel,
    Client,
    SSERequestHandler,
    SSEServer,
    encode_comment,
    encode_event,
)

PATIENCE = 10.0  # seconds after which something that should happen never will


def wait_until(condition, what="it"):
    """Wait for `condition()` to be true, and return what it returned."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE} s in vain for {what}")
        time.sleep(0.002)
    return value


class Reader:
    """Interprets an event stream to the letter of the standard, 9.2.6."""

    def __init__(self):
        self.events = []  # (type, data, last event ID) of each that was dispatched
        self.comments = []
        self.retry = None
        self.last_event_id = ""
        self.blank_lines = 0
        self._decode = codecs.getincrementaldecoder("utf-8")("strict").decode
        self._begun = False
        self._rest = ""
        self._type = self._data = self._id = ""

    def feed(self, piece):
        self._rest += self._decode(piece)
        if self._rest and not self._begun:
            self._begun = True
            if self._rest[0] == "\ufeff":
                self._rest = self._rest[1:]
        # A CR at the very end may be half of a CR LF: it stays for the next piece.
        *lines, self._rest = re.split(r"\r\n|\n|\r(?!\Z)", self._rest)
        for line in lines:
            self._line(line)

    @property
    def unfinished(self):
        """True in the middle of an event."""
        return bool(self._rest or self._type or self._data)

    def _line(self, line):
        if not line:
            self._dispatch()
        elif line[0] == ":":
            self.comments.append(line[1:])
        else:
            name, _, value = line.partition(":")
            self._field(name, value[1:] if value[:1] == " " else value)

    def _dispatch(self):
        self.blank_lines += 1
        self.last_event_id = self._id
        if self._data:
            kind = self._type or "message"
            self.events.append((kind, self._data[:-1], self._id))
        self._type = self._data = ""

    def _field(self, name, value):
        if name == "event":
            self._type = value
        elif name == "data":
            self._data += value + "\n"
        elif name == "id":
            if "\0" not in value:
                self._id = value
        elif name == "retry":
            if re.fullmatch("[0-9]+", value):
                self.retry = int(value)
        else:
            raise AssertionError(f"no such field in the standard: {name!r}")


def read(frames):
    """Interpret `frames`, a whole stream."""
    reader = Reader()
    reader.feed(frames)
    assert not reader.unfinished, "the stream ends within an event"
    return reader


class Peer:
    """The other end of a connection, which sees every byte of it.

    It sends its request when it is made: `head` (raw bytes), or one that is made of
    the other arguments. `X_Test="a"` is the header `X-Test: a`.
    """

    def __init__(  # noqa: PLR0913
        self,
        server,
        path="/sse",
        *,
        method="GET",
        version="HTTP/1.1",
        body=b"",
        head=None,
        **headers,
    ):
        self.socket = socket.create_connection(server.server_address[:2], PATIENCE)
        self.file = self.socket.makefile("rb")
        self.reader = Reader()
        headers.setdefault("Host", "localhost")
        if body:
            headers.setdefault("Content-Length", len(body))
        lines = [f"{name.replace('_', '-')}: {text}" for name, text in headers.items()]
        request = "\r\n".join([f"{method} {path} {version}", *lines, "", ""])
        self.socket.sendall(request.encode() + body if head is None else head)

    def read_head(self):
        """Read the head of the answer: `status` is a number, `headers` a Message."""
        self.status_line = self.file.readline()
        self.status = int(self.status_line.split()[1])
        self.headers = http.client.parse_headers(self.file)
        return self

    def read_body(self):
        """Read all that comes up to the server's FIN."""
        return self.file.read()

    def chunk(self):
        """Return the next chunk, b"" for the last (RFC 9112, 7.1)."""
        size = re.fullmatch(rb"([0-9a-f]+)\r\n", self.file.readline())
        if size is None:
            raise EOFError("the stream ended without its last chunk")
        piece = self.file.read(int(size[1], 16))
        assert self.file.read(2) == b"\r\n", "a chunk without its end"
        self.reader.feed(piece)
        return piece

    def event(self):
        """Return the next event: type, data, last event ID."""
        while not self.reader.events:
            if not self.chunk():
                raise EOFError("the stream ended")
        return self.reader.events.pop(0)

    def data(self):
        """Return the data of the next event."""
        return self.event()[1]

    def finish(self):
        """Read the rest of a chunked stream: it must end in good order, then FIN."""
        while self.chunk():
            pass
        assert self.file.read() == b"", "bytes after the last chunk"
        assert not self.reader.unfinished, "the stream ends within an event"
        return self.reader

    def close(self):
        self.file.close()
        self.socket.close()

    def reset(self):
        """Leave with an RST."""
        linger = struct.pack("ii", 1, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()


class QuietHandler(SSERequestHandler):
    """Does not write the request log."""

    def log_message(self, *arguments):
        pass


def descriptors():
    """Count the file descriptors that are open in this process."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


class ServerCase(unittest.TestCase):
    """Serves; and whatever a test does, nothing of it may stay behind."""

    def setUp(self):
        threads, files = threading.active_count(), descriptors()
        self.addCleanup(wait_until, lambda: descriptors() == files, "descriptors")
        self.addCleanup(
            wait_until, lambda: threading.active_count() == threads, "the threads' end"
        )

    def serve(self, on_connection=None, *, handler=QuietHandler, **options):
        """Start a server for the time of this test."""
        address = options.pop("address", ("127.0.0.1", 0))
        options["RequestHandlerClass"] = handler
        server = SSEServer(address, on_connection, **options)
        thread = threading.Thread(target=server.serve_forever, args=(0.002,))
        thread.start()
        self.addCleanup(self.stop, server, thread)
        return server

    def stop(self, server, thread):
        server.shutdown()
        server.server_close()
        thread.join()

    def connect(self, server, path="/sse", **options):
        """Send a request, and read the head of its answer."""
        peer = Peer(server, path, **options)
        self.addCleanup(peer.close)
        return peer.read_head()

    def open(self, **options):
        """Serve and connect; return both ends of a stream: the client and the peer."""
        clients = []
        server = self.serve(clients.append, **options)
        peer = self.connect(server)
        return wait_until(lambda: clients, "the connection")[0], peer

    def ask(self, server, request):
        """Send raw bytes, return all that comes back until the server's FIN."""
        with socket.create_connection(server.server_address[:2], PATIENCE) as peer:
            peer.sendall(request)
            with peer.makefile("rb") as file:
                return file.read()

    @contextlib.contextmanager
    def logged(self, level=logging.INFO):
        """Collect what the module logs meanwhile."""
        records = []
        handler = logging.Handler(level)
        handler.emit = records.append
        sse_ref.logger.addHandler(handler)
        with mock.patch.object(sse_ref.logger, "propagate", False):
            try:
                yield records
            finally:
                sse_ref.logger.removeHandler(handler)


LINE_BREAKS = ("\r\n", "\r", "\n")
NO_LINE_BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # str.splitlines breaks here


class TheModule(unittest.TestCase):
    """The names, and what is assumed where nothing is said."""

    METHODS = {
        "Channel": "subscribe unsubscribe publish close clients",
        "Client": "send comment wait close closed on_close query",
        "SSERequestHandler": "do_GET serve_plain serve_stream read_body",
        "SSEServer": "run server_close clients",
    }

    def defaults(self, function):
        """Return the default values of the parameters of `function`, by name."""
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def test_it_exports_seven_names(self):
        self.assertEqual(
            sorted(sse_ref.__all__),
            [
                "Channel",
                "Client",
                "Refusal",
                "SSERequestHandler",
                "SSEServer",
                "encode_comment",
                "encode_event",
            ],
        )

    def test_each_exported_name_and_method_has_a_docstring(self):
        for name in sse_ref.__all__:
            with self.subTest(name):
                self.assertTrue(vars(sse_ref)[name].__doc__)
        for name, methods in self.METHODS.items():
            for method in methods.split():
                with self.subTest(f"{name}.{method}"):
                    self.assertTrue(getattr(vars(sse_ref)[name], method).__doc__)

    def test_the_servers_options_have_the_promised_defaults(self):
        self.assertEqual(
            self.defaults(SSEServer),
            {
                "on_connection": None,
                "path": "/sse",
                "authorize": None,
                "keepalive": 15.0,
                "retry": None,
                "max_connections": 1000,
                "max_backlog": 1024 * 1024,
                "allowed_hosts": (),
                "allowed_origins": (),
                "RequestHandlerClass": SSERequestHandler,
            },
        )

    def test_a_channels_options_have_the_promised_defaults(self):
        self.assertEqual(self.defaults(Channel), {"history": 1000, "gap_event": "gap"})
        self.assertEqual(self.defaults(Channel.subscribe), {"after": None, "last": 0})
        self.assertEqual(self.defaults(Channel.close), {"end_streams": False})

    def test_a_handlers_methods_have_the_promised_defaults(self):
        self.assertEqual(
            self.defaults(SSERequestHandler.serve_stream),
            {"on_connection": None, "headers": ()},
        )
        self.assertEqual(
            self.defaults(SSERequestHandler.read_body), {"max_size": 1024 * 1024}
        )

    def test_a_refusal_needs_no_more_than_a_status(self):
        self.assertEqual(self.defaults(sse_ref.Refusal), {"text": "", "headers": ()})
        self.assertTrue(issubclass(sse_ref.Refusal, Exception))

    def test_the_limits_are_the_promised_ones(self):
        self.assertEqual(SSEServer.head_timeout, 10)
        self.assertEqual(SSERequestHandler.body_timeout, 30)
        self.assertEqual(Client.stall_timeout, 30)
        self.assertEqual(Channel.max_pending, 4 * 1024 * 1024)


class LyingInt(int):
    """An int that pretends to be another line whenever it is made into text."""

    def __format__(self, spec):
        return "0\ndata: smuggled"

    def __str__(self):
        return "0\ndata: smuggled"

    __repr__ = __str__

    def __index__(self):
        return 666


class LyingStr(str):
    """A str that pretends to hold another line whenever it is made into text."""

    __slots__ = ()

    def __format__(self, spec):
        return "x\ndata: smuggled"

    def __str__(self):
        return "x\ndata: smuggled"

    __repr__ = __str__


class TheFrame(unittest.TestCase):
    """What encode_event and encode_comment return."""

    def test_an_event_is_a_data_line_and_a_blank_line(self):
        self.assertEqual(encode_event("hi there!"), b"data: hi there!\n\n")

    def test_the_fields_come_in_the_order_event_retry_id_data(self):
        frame = encode_event("foo", id="1", retry=6000, event="bar")
        self.assertEqual(frame, b"event: bar\nretry: 6000\nid: 1\ndata: foo\n\n")

    def test_data_breaks_at_cr_lf_and_crlf(self):
        for line_break in LINE_BREAKS:
            with self.subTest(line_break):
                frame = encode_event(line_break.join(["foo", "bar", "baz"]))
                self.assertEqual(frame, b"data: foo\ndata: bar\ndata: baz\n\n")

    def test_lf_cr_counts_as_two_line_breaks(self):
        frame = encode_event("foo\n\rbar\n\r")
        self.assertEqual(frame, b"data: foo\ndata: \ndata: bar\ndata: \ndata: \n\n")

    def test_data_breaks_at_no_other_character(self):
        for character in NO_LINE_BREAKS:
            with self.subTest(character):
                frame = encode_event(f"a{character}b")
                self.assertEqual(frame, f"data: a{character}b\n\n".encode())

    def test_empty_data_makes_an_event(self):
        self.assertEqual(encode_event(""), b"data: \n\n")
        self.assertEqual(read(encode_event("\n")).events, [("message", "\n", "")])

    def test_leading_spaces_colons_and_look_alike_fields_are_kept(self):
        look_alike = "id: 5\nretry: 1\n\nevent: x"
        for data in (" a", "  b", ":", "data: x", look_alike, "\ufeff"):
            with self.subTest(data):
                # A comment goes first, because only a stream's first character can
                # be a byte order mark.
                events = read(b":\n" + encode_event(data)).events
                self.assertEqual(events, [("message", data, "")])

    def test_an_id_a_retry_or_an_event_may_stand_alone(self):
        self.assertEqual(encode_event(id="7"), b"id: 7\n\n")
        self.assertEqual(encode_event(retry=0), b"retry: 0\n\n")
        self.assertEqual(encode_event(event="x"), b"event: x\n\n")

    def test_an_id_may_be_an_int(self):
        self.assertEqual(encode_event("x", id=100), b"id: 100\ndata: x\n\n")
        self.assertEqual(encode_event("x", id=-1), b"id: -1\ndata: x\n\n")

    def test_an_empty_id_resets_the_last_one(self):
        self.assertEqual(encode_event("x", id=""), b"id: \ndata: x\n\n")

    def test_nul_is_refused_in_an_id_alone(self):
        frame = encode_event("\0", event="\0")
        self.assertEqual(read(frame).events, [("\0", "\0", "")])
        with self.assertRaises(ValueError):
            encode_event("x", id="a\0b")

    def test_a_line_break_in_an_event_or_an_id_is_refused(self):
        for line_break in LINE_BREAKS:
            for field in ("event", "id"):
                for text in (line_break, f"a{line_break}b", f"a{line_break}"):
                    with self.subTest(field, text=text):
                        self.assertRaises(
                            ValueError, encode_event, "x", **{field: text}
                        )

    def test_other_separators_are_allowed_in_an_event_and_an_id(self):
        frame = encode_event("x", event=NO_LINE_BREAKS, id=NO_LINE_BREAKS)
        self.assertEqual(read(frame).events, [(NO_LINE_BREAKS, "x", NO_LINE_BREAKS)])

    def test_a_negative_retry_is_refused(self):
        self.assertRaises(ValueError, encode_event, "x", retry=-1)

    def test_a_field_of_another_type_is_refused(self):
        for fields in (
            {"data": b"x"},
            {"data": 5},
            {"data": "x", "event": b"x"},
            {"data": "x", "event": 5},
            {"data": "x", "id": b"x"},
            {"data": "x", "id": 1.5},
            {"data": "x", "id": True},
            {"data": "x", "retry": "1"},
            {"data": "x", "retry": 1.0},
            {"data": "x", "retry": True},
        ):
            with self.subTest(fields), self.assertRaises(TypeError):
                encode_event(**fields)

    def test_whoever_sends_an_object_is_pointed_to_json_dumps(self):
        with self.assertRaisesRegex(TypeError, r"json\.dumps"):
            encode_event({"a": 1})

    def test_an_event_without_any_field_is_refused(self):
        self.assertRaises(ValueError, encode_event)

    def test_a_lone_surrogate_is_refused(self):
        for field in ("data", "event", "id"):
            with self.subTest(field), self.assertRaises(ValueError):
                encode_event(**{field: "\ud800"})
        self.assertRaises(ValueError, encode_comment, "\udfff")

    def test_a_subclass_of_int_cannot_smuggle_in_a_line(self):
        self.assertEqual(encode_event(retry=LyingInt(5)), b"retry: 5\n\n")
        self.assertEqual(encode_event(id=LyingInt(7)), b"id: 7\n\n")

    def test_a_subclass_of_str_cannot_smuggle_in_a_line(self):
        frame = encode_event(LyingStr("a\nb"), event=LyingStr("c"), id=LyingStr("d"))
        self.assertEqual(frame, b"event: c\nid: d\ndata: a\ndata: b\n\n")
        self.assertEqual(encode_event(LyingStr("a")), b"data: a\n\n")
        self.assertEqual(encode_comment(LyingStr("a")), b": a\n")

    def test_a_reader_gets_back_whatever_was_encoded(self):
        letters = "ab :\n\r\0\t\u2028\x85é\U0001f600" + NO_LINE_BREAKS
        dice = random.Random(9)
        for _ in range(500):
            data = "".join(dice.choices(letters, k=dice.randrange(1, 12)))
            kind, id_ = (re.sub("[\r\n\0]", "", data[i::2]) for i in range(2))
            events = read(encode_event(data, event=kind, id=id_)).events
            lines = re.sub("\r\n?", "\n", data)
            self.assertEqual(events, [(kind or "message", lines, id_)])

    def test_a_comment_is_its_lines_without_a_blank_line(self):
        self.assertEqual(encode_comment("hello"), b": hello\n")
        self.assertEqual(encode_comment("a\r\nb\rc\nd"), b": a\n: b\n: c\n: d\n")
        self.assertEqual(encode_comment(), b": \n")
        self.assertEqual(encode_comment("\u2028"), ": \u2028\n".encode())

    def test_a_comment_of_another_type_is_refused(self):
        for text in (b"x", 5, None):
            with self.subTest(text=text):
                self.assertRaises(TypeError, encode_comment, text)


def split_answer(answer):
    """Split a whole answer into its status, its fields and its body."""
    with io.BytesIO(answer) as file:
        status_line = file.readline()
        assert status_line.startswith(b"HTTP/1.1 "), f"no answer: {answer[:80]!r}"
        fields = http.client.parse_headers(file)
        return int(status_line.split()[1]), fields, file.read()


def without_chunks(body):
    """Return what is in the chunks of `body` (RFC 9112, 7.1)."""
    content = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        content += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    return content


class TheResponse(ServerCase):
    """What a GET or a HEAD is answered, and when."""

    def receive_once(self, server):
        """Ask for the stream; return what one recv brings: the head and the body."""
        peer = Peer(server)
        self.addCleanup(peer.close)
        head, blank_line, body = peer.socket.recv(65536).partition(b"\r\n\r\n")
        self.assertTrue(blank_line, head)
        return head, body

    # --- plain answers ---

    def test_a_plain_get_is_answered_with_okay_and_a_fin(self):
        server = self.serve()
        for target in (b"/", b"/x?y", b"/sse/", b"/ss", b"/sse."):
            with self.subTest(target):
                answer = self.ask(
                    server, b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % target
                )
                head, _, body = answer.partition(b"\r\n\r\n")
                self.assertEqual(body, b"okay")
                status_line, *fields = head.split(b"\r\n")
                self.assertEqual(status_line, b"HTTP/1.1 200 OK")
                self.assertEqual(
                    sorted(f for f in fields if not f.startswith(b"Date: ")),
                    [
                        b"Cache-Control: no-store",
                        b"Connection: close",
                        b"Content-Length: 4",
                        b"Content-Type: text/plain; charset=utf-8",
                        b"Server: sse_ref",
                        b"X-Content-Type-Options: nosniff",
                    ],
                )

    def test_no_answer_but_a_stream_may_be_stored_by_a_cache(self):
        server = self.serve(authorize=lambda handler: handler.headers["X-Who"] == "me")
        for request, status in (
            ("GET / HTTP/1.1\r\nHost: localhost", 200),
            ("OPTIONS / HTTP/1.1\r\nHost: localhost", 204),
            ("GET / HTTP/1.1", 400),
            ("a line that is no request", 400),
            ("GET /sse HTTP/1.1\r\nHost: localhost", 403),
            ("POST / HTTP/1.1\r\nHost: localhost", 405),
            ("FOO / HTTP/1.1\r\nHost: localhost", 501),
            ("GET / HTTP/9.9\r\nHost: localhost", 505),
        ):
            with self.subTest(request):
                answer = self.ask(server, f"{request}\r\n\r\n".encode())
                found, fields, _ = split_answer(answer)
                self.assertEqual(found, status)
                self.assertEqual(fields.get_all("Cache-Control"), ["no-store"])

    def test_a_head_request_gets_the_head_that_a_get_would_get(self):
        calls = []
        server = self.serve(calls.append)
        for path in ("/", "/sse"):
            with self.subTest(path):
                get = self.connect(server, path)
                head = self.connect(server, path, method="HEAD")
                self.assertEqual(head.read_body(), b"")
                self.assertEqual(head.status_line, get.status_line)
                for peer in (get, head):
                    del peer.headers["Date"]
                self.assertEqual(head.headers.items(), get.headers.items())
        wait_until(lambda: calls, "the stream of the GET")
        self.assertEqual(len(calls), 1)

    # --- the head of a stream ---

    def test_a_stream_has_its_promised_head(self):
        peer = self.connect(self.serve())
        self.assertEqual(peer.status_line, b"HTTP/1.1 200 OK\r\n")
        self.assertTrue(peer.headers["Date"])
        del peer.headers["Date"]
        self.assertEqual(
            sorted(peer.headers.items()),
            [
                ("Cache-Control", "no-cache, no-transform"),
                ("Connection", "close"),
                ("Content-Type", "text/event-stream"),
                ("Server", "sse_ref"),
                ("Transfer-Encoding", "chunked"),
                ("X-Accel-Buffering", "no"),
            ],
        )

    def test_the_head_leaves_together_with_the_first_event(self):
        server = self.serve(lambda client: client.send("hi there!"))
        for _ in range(10):
            head, body = self.receive_once(server)
            self.assertTrue(head.startswith(b"HTTP/1.1 200 OK\r\n"))
            self.assertEqual(body, b"11\r\ndata: hi there!\n\n\r\n")

    def test_the_head_leaves_together_with_a_comment(self):
        server = self.serve(lambda client: client.comment("hello"))
        for _ in range(10):
            _, body = self.receive_once(server)
            self.assertEqual(body, b"8\r\n: hello\n\r\n")

    def test_the_servers_retry_goes_before_the_first_event(self):
        server = self.serve(lambda client: client.send("a", event="b"), retry=50)
        for _ in range(10):
            _, body = self.receive_once(server)
            self.assertEqual(without_chunks(body), b"retry: 50\nevent: b\ndata: a\n\n")

    def test_a_head_without_a_frame_takes_one_comment_line_along(self):
        server = self.serve()
        for _ in range(10):
            _, body = self.receive_once(server)
            self.assertEqual(body, b"5\r\n: ok\n\r\n")

    def test_the_servers_retry_takes_the_place_of_that_comment(self):
        server = self.serve(retry=50)
        for _ in range(10):
            _, body = self.receive_once(server)
            self.assertEqual(body, b"a\r\nretry: 50\n\r\n")

    def test_neither_of_them_is_followed_by_a_blank_line(self):
        for retry in (None, 50):
            with self.subTest(retry=retry):
                client, peer = self.open(retry=retry)
                peer.chunk()
                client.close()
                self.assertEqual(peer.finish().blank_lines, 0)
                self.assertEqual(peer.reader.retry, retry)

    def test_the_head_leaves_at_once_when_there_is_nothing_to_wait_for(self):
        for name, on_connection in (
            ("there is no on_connection", None),
            ("on_connection returns", lambda client: None),
            ("on_connection waits", lambda client: client.wait()),
            ("on_connection subscribes", Channel(history=0).subscribe),
        ):
            with self.subTest(name):
                server = self.serve(on_connection)
                begun = time.monotonic()
                # If a head left only with the timer, each of these would take half
                # a second.
                for _ in range(4):
                    self.assertEqual(self.connect(server).chunk(), b": ok\n")
                self.assertLess(time.monotonic() - begun, 1)

    def test_the_head_leaves_when_the_stream_is_closed(self):
        server = self.serve(lambda client: client.close())
        peer = self.connect(server)
        self.assertEqual(peer.status, 200)
        self.assertEqual(peer.finish().events, [])

    def test_the_head_waits_half_a_second_at_most(self):
        self.assertEqual(Client.head_delay, 0.5)
        for retry, first, delay in (
            (None, b": ok\n", 0.5),
            (50, b"retry: 50\n", 0.1),  # sooner, so that the test is over sooner
        ):
            delayed = mock.patch.object(Client, "head_delay", delay)
            with self.subTest(retry=retry), delayed:
                texts = queue.Queue()
                server = self.serve(
                    lambda client, texts=texts: client.send(texts.get()), retry=retry
                )
                self.addCleanup(texts.put, "the end")
                begun = time.monotonic()
                peer = self.connect(server)
                self.assertEqual(peer.chunk(), first)
                self.assertLess(time.monotonic() - begun, 1)
                texts.put("late")
                self.assertEqual(peer.chunk(), b"data: late\n\n")

    # --- the body of a stream ---

    def test_each_frame_is_a_chunk_of_its_own(self):
        def on_connection(client):
            client.send("a")
            client.send("b\nc", event="d", id=1)
            client.comment("e")
            client.close()

        peer = self.connect(self.serve(on_connection))
        self.assertEqual(
            peer.read_body(),
            b"9\r\ndata: a\n\n\r\n"
            b"20\r\nevent: d\nid: 1\ndata: b\ndata: c\n\n\r\n"
            b"4\r\n: e\n\r\n"
            b"0\r\n\r\n",
        )

    def test_http_1_0_gets_the_stream_without_chunks(self):
        def on_connection(client):
            client.send("a")
            client.comment("b")
            client.close()

        server = self.serve(on_connection)
        answer = self.ask(server, b"GET /sse HTTP/1.0\r\n\r\n")
        status, fields, body = split_answer(answer)
        self.assertEqual(status, 200)
        self.assertNotIn("Transfer-Encoding", fields)
        self.assertEqual(body, b"data: a\n\n: b\n")

    def test_http_1_0_gets_a_head_without_a_frame_the_same_way(self):
        server = self.serve(lambda client: client.wait(0) or client.close())
        answer = self.ask(server, b"GET /sse HTTP/1.0\r\n\r\n")
        self.assertEqual(split_answer(answer)[2], b": ok\n")

    def test_urllib_gets_each_event_at_once(self):
        clients = []
        server = self.serve(clients.append)
        url = f"http://127.0.0.1:{server.server_port}/sse"
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            self.assertEqual(response.readline(), b": ok\n")
            (client,) = wait_until(lambda: clients)
            begun = time.monotonic()
            for number in range(40):
                client.send(str(number))
                self.assertEqual(response.readline(), b"data: %d\n" % number)
                self.assertEqual(response.readline(), b"\n")
            # A buffer in between would hold the first of them for ever, and Nagle's
            # algorithm most of them for 40 ms.
            self.assertLess(time.monotonic() - begun, 1)

    def test_nagles_algorithm_is_off(self):
        connections = []
        server = self.serve(
            authorize=lambda handler: connections.append(handler.connection) or True
        )
        self.connect(server).chunk()
        option = connections[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        self.assertTrue(option)

    # --- what is known of the request ---

    def test_a_client_knows_its_request(self):
        clients = []
        server = self.serve(clients.append, path="/a/*")
        peer = self.connect(server, "/a/b?x=1&y=&x=%C3%A9", X_Test="yes")
        (client,) = wait_until(lambda: clients)
        self.assertEqual(client.path, "/a/b")
        self.assertEqual(client.query, {"x": ["1", "é"], "y": [""]})
        self.assertEqual(client.headers["x-test"], "yes")
        self.assertEqual(client.address, peer.socket.getsockname())
        self.assertEqual(client.last_event_id, "")

    def test_a_clients_path_is_as_it_was_sent(self):
        clients = []
        server = self.serve(clients.append, path="*")
        paths = ["/", "//a//b/", "/a%2Fb%20c", "/a/../b/.", "/a;b=c", "/A+b"]
        for path in paths:
            self.connect(server, f"{path}?query")
        wait_until(lambda: len(clients) == len(paths))
        self.assertEqual(sorted(c.path for c in clients), sorted(paths))

    def test_the_last_event_id_is_read_as_utf8(self):
        clients = []
        server = self.serve(clients.append)
        request = b"GET /sse HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: %b\r\n\r\n"
        for sent, id_ in (
            ("é…х\U0001f600 5".encode(), "é…х\U0001f600 5"),
            (b"caf\xe9", "café"),  # This is not UTF-8, so it stays Latin-1.
            (b" 7 \t", "7"),
            # The last bytes of these two, 0xA0 and 0x85, are white space to str.strip.
            ("voilà".encode(), "voilà"),
            ("х".encode(), "х"),
        ):
            with self.subTest(id_):
                clients.clear()
                self.connect(server, head=request % sent)
                (client,) = wait_until(lambda: clients)
                self.assertEqual(client.last_event_id, id_)

    # --- the log ---

    def log_of(self, *requests):
        """Return what http.server's own request log says of `requests`."""
        with mock.patch("sys.stderr", io.StringIO()) as stderr:
            server = self.serve(handler=SSERequestHandler)
            for request in requests:
                self.ask(server, request)
            self.doCleanups()  # All is logged when the server's threads have ended.
        return stderr.getvalue()

    def test_requests_are_logged_as_by_http_server(self):
        log = self.log_of(
            b"GET /x?y HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"HEAD /sse HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"FOO / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        )
        begin = r"127\.0\.0\.1 - - \[[^]\n]+\] "
        self.assertRegex(log, begin + r'"GET /x\?y HTTP/1\.1" 200 -\n')
        self.assertRegex(log, begin + r'"HEAD /sse HTTP/1\.1" 200 -\n')
        self.assertRegex(log, begin + r'"FOO / HTTP/1\.1" 501 -\n')

    def test_streams_are_logged_like_other_requests(self):
        with mock.patch("sys.stderr", io.StringIO()) as stderr:
            self.connect(self.serve(handler=SSERequestHandler)).chunk()
            self.doCleanups()
        self.assertIn('"GET /sse HTTP/1.1" 200 -\n', stderr.getvalue())

    def test_control_characters_are_escaped_in_the_log(self):
        log = self.log_of(
            b"GET /\x1b[2J HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x1b[2J\x07\x9b a line that is no request\r\n\r\n",
        )
        self.assertIn(r"/\x1b[2J", log)
        self.assertNotRegex(log, r"[^\n -~]")


class ThePath(ServerCase):
    """Which targets lead to the stream."""

    def is_stream(self, server, target):
        """Tell whether a request for `target` gets the head of a stream."""
        request = f"HEAD {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        _, fields, _ = split_answer(self.ask(server, request.encode()))
        return fields["Content-Type"] == "text/event-stream"

    def assert_path(self, path, *, matches, differs=()):
        """Check which targets lead to the stream of a server with this `path`."""
        server = self.serve(path=path)
        for target in matches:
            with self.subTest(path=path, target=target):
                self.assertTrue(self.is_stream(server, target))
        for target in differs:
            with self.subTest(path=path, target=target):
                self.assertFalse(self.is_stream(server, target))

    def test_it_is_sse_by_default(self):
        server = self.serve()
        self.assertTrue(self.is_stream(server, "/sse"))
        self.assertFalse(self.is_stream(server, "/"))

    def test_it_can_be_chosen(self):
        self.assert_path(
            "/something",
            matches=["/something"],
            differs=["/sse", "/", "/something/x", "/something/", "/Something"],
        )

    def test_it_is_matched_as_it_was_sent(self):
        self.assert_path(
            "/sse",
            matches=["/sse"],
            differs=["//sse", "///sse", "/./sse", "/x/../sse", "/%73se", "/sse;a"],
        )
        self.assert_path("//sse", matches=["//sse"], differs=["/sse"])
        self.assert_path("/a%20b", matches=["/a%20b"], differs=["/a+b", "/a"])

    def test_the_query_takes_no_part(self):
        self.assert_path(
            "/sse",
            matches=["/sse?", "/sse?a=/b", "/sse?/", "/sse??"],
            differs=["/?/sse", "/x?/sse"],
        )
        self.assert_path("/a*b", matches=["/ab?c"], differs=["/a?b"])

    def test_a_target_may_name_the_scheme_and_the_host(self):
        self.assert_path(
            "/sse",
            matches=["http://localhost/sse", "HTTP://LOCALHOST/sse?a"],
            differs=["http://localhost//sse", "http://localhost/", "http://sse"],
        )
        self.assert_path("/", matches=["http://localhost/", "http://localhost"])

    def test_a_star_stands_for_any_characters(self):
        self.assert_path(
            "/something/*",
            matches=["/something/", "/something/a", "/something/a/b/c"],
            differs=["/something", "/somethingx", "/x/something/a"],
        )
        self.assert_path("*", matches=["/", "/x", "//x/y"])
        self.assert_path("*/a", matches=["/a", "/b/a"], differs=["/a/b", "/ba"])
        self.assert_path(
            "/*/b*c/*", matches=["/a/bc/", "/a/x/bxc/y", "//bc/"], differs=["/a/bc"]
        )

    def test_two_stars_do_not_match_the_same_characters(self):
        self.assert_path("/a*a", matches=["/aa", "/aba"], differs=["/a", "/ab"])
        self.assert_path("/*ab*ba", matches=["/abba", "/xabxba"], differs=["/aba"])

    def test_nothing_else_in_it_is_special(self):
        self.assert_path("/a.b", matches=["/a.b"], differs=["/axb"])
        self.assert_path(
            "/[ab]+*", matches=["/[ab]+", "/[ab]+x"], differs=["/a", "/aa", "/b+"]
        )

    def test_a_hostile_target_takes_no_time_to_match(self):
        server = self.serve(path="/*a*a*a*a*b")
        begun = time.monotonic()
        self.assertFalse(self.is_stream(server, "/" + "a" * 30_000))
        self.assertTrue(self.is_stream(server, "/" + "a" * 30_000 + "b"))
        self.assertLess(time.monotonic() - begun, 1)

    def test_it_must_begin_with_a_slash_or_a_star(self):
        for path in ("", "sse", "http://localhost/sse", " /sse"):
            with self.subTest(path=path), self.assertRaises(ValueError):
                SSEServer(("127.0.0.1", 0), path=path)


def head_with(*lines):
    """Return the head of a GET that has these header lines besides a Host."""
    return b"\r\n".join([b"GET / HTTP/1.1", b"Host: localhost", *lines, b"", b""])


class TheHead(ServerCase):
    """How the head of a request is read, and what is no head."""

    def ask_with_fin(self, server, request):
        """Send `request` and a FIN; return all that comes back."""
        with socket.create_connection(server.server_address[:2], PATIENCE) as peer:
            peer.sendall(request)
            peer.shutdown(socket.SHUT_WR)
            with peer.makefile("rb") as file:
                return file.read()

    def check(self, send, heads, *statuses):
        """Send each head: it gets one of `statuses`, and nothing else happens."""
        server = self.serve()
        with self.logged() as records, mock.patch("sys.stderr", io.StringIO()) as log:
            for head in heads:
                with self.subTest(head[:100]):
                    status, fields, text = split_answer(send(server, head))
                    self.assertIn(status, statuses)
                    self.assertEqual(len(text), int(fields["Content-Length"]))
            self.doCleanups()  # All is logged when the server's threads have ended.
        self.assertEqual([record for record in records if record.exc_info], [])
        self.assertEqual(log.getvalue(), "")

    def assert_accepted(self, *heads):
        """Send each head: it is answered with 200."""
        self.check(self.ask, heads, 200)

    def assert_refused(self, *heads):
        """Send each head: it is answered with 400."""
        self.check(self.ask, heads, 400)

    def fields_of(self, *lines):
        """Return what a handler finds in `self.headers` for these header lines."""
        found = []

        class Handler(QuietHandler):
            def serve_plain(self):
                found.append(self.headers)
                super().serve_plain()

        self.ask(self.serve(handler=Handler), head_with(*lines))
        self.assertEqual(len(found), 1, "the request was not served")
        return found[0]

    # --- header lines ---

    def test_a_well_formed_head_is_accepted(self):
        self.assert_accepted(
            head_with(),
            head_with(b"A: b", b"C:d", b"E:\t f \t", b"G:", b"H: ", b"I: j: k"),
            head_with(b"!#$%&'*+-.^_`|~09: token"),
            b"GET / HTTP/1.0\r\n\r\n",
        )

    def test_a_folded_line_is_answered_with_400(self):
        self.assert_refused(
            head_with(b"A: b", b" c"),
            head_with(b"A: b", b"\tC: d"),
            head_with(b"A: b", b" "),
            b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n",
        )

    def test_white_space_before_the_colon_is_answered_with_400(self):
        self.assert_refused(head_with(b"A : b"), head_with(b"A\t: b"))

    def test_a_line_without_a_colon_is_answered_with_400(self):
        self.assert_refused(head_with(b"foo"), head_with(b"foo", b"A: b"))

    def test_a_name_that_is_no_token_is_answered_with_400(self):
        names = (b"", b"A B", b"A(", b'"A"', b"A/", b"\xe9", b"A\x85", b"A\0", b"\x7f")
        self.assert_refused(*[head_with(name + b": b") for name in names])

    def test_a_bare_cr_is_answered_with_400(self):
        self.assert_refused(
            head_with(b"A: b\rc"),
            head_with(b"A: b\rC: d"),
            head_with(b"A: b\r"),
            head_with(b"A: \rb"),
            head_with(b"\r"),
        )

    def test_a_nul_is_answered_with_400(self):
        self.assert_refused(head_with(b"A: b\0c"), head_with(b"A: \0"))

    def test_lines_may_end_in_lf_alone(self):
        self.assert_accepted(
            b"GET / HTTP/1.1\nHost: localhost\n\n",
            b"GET / HTTP/1.1\r\nHost: localhost\nA: b\r\n\n",
        )

    def test_values_keep_their_inner_white_space_and_8_bit_characters(self):
        for sent, value in (
            (b"a  b\tc", "a  b\tc"),
            (b" \t a \t ", "a"),
            (b"", ""),
            (b"caf\xe9", "café"),
            # These are no white space in HTTP, though they are to str.strip, and
            # some of them are line breaks to str.splitlines.
            (b"\xa0a\x85", "\xa0a\x85"),
            (b"\x0ba\x0cb\x1cc\x1dd\x1e", "\x0ba\x0cb\x1cc\x1dd\x1e"),
        ):
            with self.subTest(sent):
                self.assertEqual(self.fields_of(b"A: " + sent)["A"], value)

    def test_the_headers_are_those_of_http_client(self):
        fields = self.fields_of(b"A: 1", b"b: 2", b"a: 3")
        self.assertIs(type(fields), http.client.HTTPMessage)
        self.assertEqual(fields["B"], "2")
        self.assertEqual(fields.get_all("A"), ["1", "3"])
        self.assertEqual(
            fields.items(), [("Host", "localhost"), ("A", "1"), ("b", "2"), ("a", "3")]
        )

    def test_a_line_that_confuses_the_email_parser_is_like_any_other(self):
        line = b"Content-Type: multipart/form-data; boundary*0=a; boundary*=b"
        self.assert_accepted(head_with(line), head_with(line, b"A: b"))

    def test_a_line_made_to_cost_time_costs_no_more_than_others(self):
        server = self.serve()

        def cost(value):
            request = head_with(b"Content-Type: " + value)
            begun = time.process_time()
            for _ in range(20):
                self.assertIn(b"okay", self.ask(server, request))
            return time.process_time() - begun

        good = cost(b"a" * 30_000)
        self.assertLess(cost(b'multipart/x;"'.ljust(30_000, b";")), 0.5 + 5 * good)

    # --- the request line ---

    def test_a_request_line_of_http_0_9_is_answered_with_400(self):
        self.assert_refused(
            b"GET /\r\n\r\n",
            b"GET /\r\nHost: localhost\r\n\r\n",
            b"GET / HTTP/0.9\r\n\r\n",
        )

    def test_a_request_line_of_other_than_three_words_is_answered_with_400(self):
        self.assert_refused(
            b"GET\r\n\r\n",
            b"GET HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET / x HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET / HTTP/1.1 x\r\nHost: localhost\r\n\r\n",
        )

    def test_a_request_line_split_by_other_than_one_space_is_answered_with_400(self):
        for space in (b"\t", b"\x0b", b"\x0c", b"\r", b"\x1c", b"\x85", b"\xa0", b"  "):
            self.assert_refused(
                head_with().replace(b"GET ", b"GET" + space),
                head_with().replace(b" HTTP", space + b"HTTP"),
            )

    def test_a_method_that_is_no_token_is_answered_with_400(self):
        for method in (b"G@T", b"GET:", b'"GET"', b"G\xcbT", b"G\0T", b"(GET)"):
            self.assert_refused(head_with().replace(b"GET", method))

    def test_a_version_that_is_none_is_answered_with_400(self):
        for version in (b"HTTP", b"HTTP/", b"HTTP/1", b"HTTP/1.x", b"FTP/1.1", b"/1.1"):
            self.assert_refused(head_with().replace(b"HTTP/1.1", version))

    def test_a_version_yet_to_come_is_answered_with_505(self):
        heads = [head_with().replace(b"1.1", number) for number in (b"9.9", b"2.0")]
        self.check(self.ask, heads, 505)

    def test_tls_is_answered_with_400(self):
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
        self.check(self.ask_with_fin, [hello], 400)
        self.assert_refused(hello + b"\n")

    def test_one_line_break_before_the_request_line_is_skipped(self):
        self.assert_accepted(b"\r\n" + head_with())

    # --- its size ---

    def test_a_hundred_lines_are_enough_and_more_are_too_many(self):
        self.assert_accepted(head_with(*[b"A: b"] * 99))
        self.check(self.ask, [head_with(*[b"A: b"] * 100)], 431)

    def test_32_kib_are_enough_and_more_are_too_many(self):
        self.assert_accepted(head_with(b"A: ".ljust(32_000, b"b")))
        self.assert_accepted(head_with(*[b"A: ".ljust(1000, b"b")] * 32))
        self.check(
            self.ask,
            [
                head_with(b"A: ".ljust(33_000, b"b")),
                head_with(*[b"A: ".ljust(1000, b"b")] * 33),
            ],
            431,
        )

    def test_a_request_line_may_be_as_long_as_a_head(self):
        target = b"/".ljust(32_000, b"x")
        self.assert_accepted(head_with().replace(b"/", target, 1))
        # RFC 9112, 3: the status for a target that is too long is 414.
        self.check(self.ask, [head_with().replace(b"/", target + target, 1)], 414, 431)

    def test_a_head_without_an_end_is_not_read_for_ever(self):
        endless = b"x" * 5_000_000  # Most of it stays unread, and yet it is answered.
        heads = [endless, b"GET /" + endless, b"GET / HTTP/1.1\r\nA: " + endless]
        self.check(self.ask, heads, 414, 431)

    # --- its end ---

    def test_a_head_that_ends_before_its_blank_line_is_answered_with_400(self):
        head = b"GET / HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\n\r"
        cuts = (1, 4, 14, 15, 16, 20, 33, 35, 41, 43, len(head) - 1, len(head))
        self.check(self.ask_with_fin, [head[:cut] for cut in cuts], 400)

    def test_a_head_may_come_byte_by_byte(self):
        server = self.serve()
        with socket.create_connection(server.server_address[:2], PATIENCE) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in head_with(b"A: b"):
                peer.sendall(bytes([byte]))
            with peer.makefile("rb") as file:
                self.assertEqual(split_answer(file.read())[0], 200)

    def test_a_connection_serves_one_request(self):
        server = self.serve()
        for line in (b"A: b", b"Connection: keep-alive"):
            answer = self.ask(server, head_with(line) * 2)
            self.assertEqual(answer.count(b"HTTP/1.1 "), 1)
            self.assertTrue(answer.endswith(b"\r\n\r\nokay"))

    # --- its time ---

    def drip(self, server, head):
        """Send `head` slowly, byte by byte; return the answer and how long it took."""
        begun, answer = time.monotonic(), b""
        peer = Peer(server, head=b"")
        with contextlib.closing(peer), contextlib.suppress(ConnectionError):
            for byte in head:
                if select.select([peer.socket], [], [], 0.01)[0]:
                    break
                peer.socket.sendall(bytes([byte]))
            answer = peer.read_body()
        return answer, time.monotonic() - begun

    def assert_late(self, answer, seconds):
        """Check how a head ended for which there were 0.3 s."""
        self.assertRegex(answer, rb"\A(HTTP/1\.1 408 |\Z)")
        self.assertGreater(seconds, 0.25)
        self.assertLess(seconds, 3)

    @mock.patch.object(SSEServer, "head_timeout", 0.3)
    def test_a_head_that_is_late_is_not_waited_for(self):
        server = self.serve()
        heads = (b"", b"G" * 1000, head_with(*[b"A: b"] * 90))
        with ThreadPoolExecutor(len(heads)) as pool:
            ends = pool.map(lambda head: self.drip(server, head), heads)
            for head, end in zip(heads, ends):
                with self.subTest(head[:20]):
                    self.assert_late(*end)

    @mock.patch.object(SSEServer, "head_timeout", 0.3)
    def test_a_stream_outlives_the_time_for_its_head(self):
        clients = []
        server = self.serve(clients.append)
        peer = self.connect(server)
        peer.chunk()
        self.drip(server, b"GET /")  # It returns when the time for it is over.
        clients[0].send("still here")
        self.assertEqual(peer.data(), "still here")

    @mock.patch.object(SSEServer, "head_timeout", 0.3)
    def test_handle_request_does_not_wait_for_a_late_head_either(self):
        server = SSEServer(("127.0.0.1", 0), RequestHandlerClass=QuietHandler)
        self.addCleanup(server.server_close)
        with ThreadPoolExecutor(1) as pool:
            end = pool.submit(self.drip, server, b"GET /")
            server.handle_request()
            self.assert_late(*end.result())


def answering(function):
    """Return a handler class that answers every request by `function(handler)`."""

    class Handler(QuietHandler):
        def do_POST(self):
            function(self)

        do_PUT = do_PATCH = do_DELETE = serve_plain = do_POST

    return Handler


def send_page(handler, page=b"a page", **headers):
    """Answer as a program does that knows http.server."""
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(page)))
    handler.end_headers()
    handler.wfile.write(page)


def say_goodbye(client):
    """Be an on_connection that sends one event and ends the stream."""
    client.send("goodbye")
    client.close()


def listed(headers, name):
    """Return the elements of a field that is a list, in lower case."""
    fields = ",".join(headers.get_all(name, []))
    return {element.strip().lower() for element in fields.split(",") if element}


class RequestCase(ServerCase):
    """Sends requests, and reads their answers to the end."""

    def answer(self, server, path="/", **options):
        """Send a request; return the Peer that has read an answer that is no stream."""
        peer = Peer(server, path, **options)
        try:
            peer.read_head()
            peer.body = peer.read_body()
        finally:
            peer.close()
        peer.text = peer.body.decode(errors="replace")
        return peer

    def status(self, server, path="/sse", *, method="HEAD", **options):
        """Return the status of the answer; by HEAD, so that a stream ends at once."""
        return self.answer(server, path, method=method, **options).status

    def events(self, server, path="/sse", **options):
        """Return what a stream that ends in good order has sent."""
        peer = self.connect(server, path, **options)
        self.assertEqual(peer.status, 200)
        return [data for _, data, _ in peer.finish().events]

    def finish_requests(self, server):
        """Stop the server, so that whatever its requests log is there."""
        server.shutdown()
        server.server_close()

    @contextlib.contextmanager
    def assert_logs(self, *exceptions):
        """Expect these exceptions in the log, and no other error or warning."""
        with self.logged(logging.WARNING) as records:
            yield
            wait_until(lambda: len(records) >= len(exceptions), "the log")
            self.assertEqual(
                [record.exc_info and record.exc_info[0] for record in records],
                list(exceptions),
            )


class AStreamInAnswer(RequestCase):
    """serve_stream."""

    def test_is_given_to_any_method_on_any_path(self):
        def on_connection(client):
            client.send(f"{client.path} {client.query}")
            client.close()

        handler = answering(lambda handler: handler.serve_stream(on_connection))
        server = self.serve(handler=handler)
        for method in ("POST", "PUT", "PATCH", "DELETE", "GET"):
            with self.subTest(method):
                peer = self.connect(server, "/a/b?c=d", method=method)
                self.assertEqual(peer.status, 200)
                self.assertEqual(peer.headers["Content-Type"], "text/event-stream")
                self.assertEqual(peer.data(), "/a/b {'c': ['d']}")
                self.assertEqual(peer.finish().events, [])

    def test_may_depend_on_the_body_of_the_request(self):
        def reverse(handler):
            body = handler.read_body()

            def on_connection(client):
                for byte in reversed(body):
                    client.send(chr(byte))
                client.close()

            handler.serve_stream(on_connection)

        server = self.serve(handler=answering(reverse))
        self.assertEqual(self.events(server, method="POST", body=b"abc"), list("cba"))

    def test_is_the_servers_unless_the_handler_gives_another(self):
        def serve(handler):
            if handler.path == "/own":
                handler.serve_stream(say_goodbye)
            else:
                handler.serve_stream()

        def on_connection(client):
            client.send("the server's")
            client.close()

        server = self.serve(on_connection, handler=answering(serve))
        self.assertEqual(self.events(server, "/own", method="POST"), ["goodbye"])
        self.assertEqual(self.events(server, "/", method="POST"), ["the server's"])

    def test_is_one_of_the_servers_streams(self):
        news = Channel()
        self.addCleanup(news.close)
        handler = answering(lambda handler: handler.serve_stream(news.subscribe))
        server = self.serve(handler=handler)
        peer = self.connect(server, method="POST")
        news.publish("hello")
        self.assertEqual(peer.data(), "hello")
        self.assertEqual(server.clients, news.clients)
        self.finish_requests(server)
        self.assertEqual(peer.finish().events, [])

    def test_is_plain_to_http_1_0(self):
        handler = answering(lambda handler: handler.serve_stream(say_goodbye))
        server = self.serve(handler=handler)
        answer = self.answer(server, method="POST", version="HTTP/1.0")
        self.assertEqual(answer.text, "data: goodbye\n\n")
        self.assertNotIn("Transfer-Encoding", answer.headers)

    def test_works_while_a_body_is_unread(self):
        handler = answering(lambda handler: handler.serve_stream(say_goodbye))
        server = self.serve(handler=handler)
        events = self.events(server, method="POST", body=b"x" * 20_000)
        self.assertEqual(events, ["goodbye"])

    def test_has_the_headers_that_it_is_given(self):
        cookies = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]

        def serve(handler):
            headers = {"X-Test": "yes"} if handler.path == "/mapping" else cookies
            handler.serve_stream(say_goodbye, headers=headers)

        server = self.serve(handler=answering(serve))
        peer = self.connect(server, "/mapping", method="POST")
        self.assertEqual(peer.headers["X-Test"], "yes")
        peer = self.connect(server, "/pairs", method="POST")
        self.assertEqual(peer.headers.get_all("Set-Cookie"), ["a=1", "b=2"])

    def test_refuses_headers_that_would_break_its_head(self):
        calls = []
        bad = [
            *((name, "x") for name in ("", "a b", "a:", "a\r\nb", "é", "a\0")),
            *(("X-Test", value) for value in ("a\rb", "a\nb", "a\r\nb: c", "\0")),
            ("Content-Type", "text/html"),
            ("content-length", "5"),
            ("Transfer-Encoding", "gzip"),
            ("CONNECTION", "keep-alive"),
        ]

        def serve(handler):
            pair = bad[int(handler.path[1:])]
            handler.serve_stream(calls.append, headers=[("X-Good", "x"), pair])

        server = self.serve(handler=answering(serve))
        for number, pair in enumerate(bad):
            with self.subTest(pair), self.assert_logs(ValueError):
                answer = self.answer(server, f"/{number}", method="POST")
                self.assertEqual(answer.status, 500)
                self.assertNotIn("X-Good", answer.headers)
                self.assertNotIn("Transfer-Encoding", answer.headers)
        self.assertEqual(calls, [])

    def test_merges_vary_into_one_line(self):
        given = [("Vary", "Cookie"), ("vary", "Accept, Origin")]

        def serve(handler):
            handler.serve_stream(say_goodbye, headers=given)

        server = self.serve(
            handler=answering(serve), allowed_origins=["https://app.example"]
        )
        peer = self.connect(server, method="POST")
        self.assertEqual(len(peer.headers.get_all("Vary")), 1)
        self.assertEqual(listed(peer.headers, "Vary"), {"accept", "cookie", "origin"})

    def test_is_its_head_alone_to_head(self):
        calls = []

        def on_connection(client):
            calls.append(client)
            client.close()

        headers = {"X-Test": "yes"}
        handler = answering(
            lambda handler: handler.serve_stream(on_connection, headers)
        )
        server = self.serve(handler=handler)
        answer = self.answer(server, "/", method="HEAD")
        self.assertEqual(answer.body, b"")
        self.assertEqual(calls, [])
        peer = self.connect(server, "/")
        for message in (answer.headers, peer.headers):
            del message["Date"]
        self.assertEqual(answer.status_line, peer.status_line)
        self.assertEqual(sorted(answer.headers.items()), sorted(peer.headers.items()))

    def test_ends_in_good_order_when_on_connection_fails(self):
        def fail(client):
            if client.path == "/late":
                client.send("something")
            raise ZeroDivisionError

        handler = answering(lambda handler: handler.serve_stream(fail))
        server = self.serve(handler=handler)
        for path, events in (("/soon", []), ("/late", ["something"])):
            with self.subTest(path), self.assert_logs(ZeroDivisionError):
                self.assertEqual(self.events(server, path, method="POST"), events)

    def test_logs_a_broken_pipe_only_while_it_is_open(self):
        def on_connection(client):
            if client.path == "/ended":
                client.close()
                client.send("too late")
            raise BrokenPipeError("from a subprocess, say")

        handler = answering(lambda handler: handler.serve_stream(on_connection))
        for path, errors in (("/ended", []), ("/open", [BrokenPipeError])):
            with self.subTest(path), self.assert_logs(*errors):
                server = self.serve(handler=handler)
                self.assertEqual(self.events(server, path, method="POST"), [])
                self.finish_requests(server)

    def test_is_that_of_serve_stream_even_if_its_function_is_empty(self):
        class Room(list):
            def __call__(self, client):
                client.send("welcome to an empty room")
                client.close()

        handler = answering(lambda handler: handler.serve_stream(Room()))
        server = self.serve(say_goodbye, handler=handler)
        events = self.events(server, "/room")
        self.assertEqual(events, ["welcome to an empty room"])

    def test_follows_a_body_that_was_put_back(self):
        def put_back(handler):
            handler.rfile = io.BytesIO(handler.read_body())
            handler.serve_stream(say_goodbye)

        server = self.serve(handler=answering(put_back))
        self.assertEqual(self.events(server, method="POST", body=b"x"), ["goodbye"])

    def test_is_given_even_if_the_request_log_fails(self):
        class Handler(SSERequestHandler):
            def log_message(self, *arguments):
                raise OSError("the disk is full")

        server = self.serve(say_goodbye, handler=Handler)
        with self.logged():
            for _ in range(3):
                self.assertEqual(self.events(server), ["goodbye"])
                self.assertEqual(self.answer(server).text, "okay")
                self.assertEqual(self.status(server, "/x", method="PUT"), 405)

    def test_does_not_mix_with_the_handlers_own_reading_and_writing(self):
        def serve(handler):
            def on_connection(client):
                for step in (
                    handler.read_body,
                    lambda: handler.rfile.read(1),
                    lambda: handler.wfile.write(b"x"),
                ):
                    with self.assertRaises((RuntimeError, ValueError)):
                        step()
                client.send("in order")
                client.close()

            handler.serve_stream(on_connection)

        server = self.serve(handler=answering(serve))
        self.assertEqual(self.events(server, method="POST", body=b"x"), ["in order"])

    def test_may_be_followed_by_a_flush(self):
        class Handler(QuietHandler):
            def do_GET(self):
                super().do_GET()
                self.wfile.flush()

        server = self.serve(say_goodbye, handler=Handler)
        with self.assert_logs():
            self.assertEqual(self.events(server), ["goodbye"])
            self.finish_requests(server)

    def test_is_in_http_1_0_if_the_handler_speaks_that(self):
        class Handler(QuietHandler):
            protocol_version = "HTTP/1.0"

        server = self.serve(say_goodbye, handler=Handler)
        answer = self.ask(server, b"GET /sse HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertRegex(answer, rb"\AHTTP/1.0 200 ")
        self.assertNotIn(b"chunked", answer)
        self.assertTrue(answer.endswith(b"\r\n\r\ndata: goodbye\n\n"))

    def test_has_no_headers_that_only_pretend_to_be_harmless(self):
        smuggled = LyingStr("a\r\nSmuggled: yes")
        harmless = LyingStr("a")
        for headers in ({"X-A": smuggled}, {smuggled: "a"}):
            with self.subTest(headers=headers), self.assertRaises(ValueError):
                sse_ref.Refusal(404, headers=headers)
        handler = answering(
            lambda handler: handler.serve_stream(say_goodbye, {"X-A": harmless})
        )
        peer = self.connect(self.serve(handler=handler), "/")
        self.assertEqual(peer.headers["X-A"], "a")


class ABody(RequestCase):
    """read_body."""

    def serve_bodies(self, *arguments, **options):
        """Serve; `bodies` is what read_body has returned so far."""

        def echo(handler):
            self.reading.set()
            self.bodies.append(handler.read_body(*arguments))
            send_page(handler, self.bodies[-1])

        self.bodies, self.reading = [], threading.Event()
        handler = answering(echo)
        handler.linger = 0.1
        return self.serve(handler=handler, **options)

    def post(self, server, *fields, body=b""):
        """Send a POST with these fields (bytes), and return the answer's status."""
        lines = [b"POST / HTTP/1.1", b"Host: localhost", *fields, b"", body]
        answer = self.ask(server, b"\r\n".join(lines))
        return int(answer.split()[1])

    def begin(self, server, part=b"half of ", length=16, **headers):
        """Send a head and part of a body; return the Peer once a handler reads it."""
        peer = Peer(server, "/", method="POST", Content_Length=length, **headers)
        self.addCleanup(peer.close)
        peer.socket.sendall(part)
        self.assertTrue(self.reading.wait(PATIENCE))
        return peer

    def test_is_returned_whole(self):
        server = self.serve_bodies()
        for body in (b"", b"x", b"\r\n\r\n\0\xff", b"0123456789abcdef" * 2**16):
            with self.subTest(body[:10]):
                answer = self.answer(
                    server, method="POST", body=body, Content_Length=len(body)
                )
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer.body, body)

    def test_is_returned_whole_that_comes_in_parts(self):
        server = self.serve_bodies()
        peer = self.begin(server)
        peer.socket.sendall(b"the ")
        peer.socket.sendall(b"body")
        self.assertEqual(peer.read_head().read_body(), b"half of the body")

    def test_is_read_once(self):
        def read_twice(handler):
            handler.read_body()
            handler.read_body()

        server = self.serve(handler=answering(read_twice))
        with self.assert_logs(RuntimeError):
            head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n"
            answer = self.ask(server, head + b"xyz")
        self.assertRegex(answer, rb"\AHTTP/1.1 500 ")

    def test_has_the_time_that_the_handlers_class_gives_it(self):
        server = self.serve_bodies()
        server.RequestHandlerClass.timeout = 0.2
        peer = self.begin(server)
        self.assertEqual(peer.read_head().status, 408)

    def test_without_a_length_is_refused_by_411(self):
        server = self.serve_bodies()
        for fields in (
            [],
            [b"Transfer-Encoding: chunked"],
            [b"Transfer-Encoding: chunked", b"Content-Length: 5"],
            [b"Content-Length: 5", b"Transfer-Encoding: identity"],
        ):
            with self.subTest(fields):
                self.assertEqual(self.post(server, *fields, body=b"5\r\nabcde"), 411)
        self.assertEqual(self.bodies, [])

    def test_with_a_length_that_is_no_number_is_refused_by_400(self):
        server = self.serve_bodies()
        for length in (
            *(b"+5", b"-5", b"5 5", b"5, 5", b"5.0", b"0x5", b"1_0", b"5e0", b""),
            *("\u0665".encode(), "\uff15".encode(), b"\xb2", b"five"),
        ):
            with self.subTest(length):
                field = b"Content-Length: " + length
                self.assertEqual(self.post(server, field, body=b"abcde"), 400)
        self.assertEqual(self.bodies, [])

    def test_may_have_its_length_twice_but_not_two_lengths(self):
        server = self.serve_bodies()
        five, six = b"Content-Length: 5", b"content-length: 6"
        for fields in ((five, six), (six, five), (five, six, five)):
            with self.subTest(fields):
                self.assertEqual(self.post(server, *fields, body=b"abcdef"), 400)
        self.assertEqual(self.post(server, five, five, body=b"abcde"), 200)
        self.assertEqual(self.bodies, [b"abcde"])

    def test_that_is_too_long_is_refused_by_413_before_it_comes(self):
        server = self.serve_bodies(5)
        for length in (b"6", b"9" * 5000):
            with self.subTest(length[:10]):
                self.assertEqual(self.post(server, b"Content-Length: " + length), 413)
        status = self.post(server, b"Content-Length: 5", body=b"abcde")
        self.assertEqual(status, 200)
        self.assertEqual(self.bodies, [b"abcde"])

    def test_may_have_a_mib_where_nothing_else_is_said(self):
        server = self.serve_bodies()
        field = b"Content-Length: %d"
        self.assertEqual(self.post(server, field % (2**20 + 1)), 413)
        self.assertEqual(self.post(server, field % 2**20, body=b"x" * 2**20), 200)

    def test_that_ends_early_is_refused_by_400(self):
        server = self.serve_bodies()
        peer = self.begin(server)
        peer.socket.shutdown(socket.SHUT_WR)
        self.assertEqual(peer.read_head().status, 400)
        self.assertEqual(self.bodies, [])

    def test_that_stops_is_refused_by_408(self):
        with mock.patch.object(SSERequestHandler, "body_timeout", 0.2):
            server = self.serve_bodies()
            peer = self.begin(server)
            self.assertEqual(peer.read_head().status, 408)
        self.assertEqual(self.bodies, [])

    def test_that_drips_is_refused_by_408_all_the_same(self):
        with mock.patch.object(SSERequestHandler, "body_timeout", 0.3):
            server = self.serve_bodies()
            peer = self.begin(server, length=1_000_000)
            deadline = time.monotonic() + PATIENCE
            while not select.select([peer.socket], [], [], 0.05)[0]:
                peer.socket.sendall(b"x")
                self.assertLess(time.monotonic(), deadline)
            self.assertEqual(peer.read_head().status, 408)
        self.assertEqual(self.bodies, [])

    def test_is_asked_for_at_once_by_100_continue(self):
        def read(handler):
            length = int(handler.headers["Content-Length"])
            send_page(handler, handler.rfile.read(length))

        for server in (self.serve_bodies(), self.serve(handler=answering(read))):
            with self.subTest(server.RequestHandlerClass):
                peer = Peer(
                    server,
                    "/",
                    method="POST",
                    Content_Length=5,
                    Expect="100-continue",
                )
                self.addCleanup(peer.close)
                self.assertEqual(peer.file.readline(), b"HTTP/1.1 100 Continue\r\n")
                self.assertEqual(peer.file.readline(), b"\r\n")
                peer.socket.sendall(b"abcde")
                self.assertEqual(peer.read_head().status, 200)
                self.assertEqual(peer.read_body(), b"abcde")

    def test_is_not_asked_for_where_100_continue_makes_no_sense(self):
        server = self.serve(handler=answering(send_page))
        for request in (b"HEAD / HTTP/1.1", b"POST / HTTP/1.0"):
            with self.subTest(request):
                fields = b"Host: localhost\r\nContent-Length: 0\r\nExpect: 100-continue"
                answer = self.ask(server, request + b"\r\n" + fields + b"\r\n\r\n")
                self.assertRegex(answer, rb"\AHTTP/1.1 200 ")

    def test_may_be_refused_after_100_continue(self):
        server = self.serve_bodies(5)
        fields = b"Content-Length: 6", b"Expect: 100-continue"
        lines = [b"POST / HTTP/1.1", b"Host: localhost", *fields, b"", b"abcdef"]
        answer = self.ask(server, b"\r\n".join(lines))
        self.assertIn(b"HTTP/1.1 413 ", answer)

    def test_that_a_program_reads_by_itself_keeps_the_time_out_of_http_server(self):
        class Handler(answering(lambda handler: handler.rfile.read(5))):
            timeout = 0.1

        server = self.serve(handler=Handler)
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"
        self.assertEqual(self.ask(server, head), b"")

    def test_is_not_taken_for_whole_when_the_server_stops(self):
        server = self.serve_bodies()
        with self.assert_logs():
            self.begin(server)
            begun = time.monotonic()
            self.finish_requests(server)
            self.assertLess(time.monotonic() - begun, 3)
        self.assertEqual(self.bodies, [])


class ARefusal(RequestCase):
    """Refusal."""

    def refuse(self, *arguments, **options):
        """Return a function that raises this refusal, whatever it is given."""

        def refuse(_):
            raise sse_ref.Refusal(*arguments, **options)

        return refuse

    def places(self, *arguments, **options):
        """Serve for each place in which this refusal may be raised; name them."""
        refuse = self.refuse(*arguments, **options)
        handler = answering(lambda handler: handler.serve_stream(refuse))
        return {
            "serve_plain": self.serve(handler=answering(refuse), path="/no"),
            "authorize": self.serve(authorize=refuse),
            "on_connection": self.serve(refuse),
            "serve_stream": self.serve(handler=handler, path="/no"),
        }

    def test_is_the_answer_wherever_it_is_raised(self):
        text, headers = "Zu schnell für uns.", {"Retry-After": "7"}
        for place, server in self.places(429, text, headers).items():
            with self.subTest(place), self.assert_logs():
                answer = self.answer(server, "/sse")
                self.assertEqual(answer.status, 429)
                self.assertEqual(answer.headers["Retry-After"], "7")
                self.assertEqual(answer.headers.get_content_type(), "text/plain")
                self.assertEqual(answer.headers.get_content_charset(), "utf-8")
                length = str(len(answer.body))
                self.assertEqual(answer.headers["Content-Length"], length)
                self.assertEqual(answer.text.strip(), text)
                self.finish_requests(server)

    def test_may_answer_any_method(self):
        server = self.serve(handler=answering(self.refuse(402)))
        for method in ("POST", "PUT", "DELETE"):
            with self.subTest(method), self.assert_logs():
                self.assertEqual(self.status(server, "/", method=method), 402)

    def test_takes_its_headers_as_a_mapping_or_as_pairs(self):
        for headers, cookies in (
            ({"Set-Cookie": "a=1"}, ["a=1"]),
            ([("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")], ["a=1", "b=2"]),
        ):
            for place, server in self.places(401, headers=headers).items():
                with self.subTest(place, headers=headers):
                    answer = self.answer(server, "/sse")
                    self.assertEqual(answer.headers.get_all("Set-Cookie"), cookies)

    def test_does_not_let_a_header_break_the_head(self):
        for header in (("X", "a\r\nX-Evil: b"), ("X\r\nX-Evil", "b")):
            for place, server in self.places(302, headers=[header]).items():
                with self.subTest(place, header=header), self.logged():
                    answer = self.answer(server, "/sse")
                    self.assertNotEqual(answer.status, 302)
                    self.assertNotIn("X-Evil", answer.headers)

    def test_does_not_take_a_header_that_is_no_text(self):
        for header in (("X", 5), (5, "x"), ("X", b"x")):
            with self.subTest(header), self.assertRaises(TypeError):
                sse_ref.Refusal(404, headers=[header])

    def test_has_a_status_from_200_to_599(self):
        for status in (200, 299, 404, 418, 599, HTTPStatus.NOT_FOUND):
            with self.subTest(status):
                server = self.serve(handler=answering(self.refuse(status)))
                self.assertEqual(self.answer(server).status, status)
        for status in (199, 600, 0, -404):
            with self.subTest(status), self.assertRaises(ValueError):
                sse_ref.Refusal(status)
        for status in ("404", 404.0, None):
            with self.subTest(status), self.assertRaises((TypeError, ValueError)):
                sse_ref.Refusal(status)

    def test_by_204_205_and_304_has_no_body(self):
        for status in (204, 205, 304):
            for place, server in self.places(status, "Nobody will read this.").items():
                with self.subTest(place, status=status):
                    answer = self.answer(server, "/sse")
                    self.assertEqual(answer.status, status)
                    self.assertEqual(answer.body, b"")
                    self.assertNotIn("Content-Type", answer.headers)
                    if status == 204:
                        self.assertNotIn("Content-Length", answer.headers)

    def test_is_its_head_alone_to_head(self):
        for place, server in self.places(404, "There is nothing here.").items():
            if place in ("on_connection", "serve_stream"):
                continue  # it is not called to answer HEAD
            with self.subTest(place):
                head = self.answer(server, "/sse", method="HEAD")
                self.assertEqual(head.status, 404)
                self.assertEqual(head.body, b"")
                body = self.answer(server, "/sse").body
                self.assertEqual(head.headers["Content-Length"], str(len(body)))

    def test_replaces_a_head_that_was_begun(self):
        def begin(handler):
            handler.send_response(200)
            handler.send_header("X-Draft", "yes")
            raise sse_ref.Refusal(404)

        server = self.serve(handler=answering(begin))
        answer = self.ask(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertRegex(answer, rb"\AHTTP/1.1 404 ")
        self.assertEqual(answer.count(b"HTTP/1.1"), 1)
        self.assertNotIn(b"X-Draft", answer)

    def test_adds_no_second_answer_to_one_that_was_sent(self):
        def send(handler):
            send_page(handler)
            raise sse_ref.Refusal(404)

        server = self.serve(handler=answering(send))
        with self.logged():
            answer = self.ask(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertRegex(answer, rb"\AHTTP/1.1 200 ")
        self.assertTrue(answer.endswith(b"\r\n\r\na page"), answer)

    def test_is_an_error_in_a_stream_that_has_begun(self):
        begin = {
            "/send": lambda client: client.send("something"),
            "/comment": lambda client: client.comment("something"),
            "/wait": lambda client: client.wait(0),
        }

        def on_connection(client):
            begin[client.path](client)
            raise sse_ref.Refusal(404)

        server = self.serve(on_connection, path="/*")
        for path in begin:
            with self.subTest(path), self.assert_logs(sse_ref.Refusal):
                peer = self.connect(server, path)
                self.assertEqual(peer.status, 200)
                peer.finish()

    def test_ends_the_client_for_other_threads_too(self):
        clients, closed = [], []

        def refuse(client):
            client.on_close(closed.append)
            clients.append(client)
            raise sse_ref.Refusal(404)

        server = self.serve(refuse)
        self.assertEqual(self.answer(server, "/sse").status, 404)
        wait_until(lambda: closed, "the callback")
        self.assertEqual(closed, clients)
        self.assertTrue(clients[0].closed)
        self.assertEqual(server.clients, frozenset())
        with self.assertRaises(BrokenPipeError):
            clients[0].send("too late")

    def test_may_neither_be_cached_nor_sniffed(self):
        def choose(handler):
            if handler.path == "/body":
                handler.read_body()
            elif handler.path == "/failure":
                raise ZeroDivisionError
            raise sse_ref.Refusal(404)

        own = self.serve(handler=answering(choose))
        plain = self.serve(authorize=lambda _: False)
        with self.logged():
            for server, method, path, status in (
                (own, "GET", "/", 404),
                (own, "POST", "/body", 411),
                (own, "GET", "/failure", 500),
                (own, "FOO", "/", 501),
                (plain, "GET", "/sse", 403),
                (plain, "POST", "/", 405),
                (plain, "OPTIONS", "/", 204),
            ):
                with self.subTest(status):
                    answer = self.answer(server, path, method=method)
                    self.assertEqual(answer.status, status)
                    self.assertEqual(answer.headers["Cache-Control"], "no-store")
                    if answer.body:
                        sniffing = answer.headers["X-Content-Type-Options"]
                        self.assertEqual(sniffing, "nosniff")


class AFailure(RequestCase):
    """An exception that a handler lets out."""

    def raising(self, error):
        """Return a handler class that raises `error` in every method and page."""

        def fail(_):
            raise error

        return answering(fail)

    def test_is_logged_and_answered_with_500_whatever_its_class(self):
        for error in (
            KeyError("a secret"),
            ValueError("a secret"),
            ConnectionRefusedError("a secret"),  # by a database, say
            ConnectionResetError("a secret"),
            BrokenPipeError("a secret"),  # of a subprocess, say
            TimeoutError("a secret"),
            socket.timeout("a secret"),
            SystemExit("a secret"),
        ):
            server = self.serve(handler=self.raising(error))
            for method in ("GET", "POST"):
                kind = type(error)
                with self.subTest(kind, method=method), self.assert_logs(kind):
                    answer = self.answer(server, method=method)
                    self.assertEqual(answer.status, 500)
                    self.assertNotIn("secret", f"{answer.headers} {answer.text}")

    def test_is_logged_with_its_traceback_as_an_error(self):
        server = self.serve(handler=self.raising(KeyError("a secret")))
        with self.logged() as records:
            self.answer(server)
            wait_until(lambda: records)
        (record,) = records
        self.assertEqual(record.levelno, logging.ERROR)
        self.assertIn("in fail", logging.Formatter().format(record))

    def test_is_answered_by_the_head_alone_to_head(self):
        server = self.serve(handler=self.raising(KeyError()))
        with self.assert_logs(KeyError):
            answer = self.answer(server, method="HEAD")
        self.assertEqual(answer.status, 500)
        self.assertEqual(answer.body, b"")

    def test_replaces_a_head_that_was_begun(self):
        def begin(handler):
            handler.send_response(200)
            handler.send_header("X-Draft", "yes")
            raise KeyError

        server = self.serve(handler=answering(begin))
        with self.assert_logs(KeyError):
            answer = self.ask(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertRegex(answer, rb"\AHTTP/1.1 500 ")
        self.assertEqual(answer.count(b"HTTP/1.1"), 1)
        self.assertNotIn(b"X-Draft", answer)

    def test_adds_no_second_answer_to_one_that_was_begun(self):
        def send(handler):
            handler.send_response(200)
            handler.end_headers()
            if handler.path == "/half":
                handler.wfile.write(b"half a p")
            raise KeyError

        server = self.serve(handler=answering(send))
        for path, rest in ((b"/half", b"half a p"), (b"/head", b"")):
            with self.subTest(path), self.assert_logs(KeyError):
                request = b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
                answer = self.ask(server, request)
                self.assertRegex(answer, rb"\AHTTP/1.1 200 ")
                self.assertEqual(answer.partition(b"\r\n\r\n")[2], rest)

    def test_is_answered_with_500_if_a_write_has_sent_nothing(self):
        def write_text(handler):
            handler.send_response(200)
            handler.wfile.write("text, where bytes belong")

        def write_nothing(handler):
            handler.wfile.write(b"")
            raise KeyError

        for page, kind in ((write_text, TypeError), (write_nothing, KeyError)):
            server = self.serve(handler=answering(page))
            with self.subTest(kind), self.assert_logs(kind):
                self.assertEqual(self.answer(server).status, 500)

    def test_outside_of_a_method_is_logged_too(self):
        class Handler(QuietHandler):
            def setup(self):
                super().setup()
                Path("/there/is/no/such/file").read_text()

        server = self.serve(handler=Handler)
        with self.assert_logs(FileNotFoundError):
            self.ask(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")

    def test_by_the_loss_of_this_connection_is_quiet_whatever_is_tried_then(self):
        begun, lost = threading.Event(), threading.Event()

        def work(handler):
            try:
                begun.set()
                self.assertTrue(lost.wait(PATIENCE))
                while True:
                    handler.wfile.write(b"x" * 100_000)
            finally:
                with contextlib.suppress(OSError):
                    handler.wfile.write(b"farewell")

        with self.assert_logs(), self.silence():
            server = self.serve(handler=answering(work))
            peer = Peer(server, "/")
            self.addCleanup(peer.close)
            self.assertTrue(begun.wait(PATIENCE))
            peer.reset()
            lost.set()
            self.finish_requests(server)

    def test_leaves_the_server_to_others(self):
        def choose(handler):
            if handler.path == "/exit":
                raise SystemExit
            send_page(handler)

        server = self.serve(handler=answering(choose))
        with self.assert_logs(SystemExit):
            self.answer(server, "/exit")
        self.assertEqual(self.answer(server).text, "a page")

    def test_by_the_loss_of_this_connection_is_quiet(self):
        begun, lost, ended = (threading.Event() for _ in range(3))

        def work(handler):
            begun.set()
            try:
                if handler.command == "POST":
                    handler.read_body()
                self.assertTrue(lost.wait(PATIENCE))
                handler.send_response(200)
                handler.end_headers()
                while True:
                    handler.wfile.write(b"x" * 100_000)
            finally:
                ended.set()

        for method, options in (("GET", {}), ("POST", {"Content_Length": 1000})):
            with self.subTest(method), self.assert_logs(), self.silence():
                for event in (begun, lost, ended):
                    event.clear()
                server = self.serve(handler=answering(work))
                peer = Peer(server, "/", method=method, **options)
                self.addCleanup(peer.close)
                self.assertTrue(begun.wait(PATIENCE))
                peer.reset()
                lost.set()
                self.assertTrue(ended.wait(PATIENCE))
                self.finish_requests(server)

    def test_by_a_reset_at_any_time_is_quiet(self):
        with self.assert_logs(), self.silence():
            server = self.serve()
            for head in (
                b"",
                b"GET /",
                b"GET / HTTP/1.1\r\nHost: localhost\r\n",
                b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
                b"GET /sse HTTP/1.1\r\nHost: localhost\r\n\r\n",
                b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n",
            ):
                Peer(server, head=head).reset()
            self.assertEqual(self.answer(server).text, "okay")
            self.finish_requests(server)

    @contextlib.contextmanager
    def silence(self):
        """Expect that nothing is written to standard error, not by threads either."""
        with mock.patch("sys.stderr", io.StringIO()) as stderr:
            yield
        self.assertEqual(stderr.getvalue(), "")


class AMethod(RequestCase):
    """What is called by a request, and what a handler of one's own may rely on."""

    def allowed(self, answer):
        """Return the methods in Allow, of which there is one line."""
        self.assertEqual(len(answer.headers.get_all("Allow", [])), 1)
        return {element.strip() for element in answer.headers["Allow"].split(",")}

    def test_that_is_not_defined_gets_405_and_the_list_of_those_that_are(self):
        server = self.serve()
        for method in ("POST", "PUT", "PATCH", "DELETE", "CONNECT", "TRACE"):
            for path in ("/", "/sse"):
                with self.subTest(method, path=path):
                    answer = self.answer(server, path, method=method)
                    self.assertEqual(answer.status, 405)
                    self.assertEqual(self.allowed(answer), {"GET", "HEAD", "OPTIONS"})
                    self.assertRegex(answer.text, r"\A[^\n]+\n\Z")

    def test_that_is_unknown_to_http_gets_501(self):
        class Handler(QuietHandler):
            def do_login(self):
                raise AssertionError("a helper was called by a request")

        server = self.serve(handler=Handler)
        for method in (
            *("FOO", "get", "post", "plain", "serve_plain", "__init__"),
            *("login", "LOGIN", "Login", "GET_"),
        ):
            with self.subTest(method):
                self.assertEqual(self.answer(server, method=method).status, 501)
        self.assertEqual(
            self.allowed(self.answer(server, method="PUT")), {"GET", "HEAD", "OPTIONS"}
        )

    def test_of_the_programs_own_is_called_and_listed(self):
        class Handler(QuietHandler):
            def do_PUT(self):
                send_page(self, self.command.encode())

            do_OPTIONS = do_PROPFIND = do_PUT

        server = self.serve(handler=Handler)
        for method in ("PUT", "OPTIONS", "PROPFIND"):
            with self.subTest(method):
                answer = self.answer(server, "/a/b", method=method)
                self.assertEqual(answer.text, method)
        wanted = {"GET", "HEAD", "OPTIONS", "PUT", "PROPFIND"}
        answer = self.answer(server, method="DELETE")
        self.assertEqual(answer.status, 405)
        self.assertEqual(self.allowed(answer), wanted)

    def test_of_an_existing_handler_is_kept_on_either_side(self):
        class Existing(BaseHTTPRequestHandler):
            def do_POST(self):
                send_page(self, self.command.encode())

            do_DELETE = do_POST

        class OnTheRight(QuietHandler, Existing):
            pass

        class OnTheLeft(Existing, QuietHandler):
            pass

        for handler in (OnTheRight, OnTheLeft):
            server = self.serve(say_goodbye, handler=handler)
            with self.subTest(handler.__name__):
                for method in ("POST", "DELETE"):
                    answer = self.answer(server, "/sse", method=method, body=b"x")
                    self.assertEqual(answer.text, method)
                answer = self.answer(server, method="PUT")
                self.assertEqual(answer.status, 405)
                wanted = {"GET", "HEAD", "OPTIONS", "POST", "DELETE"}
                self.assertEqual(self.allowed(answer), wanted)
                self.assertEqual(self.events(server), ["goodbye"])

    def test_options_is_answered_with_the_methods_that_are_defined(self):
        server = self.serve(handler=answering(send_page))
        methods = {"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"}
        for path in ("/", "/sse", "*"):
            for version in ("HTTP/1.0", "HTTP/1.1"):
                with self.subTest(path, version=version):
                    answer = self.answer(
                        server, path, method="OPTIONS", version=version
                    )
                    self.assertEqual(answer.status, 204)
                    self.assertEqual(answer.body, b"")
                    self.assertNotIn("Content-Length", answer.headers)
                    self.assertEqual(self.allowed(answer), methods)

    def test_options_is_answered_to_a_health_check_that_names_no_host(self):
        answer = self.ask(self.serve(), b"OPTIONS / HTTP/1.0\r\n\r\n")
        self.assertRegex(answer, rb"\AHTTP/1.1 204 ")

    def test_sends_each_piece_at_once(self):
        go_on = threading.Event()

        def write(handler):
            send_page(handler, b"piece 0", X_Test="yes")
            for number in range(1, 4):
                self.assertTrue(go_on.wait(PATIENCE))
                go_on.clear()
                handler.wfile.write(b"piece %d" % number)

        peer = self.connect(self.serve(handler=answering(write)), "/")
        for number in range(4):
            self.assertEqual(peer.file.read(7), b"piece %d" % number)
            go_on.set()

    def test_may_read_the_body_itself(self):
        def turn_around(handler):
            length = int(handler.headers["Content-Length"])
            send_page(handler, handler.rfile.read(length)[::-1])

        server = self.serve(handler=answering(turn_around))
        answer = self.answer(server, method="POST", body=b"ab" * 150_000)
        self.assertEqual(answer.body, b"ba" * 150_000)

    def test_of_an_existing_handler_may_use_names_of_its_own(self):
        class Existing(BaseHTTPRequestHandler):
            def do_POST(self):
                self._respond(self._dispatch(self._read_line()))

            def _read_line(self):
                return self.rfile.readline()

            def _dispatch(self, line):
                return line.upper()

            def _respond(self, body):
                send_page(self, body)

            _host = _target = _slot = _vary = _answer = None

        class OnTheRight(QuietHandler, Existing):
            pass

        class OnTheLeft(Existing, QuietHandler):
            pass

        for handler in (OnTheRight, OnTheLeft):
            server = self.serve(say_goodbye, handler=handler)
            with self.subTest(handler.__name__):
                answer = self.answer(server, method="POST", body=b"a line\n")
                self.assertEqual(answer.text, "A LINE\n")
                self.assertEqual(self.answer(server, method="PUT").status, 405)
                self.assertEqual(self.events(server), ["goodbye"])

    def test_is_called_only_if_parse_request_agrees(self):
        class WithPassword(QuietHandler):
            def parse_request(self):
                if not super().parse_request():
                    return False
                if self.headers["Authorization"] == "secret":
                    return True
                self.send_error(401)
                return False

        server = self.serve(say_goodbye, handler=WithPassword)
        for path in ("/", "/sse"):
            self.assertEqual(self.answer(server, path).status, 401)
        self.assertEqual(self.events(server, Authorization="secret"), ["goodbye"])

    def test_is_called_only_if_handle_expect_100_agrees(self):
        calls = []

        class Strict(answering(calls.append)):
            def handle_expect_100(self):
                self.send_error(417)
                return False

        server = self.serve(handler=Strict)
        answer = self.answer(
            server, method="POST", Expect="100-continue", Content_Length=5
        )
        self.assertEqual(answer.status, 417)
        self.finish_requests(server)
        self.assertEqual(calls, [])

    def test_may_send_an_interim_answer_first(self):
        def hint(handler):
            handler.send_response_only(103, "Early Hints")
            handler.send_header("Link", "</style.css>")
            handler.end_headers()
            if handler.path == "/failing":
                raise KeyError
            send_page(handler, b"a page")

        server = self.serve(handler=answering(hint))
        for method, end in ((b"GET", b"a page"), (b"HEAD", b"")):
            with self.subTest(method):
                head = b" / HTTP/1.1\r\nHost: localhost\r\n\r\n"
                interim, final, body = self.ask(server, method + head).split(
                    b"\r\n\r\n", 2
                )
                self.assertEqual(
                    interim, b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>"
                )
                self.assertRegex(final, rb"\AHTTP/1.1 200 ")
                self.assertEqual(body, end)
        with self.assert_logs(KeyError):
            answer = self.ask(
                server, b"GET /failing HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
        self.assertIn(b"HTTP/1.1 500 ", answer)

    def test_may_hand_its_connection_to_a_subprocess(self):
        def run(handler):
            handler.send_response(200)
            handler.end_headers()
            subprocess.run(
                [sys.executable, "-c", "print('by a subprocess')"],
                stdout=handler.wfile,
                check=True,
            )

        server = self.serve(handler=answering(run))
        self.assertIn("by a subprocess", self.answer(server).text)

    def test_that_is_switched_off_is_not_listed(self):
        class WithoutHead(QuietHandler):
            do_HEAD = None

        answer = self.answer(self.serve(handler=WithoutHead), method="HEAD")
        self.assertEqual(answer.status, 405)
        self.assertEqual(self.allowed(answer), {"GET", "OPTIONS"})

    def test_may_have_a_name_with_a_hyphen(self):
        class Upnp(QuietHandler):
            pass

        setattr(Upnp, "do_M-SEARCH", lambda handler: send_page(handler, b"found"))
        server = self.serve(handler=Upnp)
        self.assertEqual(self.answer(server, method="M-SEARCH").text, "found")

    def test_is_answered_by_the_server_version_of_the_handler(self):
        class Handler(QuietHandler):
            server_version = "mine/1"

        self.assertEqual(self.answer(self.serve()).headers["Server"], "sse_ref")
        answer = self.answer(self.serve(handler=Handler))
        self.assertEqual(answer.headers["Server"], "mine/1")

    def test_may_send_pages_of_the_programs_own(self):
        class Pages(QuietHandler):
            def serve_plain(self):
                send_page(self, b"<p>" * 100_000, Content_Type="text/html")

        server = self.serve(say_goodbye, handler=Pages)
        page = self.answer(server, "/a/page")
        self.assertEqual(page.body, b"<p>" * 100_000)
        self.assertEqual(page.headers.get_all("Connection"), ["close"])
        head = self.answer(server, "/a/page", method="HEAD")
        self.assertEqual(head.body, b"")
        for message in (page.headers, head.headers):
            del message["Date"]
        self.assertEqual(head.headers.items(), page.headers.items())
        self.assertEqual(self.events(server), ["goodbye"])

    def test_may_belong_to_a_handler_with_arguments_of_its_own(self):
        class Files(QuietHandler, SimpleHTTPRequestHandler):
            def serve_plain(self):
                SimpleHTTPRequestHandler.do_GET(self)

        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "a.txt").write_text("a file")
            handler = functools.partial(Files, directory=folder)
            server = self.serve(say_goodbye, handler=handler)
            self.assertEqual(self.answer(server, "/a.txt").text, "a file")
            head = self.answer(server, "/a.txt", method="HEAD")
            self.assertEqual(head.headers["Content-Length"], "6")
            self.assertEqual(head.body, b"")
            self.assertEqual(self.answer(server, "/b.txt").status, 404)
            self.assertEqual(self.events(server), ["goodbye"])


class AnUnreadBody(RequestCase):
    """A connection that is closed while input is unread is reset by the kernel."""

    def setUp(self):
        super().setUp()
        self.threads = threads = []

        class Handler(QuietHandler):
            def setup(self):
                threads.append(threading.current_thread())
                super().setup()

        self.handler = Handler

    def wait_for_the_end(self):
        """Wait until the newest connection is closed by the server."""
        self.threads[-1].join(PATIENCE)
        self.assertFalse(self.threads[-1].is_alive())

    def test_does_not_cost_its_client_the_answer(self):
        server = self.serve()
        with self.assert_logs():
            answer = self.answer(server, method="POST", body=b"x" * 3_000_000)
            self.assertEqual(answer.status, 405)
            self.assertEqual(len(answer.body), int(answer.headers["Content-Length"]))
            self.finish_requests(server)

    def test_may_come_after_the_answer(self):
        class WithStream(self.handler):
            def do_PUT(self):
                self.serve_stream(say_goodbye)

        server = self.serve(handler=WithStream)
        for method in ("POST", "PUT"):  # which get a 405 and a stream
            for options in ({"Content_Length": 3000}, {"Transfer_Encoding": "chunked"}):
                with self.subTest(method, **options):
                    peer = self.connect(server, "/", method=method, **options)
                    self.assertTrue(peer.read_body())
                    peer.socket.sendall(b"x" * 1000)
                    peer.socket.shutdown(socket.SHUT_WR)
                    self.wait_for_the_end()
                    self.assertEqual(peer.socket.recv(1), b"")  # and no reset

    def test_is_not_awaited_for_ever(self):
        self.handler.linger = 0.2
        server = self.serve(handler=self.handler)
        peer = self.connect(server, "/", method="POST", Content_Length=3000)
        self.assertTrue(peer.read_body())
        begun = time.monotonic()
        self.wait_for_the_end()
        self.assertLess(time.monotonic() - begun, 3)

    def test_is_not_read_for_ever(self):
        self.handler.linger = 0.2
        server = self.serve(handler=self.handler)
        peer = self.connect(server, "/", method="POST", Transfer_Encoding="chunked")
        deadline = time.monotonic() + PATIENCE
        with self.assertRaises(ConnectionError):
            while time.monotonic() < deadline:
                peer.socket.sendall(b"x" * 1000)
                self.threads[-1].join(0.01)


def address_of_this_machine():
    """Return an IPv4 address of this machine that is not loopback; None if none is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # which sends nothing
        except OSError:
            return None
        address = probe.getsockname()[0]
    return None if address.startswith(("127.", "0.")) else address


class TheHost(RequestCase):
    """allowed_hosts: by which names a server may be called (DNS rebinding)."""

    LOOKALIKES = (
        *("evil.com", "evil.com:80", "127.0.0.1.evil.com", "localhost.evil.com"),
        *("localhost/evil", "localhost#.evil", "localhost?evil", "localhost\\evil"),
        *("localhost@evil.com", "user@localhost", "localhost:80:80", "localhost:x"),
        *("notlocalhost", "localhost.example", "app.localhost.evil.com", "localhost.."),
        *("[::1].evil", "[::1", "::1", "[localhost]", "[127.0.0.1].evil", "1.2.3"),
        *("1.2.3.4.5", "256.1.1.1", "1.2.3.4/8", "local host", ".", "", ":8080"),
    )

    def check(self, server, status, hosts, path="/sse"):
        for host in hosts:
            with self.subTest(host):
                self.assertEqual(self.status(server, path, Host=host), status)

    def counting(self):
        """Return a handler class whose methods and pages count in `calls`."""
        calls = self.calls = []

        class Handler(QuietHandler):
            def do_POST(self):
                calls.append(self.command)
                send_page(self)

            do_PUT = serve_plain = do_POST

        return Handler

    def test_on_loopback_may_be_localhost_or_any_ip_address(self):
        self.check(
            self.serve(),
            200,
            (
                *("localhost", "LocalHost:1", "localhost.", "localhost.:80"),
                *("app.localhost", "a.b.LOCALHOST:3000", "app.localhost."),
                *("127.0.0.1", "127.1.2.3:8080", "[::1]", "[::1]:8080"),
                *("192.0.2.1:80", "8.8.8.8", "0.0.0.0", "[2001:db8::1]:80"),
                *("[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]"),
            ),
        )

    def test_on_loopback_may_be_no_other(self):
        self.check(self.serve(), 403, self.LOOKALIKES)

    def test_may_be_an_allowed_one(self):
        server = self.serve(allowed_hosts=["Box.Example", "dot.example."])
        names = ("box.example", "BOX.example.:80", "dot.example", "dot.example.:1")
        self.check(server, 200, (*names, "localhost", "192.0.2.1"))
        self.check(server, 403, (*self.LOOKALIKES, "x.box.example", "box.example.x"))

    def test_may_be_any_where_all_are_allowed(self):
        self.check(self.serve(allowed_hosts=("*",)), 200, ["evil.com", "x.y:80"])

    def test_on_another_address_may_be_any_unless_some_are_allowed(self):
        address = address_of_this_machine()
        if address is None:
            self.skipTest("this machine has no other address")
        server = self.serve(address=(address, 0))
        self.check(server, 200, ["evil.com", "localhost"])
        server = self.serve(address=(address, 0), allowed_hosts=["box.example"])
        self.check(server, 200, ["box.example"])
        self.check(server, 403, ["evil.com", "localhost.evil.com"])

    def test_must_be_there_once_and_only_once(self):
        server = self.serve(handler=self.counting())
        two_equal = "Host: localhost\r\nHost: localhost\r\n"
        two = "Host: localhost\r\nX: y\r\nhost: evil.com\r\n"
        for version, hosts, status in (
            ("1.1", "", 400),
            ("1.1", two, 400),
            ("1.1", two_equal, 400),
            ("1.0", two, 400),
            ("1.0", "", 200),
        ):
            for request in ("GET /", "POST /", "HEAD /sse", "HEAD /x/y"):
                with self.subTest(request, version=version, hosts=hosts):
                    head = f"{request} HTTP/{version}\r\n{hosts}\r\n"
                    answer = self.ask(server, head.encode())
                    self.assertEqual(int(answer.split()[1]), status)
        self.assertEqual(
            self.ask(self.serve(), b"GET / HTTP/1.1\r\n\r\n")[9:12], b"400"
        )

    def test_may_be_in_the_target(self):
        server = self.serve()
        for target, host, status in (
            ("http://evil.com/sse", "localhost", 403),
            ("http://[::1]:5/sse", "evil.com", 200),
            ("http://localhost@evil.com/sse", "localhost", 403),
        ):
            with self.subTest(target):
                self.assertEqual(self.status(server, target, Host=host), status)

    def test_counts_for_every_method_and_page_of_the_programs_own(self):
        counting = self.counting()

        class OwnGet(QuietHandler):
            do_GET = do_OPTIONS = counting.do_POST

        class OwnHead(QuietHandler):
            do_HEAD = counting.do_POST

        for handler, methods in (
            (counting, ("GET", "HEAD", "POST", "PUT")),
            (OwnGet, ("GET", "HEAD", "OPTIONS")),
            (OwnHead, ("HEAD",)),
        ):
            server = self.serve(handler=handler)
            for method in methods:
                with self.subTest(handler.__name__, method=method):
                    answer = self.answer(server, method=method, Host="evil.com")
                    self.assertEqual(answer.status, 403)
        self.assertEqual(self.calls, [])

    def test_does_not_count_for_okay(self):
        answer = self.answer(self.serve(), Host="evil.com")
        self.assertEqual(answer.text, "okay")
        self.assertEqual(self.status(self.serve(), "/", Host="evil.com"), 200)

    def test_that_is_refused_is_named_with_the_option_that_would_allow_it(self):
        server = self.serve()
        for host, shown in (("evil.com", "evil.com"), ("a.b\x1b[2J", r"a.b\x1b[2J")):
            with self.subTest(host):
                text = self.answer(server, "/sse", Host=host).text
                self.assertIn(shown, text)
                self.assertRegex(text, r"\A[ -~]*allowed_hosts[ -~]*\n\Z")
                self.assertIn("--allow-host", text)

    def test_that_no_browser_sends_is_not_taken_into_allowed_hosts(self):
        for host in ("*.example", "b\xfccher.example"):
            with self.subTest(host), self.assertRaisesRegex(ValueError, "allowed_h"):
                SSEServer(("127.0.0.1", 0), allowed_hosts=[host])

    def test_that_can_be_none_is_not_taken_into_allowed_hosts(self):
        for host in ("box.example:80", "http://box.example", "", "a b", "a/b", "a@b"):
            with self.subTest(host), self.assertRaisesRegex(ValueError, "allowed_ho"):
                SSEServer(("127.0.0.1", 0), allowed_hosts=iter([host]))
        with self.assertRaisesRegex(TypeError, "allowed_hosts"):
            SSEServer(("127.0.0.1", 0), allowed_hosts="box.example")


class TheOrigin(RequestCase):
    """allowed_origins and Sec-Fetch-Site: which pages may do what."""

    APP = "https://app.example"

    # Origin, Sec-Fetch-Site, and whether a request to localhost:8080 is let in, where
    # APP is allowed.
    CASES = (
        (None, None, True),
        ("http://localhost:8080", None, True),
        ("https://localhost:8080", None, True),
        ("http://localhost:8081", None, False),
        ("http://localhost", None, False),
        ("http://evil.com", None, False),
        ("null", None, False),
        (APP, None, True),
        (None, "same-origin", True),
        (None, "none", True),
        (None, "same-site", False),
        (None, "cross-site", False),
        (None, "whatever", False),
        ("http://evil.com", "same-origin", True),
        ("null", "same-origin", True),
        ("http://localhost:8080", "same-site", False),
        ("http://localhost:8080", "cross-site", False),
        (APP, "cross-site", True),
    )

    def fields(self, origin, site):
        fields = {"Host": "localhost:8080", "Origin": origin, "Sec_Fetch_Site": site}
        return {name: text for name, text in fields.items() if text is not None}

    def test_decides_about_streams(self):
        stream = answering(lambda handler: handler.serve_stream())
        server = self.serve(allowed_origins=[self.APP])
        elsewhere = self.serve(handler=stream, allowed_origins=[self.APP])
        for origin, site, is_let_in in self.CASES:
            with self.subTest(origin, site=site):
                fields, status = self.fields(origin, site), 200 if is_let_in else 403
                self.assertEqual(self.status(server, **fields), status)
                self.assertEqual(self.status(elsewhere, "/", **fields), status)

    def test_decides_about_methods_that_change_something(self):
        calls = []

        def count(handler):
            calls.append(handler.command)
            send_page(handler)

        server = self.serve(handler=answering(count), allowed_origins=[self.APP])
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            for origin, site, is_let_in in self.CASES:
                with self.subTest(method, origin=origin, site=site):
                    calls.clear()
                    fields = self.fields(origin, site)
                    status = self.status(server, "/", method=method, **fields)
                    self.assertEqual(status, 200 if is_let_in else 403)
                    self.assertEqual(calls, [method] if is_let_in else [])

    def test_does_not_matter_to_get_head_and_options(self):
        server = self.serve(handler=answering(send_page))
        for method in ("GET", "HEAD", "OPTIONS"):
            with self.subTest(method):
                fields = self.fields("http://evil.com", "cross-site")
                answer = self.answer(server, method=method, **fields)
                self.assertIn(answer.status, (200, 204))

    def test_may_have_the_same_host_whatever_the_scheme(self):
        server = self.serve(allowed_hosts=["app.example"])
        for origin, host, status in (
            ("https://app.example", "app.example", 200),
            ("http://app.example", "APP.example", 200),
            ("http://[::1]:5", "[::1]:5", 200),
            ("https://app.example", "app.example:80", 403),
            ("https://app.example", "localhost", 403),
            ("http://127.0.0.1:8080", "localhost:8080", 403),
            ("http://localhost:8080.evil", "localhost:8080", 403),
            ("http://evil/localhost:8080", "localhost:8080", 403),
            ("http://evil@localhost:8080", "localhost:8080", 403),
            ("localhost:8080", "localhost:8080", 403),
        ):
            with self.subTest(origin, host=host):
                self.assertEqual(self.status(server, Host=host, Origin=origin), status)

    def test_is_not_that_of_a_request_without_a_host(self):
        for origin in ("http://None", "http://", "null"):
            with self.subTest(origin):
                request = f"HEAD /sse HTTP/1.0\r\nOrigin: {origin}\r\n\r\n"
                answer = self.ask(self.serve(), request.encode())
                self.assertRegex(answer, rb"\AHTTP/1.1 403 ")

    def test_may_be_any_where_all_are_allowed(self):
        server = self.serve(allowed_origins=["*"])
        for origin in (self.APP, "null", "moz-extension://1-2"):
            with self.subTest(origin):
                fields = self.fields(origin, "cross-site")
                self.assertEqual(self.status(server, **fields), 200)

    def test_may_be_written_in_capitals_in_allowed_origins(self):
        server = self.serve(allowed_origins=["HTTPS://App.Example"])
        self.assertEqual(self.status(server, Origin=self.APP), 200)

    def test_that_is_refused_is_told_the_option_that_would_allow_it(self):
        server = self.serve()
        for fields, shown in (
            ({"Origin": "http://evil.com"}, "http://evil.com"),
            ({"Origin": "http://a.b\x1b[2J"}, r"http://a.b\x1b[2J"),
            ({"Sec_Fetch_Site": "cross-site"}, ""),
        ):
            with self.subTest(fields):
                text = self.answer(server, "/sse", **fields).text
                self.assertIn(shown, text)
                self.assertRegex(text, r"\A[ -~]*allowed_origins[ -~]*\n\Z")
                self.assertIn("--allow-origin", text)

    def test_that_no_browser_sends_is_not_taken_into_allowed_origins(self):
        for origin in (
            *("app.example", "https://app.example/", "https://", "", "https://a b"),
            *("https://app.example/path", "https://me@app.example", "//app.example"),
            *("https://app.example:0443", "https://\u212a.example"),  # Kelvin sign
        ):
            with self.subTest(origin), self.assertRaisesRegex(ValueError, "allowed_or"):
                SSEServer(("127.0.0.1", 0), allowed_origins=[origin])
        with self.assertRaisesRegex(TypeError, "allowed_origins"):
            SSEServer(("127.0.0.1", 0), allowed_origins=self.APP)


class CORS(RequestCase):
    """What pages of other origins may read."""

    APP = "https://app.example"
    METHOD = "Access-Control-Request-Method"

    def cors(self, answer):
        """Return the fields of `answer` that are about CORS."""
        prefix = "access-control-"
        items = answer.headers.items()
        return {name: text for name, text in items if name.lower().startswith(prefix)}

    def each_answer(self, **options):
        """Return an answer of each kind, from a server with these options."""

        def choose(handler):
            if handler.path == "/404":
                raise sse_ref.Refusal(404)
            if handler.path == "/500":
                raise ZeroDivisionError
            if handler.path == "/stream":
                handler.serve_stream(say_goodbye, {"Vary": "Cookie"})
            elif handler.path == "/vary":
                send_page(handler, Vary="Cookie")
            else:
                send_page(handler)

        fields = options.pop("fields", {})
        plain = self.serve(say_goodbye, **options)
        own = self.serve(handler=answering(choose), **options)
        strict = self.serve(authorize=lambda _: 401, **options)
        with self.logged():
            for server, method, path, status in (
                (plain, "GET", "/", 200),
                (plain, "GET", "/sse", 200),
                (plain, "HEAD", "/sse", 200),
                (plain, "POST", "/", 405),
                (plain, "FOO", "/", 501),
                (plain, "OPTIONS", "/", 204),
                (own, "GET", "/page", 200),
                (own, "POST", "/vary", 200),
                (own, "POST", "/stream", 200),
                (own, "POST", "/404", 404),
                (own, "GET", "/500", 500),
                (strict, "GET", "/sse", 401),
            ):
                answer = self.answer(server, path, method=method, **fields)
                self.assertEqual(answer.status, status, (method, path))
                yield f"{method} {path} {status}", answer

    def test_lets_an_allowed_origin_read_every_answer(self):
        options = {"allowed_origins": [self.APP, "http://b.example:81"]}
        for name, answer in self.each_answer(fields={"Origin": self.APP}, **options):
            with self.subTest(name):
                fields = self.cors(answer)
                self.assertEqual(fields["Access-Control-Allow-Origin"], self.APP)
                self.assertEqual(fields["Access-Control-Allow-Credentials"], "true")
                self.assertIn("origin", listed(answer.headers, "Vary"))
                if "Cookie" in str(answer.headers):
                    self.assertIn("cookie", listed(answer.headers, "Vary"))

    def test_tells_caches_of_the_origin_where_there_was_none_too(self):
        for name, answer in self.each_answer(allowed_origins=[self.APP]):
            with self.subTest(name):
                self.assertIn("origin", listed(answer.headers, "Vary"))
                self.assertEqual(self.cors(answer), {})

    def test_is_not_mentioned_where_no_origin_is_allowed(self):
        for fields in ({}, {"Origin": "http://localhost"}):
            for name, answer in self.each_answer(fields=fields):
                with self.subTest(name, fields=fields):
                    self.assertEqual(self.cors(answer), {})
                    self.assertNotIn("origin", listed(answer.headers, "Vary"))

    def test_lets_no_other_origin_read(self):
        server = self.serve(allowed_origins=[self.APP])
        for origin in (
            *("http://app.example", "https://x.app.example", "https://app.example:1"),
            *("https://app.example.evil.com", "null", "http://localhost", "*"),
        ):
            for path in ("/", "/sse"):
                with self.subTest(origin, path=path):
                    answer = self.answer(server, path, method="HEAD", Origin=origin)
                    self.assertEqual(self.cors(answer), {})
                    self.assertIn("origin", listed(answer.headers, "Vary"))

    def test_by_a_star_is_without_credentials(self):
        for path in ("/", "/sse"):
            for origin in (self.APP, "null"):
                with self.subTest(path, origin=origin):
                    server = self.serve(say_goodbye, allowed_origins=["*"])
                    answer = self.answer(server, path, Origin=origin)
                    wanted = {"Access-Control-Allow-Origin": "*"}
                    self.assertEqual(self.cors(answer), wanted)

    def test_for_null_is_without_credentials(self):
        server = self.serve(say_goodbye, allowed_origins=["null", self.APP])
        answer = self.answer(server, "/sse", Origin="null")
        self.assertEqual(self.cors(answer), {"Access-Control-Allow-Origin": "null"})

    def preflight(self, server, path="/sse", origin=APP, headers=None):
        fields = {self.METHOD: "POST"}
        if headers is not None:
            fields["Access-Control-Request-Headers"] = headers
        return self.answer(server, path, method="OPTIONS", Origin=origin, **fields)

    def test_answers_a_preflight_on_every_path(self):
        authorize = mock.Mock(return_value=False)  # A preflight has no credentials.
        server = self.serve(
            handler=answering(send_page),
            allowed_origins=[self.APP],
            authorize=authorize,
        )
        headers = "last-event-id, x-test"
        for path in ("/sse", "/", "/a/b?c"):
            with self.subTest(path):
                answer = self.preflight(server, path, headers=headers)
                self.assertEqual(answer.status, 204)
                self.assertEqual(answer.body, b"")
                fields = self.cors(answer)
                self.assertEqual(fields["Access-Control-Allow-Origin"], self.APP)
                self.assertEqual(fields["Access-Control-Allow-Credentials"], "true")
                self.assertEqual(fields["Access-Control-Allow-Headers"], headers)
                self.assertRegex(fields["Access-Control-Max-Age"], r"\A[1-9]\d*\Z")
                self.assertIn("origin", listed(answer.headers, "Vary"))
                methods = listed(answer.headers, "Access-Control-Allow-Methods")
                self.assertLessEqual({"get", "head", "post", "delete"}, methods)
                self.assertNotIn("trace", methods)
        authorize.assert_not_called()

    def test_answers_a_preflight_that_asks_for_no_headers(self):
        answer = self.preflight(self.serve(allowed_origins=["*"]))
        self.assertEqual(answer.status, 204)
        self.assertEqual(answer.headers["Access-Control-Allow-Origin"], "*")
        self.assertNotIn("Access-Control-Allow-Credentials", answer.headers)

    def test_grants_nothing_to_the_preflight_of_another_origin(self):
        for origins in ([], [self.APP]):
            server = self.serve(allowed_origins=origins)
            with self.subTest(origins):
                answer = self.preflight(server, origin="https://evil.com", headers="x")
                self.assertEqual(self.cors(answer), {})


class Authorization(RequestCase):
    """authorize."""

    def test_is_true_and_nothing_else(self):
        self.assertEqual(self.status(self.serve(authorize=lambda _: True)), 200)
        for value in (
            *(False, None, 1, "yes", [], 0, 99, 199, 600, -1, 200.0, "204"),
            object(),
        ):
            with self.subTest(value):
                server = self.serve(authorize=lambda _, value=value: value)
                self.assertEqual(self.status(server), 403)

    def test_is_refused_with_a_status_and_its_text(self):
        for status in (401, 403, 404, 429, 503, HTTPStatus.GONE):
            with self.subTest(status):
                server = self.serve(authorize=lambda _, status=status: status)
                answer = self.answer(server, "/sse")
                self.assertEqual(answer.status, status)
                texts = HTTPStatus(status).phrase, HTTPStatus(status).description
                self.assertIn(answer.text.strip(), texts)

    def test_may_be_refused_with_any_status(self):
        for status in (204, 302, 299, 599):
            with self.subTest(status):
                server = self.serve(authorize=lambda _, status=status: status)
                self.assertEqual(self.answer(server, "/sse").status, status)

    def test_by_204_has_neither_body_nor_length(self):
        answer = self.answer(self.serve(authorize=lambda _: 204), "/sse")
        self.assertEqual(answer.body, b"")
        self.assertNotIn("Content-Type", answer.headers)
        self.assertNotIn("Content-Length", answer.headers)

    def test_may_be_refused_with_headers_of_ones_own(self):
        def authorize(handler):
            raise sse_ref.Refusal(401, "Who is it?", {"WWW-Authenticate": "Basic"})

        with self.assert_logs():
            server = self.serve(authorize=authorize)
            answer = self.answer(server, "/sse")
            self.assertEqual(answer.status, 401)
            self.assertEqual(answer.headers["WWW-Authenticate"], "Basic")
            self.assertEqual(answer.text.strip(), "Who is it?")
            self.finish_requests(server)

    def test_depends_on_the_request(self):
        seen = []

        def authorize(handler):
            seen.append((handler.command, handler.path, handler.headers["Cookie"]))
            return True

        self.status(self.serve(authorize=authorize), "/sse?x", Cookie="a=b")
        self.assertEqual(seen, [("HEAD", "/sse?x", "a=b")])

    def test_that_fails_is_logged_and_answered_with_500(self):
        for error in (ZeroDivisionError, ConnectionRefusedError, SystemExit):
            authorize = mock.Mock(side_effect=error("a secret"))
            server = self.serve(authorize=authorize)
            with self.subTest(error), self.assert_logs(error):
                answer = self.answer(server, "/sse")
                self.assertEqual(answer.status, 500)
                self.assertNotIn("secret", answer.text)

    def test_is_asked_for_streams_alone(self):
        authorize = mock.Mock(return_value=False)
        server = self.serve(handler=answering(send_page), authorize=authorize)
        for method in ("GET", "HEAD", "POST", "OPTIONS", "TRACE"):
            self.answer(server, "/", method=method)
        authorize.assert_not_called()

    def test_is_asked_for_streams_of_every_method(self):
        calls = []
        handler = answering(lambda handler: handler.serve_stream(calls.append))
        server = self.serve(handler=handler, authorize=lambda _: False)
        for method in ("GET", "HEAD", "POST", "PUT"):
            with self.subTest(method):
                self.assertEqual(self.status(server, "/", method=method), 403)
        self.assertEqual(calls, [])

    def test_is_not_asked_for_a_host_or_origin_that_is_refused(self):
        authorize = mock.Mock(return_value=True)
        server = self.serve(authorize=authorize)
        for fields in ({"Host": "evil.com"}, {"Origin": "http://evil.com"}):
            with self.subTest(fields):
                self.assertEqual(self.status(server, **fields), 403)
        authorize.assert_not_called()

    def test_that_is_refused_calls_no_on_connection(self):
        calls = []
        server = self.serve(calls.append, authorize=lambda _: False)
        self.assertEqual(self.answer(server, "/sse").status, 403)
        self.assertEqual(calls, [])


class AFullServer(RequestCase):
    """max_connections."""

    EXTRA = 64  # connections beyond max_connections that are read to be sent away

    def fill(self, **options):
        """Serve a stream that takes the only place; return the server and the peer."""
        calls = self.calls = []

        def on_connection(client):
            calls.append(client)
            client.send("welcome")

        server = self.serve(on_connection, max_connections=1, **options)
        peer = self.connect(server)
        self.assertEqual(peer.data(), "welcome")
        return server, peer

    def connect_silently(self, server):
        """Connect without a word."""
        peer = Peer(server, head=b"")
        self.addCleanup(peer.close)
        return peer

    def is_closed(self, peer):
        """Tell whether the server has closed this connection, without any answer."""
        if not select.select([peer.socket], [], [], 0)[0]:
            return False
        with contextlib.suppress(ConnectionError):
            self.assertEqual(peer.socket.recv(1), b"")
        return True

    def test_has_event_sources_come_back_later(self):
        server, _ = self.fill()
        for path, fields in (
            ("/sse", {}),
            ("/sse?x", {"Accept": "*/*"}),
            ("/elsewhere", {"Accept": "text/event-stream"}),
        ):
            with self.subTest(path):
                peer = self.connect(server, path, **fields)
                self.assertEqual(peer.status, 200)
                self.assertEqual(peer.headers["Content-Type"], "text/event-stream")
                reader = peer.finish()
                self.assertEqual(reader.retry, 5000)
                self.assertRegex("\n".join(reader.comments), "max_connections")
                self.assertEqual(reader.events, [])
        self.assertEqual(len(self.calls), 1)

    def test_has_event_sources_by_http_1_0_come_back_later(self):
        server, _ = self.fill()
        answer = self.answer(server, "/sse", version="HTTP/1.0")
        self.assertEqual(answer.status, 200)
        self.assertRegex(answer.text, r"\Aretry: 5000\n: [^\n]*max_connections")

    def test_has_event_sources_of_other_origins_come_back_later(self):
        server, _ = self.fill(allowed_origins=["https://app.example"])
        answer = self.answer(server, "/sse", Origin="https://app.example")
        self.assertEqual(answer.status, 200)
        origin = answer.headers["Access-Control-Allow-Origin"]
        self.assertEqual(origin, "https://app.example")

    def test_answers_all_else_with_503(self):
        calls = []

        def count(handler):
            calls.append(handler)

        server, _ = self.fill(handler=answering(count))
        for method, path in (
            *(("GET", "/"), ("GET", "/sse/"), ("HEAD", "/"), ("POST", "/")),
            *(("OPTIONS", "/"), ("DELETE", "/x")),
        ):
            with self.subTest(method, path=path):
                answer = self.answer(server, path, method=method)
                self.assertEqual(answer.status, 503)
                self.assertRegex(answer.headers["Retry-After"], r"\A[1-9]\d*\Z")
                self.assertEqual(answer.headers["Cache-Control"], "no-store")
                if method != "HEAD":
                    self.assertRegex(answer.text, r"\A[^\n]*max_connections[^\n]*\n\Z")
        self.assertEqual(calls, [])

    def test_can_be_read_while_a_body_is_unread(self):
        server, _ = self.fill()
        for options in (
            {"method": "POST", "path": "/"},
            {"method": "GET", "path": "/", "X_Long": "x" * 20_000},
            {"method": "GET", "path": "/sse"},
        ):
            with self.subTest(options["method"], path=options["path"]):
                answer = self.answer(server, body=b"x" * 200_000, **options)
                self.assertIn("max_connections", answer.text)

    def test_lets_in_a_newcomer_when_a_stream_has_ended(self):
        server, peer = self.fill()
        peer.close()

        def is_let_in():
            peer = self.connect(server)
            return peer.status == 200 and b"welcome" in peer.chunk()

        wait_until(is_let_in, "the place")

    def test_takes_the_place_of_who_has_been_silent_the_longest(self):
        server = self.serve(say_goodbye, max_connections=2)
        oldest, newer = (self.connect_silently(server) for _ in range(2))
        self.assertEqual(self.events(server), ["goodbye"])
        wait_until(lambda: self.is_closed(oldest), "the oldest to be closed")
        newer.socket.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertEqual(newer.read_head().read_body(), b"okay")

    def test_takes_no_place_of_a_request_that_is_being_answered(self):
        asked, go_on = threading.Event(), threading.Event()

        def wait(handler):
            asked.set()
            self.assertTrue(go_on.wait(PATIENCE))
            send_page(handler)

        server = self.serve(handler=answering(wait), max_connections=1)
        self.addCleanup(go_on.set)
        peer = Peer(server, "/")
        self.addCleanup(peer.close)
        self.assertTrue(asked.wait(PATIENCE))
        self.assertEqual(self.answer(server).status, 503)
        go_on.set()
        self.assertEqual(peer.read_head().read_body(), b"a page")

    def test_closes_unanswered_what_is_far_too_many(self):
        server, peer = self.fill()
        silent = [self.connect_silently(server) for _ in range(self.EXTRA + 30)]

        def find_closed():
            closed = [each for each in silent if self.is_closed(each)]
            return len(closed) >= 30 and closed

        begun = time.monotonic()
        closed = wait_until(find_closed, "their end")
        self.assertLess(time.monotonic() - begun, 5, "only the time-out ended them")
        self.assertEqual(len(closed), 30)
        other = next(each for each in silent if each not in closed)
        other.socket.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertEqual(other.read_head().status, 503)
        (client,) = server.clients
        client.send("still here")
        self.assertEqual(peer.data(), "still here")


try:
    import resource  # not on Windows
except ImportError:
    resource = None
try:
    import tracemalloc  # not on PyPy
except ImportError:
    tracemalloc = None

MODULE = Path(sse_ref.__file__).resolve()
ON_LINUX = sys.platform == "linux"
BIG = 100_000


def big(number):
    """Return a text of 100 kB that begins with `number`."""
    return f"{number} ".ljust(BIG, "x")


def number_in(text):
    """Return the number that `text` begins with: the opposite of `big`."""
    return int(text.partition(" ")[0])


def number_of(id_):
    """Return the N of an id EPOCH-N."""
    return int(id_.rpartition("-")[2])


def comments(peer):
    """Return the comments that `peer` has got, but for the one that sends a head."""
    return [text for text in peer.reader.comments if text != " ok"]


def half_close(peer):
    """Say that no more will be sent, and go on reading."""
    peer.socket.shutdown(socket.SHUT_WR)


WAYS_TO_LEAVE = (Peer.close, Peer.reset, half_close)


def replace_sockets(server, kind):
    """Have the next connections to `server` be sockets of the class `kind`."""
    accept = server.get_request

    def get_request():
        connection, address = accept()
        return kind(fileno=connection.detach()), address

    server.get_request = get_request


def start_threads(*targets):
    """Start a thread for each of `targets`, and return the threads."""
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    return threads


def join(threads):
    """Wait for the end of all `threads`."""
    for thread in threads:
        thread.join()


class StreamCase(ServerCase):
    """Serves streams; little is needed to fill the kernel's buffers on the way."""

    def serve(self, on_connection=None, **options):
        server = super().serve(on_connection, **options)
        # Connections inherit it from the socket that accepts them.
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        return server

    def connect(self, server, path="/sse", **options):
        peer = super().connect(server, path, **options)
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        return peer

    def open_busy(self, **options):
        """Open a stream whose own thread is busy until the event `free` is set."""
        free, clients = threading.Event(), []

        def on_connection(client):
            client.comment("busy")
            clients.append(client)
            free.wait()

        server = self.serve(on_connection, **options)
        self.addCleanup(free.set)
        peer = self.connect(server)
        peer.chunk()
        wait_until(lambda: clients)
        return clients[0], peer, free

    def client_of(self, server, peer):
        """Return the client that is the other end of `peer`."""
        address = peer.socket.getsockname()
        return wait_until(
            lambda: next((c for c in server.clients if c.address == address), None)
        )

    def assert_gets(self, peer, numbers):
        """Read events until as many have come: their texts were made by `big`."""
        self.assertEqual([number_in(peer.data()) for _ in numbers], list(numbers))

    def assert_cut_off(self, peer):
        """Read to the end, which must come without a last chunk."""
        with self.assertRaises((ConnectionResetError, EOFError)):
            peer.finish()


class AStream(StreamCase):
    """Client: sending, waiting, ending."""

    def test_delivers_what_on_connection_sends(self):
        server = self.serve(lambda client: client.send("hi there!"))
        self.assertEqual(self.connect(server).event(), ("message", "hi there!", ""))

    def test_delivers_what_any_thread_sends(self):
        client, peer = self.open()
        client.send("a", event="b", id="c", retry=6)
        client.comment("d")
        client.send("e")
        self.assertEqual(peer.event(), ("b", "a", "c"))
        self.assertEqual(peer.event(), ("message", "e", "c"))
        self.assertEqual(peer.reader.retry, 6)
        self.assertEqual(comments(peer), [" d"])

    def test_sends_each_frame_as_a_chunk_of_its_own(self):
        client, peer = self.open()
        peer.chunk()  # the comment that took the head along
        client.send("one\ntwo")
        client.comment("x")
        self.assertEqual(peer.chunk(), b"data: one\ndata: two\n\n")
        self.assertEqual(peer.chunk(), b": x\n")

    def test_sends_nothing_of_a_frame_that_is_refused(self):
        client, peer = self.open()
        for call in (
            lambda: client.send("x", id="\n"),
            lambda: client.send("\ud800"),
            client.send,
            lambda: client.comment("\ud800"),
        ):
            with self.assertRaises(ValueError):
                call()
        client.send("after")
        self.assertEqual(peer.event(), ("message", "after", ""))

    def test_keeps_frames_whole_while_many_threads_send(self):
        client, peer = self.open(max_backlog=2**30)

        def send(name):
            for number in range(200):
                client.send(f"{name}\n{number}")

        threads = start_threads(*[lambda name=n: send(name) for n in range(4)])
        got = [peer.data().split("\n") for _ in range(800)]
        join(threads)
        for name in range(4):
            numbers = [int(number) for sender, number in got if int(sender) == name]
            self.assertEqual(numbers, list(range(200)))

    def test_knows_the_request_that_it_answers(self):
        clients = []
        server = self.serve(clients.append, path="/a/*")
        peer = self.connect(server, "/a/b?x=1&y=&x=%C3%A9", X_Test="yes")
        client = wait_until(lambda: clients)[0]
        self.assertEqual(client.path, "/a/b")
        self.assertEqual(client.query, {"x": ["1", "é"], "y": [""]})
        self.assertEqual(client.headers["x-test"], "yes")
        self.assertEqual(client.address, peer.socket.getsockname())
        self.assertEqual(client.last_event_id, "")

    def test_reads_last_event_id_as_utf8_or_else_as_latin1(self):
        clients = queue.Queue()
        server = self.serve(clients.put)
        for sent, id_ in (
            ("é…х\U0001f600 5".encode(), "é…х\U0001f600 5"),
            (b"caf\xe9", "café"),
            (b" 7 \t", "7"),
            ("voilà".encode(), "voilà"),  # ends in 0xA0, and the next one in 0x85
            ("х".encode(), "х"),
        ):
            head = b"GET /sse HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: %b\r\n\r\n"
            self.connect(server, head=head % sent)
            self.assertEqual(clients.get(timeout=PATIENCE).last_event_id, id_)

    def test_takes_attributes_of_the_programs_own(self):
        client, _ = self.open()
        client.user = "ada"
        self.assertEqual(client.user, "ada")

    def test_waits_as_long_as_it_is_told(self):
        answers = []

        def on_connection(client):
            begun = time.monotonic()
            answers.append(client.wait(0.05))
            answers.append(time.monotonic() - begun)
            answers.append(client.wait(0))
            answers.append(client.wait(-1))
            client.send("done")

        self.connect(self.serve(on_connection)).event()
        answer, seconds, *others = answers
        self.assertEqual([answer, *others], [False, False, False])
        self.assertTrue(0.05 <= seconds < 2, seconds)

    def test_can_be_waited_for_only_in_its_own_thread(self):
        client, _ = self.open()
        with self.assertRaises(RuntimeError):
            client.wait(0)

    def check_wait(self, leave):
        answers = queue.Queue()

        def on_connection(client):
            client.comment()
            answers.put((client.wait(), client.closed))

        server = self.serve(on_connection)
        peer = self.connect(server)
        wait_until(lambda: server.clients)
        begun = time.monotonic()
        leave(peer)
        self.assertEqual(answers.get(timeout=PATIENCE), (True, True))
        self.assertLess(time.monotonic() - begun, 1)
        self.assertEqual(server.clients, frozenset())

    def test_stops_waiting_as_soon_as_its_peer_leaves(self):
        for leave in WAYS_TO_LEAVE:
            with self.subTest(leave.__name__):
                self.check_wait(leave)

    def check_closed(self, leave):
        client, peer, free = self.open_busy()
        begun = time.monotonic()
        leave(peer)
        wait_until(lambda: client.closed)
        self.assertLess(time.monotonic() - begun, 1)
        self.assertFalse(free.is_set())

    def test_notices_that_its_peer_left_while_its_own_thread_is_busy(self):
        for leave in WAYS_TO_LEAVE:
            with self.subTest(leave.__name__):
                self.check_closed(leave)

    def test_stays_open_while_its_peer_says_little(self):
        client, peer = self.open()
        peer.socket.sendall(b"x" * 30_000)
        client.send("still here")
        self.assertEqual(peer.data(), "still here")
        peer.socket.sendall(b"x" * 30_000)
        client.send("still here")
        self.assertEqual(peer.data(), "still here")

    def test_is_cut_off_when_its_peer_keeps_talking(self):
        client, peer = self.open()
        with self.logged(), self.assertRaises(ConnectionError):
            for _ in range(1000):
                peer.socket.sendall(b"x" * 2000)
                time.sleep(0.001)
        wait_until(lambda: client.closed)

    def test_loses_nothing_to_a_peer_that_is_still_sending_its_body(self):
        def on_connection(client):
            client.send("last")
            client.close()

        head = b"GET /sse HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000\r\n\r\n"
        peer = self.connect(self.serve(on_connection), head=head + b"x" * 10_000)
        self.assertEqual(peer.data(), "last")
        for _ in range(10):  # a reset would end this
            peer.socket.sendall(b"x" * 1000)
            time.sleep(0.003)
        peer.finish()

    def test_ends_in_good_order_when_it_is_closed(self):
        client, peer = self.open()
        client.send("last")
        client.close()
        self.assertTrue(client.closed)
        self.assertEqual(peer.finish().events, [("message", "last", "")])
        client.close()  # again does no harm

    def test_can_be_closed_by_its_own_thread(self):
        answers = queue.Queue()

        def on_connection(client):
            client.send("last")
            client.close()
            answers.put(client.wait())

        peer = self.connect(self.serve(on_connection))
        self.assertEqual(peer.finish().events, [("message", "last", "")])
        self.assertTrue(answers.get(timeout=PATIENCE))

    def test_ends_in_good_order_while_its_own_thread_is_busy(self):
        client, peer, free = self.open_busy()
        client.close()
        peer.finish()
        self.assertFalse(free.is_set())

    def test_refuses_to_send_after_its_end(self):
        client, peer = self.open()
        client.close()
        for call in (lambda: client.send("x"), client.comment):
            with self.assertRaises(BrokenPipeError) as caught:
                call()
            self.assertEqual(caught.exception.errno, errno.EPIPE)
        self.assertEqual(peer.finish().events, [])

    def check_broken_pipe(self, leave):
        client, peer, _ = self.open_busy()
        leave(peer)
        with self.assertRaises(BrokenPipeError):
            for _ in range(1000):
                client.send("x")
                time.sleep(0.001)
        self.assertTrue(client.closed)

    def test_raises_broken_pipe_once_its_peer_has_left(self):
        for leave in (Peer.close, Peer.reset):
            with self.subTest(leave.__name__):
                self.check_broken_pipe(leave)

    def test_does_not_log_the_broken_pipe_of_its_own_end(self):
        threads = []

        def on_connection(client):
            threads.append(threading.current_thread())
            while True:
                client.send("x")

        server = self.serve(on_connection)
        with self.logged() as records:
            self.connect(server).close()
            wait_until(lambda: threads)[0].join(PATIENCE)
        self.assertEqual(records, [])

    def test_logs_a_broken_pipe_of_something_else(self):
        def on_connection(client):
            client.send("a")
            raise BrokenPipeError  # of a subprocess, say

        with self.logged() as records:
            self.connect(self.serve(on_connection)).finish()
            wait_until(lambda: records)
        self.assertEqual([r.exc_info[0] for r in records], [BrokenPipeError])

    def test_calls_on_close_once_in_its_own_thread(self):
        calls, threads = [], []

        def on_connection(client):
            threads.append(threading.current_thread())
            client.on_close(lambda c: calls.append((c, threading.current_thread())))

        server = self.serve(on_connection)
        peer = self.connect(server)
        client = self.client_of(server, peer)
        self.assertEqual(calls, [])
        peer.close()
        wait_until(lambda: calls)
        client.close()
        threads[0].join(PATIENCE)
        self.assertEqual(calls, [(client, threads[0])])

    def test_calls_on_close_after_its_last_bytes_and_does_not_wait_for_it(self):
        client, peer = self.open(max_backlog=2**30)
        calls, over = [], threading.Event()
        self.addCleanup(over.set)

        def callback(_):
            calls.append("called")
            over.wait()

        client.on_close(callback)
        for number in range(40):
            client.send(big(number))
        client.close()
        self.assert_gets(peer, range(20))
        self.assertEqual(calls, [])
        self.assert_gets(peer, range(20, 40))
        peer.finish()
        wait_until(lambda: calls)
        self.assertFalse(over.is_set())

    def test_calls_on_close_at_once_if_it_has_ended_already(self):
        threads, calls = [], []
        server = self.serve(lambda _: threads.append(threading.current_thread()))
        peer = self.connect(server)
        client = self.client_of(server, peer)
        client.close()
        threads[0].join(PATIENCE)
        client.on_close(calls.append)
        self.assertEqual(calls, [client])

    def test_calls_every_on_close_callback_even_if_one_fails(self):
        client, peer = self.open()
        calls = []
        client.on_close(lambda _: 1 / 0)
        client.on_close(calls.append)
        with self.logged() as records:
            peer.close()
            wait_until(lambda: calls)
        self.assertEqual([r.exc_info[0] for r in records], [ZeroDivisionError])

    def test_calls_every_on_close_callback_even_if_one_exits(self):
        client, peer = self.open()
        calls = []
        client.on_close(lambda _: sys.exit("not now"))
        client.on_close(calls.append)
        with self.logged():
            client.close()
            peer.finish()
            wait_until(lambda: calls)

    def test_is_kept_alive_by_comments_unless_that_is_turned_off(self):
        silent, its_peer = self.open(keepalive=None)
        client, peer = self.open(keepalive=0.05)
        while len(comments(peer)) < 2:
            self.assertRegex(peer.chunk(), rb"^: [^\n]*\n+$")
        client.send("x")
        self.assertEqual(peer.data(), "x")
        silent.close()
        its_peer.finish()
        self.assertEqual(comments(its_peer), [])

    def test_is_kept_alive_only_after_silence(self):
        def on_connection(client):
            for _ in range(30):
                client.send(repr(time.monotonic()))
                client.wait(0.02)
            client.close()

        peer = self.connect(self.serve(on_connection, keepalive=0.3))
        kept_alive = []  # when the last event before each comment was sent
        sent = float(peer.data())
        while piece := peer.chunk():
            if piece.startswith(b":"):
                kept_alive.append(sent)
                continue
            sent = float(peer.data())
            for before in kept_alive:
                self.assertGreater(sent - before, 0.25)
            kept_alive.clear()

    def test_is_kept_alive_while_its_own_thread_is_blocked(self):
        answers = queue.Queue()
        server = self.serve(lambda client: client.send(answers.get()), keepalive=0.05)
        self.addCleanup(answers.put, "nobody waits for this any more")
        peer = self.connect(server)
        while not comments(peer):
            peer.chunk()
        answers.put("the answer")
        self.assertEqual(peer.data(), "the answer")

    def test_is_plain_to_http_1_0(self):
        def on_connection(client):
            client.send("a")
            client.close()

        answer = self.ask(self.serve(on_connection), b"GET /sse HTTP/1.0\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        self.assertNotIn(b"Transfer-Encoding", head)
        self.assertEqual(re.sub(rb"^: ok\n+", b"", body), b"data: a\n\n")

    def test_is_kept_alive_and_ended_plainly_to_http_1_0(self):
        server = self.serve(keepalive=0.05)
        peer = self.connect(server, version="HTTP/1.0")
        while b"keep-alive" not in peer.file.readline():
            pass
        self.client_of(server, peer).close()
        self.assertNotIn(b"0", peer.read_body())


class AsNpmSse(StreamCase):
    """What the npm package's own tests ask, case for case, with the same bytes."""

    def sent(self, *arguments, **fields):
        """Send one event and close; return the stream without its comments."""

        def on_connection(client):
            client.send(*arguments, **fields)
            client.close()

        peer = self.connect(self.serve(on_connection))
        frames = b"".join(iter(peer.chunk, b""))
        return re.sub(rb"^:[^\n]*\n+", b"", frames)

    def is_stream(self, server, path):
        return self.connect(server, path).headers["Content-Type"] == "text/event-stream"

    def test_will_listen_on_sse_by_default(self):
        self.assertTrue(self.is_stream(self.serve(), "/sse"))

    def test_can_be_configured_to_listen_on_a_specific_path(self):
        self.assertTrue(self.is_stream(self.serve(path="/something"), "/something"))

    def test_can_be_configured_to_listen_on_a_wildcard_path(self):
        server = self.serve(path="/something/*")
        self.assertTrue(self.is_stream(server, "/something/foobar"))
        self.assertFalse(self.is_stream(server, "/somethingelse"))

    def test_can_block_a_request_by_a_verification_of_ones_own(self):
        calls = []
        server = self.serve(calls.append, authorize=lambda _: False)
        self.assertFalse(self.is_stream(server, "/sse"))
        self.assertEqual(calls, [])

    def test_emits_connection_when_a_client_connects_and_close_when_it_leaves(self):
        events = []

        def on_connection(client):
            events.append("connection")
            client.on_close(lambda _: events.append("close"))

        peer = self.connect(self.serve(on_connection))
        wait_until(lambda: events == ["connection"])
        peer.close()
        wait_until(lambda: events == ["connection", "close"])

    def test_has_its_two_headers(self):
        headers = self.connect(self.serve()).headers
        self.assertEqual(headers["Content-Type"], "text/event-stream")
        self.assertEqual(headers["Cache-Control"], "no-cache, no-transform")

    def test_close_ends_the_connection(self):
        self.assertEqual(self.connect(self.serve(Client.close)).finish().events, [])

    def test_sends_a_message_with_cr_lf_or_crlf_over_several_data_directives(self):
        for text in ("foo\rbar\rbaz", "foo\nbar\nbaz", "foo\r\nbar\r\nbaz"):
            self.assertEqual(self.sent(text), b"data: foo\ndata: bar\ndata: baz\n\n")

    def test_sends_a_message_with_nonsensical_lfcr_over_several_data_directives(self):
        lines = b"data: foo\ndata: \ndata: bar\ndata: \ndata: baz\ndata: \ndata: \n\n"
        self.assertEqual(self.sent("foo\n\rbar\n\rbaz\n\r"), lines)

    def test_sends_single_line_data(self):
        self.assertEqual(self.sent("foobar"), b"data: foobar\n\n")

    def test_sends_all_fields(self):
        frame = self.sent("foo", event="bar", retry=6000, id=1)
        self.assertEqual(frame, b"event: bar\nretry: 6000\nid: 1\ndata: foo\n\n")

    def test_sends_event_and_data(self):
        frame = self.sent("somedata", event="foobar")
        self.assertEqual(frame, b"event: foobar\ndata: somedata\n\n")

    def test_sends_event_data_and_id(self):
        frame = self.sent("somedata", event="foobar", id=100)
        self.assertEqual(frame, b"event: foobar\nid: 100\ndata: somedata\n\n")


class ASlowReader(StreamCase):
    """The backlog: what a reader was sent and the kernel has not taken yet."""

    def test_delays_no_other_thread_and_loses_nothing(self):
        client, peer = self.open(max_backlog=2**30)
        for number in range(40):
            client.send(big(number))
        self.assert_gets(peer, range(40))
        client.close()
        peer.finish()

    def test_gets_large_and_small_frames_in_the_order_of_sending(self):
        client, peer = self.open(max_backlog=2**30)
        for number in range(200):
            client.send(big(number) if number % 10 == 0 else f"{number} ")
        self.assert_gets(peer, range(200))

    def test_slows_its_own_thread_to_its_pace(self):
        done = threading.Event()

        def on_connection(client):
            for number in range(40):
                client.send(big(number))
            done.set()

        peer = self.connect(self.serve(on_connection))
        self.assertFalse(done.wait(0.2))
        self.assert_gets(peer, range(40))
        self.assertTrue(done.wait(PATIENCE))

    def test_slows_its_own_thread_by_what_that_sent_alone(self):
        done = threading.Event()

        def on_connection(client):
            client.send("x" * 2_000_000)
            done.set()

        server = self.serve(on_connection, max_backlog=2**30)
        peer = self.connect(server)
        self.assertTrue(peer.file.peek(1))  # some of it has come
        client = self.client_of(server, peer)
        for number in range(40):
            client.send(big(number))
        self.assertFalse(done.is_set())
        self.assertEqual(len(peer.data()), 2_000_000)
        self.assertTrue(done.wait(PATIENCE))  # though the rest has not been read
        self.assert_gets(peer, range(40))

    def test_gets_an_event_larger_than_its_backlog_may_be(self):
        client, peer = self.open(max_backlog=1000)
        client.send("x" * 3_000_000)
        self.assertEqual(len(peer.data()), 3_000_000)
        client.send("y")
        self.assertEqual(peer.data(), "y")

    def test_is_cut_off_alone_when_its_backlog_is_over_the_limit(self):
        server = self.serve(max_backlog=200_000)
        slow, quick = self.connect(server), self.connect(server)
        client = self.client_of(server, slow)
        with self.logged() as records:
            with self.assertRaises(BrokenPipeError):
                for number in range(100):
                    client.send(big(number))
            wait_until(lambda: records)
        self.assertIn(str(client.address[1]), records[0].getMessage())
        other = self.client_of(server, quick)
        other.send("unharmed")
        self.assertEqual(quick.data(), "unharmed")
        self.assert_cut_off(slow)
        self.assertEqual(server.clients, {other})

    def test_learns_that_it_was_cut_off_while_its_own_thread_is_busy(self):
        client, peer, free = self.open_busy(max_backlog=200_000)
        with self.logged(), self.assertRaises(BrokenPipeError):
            for number in range(100):
                client.send(big(number))
        self.assert_cut_off(peer)
        self.assertFalse(free.is_set())

    def test_is_cut_off_when_it_has_stopped_but_not_when_it_goes_on(self):
        with mock.patch.object(Client, "stall_timeout", 0.5), self.logged() as records:
            server = self.serve(max_backlog=2**30)
            stuck, slow = self.connect(server), self.connect(server)
            clients = [self.client_of(server, peer) for peer in (stuck, slow)]
            for number in range(100):
                clients[1].send(big(number))
            clients[0].send("x" * 8_000_000)
            read = 0
            while not clients[0].closed:
                self.assert_gets(slow, [read])
                read += 1
                time.sleep(0.02)
            wait_until(lambda: records)
            self.assert_gets(slow, range(read, 100))
        self.assert_cut_off(stuck)
        self.assertEqual(server.clients, {clients[1]})

    def test_is_not_cut_off_when_it_is_slow_but_steady(self):
        # Linux calls a socket writable again only when a third of its buffer is free.
        with mock.patch.object(Client, "stall_timeout", 0.4), self.logged():
            server = self.serve(max_backlog=2**30)
            server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
            peer = self.connect(server)
            client = self.client_of(server, peer)
            client.send("x" * 8_000_000)
            deadline = time.monotonic() + 1
            begun = b""
            while time.monotonic() < deadline:
                begun += peer.socket.recv(20_000)
                time.sleep(0.05)
            self.assertFalse(client.closed)
            client.close()
            rest = peer.read_body()
        self.assertGreater(len(begun + rest), 8_000_000)
        self.assertTrue(rest.endswith(b"\r\n0\r\n\r\n"))

    def test_gets_all_that_was_sent_before_its_stream_was_closed(self):
        client, peer = self.open()
        client.send("x" * 8_000_000)
        client.close()
        with self.assertRaises(BrokenPipeError):
            client.send("too late")
        self.assertEqual(len(peer.data()), 8_000_000)
        self.assertEqual(peer.finish().events, [])

    def test_calls_on_close_after_the_answer_that_a_refusal_gets(self):
        answered, results = threading.Event(), []

        def on_connection(client):
            client.on_close(lambda _: results.append(answered.wait(2)))
            raise sse_ref.Refusal(404)

        peer = self.connect(self.serve(on_connection))
        self.assertEqual(peer.status, 404)
        peer.read_body()  # ends
        answered.set()
        wait_until(lambda: results)
        self.assertEqual(results, [True])

    def test_ends_when_its_close_was_interrupted(self):
        client, peer = self.open()
        client.send("x")
        send_more, calls = Client._continue_sending, []

        def interrupted(client):
            calls.append(client)
            if len(calls) == 1:
                raise KeyboardInterrupt
            send_more(client)

        with mock.patch.object(Client, "_continue_sending", interrupted):
            with self.assertRaises(KeyboardInterrupt):
                client.close()
            self.assertEqual(peer.data(), "x")
            self.assertEqual(peer.finish().events[1:], [])

    def test_calls_on_close_even_if_its_last_write_fails(self):
        class Unlucky(socket.socket):
            def send(self, data, *flags):
                if bytes(data) == b"0\r\n\r\n":
                    raise MemoryError
                return super().send(data, *flags)

        calls = []

        def on_connection(client):
            client.on_close(calls.append)
            client.send("x")
            raise ValueError

        server = self.serve(on_connection)
        replace_sockets(server, Unlucky)
        with self.logged():
            peer = self.connect(server)
            wait_until(lambda: calls)
        self.assert_cut_off(peer)

    def test_gets_later_what_the_kernel_does_not_take_now(self):
        refused = []

        class Full(socket.socket):
            def send(self, data, *flags):
                if b"later" in bytes(data) and not refused:
                    refused.append(data)
                    raise BlockingIOError
                return super().send(data, *flags)

        server = self.serve()
        replace_sockets(server, Full)
        peer = self.connect(server)
        client = self.client_of(server, peer)
        client.send("later")
        client.send("and this")
        self.assertEqual([peer.data(), peer.data()], ["later", "and this"])
        self.assertTrue(refused)

    def test_frees_its_own_thread_by_leaving(self):
        ended = threading.Event()

        def on_connection(client):
            try:
                client.send("x" * 8_000_000)
            except BrokenPipeError:
                ended.set()
                raise

        peer = self.connect(self.serve(on_connection))
        self.assertTrue(peer.file.peek(1))
        with self.logged() as records:
            peer.close()
            self.assertTrue(ended.wait(PATIENCE))
        self.assertEqual(records, [])


class ChannelCase(StreamCase):
    """Makes channels, and streams that are subscribed to them."""

    def channel(self, **options):
        channel = Channel(**options)
        self.addCleanup(channel.close)
        return channel

    def subscribers(self, channel, count, **options):
        """Serve, connect `count` peers, and return them once they are subscribed."""
        server = self.serve(channel.subscribe, **options)
        return self.subscribe(server, channel, count)

    def subscribe(self, server, channel, count):
        before = len(channel.clients)
        peers = [self.connect(server) for _ in range(count)]
        wait_until(lambda: len(channel.clients) == before + count, "the subscribers")
        return peers

    def read_up_to(self, peer, data):
        """Return the events up to and including the one with this data."""
        events = [peer.event()]
        while events[-1][1] != data:
            events.append(peer.event())
        return events

    def hold_up(self, server, channel):
        """Have the fan-out of `channel` stand still until the returned event is set.

        A first subscriber is the reason: to send to it lasts that long.
        """
        entered, free = threading.Event(), threading.Event()
        self.addCleanup(free.set)

        class Slow(socket.socket):
            def send(self, data, *flags):
                if b"hold up" in bytes(data):
                    entered.set()
                    free.wait()
                return super().send(data, *flags)

        replace_sockets(server, Slow)
        self.subscribe(server, channel, 1)
        channel.publish("hold up")
        self.assertTrue(entered.wait(PATIENCE))
        return free

    def assert_gets_or_is_told(self, peer, got, newest):
        """Read on after `got`, up to `newest`: gap events must say what is lost."""
        gaps = 0
        while got < newest:
            kind, data, _ = peer.event()
            if kind == "gap":
                gaps += 1
                self.assertEqual(number_of(data), got)
                got = number_in(peer.data())
            else:
                self.assertEqual(number_in(data), got + 1)
                got += 1
        self.assertGreater(gaps, 0)


class AChannel(ChannelCase):
    """Channel: publish once, reach all."""

    def test_reaches_every_subscriber(self):
        channel = self.channel()
        peers = self.subscribers(channel, 5)
        id_ = channel.publish("hello", event="greeting")
        for peer in peers:
            self.assertEqual(peer.event(), ("greeting", "hello", id_))

    def test_gives_a_new_client_only_what_is_new(self):
        channel = self.channel()
        channel.publish("a")
        (peer,) = self.subscribers(channel, 1)
        channel.publish("b")
        self.assertEqual(peer.data(), "b")

    def test_reaches_whoever_has_the_head_of_its_answer(self):
        channel = self.channel()

        def on_connection(client):
            time.sleep(0.05)  # some preparation
            channel.subscribe(client)

        server = self.serve(on_connection)
        url = f"http://localhost:{server.server_port}/sse"
        for number in range(5):
            with urllib.request.urlopen(url, timeout=1) as stream:
                stream.readline()
                channel.publish(str(number))
                lines = iter(stream.readline, b"")
                self.assertIn(b"data: %d\n" % number, lines)

    def test_numbers_its_events(self):
        channel = self.channel()
        ids = [channel.publish("x") for _ in range(3)]
        epoch = ids[0].rpartition("-")[0]
        self.assertEqual(ids, [f"{epoch}-{n}" for n in (1, 2, 3)])
        self.assertRegex(epoch, r"^[\w-]+$")
        self.assertFalse(self.channel().publish("x").startswith(epoch))

    def test_takes_the_ids_that_it_is_given(self):
        channel = self.channel()
        (peer,) = self.subscribers(channel, 1)
        self.assertEqual(channel.publish("a", id="x"), "x")
        self.assertEqual(channel.publish("b", id=7), "7")
        self.assertEqual(channel.publish("c", id=""), "")
        self.assertEqual(number_of(channel.publish(event="d")), 4)
        events = [peer.event() for _ in range(3)]
        wanted = [("message", "a", "x"), ("message", "b", "7"), ("message", "c", "")]
        self.assertEqual(events, wanted)

    def test_refuses_an_event_without_using_up_its_id(self):
        channel = self.channel()
        (peer,) = self.subscribers(channel, 1)
        self.assertEqual(number_of(channel.publish("a")), 1)
        for error, fields in (
            (ValueError, {}),
            (ValueError, {"data": "\ud800"}),
            (ValueError, {"data": "x", "event": "\n"}),
            (ValueError, {"data": "x", "id": "\0"}),
            (TypeError, {"data": b"x"}),
        ):
            with self.assertRaises(error):
                channel.publish(**fields)
        self.assertEqual(number_of(channel.publish("b")), 2)
        self.assertEqual([peer.data(), peer.data()], ["a", "b"])

    def test_keeps_the_order_of_each_publishing_thread(self):
        channel = self.channel(history=10_000)
        peers = self.subscribers(channel, 3)

        def publish(name):
            for number in range(500):
                channel.publish(f"{name} {number}")

        threads = start_threads(*[lambda name=n: publish(name) for n in range(4)])
        sequences = [[peer.event() for _ in range(2000)] for peer in peers]
        join(threads)
        self.assertEqual(sequences[0], sequences[1])
        self.assertEqual(sequences[0], sequences[2])
        numbers = [number_of(id_) for _, _, id_ in sequences[0]]
        self.assertEqual(numbers, list(range(1, 2001)))
        for name in range(4):
            mine = [d for _, d, _ in sequences[0] if d.startswith(f"{name} ")]
            self.assertEqual(mine, [f"{name} {number}" for number in range(500)])

    def test_writes_a_burst_in_one_piece(self):
        channel = self.channel()
        server = self.serve(channel.subscribe)
        free = self.hold_up(server, channel)
        (peer,) = self.subscribe(server, channel, 1)
        for number in range(1000):
            channel.publish(str(number))
        free.set()
        while len(peer.reader.events) < 1000:
            piece = peer.chunk()
        self.assertGreaterEqual(piece.count(b"data: "), 999)

    def test_writes_no_more_than_256_kib_in_one_piece(self):
        channel = self.channel()
        server = self.serve(channel.subscribe)
        free = self.hold_up(server, channel)
        (peer,) = self.subscribe(server, channel, 1)
        for _ in range(100):
            channel.publish("x" * 10_000)
        free.set()
        sizes = []
        while len(peer.reader.events) < 100:
            sizes.append(len(peer.chunk()))
        self.assertLessEqual(max(sizes), 2**18)
        self.assertLess(len(sizes), 10)

    def test_keeps_all_that_its_fan_out_has_not_taken_yet(self):
        channel = self.channel(history=2)
        server = self.serve(channel.subscribe)
        free = self.hold_up(server, channel)
        (peer,) = self.subscribe(server, channel, 1)
        for number in range(20):
            channel.publish(big(number))
        free.set()
        self.assert_gets(peer, range(20))

    def test_reaches_subscribers_by_http_1_0_without_chunks(self):
        channel = self.channel(history=0)
        server = self.serve(channel.subscribe)
        peer = self.connect(server, version="HTTP/1.0")
        wait_until(lambda: channel.clients)
        channel.publish("a")
        while (line := peer.file.readline()) != b"data: a\n":
            self.assertRegex(line, rb"^(: ok)?\n$")
        self.client_of(server, peer).close()
        self.assertEqual(peer.read_body(), b"\n")

    def test_gives_each_what_was_published_after_it_came(self):
        for version in ("HTTP/1.1", "HTTP/1.0"):
            with self.subTest(version):
                self.check_late_subscriber(version)

    def check_late_subscriber(self, version):
        channel = self.channel()
        server = self.serve(channel.subscribe)
        early = self.subscribe(server, channel, 1)[0]
        free = self.hold_up(server, channel)  # so that all come within one piece
        channel.publish("old")
        late = self.connect(server, version=version)
        wait_until(lambda: len(channel.clients) == 3)
        channel.publish("new")
        (latest,) = self.subscribe(server, channel, 1)
        free.set()
        channel.publish("last")
        data = [early.data() for _ in range(4)]
        self.assertEqual(data, ["hold up", "old", "new", "last"])
        self.assertEqual(latest.data(), "last")
        if version == "HTTP/1.0":
            lines = iter(late.file.readline, b"data: last\n")
            data = [line for line in lines if line.startswith(b"data: ")]
            self.assertEqual(data, [b"data: new\n"])
        else:
            self.assertEqual([late.data(), late.data()], ["new", "last"])

    def test_lets_go_at_once_of_a_client_that_leaves(self):
        channel = self.channel()
        peers = self.subscribers(channel, 2)
        self.assertIsInstance(channel.clients, frozenset)
        peers[0].close()
        wait_until(lambda: len(channel.clients) == 1)

    def test_counts_only_open_streams_as_its_clients(self):
        channel = self.channel()
        self.subscribers(channel, 2)
        client = next(iter(channel.clients))
        client.send("x" * 8_000_000)  # which still has to get out
        client.close()
        self.assertEqual(len(channel.clients), 1)

    def test_sends_no_more_to_a_client_that_was_unsubscribed(self):
        channel = self.channel()
        (peer,) = self.subscribers(channel, 1)
        channel.publish("a")
        self.assertEqual(peer.data(), "a")
        (client,) = channel.clients
        channel.unsubscribe(client)
        channel.unsubscribe(client)  # again does no harm
        channel.publish("b")
        client.send("c")
        self.assertEqual(peer.data(), "c")

    def test_gives_a_client_that_is_subscribed_again_what_comes_from_then_on(self):
        channel = self.channel()
        first = channel.publish("1")
        channel.publish("2")
        steps = queue.Queue()

        def on_connection(client):
            channel.subscribe(client)
            client.send("unsubscribed")
            channel.unsubscribe(client)
            channel.publish("3")
            channel.subscribe(client)
            steps.put("subscribed again")

        peer = self.connect(self.serve(on_connection), Last_Event_ID=first)
        steps.get(timeout=PATIENCE)
        channel.publish("4")
        channel.publish("5")
        data = [peer.data() for _ in range(4)]
        self.assertEqual(data, ["2", "unsubscribed", "4", "5"])

    def test_shares_its_clients_with_others(self):
        one, two = self.channel(), self.channel(history=0)

        def on_connection(client):
            two.subscribe(client)
            one.subscribe(client)
            two.subscribe(client)  # again changes nothing

        server = self.serve(on_connection, max_backlog=2**30)
        peer = self.connect(server)
        wait_until(lambda: one.clients and two.clients)
        (client,) = one.clients

        def repeat(call, name):
            for number in range(300):
                call(f"{name}\n{number}")

        calls = {"one": one.publish, "two": two.publish, "direct": client.send}
        targets = [lambda n=name, c=call: repeat(c, n) for name, call in calls.items()]
        threads = start_threads(*targets)
        got = [peer.data().split("\n") for _ in range(900)]
        join(threads)
        for name in calls:
            numbers = [int(number) for sender, number in got if sender == name]
            self.assertEqual(numbers, list(range(300)))

    def test_refuses_a_client_of_another_channel_with_history(self):
        one, two = self.channel(), self.channel()
        answers = queue.Queue()

        def on_connection(client):
            one.subscribe(client)
            try:
                two.subscribe(client)
            except Exception as error:  # noqa: BLE001
                answers.put(error)
            else:
                answers.put(None)

        self.connect(self.serve(on_connection))
        self.assertIsInstance(answers.get(timeout=PATIENCE), ValueError)

    def test_delivers_what_was_published_before_its_close(self):
        channel = self.channel()
        server = self.serve(channel.subscribe)
        free = self.hold_up(server, channel)
        (peer,) = self.subscribe(server, channel, 1)
        channel.publish("last")
        threads = start_threads(channel.close)
        free.set()
        join(threads)
        self.assertEqual(peer.data(), "last")
        self.client_of(server, peer).send("open still")
        self.assertEqual(peer.data(), "open still")

    def test_refuses_to_publish_after_its_close(self):
        channel = self.channel()
        channel.close()
        channel.close()  # again does no harm
        with self.assertRaises(RuntimeError):
            channel.publish("x")

    def test_can_end_every_stream_after_its_last_event(self):
        channel = self.channel()
        server = self.serve(channel.subscribe)
        behind, quick = self.subscribe(server, channel, 2)
        for number in range(40):
            channel.publish(big(number))
        channel.close(end_streams=True)
        for peer in (quick, behind):
            self.assert_gets(peer, range(40))
            self.assertEqual(peer.finish().events, [])

    def test_replays_to_a_late_client_after_its_close(self):
        channel = self.channel()
        ids = [channel.publish(str(number)) for number in range(3)]
        channel.close()
        server = self.serve(channel.subscribe)
        peer = self.connect(server, Last_Event_ID=ids[0])
        self.assertEqual([peer.data(), peer.data()], ["1", "2"])
        self.client_of(server, peer).send("open still")
        self.assertEqual(peer.data(), "open still")

    def test_ends_the_stream_of_a_late_client_as_it_ended_the_others(self):
        channel = self.channel()
        ids = [channel.publish(str(number)) for number in range(3)]
        channel.close(end_streams=True)
        server = self.serve(channel.subscribe)
        late = self.connect(server, Last_Event_ID=ids[0])
        data = [data for _, data, _ in late.finish().events]
        self.assertEqual(data, ["1", "2"])
        self.assertEqual(self.connect(server).finish().events, [])

    def test_is_freed_with_its_history_when_it_is_dropped(self):
        rooms = [Channel(), Channel()]
        references = [weakref.ref(room) for room in rooms]

        def on_connection(client):
            rooms[0].subscribe(client)

        server = self.serve(on_connection)
        rooms[1].publish("nobody came")
        (peer,) = self.subscribe(server, rooms[0], 1)
        rooms[0].publish("somebody came")
        self.assertEqual(peer.data(), "somebody came")
        peer.close()
        wait_until(lambda: not rooms[0].clients)
        rooms.clear()

        def freed():
            gc.collect()
            return not any(reference() for reference in references)

        wait_until(freed, "the channels' end")

    def test_makes_publish_wait_for_the_fan_out_but_not_for_readers(self):
        limit = mock.patch.object(Channel, "max_pending", 10_000, create=True)
        with limit:
            channel = self.channel()
            server = self.serve(channel.subscribe)
            free = self.hold_up(server, channel)
            (peer,) = self.subscribe(server, channel, 1)
            published = []

            def publish():
                for number in range(100):
                    channel.publish(f"{number} ".ljust(1000))
                    published.append(number)

            threads = start_threads(publish)
            threads[0].join(0.2)
            self.assertTrue(5 <= len(published) <= 12, len(published))
            free.set()
            join(threads)  # though nobody has read yet
        self.assertEqual([number_in(peer.data()) for _ in range(100)], published)

    def test_never_makes_publish_wait_without_subscribers(self):
        with mock.patch.object(Channel, "max_pending", 10_000, create=True):
            channel = self.channel()
            ids = [channel.publish("x" * 1000) for _ in range(100)]
        self.assertEqual(number_of(ids[-1]), 100)

    def test_refuses_options_that_make_no_sense(self):
        with self.assertRaises(ValueError):
            Channel(history=-1)
        with self.assertRaises(ValueError):
            Channel(gap_event="a\nb")

    def test_loses_only_one_stream_to_a_memory_error_on_its_socket(self):
        victims = []

        class Unlucky(socket.socket):
            def send(self, data, *flags):
                if self.getpeername() in victims and b"large" in bytes(data):
                    raise MemoryError
                return super().send(data, *flags)

        channel = self.channel()
        server = self.serve(channel.subscribe)
        replace_sockets(server, Unlucky)
        victim, *others = self.subscribe(server, channel, 4)
        victims.append(victim.socket.getsockname())
        with self.logged():
            channel.publish("large")
            channel.publish("small")
            for peer in others:
                self.assertEqual([peer.data(), peer.data()], ["large", "small"])
            wait_until(lambda: len(channel.clients) == 3)
        with contextlib.suppress(ConnectionResetError, EOFError):
            victim.finish()
        self.assertEqual(victim.reader.events, [])


class ASlowSubscriber(ChannelCase):
    """A channel's history is the buffer of its slow readers."""

    def test_keeps_its_place_and_gets_everything_in_order(self):
        channel = self.channel()
        healthy, *slow = self.subscribers(channel, 9)
        for number in range(40):
            channel.publish(big(number))
            self.assert_gets(healthy, [number])
        self.assertEqual(len(channel.clients), 9)
        for peer in slow:
            self.assert_gets(peer, range(40))
        channel.publish("live again")
        for peer in (healthy, *slow):
            self.assertEqual(peer.data(), "live again")

    def test_gets_an_event_far_larger_than_its_backlog_may_be(self):
        channel = self.channel()
        peers = self.subscribers(channel, 3, max_backlog=1000)
        channel.publish("x" * 3_000_000)
        for number in range(20):
            channel.publish(str(number))
        for peer in peers:
            self.assertEqual(len(peer.data()), 3_000_000)
            self.assertEqual([int(peer.data()) for _ in range(20)], list(range(20)))

    @unittest.skipUnless(tracemalloc, "needs tracemalloc")
    def test_costs_little_memory_beside_the_history(self):
        channel = self.channel()
        healthy, *slow = self.subscribers(channel, 11)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for number in range(30):  # 3 MB, which each could have had for itself
            channel.publish(big(number))
            self.assert_gets(healthy, [number])
        channel.publish("x" * 4_000_000)  # and this one must be shared, not copied
        self.assertEqual(len(healthy.data()), 4_000_000)
        for peer in slow:  # up to the last one, which is in their backlogs then
            self.assert_gets(peer, range(30))
        self.assertLess(tracemalloc.get_traced_memory()[0], 25_000_000)
        self.assertEqual(len(channel.clients), 11)

    @unittest.skipUnless(tracemalloc, "needs tracemalloc")
    def test_shares_a_large_event_with_the_history(self):
        channel = self.channel()
        self.subscribers(channel, 5, max_backlog=2**30)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        channel.publish("x" * 20_000_000)  # None of them reads it.
        channel.close()  # returns when it has been written to all
        self.assertLess(tracemalloc.get_traced_memory()[0], 30_000_000)

    def test_is_told_of_a_gap_once_the_history_has_overtaken_it(self):
        channel = self.channel(history=20)
        healthy, slow = self.subscribers(channel, 2)
        for number in range(1, 101):
            channel.publish(big(number))
            self.assert_gets(healthy, [number])
        self.assert_gets_or_is_told(slow, 0, 100)

    def check_cut_off(self, channel):
        healthy, slow = self.subscribers(channel, 2)
        with self.logged():
            for number in range(100):
                channel.publish(big(number))
                self.assert_gets(healthy, [number])
            self.assert_cut_off(slow)
        got = [number_in(data) for _, data, _ in slow.reader.events]
        self.assertEqual(got, list(range(len(got))))
        wait_until(lambda: len(channel.clients) == 1)

    @unittest.skipUnless(tracemalloc, "needs tracemalloc")
    def test_shares_one_large_event_with_others(self):
        size = 20_000_000
        for version, options in (
            ("HTTP/1.1", {}),
            ("HTTP/1.1", {"retry": 1000}),
            ("HTTP/1.0", {}),
        ):
            channel = self.channel()
            channel.publish("x" * size)
            server = self.serve(
                lambda client, c=channel: c.subscribe(client, last=1), **options
            )
            with self.subTest(version, **options):
                tracemalloc.start()
                try:
                    for _ in range(4):
                        self.connect(server, version=version)
                    wait_until(lambda c=channel: len(c.clients) == 4)
                    held, _ = tracemalloc.get_traced_memory()
                finally:
                    tracemalloc.stop()
                self.assertLess(held, size)

    def test_is_cut_off_when_overtaken_if_there_is_no_gap_event(self):
        self.check_cut_off(self.channel(history=20, gap_event=None))

    def test_is_cut_off_after_one_mib_if_there_is_no_history(self):
        self.check_cut_off(self.channel(history=0))

    def test_keeps_its_place_for_one_mib_if_there_is_no_history(self):
        channel = self.channel(history=0)
        healthy, slow = self.subscribers(channel, 2)
        for number in range(10):
            channel.publish(big(number))
            self.assert_gets(healthy, [number])
        self.assert_gets(slow, range(10))

    def test_that_comes_too_late_is_told_so_once(self):
        channel = self.channel(history=5)
        channel.min_log_size = 0
        done = threading.Event()

        def publish():
            while not done.is_set():
                channel.publish("x" * 50_000)

        server = self.serve(channel.subscribe)
        self.connect(server)  # So there is a fan-out thread.
        threads = start_threads(publish)
        try:
            for _ in range(15):
                peer = self.connect(server, Last_Event_ID="old")
                kinds = [peer.event()[0] for _ in range(2)]
                peer.close()
                self.assertEqual(kinds, ["gap", "message"])
        finally:
            done.set()
            join(threads)

    def test_is_cut_off_when_it_has_stopped(self):
        with mock.patch.object(Client, "stall_timeout", 0.3), self.logged():
            channel = self.channel()
            (peer,) = self.subscribers(channel, 1)
            for number in range(40):
                channel.publish(big(number))
            wait_until(lambda: not channel.clients)
        self.assert_cut_off(peer)

    def test_gets_what_was_published_before_its_close_and_no_more(self):
        channel = self.channel()
        (peer,) = self.subscribers(channel, 1)
        (client,) = channel.clients
        for number in range(30):
            channel.publish(big(number))
        client.close()
        for number in range(30, 60):
            channel.publish(big(number))
        self.assert_gets(peer, range(30))
        self.assertEqual(peer.finish().events, [])

    def test_is_served_to_the_end_after_the_channels_close(self):
        channel = self.channel()
        (peer,) = self.subscribers(channel, 1)
        for number in range(40):
            channel.publish(big(number))
        channel.close()
        self.assert_gets(peer, range(40))


class AReconnectingClient(ChannelCase):
    """Channel: what was missed meanwhile."""

    def resume(self, channel, last_id, live="live"):
        """Reconnect, publish `live`, and return the events that come before it."""
        peer = self.connect(self.serve(channel.subscribe), Last_Event_ID=last_id)
        wait_until(lambda: channel.clients)
        channel.publish(live)
        events = self.read_up_to(peer, live)
        self.leave(channel, peer)
        return events[:-1]

    def leave(self, channel, peer):
        peer.close()
        wait_until(lambda: not channel.clients)

    def test_gets_what_it_missed(self):
        channel = self.channel()
        ids = [channel.publish(str(number)) for number in range(5)]
        wanted = [("message", str(n), ids[n]) for n in (2, 3, 4)]
        self.assertEqual(self.resume(channel, ids[1]), wanted)
        self.assertEqual(self.resume(channel, channel.publish("newest")), [])

    def test_gets_what_it_missed_by_ids_from_before_a_fork(self):
        channel = self.channel()
        before = [channel.publish(str(number)) for number in range(2)]
        with mock.patch.object(os, "getpid", return_value=1):  # as in a new process
            after = channel.publish("2")
            self.assertNotEqual(after[:-1], before[0][:-1])
            wanted = [("message", "1", before[1]), ("message", "2", after)]
            self.assertEqual(self.resume(channel, before[0]), wanted)

    def test_gets_what_it_missed_by_an_id_that_the_program_puts_in(self):
        channel = self.channel()
        first = channel.publish("a")
        channel.publish("b")

        def on_connection(client):
            client.last_event_id = first
            channel.subscribe(client)

        self.assertEqual(self.connect(self.serve(on_connection)).data(), "b")

    def test_gets_what_was_published_by_a_call_that_was_interrupted(self):
        channel, append = self.channel(), sse_ref._Log.append
        first = channel.publish("a")

        def interrupted(*arguments):
            append(*arguments)
            raise KeyboardInterrupt

        patched = mock.patch.object(sse_ref._Log, "append", interrupted)
        with patched, self.assertRaises(KeyboardInterrupt):
            channel.publish("b")
        channel.close()
        server = self.serve(channel.subscribe)
        self.assertEqual(self.connect(server, Last_Event_ID=first).data(), "b")

    def test_gets_it_once_even_if_it_is_subscribed_twice(self):
        channel = self.channel()
        first = channel.publish("a")
        channel.publish("b")

        def on_connection(client):
            channel.subscribe(client)
            channel.subscribe(client)
            client.send("c")

        peer = self.connect(self.serve(on_connection), Last_Event_ID=first)
        self.assertEqual([peer.data(), peer.data()], ["b", "c"])

    def test_gets_what_it_missed_by_ids_of_the_programs_own(self):
        channel = self.channel()
        for number in range(5):
            channel.publish(str(number), id=f"offset/{number}é")
        events = self.resume(channel, "offset/2é")
        self.assertEqual([data for _, data, _ in events], ["3", "4"])

    def test_continues_after_the_later_of_two_events_with_one_id(self):
        channel = self.channel(history=3)
        channel.publish("the earlier one", id="a")
        for number in range(10):
            channel.publish(big(number))
        channel.publish("the later one", id="a")
        events = self.resume(channel, "a")
        self.assertEqual(events, [])
        channel.publish(big(1))  # Now the earlier one is not held any more.
        events = self.resume(channel, "a", live="again")
        self.assertEqual([data for _, data, _ in events], ["live", big(1)])

    def test_continues_after_the_later_event_even_if_an_id_is_given_out_twice(self):
        channel = self.channel()
        first = channel.publish("1")
        channel.publish("2", id=first)
        channel.publish("3", id=f"{first[:-1]}4")
        fourth = channel.publish("4")
        events = self.resume(channel, first, live="5")
        self.assertEqual([data for _, data, _ in events], ["3", "4"])
        events = self.resume(channel, fourth, live="6")
        self.assertEqual([data for _, data, _ in events], ["5"])

    def test_is_told_of_a_gap_and_gets_all_that_is_held(self):
        channel = self.channel(history=3)
        ids = [channel.publish(str(number)) for number in range(5)]
        for lost in (ids[0], "of-yesterday-7", "é"):
            gap, *held = self.resume(channel, lost, live=f"{lost} is back")
            self.assertEqual(gap, ("gap", lost, ""))
            self.assertEqual([kind for kind, _, _ in held], ["message"] * 3)

    def test_is_told_of_a_gap_by_the_name_that_was_chosen(self):
        channel = self.channel(gap_event="lost")
        channel.publish("a")
        self.assertEqual(self.resume(channel, "x")[0][:2], ("lost", "x"))

    def test_is_not_told_of_a_gap_if_there_is_no_gap_event(self):
        channel = self.channel(gap_event=None)
        channel.publish("a")
        self.assertEqual(self.resume(channel, "x")[0][:2], ("message", "a"))

    def test_is_told_of_one_gap_after_a_restart_and_of_no_other(self):
        channel = self.channel()
        server = self.serve(channel.subscribe)
        peer = self.connect(server, Last_Event_ID="of-yesterday-7")
        kind, data, id_ = peer.event()
        self.assertEqual((kind, data), ("gap", "of-yesterday-7"))
        self.assertTrue(id_.endswith("-0"))
        self.leave(channel, peer)
        first = channel.publish("a")
        self.assertEqual(self.resume(channel, id_), [("message", "a", first)])

    def test_is_told_of_a_gap_at_the_beginning_only_if_something_was_dropped(self):
        channel = self.channel(history=2)
        epoch = channel.publish("1").rpartition("-")[0]
        channel.publish("2")
        events = self.resume(channel, f"{epoch}-0")
        self.assertEqual([data for _, data, _ in events], ["1", "2"])
        events = self.resume(channel, f"{epoch}-0", live="later")
        self.assertEqual([kind for kind, _, _ in events], ["gap", "message", "message"])

    def test_gets_no_replay_no_gap_and_no_ids_if_there_is_no_history(self):
        channel = self.channel(history=0)
        self.assertEqual(channel.publish("a"), "")
        self.assertEqual(channel.publish("b", id=5), "5")
        self.assertEqual(self.resume(channel, "5"), [])
        self.assertEqual(self.resume(channel, "x"), [])
        (peer,) = self.subscribers(channel, 1)
        channel.publish("c")
        self.assertEqual(peer.event(), ("message", "c", ""))

    def first_id(self, channel, server):
        """Connect without an id, and return the one that the stream begins with."""
        peer = self.connect(server)
        while not peer.reader.last_event_id:
            peer.chunk()
        self.assertEqual(peer.reader.events, [])
        self.leave(channel, peer)
        return peer.reader.last_event_id

    def test_has_an_id_to_come_back_with_before_its_first_event(self):
        channel = self.channel()
        server = self.serve(channel.subscribe)
        for number in range(3):
            id_ = self.first_id(channel, server)
            channel.publish(str(number))
            data = [data for _, data, _ in self.resume(channel, id_)]
            self.assertEqual(data, [str(number)])

    def test_has_such_an_id_among_ids_of_the_programs_own_too(self):
        channel = self.channel()
        channel.publish("1", id="one")
        server = self.serve(channel.subscribe)
        id_ = self.first_id(channel, server)
        channel.publish("2", id="two")
        self.assertEqual(self.resume(channel, id_), [("message", "2", "two")])

    def data_for(self, subscribe, **options):
        """Connect, have that stream subscribed and ended, and return its data."""

        def on_connection(client):
            subscribe(client)
            client.send("end")

        peer = self.connect(self.serve(on_connection), **options)
        return list(iter(peer.data, "end"))

    def test_gets_the_newest_events_if_it_names_no_id_and_the_program_says_so(self):
        channel = self.channel()
        ids = [channel.publish(str(number)) for number in range(5)]

        def subscribe(client):
            channel.subscribe(client, last=2)

        self.assertEqual(self.data_for(subscribe), ["3", "4"])
        missed = self.data_for(subscribe, Last_Event_ID=ids[0])
        self.assertEqual(missed, ["1", "2", "3", "4"])
        everything = self.data_for(lambda client: channel.subscribe(client, last=99))
        self.assertEqual(everything, ["0", "1", "2", "3", "4"])

    def test_begins_where_the_program_says(self):
        channel = self.channel()
        ids = [channel.publish(str(number)) for number in range(5)]

        def subscribe(client):
            channel.subscribe(client, after=ids[2])

        self.assertEqual(self.data_for(subscribe), ["3", "4"])
        self.assertEqual(self.data_for(subscribe, Last_Event_ID=ids[0]), ["3", "4"])

    def test_can_be_given_a_state_first_and_then_every_change(self):
        channel = self.channel()
        ids = [channel.publish(str(number)) for number in range(5)]

        def subscribe(client):
            client.send("as of 2")
            channel.subscribe(client, after=ids[2])

        self.assertEqual(self.data_for(subscribe), ["as of 2", "3", "4"])

    def test_is_told_of_a_gap_if_the_program_names_an_id_that_is_lost(self):
        channel = self.channel()
        channel.publish("0")
        data = self.data_for(lambda client: channel.subscribe(client, after="lost"))
        self.assertEqual(data, ["lost", "0"])

    def test_returns_from_subscribe_before_the_replay_is_read(self):
        channel = self.channel()
        first = channel.publish("0")
        for number in range(1, 40):
            channel.publish(big(number))
        subscribed = threading.Event()

        def on_connection(client):
            channel.subscribe(client)
            subscribed.set()

        peer = self.connect(self.serve(on_connection), Last_Event_ID=first)
        self.assertTrue(subscribed.wait(PATIENCE))
        self.assert_gets(peer, range(1, 40))

    def test_is_told_of_a_gap_when_the_history_overtakes_its_replay(self):
        channel = self.channel(history=40)
        first = channel.publish("1")
        for number in range(2, 41):
            channel.publish(big(number))
        server = self.serve(channel.subscribe)
        peer = self.connect(server, Last_Event_ID=first)
        self.assertTrue(peer.file.peek(1))
        for number in range(41, 141):
            channel.publish(big(number))
        self.assert_gets_or_is_told(peer, 1, 140)

    def test_may_leave_during_its_replay(self):
        channel = self.channel()
        for number in range(40):
            channel.publish(big(number))
        server = self.serve(channel.subscribe)
        threads = threading.active_count()
        peer = self.connect(server, Last_Event_ID="lost")
        self.assertTrue(peer.file.peek(1))
        peer.close()
        wait_until(lambda: not channel.clients and not server.clients)
        wait_until(lambda: threading.active_count() <= threads + 1)

    def test_loses_and_doubles_nothing_in_a_storm(self):
        channel = self.channel(history=10**6)
        server = self.serve(channel.subscribe)
        total, sequences = 4 * 1500, []
        beginning = channel.publish("first")[:-1] + "0"

        def publish(name):
            for number in range(total // 4):
                channel.publish(f"{name} {number}")
                if number % 50 == 0:
                    time.sleep(0.002)

        def follow(seed):
            dice = random.Random(seed)
            got, last_id = [], beginning
            while len(got) < total + 1:
                peer = Peer(server, Last_Event_ID=last_id).read_head()
                for _ in range(min(dice.randrange(1, 1000), total + 1 - len(got))):
                    got.append(peer.event())
                last_id = got[-1][2]
                dice.choice([Peer.close, Peer.reset])(peer)
            sequences.append(got)

        join(
            start_threads(
                *[lambda seed=n: follow(seed) for n in range(8)],
                *[lambda name=n: publish(name) for n in range(4)],
            )
        )
        self.assertEqual(len(sequences), 8)
        for got in sequences:
            numbers = [number_of(id_) for _, _, id_ in got]
            self.assertEqual(numbers, list(range(1, total + 2)))
            self.assertEqual(got, sequences[0])


class ASecondStream(ServerCase):
    """serve_stream may be called once for a request."""

    def test_is_an_error_that_adds_nothing_to_the_first(self):
        class Twice(QuietHandler):
            def do_POST(self):
                self.serve_stream(lambda client: (client.send("a"), client.close()))
                self.serve_stream()

        server = self.serve(handler=Twice)
        with self.logged() as records:
            peer = self.connect(server, method="POST")
            self.assertEqual(peer.data(), "a")
            self.assertEqual(peer.finish().events, [])
            wait_until(lambda: records)
        self.assertEqual([r.exc_info[0] for r in records], [RuntimeError])


class AHeadThatGivesWay(ServerCase):
    """The newcomer's gain is not a refusal that an EventSource would keep to."""

    def test_is_closed_without_an_answer(self):
        server = self.serve(max_connections=1)
        half = Peer(server, head=b"GET /sse HTTP/1.1\r\nHost: loc")
        self.addCleanup(half.close)
        peer = self.connect(server)
        self.assertEqual(peer.status, 200)
        self.assertEqual(half.read_body(), b"")


class ASubscriberOfTwoChannels(ChannelCase):
    """One of them has a history, the other has none."""

    def test_is_not_replayed_again_what_it_has_had(self):
        news, ticks = self.channel(), self.channel(history=0)
        first = news.publish("1")
        news.publish("2")

        def on_connection(client):
            news.subscribe(client)
            ticks.subscribe(client)
            news.unsubscribe(client)
            news.subscribe(client)
            client.send("end")

        peer = self.connect(self.serve(on_connection), Last_Event_ID=first)
        self.assertEqual([peer.data(), peer.data()], ["2", "end"])


class ANewSubscriber(ChannelCase):
    """It has the newest id from the beginning."""

    def test_is_told_that_id_if_the_history_overtakes_it(self):
        channel = self.channel(history=3)
        newest = channel.publish("before")
        (peer,) = self.subscribers(channel, 1)
        (client,) = channel.clients
        client.send("x" * 30_000_000)  # This fills the buffers on the way to the peer.
        for number in range(100):
            channel.publish(big(number))
        self.assertEqual(len(peer.data()), 30_000_000)
        self.assertEqual(peer.event()[:2], ("gap", newest))

    def test_finds_a_log_that_keeps_no_more_than_it_must(self):
        channel = self.channel(history=0)
        channel.min_log_size = 0
        for number in range(10):
            channel.publish(str(number))
        (peer,) = self.subscribers(channel, 1)
        channel.publish("live")
        self.assertEqual(peer.data(), "live")


class AnySelector(StreamCase):
    """By what the system lets the server watch its sockets does not matter."""

    SELECTORS = [
        getattr(selectors, name)
        for name in (
            "SelectSelector",
            "PollSelector",
            "EpollSelector",
            "KqueueSelector",
        )
        if hasattr(selectors, name)
    ]

    def each(self):
        """Have servers use one selector after the other."""
        for selector in self.SELECTORS:
            with self.subTest(selector.__name__), self.forced(selector):
                yield

    def forced(self, selector):
        return mock.patch.object(selectors, "DefaultSelector", selector)

    def check_everything(self, server):
        """Check all that a selector is needed for."""
        peers = [self.connect(server) for _ in range(3)]
        clients = [self.client_of(server, peer) for peer in peers]
        for _ in range(2):
            for number in range(30):
                clients[0].send(big(number))
            self.assert_gets(peers[0], range(30))
        peers[1].close()
        wait_until(lambda: clients[1].closed)
        for client in (clients[0], clients[2]):
            client.close()
        peers[0].finish()
        peers[2].finish()

    def test_carries_out_backlogs_and_notices_leaving_and_closing(self):
        for _ in self.each():
            self.check_everything(self.serve(max_backlog=2**30))

    def test_bears_sending_closing_and_leaving_at_once(self):
        for _ in self.each():
            server = self.serve(max_backlog=2**30)
            with self.logged() as records:
                for turn in range(20):
                    self.fight(server, turn)
            self.assertEqual(records, [])

    def fight(self, server, turn):
        """Send, close and leave in threads that start at the same moment."""
        peer = Peer(server).read_head()
        client = self.client_of(server, peer)
        leave = Peer.close if turn % 3 else Peer.reset
        start, wrong = threading.Barrier(4), []

        def send():
            for number in range(10):
                client.send(big(number))

        def at_once(action):
            start.wait()
            try:
                action()
            except BrokenPipeError:
                pass
            except Exception as error:  # noqa: BLE001
                wrong.append(error)

        actions = [send, send, client.close if turn % 2 else send, lambda: leave(peer)]
        join(start_threads(*[lambda action=a: at_once(action) for a in actions]))
        self.assertEqual(wrong, [])
        wait_until(lambda: not server.clients)

    def test_lives_on_when_a_socket_is_closed_under_it(self):
        failures = []

        class LikeWindows(selectors.SelectSelector):
            def select(self, timeout=None):
                """Fail if a socket is closed that it waits for, even if forgotten."""
                waited_for = tuple(self.get_map())
                end = time.monotonic() + (PATIENCE if timeout is None else timeout)
                while True:
                    ready = super().select(0.001)
                    for number in waited_for:
                        try:
                            os.fstat(number)
                        except OSError:
                            failures.append(number)
                            raise
                    if ready or time.monotonic() > end:
                        return ready

        with self.forced(LikeWindows), self.logged():
            server = self.serve(max_backlog=200_000)
            for _ in range(20):
                slow = self.connect(server)
                client = self.client_of(server, slow)
                with self.assertRaises(BrokenPipeError):
                    for number in range(100):
                        client.send(big(number))
                self.assert_cut_off(slow)
                if failures:  # It depends on the moment.
                    break
            server.max_backlog = 2**30
            self.check_everything(server)

    def test_lives_on_when_select_fails_now_and_then(self):
        class Failing(selectors.SelectSelector):
            calls = 0

            def select(self, timeout=None):
                if timeout == 0:  # This is not the I/O thread.
                    return super().select(timeout)
                self.calls += 1
                if self.calls % 3 == 0:
                    raise OSError(10038, "as Windows calls what is no socket")
                if self.calls == 4:
                    raise MemoryError
                return super().select(timeout)

        with self.forced(Failing), self.logged():
            self.check_everything(self.serve(max_backlog=2**30))

    def check_refusal(self, server):
        """Check that a newcomer is told to come back later."""
        late = self.connect(server)
        self.assertEqual(late.finish().events, [])
        self.assertEqual(late.reader.retry, 5000)

    def test_refuses_only_newcomers_when_it_takes_no_more_sockets(self):
        class Small(selectors.DefaultSelector):
            def register(self, *arguments):
                if len(self.get_map()) > 4:
                    raise OSError(errno.ENOSPC, "as epoll calls too many")
                return super().register(*arguments)

        with self.forced(Small), self.logged():
            server = self.serve(max_backlog=2**30)
            peers = []
            while len(peers) == len(server.clients):
                peers.append(self.connect(server))
            self.check_refusal(server)
            for peer in peers[:-1]:
                peer.close()
            wait_until(lambda: not server.clients)
            self.check_everything(server)

    @unittest.skipUnless(ON_LINUX, "needs a limit of descriptors")
    def test_refuses_only_newcomers_whose_numbers_are_too_high_for_select(self):
        with self.forced(selectors.SelectSelector), self.logged():
            server = self.serve(max_backlog=2**30)
            peer = self.connect(server)
            client = self.client_of(server, peer)
            with self.descriptors_below(1024 + 10):
                for _ in range(3):
                    self.check_refusal(server)
                for number in range(30):
                    client.send(big(number))
                self.assert_gets(peer, range(30))
                peer.close()
                wait_until(lambda: client.closed)
            self.check_everything(server)

    @contextlib.contextmanager
    def descriptors_below(self, limit):
        """Take all descriptors below `limit`; select() knows those below 1,024."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < limit + 100:
            self.skipTest("may not have so many descriptors")
        raised = limit + 100 if soft < limit + 100 else soft
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        taken = [os.open(os.devnull, os.O_RDONLY)]
        try:
            while taken[-1] < limit:
                taken.append(os.dup(taken[0]))
            yield
        finally:
            for each in taken:
                os.close(each)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    @unittest.skipUnless(Path("/proc/self/fd").exists(), "needs /proc")
    def test_needs_one_descriptor_for_each_stream(self):
        for _ in self.each():
            server = self.serve()
            self.client_of(server, self.connect(server))
            before = descriptors()
            for _ in range(20):
                self.connect(server)
            wait_until(lambda s=server: len(s.clients) == 21)
            # A peer has one, and so has the stream that it reads.
            wait_until(lambda n=before: descriptors() == n + 40, "40 descriptors")


class TheThreads(StreamCase):
    """One for each request, one for I/O, one for each channel with subscribers."""

    def test_are_one_for_each_request_and_one_for_io(self):
        before = threading.active_count()
        server = self.serve(lambda client: client.send("x"))  # in a thread of ours
        for _ in range(5):
            self.connect(server).event()
        wait_until(lambda: threading.active_count() == before + 1 + 5 + 1)

    def test_are_one_more_for_a_channel_while_it_has_subscribers(self):
        channel = Channel()
        self.addCleanup(channel.close)
        channel.publish("nobody hears it")
        before = threading.active_count()
        server = self.serve(channel.subscribe)
        for text in ("to some", "to others"):
            peers = [self.connect(server) for _ in range(3)]
            wait_until(lambda: len(channel.clients) == 3)
            channel.publish(text)
            for peer in peers:
                self.assertEqual(peer.data(), text)
            wait_until(lambda: threading.active_count() == before + 1 + 3 + 1 + 1)
            for peer in peers:
                peer.close()
            wait_until(lambda: threading.active_count() == before + 1 + 1)

    def test_end_a_stream_in_which_a_send_has_failed_half_way(self):
        class Unlucky(socket.socket):
            def send(self, data, *flags):
                if b"large" in bytes(data):
                    super().send(bytes(data)[:5])
                    raise MemoryError
                return super().send(data, *flags)

        before, server = threading.active_count(), self.serve()
        replace_sockets(server, Unlucky)
        peer = self.connect(server)
        client = self.client_of(server, peer)
        with self.logged():
            with self.assertRaises(MemoryError):
                client.send("large")
            with self.assertRaises(BrokenPipeError):
                client.send("not into the middle of that")
            wait_until(lambda: threading.active_count() == before + 1 + 1)

    def test_reset_a_stream_in_which_a_replay_has_failed_half_way(self):
        class Unlucky(socket.socket):
            def send(self, data, *flags):
                if b"large" in bytes(data) and not failed:
                    failed.append(super().send(bytes(data)[:-5]))
                    raise MemoryError
                return super().send(data, *flags)

        failed, channel = [], Channel()
        channel.publish("large")
        server = self.serve(lambda client: channel.subscribe(client, last=1))
        replace_sockets(server, Unlucky)
        with self.logged():
            peer = Peer(server)
            self.addCleanup(peer.close)
            with self.assertRaises(ConnectionResetError):
                peer.read_body()
            wait_until(lambda: not server.clients)
        self.assertTrue(failed)

    def test_deliver_an_event_after_a_memory_error_in_the_fan_out(self):
        failed, piece = [], sse_ref._Piece

        def make_piece(*arguments):
            if not failed:
                failed.append(True)
                raise MemoryError
            return piece(*arguments)

        channel = Channel()
        self.addCleanup(channel.close)
        peer = self.connect(self.serve(channel.subscribe))
        with self.logged(), mock.patch.object(sse_ref, "_Piece", make_piece):
            channel.publish("at the second try")
            self.assertEqual(peer.data(), "at the second try")
        self.assertTrue(failed)

    def unlucky(self, server, word, error=MemoryError):
        """Make each socket of `server` fail at the first write that holds `word`."""

        class Unlucky(socket.socket):
            def send(self, data, *flags):
                if word in bytes(data) and word not in failed:
                    failed.append(word)
                    raise error
                return super().send(data, *flags)

        failed = []
        replace_sockets(server, Unlucky)

    def fail_to_log(self):
        """Make whatever the module logs raise an exception."""

        class Failing(logging.Handler):
            def emit(self, record):
                raise MemoryError

        handler = Failing()
        sse_ref.logger.addHandler(handler)
        self.addCleanup(sse_ref.logger.removeHandler, handler)

    def test_survive_a_log_that_fails_in_the_fan_out(self):
        channel = Channel()
        self.addCleanup(channel.close)
        server = self.serve(channel.subscribe)
        self.unlucky(server, b"published")
        peers = [self.connect(server) for _ in range(3)]
        wait_until(lambda: len(channel.clients) == 3)
        self.fail_to_log()
        channel.publish("published")
        wait_until(lambda: len(channel.clients) == 2)
        channel.publish("afterwards")
        got = []
        for peer in peers:
            with contextlib.suppress(OSError, EOFError):
                got.append([peer.data(), peer.data()])
        self.assertEqual(got, [["published", "afterwards"]] * 2)

    def test_survive_a_log_that_fails_in_the_io_thread(self):
        class Unlucky(socket.socket):
            def recv(self, *arguments):
                if super().recv(*arguments) == b"x":
                    raise MemoryError
                return b""

        server = self.serve()
        replace_sockets(server, Unlucky)
        victim, other = self.connect(server), self.connect(server)
        clients = [self.client_of(server, peer) for peer in (victim, other)]
        self.fail_to_log()
        victim.socket.sendall(b"x")
        wait_until(lambda: clients[0].closed)
        other.close()
        wait_until(lambda: clients[1].closed)

    def test_end_all_other_streams_if_one_fails(self):
        for how in ("channel", "server"):
            channel = Channel()
            self.addCleanup(channel.close)
            server = self.serve(channel.subscribe)
            self.unlucky(server, b"0\r\n\r\n")
            peers = [self.connect(server) for _ in range(10)]
            wait_until(lambda c=channel: len(c.clients) == 10)
            with self.subTest(how), self.logged():
                if how == "channel":
                    channel.close(end_streams=True)
                else:
                    server.shutdown()
                    server.server_close()
                ends = []
                for peer in peers:
                    with contextlib.suppress(OSError, EOFError):
                        ends.append(peer.finish())
                self.assertEqual(len(ends), 9)

    def test_are_there_before_descriptors_become_scarce(self):
        before = threading.active_count()
        self.serve()
        wait_until(lambda: threading.active_count() == before + 1 + 1)

    def test_deliver_an_event_whose_wake_up_was_interrupted(self):
        channel = Channel()
        self.addCleanup(channel.close)
        peer = self.connect(self.serve(channel.subscribe))
        wait_until(lambda: channel.clients)
        interrupted = mock.patch.object(
            sse_ref._Wakeup, "set", side_effect=KeyboardInterrupt
        )
        with interrupted, self.assertRaises(KeyboardInterrupt):
            channel.publish("all the same")
        self.assertEqual(peer.data(), "all the same")

    def test_forget_a_client_that_has_left(self):
        server = self.serve()
        peer = self.connect(server)
        forgotten = weakref.ref(self.client_of(server, peer))
        peer.close()

        def is_freed():
            gc.collect()
            return forgotten() is None

        wait_until(is_freed)

    def test_survive_a_memory_error_on_one_socket(self):
        class Unlucky(socket.socket):
            def recv(self, *arguments):
                if self.getpeername() in victims:
                    raise MemoryError
                return super().recv(*arguments)

            def recv_into(self, *arguments):
                if self.getpeername() in victims:
                    raise MemoryError
                return super().recv_into(*arguments)

        victims, server = [], self.serve()
        replace_sockets(server, Unlucky)
        victim, other = self.connect(server), self.connect(server)
        clients = [self.client_of(server, peer) for peer in (victim, other)]
        with self.logged():
            victims.append(victim.socket.getsockname())
            victim.socket.sendall(b"x")
            wait_until(lambda: clients[0].closed)
            clients[1].send("unharmed")
            self.assertEqual(other.data(), "unharmed")
            other.close()
            wait_until(lambda: clients[1].closed)
        with contextlib.suppress(ConnectionResetError):
            victim.read_body()  # ends

    def test_sleep_while_there_is_nothing_to_do(self):
        client, peer, _ = self.open_busy()  # one that has left without being let go
        peer.close()
        wait_until(lambda: client.closed)
        stuck, _ = self.open(max_backlog=2**30)
        stuck.send("x" * 8_000_000)
        channel = Channel()
        self.addCleanup(channel.close)
        self.connect(self.serve(channel.subscribe))
        wait_until(lambda: channel.clients)
        channel.publish("x" * 8_000_000)
        gc.collect()
        before = time.process_time()
        time.sleep(0.3)
        self.assertLess(time.process_time() - before, 0.1)


class TheServer(StreamCase):
    """SSEServer: its own life."""

    def test_calls_on_connection_in_a_thread_for_each_request(self):
        threads = queue.Queue()
        server = self.serve(lambda _: threads.put(threading.get_ident()))
        for _ in range(3):
            self.connect(server)
        idents = {threads.get(timeout=PATIENCE) for _ in range(3)}
        self.assertEqual(len(idents - {threading.get_ident()}), 3)

    def test_holds_a_stream_open_when_on_connection_returns(self):
        client, peer = self.open()
        self.assertFalse(client.closed)
        client.send("later")
        self.assertEqual(peer.data(), "later")

    def test_holds_streams_open_without_on_connection(self):
        server = self.serve()
        client = self.client_of(server, self.connect(server))
        self.assertFalse(client.closed)

    def test_logs_an_exception_of_on_connection_and_ends_that_stream_alone(self):
        def on_connection(client):
            client.send("a")
            if client.query:
                raise ZeroDivisionError

        server = self.serve(on_connection)
        other = self.connect(server)
        self.assertEqual(other.data(), "a")
        with self.logged() as records:
            self.assertEqual(len(self.connect(server, "/sse?x=1").finish().events), 1)
            wait_until(lambda: records)
        self.assertEqual([r.exc_info[0] for r in records], [ZeroDivisionError])
        self.client_of(server, other).send("b")
        self.assertEqual(other.data(), "b")

    def test_tells_which_clients_are_connected(self):
        server = self.serve()
        self.assertEqual(server.clients, frozenset())
        peers = [self.connect(server) for _ in range(3)]
        wait_until(lambda: len(server.clients) == 3)
        peers[0].close()
        wait_until(lambda: len(server.clients) == 2)
        self.assertIsInstance(server.clients, frozenset)
        client = next(iter(server.clients))
        client.send("x" * 8_000_000)  # which still has to get out
        client.close()
        self.assertEqual(len(server.clients), 1)

    def test_ends_every_stream_in_good_order(self):
        server = self.serve(lambda client: client.send("a\nb"))
        peers = [self.connect(server) for _ in range(20)]
        wait_until(lambda: len(server.clients) == 20)
        server.shutdown()
        server.server_close()
        for peer in peers:
            self.assertEqual(peer.finish().events, [("message", "a\nb", "")])
        self.assertEqual(server.clients, frozenset())
        server.server_close()  # again does no harm

    def test_gives_a_slow_reader_time_to_take_the_rest(self):
        server = self.serve(max_backlog=2**30)
        peer = self.connect(server)
        client = self.client_of(server, peer)
        for number in range(40):
            client.send(big(number))
        server.shutdown()
        threads = start_threads(server.server_close)
        self.assert_gets(peer, range(40))
        peer.finish()
        join(threads)

    def test_does_not_wait_for_a_reader_that_is_stuck(self):
        server = self.serve(max_backlog=2**30)
        server.closing_grace = 0.2
        client = self.client_of(server, self.connect(server))
        client.send("x" * 8_000_000)
        begun = time.monotonic()
        server.shutdown()
        with self.logged():
            server.server_close()
        self.assertLess(time.monotonic() - begun, 2)
        self.assertTrue(client.closed)

    def test_waits_for_on_connection_but_not_for_ever(self):
        free = threading.Event()

        def on_connection(client):
            client.comment("busy")
            free.wait()

        server = self.serve(on_connection)
        self.addCleanup(free.set)
        server.closing_grace, server.closing_timeout = 0.1, 0.3
        peer = self.connect(server)
        begun = time.monotonic()
        server.shutdown()
        server.server_close()
        self.assertTrue(0.3 <= time.monotonic() - begun < 2)
        peer.finish()

    def test_does_not_wait_for_a_request_that_never_came(self):
        server = self.serve()
        threads = threading.active_count()
        with socket.create_connection(server.server_address[:2]):
            wait_until(lambda: threading.active_count() > threads)
            begun = time.monotonic()
            server.shutdown()
            server.server_close()
            self.assertLess(time.monotonic() - begun, 1)

    def test_can_be_closed_by_on_connection(self):
        done = threading.Event()

        def on_connection(client):
            client.send("bye")
            server.shutdown()
            server.server_close()
            done.set()

        server = self.serve(on_connection)
        self.assertEqual(self.connect(server).finish().events, [("message", "bye", "")])
        self.assertTrue(done.wait(PATIENCE))

    def test_ends_a_stream_in_good_order_that_begins_while_it_closes(self):
        asked, go = threading.Event(), threading.Event()

        def authorize(handler):
            if "late" in handler.path:
                asked.set()
                go.wait(PATIENCE)
            return True

        server = self.serve(authorize=authorize)
        early = self.connect(server)
        late = Peer(server, "/sse?late=1")
        self.addCleanup(late.close)
        self.assertTrue(asked.wait(PATIENCE))
        server.shutdown()
        threads = start_threads(server.server_close)
        early.finish()
        go.set()
        self.assertEqual(late.read_head().status, 200)
        late.finish()
        join(threads)

    def test_can_be_closed_without_having_served(self):
        with SSEServer(("127.0.0.1", 0)) as server:
            self.assertGreater(server.server_port, 0)

    def test_can_be_closed_while_the_thread_of_a_request_starts(self):
        starting = threading.Event()
        start = threading.Thread.start

        def start_late(thread):
            if threading.current_thread() is serving:
                starting.set()
                time.sleep(0.1)
            start(thread)

        with SSEServer(("127.0.0.1", 0), RequestHandlerClass=QuietHandler) as server:
            with mock.patch.object(threading.Thread, "start", start_late):
                serving = threading.Thread(target=server.handle_request)
                serving.start()
                peer = Peer(server)
                self.addCleanup(peer.close)
                self.assertTrue(starting.wait(PATIENCE))
                server.server_close()
                serving.join()
            peer.read_body()  # ends

    def test_serves_streams_under_handle_request_too(self):
        with SSEServer(("127.0.0.1", 0), RequestHandlerClass=QuietHandler) as server:
            threads = start_threads(server.handle_request)
            peer = self.connect(server)
            join(threads)
            client = self.client_of(server, peer)
            client.send("x" * 8_000_000)
            self.assertEqual(len(peer.data()), 8_000_000)
            threads = start_threads(server.handle_request)
            other = self.connect(server)
            join(threads)
            other.close()
            wait_until(lambda: server.clients == {client})
        peer.finish()

    def test_limits_the_time_for_a_head_under_handle_request_too(self):
        patch = mock.patch.object(SSEServer, "head_timeout", 0.3)
        with patch, SSEServer(("127.0.0.1", 0)) as server:
            threads = start_threads(server.handle_request)
            with socket.create_connection(server.server_address) as peer:
                join(threads)
                peer.sendall(b"GET /sse HTTP/1.1\r\nHost:")
                peer.settimeout(3)
                while peer.recv(1000):
                    pass

    def test_refuses_options_that_make_no_sense(self):
        for error, options in (
            (ValueError, {"keepalive": 0}),
            (ValueError, {"keepalive": -1}),
            (ValueError, {"keepalive": float("nan")}),
            (ValueError, {"max_connections": -1}),
            (ValueError, {"max_backlog": -1}),
            (ValueError, {"retry": -1}),
            (TypeError, {"retry": 1.5}),
        ):
            with self.subTest(options), self.assertRaises(error):
                SSEServer(("127.0.0.1", 0), **options)

    def test_refuses_a_handler_class_in_the_place_of_on_connection(self):
        for handler in (SSERequestHandler, BaseHTTPRequestHandler):
            with self.assertRaisesRegex(TypeError, "RequestHandlerClass"):
                SSEServer(("127.0.0.1", 0), handler)

    def test_refuses_a_handler_class_that_knows_no_streams(self):
        options = {"RequestHandlerClass": BaseHTTPRequestHandler}
        with self.assertRaises(TypeError):
            SSEServer(("127.0.0.1", 0), **options).server_close()

    def test_leaves_nothing_open_when_its_address_is_taken(self):
        server = self.serve()
        with self.assertRaises(OSError):
            SSEServer(server.server_address[:2])

    def test_looks_up_no_name_at_its_start(self):
        with mock.patch("socket.getfqdn", side_effect=AssertionError):
            self.assertEqual(self.serve().server_name, "127.0.0.1")

    @unittest.skipUnless(ON_LINUX, "needs to know the longest backlog")
    def test_lets_as_many_clients_wait_in_line_as_the_system_allows(self):
        longest = int(Path("/proc/sys/net/core/somaxconn").read_text())
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if min(longest, hard) < 1200:
            self.skipTest("the system does not allow many")
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(SSEServer(("127.0.0.1", 0)))
            for _ in range(1100):  # and it accepts none of them yet
                peer = socket.create_connection(server.server_address, 0.9)
                stack.enter_context(peer)

    @unittest.skipUnless(socket.has_ipv6, "needs IPv6")
    def test_serves_by_ipv6(self):
        try:
            server = self.serve(lambda c: c.send(c.address[0]), address=("::1", 0))
        except OSError as error:
            self.skipTest(str(error))
        self.assertEqual(self.connect(server).data(), "::1")

    def test_serves_on_every_address_where_none_is_named(self):
        server = self.serve(lambda client: client.send("x"), address=("", 0))
        self.assertEqual(server.server_name, "0.0.0.0")  # noqa: S104
        server.server_address = ("127.0.0.1", server.server_port)
        self.assertEqual(self.connect(server).data(), "x")

    def options_of_a_stream_and_a_page(self, *names):
        """Return these options of TCP, of a stream's socket and of another's."""
        found = {}

        class Handler(QuietHandler):
            def serve_plain(self):
                self.note()
                super().serve_plain()

            def note(self):
                get = self.connection.getsockopt
                options = [get(socket.IPPROTO_TCP, getattr(socket, n)) for n in names]
                options.append(get(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
                found[self.path] = options

            def setup(self):
                super().setup()
                handlers.append(self)

        handlers = []
        server = self.serve(handler=Handler)
        self.connect(server, "/page").read_body()
        peer = self.connect(server)
        self.client_of(server, peer)
        handlers[-1].note()
        return found["/sse"], found["/page"]

    def test_turns_off_nagles_algorithm(self):
        for options in self.options_of_a_stream_and_a_page("TCP_NODELAY"):
            self.assertTrue(options[0])

    @unittest.skipUnless(hasattr(socket, "TCP_KEEPIDLE"), "needs the options")
    def test_has_the_kernel_find_out_within_a_minute_that_a_peer_is_gone(self):
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        for options in self.options_of_a_stream_and_a_page(*names):
            idle, interval, count, is_on = options
            self.assertTrue(is_on)
            self.assertLess(idle + interval * count, 60)

    @unittest.skipUnless(hasattr(socket, "TCP_USER_TIMEOUT"), "needs the option")
    def test_limits_the_time_without_an_acknowledgement_for_streams_alone(self):
        stream, page = self.options_of_a_stream_and_a_page("TCP_USER_TIMEOUT")
        self.assertEqual(stream[0], 30_000)
        self.assertEqual(page[0], 0)


class ProgramCase(unittest.TestCase):
    """Starts programs that serve, as processes of their own."""

    def launch(self, command, **options):
        """Start a process; our ends of its standard streams have no buffers."""
        options.setdefault("stdin", subprocess.DEVNULL)
        environment = {**os.environ}
        environment.pop("PYTHONUNBUFFERED", None)  # It is to flush what it prints.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,
            **options,
        )
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has forked
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()

    def run_program(self, program):
        """Start a program that prints the port on which it serves at 127.0.0.1."""
        command = [sys.executable, "-c", program]
        process = self.launch(command, cwd=str(MODULE.parent))
        process.server_address = ("127.0.0.1", int(process.stdout.readline()))
        return process

    def start(self, *arguments, **options):
        """Start sse_ref.py with these arguments, and read its greeting."""
        command = [sys.executable, str(MODULE), "--port", "0", *arguments]
        process = self.launch(command, **options)
        process.greeting = process.stdout.readline().decode()
        process.tries = [process.stdout.readline().decode() for _ in range(2)]
        wanted = r"Starting server\.\.\. http://(.*):(\d+)\n"
        found = re.fullmatch(wanted, process.greeting)
        self.assertIsNotNone(found, process.greeting)
        process.server_address = found[1].strip("[]"), int(found[2])
        return process

    def connect(self, process, path="/sse", **options):
        peer = Peer(process, path, **options)
        self.addCleanup(peer.close)
        return peer.read_head()

    def status(self, process, path="/", **options):
        """Return the status of an answer, after all of it has come."""
        with contextlib.closing(Peer(process, path, **options)) as peer:
            peer.read_head().read_body()
            return peer.status

    def stop(self, process, number=signal.SIGTERM):
        """Stop the process by a signal; it must obey in two seconds, without errors."""
        begun = time.monotonic()
        process.send_signal(number)
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertLess(time.monotonic() - begun, 2)
        self.assertNotIn(b"Traceback", process.stderr.read())


RUNNING = """
from sse_ref import SSEServer
server = SSEServer(("127.0.0.1", 0), lambda client: client.send("hello"))
print(server.server_port, flush=True)
server.run()
print("goodbye", flush=True)
"""


FORKING = """
import os, signal, sys
from sse_ref import SSEServer

def on_connection(client):
    client.on_close(lambda _: os.write(1, b"left %d\\n" % os.getpid()))
    client.send(str(os.getpid()))

server = SSEServer(("127.0.0.1", 0), on_connection)
print(server.server_port, flush=True)
workers = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            with server:
                server.serve_forever()
        except SystemExit:
            os._exit(0)  # CPython 3.8 in development mode crashes in a regular exit.
    workers.append(pid)
print(*workers, flush=True)
print("ended", *[os.waitpid(worker, 0)[1] for worker in workers], flush=True)
"""


PUBLISHING_WORKERS = """
import os
from sse_ref import Channel

channel = Channel()
for _ in range(2):
    if os.fork() == 0:
        os.write(1, channel.publish("an event of this worker").encode() + b"\\n")
        os._exit(0)
    os.wait()
"""


INTERRUPTED = """
import contextlib, random, signal, threading
from sse_ref import Channel, SSEServer

def interrupt(*_):
    raise KeyboardInterrupt

channel = Channel(history=10**6)
server = SSEServer(("127.0.0.1", 0), channel.subscribe)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port, flush=True)
while not channel.clients:
    pass
signal.signal(signal.SIGALRM, interrupt)
dice = random.Random(7)
number, published = 0, {0}
for _ in range(300):
    with contextlib.suppress(KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, dice.uniform(5e-5, 5e-4))
        for _ in range(5000):
            number += 1
            channel.publish(str(number))
            published.add(number)
epoch = channel.publish("last").rpartition("-")[0]
print(epoch, *{*range(number)} - published, flush=True)
threading.Event().wait()
"""


class AProgram(ProgramCase):
    """What programs do that use the module: run(), and forked workers."""

    def test_runs_until_a_signal_and_ends_its_streams_in_good_order(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            process = self.run_program(RUNNING)
            peer = self.connect(process)
            self.assertEqual(peer.data(), "hello")
            self.stop(process, number)
            peer.finish()
            self.assertEqual(process.stdout.read(), b"goodbye\n")

    @unittest.skipUnless(hasattr(signal, "setitimer"), "needs setitimer")
    def test_may_be_interrupted_in_the_middle_of_publish(self):
        process = self.run_program(INTERRUPTED)
        events = self.events_up_to_the_last(self.connect(process))
        ids = [number_of(id_) for _, _, id_ in events]
        self.assertEqual(ids, list(range(1, len(ids) + 1)))
        numbers = [int(data) for _, data, _ in events[:-1]]
        self.assertEqual(numbers, sorted(set(numbers)))
        epoch, *interrupted = process.stdout.readline().split()
        missing = set(range(1, numbers[-1])) - set(numbers)
        self.assertLessEqual(missing, set(map(int, interrupted)))
        late = self.connect(process, Last_Event_ID=f"{epoch.decode()}-0")
        self.assertEqual(self.events_up_to_the_last(late), events)

    def events_up_to_the_last(self, peer):
        events = [peer.event()]
        while events[-1][1] != "last":
            events.append(peer.event())
        return events

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_may_fork_its_workers_after_binding(self):
        program = self.run_program(FORKING)
        streams = {int(pid): [] for pid in program.stdout.readline().split()}
        while min(map(len, streams.values())) < 2:
            peer = self.connect(program)
            streams[int(peer.data())].append(peer)
        for worker, peers in streams.items():
            peers.pop().close()
            self.assertEqual(program.stdout.readline(), b"left %d\n" % worker)
        for worker, peers in streams.items():
            os.kill(worker, signal.SIGTERM)
            for peer in peers:
                peer.finish()
                self.assertEqual(program.stdout.readline(), b"left %d\n" % worker)
        self.assertEqual(program.stdout.readline(), b"ended 0 0 0 0\n")

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_has_workers_whose_events_have_ids_of_their_own(self):
        program = self.launch([sys.executable, "-c", PUBLISHING_WORKERS])
        ids = program.stdout.read().split()
        self.assertEqual(program.wait(PATIENCE), 0)
        self.assertEqual([number_of(id_.decode()) for id_ in ids], [1, 1])
        self.assertEqual(len(set(ids)), 2)


class TheCommandLine(ProgramCase):
    """python sse_ref.py"""

    def test_says_where_it_serves_and_what_to_try(self):
        process = self.start()
        host, port = process.server_address
        self.assertEqual(host, "127.0.0.1")
        url = f"http://127.0.0.1:{port}"
        tries = [line.split() for line in process.tries]
        self.assertEqual(tries, [["curl", url], ["curl", "-N", f"{url}/sse"]])

    @unittest.skipUnless(socket.has_ipv6, "needs IPv6")
    def test_says_where_it_serves_by_ipv6(self):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            self.skipTest(str(error))
        process = self.start("--host", "::1")
        self.assertIn(" http://[::1]:", process.greeting)
        self.assertEqual(self.connect(process).data(), "hi there!")

    def test_serves_okay_and_hi_there(self):
        process = self.start()
        self.assertEqual(self.connect(process, "/").read_body(), b"okay")
        self.assertEqual(self.connect(process).data(), "hi there!")

    def test_sends_nothing_but_hi_there_and_that_with_the_head(self):
        process = self.start()
        peer = Peer(process)
        self.addCleanup(peer.close)
        _, _, body = peer.socket.recv(65536).partition(b"\r\n\r\n")
        self.assertEqual(body, b"11\r\ndata: hi there!\n\n\r\n")

    def test_explains_its_options(self):
        process = self.launch([sys.executable, str(MODULE), "--help"])
        text = process.stdout.read().decode()
        self.assertEqual(process.wait(PATIENCE), 0)
        for option in (
            "--host",
            "--port",
            "--path",
            "--keepalive",
            "--retry",
            "--max-connections",
            "--allow-origin",
            "--allow-host",
        ):
            self.assertIn(option, text)

    def test_has_options_for_path_retry_and_keepalive(self):
        process = self.start("--path", "/a*", "--retry", "70", "--keepalive", "0.05")
        peer = self.connect(process, "/abc")
        self.assertEqual(peer.data(), "hi there!")
        while not comments(peer):
            peer.chunk()
        self.assertEqual(peer.reader.retry, 70)
        self.assertIn("'", process.tries[1])  # so that no shell expands the star

    def test_has_options_for_who_gets_in(self):
        options = ["--allow-host", "a.example", "--allow-host", "b.example"]
        options += ["--allow-origin", "http://c.example", "--max-connections", "2"]
        process = self.start(*options)
        for host, status in (("b.example", 200), ("c.example", 403)):
            peer = Peer(process, Host=host, Origin="http://c.example").read_head()
            self.assertEqual(peer.status, status)
            peer.close()
        # Their places are free a moment after their answers have come.
        for _ in range(2):
            wait_until(lambda: self.is_greeted(process))
        self.assertEqual(self.status(process), 503)

    def is_greeted(self, process):
        """Open a stream, and tell whether the server was not full."""
        with contextlib.suppress(EOFError):
            return self.connect(process).data() == "hi there!"

    def test_ends_in_good_order_by_a_signal(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            process = self.start()
            peers = [self.connect(process) for _ in range(50)]
            with socket.create_connection(process.server_address):
                self.stop(process, number)
            for peer in peers:
                events = peer.finish().events
                self.assertEqual(events, [("message", "hi there!", "")])

    def test_ends_in_good_order_by_many_signals(self):
        process = self.start()
        peer = self.connect(process)
        peer.event()
        while process.poll() is None:  # down to the last moment of the interpreter
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
        self.assertEqual(process.returncode, 0)
        self.assertNotIn(b"KeyboardInterrupt", process.stderr.read())
        peer.finish()

    def test_says_nothing_if_both_signals_come_at_once(self):
        for _ in range(3):
            process = self.start()
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(PATIENCE), 0)
            self.assertEqual(process.stderr.read(), b"")

    def test_can_be_stopped_as_soon_as_it_has_said_where_it_serves(self):
        for _ in range(2):
            self.stop(self.start())

    def run_in_vain(self, *arguments):
        """Run it with arguments that it cannot serve by."""
        return subprocess.run(
            [sys.executable, str(MODULE), *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def test_says_in_one_line_why_it_cannot_listen(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            for arguments in (
                ["--port", port],
                ["--host", "host.invalid"],
                ["--host", "a..b"],
            ):
                ended = self.run_in_vain(*arguments)
                self.assertNotEqual(ended.returncode, 0)
                self.assertRegex(ended.stderr, r"^[^\n]+\n$")
                self.assertNotIn("Traceback", ended.stderr)
                self.assertEqual(ended.stdout, "")

    def test_has_argparse_say_what_is_wrong_with_an_option(self):
        for arguments in (
            ["--no-such-option"],
            ["--port", "70000"],
            ["--path", "sse"],
            ["--keepalive", "-1"],
        ):
            ended = self.run_in_vain(*arguments)
            self.assertEqual(ended.returncode, 2)
            self.assertRegex(ended.stderr, r"^usage: (.|\n)*error: [^\n]+\n$")

    @unittest.skipUnless(os.name == "posix", "needs a shell")
    def test_works_with_its_standard_streams_closed(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = f'exec "$0" "$1" --port {port} - <&- >&- 2>&-'
        process = self.launch(["sh", "-c", command, sys.executable, str(MODULE)])
        process.server_address = ("127.0.0.1", port)

        def is_up():
            with contextlib.suppress(ConnectionError):
                return self.status(process) == 200

        wait_until(is_up)
        peer = self.connect(process)
        self.assertEqual(peer.status, 200)
        self.stop(process)
        peer.finish()

    @unittest.skipUnless(os.name == "posix", "needs to close a descriptor")
    def test_works_with_its_standard_input_closed(self):
        process = self.start("-", stdin=None, preexec_fn=lambda: os.close(0))
        self.assertEqual(self.connect(process).status, 200)
        self.stop(process)

    def test_never_reads_standard_input_unless_it_is_asked_to(self):
        ours, theirs = os.pipe()
        self.addCleanup(os.close, ours)
        self.addCleanup(os.close, theirs)
        os.write(theirs, b"for somebody else\n")
        process = self.start(stdin=ours)
        self.assertEqual(self.connect(process).data(), "hi there!")
        self.stop(process)
        self.assertEqual(os.read(ours, 100), b"for somebody else\n")

    def start_reading(self, count):
        """Start it with `-`, and as many readers; return the process and the peers."""
        process = self.start("-", stdin=subprocess.PIPE)
        return process, [self.connect(process) for _ in range(count)]

    def pour(self, process, lines):
        """Write to standard input in a thread, then close it; return the thread."""

        def write():
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                rest = memoryview(lines)
                while rest:
                    rest = rest[pipe.write(rest[: 2**16]) :]

        return start_threads(write)[0]

    def test_publishes_the_lines_of_standard_input(self):
        process, (peer,) = self.start_reading(1)
        process.stdin.write(b"one\n")
        self.assertEqual(peer.data(), "one")  # at once, and no "hi there!" before it
        process.stdin.write(b"\n two \r\n\xff\xc3\xa9\xe2\x80\xa8\nla")
        process.stdin.write(b"st")
        process.stdin.close()
        got = [peer.data() for _ in range(4)]
        self.assertEqual(got, ["", " two ", "\ufffdé\u2028", "last"])
        another = self.connect(process)  # the end of its input is no reason to stop
        self.assertEqual(another.status, 200)
        self.stop(process)
        self.assertEqual(another.finish().events, [])

    def test_publishes_every_line_in_order(self):
        process, peers = self.start_reading(3)
        lines = b"".join(b"%d\n" % number for number in range(10_000))
        thread = self.pour(process, lines)
        wanted = [str(number) for number in range(10_000)]
        for peer in peers:
            self.assertEqual([peer.data() for _ in range(10_000)], wanted)
        thread.join()
        self.stop(process)

    @unittest.skipUnless(ON_LINUX, "needs /proc")
    def test_publishes_a_file_of_any_size_in_bounded_memory(self):
        process, (peer,) = self.start_reading(1)
        before = self.peak_memory(process)
        thread = self.pour(process, (b"x" * 999 + b"\n") * 80_000 + b"last\n")
        tail = b""
        while b"data: last\n" not in tail:
            piece = peer.file.read1(2**18)
            self.assertTrue(piece, "the stream has ended")
            tail = tail[-20:] + piece
        thread.join()
        self.assertLess(self.peak_memory(process) - before, 70_000)

    def peak_memory(self, process):
        """Return the most memory that the process has had, in kB."""
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])

    def test_stops_in_time_while_it_waits_for_a_line(self):
        process, (peer,) = self.start_reading(1)
        self.stop(process)
        peer.finish()

    def test_stops_in_time_while_it_gets_many_lines_and_a_reader_is_stuck(self):
        process, (peer, _) = self.start_reading(2)
        thread = self.pour(process, b"x" * 99 + b"\n" * 5_000_000)
        for _ in range(1000):
            peer.data()
        self.stop(process)
        thread.join()

    @unittest.skipUnless(resource, "needs setrlimit")
    def test_raises_its_limit_of_descriptors(self):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        process = self.start(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
        )
        peers = [self.connect(process) for _ in range(60)]
        for peer in peers:
            self.assertEqual(peer.data(), "hi there!")

    @unittest.skipUnless(ON_LINUX, "needs setrlimit and /proc")
    def test_bears_running_out_of_descriptors(self):
        process = self.start(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
        )
        with contextlib.ExitStack() as stack:  # a burst, before there was any stream
            for _ in range(40):
                stack.enter_context(socket.create_connection(process.server_address))
        waiting = [Peer(process) for _ in range(40)]
        for peer in waiting:
            self.addCleanup(peer.close)
        self.assertEqual(waiting[0].read_head().data(), "hi there!")
        before = self.cpu(process)
        time.sleep(0.3)
        self.assertLess(self.cpu(process) - before, 0.1)  # it does not spin
        for peer in waiting[:25]:
            peer.close()
        self.assertEqual(waiting[-1].read_head().data(), "hi there!")
        self.stop(process)

    def cpu(self, process):
        """Return the seconds of processor time that the process has had."""
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class BenchHandler(QuietHandler):
    """Pages by which `bench` asks the server, which is a process of its own."""

    def serve_plain(self):
        page, query = self.path.partition("?")[::2]
        if page == "/publish":
            count, pause = query.split("&")
            threading.Thread(
                target=self.publish, args=(int(count), float(pause)), daemon=True
            ).start()
        statm = Path("/proc/self/statm")
        pages = int(statm.read_text().split()[1]) if statm.exists() else 0
        text = f"{time.process_time()} {pages * 4096}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def publish(self, count, pause):
        for _ in range(count):
            self.server.channel.publish(repr(time.monotonic()))
            time.sleep(pause)


def bench_server():
    """Serve `bench`, until standard input ends."""
    channel = Channel(history=0)
    server = SSEServer(
        ("127.0.0.1", 0),
        channel.subscribe,
        max_connections=100_000,
        RequestHandlerClass=BenchHandler,
    )
    server.channel = channel
    print(server.server_port, flush=True)
    server.serve_forever()


class Bench:
    """Streams that one loop reads; asks their server for its CPU time and memory."""

    def __init__(self, port, streams):
        self.port = port
        self.selector = selectors.DefaultSelector()
        self.rest = {}  # by stream: what has come of an event
        for _ in range(streams):
            stream = socket.create_connection(("127.0.0.1", port))
            stream.sendall(b"GET /sse HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.selector.register(stream, selectors.EVENT_READ)
            self.rest[stream] = b""

    def ask(self, page="/"):
        """Return the server's CPU time in seconds, and its memory in bytes."""
        url = f"http://127.0.0.1:{self.port}{page}"
        with urllib.request.urlopen(url) as answer:
            return [float(word) for word in answer.read().split()]

    def read(self, count, line):
        """Read until as many lines that match have come to all streams together."""
        matches = []
        while len(matches) < count:
            for key, _ in self.selector.select(PATIENCE) or sys.exit("events are lost"):
                piece = self.rest[key.fileobj] + key.fileobj.recv(2**18)
                now = time.monotonic()
                whole, newline, rest = piece.rpartition(b"\n")
                self.rest[key.fileobj] = rest
                matches += [(now, text) for text in line.findall(whole + newline)]
        return matches

    def load(self, events, pause):
        """Have events published; return seconds, CPU seconds and sorted latencies."""
        deliveries = events * len(self.rest)
        (before, _), begun = self.ask(), time.monotonic()
        self.ask(f"/publish?{events}&{pause}")
        got = self.read(deliveries, re.compile(rb"data: ([0-9.e+]+)\n"))
        seconds = time.monotonic() - begun
        latencies = sorted(now - float(text) for now, text in got)
        return seconds, self.ask()[0] - before, latencies


def bench(streams=1000, events=100):
    """Measure a channel here: python test_sse_ref.py bench [STREAMS [EVENTS]]."""
    if resource:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the server's too
    command = [sys.executable, __file__, "bench-server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            measure(int(server.stdout.readline()), streams, events)
        finally:
            server.kill()


def measure(port, streams, events):
    """Print what `bench` finds out."""
    print(f"Python {sys.version.split()[0]} on {os.cpu_count()} cores")
    print(f"opening {streams} streams ...", flush=True)
    memory, begun = Bench(port, 0).ask()[1], time.monotonic()
    load = Bench(port, streams)
    load.read(streams, re.compile(rb"(: ok)\n"))
    print(f"  {time.monotonic() - begun:8.2f} s to open all")
    each = (load.ask()[1] - memory) / streams
    print(f"  {each / 1000:8.1f} kB of memory for each stream")
    print(f"publishing {events} events, 50 ms apart ...", flush=True)
    _, cpu, latencies = load.load(events, 0.05)
    print(f"  {cpu * 1e6 / len(latencies):8.1f} us of CPU for each delivery")
    print(f"  {latencies[len(latencies) // 2] * 1e3:8.1f} ms median latency")
    print(f"  {latencies[len(latencies) * 99 // 100] * 1e3:8.1f} ms 99th percentile")
    print("publishing 1000 events at once ...", flush=True)
    seconds, _, latencies = load.load(1000, 0)
    print(f"  {len(latencies) / seconds:8.0f} deliveries a second")


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench-server"]:
        bench_server()
    elif sys.argv[1:2] == ["bench"]:
        bench(*map(int, sys.argv[2:]))
    else:
        unittest.main()
