# SPDX-License-Identifier: 0BSD
# ruff: noqa: PLR2004 - in a test the number is the point
"""What you may rely on when you use sse_ref: each test is one promise.

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
import math
import os
import queue
import random
import re
import select
import selectors
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import unittest
import urllib.request
import weakref
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from unittest import mock

import sse_ref
from sse_ref import (
    Channel,
    Client,
    Refusal,
    SSERequestHandler,
    SSEServer,
    encode_comment,
    encode_event,
)

resource = tracemalloc = None
with contextlib.suppress(ImportError):  # Windows has no resource, PyPy no tracemalloc.
    import resource
    import tracemalloc

MODULE = Path(sse_ref.__file__).resolve()
BIG = 100_000  # bytes
LARGE = "x" * 8_000_000  # more than the kernel takes for a reader that is stuck
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

    def serve(self, on_connection=None, *, handler=SSERequestHandler, **options):
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

    def answer(self, server, path="/", **options):
        """Send a request; return the Peer that has read an answer that is no stream."""
        peer = Peer(server, path, **options)
        try:
            peer.read_head()
            peer.body = peer.read_body()
        finally:
            peer.close()
        return peer

    def status(self, server, path="/sse", *, method="HEAD", **options):
        """Return the status of the answer; by HEAD, so that a stream ends at once."""
        return self.answer(server, path, method=method, **options).status

    def events(self, server, path="/sse", **options):
        """Return the data of all events of a stream that ends in good order."""
        peer = self.connect(server, path, **options)
        self.assertEqual(peer.status, 200)
        return [data for _, data, _ in peer.finish().events]

    @contextlib.contextmanager
    def logged(self, level=logging.INFO):
        """Collect what the module logs meanwhile."""
        records = []
        handler = logging.Handler(level)
        handler.emit = records.append
        sse_ref.logger.addHandler(handler)
        sse_ref.logger.setLevel(level)
        with mock.patch.object(sse_ref.logger, "propagate", False):
            try:
                yield records
            finally:
                sse_ref.logger.removeHandler(handler)
                sse_ref.logger.setLevel(logging.NOTSET)

    @contextlib.contextmanager
    def assert_logs(self, *exceptions):
        """Expect these exceptions in the log, and no other error or warning."""
        with self.logged(logging.WARNING) as records:
            yield
            wait_until(lambda: len(records) >= len(exceptions), "the log")
            found = [r.exc_info[0] if r.exc_info else None for r in records]
            self.assertEqual(found, list(exceptions))


def answering(function):
    """Return a handler class that answers all requests by `function(handler)`."""

    class Handler(SSERequestHandler):
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


def big(number):
    """Return a text of 100 kB that begins with `number`, and goes on with x."""
    return str(number).ljust(BIG, "x")


def feed(peer):
    """Let a peer read on, by HTTP/1.1 or 1.0; return what it has read."""
    if "Transfer-Encoding" in peer.headers:
        return peer.chunk()
    line = peer.file.readline()
    peer.reader.feed(line)
    return line


def event(peer):
    """Return the next event by HTTP/1.1 or 1.0: type, data, last event ID."""
    while not peer.reader.events:
        if not feed(peer):
            raise EOFError("the stream ended")
    return peer.reader.events.pop(0)


def half_close(peer):
    """Say that no more will be sent, and go on reading."""
    peer.socket.shutdown(socket.SHUT_WR)


WAYS_TO_LEAVE = (Peer.close, Peer.reset, half_close)


class StreamCase(ServerCase):
    """Serves streams; little is needed to fill the kernel's buffers on the way."""

    def serve(self, on_connection=None, *, send_buffer=2**16, **options):
        server = super().serve(on_connection, **options)
        # Connections inherit it from the socket that accepts them.
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        return server

    def connect(self, server, path="/sse", **options):
        peer = super().connect(server, path, **options)
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        return peer

    def client_of(self, server, peer):
        """Return the client that is the other end of `peer`."""
        address = peer.socket.getsockname()
        wait_until(lambda: any(each.address == address for each in server.clients))
        return next(each for each in server.clients if each.address == address)

    def assert_gets(self, peer, wanted):
        """Read as many events: these, or texts that `big` has made of these."""
        wanted = [str(each) for each in wanted]
        self.assertEqual([event(peer)[1].rstrip("x") for _ in wanted], wanted)

    def request_lines(self, records):
        """Return what `records` say of the requests, when all threads have ended."""
        self.doCleanups()
        texts = [r.getMessage() for r in records if r.levelno == logging.INFO]
        return [text[text.index('"') :] for text in texts]


def head_with(*lines):
    """Return the head of a GET that has these header lines besides a Host."""
    return b"\r\n".join([b"GET / HTTP/1.1", b"Host: localhost", *lines, b"", b""])


def say_goodbye(client):
    """Be an on_connection that sends one event and ends the stream."""
    client.send("goodbye")
    client.close()


def raising(error):
    """Return a function that raises `error`, whatever it is given."""

    def fail(_):
        raise error

    return fail


def listed(headers, name):
    """Return the elements of a header that is a list."""
    return {each.strip() for each in headers.get(name, "").split(",")}


def has_ipv6():
    """Tell whether this machine has the address ::1."""
    with contextlib.suppress(OSError):
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        return True
    return False


NO_LINE_BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # str.splitlines breaks here


class TheModule(unittest.TestCase):
    """The names, and what is assumed where nothing is said."""

    SIGNATURES = """
    encode_event(data=None, *, event=None, id=None, retry=None)
    encode_comment(text='')
    Client.send(self, data=None, *, event=None, id=None, retry=None)
    Client.comment(self, text='')
    Client.wait(self, timeout=None)
    Client.on_close(self, callback)
    Channel(history=1000)
    Channel.publish(self, data=None, *, event=None, id=None)
    Channel.subscribe(self, client, *, after=None, last=0)
    Channel.close(self, end_streams=False)
    SSERequestHandler.serve_stream(self, on_connection=None, headers=None)
    SSERequestHandler.read_body(self, max_size=1048576)
    Refusal(status, text='', headers=None)
    SSEServer(server_address, on_connection=None, *, path='/sse', keepalive=15.0,\
 retry=None, max_connections=1000, max_backlog=1048576, allowed_hosts=(),\
 allowed_origins=(), RequestHandlerClass=<class 'sse_ref.SSERequestHandler'>)
    """
    OTHERS = """Client Client.close Client.closed Channel.clients SSERequestHandler
    SSERequestHandler.do_GET SSERequestHandler.serve_plain SSEServer.run
    SSEServer.server_close SSEServer.clients"""

    def test_has_these_names_explained_and_with_these_defaults(self):
        signatures = dict(re.findall(r"([\w.]+)(\(.*\))", self.SIGNATURES))
        names = [*signatures, *self.OTHERS.split()]
        exported = {name.partition(".")[0] for name in names}
        self.assertEqual(sorted(sse_ref.__all__), sorted(exported))
        for name in names:
            with self.subTest(name):
                found = functools.reduce(getattr, name.split("."), sse_ref)
                self.assertTrue(found.__doc__)
                if name in signatures:
                    fields = inspect.signature(found).parameters.values()
                    fields = [field.replace(annotation=field.empty) for field in fields]
                    self.assertEqual(str(inspect.Signature(fields)), signatures[name])

    def test_has_the_promised_version_license_and_limits(self):
        self.assertEqual(sse_ref.__version__, "3.0")
        source = Path(sse_ref.__file__).read_text(encoding="utf-8")
        self.assertTrue(source.startswith("# SPDX-License-Identifier: 0BSD\n"))
        self.assertEqual((SSEServer.head_timeout, SSEServer.body_timeout), (10, 30))
        self.assertEqual((SSEServer.closing_grace, Client.stall_timeout), (1, 30))


def lying(kind):
    """Return a subclass of str or int whose methods all bring in a line."""

    def lie(*_):
        return "x\ndata: smuggled"

    names = "__format__ __str__ __repr__ __add__ __radd__ __getitem__ __mod__ split"
    return type("Liar", (kind,), dict.fromkeys(names.split(), lie))


class AnEvent(unittest.TestCase):
    """encode_event and encode_comment."""

    def test_is_its_fields_in_order_and_a_blank_line(self):
        frame = encode_event("foo", id=1, retry=6000, event="bar")
        self.assertEqual(frame, b"event: bar\nretry: 6000\nid: 1\ndata: foo\n\n")
        for frame, expected in (
            (encode_event("a", event="b", id=10), b"event: b\nid: 10\ndata: a\n\n"),
            (encode_event("a\rb\nc"), b"data: a\ndata: b\ndata: c\n\n"),
            (encode_event("a\r\nb\r\n"), b"data: a\ndata: b\ndata: \n\n"),
            (encode_event("a\n\rb"), b"data: a\ndata: \ndata: b\n\n"),
            (encode_event(""), b"data: \n\n"),
            (encode_event("", event=""), b"event: \ndata: \n\n"),
            (encode_event("é\0\U0001f600"), "data: é\0\U0001f600\n\n".encode()),
            (encode_event(id="7"), b"id: 7\n\n"),
            (encode_event(id=""), b"id: \n\n"),
            (encode_event(id="a \t b"), b"id: a \t b\n\n"),
            (encode_event(retry=0), b"retry: 0\n\n"),
            (encode_comment("a\r\nb\rc\nd"), b": a\n: b\n: c\n: d\n"),
            (encode_comment(), b": \n"),
        ):
            self.assertEqual(frame, expected)

    def test_is_read_as_it_was_given(self):
        letters = "ab :\n\r\0\t\u2028\x85é\U0001f600\ufeff" + NO_LINE_BREAKS
        dice = random.Random(9)
        texts = [NO_LINE_BREAKS, " a", ":", "data: x", "id: 5\nretry: 1\n\nevent: x"]
        texts += ["".join(dice.choices(letters, k=n // 20)) for n in range(300)]
        for text in texts:
            kind, id_ = (re.sub("[\r\n\0]", "", text[i::2]) for i in (0, 1))
            id_ = id_.strip(" \t")
            with self.subTest(text):
                # A comment goes first: only a stream's first character can be a BOM.
                frames = encode_comment(text) + encode_event(text, event=kind, id=id_)
                lines = re.sub("\r\n?", "\n", text)
                reader = read(frames)
                self.assertEqual(reader.events, [(kind or "message", lines, id_)])
                self.assertEqual(reader.comments, [f" {s}" for s in lines.split("\n")])

    def test_refuses_what_a_reader_would_misunderstand(self):
        cases = [{}, {"event": "x"}, {"event": "x", "id": "1"}, {"retry": -1}]
        for line_break in ("\r\n", "\r", "\n"):
            for text in (line_break, f"a{line_break}b", f"a{line_break}"):
                cases += [{"data": "x", "event": text}, {"data": "x", "id": text}]
        cases += [{"id": text} for text in ("a\0b", " a", "a ", "\ta", "a\t", " ")]
        cases += [{"data": "x", name: "\ud800"} for name in ("data", "event", "id")]
        for fields in cases:
            with self.subTest(fields), self.assertRaises(ValueError):
                encode_event(**fields)
        self.assertRaises(ValueError, encode_comment, "\udfff")

    def test_refuses_fields_of_other_types(self):
        cases = [("data", 5), ("event", 5), ("retry", "1")]
        for name in ("data", "event", "id", "retry"):
            cases += [(name, value) for value in (b"x", 1.5, True)]
        for name, value in cases:
            with self.subTest(name, value=value), self.assertRaises(TypeError):
                encode_event(**{"data": "x", name: value})
        for text in (b"x", 5, None):
            self.assertRaises(TypeError, encode_comment, text)
        self.assertRaisesRegex(TypeError, r"json\.dumps", encode_event, {"a": 1})

    def test_lets_no_subclass_bring_in_a_line(self):
        text, number = lying(str), lying(int)
        frame = encode_event(text("a\nb"), event=text("c"), id=text("d"))
        self.assertEqual(frame, b"event: c\nid: d\ndata: a\ndata: b\n\n")
        frame = encode_event(text("a"), id=number(7), retry=number(5))
        self.assertEqual(frame, b"retry: 5\nid: 7\ndata: a\n\n")
        self.assertEqual(encode_comment(text("a")), b": a\n")


class AStreamsHead(StreamCase):
    """What comes before the first event, and when."""

    def test_has_these_lines_and_no_others(self):
        expected = """cache-control: no-cache, no-transform
            connection: close
            content-type: text/event-stream; charset=utf-8
            date: *
            server: *
            transfer-encoding: chunked
            x-accel-buffering: no"""
        for version in ("HTTP/1.1", "HTTP/1.0"):
            with self.subTest(version):
                peer = self.connect(self.serve(), version=version)
                self.assertEqual(peer.status_line, b"HTTP/1.1 200 OK\r\n")
                lines = [f"{name.lower()}: {s}" for name, s in peer.headers.items()]
                lines = [re.sub("^(date|server): .+", r"\1: *", line) for line in lines]
                self.assertEqual(sorted(lines), re.split("\n *", expected))
            expected = re.sub(".*chunked\n *", "", expected)  # in HTTP/1.0

    def test_leaves_in_one_packet_with_what_comes_first(self):
        news, old_news = Channel(), Channel()
        old_news.publish("x", id="7")
        for on_connection, frames in (
            (lambda client: None, ": ok\n"),
            (lambda client: client.wait(PATIENCE), ": ok\n"),
            (lambda client: client.close(), ": ok\n"),
            (lambda client: client.comment("a"), ": a\n"),
            (lambda client: client.send("a", event="b"), "event: b\ndata: a\n\n"),
            (news.subscribe, "id: [0-9a-z]+-0\n\n"),
            (lambda client: old_news.subscribe(client, last=1), "id: 7\ndata: x\n\n"),
        ):
            with_retry = "retry: 50\n" + ("" if frames == ": ok\n" else frames)
            for retry, expected in ((None, frames), (50, with_retry)):
                server = self.serve(on_connection, retry=retry)
                for _ in range(4):
                    with self.subTest(expected):
                        peer = Peer(server)
                        self.addCleanup(peer.close)
                        packet = peer.socket.recv(65536).decode()
                        head, _, body = packet.partition("\r\n\r\n")
                        self.assertTrue(head.startswith("HTTP/1.1 200 OK\r\n"), head)
                        size, _, rest = body.partition("\r\n")
                        self.assertRegex(rest[: int(size, 16)], rf"\A{expected}\Z")
                        end = rest[int(size, 16) :]  # maybe with the last chunk
                        self.assertIn(end, ("\r\n", "\r\n0\r\n\r\n"))

    def test_leaves_for_no_other_reason_before_the_first_keepalive_comment(self):
        looked_up = threading.Event()
        self.addCleanup(looked_up.set)

        def look_up(client):
            looked_up.wait()
            raise Refusal(401)

        slow = Peer(self.serve(look_up))
        self.addCleanup(slow.close)
        kept_alive = self.connect(self.serve(look_up, keepalive=0.1))
        self.assertEqual(kept_alive.chunk(), b": ok\n")
        slow.socket.settimeout(0.3)
        with self.assertRaises(socket.timeout):
            slow.socket.recv(1)
        slow.socket.settimeout(PATIENCE)
        with self.assert_logs(Refusal):  # too late for the other one
            looked_up.set()
            self.assertEqual(slow.read_head().status, 401)


class AStream(StreamCase):
    """Client: sending, waiting, ending."""

    def test_carries_each_frame_in_a_chunk_of_its_own(self):
        def on_connection(client):
            client.send("a")
            client.send("b\nc", event="d", id=1, retry=2)
            client.comment("e")
            client.close()

        server = self.serve(on_connection)
        frames = [b"data: a\n\n", b"event: d\nretry: 2\nid: 1\ndata: b\ndata: c\n\n"]
        frames += [b": e\n", b""]
        chunks = [b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames]
        self.assertEqual(self.connect(server).read_body(), b"".join(chunks))
        plain = self.connect(server, version="HTTP/1.0")
        self.assertEqual(plain.read_body(), b"".join(frames))

    def test_takes_whole_frames_from_many_threads(self):
        client, peer = self.open(max_backlog=2**30)
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)

        def send(name):
            for number in range(20):
                client.send(f"{name}\n{number}\n" + "x" * 150_000)

        threads = start_threads(*[lambda name=n: send(name) for n in range(4)])
        got = [peer.data().split("\n")[:2] for _ in range(80)]
        join(threads)
        for name in "0123":
            self.assertEqual([n for s, n in got if s == name], [*map(str, range(20))])

    def test_hands_a_frame_to_the_kernel_at_once(self):
        client, peer = self.open()
        peer.chunk()
        peer.socket.setblocking(False)
        at_once = 0
        for _ in range(20):
            client.send("x")
            with contextlib.suppress(BlockingIOError):
                at_once += peer.socket.recv(1000) == b"9\r\ndata: x\n\n\r\n"
        # By way of another thread, hardly one would be there by now.
        self.assertGreater(at_once, 10)

    def test_sends_nothing_of_what_it_refuses(self):
        client, peer = self.open()
        for fields in ({}, {"data": "\ud800"}, {"data": "x", "id": "\n"}):
            self.assertRaises(ValueError, client.send, **fields)
        self.assertRaises(ValueError, client.comment, "\ud800")
        self.assertRaises(TypeError, client.send, {"a": 1})
        client.send("after")
        self.assertEqual(peer.event(), ("message", "after", ""))
        self.assertEqual(peer.reader.comments, [" ok"])

    def test_knows_its_request(self):
        clients = queue.Queue()
        server = self.serve(clients.put, path="/a/*")
        peer = self.connect(server, "/a/%62%20%c3%a9?x=1&y=&x=%C3%A9", X_Test="yes")
        client = clients.get(timeout=PATIENCE)
        self.assertEqual(client.path, "/a/b é")
        self.assertEqual(client.query, {"x": ["1", "é"], "y": [""]})
        self.assertEqual(client.headers["x-test"], "yes")
        self.assertEqual(client.address, peer.socket.getsockname())
        self.assertEqual(client.last_event_id, "")
        self.assertIsNone(client.state)

    def test_knows_the_last_event_id_of_its_peer(self):
        clients = queue.Queue()
        server = self.serve(clients.put)
        for query, sent, id_ in (
            (b"", "é…х\U0001f600 5".encode(), "é…х\U0001f600 5"),
            (b"", b"caf\xe9", "café"),  # This is not UTF-8, so it stays Latin-1.
            (b"", b" 7 \t", "7"),
            # The last bytes of these two, 0xA0 and 0x85, are white space to str.strip.
            (b"", "voilà".encode(), "voilà"),
            (b"", "х".encode(), "х"),
            (b"lastEventId=a%20b%C3%A9", None, "a bé"),
            (b"lastEventId=1", b"2", "2"),
            (b"lastEventId=1", b"", "1"),
        ):
            with self.subTest(id_, query=query):
                head = b"GET /sse?" + query + b" HTTP/1.1\r\nHost: localhost\r\n"
                head += b"" if sent is None else b"Last-Event-ID: " + sent + b"\r\n"
                self.connect(server, head=head + b"\r\n")
                self.assertEqual(clients.get(timeout=PATIENCE).last_event_id, id_)

    def test_is_where_the_path_matches(self):
        for path, matches, differs in (
            ("/sse", "/sse /sse? /sse?a=/b /%73%73e /sse??", "/ /sse/ /x/sse /?/sse"),
            ("/something/*", "/something/ /something/a/b", "/something /somethingx"),
            ("/*/b*c", "/a/bc /a/b/x/bxc?d", "/a/bcd /bc"),
            ("/a b/é", "/a%20b/%C3%A9 /a%20b/é", "/a+b/é /a%2520b/é"),
            ("/[ab]?", "/ac /bc", "/cc /a"),
        ):
            server = self.serve(path=path)
            for target in f"{matches} {differs}".split():
                with self.subTest(path, target=target):
                    answer = self.answer(server, target, method="HEAD")
                    is_stream = "event-stream" in answer.headers["Content-Type"]
                    self.assertEqual(is_stream, target in matches.split())

    def test_waits_as_long_as_it_is_told(self):
        answers = queue.Queue()

        def on_connection(client):
            begun = time.monotonic()
            answers.put((client.wait(0.05), client.wait(0), client.wait(-1)))
            answers.put(time.monotonic() - begun)
            answers.put((client.wait(), client.wait(0), client.closed))

        server = self.serve(on_connection)
        peer = self.connect(server)
        self.assertEqual(answers.get(timeout=PATIENCE), (False, False, False))
        self.assertTrue(0.05 <= answers.get(timeout=PATIENCE) < 2)
        self.assertRaises(RuntimeError, self.client_of(server, peer).wait, 0)
        peer.close()
        self.assertEqual(answers.get(timeout=PATIENCE), (True, True, True))

    def test_notices_at_once_that_its_peer_has_left(self):
        free, ended = threading.Event(), queue.Queue()

        def on_connection(client):
            client.on_close(ended.put)
            if client.path == "/waiting":
                client.wait()
            elif client.path == "/sending":
                client.send("x" * 8_000_000)
            else:
                client.comment()
                free.wait()
            raise BrokenPipeError  # is not logged, as the stream has ended

        with self.logged(logging.WARNING) as records:
            server = self.serve(on_connection, path="/*")
            self.addCleanup(free.set)
            for leave in WAYS_TO_LEAVE:
                for path in ("/waiting", "/sending", "/busy"):
                    with self.subTest(path, leave=leave.__name__):
                        peer = self.connect(server, path)
                        self.assertTrue(peer.file.peek(1))
                        client = self.client_of(server, peer)
                        begun = time.monotonic()
                        leave(peer)
                        wait_until(lambda client=client: client.closed, "the end")
                        self.assertRaises(BrokenPipeError, client.send, "x")
                        if path != "/busy":
                            self.assertIs(ended.get(timeout=PATIENCE), client)
                        self.assertLess(time.monotonic() - begun, 1)
                        self.assertEqual(server.clients, frozenset())
            self.doCleanups()
        self.assertEqual(records, [])

    def test_is_reset_when_its_peer_sends_more_than_64_kib(self):
        client, peer = self.open()
        peer.socket.sendall(b"x" * 2**16)
        for _ in range(20):  # Meanwhile the I/O thread reads it.
            client.send("still here")
            self.assertEqual(peer.data(), "still here")
            time.sleep(0.001)
        with self.logged(logging.WARNING) as records:
            peer.socket.sendall(b"x")
            self.assertRaises(ConnectionResetError, peer.finish)
            wait_until(lambda: records, "the log")

    def test_ends_in_good_order_when_any_thread_closes_it(self):
        free, answers = threading.Event(), queue.Queue()

        def on_connection(client):
            client.send("a")
            free.wait()
            answers.put(client.wait())
            client.send("too late")  # Its exception is not logged.

        with self.logged(logging.WARNING) as records:
            server = self.serve(on_connection)
            self.addCleanup(free.set)
            peer = self.connect(server)
            client = self.client_of(server, peer)
            client.send("b")
            client.close()
            client.close()  # again does no harm
            self.assertTrue(client.closed)
            for call in (lambda: client.send("x"), client.comment):
                with self.assertRaises(BrokenPipeError) as caught:
                    call()
                self.assertEqual(caught.exception.errno, errno.EPIPE)
            self.assertEqual([data for _, data, _ in peer.finish().events], ["a", "b"])
            free.set()
            self.assertTrue(answers.get(timeout=PATIENCE))
            self.doCleanups()
        self.assertEqual(records, [])

    def test_ends_in_good_order_if_on_connection_fails(self):
        def broken(client):
            client.send("a")
            raise BrokenPipeError  # of a subprocess, say

        async def coroutine(client):
            client.send("never")

        async def asynchronous_generator(client):
            yield client.send("never")

        cases = {
            "/0": (lambda client: 1 / 0, ZeroDivisionError, []),
            "/1": (lambda client: client.send("a") or 1 / 0, ZeroDivisionError, ["a"]),
            "/2": (broken, BrokenPipeError, ["a"]),
            "/3": (coroutine, TypeError, []),
            "/4": (asynchronous_generator, TypeError, []),
            "/5": (lambda client: (client.send(c) for c in "never"), TypeError, []),
        }
        # Python would complain there of a coroutine that nobody awaits.
        with mock.patch("sys.stderr", io.StringIO()) as stderr:
            server = self.serve(lambda c: cases[c.path][0](c), path="/*")
            for path, (_, error, events) in cases.items():
                with self.subTest(path), self.assert_logs(error):
                    self.assertEqual(self.events(server, path), events)
            self.doCleanups()
            gc.collect()
        self.assertEqual(stderr.getvalue(), "")

    def test_calls_on_close_at_its_very_end_in_its_own_thread(self):
        calls, threads, free = [], [], threading.Event()

        def on_connection(client):
            threads.append(threading.current_thread())
            client.on_close(lambda _: 1 / 0)
            client.on_close(lambda c: calls.append((c, threading.current_thread())))
            client.comment()
            free.wait()

        server = self.serve(on_connection)
        self.addCleanup(free.set)
        peer = self.connect(server)
        client = self.client_of(server, peer)
        peer.close()
        wait_until(lambda: not server.clients, "the end")
        self.assertEqual(calls, [])
        with self.assert_logs(ZeroDivisionError):
            free.set()
            threads[0].join(PATIENCE)
        self.assertEqual(calls, [(client, threads[0])])
        client.on_close(calls.append)
        self.assertEqual(calls[1:], [client])
        self.assertRaises(ZeroDivisionError, client.on_close, lambda _: 1 / 0)

    def test_is_kept_alive_by_a_comment_after_silence_alone(self):
        times = []

        def on_connection(client):
            client.comment("begin")
            while client.path == "/talking" and not client.closed:
                client.send("x")
                times.append(time.monotonic())
                client.wait(0.02)

        server = self.serve(on_connection, path="/*", keepalive=0.2)
        quiet_server = self.serve(on_connection, path="/*", keepalive=None)
        talking, silent = self.connect(server, "/talking"), self.connect(server, "/")
        plain = self.connect(server, "/", version="HTTP/1.0")
        never = self.connect(quiet_server, "/")
        pieces = [silent.chunk() for _ in range(3)]
        self.assertEqual(pieces[0], b": begin\n")
        for piece in pieces[1:]:
            self.assertRegex(piece, rb"\A: [^\n]+\n\Z")  # without a blank line
        for client in server.clients | quiet_server.clients:
            client.close()
        self.assertRegex(plain.read_body(), rb"\A: begin\n(: [^\n]+\n)+\Z")
        self.assertEqual(never.finish().comments, [" begin"])
        # This machine may have been too busy to send for a while.
        longest = max(b - a for a, b in zip(times, times[1:]))
        self.assertTrue(talking.finish().comments == [" begin"] or longest > 0.15)

    @unittest.skipUnless(hasattr(socket, "TCP_USER_TIMEOUT"), "needs the option")
    def test_has_the_kernel_delay_nothing_and_notice_a_peer_that_vanishes(self):
        sockets = []
        handler = answering(lambda h: sockets.append(h.connection) or h.serve_stream())
        self.connect(self.serve(handler=handler), "/stream")
        timeout = sockets[0].getsockopt(socket.SOL_TCP, socket.TCP_USER_TIMEOUT)
        self.assertEqual(timeout, 30_000)
        self.assertTrue(sockets[0].getsockopt(socket.SOL_TCP, socket.TCP_NODELAY))

    def test_is_refused_on_a_tls_socket(self):
        sides = ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT
        contexts = [ssl.SSLContext(side) for side in sides]
        for context in contexts:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            try:
                context.set_ciphers("AECDH-AES128-SHA:@SECLEVEL=0")
            except ssl.SSLError:
                self.skipTest("TLS without a certificate is not possible here")
        server = self.serve()
        server.socket = contexts[0].wrap_socket(server.socket, server_side=True)
        plain = socket.create_connection(server.server_address, PATIENCE)
        with contexts[1].wrap_socket(plain) as peer, self.logged() as records:
            peer.sendall(b"GET /sse HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with peer.makefile("rb") as file:
                self.assertIn(b" 500 ", file.readline())
                self.assertNotIn(b"event-stream", file.read())
        self.assertIn(logging.ERROR, [record.levelno for record in records])

    def test_reaches_urllib_at_once(self):
        clients = queue.Queue()
        server = self.serve(clients.put)
        # Without the environment's proxies.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        url = f"http://127.0.0.1:{server.server_port}/sse"
        with opener.open(url, timeout=PATIENCE) as response:
            client = clients.get(timeout=PATIENCE)
            self.assertEqual(response.headers.get_content_charset(), "utf-8")
            self.assertEqual(response.readline(), b": ok\n")
            for number in range(40):
                client.send(str(number))
                self.assertEqual(response.readline(), b"data: %d\n" % number)
                self.assertEqual(response.readline(), b"\n")


class ARefusalOfAStream(StreamCase):
    """Refusal in on_connection."""

    def test_is_the_whole_answer_and_ends_the_client(self):
        closed = []

        def on_connection(client):
            self.assertNotIn(client, server.clients)  # Others must not send to it yet.
            client.on_close(closed.append)
            raise refusal

        with self.logged() as records:
            server = self.serve(on_connection)
            for status, arguments, text, headers in (
                (401, ["Wer da? è", {"X-A": "b"}], "Wer da? è", ["10", "b"]),
                (404, [], "Not Found\n", ["10", None]),
                (204, [], "", [None, None]),
            ):
                refusal = Refusal(status, *arguments)
                answer = self.answer(server, "/sse")
                self.assertEqual(answer.status, status)
                self.assertEqual(answer.body.decode(), text)
                found = [answer.headers[name] for name in ("Content-Length", "X-A")]
                self.assertEqual(found, headers)
                self.assertNotIn("Transfer-Encoding", answer.headers)
                client = wait_until(lambda: closed and closed.pop(), "the callback")
                self.assertRaises(BrokenPipeError, client.send, "too late")
                self.assertEqual(server.clients, frozenset())
            lines = self.request_lines(records)
        self.assertEqual(lines, [f'"GET /sse HTTP/1.1" {n} -' for n in (401, 404, 204)])
        self.assertEqual(len(records), 3)  # so there is no warning or error

    def test_comes_too_late_when_the_head_was_sent_or_the_peer_has_left(self):
        clients = queue.Queue()

        def on_connection(client):
            clients.put(client)
            if client.path == "/send":
                client.send("something")
            elif client.path == "/wait":
                client.wait(0)
            else:
                wait_until(lambda: client.closed, "the peer to leave")
            raise Refusal(404)

        with self.logged() as records:
            server = self.serve(on_connection, path="/*")
            self.assertEqual(self.events(server, "/send"), ["something"])
            self.assertEqual(self.events(server, "/wait"), [])
            peer = Peer(server, "/leave")
            self.addCleanup(peer.close)
            wait_until(lambda: clients.qsize() == 3, "the client")
            half_close(peer)
            self.assertEqual(peer.read_body(), b"")
            lines = self.request_lines(records)
        errors = [r.exc_info[0] for r in records if r.levelno > logging.INFO]
        self.assertEqual(errors, [Refusal, Refusal])  # none for the one that has left
        pairs = [line.split()[1::2] for line in sorted(lines)]
        self.assertEqual(pairs[1:], [["/send", "200"], ["/wait", "200"]])


class ASlowReader(StreamCase):
    """The backlog: what a reader was sent and the kernel has not taken yet."""

    def test_delays_no_other_thread_and_gets_everything_in_order(self):
        waited, calls = queue.Queue(), []
        server = self.serve(lambda c: waited.put(c.wait()), max_backlog=2**30)
        peer = self.connect(server)
        client = self.client_of(server, peer)
        client.on_close(calls.append)
        for number in range(200):
            client.send(big(number) if number % 10 == 0 else str(number))
        client.close()
        self.assertTrue(waited.get(timeout=PATIENCE))
        self.assertRaises(BrokenPipeError, client.send, "too late")
        self.assert_gets(peer, range(100))
        self.assertEqual(calls, [])
        self.assert_gets(peer, range(100, 200))
        self.assertEqual(peer.finish().events, [])
        wait_until(lambda: calls, "the callback")

    def test_slows_its_own_thread_by_what_that_sent_alone(self):
        sent = []

        def on_connection(client):
            for _ in range(3):
                client.send("x" * 2_000_000)
                sent.append(client)

        server = self.serve(on_connection, max_backlog=2**30)
        peer = self.connect(server)
        self.assertTrue(peer.file.peek(1))  # Some of the first has come.
        client = self.client_of(server, peer)
        for number in range(40):
            client.send(big(number))
        self.assertEqual(sent, [])
        self.assertEqual(len(peer.data()), 2_000_000)
        # It goes on, though most of what others have sent is not read yet.
        wait_until(lambda: sent, "the first event's end")
        self.assert_gets(peer, range(40))
        self.assertEqual([len(peer.data()), len(peer.data())], [2_000_000] * 2)

    def test_is_reset_when_its_backlog_is_over_the_limit(self):
        server = self.serve(max_backlog=1000)
        slow, quick = self.connect(server), self.connect(server)
        client, other = self.client_of(server, slow), self.client_of(server, quick)
        for _ in range(2):  # A single event may be larger.
            client.send("x" * 3_000_000)
            self.assertEqual(len(slow.data()), 3_000_000)
        with self.logged(logging.WARNING) as records:
            client.send("x" * 3_000_000)
            self.assertRaises(BrokenPipeError, client.send, "x")
            self.assertTrue(client.closed)
            self.assertRaises(ConnectionResetError, slow.finish)
            wait_until(lambda: records, "the log")
        self.assertIn(str(client.address[1]), records[0].getMessage())
        other.send("unharmed")
        self.assertEqual(quick.data(), "unharmed")

    def test_is_reset_when_it_has_stopped_but_not_while_it_moves(self):
        # Linux calls a socket writable only when a third of its buffer is free. For
        # this reader that takes longer than the time-out.
        server = self.serve(max_backlog=2**30, send_buffer=2**21)
        stuck, slow = self.connect(server), self.connect(server)
        clients = [self.client_of(server, peer) for peer in (stuck, slow)]
        timeout = mock.patch.object(Client, "stall_timeout", 0.7)
        with timeout, self.logged(logging.WARNING) as records:
            for client in clients:
                client.send("x" * 8_000_000)
            begun = b""
            while not clients[0].closed:
                begun += slow.socket.recv(20_000)
                time.sleep(0.02)
            wait_until(lambda: records, "the log")
            self.assertFalse(clients[1].closed)
        self.assertRaises(ConnectionResetError, stuck.finish)
        clients[1].close()
        rest = slow.read_body()
        self.assertGreater(len(begun + rest), 8_000_000)
        self.assertTrue(rest.endswith(b"\r\n0\r\n\r\n"))


class ChannelCase(StreamCase):
    """Serves channels."""

    def connect(self, server, path="/sse", *, kind=socket.socket, **options):
        """Connect; the server's end is a socket of the class `kind`."""

        def get_request():
            connection, address = SSEServer.get_request(server)
            return kind(fileno=connection.detach()), address

        with mock.patch.object(server, "get_request", get_request):
            return super().connect(server, path, **options)

    def subscribe(self, server, channel, count=1, plain=0, **options):
        """Connect `count` peers, and return them once they have their first id.

        The last `plain` ones speak HTTP/1.0.
        """
        before = len(channel.clients)
        versions = ["HTTP/1.1"] * (count - plain) + ["HTTP/1.0"] * plain
        peers = [self.connect(server, version=each, **options) for each in versions]
        wait_until(lambda: len(channel.clients) == before + count, "the subscribers")
        for peer in peers:
            while not peer.reader.last_event_id:
                feed(peer)
        return peers

    def begin(self, count=1, plain=0, *, history=1000, **options):
        """Return a channel, the server that serves it, and `count` subscribers."""
        channel = Channel(history=history)
        server = self.serve(channel.subscribe, **options)
        return [channel, server, *self.subscribe(server, channel, count, plain)]

    def leave(self, peers, *servers):
        """Close `peers`, and wait until the streams of `servers` have ended."""
        for peer in peers:
            peer.close()
        wait_until(lambda: not any(server.clients for server in servers), "the end")

    def replay(self, channel, subscribe=None, **options):
        """Close `channel`; return all events of a stream that is subscribed to it."""
        channel.close(end_streams=True)
        server = self.serve(subscribe or channel.subscribe)
        return self.connect(server, **options).finish().events

    @contextlib.contextmanager
    def held_up(self):
        """Have the I/O thread stand still meanwhile, in the middle of a write."""
        entered, free = threading.Event(), threading.Event()

        class Slow(socket.socket):
            def send(self, data, *flags):
                if b"hold up" in bytes(data):
                    entered.set()
                    free.wait(PATIENCE)
                return super().send(data, *flags)

        channel = Channel()
        self.subscribe(self.serve(channel.subscribe), channel, kind=Slow)
        channel.publish("hold up")
        self.assertTrue(entered.wait(PATIENCE))
        try:
            yield
        finally:
            free.set()


class AChannel(ChannelCase):
    """Publish once, reach everybody."""

    def test_numbers_its_events_unless_the_program_names_them(self):
        channel, _, peer = self.begin()
        first = channel.publish("a", event="greeting")
        epoch = first.rpartition("-")[0]
        self.assertRegex(epoch, r"^[\w-]+$")
        self.assertFalse(Channel().publish("a").startswith(epoch))
        text = {"data": "x"}
        for fields in ({}, {"event": "x"}, {"data": "\ud800"}, {**text, "id": " "}):
            with self.subTest(fields), self.assertRaises(ValueError):
                channel.publish(**fields)
        given = "ü/1", 7, lying(int)(7), "", None, None
        ids = [channel.publish("x", id=id_) for id_ in given]
        # The refused ones have used up no number, those with other names have.
        self.assertEqual(first, f"{epoch}-1")
        self.assertEqual(ids, ["ü/1", "7", "7", "", f"{epoch}-6", f"{epoch}-7"])
        self.assertEqual(event(peer), ("greeting", "a", first))
        self.assertEqual([event(peer)[2] for _ in ids], ids)

    def test_reaches_every_subscriber_of_every_server_alike(self):
        channel, server, *peers = self.begin(3, plain=1, retry=5)
        old = channel.publish("before the fourth came")
        peers += self.subscribe(self.serve(channel.subscribe), channel)
        self.assertEqual(peers[3].reader.last_event_id, old)
        for peer in peers[:3]:
            self.assertEqual(event(peer)[2], old)
        id_ = channel.publish("one\ntwo", event="greeting")
        for peer in peers:
            self.assertEqual(event(peer), ("greeting", "one\ntwo", id_))
        server.shutdown()
        server.server_close()
        self.assertEqual(peers[0].finish().events, [])
        self.assertEqual(peers[2].file.read(), b"")
        channel.publish("to the others")
        self.assert_gets(peers[3], ["to the others"])

    def test_gives_each_what_was_published_after_it_came_and_before_its_close(self):
        channel, server, early, closing = self.begin(2)
        with self.held_up():  # so that all of these leave in one piece
            channel.publish("1")
            late = self.subscribe(server, channel, 2, plain=1)
            self.client_of(server, closing).close()
            channel.publish("2")
            (latest,) = self.subscribe(server, channel)
        channel.publish("3")
        self.assert_gets(early, "123")
        self.assert_gets(late[0], "23")
        self.assert_gets(late[1], "23")
        self.assert_gets(latest, "3")
        self.assertEqual([data for _, data, _ in closing.finish().events], ["1"])

    def test_loses_nothing_for_whoever_has_the_head_of_the_answer(self):
        channel = Channel()

        class Prompt(socket.socket):
            def send(self, data, *flags):
                sent = super().send(data, *flags)
                if b"200 OK" in bytes(data):
                    threads.extend(start_threads(lambda: channel.publish("at once")))
                    threads[-1].join(0.05)
                return sent

        threads = []
        for version in ("HTTP/1.1", "HTTP/1.0"):
            server = self.serve(channel.subscribe)
            peer = self.connect(server, version=version, kind=Prompt)
            self.assert_gets(peer, ["at once"])
        join(threads)

    def test_sends_pieces_of_256_kib_or_one_event(self):
        channel, _, peer = self.begin()
        sizes = [10_000] * 60 + [400_000] + [10] * 100
        with self.held_up():
            for size in sizes:
                channel.publish("x" * size)
        counts = []
        while sum(counts) < len(sizes):
            size = len(peer.chunk())
            counts.append(len(peer.reader.events))
            peer.reader.events.clear()
            self.assertTrue(size <= 2**18 or counts[-1] == 1, (size, counts))
        self.assertLess(len(counts), 10)

    def test_has_publish_wait_for_the_io_thread_and_for_no_reader(self):
        for end in ("none", "its stream is closed", "it is closed"):
            channel, server, reading = self.begin(history=10)
            self.addCleanup(channel.close)  # ends the thread in any case
            if end == "none":
                (stuck,) = self.subscribe(server, channel)
                self.client_of(server, stuck).send("x" * 3_000_000)
            published = []

            def publish(channel=channel, published=published):
                with contextlib.suppress(RuntimeError):
                    for number in range(50):
                        published.append(channel.publish(str(number)))

            with self.subTest(end=end), self.held_up():
                if end == "its stream is closed":
                    self.client_of(server, reading).close()
                threads = start_threads(publish)
                wait_until(lambda p=published: len(p) >= 9)
                threads[0].join(0.05)
                self.assertLessEqual(len(published), 11)
                if end == "it is closed":
                    channel.close()
                    threads[0].join(PATIENCE / 2)
                    self.assertFalse(threads[0].is_alive())
            self.assert_gets(reading, range(50) if end == "none" else [])
            wait_until(lambda t=threads: not t[0].is_alive(), "the end of publish")
            self.assertEqual(len(published) == 50, end != "it is closed")

    def test_delivers_what_was_published_before_its_close(self):
        channel, server, peer = self.begin()
        with self.held_up():
            ids = [channel.publish(text) for text in "123"]
            channel.close()
            with self.assertRaises(RuntimeError):
                channel.publish("4")
        late = self.connect(server, Last_Event_ID=ids[0])
        for each, numbers in ((peer, "123"), (late, "23")):
            self.assert_gets(each, numbers)
            self.client_of(server, each).send("still open")
            self.assert_gets(each, ["still open"])
        channel.close(end_streams=True)
        self.assertEqual(peer.finish().events, [])

    def test_can_end_every_stream_after_its_last_event(self):
        channel, server, *peers = self.begin(3, plain=1)
        ids = [channel.publish(big(number)) for number in range(15)]
        channel.close(end_streams=True)
        self.assertEqual(channel.clients, frozenset())
        for peer in peers:  # Most of it is still to come.
            self.assert_gets(peer, range(15))
        self.assertEqual(peers[0].finish().events, [])
        self.assertEqual(peers[2].file.read(), b"")
        self.assertEqual(self.events(server), [])
        self.assertEqual(self.events(server, Last_Event_ID=ids[-1]), [])
        self.assertEqual(len(self.events(server, Last_Event_ID="lost")), 16)

    def test_counts_open_streams_as_its_clients(self):
        channel, server, leaving, closing, staying = self.begin(3)
        leaving.close()
        wait_until(lambda: len(channel.clients) == 2)
        channel.publish("x" * 3_000_000)  # It takes a while.
        self.client_of(server, closing).close()
        self.assertEqual(channel.clients, frozenset([self.client_of(server, staying)]))

    def test_refuses_what_makes_no_sense_and_then_no_client_is_subscribed(self):
        for history in (0, -1):
            with self.assertRaises(ValueError):
                Channel(history=history)
        channel, other, clients = Channel(history=1), Channel(), []
        channel.publish("kept")

        def on_connection(client):
            clients.append(client)
            for options in ({"last": -1}, {"last": math.nan}, {"after": "\ud800"}):
                with self.assertRaises(ValueError):
                    channel.subscribe(client, **options)
            self.assertEqual(channel.clients, frozenset())
            channel.subscribe(client, last=1)  # It counts as new.
            for each in (channel, other):
                with self.assertRaises(ValueError):
                    each.subscribe(client)
            client.close()
            for each in (channel, other):
                with self.assertRaises(BrokenPipeError):
                    each.subscribe(client)

        with self.assert_logs():
            self.assertEqual(self.events(self.serve(on_connection)), ["kept"])
        self.assert_freed(clients)

    def assert_freed(self, things):
        """Forget `things`; they must not stay in memory."""
        references = [weakref.ref(each) for each in things]
        things.clear()

        def are_freed():
            gc.collect()
            return not any(reference() for reference in references)

        wait_until(are_freed, "memory to be freed")

    def test_is_freed_once_nobody_uses_it(self):
        rooms = [Channel(), Channel()]
        server = self.serve(lambda client: client.wait(0) or rooms[0].subscribe(client))
        rooms[1].publish("nobody hears it")
        peers = self.subscribe(server, rooms[0], 2)
        rooms[0].publish("they hear it")
        self.assert_gets(peers[0], ["they hear it"])
        clients = [*rooms[0].clients]
        self.leave(peers, server)
        self.assert_freed(clients)
        self.assert_freed(rooms)


class ASlowSubscriber(ChannelCase):
    """A channel's history is the buffer of its slow readers."""

    def test_delays_nobody_and_gets_everything_in_order(self):
        channel, _, healthy, *slow = self.begin(4, plain=1, max_backlog=1000)
        began = time.monotonic()
        for number in range(20):
            channel.publish(big(number))
            self.assert_gets(healthy, [number])
        channel.publish("20".ljust(2_000_000, "x"))  # It is more than max_backlog.
        channel.publish("the end")
        self.assertEqual(len(channel.clients), 4)
        self.assert_gets(healthy, [20, "the end"])
        for peer in slow:
            self.assert_gets(peer, [*range(21), "the end"])
        self.assertLess(time.monotonic() - began, 2)  # Most of it is parsing.

    def test_is_told_of_a_gap_once_the_history_has_overtaken_it(self):
        channel, server, healthy, *slow = self.begin(3, plain=1, history=3)
        ids = [channel.publish(big(number)) for number in range(2)]
        self.assert_gets(healthy, range(2))
        slow.append(self.connect(server, Last_Event_ID=ids[0]))
        for number in range(2, 80):
            channel.publish(big(number))
            self.assert_gets(healthy, [number])
        for peer, first in zip(slow, (-1, -1, 0)):
            got, beginnings = first, []
            while got != 79:
                kind, data, _ = event(peer)
                if kind == "gap":
                    self.assertEqual(data, "")
                    self.assertIsNotNone(got, "two gaps with nothing in between")
                    got = None
                else:
                    number = int(data.rstrip("x"))
                    beginnings += [number] if got is None else []
                    self.assertIn(got, (None, number - 1))
                    got = number
            self.assertGreater(len(beginnings), 0)
            self.assertLessEqual(beginnings[-1], 77)  # So it has got all that was kept.

    def test_is_cut_off_only_when_it_takes_nothing_at_all(self):
        channel, server, steady, stuck = self.begin(2)
        with mock.patch.object(Client, "stall_timeout", 0.4), self.logged() as records:
            for number in range(100):
                channel.publish(big(number))
            while len(channel.clients) == 2:
                steady.file.read(20_000)
                time.sleep(0.01)
            self.assertEqual([*channel.clients], [self.client_of(server, steady)])
            wait_until(lambda: records)
        with self.assertRaises((ConnectionResetError, EOFError)):
            stuck.finish()

    @unittest.skipUnless(tracemalloc, "needs tracemalloc")
    def test_costs_at_most_one_piece(self):
        self.addCleanup(tracemalloc.stop)
        tracemalloc.start()
        channel, server, *peers = self.begin(6, plain=3, history=30)
        channel.publish("x" * 4_000_000)
        for peer in peers:  # It is on its way to all of them.
            peer.socket.recv(1, socket.MSG_PEEK)
        self.assertLess(tracemalloc.get_traced_memory()[0], 5_500_000)
        for number in range(60):  # Of 6 MB three are kept.
            channel.publish(big(number))
        for _ in range(4):  # Each gets a piece of these.
            self.connect(server, Last_Event_ID="lost")
        wait_until(lambda: len(channel.clients) == 10)
        self.assertLess(tracemalloc.get_traced_memory()[0], 9_500_000)


class AReconnectingClient(ChannelCase):
    """It gets what it has missed, and knows if that is not all."""

    def test_gets_what_it_missed(self):
        channel, _, peer = self.begin()
        beginning = peer.reader.last_event_id
        names = (None, "offset/1é", 2, "twice", "", "twice", None)
        ids = [channel.publish(str(n), id=name) for n, name in enumerate(names)]
        for last_id, first in (
            (beginning, 0),
            (ids[0], 1),
            ("offset/1é", 2),
            ("2", 3),
            ("twice", 6),  # It is the later one that was read last.
            (ids[6], 7),
        ):
            wanted = [("message", str(n), ids[n]) for n in range(first, 7)]
            with self.subTest(last_id):
                found = self.replay(channel, Last_Event_ID=last_id)
                self.assertEqual(found, wanted)

    def test_is_told_of_a_gap_and_gets_all_that_is_kept(self):
        channel = Channel(history=3)
        names = ("twice", None, 2, "twice", "")
        ids = [channel.publish(str(n), id=name) for n, name in enumerate(names)]
        self.assertIn(2, channel)
        self.assertNotIn("", channel)
        for last_id, numbers in (
            ("twice", "4"),  # the later one, though the earlier one is gone
            (ids[1], "234"),  # It is gone itself, but nothing that followed.
            (ids[1][:-1] + "0", "234"),
            ("of-yesterday-7", "234"),
            ("é", "234"),
        ):
            is_gap = last_id not in ids
            wanted = [("message", n, ids[int(n)]) for n in numbers]
            with self.subTest(last_id):
                found = self.replay(channel, Last_Event_ID=last_id)
                self.assertEqual(found, [("gap", last_id, "")] * is_gap + wanted)
                self.assertIs(last_id in channel, not is_gap)

    def test_has_an_id_to_come_back_with_before_its_first_event(self):
        channel = Channel()
        server = self.serve(channel.subscribe)
        ways = (("of-yesterday-7", None), ("", "a"), ("", 7), ("", None))
        for last_id, name in ways:
            (peer,) = self.subscribe(server, channel, Last_Event_ID=last_id)
            self.assertEqual(peer.reader.comments, [])
            self.assertEqual(peer.reader.events, [("gap", last_id, "")][: len(last_id)])
            self.leave([peer], server)
            id_ = channel.publish("missed", id=name)
            again = self.connect(server, Last_Event_ID=peer.reader.last_event_id)
            self.assertEqual(event(again), ("message", "missed", id_))
            self.leave([again], server)

    def test_begins_where_the_program_says(self):
        channel = Channel(history=5)
        ids = [channel.publish(str(number)) for number in range(7)]
        everything = ["2", "3", "4", "5", "6"]
        for options, last_id, wanted in (
            ({}, "", []),
            ({"last": 2}, "", ["5", "6"]),
            ({"last": 99}, "", everything),
            ({"last": math.inf}, "", everything),
            ({"last": 1}, ids[4], ["5", "6"]),
            ({"after": ids[3]}, "", ["4", "5", "6"]),
            ({"after": ids[3]}, ids[5], ["4", "5", "6"]),
            ({"after": "lost"}, ids[5], ["lost", *everything]),
        ):
            with self.subTest(options, last_id=last_id):

                def subscribe(client, options=options):
                    client.send("the state")
                    channel.subscribe(client, **options)

                found = [
                    e[1] for e in self.replay(channel, subscribe, Last_Event_ID=last_id)
                ]
                self.assertEqual(found, ["the state", *wanted])

    def test_gets_a_long_replay_piece_by_piece_and_may_leave_during_it(self):
        channel, returned = Channel(), []
        first = channel.publish("0")
        channel.publish("1")  # a piece of its own
        for number in range(2, 15):
            channel.publish(str(number).ljust(300_000, "x"))
        server = self.serve(
            lambda client: (channel.subscribe(client), returned.append(client)), retry=7
        )
        leaving = self.connect(server, Last_Event_ID="lost")
        self.assertEqual(event(leaving)[:2], ("gap", "lost"))
        peers = [self.connect(server, Last_Event_ID=first)]
        peers.append(self.connect(server, Last_Event_ID=first, version="HTTP/1.0"))
        wait_until(lambda: len(returned) == 3)  # though they have not read it
        leaving.reset()
        wait_until(lambda: len(channel.clients) == 2)
        for peer in peers:
            self.assert_gets(peer, range(1, 15))
            self.assertEqual(peer.reader.retry, 7)

    def test_loses_and_doubles_nothing_in_a_storm(self):
        channel = Channel(history=10_000)
        servers = [self.serve(channel.subscribe) for _ in range(2)]
        first = channel.publish("first")
        total, sequences = 1200, []

        def publish(name):
            for number in range(total // 4):
                channel.publish(f"{name} {number}")
                if number % 20 == 0:
                    time.sleep(0.002)

        def follow(seed):
            dice = random.Random(seed)
            got, last_id = [], first
            while len(got) < total:
                server, version = dice.choice(servers), f"HTTP/1.{dice.randrange(2)}"
                peer = Peer(server, version=version, Last_Event_ID=last_id).read_head()
                most = dice.randrange(1, 400) if seed else total  # One of them stays.
                for _ in range(min(most, total - len(got))):
                    got.append(event(peer))
                last_id = got[-1][2]
                dice.choice([Peer.close, Peer.reset])(peer)
            sequences.append(got)

        calls = [lambda n=n: publish(n) for n in range(4)]
        calls += [lambda n=n: follow(n) for n in range(6)]
        with self.assert_logs():
            join(start_threads(*calls))
        numbers = [int(id_.rpartition("-")[2]) for _, _, id_ in sequences[0]]
        self.assertEqual(numbers, list(range(2, total + 2)))
        self.assertTrue(all(sequences[n] == sequences[0] for n in range(6)))
        for name in range(4):
            mine = [data for _, data, _ in sequences[0] if data[0] == str(name)]
            self.assertEqual(mine, [f"{name} {number}" for number in range(total // 4)])


class TheIOThread(ChannelCase):
    """One thread waits for all streams."""

    def test_is_one_per_process_and_runs_while_streams_are_open(self):
        channel = Channel()
        servers = [self.serve(channel.subscribe) for _ in range(2)]
        threads, files = threading.active_count(), descriptors()
        channel.publish("nobody hears it")
        for _ in range(2):
            (one,) = self.subscribe(servers[0], channel)
            others = self.subscribe(servers[1], channel, 2)
            # There is a thread for each request, and one for all.
            self.assertEqual(threading.active_count(), threads + 3 + 1)
            self.leave([one], servers[0])
            wait_until(lambda: threading.active_count() == threads + 2 + 1)
            channel.publish("heard by some")
            for peer in others:
                self.assert_gets(peer, ["heard by some"])
            self.leave(others, *servers)
            wait_until(lambda: threading.active_count() == threads, "its end")
            self.assertEqual(descriptors(), files)

    def test_begins_and_ends_as_often_as_streams_come_and_go(self):
        server = self.serve(lambda client: (client.send("x"), client.close()))
        answers = []

        def ask(count):
            for _ in range(count):
                peer = self.answer(server, "/sse")
                answers.append((peer.status, peer.body))

        with self.assert_logs():
            ask(60)
            join(start_threads(*[lambda: ask(60)] * 4))
            self.assertEqual(answers, [(200, b"9\r\ndata: x\n\n\r\n0\r\n\r\n")] * 300)

    def test_works_with_every_selector_of_the_platform(self):
        for name in ("Select", "Poll", "Epoll", "Devpoll", "Kqueue"):
            kind = getattr(selectors, f"{name}Selector", None)
            if kind is not None:
                patch = mock.patch.object(selectors, "DefaultSelector", kind)
                with self.subTest(name), self.assert_logs(), patch:
                    self.check_streams()

    def check_streams(self):
        """Check all that a selector is needed for."""
        channel, server, *peers = self.begin(3, max_backlog=2**30)
        clients = [self.client_of(server, peer) for peer in peers]
        for number in range(20):
            clients[0].send(big(number), event="sent")
            channel.publish(big(number))
        self.assert_gets(peers[1], range(20))
        peers[1].close()
        peers[2].reset()
        wait_until(lambda: clients[1].closed and clients[2].closed)
        clients[0].close()
        events = peers[0].finish().events
        for name in ("sent", "message"):  # each by itself in order
            numbers = [data.rstrip("x") for kind, data, _ in events if kind == name]
            self.assertEqual(numbers, [str(number) for number in range(20)])
        for leave in (Peer.close, Peer.reset) * 3:  # all of it at once
            (peer,) = self.subscribe(server, channel)
            client = self.client_of(server, peer)
            actions = [client.close, lambda p=peer, leave=leave: leave(p)]
            join(start_threads(lambda: channel.publish(big(1)), *actions))
        server.shutdown()
        server.server_close()

    def test_lives_on_when_one_stream_or_the_log_fails(self):
        class Faulty(socket.socket):
            def send(self, data, *flags):
                return super().send(self.checked(data), *flags)

            def recv(self, *arguments):
                return self.checked(super().recv(*arguments))

            def checked(self, data):
                if b"bad" in bytes(data):
                    raise RuntimeError("as only a bug would raise")
                return data

        for is_failing in (False, True):
            channel, server, *others = self.begin(2)
            failing = logging.Handler(logging.ERROR if is_failing else logging.CRITICAL)
            failing.emit = Faulty.checked  # It is called with other arguments.
            threads = threading.active_count()
            with self.logged(logging.ERROR) as records:
                sse_ref.logger.addHandler(failing)
                faulty = self.subscribe(server, channel, 2, kind=Faulty)
                faulty[0].socket.sendall(b"bad")
                wait_until(lambda c=channel: len(c.clients) == 3)
                for text in ("bad", "good"):
                    channel.publish(text)
                    for peer in others:
                        self.assert_gets(peer, [text])
                for peer in faulty:
                    with self.assertRaises((ConnectionResetError, EOFError)):
                        peer.finish()
                    self.assertEqual(peer.reader.events, [])
                wait_until(lambda t=threads: threading.active_count() == t)
                sse_ref.logger.removeHandler(failing)
            errors = [record.exc_info[0] for record in records]
            self.assertEqual(errors, [RuntimeError] * 2)

    @unittest.skipUnless(resource and descriptors(), "needs a limit of descriptors")
    def test_that_cannot_begin_fails_one_stream_and_not_the_next(self):
        server = self.serve(lambda client: client.send("hello"))
        threads = threading.active_count()
        for spare in range(3):  # A selector and two ends of a self-pipe are too many.
            wait_until(lambda: threading.active_count() == threads)
            peer = Peer(server, head=b"GET /sse HTTP/1.1\r\nHost: localhost\r\n")
            wait_until(lambda: threading.active_count() == threads + 1)
            with self.logged() as records:
                with self.descriptors_left(spare):
                    peer.socket.sendall(b"\r\n")
                    self.assertNotIn(b"hello", peer.file.read())
                self.leave([peer], server)
            self.assertEqual(records[0].exc_info[1].errno, errno.EMFILE)
            peer = self.connect(server)
            self.assertEqual(peer.data(), "hello")
            self.leave([peer], server)

    @contextlib.contextmanager
    def descriptors_left(self, count):
        """Take all descriptors but `count` meanwhile."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 64, hard))
        taken = []
        with contextlib.ExitStack() as stack:
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            for each in taken[count:]:
                stack.callback(os.close, each)
            for each in taken[:count]:
                os.close(each)
            yield

    def test_sleeps_while_there_is_nothing_to_do(self):
        free, channel = threading.Event(), Channel()
        blocked = self.serve(lambda client: (client.comment(), free.wait(PATIENCE)))
        self.addCleanup(free.set)
        self.leave([self.connect(blocked)], blocked)  # Its own thread stays.
        reading, _ = self.subscribe(self.serve(channel.subscribe), channel, 2)
        channel.publish("x" * 3_000_000)
        event(reading)  # The other does not read it.
        before = time.process_time()
        time.sleep(0.3)
        self.assertLess(time.process_time() - before, 0.1)


class AGet(ServerCase):
    """A GET or HEAD where the program adds nothing of its own."""

    def test_is_answered_with_okay_and_a_fin_and_head_without_a_body(self):
        calls = []
        server = self.serve(lambda client: calls.append(client.close()))
        bodies = dict.fromkeys(("/", "/x?y", "/sse/", "/?/sse"), b"okay")
        for path, body in {**bodies, "/sse": b"5\r\n: ok\n\r\n0\r\n\r\n"}.items():
            with self.subTest(path):
                get, head = (
                    self.answer(server, path, method=each) for each in ("GET", "HEAD")
                )
                self.assertEqual((get.body, head.body), (body, b""))
                self.assertEqual(get.status_line, b"HTTP/1.1 200 OK\r\n")
                self.assertEqual(head.status_line, get.status_line)
                self.assertEqual(get.headers["Connection"], "close")
                for peer in (get, head):
                    del peer.headers["Date"]
                self.assertEqual(head.headers.items(), get.headers.items())
        self.assertEqual(len(calls), 1)  # HEAD begins no stream.

    def test_gets_405_if_it_wants_a_stream_where_there_is_none(self):
        plain, own = self.serve(), self.serve(handler=answering(send_page))
        stream = "text/event-stream"
        for server, path, accept, status in (
            (plain, "/", stream, 405),
            (plain, "/mcp", f"application/json, {stream}", 405),
            (plain, "/", f"text/html, {stream}", 200),
            (plain, "/", "*/*", 200),
            (plain, "/sse", stream, 200),
            (own, "/", stream, 200),
        ):
            with self.subTest(path, accept=accept):
                answer = self.answer(server, path, method="HEAD", Accept=accept)
                self.assertEqual(answer.status, status)
                if status == 405:
                    methods = {"GET", "HEAD", "OPTIONS"}
                    self.assertEqual(listed(answer.headers, "Allow"), methods)

    def test_finds_the_stream_by_a_pattern(self):
        for pattern, matches, differs in (
            ("/sse", ["/sse", "/sse?", "/sse?a=/b", "/%73se"], ["/Sse", "/x/sse"]),
            ("/a b", ["/a%20b"], ["/a+b", "/a%2520b"]),
            ("/straße", ["/straße", "/stra%C3%9Fe", "/stra%c3%9fe?x"], ["/strasse"]),
            ("/news/*", ["/news/", "/news/a/b", "/news/%2A"], ["/news", "/x/news/"]),
            ("/[0-9]?", ["/1x"], ["/x1", "/1", "/[0-9]?"]),
            ("*", ["/", "/x/y"], []),
        ):
            server = self.serve(path=pattern)
            for target in matches + differs:
                with self.subTest(pattern, target=target):
                    answer = self.answer(server, target, method="HEAD")
                    kind = "text/event-stream" if target in matches else "text/plain"
                    self.assertEqual(answer.headers.get_content_type(), kind)


class AStreamInAnswer(ServerCase):
    """serve_stream."""

    def test_is_given_to_any_method_on_any_path(self):
        def serve(handler):
            body = handler.read_body()

            def on_connection(client):
                client.send(f"{client.path} {client.query} {body}")
                client.close()

            # A header may be a number, as in http.server.
            handler.serve_stream(on_connection, {"X-Number": 5})
            with self.assertRaises(RuntimeError):
                handler.read_body()
            handler.wfile.write(b"more")  # What is too late gets lost,
            raise Refusal(404)  # and adds nothing.

        server = self.serve(handler=answering(serve))
        for method in ("POST", "PUT", "PATCH", "DELETE", "GET"):
            with self.subTest(method), self.assert_logs():
                peer = self.connect(server, "/a/b?c=d", method=method, body=b"abc")
                self.assertEqual(peer.status, 200)
                kind = "text/event-stream; charset=utf-8"
                self.assertEqual(peer.headers["Content-Type"], kind)
                self.assertEqual(peer.headers["X-Number"], "5")
                self.assertEqual(peer.data(), "/a/b {'c': ['d']} b'abc'")
                self.assertEqual(peer.finish().events, [])

    def test_is_the_servers_unless_the_handler_gives_another(self):
        def serve(handler):
            handler.serve_stream(*([say_goodbye] if handler.path == "/own" else []))

        news = Channel()
        server = self.serve(news.subscribe, handler=answering(serve))
        # Its body stays unread.
        events = self.events(server, "/own", method="POST", body=b"x" * 20_000)
        self.assertEqual(events, ["goodbye"])
        plain = self.answer(server, "/own", method="POST", version="HTTP/1.0")
        self.assertEqual(plain.body, b"data: goodbye\n\n")
        peer = self.connect(server, "/", method="POST")
        news.publish("hello")
        self.assertEqual(peer.data(), "hello")
        self.assertEqual(server.clients, news.clients)


class ABody(ServerCase):
    """read_body, and bodies that nobody reads."""

    def serve_bodies(self, *arguments):
        """Serve; `bodies` is what read_body has returned so far."""

        def echo(handler):
            bodies.append(handler.read_body(*arguments))
            send_page(handler, bodies[-1])

        bodies = self.bodies = []
        return self.serve(handler=answering(echo))

    def test_is_returned_whole_if_it_has_one_length_that_is_not_too_large(self):
        server = self.serve_bodies()
        field, chunked = b"Content-Length: ", b"Transfer-Encoding: chunked"
        mib, no_text = b"0123456789abcdef" * 2**16, b"\0\r\n\xff"
        no_numbers = (
            *(b"+5", b"-5", b"5 5", b"5, 5", b"5.0", b"0x5", b"1_0", b"5e0", b""),
            *("\u0665".encode(), "\uff15".encode(), b"\xb2", b"five"),
        )
        for status, body, *fields in (
            (200, b""),  # Without a length it is empty.
            (200, b"", field + b"0"),
            (200, no_text, field + b"4", b"content-length: 4"),  # RFC 9110, 8.6
            (200, no_text, field + b"0" * 5000 + b"4"),  # int() takes less.
            (200, mib, field + b"%d" % 2**20),
            (413, b"", field + b"%d" % (2**20 + 1)),  # before it comes
            (413, b"", field + b"9" * 5000),
            *((400, b"abcde", field + length) for length in no_numbers),
            (400, b"abcde", field + b"5", b"content-length: 6"),
            (400, b"abcde", b"content-length: 6", field + b"5"),
            (411, b"5\r\nabcde\r\n0\r\n\r\n", chunked),
            (411, b"5\r\nabcde\r\n0\r\n\r\n", chunked, field + b"5"),
        ):
            with self.subTest([field[:50] for field in fields]), self.assert_logs():
                self.bodies.clear()
                head = head_with(*fields).replace(b"GET", b"POST")
                self.assertEqual(self.answer(server, head=head + body).status, status)
                self.assertEqual(self.bodies, [body] if status == 200 else [])

    def test_is_asked_for_by_100_continue(self):
        server = self.serve_bodies(5)
        for length, body, status in ((5, b"abcde", 200), (6, b"", 413), (5, b"a", 400)):
            headers = {"Content_Length": length, "Expect": "100-Continue"}
            peer = Peer(server, method="POST", **headers)
            self.addCleanup(peer.close)
            self.assertEqual(peer.file.readline(), b"HTTP/1.1 100 Continue\r\n")
            self.assertEqual(peer.file.readline(), b"\r\n")
            peer.socket.sendall(body)
            peer.socket.shutdown(socket.SHUT_WR)
            self.assertEqual(peer.read_head().status, status)
        self.assertEqual(self.bodies, [b"abcde"])

    def test_that_nobody_reads_does_not_cost_its_client_the_answer(self):
        class Handler(SSERequestHandler):
            def do_PUT(self):
                self.serve_stream(say_goodbye)

        server = self.serve(handler=Handler)
        answer = self.answer(server, method="POST", body=b"x" * 2**21)
        self.assertEqual(len(answer.body), int(answer.headers["Content-Length"]))
        threads = threading.active_count()
        for method in ("POST", "PUT"):  # which get a 501 and a stream
            for options in ({"Content_Length": 3000}, {"Transfer_Encoding": "chunked"}):
                with self.subTest(method, **options):
                    peer = self.connect(server, "/", method=method, **options)
                    self.assertTrue(peer.read_body())
                    peer.socket.sendall(b"x" * 1000)
                    peer.socket.shutdown(socket.SHUT_WR)
                    wait_until(lambda: threading.active_count() <= threads, "its end")
                    self.assertEqual(peer.socket.recv(1), b"")  # and no reset


class ARefusal(ServerCase):
    """Refusal."""

    def test_is_the_answer_wherever_it_is_raised(self):
        text = "Zu schnell für uns."
        for status in (200, 204, 302, 304, 401, 429, 599):
            has_body = status not in (204, 304)
            refuse = raising(Refusal(status, text, {"Retry-After": 7}))
            pages = self.serve(handler=answering(refuse))
            handler = answering(SSERequestHandler.serve_stream)
            streams = self.serve(refuse, handler=handler)
            places = (pages, "GET /"), (pages, "POST /"), (streams, "GET /sse")
            for server, line in (*places, (streams, "POST /")):
                with self.subTest(line, status=status), self.assert_logs():
                    head = head_with().replace(b"GET /", line.encode())
                    answer = self.answer(server, head=head)
                    self.assertEqual(answer.status, status)
                    self.assertEqual(answer.headers["Retry-After"], "7")
                    self.assertEqual(answer.body.decode(), text if has_body else "")
                    length = str(len(answer.body)) if has_body else None
                    self.assertEqual(answer.headers["Content-Length"], length)
                    kind = "text/plain; charset=utf-8" if has_body else None
                    self.assertEqual(answer.headers["Content-Type"], kind)
        for status in (100, 199, 600, 0, -404):
            with self.subTest(status), self.assertRaises(ValueError):
                Refusal(status)


class AFailure(ServerCase):
    """An exception in a do_* method or in serve_plain."""

    def test_is_answered_with_500_and_told_to_the_log_alone(self):
        programs_own = KeyError, FileNotFoundError, TimeoutError
        for kind in (*programs_own, ConnectionResetError, BrokenPipeError):
            server = self.serve(handler=answering(raising(kind("a secret"))))
            for method in ("GET", "POST"):
                with self.subTest(kind, method=method):
                    with self.logged(logging.WARNING) as records:
                        answer = self.answer(server, method=method)
                        (record,) = records
                    log = logging.Formatter().format(record)
                    self.assertEqual(answer.status, 500)
                    self.assertNotIn("secret", f"{answer.headers} {answer.body}")
                    self.assertIn("a secret", log)
                    self.assertEqual("in fail" in log, kind in programs_own, log)
                    self.assertEqual("\n" in log, kind in programs_own, log)

    def test_by_a_client_that_leaves_takes_one_line_at_most(self):
        def work(handler):
            begun.set()
            self.assertTrue(lost.wait(PATIENCE))
            send_page(handler, b"x" * 10_000_000)

        begun, lost = threading.Event(), threading.Event()
        server = self.serve(handler=answering(work), path="/sse")
        with self.logged(logging.WARNING) as records:
            peer = Peer(server, "/")
            self.assertTrue(begun.wait(PATIENCE))
            peer.reset()
            lost.set()
            wait_until(lambda: records, "the log")
            for head in (b"", b"GET /", head_with()[:-2], head_with()):
                Peer(server, head=head).reset()
            self.doCleanups()
            for record in records:
                self.assertNotIn("\n", logging.Formatter().format(record))

    def test_replaces_a_head_that_was_begun_and_adds_nothing_to_one_that_was_sent(self):
        def begin(handler):
            handler.send_response(200)
            handler.send_header("X-Draft", "yes")
            if handler.path != "/begun":
                handler.end_headers()
            if handler.path == "/page":
                handler.wfile.write(b"half a p")
            raise errors[handler.command]

        errors = {"GET": Refusal(404), "POST": KeyError()}
        server = self.serve(handler=answering(begin))
        for method, status in (("GET", 404), ("POST", 500)):
            for path in ("/begun", "/head", "/page"):
                with self.subTest(path, method=method), self.logged():
                    head = head_with().replace(b"GET /", f"{method} {path}".encode())
                    answer = self.ask(server, head)
                    is_begun = path == "/begun"
                    self.assertEqual(int(answer[9:12]), status if is_begun else 200)
                    self.assertEqual(answer.count(b"HTTP/1.1"), 1, answer)
                    self.assertEqual(b"X-Draft" in answer, not is_begun)
                    self.assertEqual(answer.endswith(b"half a p"), path == "/page")

    def test_may_be_a_header_that_would_become_two(self):
        def send(handler):
            if handler.path == "/refusal":
                raise Refusal(401, "", header)
            if handler.path == "/stream":
                handler.serve_stream(say_goodbye, header)
            send_page(handler, **header)

        server = self.serve(handler=answering(send))
        for path in ("/page", "/stream", "/refusal"):
            for end in ("\r\n", "\n", "\r"):
                for header in ({"X": f"a{end}X-Evil: b"}, {f"X-Evil: b{end}X": "a"}):
                    with self.subTest(path, header=header), self.logged():
                        head = head_with().replace(b"/", path.encode(), 1)
                        answer = self.ask(server, head)
                        self.assertEqual(answer[:13], b"HTTP/1.1 500 ")
                        self.assertNotIn(b"X-Evil", answer)


class TheLog(ServerCase):
    """What the logger "sse_ref" is told of requests."""

    def test_has_a_line_for_each_request_with_control_characters_escaped(self):
        def on_connection(client):
            if client.query:
                raise Refusal(401)
            client.close()

        server = self.serve(on_connection)
        with self.logged() as records:
            for head, line in (
                (b"GET /x?y HTTP/1.1", '"GET /x?y HTTP/1.1" 200'),
                (b"GET /sse HTTP/1.1", '"GET /sse HTTP/1.1" 200'),
                (b"GET /sse?who=me HTTP/1.1", '"GET /sse?who=me HTTP/1.1" 401'),
                (b"FOO /\x85 HTTP/1.1", r'"FOO /\x85 HTTP/1.1" 501'),
                (b"\x1b[2J\x07\x9b\xe9 bad", r'"\x1b[2J\x07\x9b\xe9 bad" 400'),
            ):
                self.ask(server, head_with().replace(b"GET / HTTP/1.1", head))
                (record,) = wait_until(lambda: records[:], line)
                self.assertEqual(record.levelno, logging.INFO)
                self.assertIn(line, record.getMessage())
                self.assertRegex(record.getMessage(), r"\A127\.0\.0\.1 [ -~]+\Z")
                records.clear()

    PROGRAM = """if True:
        import http.client, logging, threading, sse_ref

        class Handler(sse_ref.SSERequestHandler):
            def do_POST(self):
                raise KeyError

            def log_message(self, *arguments):
                super().log_message(*arguments)
                raise OSError("the program's own log fails, too")

        class Full(logging.Handler):
            def emit(self, record):
                raise OSError("the disk is full")

        logging.basicConfig(level=logging.INFO)
        logging.getLogger().addHandler(Full())
        server = sse_ref.SSEServer(
            ("127.0.0.1", 0), sse_ref.Client.close, RequestHandlerClass=Handler
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for method, path in ("GET", "/"), ("GET", "/sse"), ("POST", "/"):
            connection = http.client.HTTPConnection(*server.server_address)
            connection.request(method, path)
            print(connection.getresponse().read())
    """

    @unittest.skipUnless(os.name == "posix", "needs a shell")
    def test_may_fail_without_costing_an_answer(self):
        read_end, closed_pipe = os.pipe()
        os.close(read_end)
        environment = {**os.environ, "PYTHONPATH": str(Path(sse_ref.__file__).parent)}
        options = {"stdout": subprocess.PIPE, "stderr": closed_pipe, "env": environment}
        shell = "sh", "-c", 'exec "$0" -c "$1" 2>&-'  # no standard error at all
        program = sys.executable, "-c", self.PROGRAM
        commands = program, (*shell, program[0], program[2])
        programs = [subprocess.Popen(command, **options) for command in commands]
        os.close(closed_pipe)
        for program in programs:
            output, _ = program.communicate(timeout=PATIENCE)
            answers = [b"b'okay'", rb"b': ok\n'", rb"b'Internal Server Error\n'"]
            self.assertEqual(output.splitlines(), answers)


class AMethod(ServerCase):
    """What a handler of one's own may rely on."""

    def test_that_nobody_defines_gets_501(self):
        server = self.serve()
        for method in ("POST", "PUT", "CONNECT", "TRACE", "FOO", "get", "__init__"):
            with self.subTest(method):
                self.assertEqual(self.status(server, method=method), 501)

    def test_of_an_existing_handler_is_kept(self):
        class Existing(BaseHTTPRequestHandler):
            wbufsize = -1

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                send_page(self, body[::-1], X_Number=5)
                self.wfile.write(b", the end" if go_on.wait(PATIENCE) else b"late")

            def do_GET(self):
                send_page(self)

        class Handler(SSERequestHandler, Existing):
            serve_plain = Existing.do_GET

        go_on = threading.Event()
        server = self.serve(say_goodbye, handler=Handler)
        peer = self.connect(server, method="POST", body=b"abc")
        self.assertEqual(peer.headers["X-Number"], "5")
        self.assertEqual(peer.file.read(3), b"cba")  # before the rest is written
        go_on.set()
        self.assertEqual(peer.read_body(), b", the end")
        self.assertEqual(self.events(server), ["goodbye"])
        self.assertEqual(self.answer(server).body, b"a page")
        head = self.answer(server, method="HEAD")
        self.assertEqual((head.headers["Content-Length"], head.body), ("6", b""))
        allow = self.answer(server, method="OPTIONS").headers
        self.assertEqual(listed(allow, "Allow"), {"GET", "HEAD", "OPTIONS", "POST"})

    def test_is_called_once_per_connection_whatever_it_asks_for(self):
        def keep_alive(handler):
            send_page(handler, b"", Connection="keep-alive")
            handler.close_connection = False

        # Its unread body looks like a second request.
        server = self.serve(handler=answering(keep_alive))
        peer = Peer(server, method="POST", body=head_with())
        self.addCleanup(peer.close)
        peer.socket.shutdown(socket.SHUT_WR)
        self.assertIn("close", peer.read_head().headers.get_all("Connection"))
        self.assertEqual(peer.read_body(), b"")


class TheHead(ServerCase):
    """Which heads are accepted, and what others are answered."""

    def check(self, status, *heads):
        """Send each head and a FIN: it gets this status, and nothing is logged."""
        server = self.serve()
        for head in heads:
            with self.subTest(head[:100]), self.assert_logs():
                peer = Peer(server, head=head)
                with contextlib.closing(peer):
                    with contextlib.suppress(OSError):
                        peer.socket.shutdown(socket.SHUT_WR)
                    self.assertEqual(peer.read_head().status, status)
                    length = int(peer.headers["Content-Length"])
                    self.assertEqual(len(peer.read_body()), length)

    def test_is_accepted_if_it_is_well_formed(self):
        size = 2**15 - len(head_with(b"A: "))
        self.check(
            200,
            head_with(b"A: b", b"C:d", b"E:\t f \t", b"G:", b"H: ", b"I: j: k"),
            head_with(b"!#$%&'*+-.^_`|~09: token"),
            head_with(b"A: caf\xe9 \x85\xa0\x0b\x0c\x1c\x7f"),
            head_with().replace(b"\r\n", b"\n"),
            head_with(b"A: b")[:-2] + b"\n",
            b"GET / HTTP/1.0\r\n\r\n",
            # http.server's own way to read a head crashes on these.
            head_with(b"Content-Type: multipart/form-data; boundary*0=a; boundary*=b"),
            head_with(*[b"A: b"] * 500),
            head_with(b"A: " + b"b" * size),
        )

    def test_is_refused_if_a_line_is_malformed(self):
        names = (b"", b"A B", b"A(", b'"A"', b"A/", b"\xe9", b"A\x85", b"A\0", b"\x7f")
        spaces = (b"\t", b"\x0b", b"\r", b"\x1c", b"\x85", b"\xa0", b"  ")
        methods = (b"G@T", b"GET:", b'"GET"', b"G\xcbT", b"G\0T", b"", b" GET")
        targets = (b"", b"/ x", b"/\0", b"/\x1b", b"/\x7f")
        versions = (b"", b"HTTP", b"HTTP/1", b"HTTP/1.x", b"HTTP/0.9", b"HTTP/2.0")
        versions += (b"FTP/1.1", b"http/1.1", b"HTTP/1.1 x", b"HTTP/1.10")
        self.check(
            400,
            *(head_with(name + b": b") for name in names),
            *(head_with(line) for line in (b"A : b", b"A\t: b", b"foo", b"\r")),
            *(head_with(b"A: b", line) for line in (b" c", b"\tC: d", b" ")),  # folded
            *(head_with(b"A: b" + rest) for rest in (b"\rc", b"\rC: d", b"\r", b"\0c")),
            head_with().replace(b"\r\n", b"\r\n ", 1),
            *(head_with().replace(b"GET ", b"GET" + space) for space in spaces),
            *(head_with().replace(b" HTTP", space + b"HTTP") for space in spaces),
            *(head_with().replace(b"GET", method) for method in methods),
            *(head_with().replace(b"/", target, 1) for target in targets),
            *(head_with().replace(b"HTTP/1.1", version) for version in versions),
            b"GET /\r\n\r\n",  # HTTP/0.9
            b"GET\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        )

    def test_is_refused_if_it_ends_early(self):
        head = head_with(b"Origin: null")
        sizes = (1, 4, 14, 15, 16, 20, 33, 45, len(head) - 2, len(head) - 1)
        self.check(400, *(head[:size] for size in sizes))

    def test_is_refused_if_it_is_too_large(self):
        endless = b"x" * 2**20  # Most of it stays unread, and yet it is answered.
        self.check(
            431,
            head_with(b"A: ".ljust(33 * 1024, b"b")),
            head_with(*[b"A: ".ljust(1024, b"b")] * 33),
            head_with(b"A: ".ljust(17 * 1024)).replace(b"/", b"/" + b"x" * 2**14, 1),
            head_with().replace(b"/", b"/".ljust(33 * 1024, b"x"), 1),
            endless,
            b"GET / HTTP/1.1\r\nA: " + endless,
        )

    def test_may_come_byte_by_byte_and_is_given_to_handlers_as_it_was_sent(self):
        found = []
        server = self.serve(handler=answering(lambda each: found.append(each.headers)))
        peer = Peer(server, head=b"")
        for byte in head_with(b"A: 1", b"b:\t2  3 \t", b"a: \xe9\x85", b"C:"):
            peer.socket.sendall(bytes([byte]))
        self.assertEqual(peer.read_body(), b"")
        peer.close()
        pairs = [("A", "1"), ("b", "2  3"), ("a", "\xe9\x85"), ("C", "")]
        self.assertEqual(found[0].items(), [("Host", "localhost"), *pairs])
        self.assertEqual(found[0].get_all("A"), ["1", "\xe9\x85"])

    @mock.patch.multiple(SSEServer, head_timeout=0.2, body_timeout=0.2)
    def test_must_come_in_time_and_so_must_a_body(self):
        clients, bodies = [], []
        handler = answering(lambda each: bodies.append(each.read_body()))
        server = self.serve(clients.append, handler=handler)
        stream = self.connect(server)
        post = head_with(b"Content-Length: 90000").replace(b"GET", b"POST")
        foo = post.replace(b"POST", b"FOO")  # Its body is not read.
        silent = Peer(server, head=post)
        heads = b"", b"G", post[:-2], post, foo
        dribbling = {Peer(server, head=head) for head in heads}
        for peer in (silent, *dribbling):
            self.addCleanup(peer.close)
        deadline = time.monotonic() + PATIENCE
        while dribbling:
            self.assertLess(time.monotonic(), deadline, "nobody cuts them off")
            time.sleep(0.01)
            for peer in list(dribbling):
                try:
                    peer.socket.send(b"x")
                except OSError:  # The server has closed the connection.
                    dribbling.remove(peer)
        self.assertIn(silent.read_head().status, (400, 408))
        self.assertEqual(bodies, [])
        clients[0].send("A stream outlives all that.")
        self.assertEqual(stream.data(), "A stream outlives all that.")


class TheHost(ServerCase):
    """Host and allowed_hosts: by which names a server may be called."""

    LOOKALIKES = """evil.example evil.example:80 127.0.0.1.evil.example localhost.evil
        localhost/evil localhost#.evil localhost?evil localhost\\evil localhost,evil *
        localhost@evil.example user@localhost localhost:80:80 localhost:x notlocalhost
        app.localhost.evil localhost.. [::1].evil [::1 [localhost] [127.0.0.1].evil
        1.2.3 1.2.3.4.5 256.1.1.1 1.2.3.4/8 . :8080 None
        x.box.example box.example.x"""

    def check(self, server, status, *hosts):
        for host in hosts:
            with self.subTest(host):
                self.assertEqual(self.status(server, Host=host), status)

    def test_on_loopback_may_be_localhost_or_an_ip_address(self):
        server = self.serve()
        names = ("localhost", "LocalHost:1", "app.localhost", "a.b.LOCALHOST:3000")
        addresses = ("127.0.0.1", "127.1.2.3:8080", "[::1]", "[::1]:80", "192.0.2.1:80")
        self.check(server, 200, *names, *addresses, "[2001:db8::1]:80")
        self.check(server, 403, *self.LOOKALIKES.split(), "local host", "")
        try:
            server = self.serve(address=("::1", 0))
        except OSError:
            self.skipTest("no IPv6")
        self.check(server, 200, "localhost", "[::1]")
        self.check(server, 403, "evil.example")

    def test_may_be_an_allowed_one(self):
        server = self.serve(allowed_hosts=["Box.Example"])
        self.check(server, 200, "box.example", "BOX.example:80", "localhost", "[::5]")
        self.check(server, 403, *self.LOOKALIKES.split())
        server = self.serve(allowed_hosts=("*",))
        self.check(server, 200, "evil.example", "x.y:80")

    def test_on_another_address_may_be_any_unless_some_are_allowed(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # which sends nothing
            except OSError:
                self.skipTest("this machine has no other address")
            address = probe.getsockname()[0]
        server = self.serve(address=(address, 0))
        self.check(server, 200, "evil.example", "localhost")
        server = self.serve(address=(address, 0), allowed_hosts=["box.example"])
        self.check(server, 403, "evil.example")

    def test_must_be_there_exactly_once(self):
        server = self.serve(handler=answering(send_page))
        for status, version, *hosts in (
            (400, "1.1"),
            (400, "1.1", "localhost", "evil.example"),
            (400, "1.1", "localhost", "localhost"),
            (400, "1.0", "localhost", "localhost"),
            (200, "1.0"),
            (403, "1.0", "evil.example"),
        ):
            for request in ("GET /", "POST /", "HEAD /sse"):
                with self.subTest(request, version=version, hosts=hosts):
                    lines = [f"host: {host}" for host in hosts]
                    lines = [f"{request} HTTP/{version}", *lines, "X: y", "", ""]
                    answer = self.answer(server, head="\r\n".join(lines).encode())
                    self.assertEqual(answer.status, status)

    def test_that_is_refused_is_so_everywhere_and_told_the_option(self):
        calls = []
        for server in (self.serve(), self.serve(handler=answering(calls.append))):
            for method in ("GET", "HEAD", "POST", "FOO", "OPTIONS"):
                for path in ("/", "/sse"):
                    with self.subTest(method, path=path):
                        host = "evil.example\x1b[2J"
                        answer = self.answer(server, path, method=method, Host=host)
                        self.assertEqual(answer.status, 403)
                        if method != "HEAD":
                            told = rb"[ -~]*evil.example\\x1b\[2J[ -~]*allowed_hosts"
                            self.assertRegex(answer.body, rb"\A%b[ -~]*\n\Z" % told)
        self.assertEqual(calls, [])

    def test_has_no_port_scheme_or_wildcard_in_allowed_hosts(self):
        bad = ("box.example:80", "[::1]:80", "http://box.example", "", "a b", "a/b")
        for host in (*bad, "a@b", "*.example", "b\xfccher.example"):
            with self.subTest(host), self.assertRaisesRegex(ValueError, "allowed_ho"):
                SSEServer(("127.0.0.1", 0), allowed_hosts=iter([host]))


class TheOrigin(ServerCase):
    """Origin, Sec-Fetch-Site and allowed_origins: which pages may do what."""

    APP = "https://app.example"
    # Requests to localhost:8080, where APP is allowed.
    LET_IN = """X: y
        Origin: http://localhost:8080
        Origin: https://LOCALHOST:8080
        Origin: https://app.example
        Origin: HTTPS://app.Example
        Origin: https://app.example | Sec-Fetch-Site: cross-site
        Origin: http://evil.example | Sec-Fetch-Site: same-origin
        Origin: null | Sec-Fetch-Site: same-origin
        Sec-Fetch-Site: same-origin
        Sec-Fetch-Site: none"""
    REFUSED = """Origin:
        Origin: http://evil.example, http://localhost:8080
        Origin: http://localhost:8080 | Sec-Fetch-Site: same-site
        Origin: http://localhost:8080 | Sec-Fetch-Site: cross-site
        Sec-Fetch-Site: same-site
        Sec-Fetch-Site: whatever
        Sec-Fetch-Site:"""
    REFUSED_ORIGINS = """http://localhost:8081 http://localhost http://localhost.:8080
        http://127.0.0.1:8080 http://localhost:8080.evil https://app.example.evil null *
        https://app.example. https://app.example:443 http://app.example localhost:8080
        https://x.app.example http://localhost:8080/ //localhost:8080 file://
        http://evil.example/localhost:8080 http://evil.example@localhost:8080"""

    def check(self, method="HEAD", path="/", **options):
        """Send a request for each of these cases."""
        server = self.serve(allowed_origins=[self.APP], **options)
        cases = [(case, 200) for case in self.LET_IN.split("\n")]
        cases += [(case, 403) for case in self.REFUSED.split("\n")]
        cases += [("Origin: " + each, 403) for each in self.REFUSED_ORIGINS.split()]
        for case, status in cases:
            with self.subTest(case.strip(), path=path, method=method):
                fields = ["Host: localhost:8080", *case.strip().split(" | ")]
                head = "\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""])
                answer = self.answer(server, head=head.encode())
                self.assertEqual(answer.status, status)
        return server

    def test_decides_about_streams(self):
        self.check(path="/sse")
        self.check(handler=answering(SSERequestHandler.serve_stream))

    def test_decides_about_methods_that_change_something(self):
        def count(handler):
            calls.append(handler.command)
            send_page(handler)

        calls = []
        server = self.check("POST", handler=answering(count))
        self.assertEqual(len(calls), len(self.LET_IN.split("\n")))
        for method, status in (
            *((method, 403) for method in ("PUT", "PATCH", "DELETE", "FOO")),
            *(("GET", 200), ("HEAD", 200), ("OPTIONS", 204)),
        ):
            with self.subTest(method):
                origin = "http://evil.example"
                answer = self.answer(server, "/", method=method, Origin=origin)
                self.assertEqual(answer.status, status)

    def test_may_be_the_host_by_any_name_that_gets_in(self):
        server = self.serve(allowed_hosts=["app.example"])
        for origin, host, status in (
            ("https://app.example", "app.example", 200),
            ("http://app.example", "APP.example", 200),
            ("http://[::1]:5", "[::1]:5", 200),
            ("https://app.example", "app.example:80", 403),
            ("https://app.example", "localhost", 403),
        ):
            with self.subTest(origin, host=host):
                self.assertEqual(self.status(server, Host=host, Origin=origin), status)
        for origin in (b"http://None", b"http://", b"file://", b"null", b""):
            with self.subTest(origin, host=None):
                head = b"HEAD /sse HTTP/1.0\r\nOrigin: " + origin + b"\r\n\r\n"
                self.assertEqual(self.answer(server, head=head).status, 403)

    def test_that_is_refused_is_told_the_option(self):
        origin = "http://evil.example\x1b[2J"
        text = self.answer(self.serve(), "/sse", Origin=origin).body.decode()
        self.assertIn(r"http://evil.example\x1b[2J", text)
        self.assertRegex(text, r"\A[ -~]*allowed_origins[ -~]*\n\Z")

    def test_is_in_allowed_origins_as_a_browser_sends_it(self):
        origins = ["HTTPS://App.Example", "http://b.example:81", "file://", "null"]
        server = self.serve(allowed_origins=iter(origins))
        for origin in origins:
            self.assertEqual(self.status(server, Origin=origin.lower()), 200)
        bad = ("app.example", "https://app.example/", "https://app.example/path", "")
        bad += ("https://a b", "https://me@app.example", "//app.example", "file:///")
        for origin in (*bad, "https://app.example:", "https://*.example"):
            with self.subTest(origin), self.assertRaisesRegex(ValueError, "allowed_or"):
                SSEServer(("127.0.0.1", 0), allowed_origins=[origin])


class CORS(ServerCase):
    """What pages of other origins may read."""

    APP = "https://app.example"
    ALL = {"Allow-Origin": APP, "Allow-Credentials": "true"}

    def cors(self, answer):
        """Return the headers that are about CORS, without their common prefix."""
        prefix, items = "Access-Control-", answer.headers.items()
        return {k[len(prefix) :]: v for k, v in items if k.startswith(prefix)}

    def test_is_the_same_for_every_answer(self):
        def choose(handler):
            if handler.path == "/refusal":
                raise Refusal(404)
            if handler.path == "/failure":
                raise ZeroDivisionError
            handler.serve_stream(say_goodbye)

        everybody, null = {"Allow-Origin": "*"}, {"Allow-Origin": "null"}
        for allowed, origin, granted in (
            ([self.APP, "http://b.example:81"], self.APP, self.ALL),
            *(([self.APP], each, {}) for each in ("http://app.example", "*", "null")),
            ([self.APP], None, {}),  # And yet caches are told of the origin.
            ([], "http://localhost", {}),
            *((["*"], each, everybody) for each in (self.APP, "null", "file://")),
            *((["*"], each, {}) for each in ("*", "http://a.example, http://b")),
            (["null"], "null", null),
        ):
            server = self.serve(handler=answering(choose), allowed_origins=allowed)
            fields = {} if origin is None else {"Origin": origin}
            is_in = bool(granted) or origin in (None, "http://localhost")
            for method, path, status in (
                ("HEAD", "/sse", 200),
                ("GET", "/stream", 200),
                ("POST", "/stream", 200),
                ("POST", "/refusal", 404),
                ("POST", "/failure", 500),
                ("FOO", "/", 501),
            ):
                with self.subTest(path, allowed=allowed, **fields), self.logged():
                    answer = self.answer(server, path, method=method, **fields)
                    self.assertEqual(answer.status, status if is_in else 403)
                    self.assertEqual(self.cors(answer), granted)
                    vary = answer.headers.get_all("Vary", [])
                    self.assertEqual(vary, ["Origin"] if allowed else [])

    def test_answers_preflights_on_every_path_and_options_to_everybody(self):
        handler = answering(send_page)
        server = self.serve(handler=handler, allowed_origins=[self.APP])
        asked = "last-event-id, x-test"
        fields = {"Access_Control_Request_Headers": asked, "method": "OPTIONS"}
        methods = {"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"}
        for path in ("/sse", "/", "/a/b?c", "*"):
            for origin in (self.APP, "https://evil.example"):
                with self.subTest(path, origin=origin):
                    answer = self.answer(server, path, Origin=origin, **fields)
                    self.assertEqual((answer.status, answer.body), (204, b""))
                    self.assertNotIn("Content-Length", answer.headers)
                    self.assertEqual(listed(answer.headers, "Allow"), methods)
                    granted, wanted = self.cors(answer), {}
                    if origin == self.APP:
                        wanted = {**self.ALL, "Allow-Headers": asked}
                        told = set(granted.pop("Allow-Methods").split(", "))
                        self.assertEqual(told, methods)
                        self.assertGreater(int(granted.pop("Max-Age")), 0)
                    self.assertEqual(granted, wanted)


class AFullServer(ServerCase):
    """max_connections."""

    def test_has_event_sources_come_back_and_answers_all_else(self):
        connected = []

        def answer(handler):
            if handler.path == "/health":
                send_page(handler)
            else:
                handler.serve_stream()

        server = self.serve(
            connected.append,
            handler=answering(answer),
            max_connections=1,
            allowed_origins=["https://app.example"],
        )
        peer = self.connect(server)
        (client,) = wait_until(lambda: connected, "the client")
        plain = b"retry: 5000\n\n"
        chunked = b"d\r\n" + plain + b"\r\n0\r\n\r\n"
        for path, options, status, body in (
            ("/sse", {}, 200, chunked),
            ("/other", {"Last_Event_ID": "7"}, 200, chunked),
            ("/sse?x=1", {"Origin": "https://app.example"}, 200, chunked),
            ("/sse", {"Origin": "https://evil.example"}, 403, None),
            ("/sse", {"version": "HTTP/1.0"}, 200, plain),
            ("/sse", {"method": "HEAD"}, 200, b""),
            ("/sse", {"method": "POST"}, 503, None),
            ("/sse", {"method": "PUT"}, 503, None),
            ("/health", {}, 200, b"a page"),
            ("/health", {"method": "POST"}, 200, b"a page"),
            ("/health", {"method": "TRACE"}, 501, None),
        ):
            with self.subTest(path, **options):
                late = self.answer(server, path, **options)
                self.assertEqual(late.status, status)
                self.assertIn(body, (None, late.body))
                if body in (plain, chunked):
                    self.assertIn("text/event-stream", late.headers["Content-Type"])
                    origin = late.headers["Access-Control-Allow-Origin"]
                    self.assertEqual(origin, options.get("Origin"))
        self.assertEqual(connected, [client])
        client.send("still here")
        self.assertEqual(peer.data(), "still here")
        peer.close()
        wait_until(lambda: self.connect(server).chunk() == b": ok\n", "the place")

    def test_takes_the_first_to_arrive_and_closes_what_is_beyond_64_more(self):
        server = self.serve(max_connections=2)
        silent = [Peer(server, head=b"") for _ in range(2 + 64 + 9)]
        for peer in silent:
            self.addCleanup(peer.close)
        for peer in silent[2 + 64 :]:
            with contextlib.suppress(ConnectionError):
                self.assertEqual(peer.read_body(), b"")
        for number, path, body in (
            (0, "/sse", b": ok\n"),
            (2, "/sse", b"retry: 5000\n\n"),
            (65, "/", b"okay"),
            (1, "/sse", b": ok\n"),
        ):
            request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            silent[number].socket.sendall(request.encode())
            peer = silent[number].read_head()
            got = peer.chunk() if path == "/sse" else peer.read_body()
            self.assertEqual(got, body, f"for connection {number}")

    def test_lets_an_event_source_in_as_soon_as_a_page_was_answered(self):
        server = self.serve(lambda client: client.send("welcome"), max_connections=1)
        threads = threading.active_count()
        for _ in range(20):
            self.assertEqual(self.answer(server).body, b"okay")
            with contextlib.closing(Peer(server)) as peer:
                self.assertEqual(peer.read_head().data(), "welcome")
            wait_until(lambda: threading.active_count() == threads, "its place")


class TheServer(ServerCase):
    """SSEServer: who reaches it, and by what sockets."""

    def test_knows_its_open_streams(self):
        server = self.serve()
        self.assertEqual(server.clients, frozenset())
        peers = [self.connect(server, f"/sse?{number}=") for number in range(3)]
        wait_until(lambda: len(server.clients) == 3)
        peers[0].close()
        wait_until(lambda: len(server.clients) == 2)
        client, other = server.clients
        client.send(LARGE)  # It still has to get out when the stream is closed.
        client.close()
        self.assertEqual(server.clients, frozenset([other]))

    def test_serves_by_ipv4_and_ipv6_and_on_all_addresses_without_a_look_up(self):
        lookups = dict.fromkeys(("getfqdn", "gethostbyaddr", "getnameinfo"))
        for host, bound, target in (
            ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
            ("localhost", "127.0.0.1", "127.0.0.1"),
            ("", "0.0.0.0", "127.0.0.1"),
            ("::1", "::1", "::1"),
        ):
            with self.subTest(host), mock.patch.multiple(socket, **lookups):
                if ":" in host and not has_ipv6():
                    self.skipTest("no IPv6")
                server = self.serve(lambda c: c.send(c.address[0]), address=(host, 0))
                self.assertEqual(server.server_address[0], bound)
                server.server_address = (target, server.server_port)
                self.assertEqual(self.connect(server).data(), target)
                self.assertEqual(self.answer(server).body, b"okay")

    @unittest.skipUnless(sys.platform == "linux", "needs to know the longest backlog")
    def test_has_as_many_clients_wait_in_line_as_the_kernel_allows(self):
        with SSEServer(("127.0.0.1", 0)) as server:
            info = server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        (backlog,) = struct.unpack_from("I", info, 28)  # tcpi_sacked
        longest = int(Path("/proc/sys/net/core/somaxconn").read_text())
        self.assertGreaterEqual(backlog, min(longest, 2**16 - 1))

    def test_serves_under_handle_request_too(self):
        with SSEServer(("127.0.0.1", 0)) as server:
            peer = Peer(server)
            self.addCleanup(peer.close)
            server.handle_request()
            peer.read_head()
            (client,) = wait_until(lambda: server.clients)
            client.send("news")
            self.assertEqual(peer.data(), "news")
        peer.finish()


class AClosingServer(ServerCase):
    """server_close()"""

    def close(self, server):
        """Close a server; return the seconds, and the threads that there are then."""
        begun = time.monotonic()
        server.shutdown()
        server.server_close()
        return time.monotonic() - begun, set(threading.enumerate())

    def test_ends_its_streams_alone_in_good_order_and_leaves_nothing(self):
        channel, seconds = Channel(), []
        servers = [self.serve(channel.subscribe) for _ in range(2)]
        files = descriptors()
        for server in servers:
            # Connections inherit it: the kernel is to take only a part.
            server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
            server.closing_grace = PATIENCE  # for readers that take their time
        peers = [self.connect(server) for server in servers * 3]
        wait_until(lambda: len(channel.clients) == 6)
        texts = [f"{number} " for number in range(20)]
        for text in texts:
            channel.publish(text.ljust(100_000, "x"))
        for number, server in enumerate(servers):
            closing = start_threads(lambda s=server: seconds.append(self.close(s)[0]))
            wait_until(lambda each=server: not each.clients, "closing")
            for peer in peers[number::2]:
                got = [data.rstrip("x") for _, data, _ in peer.finish().events]
                self.assertEqual(got, texts)
                peer.close()
            join(closing)
            texts.append("one more for the other server")
            if number == 0:
                channel.publish(texts[-1])
        self.assertLess(max(seconds), PATIENCE)
        self.assertEqual(descriptors(), files and files - 2)

    def test_has_no_thread_left_when_it_is_closed(self):
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            server = self.serve()
            threads = set(threading.enumerate())
            self.connect(server)
            self.assertLessEqual(self.close(server)[1], threads)

    def test_waits_for_the_stuck_and_the_busy_but_not_for_long(self):
        busy, free = threading.Event(), threading.Event()

        def on_connection(client):
            if client.query:
                busy.set()
                free.wait(PATIENCE)

        server = self.serve(on_connection, max_backlog=2**30)
        self.addCleanup(free.set)
        server.closing_grace = 0.2
        stuck, late = self.connect(server), Peer(server, "/sse?busy=1")
        self.addCleanup(late.close)
        self.assertTrue(busy.wait(PATIENCE))
        next(client for client in server.clients if not client.query).send(LARGE)
        with self.logged() as records:
            seconds, _ = self.close(server)
        self.assertGreaterEqual(seconds, 0.4)
        self.assertLess(seconds, 3)
        self.assertEqual(late.read_head().finish().comments, [" ok"])
        self.assertEqual([each.levelname for each in records], ["WARNING"])
        with self.assertRaises((ConnectionResetError, EOFError)):
            stuck.finish()

    def test_ends_a_stream_in_good_order_that_is_just_beginning(self):
        arrived, go = threading.Semaphore(0), threading.Event()

        def hold():
            arrived.release()
            go.wait(PATIENCE)

        class Handler(SSERequestHandler):
            def do_GET(self):
                if "early" in self.path:
                    hold()
                super().do_GET()

        class Connection(socket.socket):
            def setblocking(self, flag):  # That is when it becomes a stream.
                hold()
                super().setblocking(flag)

        def accept():
            connection, address = server.socket.accept()
            return Connection(fileno=connection.detach()), address

        for _ in range(3):
            go.clear()
            server = self.serve(handler=Handler)
            server.get_request = accept
            peers = [Peer(server, f"/sse?{when}=") for when in ("later", "later")]
            peers += [Peer(server, head=b""), Peer(server, "/sse?early=")]
            for _ in range(3):
                self.assertTrue(arrived.acquire(timeout=PATIENCE))
            closing = start_threads(lambda each=server: self.close(each))
            peers[2].read_body()  # It is not waited for: now the server is closing.
            go.set()
            for peer in peers:
                if peer is not peers[2]:
                    peer.read_head().finish()
                peer.close()
            join(closing)

    def test_may_be_closed_by_on_connection_or_before_it_has_served(self):
        seconds = []

        def on_connection(client):
            client.send("bye")
            seconds.append(self.close(server)[0])

        server = self.serve(on_connection)
        self.assertEqual(self.events(server), ["bye"])
        wait_until(lambda: seconds, "the end")
        with SSEServer(("127.0.0.1", 0)) as server:
            server.server_close()  # The second time does no harm.

    @unittest.skipUnless(os.name == "posix", "needs signals")
    def test_is_what_follows_a_signal_under_run(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        meanwhile = []

        def on_connection(client):
            client.send("hello")
            client.wait()
            meanwhile.extend(map(signal.getsignal, numbers))
            for number in numbers:  # one more of each during the end
                os.kill(os.getpid(), number)

        def stop(peer, number):
            try:
                peer.read_head().data()
            finally:
                os.kill(os.getpid(), number)

        before = [lambda *_: self.fail("SIGINT"), lambda *_: self.fail("SIGTERM")]
        for number, handler in zip(numbers, before):
            self.addCleanup(signal.signal, number, signal.signal(number, handler))
        for number in numbers:
            server = SSEServer(("127.0.0.1", 0), on_connection)
            server.shutdown = mock.Mock(wraps=server.shutdown)
            with contextlib.closing(Peer(server)) as peer:
                stopping = start_threads(lambda p=peer, n=number: stop(p, n))
                server.run()
                join(stopping)
                peer.finish()
            server.shutdown.assert_called_once()
            self.assertEqual([signal.getsignal(each) for each in numbers], before)
        # A child that starts during the end would go on ignoring signals.
        self.assertNotIn(signal.SIG_IGN, meanwhile)
        self.assertEqual(len(meanwhile), 4)


class AMistake(ServerCase):
    """Is told at once."""

    def test_in_the_arguments_is_an_error_that_leaves_nothing_open(self):
        class Foreign(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_error(404)

        class InOrder(SSERequestHandler, Foreign):
            pass

        class OutOfOrder(Foreign, SSERequestHandler):
            pass

        taken = self.serve(handler=InOrder, keepalive=0.1, retry=0).server_address
        for error, options in (
            (OSError, {"server_address": taken}),
            (TypeError, {"on_connection": SSERequestHandler}),
            (TypeError, {"on_connection": Foreign}),
            (TypeError, {"RequestHandlerClass": Foreign}),
            (TypeError, {"RequestHandlerClass": OutOfOrder}),
            (ValueError, {"keepalive": 0}),
            (ValueError, {"keepalive": -1}),
            (ValueError, {"keepalive": float("nan")}),
            (ValueError, {"retry": -1}),
            (TypeError, {"retry": 1.5}),
            (ValueError, {"allowed_hosts": ["a.example:80"]}),
            (ValueError, {"allowed_origins": ["https://a.example/path"]}),
        ):
            with self.subTest(options), self.assertRaises(error):
                SSEServer(**{"server_address": ("127.0.0.1", 0), **options})
        for history in (0, -1):
            with self.subTest(history=history), self.assertRaises(ValueError):
                Channel(history)


IN_VAIN = """
import runpy, sys
script, *cases = sys.argv[1:]
for case in cases:
    sys.argv = ["sse_ref.py", *case.split()]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("status", end.code, file=sys.stderr)
"""


@unittest.skipUnless(os.name == "posix", "needs a shell, and signals")
class TheCommandLine(ServerCase):
    """python sse_ref.py"""

    def launch(self, *command, before="", stdin=subprocess.PIPE):
        """Start a process; our ends of its standard streams have no buffers."""
        # It is to flush what it prints by itself.
        shell = f'unset PYTHONUNBUFFERED; {before} exec "$0" "$@"'
        command = ["sh", "-c", shell, sys.executable, *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, bufsize=0, stdin=stdin, **pipes)
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        process.kill()
        process.wait()
        for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
            stream.close()

    def start(self, *arguments, host="127.0.0.1", **options):
        """Start sse_ref.py with these arguments, and read its greeting."""
        arguments = ["--host", host, "--port", "0", *arguments]
        process = self.launch(str(MODULE), *arguments, **options)
        readable, _, _ = select.select([process.stdout], [], [], PATIENCE)
        self.assertTrue(readable, "no greeting")
        greeting = process.stdout.readline().decode()
        port = int(greeting.rpartition(":")[2])
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.assertEqual(greeting, f"Starting server... {url}\n")
        tries = [process.stdout.readline().split() for _ in range(2)]
        self.assertEqual(tries[0], [b"curl", url.encode()])
        self.assertEqual(tries[1][:2], [b"curl", b"-N"])
        self.assertTrue(tries[1][2].startswith(url.encode() + b"/"), tries[1])
        process.server_address = host, port
        return process

    def assert_stops(self, process, *numbers):
        """Have it end by signals, in time and without a word; return its errors."""
        begun = time.monotonic()
        for number in numbers:
            process.send_signal(number)
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertLess(time.monotonic() - begun, 2)
        errors = process.stderr.read().decode()
        self.assertNotRegex(errors, "Traceback|Interrupt")
        return errors

    def test_serves_as_many_as_it_may_have_descriptors_until_signals_come(self):
        few = "ulimit -Sn 20; ulimit -Hn 60;"
        with MODULE.open("rb") as stdin:
            process = self.start(stdin=stdin, before=few)
            self.assertEqual(self.answer(process).body, b"okay")
            peers = [Peer(process) for _ in range(70)]
            for peer in peers:
                self.addCleanup(peer.close)
            for peer in peers[:40]:
                self.assertEqual(peer.read_head().chunk(), b"data: hi there!\n\n")
            before = self.cpu(process)
            time.sleep(0.3)
            self.assertLess(self.cpu(process) - before, 0.1, "it spins")
            for peer in peers[10:40]:
                peer.close()
            self.assertEqual(peers[-1].read_head().data(), "hi there!")
            begun = time.monotonic()
            while process.poll() is None:  # down to the last moment of the interpreter
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGINT)
                time.sleep(0.001)
            self.assertLess(time.monotonic() - begun, 2)
            errors = self.assert_stops(process)
            self.assertIn('"GET / HTTP/1.1" 200', errors)
            self.assertGreaterEqual(errors.count('"GET /sse HTTP/1.1" 200'), 41)
            for peer in peers[:10] + peers[-1:]:
                self.assertEqual(peer.finish().blank_lines, 1)
            # Standard input is not read.
            self.assertEqual(os.lseek(stdin.fileno(), 0, os.SEEK_CUR), 0)

    def cpu(self, process):
        """Return the seconds of processor time that it has had, 0 if unknown."""
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{process.pid}/stat").read_text()
            ticks = map(int, stat.rpartition(")")[2].split()[11:13])
            return sum(ticks) / os.sysconf("SC_CLK_TCK")
        return 0

    def test_publishes_standard_input_as_its_options_say(self):
        options = ["--path", "/a*", "--retry", "70", "--max-connections", "3"]
        options += ["--allow-host", "a.example", "--allow-host", "b.example"]
        origin = "http://c.example"
        options += ["--allow-origin", origin]
        host = "::1" if has_ipv6() else "127.0.0.1"
        process = self.start("-", *options, host=host)
        found = [self.status(process, Host=f"{name}.example") for name in "abc"]
        self.assertEqual(found, [200, 200, 403])
        stuck = self.connect(process, "/abc", Host="b.example", Origin=origin)
        self.assertEqual(stuck.headers["Access-Control-Allow-Origin"], origin)
        peers = [self.connect(process, "/abc") for _ in range(2)]
        process.stdin.write(b"one\n")
        for peer in peers:
            self.assertEqual(peer.data(), "one")
            self.assertEqual(peer.reader.retry, 70)
        self.assertEqual(self.connect(process, "/abc").chunk(), b"retry: 5000\n\n")
        lines = [b"", b" two \r", b"\xff\xc3\xa9\xe2\x80\xa8", LARGE.encode()]
        lines += [b"%d" % number for number in range(5000)]
        texts = ["", " two ", "\ufffdé\u2028", LARGE, *map(str, range(5000)), "the end"]

        def write():
            with process.stdin as pipe:
                rest = memoryview(b"\n".join([*lines, b"the end"]))
                while rest:
                    rest = rest[pipe.write(rest[: 2**20]) :]

        writing = start_threads(write)
        for peer in peers:
            got = [peer.data() for _ in texts]
            self.assertTrue(got == texts, "a line is lost, changed or out of order")
        join(writing)
        peers.pop().close()
        # It goes on: somebody else gets that place.
        wait_until(lambda: b"retry: 70\n" in self.connect(process, "/abc").chunk())
        self.assert_stops(process, signal.SIGINT)
        peers.pop().finish()

    def test_can_be_stopped_as_soon_as_it_has_said_where_it_serves(self):
        process = self.start("-")  # It waits for a line, too.
        errors = self.assert_stops(process, signal.SIGTERM, signal.SIGINT)
        self.assertEqual(errors, "")

    def test_needs_no_standard_streams(self):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = probe.getsockname()
        options = ["-", "--port", str(address[1]), "--keepalive", "0.05"]
        closing = "exec <&- >&- 2>&-;"
        process = self.launch(str(MODULE), *options, before=closing)
        process.server_address = address

        def is_up():
            with contextlib.suppress(ConnectionError):
                return self.answer(process).body == b"okay"

        wait_until(is_up, "the server")
        peer = self.connect(process)
        wait_until(lambda: peer.chunk() == b": keep-alive\n", "a comment")
        self.assert_stops(process, signal.SIGTERM)
        self.assertEqual(peer.finish().events, [])

    def test_says_in_one_line_why_it_cannot_serve(self):
        # No server of names is asked for such hosts.
        cases = ["--port 70000", "--host ::1%nowhere", "--host a..b", "--keepalive -1"]
        with socket.create_server(("127.0.0.1", 0)) as taken:
            cases.append(f"--port {taken.getsockname()[1]}")
            process = self.launch("-c", IN_VAIN, str(MODULE), *cases)
            output, errors = process.communicate(timeout=PATIENCE)
        one = r"(?:usage: .*\n(?: .*\n)*)?.+\nstatus [1-9]\d*\n"
        self.assertRegex(errors.decode(), rf"\A(?:{one}){{{len(cases)}}}\Z")
        self.assertNotIn(b"Traceback", errors)
        self.assertEqual(output, b"")
