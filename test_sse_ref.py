# SPDX-License-Identifier: 0BSD
# ruff: noqa: PLR2004 - in a test the number is the point
"""What you may rely on when you use sse_ref, a test a promise.

    python -X dev -W error::ResourceWarning -m unittest
    python test_sse_ref.py bench    # measures this machine, see `bench` at the end

Streams are read here by a parser of the tests' own, written from the HTML standard's
section 9.2.6 and RFC 9112's section 7.1, so that the module is not measured by itself.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import http.client
import inspect
import io
import logging
import os
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
MODULE = Path(sse_ref.__file__)
BROWSER_BREAKS = ("\r\n", "\r", "\n")
NO_BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # but str.splitlines breaks there


def wait_until(condition, what="it"):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE} s in vain for {what}")
        time.sleep(0.002)


class Reader:
    """Interprets an event stream to the letter of the standard, 9.2.6."""

    def __init__(self):
        self.events = []  # (type, data, last event ID) of each that was dispatched
        self.comments = []
        self.retry = None
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
        return bool(self._rest or self._type or self._data)

    def _line(self, line):
        if not line:
            self.blank_lines += 1
            if self._data:
                kind = self._type or "message"
                self.events.append((kind, self._data[:-1], self._id))
            self._type = self._data = ""
        elif line[0] == ":":
            self.comments.append(line[1:])
        else:
            name, _, value = line.partition(":")
            self._field(name, value[1:] if value[:1] == " " else value)

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
    """The other end of a connection, seeing every byte of it."""

    def __init__(self, server, path="/sse", *, version="HTTP/1.1", head=None, **fields):
        self.socket = socket.create_connection(server.server_address[:2], PATIENCE)
        self.file = self.socket.makefile("rb")
        self.reader = Reader()
        fields.setdefault("Host", "localhost")
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        request = "\r\n".join([f"GET {path} {version}", *lines, "", ""])
        self.socket.sendall(request.encode() if head is None else head)

    def read_head(self):
        self.status = self.file.readline()
        self.fields = http.client.parse_headers(self.file)
        return self

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
    def log_message(self, *arguments):
        pass


def descriptors():
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


class ServerCase(unittest.TestCase):
    """Serves; and whatever a test does, nothing of it may stay behind."""

    def setUp(self):
        threads, files = threading.active_count(), descriptors()
        self.addCleanup(
            wait_until, lambda: threading.active_count() == threads, "the threads' end"
        )
        self.addCleanup(lambda: self.assertEqual(descriptors(), files))

    def serve(self, on_connection=None, *, handler=QuietHandler, **options):
        address = options.pop("address", ("127.0.0.1", 0))
        options["RequestHandlerClass"] = handler
        server = SSEServer(address, on_connection, **options)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        self.addCleanup(self.stop, server, thread)
        return server

    def stop(self, server, thread):
        server.shutdown()
        server.server_close()
        thread.join()

    def connect(self, server, path="/sse", **options):
        peer = Peer(server, path, **options)
        self.addCleanup(peer.close)
        return peer.read_head()

    def open(self, **options):
        """Serve, connect; return both ends of a stream: the client and the peer."""
        clients = []
        server = self.serve(clients.append, **options)
        peer = self.connect(server)
        wait_until(lambda: clients, "the connection")
        return clients[0], peer

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
        handler = logging.Handler()
        handler.emit = records.append
        sse_ref.logger.addHandler(handler)
        with mock.patch.object(sse_ref.logger, "propagate", False):
            try:
                yield records
            finally:
                sse_ref.logger.removeHandler(handler)


class TheModule(unittest.TestCase):
    """The names, and what is assumed where nothing is said."""

    def defaults(self, function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def test_assumes_what_it_promises(self):
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
        self.assertEqual(self.defaults(Channel), {"history": 1000, "gap_event": "gap"})
        self.assertEqual(SSEServer.head_timeout, 10)
        self.assertEqual(Client.stall_timeout, 30)

    def test_exports_its_six_names_each_with_a_docstring(self):
        self.assertEqual(len(sse_ref.__all__), 6)
        for name in sse_ref.__all__:
            self.assertTrue(getattr(sse_ref, name).__doc__, name)


class TheFrame(unittest.TestCase):
    """encode_event, encode_comment."""

    def test_is_a_data_line_and_a_blank_line(self):
        self.assertEqual(encode_event("hi there!"), b"data: hi there!\n\n")

    def test_holds_the_fields_in_the_order_event_retry_id_data(self):
        frame = encode_event("foo", id="1", retry=6000, event="bar")
        self.assertEqual(frame, b"event: bar\nretry: 6000\nid: 1\ndata: foo\n\n")

    def test_breaks_data_at_cr_lf_and_crlf(self):
        for line_break in BROWSER_BREAKS:
            frame = encode_event(line_break.join(["foo", "bar", "baz"]))
            self.assertEqual(frame, b"data: foo\ndata: bar\ndata: baz\n\n")

    def test_takes_lfcr_for_two_line_breaks(self):
        frame = encode_event("foo\n\rbar\n\rbaz\n\r")
        lines = b"data: foo\ndata: \ndata: bar\ndata: \ndata: baz\ndata: \ndata: \n\n"
        self.assertEqual(frame, lines)

    def test_breaks_data_at_nothing_else(self):
        for character in NO_BREAKS:
            frame = encode_event(f"a{character}b")
            self.assertEqual(frame, f"data: a{character}b\n\n".encode())

    def test_with_empty_data_is_an_event(self):
        self.assertEqual(encode_event(""), b"data: \n\n")
        self.assertEqual(read(encode_event("\n")).events, [("message", "\n", "")])

    def test_keeps_leading_spaces_and_colons(self):
        for data in (
            " a",
            "  b",
            ":",
            "data: x",
            "id: 5\nretry: 1\n\nevent: x",
            "\ufeff",
        ):
            self.assertEqual(read(b":\n" + encode_event(data)).events[0][1], data)

    def test_may_hold_an_id_or_a_retry_alone(self):
        self.assertEqual(encode_event(id="7"), b"id: 7\n\n")
        self.assertEqual(encode_event(retry=0), b"retry: 0\n\n")
        self.assertEqual(encode_event(event="x"), b"event: x\n\n")

    def test_takes_an_int_for_an_id_and_an_empty_one_to_reset_it(self):
        self.assertEqual(encode_event("x", id=100), b"id: 100\ndata: x\n\n")
        self.assertEqual(encode_event("x", id=-1), b"id: -1\ndata: x\n\n")
        self.assertEqual(encode_event("x", id=""), b"id: \ndata: x\n\n")

    def test_may_hold_a_nul_but_in_its_id(self):
        frame = encode_event("\0", event="\0")
        self.assertEqual(read(frame).events, [("\0", "\0", "")])
        with self.assertRaisesRegex(ValueError, "id must not contain NUL"):
            encode_event("x", id="a\0b")

    def test_refuses_a_line_break_in_event_and_id(self):
        for line_break in BROWSER_BREAKS:
            with self.assertRaisesRegex(ValueError, "event must not .* line break"):
                encode_event("x", event=f"a{line_break}b")
            with self.assertRaisesRegex(ValueError, "id must not .* line break"):
                encode_event("x", id=f"{line_break}")

    def test_allows_other_separators_in_event_and_id(self):
        frame = encode_event("x", event=NO_BREAKS, id=NO_BREAKS)
        self.assertEqual(read(frame).events, [(NO_BREAKS, "x", NO_BREAKS)])

    def test_refuses_a_negative_retry(self):
        with self.assertRaisesRegex(ValueError, "retry must not be negative"):
            encode_event("x", retry=-1)

    def test_refuses_other_types(self):
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
            with self.subTest(fields), self.assertRaisesRegex(TypeError, "must be"):
                encode_event(**fields)

    def test_names_json_dumps_to_who_gives_it_an_object(self):
        with self.assertRaisesRegex(TypeError, r"not dict.*json\.dumps"):
            encode_event({"a": 1})

    def test_refuses_to_be_nothing(self):
        with self.assertRaisesRegex(ValueError, "at least one"):
            encode_event()

    def test_refuses_a_lone_surrogate(self):
        for field in ("data", "event", "id"):
            with self.subTest(field), self.assertRaises(ValueError):
                encode_event(**{field: "\ud800"})
        with self.assertRaises(ValueError):
            encode_comment("\udfff")

    def test_gives_back_to_a_reader_whatever_it_was_given(self):
        letters = "ab :\n\r\0\t\u2028\x85é\U0001f600" + NO_BREAKS
        dice = random.Random(9)
        for _ in range(500):
            data = "".join(dice.choices(letters, k=dice.randrange(1, 12)))
            kind, id_ = (re.sub("[\r\n\0]", "", data[i::2]) for i in range(2))
            events = read(encode_event(data, event=kind, id=id_)).events
            lines = re.sub("\r\n?", "\n", data)
            self.assertEqual(events, [(kind or "message", lines, id_)])

    def test_of_a_comment_is_its_lines_and_no_blank_line(self):
        self.assertEqual(encode_comment("hello"), b": hello\n")
        self.assertEqual(encode_comment("a\r\nb\rc\nd"), b": a\n: b\n: c\n: d\n")
        self.assertEqual(encode_comment(), b": \n")
        self.assertEqual(encode_comment("\u2028"), ": \u2028\n".encode())

    def test_of_a_comment_refuses_other_types(self):
        with self.assertRaisesRegex(TypeError, "comment must be str, not bytes"):
            encode_comment(b"x")


class AStream(ServerCase):
    """Client: sending, waiting, ending."""

    def test_carries_what_is_sent_from_the_requests_own_thread(self):
        server = self.serve(lambda client: client.send("hi there!"))
        peer = self.connect(server)
        self.assertEqual(peer.event(), ("message", "hi there!", ""))

    def test_carries_what_is_sent_from_any_thread(self):
        client, peer = self.open()
        client.send("a", event="b", id="c", retry=6)
        client.comment("d")
        client.send("e")
        self.assertEqual(peer.event(), ("b", "a", "c"))
        self.assertEqual(peer.event(), ("message", "e", "c"))
        self.assertEqual(peer.reader.retry, 6)
        self.assertEqual(peer.reader.comments, [" ok", " d"])

    def test_writes_each_frame_as_a_chunk_of_its_own(self):
        client, peer = self.open()
        self.assertEqual(peer.chunk(), b": ok\n\n")
        client.send("one\ntwo")
        client.comment("x")
        self.assertEqual(peer.chunk(), b"data: one\ndata: two\n\n")
        self.assertEqual(peer.chunk(), b": x\n")

    def test_gets_nothing_of_a_frame_that_is_refused(self):
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

    def test_keeps_each_frame_whole_when_many_threads_send(self):
        client, peer = self.open()

        def send(name):
            for number in range(200):
                client.send(f"{name}\n{number}")

        threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        got = [peer.data().split("\n") for _ in range(800)]
        for thread in threads:
            thread.join()
        for name in range(4):
            numbers = [int(number) for sender, number in got if int(sender) == name]
            self.assertEqual(numbers, list(range(200)))

    def test_knows_its_request(self):
        clients = []
        server = self.serve(clients.append, path="/a/*")
        peer = self.connect(server, "//a/b?x=1&y=&x=%C3%A9", X_Test="yes")
        wait_until(lambda: clients)
        client = clients[0]
        self.assertEqual(client.path, "/a/b")
        self.assertEqual(client.query, {"x": ["1", "é"], "y": [""]})
        self.assertEqual(client.headers["x-test"], "yes")
        self.assertEqual(client.address, peer.socket.getsockname())
        self.assertEqual(client.last_event_id, "")

    def test_knows_the_last_event_id_as_utf8(self):
        clients = []
        server = self.serve(clients.append)
        request = b"GET /sse HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: %b\r\n\r\n"
        for sent, id_ in (
            ("é…х\U0001f600 5".encode(), "é…х\U0001f600 5"),
            (b"caf\xe9", "café"),
            (b" 7 \t", "7"),
            ("voilà".encode(), "voilà"),  # ends in 0xA0, and the next one in 0x85
            ("х".encode(), "х"),
        ):
            clients.clear()
            self.connect(server, head=request % sent)
            wait_until(lambda: clients)
            self.assertEqual(clients[0].last_event_id, id_)

    def test_waits_as_long_as_it_was_told(self):
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

    def test_ends_at_once_when_the_peer_leaves(self):
        for leave in (
            Peer.close,
            Peer.reset,
            lambda peer: peer.socket.shutdown(socket.SHUT_WR),
        ):
            ended = threading.Event()
            answers = []

            def on_connection(client, ended=ended, answers=answers):
                answers.append(client.wait())
                answers.append(client.closed)
                ended.set()

            server = self.serve(on_connection)
            peer = self.connect(server)
            wait_until(lambda server=server: server.clients)
            begun = time.monotonic()
            leave(peer)
            self.assertTrue(ended.wait(PATIENCE))
            self.assertLess(time.monotonic() - begun, 1)
            self.assertEqual(answers, [True, True])
            self.assertEqual(server.clients, frozenset())

    def test_stays_when_the_peer_says_more_than_it_should(self):
        client, peer = self.open()
        for _ in range(20):
            peer.socket.sendall(b"GET / HTTP/1.1\r\n\r\n" * 1000)
        client.send("still here")
        self.assertEqual(peer.data(), "still here")

    def test_may_be_waited_for_in_its_own_thread_only(self):
        client, _ = self.open()
        with self.assertRaisesRegex(RuntimeError, "own thread"):
            client.wait(0)

    def test_ends_in_good_order_when_closed(self):
        client, peer = self.open()
        client.send("last")
        client.close()
        self.assertTrue(client.closed)
        self.assertEqual(peer.finish().events, [("message", "last", "")])
        client.close()  # again does no harm

    def test_ends_when_closed_in_its_own_thread(self):
        answers = []

        def on_connection(client):
            client.send("last")
            client.close()
            answers.append(client.wait())

        peer = self.connect(self.serve(on_connection))
        self.assertEqual(peer.finish().events, [("message", "last", "")])
        wait_until(lambda: answers)
        self.assertEqual(answers, [True])

    def test_sends_its_fin_even_while_its_own_thread_is_busy(self):
        free = threading.Event()
        clients = []

        def on_connection(client):
            clients.append(client)
            free.wait(PATIENCE)

        peer = self.connect(self.serve(on_connection))
        self.addCleanup(free.set)
        wait_until(lambda: clients)
        clients[0].close()
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

    def test_raises_broken_pipe_to_who_sends_to_a_peer_that_has_gone(self):
        # The own thread is kept busy, so it is the sender who finds out.
        for leave in (Peer.close, Peer.reset):
            free = threading.Event()
            self.addCleanup(free.set)
            clients = []

            def on_connection(client, clients=clients, free=free):
                clients.append(client)
                free.wait(PATIENCE)

            peer = self.connect(self.serve(on_connection))
            wait_until(lambda clients=clients: clients)
            leave(peer)
            with self.assertRaises(BrokenPipeError):
                for _ in range(1000):
                    clients[0].send("x")
                    time.sleep(0.001)
            self.assertTrue(clients[0].closed)
            free.set()

    def test_calls_on_close_once_in_its_own_thread(self):
        calls = []
        threads = []

        def on_connection(client):
            threads.append(threading.get_ident())
            client.on_close(lambda c: calls.append((c, threading.get_ident())))

        server = self.serve(on_connection)
        peer = self.connect(server)
        wait_until(lambda: server.clients)
        (client,) = server.clients
        self.assertEqual(calls, [])
        peer.close()
        wait_until(lambda: calls)
        self.assertEqual(calls, [(client, threads[0])])
        client.close()
        self.assertEqual(len(calls), 1)

    def test_calls_on_close_at_once_when_it_has_ended(self):
        client, _ = self.open()
        client.close()
        calls = []
        client.on_close(calls.append)
        self.assertEqual(calls, [client])

    def test_calls_every_callback_even_if_one_fails(self):
        client, peer = self.open()
        calls = []
        client.on_close(lambda _: 1 / 0)
        client.on_close(calls.append)
        with self.logged() as records:
            peer.close()
            wait_until(lambda: calls)
        self.assertEqual([r.exc_info[0] for r in records], [ZeroDivisionError])

    def test_is_kept_alive_by_comments(self):
        client, peer = self.open(keepalive=0.05)
        for _ in range(3):
            peer.chunk()
        self.assertEqual(peer.reader.comments, [" ok", " keep-alive", " keep-alive"])
        self.assertEqual(peer.reader.blank_lines, 1)  # that of the first frame
        client.send("x")
        self.assertEqual(peer.data(), "x")

    def test_is_kept_alive_only_when_it_was_silent(self):
        def on_connection(client):
            for _ in range(10):
                client.send("x")
                client.wait(0.05)
            client.close()

        server = self.serve(on_connection, keepalive=0.4)
        reader = self.connect(server).finish()
        self.assertEqual(len(reader.events), 10)
        self.assertEqual(reader.comments, [" ok"])

    def test_is_not_kept_alive_where_none_is_asked_for(self):
        clients = []

        def on_connection(client):
            clients.append(client)
            client.wait(0.2)
            client.close()

        peer = self.connect(self.serve(on_connection, keepalive=None))
        self.assertEqual(peer.finish().comments, [" ok"])
        self.assertEqual(clients[0]._keepalive, float("inf"))


class AsNpmSse(ServerCase):
    """What the npm package's own tests ask, case for case, with the same bytes."""

    def sent(self, *arguments, **fields):
        """Send one event and close; return the stream without its comments."""

        def on_connection(client):
            client.send(*arguments, **fields)
            client.close()

        peer = self.connect(self.serve(on_connection))
        frames = b"".join(iter(peer.chunk, b""))
        return re.sub(rb"^:[^\n]*\n\n", b"", frames)

    def is_stream(self, server, path):
        return self.connect(server, path).fields["Content-Type"] == "text/event-stream"

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
        fields = self.connect(self.serve()).fields
        self.assertEqual(fields["Content-Type"], "text/event-stream")
        self.assertEqual(fields["Cache-Control"], "no-cache, no-transform")

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


class Flood:
    """Frames that are too much for the kernel's buffers on the way to `peer`."""

    SIZE = 100_000

    def __init__(self, send, megabytes=24):
        self.count = megabytes * 10
        self.send = send

    def __call__(self, *_):
        for number in range(self.count):
            self.send(f"{number}:".ljust(self.SIZE, "x"))

    def check(self, case, peer):
        for number in range(self.count):
            data = peer.data()
            case.assertEqual(len(data), self.SIZE)
            case.assertTrue(data.startswith(f"{number}:"), data[:20])


class ASlowReader(ServerCase):
    """The backlog."""

    def test_delays_no_other_thread_and_loses_nothing(self):
        client, peer = self.open(max_backlog=2**30)
        flood = Flood(client.send)
        begun = time.monotonic()
        flood()  # the peer reads nothing yet
        self.assertLess(time.monotonic() - begun, PATIENCE / 2)
        flood.check(self, peer)
        client.close()
        peer.finish()

    def test_slows_its_own_thread_to_its_pace(self):
        progress = []

        def on_connection(client):
            flood = Flood(client.send)
            flood.send = lambda text: (client.send(text), progress.append(1))
            flood()
            client.close()

        server = self.serve(on_connection, max_backlog=1)
        peer = self.connect(server)
        flood = Flood(None)
        wait_until(lambda: progress)
        seen = -1
        while len(progress) != seen:  # until it stands still
            seen = len(progress)
            time.sleep(0.1)
        self.assertLess(seen, flood.count)
        (client,) = server.clients
        self.assertLess(len(client._backlog), flood.SIZE + 100)
        flood.check(self, peer)
        peer.finish()

    def test_gets_a_piece_larger_than_its_backlog_may_be(self):
        client, peer = self.open(max_backlog=1000)
        client.send("x" * 20_000_000)
        self.assertEqual(len(peer.data()), 20_000_000)
        wait_until(lambda: not client._backlog)
        client.send("y")
        self.assertEqual(peer.data(), "y")

    def test_over_its_backlog_is_cut_off_alone(self):
        server = self.serve(max_backlog=200_000)
        slow, quick = self.connect(server), self.connect(server)
        wait_until(lambda: len(server.clients) == 2)
        clients = {client.address: client for client in server.clients}
        with self.logged() as records:
            with self.assertRaises(BrokenPipeError):
                Flood(clients[slow.socket.getsockname()].send)()
            wait_until(lambda: records)
        self.assertIn("reads too slowly", records[0].getMessage())
        clients[quick.socket.getsockname()].send("unharmed")
        self.assertEqual(quick.data(), "unharmed")
        with self.assertRaises((ConnectionResetError, EOFError)):
            slow.finish()
        self.assertEqual(server.clients, {clients[quick.socket.getsockname()]})

    def test_that_has_stopped_is_cut_off(self):
        with mock.patch.object(Client, "stall_timeout", 0.2), self.logged() as records:
            client, peer = self.open(max_backlog=2**30, keepalive=None)
            with contextlib.suppress(BrokenPipeError):
                Flood(client.send)()
            wait_until(lambda: client.closed)
            wait_until(lambda: records)
        self.assertIn("has stopped reading", records[0].getMessage())
        with self.assertRaises((ConnectionResetError, EOFError)):
            peer.finish()

    def test_that_goes_on_in_time_is_not(self):
        with mock.patch.object(Client, "stall_timeout", 0.6):
            client, peer = self.open(max_backlog=2**30)
            flood = Flood(client.send, megabytes=40)
            flood()
            for number in range(flood.count):
                self.assertTrue(peer.data().startswith(f"{number}:"))
                if number % 20 == 0:
                    time.sleep(0.06)

    def test_gets_all_that_was_sent_before_the_close(self):
        client, peer = self.open(max_backlog=2**30)
        flood = Flood(client.send)
        flood()
        client.close()
        with self.assertRaises(BrokenPipeError):
            client.send("too late")
        flood.check(self, peer)
        self.assertEqual(peer.finish().events, [])

    def test_whose_buffers_are_full_gets_it_later(self):
        client, peer = self.open()
        peer.chunk()

        class Full:
            def __getattr__(self, name):
                return getattr(sock, name)

            def send(self, _):
                client._socket = sock
                raise BlockingIOError

        with client._lock:
            sock, client._socket = client._socket, Full()
        client.send("x")
        self.assertEqual(peer.data(), "x")

    def test_that_leaves_takes_its_backlog_with_it(self):
        client, peer = self.open(max_backlog=2**30)
        Flood(client.send)()
        peer.close()
        wait_until(lambda: client.closed)
        self.assertFalse(client._backlog)

    def test_frees_its_own_thread_by_leaving(self):
        ended = threading.Event()

        def on_connection(client):
            try:
                Flood(client.send)()
            except BrokenPipeError:
                ended.set()
                raise

        server = self.serve(on_connection)
        peer = self.connect(server)
        wait_until(lambda: any(client._backlog for client in server.clients))
        with self.logged() as records:
            peer.close()
            self.assertTrue(ended.wait(PATIENCE))
        self.assertEqual(records, [])


class ChannelCase(ServerCase):
    def channel(self, **options):
        channel = Channel(**options)
        self.addCleanup(channel.close)
        return channel

    def subscribers(self, channel, count, **options):
        server = self.serve(channel.subscribe, **options)
        peers = [self.connect(server) for _ in range(count)]
        wait_until(lambda: len(channel.clients) == count, "the subscribers")
        return peers

    def blocked(self, channel):
        """Keep the channel's thread from delivering until the event is set."""
        entered, free = threading.Event(), threading.Event()
        self.addCleanup(free.set)
        blocker = mock.Mock(_chunked=False, closed=False)
        blocker._offer = lambda _: entered.set() or free.wait(PATIENCE)
        with channel._lock:
            channel._clients[blocker] = channel._count
        channel.publish("first")
        self.assertTrue(entered.wait(PATIENCE))
        channel.unsubscribe(blocker)
        return free


class AChannel(ChannelCase):
    """Channel: publish once, reach all."""

    def test_reaches_every_subscriber(self):
        channel = self.channel()
        peers = self.subscribers(channel, 5)
        id_ = channel.publish("hello", event="greeting")
        for peer in peers:
            self.assertEqual(peer.event(), ("greeting", "hello", id_))

    def test_reaches_nobody_where_nobody_is(self):
        channel = self.channel()
        channel.publish("a")
        (peer,) = self.subscribers(channel, 1)
        channel.publish("b")
        self.assertEqual(peer.data(), "b")  # who is new gets what is new

    def test_numbers_its_events(self):
        channel = self.channel()
        ids = [channel.publish("x") for _ in range(3)]
        epoch = ids[0].rpartition("-")[0]
        self.assertEqual(ids, [f"{epoch}-{n}" for n in (1, 2, 3)])
        self.assertRegex(epoch, r"^[\w-]+$")
        self.assertFalse(self.channel().publish("x").startswith(epoch))

    def test_takes_ids_that_it_is_given(self):
        channel = self.channel()
        (peer,) = self.subscribers(channel, 1)
        self.assertEqual(channel.publish("a", id="x"), "x")
        self.assertEqual(channel.publish("b", id=7), "7")
        self.assertEqual(channel.publish("c", id=""), "")
        self.assertEqual(
            channel.publish(event="d"), "".join(channel.publish("e")[:-1]) + "4"
        )
        events = [peer.event() for _ in range(3)]
        wanted = [("message", "a", "x"), ("message", "b", "7"), ("message", "c", "")]
        self.assertEqual(events, wanted)

    def test_refuses_an_event_without_using_up_its_id(self):
        channel = self.channel()
        (peer,) = self.subscribers(channel, 1)
        first = channel.publish("a")
        for error, fields in (
            (ValueError, {}),
            (ValueError, {"data": "\ud800"}),
            (ValueError, {"data": "x", "event": "\n"}),
            (ValueError, {"data": "x", "id": "\0"}),
            (TypeError, {"data": b"x"}),
        ):
            with self.assertRaises(error):
                channel.publish(**fields)
        self.assertEqual(channel.publish("b"), first[:-1] + "2")
        self.assertEqual([peer.data(), peer.data()], ["a", "b"])

    def test_keeps_the_order_of_each_publishing_thread(self):
        channel = self.channel(history=10)
        peers = self.subscribers(channel, 3)

        def publish(name):
            for number in range(500):
                channel.publish(f"{name} {number}")

        threads = [threading.Thread(target=publish, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sequences = [[peer.event() for _ in range(2000)] for peer in peers]
        self.assertEqual(sequences[0], sequences[1])
        self.assertEqual(sequences[0], sequences[2])
        numbers = [int(id_.rpartition("-")[2]) for _, _, id_ in sequences[0]]
        self.assertEqual(numbers, list(range(1, 2001)))
        for name in range(4):
            mine = [d for _, d, _ in sequences[0] if d.startswith(f"{name} ")]
            self.assertEqual(mine, [f"{name} {number}" for number in range(500)])

    def test_writes_a_burst_at_once(self):
        channel = self.channel()
        (peer,) = self.subscribers(channel, 1)
        free = self.blocked(channel)
        for number in range(1000):
            channel.publish(str(number))
        free.set()
        while len(peer.reader.events) < 1001:
            size = len(peer.chunk())
        self.assertGreater(size, 999 * len("data: 0\n\n"))

    def test_writes_no_more_than_a_piece_at_once(self):
        channel = self.channel()
        (peer,) = self.subscribers(channel, 1)
        free = self.blocked(channel)
        for _ in range(100):
            channel.publish("x" * 10_000)
        free.set()
        sizes = []
        while len(peer.reader.events) < 101:
            sizes.append(len(peer.chunk()))
        self.assertLess(max(sizes), channel.piece_size + 10_100)
        self.assertEqual(len(sizes), 6)  # ": ok", "first", and a megabyte in four

    def test_gives_nothing_to_who_comes_after_it_was_published(self):
        for version in ("HTTP/1.1", "HTTP/1.0"):
            channel = self.channel()
            server = self.serve(channel.subscribe)
            early = self.connect(server)
            wait_until(lambda channel=channel: channel.clients)
            free = self.blocked(channel)
            channel.publish("old")
            late = self.connect(server, version=version)
            wait_until(lambda channel=channel: len(channel.clients) == 2)
            channel.publish("new")
            latest = self.connect(server)
            wait_until(lambda channel=channel: len(channel.clients) == 3)
            free.set()
            wait_until(lambda channel=channel: not channel._pending)
            channel.publish("last")
            self.assertEqual(
                [early.data() for _ in range(4)][1:], ["old", "new", "last"]
            )
            if version == "HTTP/1.0":
                while b"last" not in late.file.readline():
                    pass
            else:
                self.assertEqual([late.data(), late.data()], ["new", "last"])
            self.assertEqual(latest.data(), "last")

    def test_never_waits_for_a_reader(self):
        channel = self.channel(history=0)
        server = self.serve(channel.subscribe, max_backlog=2**20)
        stuck = [self.connect(server) for _ in range(3)]
        healthy = self.connect(server)
        wait_until(lambda: len(channel.clients) == 4)
        got = []
        reader = threading.Thread(
            target=lambda: got.extend(healthy.data() for _ in range(200))
        )
        reader.start()
        slowest = 0
        with self.logged():
            for number in range(200):
                begun = time.monotonic()
                channel.publish(f"{number} ".ljust(100_000, "x"))
                slowest = max(slowest, time.monotonic() - begun)
                wait_until(lambda number=number: len(got) >= number - 5)
            reader.join()
            wait_until(lambda: len(channel.clients) == 1)
        self.assertLess(slowest, 1)
        self.assertEqual([int(data.split()[0]) for data in got], list(range(200)))
        for peer in stuck:
            with self.assertRaises((ConnectionResetError, EOFError)):
                peer.finish()

    def test_lets_go_at_once_of_who_leaves(self):
        channel = self.channel()
        peers = self.subscribers(channel, 2)
        peers[0].close()
        wait_until(lambda: len(channel.clients) == 1)
        wait_until(lambda: len(channel._clients) == 1)
        self.assertIsInstance(channel.clients, frozenset)

    def test_knows_the_open_clients_alone(self):
        channel = self.channel()
        self.subscribers(channel, 2)
        next(iter(channel.clients)).close()
        self.assertEqual(len(channel.clients), 1)

    def test_sends_no_more_to_who_unsubscribed(self):
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

    def test_shares_its_clients_with_others(self):
        one, two = self.channel(), self.channel(history=0)

        def on_connection(client):
            one.subscribe(client)
            two.subscribe(client)
            one.subscribe(client)  # again changes nothing

        peer = self.connect(self.serve(on_connection))
        wait_until(lambda: one.clients and two.clients)
        (client,) = one.clients

        def repeat(call, name):
            for number in range(300):
                call(f"{name}\n{number}")

        calls = {"one": one.publish, "two": two.publish, "direct": client.send}
        threads = [
            threading.Thread(target=repeat, args=(call, name))
            for name, call in calls.items()
        ]
        for thread in threads:
            thread.start()
        got = [peer.data().split("\n") for _ in range(900)]
        for thread in threads:
            thread.join()
        for name in calls:
            numbers = [int(number) for sender, number in got if sender == name]
            self.assertEqual(numbers, list(range(300)))

    def test_starts_its_thread_when_needed_and_ends_it(self):
        before = threading.active_count()
        channel = Channel()
        channel.publish("nobody hears it")
        self.assertEqual(threading.active_count(), before)
        self.assertTrue(channel)  # also without clients
        channel.close()
        self.assertEqual(threading.active_count(), before)

    def test_delivers_when_closed_what_was_published(self):
        channel = self.channel()
        (peer,) = self.subscribers(channel, 1)
        free = self.blocked(channel)
        channel.publish("last")
        closing = threading.Thread(target=channel.close)
        closing.start()
        wait_until(lambda: channel._closed)
        free.set()
        closing.join()
        self.assertEqual([peer.data(), peer.data()], ["first", "last"])
        (client,) = channel.clients
        client.send("open still")
        self.assertEqual(peer.data(), "open still")

    def test_takes_no_more_when_closed(self):
        channel = self.channel()
        self.subscribers(channel, 1)
        (client,) = channel.clients
        channel.close()
        channel.close()  # again does no harm
        with self.assertRaisesRegex(RuntimeError, "closed"):
            channel.publish("x")
        with self.assertRaisesRegex(RuntimeError, "closed"):
            channel.subscribe(client)

    def test_refuses_what_makes_no_sense(self):
        with self.assertRaises(ValueError):
            Channel(history=-1)
        with self.assertRaises(ValueError):
            Channel(gap_event="a\nb")


class AReconnect(ChannelCase):
    """Channel: what was missed meanwhile."""

    def resume(self, channel, last_id, count):
        """Reconnect, and return so many events."""
        server = self.serve(channel.subscribe)
        peer = self.connect(server, Last_Event_ID=last_id)
        events = [peer.event() for _ in range(count)]
        wait_until(lambda: channel.clients)
        channel.publish("live")
        self.assertEqual(peer.data(), "live")
        self.stop_stream(channel, peer)
        return events

    def stop_stream(self, channel, peer):
        peer.close()
        wait_until(lambda: not channel.clients)

    def test_gets_what_it_missed(self):
        channel = self.channel()
        ids = [channel.publish(str(number)) for number in range(5)]
        events = self.resume(channel, ids[1], 3)
        wanted = [("message", str(n), ids[n]) for n in (2, 3, 4)]
        self.assertEqual(events, wanted)
        self.resume(channel, channel.publish("newest"), 0)

    def test_gets_it_once_even_if_it_subscribes_twice(self):
        channel = self.channel()
        first = channel.publish("a")
        channel.publish("b")

        def on_connection(client):
            channel.subscribe(client)
            channel.subscribe(client)
            client.send("c")

        peer = self.connect(self.serve(on_connection), Last_Event_ID=first)
        self.assertEqual([peer.data(), peer.data()], ["b", "c"])

    def test_by_ids_of_ones_own_gets_what_it_missed(self):
        channel = self.channel()
        for number in range(5):
            channel.publish(str(number), id=f"offset/{number}é")
        events = self.resume(channel, "offset/2é", 2)
        self.assertEqual([data for _, data, _ in events], ["3", "4"])

    def test_counts_from_the_later_one_of_two_with_one_id(self):
        channel = self.channel(history=4)
        for id_, data in (("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")):
            channel.publish(data, id=id_)
        self.assertEqual(self.resume(channel, "a", 1), [("message", "4", "c")])
        channel.publish("5", id="d")  # now the earlier "a" is not held any more
        events = self.resume(channel, "a", 3)
        self.assertEqual([data for _, data, _ in events], ["4", "live", "5"])

    def test_is_told_of_a_gap_and_gets_all_that_is_held(self):
        channel = self.channel(history=3)
        ids = [channel.publish(str(number)) for number in range(5)]
        for lost in (ids[0], ids[1], "of-yesterday-7", "é"):
            events = self.resume(channel, lost, 4)
            self.assertEqual(events[0][:2], ("gap", lost))
            held = [data for _, data, _ in events[1:]]
            self.assertEqual(len(held), 3)
            self.assertEqual(events[1:], [e for e in events[1:] if e[0] == "message"])

    def test_is_told_of_a_gap_by_the_name_chosen(self):
        channel = self.channel(gap_event="lost")
        channel.publish("a")
        self.assertEqual(self.resume(channel, "x", 2)[0][:2], ("lost", "x"))

    def test_is_not_told_of_a_gap_where_none_is_wanted(self):
        channel = self.channel(gap_event=None)
        channel.publish("a")
        self.assertEqual(self.resume(channel, "x", 1)[0][:2], ("message", "a"))

    def test_to_a_new_start_finds_one_gap_and_then_none(self):
        channel = self.channel()
        server = self.serve(channel.subscribe)
        peer = self.connect(server, Last_Event_ID="of-yesterday-7")
        kind, data, id_ = peer.event()
        self.assertEqual((kind, data), ("gap", "of-yesterday-7"))
        self.assertTrue(id_.endswith("-0"))
        self.stop_stream(channel, peer)
        first = channel.publish("a")
        self.assertEqual(self.resume(channel, id_, 1), [("message", "a", first)])
        small = self.channel(history=2)
        epoch = small.publish("1").rpartition("-")[0]
        small.publish("2")
        events = self.resume(small, f"{epoch}-0", 2)
        self.assertEqual([data for _, data, _ in events], ["1", "2"])
        events = self.resume(small, f"{epoch}-0", 3)  # "1" is lost by now
        self.assertEqual([kind for kind, _, _ in events], ["gap", "message", "message"])

    def test_gets_no_replay_and_no_gap_without_history(self):
        channel = self.channel(history=0)
        self.assertEqual(channel.publish("a"), "")
        self.assertEqual(channel.publish("b", id=5), "5")
        self.resume(channel, "5", 0)
        self.resume(channel, "x", 0)
        self.assertEqual((len(channel._held), len(channel._numbers)), (0, 1))

    def test_finds_no_more_held_than_was_asked_for(self):
        channel = self.channel(history=10)
        for number in range(100):
            channel.publish("x", id=number if number % 3 else None)
        self.assertEqual(len(channel._held), 10)
        self.assertLessEqual(len(channel._numbers), 11)

    def test_does_not_copy_the_history_into_its_backlog(self):
        channel = self.channel(history=300)
        first = channel.publish("x")
        for _ in range(299):
            channel.publish("x" * 100_000)
        server = self.serve(channel.subscribe, max_backlog=2**20)
        peer = self.connect(server, Last_Event_ID=first)
        wait_until(lambda: any(client._backlog for client in server.clients))
        (client,) = server.clients
        for _ in range(299):
            self.assertLess(len(client._backlog), 2**20)
            self.assertEqual(len(peer.data()), 100_000)

    def test_that_is_overtaken_by_the_history_is_told_so(self):
        channel = self.channel(history=100)
        first = channel.publish("0")
        for number in range(1, 100):
            channel.publish(f"{number} ".ljust(100_000))
        server = self.serve(channel.subscribe)
        peer = self.connect(server, Last_Event_ID=first)
        wait_until(lambda: any(client._backlog for client in server.clients))
        for number in range(100, 300):
            channel.publish(f"{number} ".ljust(100_000))
        place, gaps = 0, 0
        while place < 299:
            kind, data, _ = peer.event()
            if kind == "gap":
                gaps += 1
                self.assertTrue(data.endswith(f"-{place + 1}"), (data, place))
                place = int(peer.event()[1])
            else:
                self.assertEqual(int(data), place + 1)
                place += 1
        self.assertGreater(gaps, 0)

    def test_that_leaves_again_meanwhile_is_not_kept(self):
        channel = self.channel(history=300)
        for _ in range(300):
            channel.publish("x" * 100_000)
        server = self.serve(channel.subscribe)
        peer = self.connect(server, Last_Event_ID="lost")
        wait_until(lambda: any(client._backlog for client in server.clients))
        peer.close()
        wait_until(lambda: not server._requests)
        self.assertFalse(channel._clients)

    def test_after_being_too_slow_gets_all_the_same(self):
        channel = self.channel(history=5000)
        server = self.serve(channel.subscribe, max_backlog=2**16)
        peer = self.connect(server)
        wait_until(lambda: channel.clients)
        channel.publish("0")
        got = [peer.event()]
        with self.logged():
            for number in range(1, 1000):
                channel.publish(f"{number} ".ljust(20_000))
                if not channel.clients:
                    break
            for later in range(number + 1, number + 10):
                channel.publish(str(later))
            wait_until(lambda: not server.clients)
            wait_until(lambda: not server._requests)
        with contextlib.suppress(ConnectionResetError, EOFError):
            while True:
                got.append(peer.event())
        last_id = got[-1][2]
        peer = self.connect(server, Last_Event_ID=last_id)
        while len(got) < number + 10:
            got.append(peer.event())
        self.assertEqual([int(data) for _, data, _ in got], list(range(number + 10)))

    def test_loses_and_doubles_nothing_while_four_threads_publish(self):
        channel = self.channel(history=10**6)
        server = self.serve(channel.subscribe)
        total, whole = 4 * 2500, []
        dice = random.Random(4)

        def publish(name):
            for number in range(total // 4):
                channel.publish(f"{name} {number}")
                if number % 100 == 0:
                    time.sleep(0.001)

        def follow(seed):
            dice = random.Random(seed)
            got, last_id = [], f"{channel._epoch}-0"
            while len(got) < total:
                peer = Peer(server, Last_Event_ID=last_id).read_head()
                for _ in range(min(dice.randrange(1, 3000), total - len(got))):
                    got.append(peer.event())
                last_id = got[-1][2]
                dice.choice([Peer.close, Peer.reset])(peer)
            whole.append(got)

        threads = [
            threading.Thread(target=follow, args=(dice.random(),)) for _ in range(8)
        ]
        threads += [threading.Thread(target=publish, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(whole), 8)
        for got in whole:
            numbers = [int(id_.rpartition("-")[2]) for _, _, id_ in got]
            self.assertEqual(numbers, list(range(1, total + 1)))
            self.assertEqual(got, whole[0])


class AnySelector(ServerCase):
    """What a system offers to wait with does not matter."""

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
        for selector in self.SELECTORS:
            forced = mock.patch.object(selectors, "DefaultSelector", selector)
            with self.subTest(selector.__name__), forced:
                yield self.open(max_backlog=2**30)

    def test_notices_the_peers_leaving(self):
        for client, peer in self.each():
            peer.close()
            wait_until(lambda client=client: client.closed)

    def test_carries_out_a_backlog_left_by_another_thread(self):
        for client, peer in self.each():
            wait_until(lambda client=client: client._armed)  # its thread is asleep
            for _ in range(2):
                flood = Flood(client.send)
                flood()
                flood.check(self, peer)
                wait_until(lambda client=client: not client._backlog)
            client.close()
            peer.finish()

    def test_notices_a_close_by_another_thread(self):
        for client, peer in self.each():
            client.close()
            peer.finish()

    def test_bears_sending_closing_and_leaving_at_once(self):
        for selector in self.SELECTORS:
            with mock.patch.object(selectors, "DefaultSelector", selector):
                server = self.serve(max_backlog=2**30)
                with self.subTest(selector.__name__), self.logged() as records:
                    for turn in range(30):
                        self.fight(server, turn)
                    wait_until(lambda server=server: not server._requests)
                self.assertEqual(records, [])

    def fight(self, server, turn):
        peer = Peer(server).read_head()
        wait_until(lambda: server.clients)
        (client,) = server.clients
        start = threading.Barrier(5)
        wrong = []

        def at_once(action):
            start.wait()
            try:
                action()
            except BrokenPipeError:
                pass
            except Exception as error:  # noqa: BLE001
                wrong.append(error)

        big = Flood(client.send, megabytes=2)
        actions = [big, big, Peer.close if turn % 3 else Peer.reset, client.close]
        arguments = [(), (), (peer,), ()]
        if turn % 2:
            actions[3] = big
        threads = [
            threading.Thread(target=at_once, args=(lambda a=a, b=b: a(*b),))
            for a, b in zip(actions, arguments)
        ]
        for thread in threads:
            thread.start()
        start.wait()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])
        wait_until(lambda: not server.clients)

    @unittest.skipUnless(Path("/proc/self/fd").exists(), "needs /proc")
    def test_needs_one_descriptor_a_stream(self):
        server = self.serve()
        first = self.connect(server)
        wait_until(lambda: all(c._armed for c in server.clients) and server.clients)
        before = descriptors()
        for _ in range(20):
            self.connect(server)
        wait_until(lambda: len(server.clients) == 21)
        wait_until(lambda: all(client._armed for client in server.clients))
        # Two for each peer here, its socket's and none for the file: so one and one.
        self.assertEqual(descriptors() - before, 40)
        self.assertTrue(first.status)


class ARequest(ServerCase):
    """SSERequestHandler: what is answered to what."""

    def test_for_anything_but_the_stream_gets_okay_and_a_fin(self):
        server = self.serve()
        for path in (b"/", b"/x?y", b"/sse/", b"/ss", b"/sse.", b"*"):
            answer = self.ask(server, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            head, _, body = answer.partition(b"\r\n\r\n")
            self.assertEqual(body, b"okay")
            status, *fields = head.split(b"\r\n")
            self.assertEqual(status, b"HTTP/1.1 200 OK")
            self.assertIn(b"Content-Type: text/plain", fields)
            self.assertIn(b"Content-Length: 4", fields)
            self.assertEqual(fields.count(b"Connection: close"), 1)
            self.assertIn(b"Server: sse_ref", fields)

    def test_for_the_stream_gets_its_head(self):
        peer = self.connect(self.serve())
        self.assertEqual(peer.status, b"HTTP/1.1 200 OK\r\n")
        fields = dict(peer.fields)
        self.assertTrue(fields.pop("Date"))
        self.assertEqual(
            fields,
            {
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache, no-transform",
                "X-Accel-Buffering": "no",
                "Connection": "close",
                "Transfer-Encoding": "chunked",
                "Server": "sse_ref",
            },
        )

    def test_for_the_stream_gets_head_and_first_frame_in_one_write(self):
        for options, frame in (({}, b": ok\n\n"), ({"retry": 50}, b"retry: 50\n\n")):
            server = self.serve(**options)
            peer = Peer(server)
            self.addCleanup(peer.close)
            head, _, body = peer.socket.recv(65536).partition(b"\r\n\r\n")
            self.assertTrue(head)
            self.assertEqual(body, b"%x\r\n%b\r\n" % (len(frame), frame))

    def test_finds_nagle_off_and_keepalive_on(self):
        client, _ = self.open()
        sock = client._socket
        self.assertTrue(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            option = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            self.assertEqual(option, 30_000)
        if hasattr(socket, "TCP_KEEPIDLE"):  # idle + interval * count: within 60 s
            idle, interval, count = (
                sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
            )
            self.assertLess(idle + interval * count, 60)

    def test_by_http_1_0_gets_the_stream_plain(self):
        server = self.serve(lambda client: (client.send("a"), client.close()))
        answer = self.ask(server, b"GET /sse HTTP/1.0\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        self.assertNotIn(b"Transfer-Encoding", head)
        self.assertEqual(body, b": ok\n\ndata: a\n\n")

    def test_by_http_1_0_is_kept_alive_plain_and_leaves_no_last_chunk(self):
        server = self.serve(lambda client: client.wait(0.2) or client.close())
        server.keepalive = 0.15
        answer = self.ask(server, b"GET /sse HTTP/1.0\r\n\r\n")
        self.assertTrue(answer.endswith(b"\r\n\r\n: ok\n\n: keep-alive\n"), answer)

    def test_by_http_0_9_gets_no_head(self):
        server = self.serve(lambda client: (client.send("a"), client.close()))
        self.assertEqual(self.ask(server, b"GET /\r\n\r\n"), b"okay")
        frames = b": ok\n\ndata: a\n\n"
        self.assertEqual(self.ask(server, b"GET /sse\r\n\r\n"), frames)

    def test_by_urllib_gets_each_event_at_once(self):
        client_ready = []
        server = self.serve(client_ready.append)
        url = f"http://localhost:{server.server_port}/sse"
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            self.assertEqual(response.readline(), b": ok\n")
            self.assertEqual(response.readline(), b"\n")
            wait_until(lambda: client_ready)
            for number in range(5):
                sent = time.monotonic()
                client_ready[0].send(str(number))
                self.assertEqual(response.readline(), b"data: %d\n" % number)
                self.assertLess(time.monotonic() - sent, 0.15)
                self.assertEqual(response.readline(), b"\n")

    def test_by_head_gets_the_head_alone(self):
        calls = []
        server = self.serve(calls.append)
        for path in (b"/", b"/sse"):
            request = path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
            head = self.ask(server, b"HEAD " + request)
            self.assertTrue(head.startswith(b"HTTP/1.1 200 OK\r\n"))
            self.assertTrue(head.endswith(b"\r\n\r\n"))
            self.assertEqual(head.count(b"\r\n\r\n"), 1)
            peer = Peer(server, head=b"GET " + request)
            self.addCleanup(peer.close)
            got = b""
            while b"\r\n\r\n" not in got:
                got += peer.socket.recv(65536)
            dates = re.compile(rb"Date: .*")
            got = got[: got.index(b"\r\n\r\n") + 4]
            self.assertEqual(dates.sub(b"", head), dates.sub(b"", got))
        wait_until(lambda: calls)
        self.assertEqual(len(calls), 1)  # the GET's

    def test_by_head_is_not_asked_for_a_body(self):
        request = b"HEAD / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n"
        answer = self.ask(self.serve(), request)
        self.assertTrue(answer.startswith(b"HTTP/1.1 200 "), answer)

    def test_may_be_served_by_pages_of_ones_own(self):
        class Pages(QuietHandler):
            def serve_plain(self):
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(b"<p>" * 100_000)

        server = self.serve(handler=Pages)
        head = self.ask(server, b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertTrue(head.endswith(b"text/html\r\n\r\n"), head)
        self.assertIn(b"Connection: close\r\n", head)
        page = self.ask(server, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertEqual(len(page.partition(b"\r\n\r\n")[2]), 300_000)
        self.assertEqual(self.connect(server).fields["X-Accel-Buffering"], "no")

    def test_may_be_served_by_a_handler_with_arguments_bound_to_it(self):
        class Files(QuietHandler, SimpleHTTPRequestHandler):
            def serve_plain(self):
                SimpleHTTPRequestHandler.do_GET(self)

        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "a.txt").write_text("a file")
            server = self.serve(handler=functools.partial(Files, directory=folder))
            page = self.ask(server, b"GET /a.txt HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(page.endswith(b"\r\n\r\na file"), page)
            head = self.ask(server, b"HEAD /a.txt HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertIn(b"Content-Length: 6\r\n", head)
            self.assertTrue(head.endswith(b"\r\n\r\n"), head)
            self.assertEqual(self.connect(server).chunk(), b": ok\n\n")

    def test_by_another_known_method_gets_405(self):
        server = self.serve()
        methods = ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE")
        for method in methods:
            for path in ("/", "/sse"):
                request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
                answer = self.ask(server, request.encode())
                self.assertTrue(answer.startswith(b"HTTP/1.1 405 Method Not All"))
                self.assertIn(b"\r\nAllow: GET, HEAD\r\n", answer)
                self.assertTrue(answer.endswith(b"\n"))

    def test_by_a_method_of_ones_own_is_served_and_others_are_not(self):
        class Posting(QuietHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(200, body.decode()[::-1])

        server = self.serve(handler=Posting)
        rest = b" / HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n"
        answer = self.ask(server, b"POST" + rest + b"ab" * 150_000)
        self.assertTrue(answer.endswith(b"\r\n\r\n" + b"ba" * 150_000))
        for method in (b"OPTIONS", b"PUT"):
            answer = self.ask(server, method + rest)
            self.assertTrue(answer.startswith(b"HTTP/1.1 405 "), answer)

    def test_by_an_unknown_method_gets_501(self):
        server = self.serve()
        for method in ("FOO", "get", "plain", "serve_plain", "__init__"):
            request = f"{method} / HTTP/1.1\r\nHost: localhost\r\n\r\n"
            answer = self.ask(server, request.encode())
            self.assertTrue(answer.startswith(b"HTTP/1.1 501 "), answer)

    def test_that_is_none_gets_an_answer_or_a_close(self):
        server = self.serve()
        line = b"A: ".ljust(60_000, b"b") + b"\r\n"
        for request, answer in (
            (b"\r\n", b""),
            (b"GET / HTTP/9.9\r\n\r\n", b"HTTP/1.1 505 "),
            (b"GET / x y z\r\n\r\n", b"HTTP/1.1 400 "),
            (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", b"HTTP/1.1 414 "),
            (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"HTTP/1.1 431 "),
            (b"\x16\x03\x01\x02\r\n", b"HTTP/1.1 400 "),  # TLS, say
            (b"x" * 5_000_000, b"HTTP/1.1 414 "),  # most of it unread, yet answered
            (b"GET / HTTP/1.1\r\n" + line * 2 + b"\r\n", b"HTTP/1.1 200 "),
            (b"GET / HTTP/1.1\r\n" + line * 3 + b"\r\n", b"HTTP/1.1 431 "),
        ):
            self.assertEqual(self.ask(server, request)[: len(answer)], answer)

    def test_with_a_body_gets_its_answer_all_the_same(self):
        # To close a socket with unread input would reset the connection.
        server = self.serve()
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n"
        with self.logged() as records:
            answer = self.ask(server, head + b"x" * 3_000_000)
            self.assertTrue(answer.startswith(b"HTTP/1.1 405 "))
            chunked = head.replace(b"Content-Length: 3000000", b"Transfer-Encoding: x")
            for request in (head, chunked):
                peer = Peer(server, head=request).read_head()
                self.addCleanup(peer.close)
                self.assertTrue(peer.file.read())  # and the server's FIN
                peer.socket.sendall(b"x" * 1000)  # is read, not answered with an RST
                peer.socket.shutdown(socket.SHUT_WR)
                wait_until(lambda: not server._requests)
                self.assertEqual(peer.socket.recv(1), b"")
        self.assertEqual(records, [])

    def test_that_never_ends_is_not_read_for_ever(self):
        class Hasty(QuietHandler):
            linger = 0.2

        server = self.serve(handler=Hasty)
        with socket.create_connection(server.server_address, PATIENCE) as peer:
            peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n\r\n")
            with self.assertRaises(ConnectionError):
                while True:
                    peer.sendall(b"x" * 1000)
                    time.sleep(0.01)

    def test_that_is_reset_is_no_error(self):
        server = self.serve()
        with self.logged(), mock.patch("sys.stderr", io.StringIO()) as stderr:
            for head in (
                b"",
                b"GET /",
                b"GET / HTTP/1.1\r\n",
                b"POST / HTTP/1.1\r\n\r\n",
            ):
                Peer(server, head=head).reset()
            self.assertIn(b"okay", self.ask(server, b"GET / HTTP/1.1\r\n\r\n"))
            wait_until(lambda: not server._requests)
        self.assertEqual(stderr.getvalue(), "")

    def test_whose_page_fails_is_logged(self):
        class Broken(QuietHandler):
            def serve_plain(self):
                raise ZeroDivisionError

        server = self.serve(handler=Broken)
        with self.logged() as records:
            self.assertEqual(self.ask(server, b"GET / HTTP/1.1\r\n\r\n"), b"")
            wait_until(lambda: records)
        self.assertEqual([r.exc_info[0] for r in records], [ZeroDivisionError])

    def test_is_logged_as_http_server_does(self):
        server = self.serve(handler=SSERequestHandler)
        with mock.patch("sys.stderr", io.StringIO()) as stderr:
            self.ask(server, b"GET /\x1b[2J HTTP/1.1\r\n\r\n")
            self.ask(server, b"FOO / HTTP/1.1\r\n\r\n")
        lines = stderr.getvalue()
        self.assertRegex(lines, r'127\.0\.0\.1 - - \[.*\] "GET /.*" 200 -\n')
        self.assertRegex(lines, r"code 501, message Unsupported method \('FOO'\)")


class ThePath(ServerCase):
    """Where the stream is."""

    def found(self, server, target):
        request = f"HEAD {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        return b"text/event-stream" in self.ask(server, request.encode())

    def check(self, path, yes, no):
        server = self.serve(path=path)
        for target in yes:
            self.assertTrue(self.found(server, target), f"{target} is not {path}")
        for target in no:
            self.assertFalse(self.found(server, target), f"{target} is {path}")

    def test_is_sse_by_default(self):
        server = self.serve()
        self.assertTrue(self.found(server, "/sse"))

    def test_can_be_configured(self):
        self.check("/something", ["/something"], ["/sse", "/", "/something/x"])

    def test_does_not_include_the_query(self):
        self.check("/sse", ["/sse?", "/sse?a=/b", "/sse?/"], ["/?/sse", "/x?/sse"])

    def test_begins_with_one_slash_or_more(self):
        self.check("/sse", ["//sse", "///sse"], ["/x//sse", "/sse//"])

    def test_may_come_with_scheme_and_host(self):
        self.check(
            "/sse",
            ["http://localhost/sse", "HTTPS://LOCALHOST:1//sse?y"],
            ["http://localhost", "http:///x/sse", "ftp://localhost/sse"],
        )

    def test_is_the_root_where_none_is_named(self):
        self.check("/", ["/", "//", "http://localhost", "http://localhost?x"], ["/x"])

    def test_has_a_wildcard_for_any_characters(self):
        self.check(
            "/something/*",
            ["/something/", "/something/a", "/something/a/b/c"],
            ["/something", "/somethingx", "/x/something/a"],
        )
        self.check("*", ["/", "/x", "x"], [])
        self.check("/*/b*c/*", ["/a/bc/", "/a/x/bxc/y", "//a/bc/"], ["/b/c", "/a/bc"])
        self.check("/a*a", ["/aa", "/aba"], ["/a", "/ab", "/ba"])

    def test_has_nothing_else_that_is_special(self):
        self.check("/a.b", ["/a.b"], ["/axb"])
        self.check("/[ab]+*", ["/[ab]+", "/[ab]+x"], ["/a", "/aa", "/b+"])

    def test_matches_in_no_time_whatever_the_path(self):
        begun = time.monotonic()
        path = "/" + "a" * 60_000
        self.assertFalse(sse_ref._matches("/*a*a*a*a*b", path))
        self.assertLess(time.monotonic() - begun, 1)

    def test_begins_with_a_slash_or_a_star(self):
        for path in ("", "sse", "http://localhost/sse"):
            with self.assertRaisesRegex(ValueError, "path must start with"):
                SSEServer(("127.0.0.1", 0), path=path)


class Authorization(ServerCase):
    """authorize."""

    def status(self, authorize, path=b"/sse"):
        server = self.serve(authorize=authorize)
        return self.ask(
            server, b"HEAD " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )

    def test_lets_in_by_true_alone(self):
        self.assertIn(b" 200 ", self.status(lambda _: True))
        for answer in (False, None, 1, "yes", [], 0, 99, 600, -1, 200.0, object()):
            self.assertIn(b"HTTP/1.1 403 ", self.status(lambda _, a=answer: a))

    def test_refuses_with_the_status_that_it_returns(self):
        for status in (401, 204, 302, 429, 503, 599):
            wanted = f"HTTP/1.1 {status} ".encode()
            self.assertTrue(self.status(lambda _, s=status: s).startswith(wanted))

    def test_by_204_sends_neither_body_nor_length(self):
        server = self.serve(authorize=lambda _: 204)
        answer = self.ask(server, b"GET /sse HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertTrue(answer.endswith(b"\r\n\r\n"))
        self.assertNotIn(b"Content-", answer)

    def test_says_in_one_line_what_was_refused(self):
        server = self.serve(authorize=lambda _: False)
        answer = self.ask(server, b"GET /sse HTTP/1.1\r\nHost: localhost\r\n\r\n")
        body = answer.partition(b"\r\n\r\n")[2]
        self.assertRegex(body, rb"^[^\n]*authorize[^\n]*\n$")

    def test_is_given_the_handler_with_its_headers(self):
        seen = []

        def authorize(handler):
            seen.append((handler.path, handler.headers["Cookie"]))
            return True

        server = self.serve(authorize=authorize)
        self.connect(server, "/sse?x", Cookie="a=b")
        self.assertEqual(seen, [("/sse?x", "a=b")])

    def test_that_fails_is_logged_and_answered_with_500(self):
        with self.logged() as records:
            answer = self.status(lambda _: 1 / 0)
        self.assertTrue(answer.startswith(b"HTTP/1.1 500 "))
        self.assertEqual([r.exc_info[0] for r in records], [ZeroDivisionError])

    def test_is_asked_for_streams_alone(self):
        self.assertIn(b" 200 ", self.status(lambda _: 1 / 0, b"/"))

    def test_keeps_on_connection_from_being_called(self):
        calls = []
        server = self.serve(calls.append, authorize=lambda _: False)
        self.connect(server)
        self.assertEqual(calls, [])


class WhoGetsIn(ServerCase):
    """Host, Origin, max_connections, head_timeout."""

    def head(self, server, *fields, target="/sse", method="HEAD", version="1.1"):
        lines = [f"{method} {target} HTTP/{version}", *fields, "", ""]
        answer = self.ask(server, "\r\n".join(lines).encode("latin-1"))
        head, _, self.body = answer.partition(b"\r\n\r\n")
        self.assertNotIn(b"HTTP/1.1 ", self.body)  # one answer
        status, *rest = head.decode("latin-1").split("\r\n")
        self.fields = dict(line.split(": ", 1) for line in rest)
        return int(status.split()[1])

    def check_hosts(self, server, status, hosts):
        for host in hosts:
            self.assertEqual(self.head(server, f"Host: {host}"), status, host)

    LOOKALIKES = (
        "evil.com",
        "127.0.0.1.evil.com",
        "localhost.evil.com",
        "evil.com:80",
        "localhost/evil",
        "localhost#.evil",
        "localhost?evil",
        "localhost@evil.com",
        "user@localhost",
        "localhost:80:80",
        "localhost:x",
        "localhost..",
        "localhost\\evil",
        "[::1].evil",
        "[::1",
        "::1",
        "[localhost]",
        "128.0.0.1",
        "0.0.0.0",
        "[::2]",
        "local host",
        ".",
        "",
        ":8080",
    )

    def test_on_loopback_are_this_machines_names(self):
        server = self.serve()
        self.check_hosts(
            server,
            200,
            (
                "localhost",
                "LocalHost:1",
                "localhost.",
                "localhost.:8080",
                "localhost:",
                "127.0.0.1",
                "127.1.2.3:99999",
                "[::1]",
                "[::1]:8080",
                "[0:0:0:0:0:0:0:1]",
                "[::ffff:127.0.0.1]",
            ),
        )
        self.check_hosts(server, 403, self.LOOKALIKES)

    def test_on_loopback_are_allowed_names_too(self):
        hosts = ["Box.Example", "::2", "[fd00::1]", "192.0.2.1", "dot.example."]
        server = self.serve(allowed_hosts=hosts)
        self.check_hosts(server, 403, self.LOOKALIKES[:18])
        names = (
            "box.example",
            "BOX.example.:80",
            "[::2]:1",
            "[fd00::1]",
            "dot.example",
        )
        self.check_hosts(server, 200, (*names, "192.0.2.1", "localhost"))
        self.check_hosts(
            self.serve(allowed_hosts="*" * 1 and ("*",)), 200, ["evil.com"]
        )

    def test_on_another_address_are_all_names(self):
        server = self.serve()
        with mock.patch("sse_ref._is_loopback", return_value=False):
            self.check_hosts(server, 200, ["evil.com", "localhost"])

    def test_must_name_one_host(self):
        server = self.serve()
        self.assertEqual(self.head(server), 400)
        self.assertEqual(self.head(server, version="1.0"), 200)
        for version in ("1.0", "1.1"):
            two = ("Host: localhost", "Host: evil.com")
            self.assertEqual(self.head(server, *two, version=version), 400)

    def test_may_name_the_host_in_the_target(self):
        server = self.serve()
        for target, status in (
            ("http://evil.com/sse", 403),
            ("http://[::1]:5/sse", 200),
        ):
            self.assertEqual(
                self.head(server, "Host: localhost", target=target), status, target
            )

    def test_do_not_matter_to_plain_pages(self):
        server = self.serve()
        fields = ("Host: evil.com", "Origin: http://elsewhere.example")
        self.assertEqual(self.head(server, *fields, target="/"), 200)
        self.assertEqual(self.head(server, target="/"), 200)

    def test_learn_in_one_line_why_they_do_not(self):
        server = self.serve()
        self.head(server, "Host: evil.com", method="GET")
        wanted = rb"^Host 'evil\.com' [^\n]*allowed_hosts[^\n]*--allow-host[^\n]*\n$"
        self.assertRegex(self.body, wanted)
        fields = ("Host: localhost", "Origin: http://a.b\x1b")
        self.head(server, *fields, method="GET")
        wanted = (
            rb"^Origin 'http://a\.b\\x1b' .*allowed_origins.*--allow-origin[^\n]*\n$"
        )
        self.assertRegex(self.body, wanted)

    def origin(self, server, origin, host="localhost:8080", **options):
        return self.head(server, f"Host: {host}", f"Origin: {origin}", **options)

    def test_are_pages_of_the_same_host_and_port(self):
        server = self.serve(allowed_hosts=["app.example"])
        for origin, host in (
            ("http://localhost:8080", "localhost:8080"),
            ("https://localhost:8080", "LOCALHOST:8080"),
            ("https://app.example", "app.example"),
            ("https://app.example", "app.example:443"),
            ("http://app.example", "app.example:80"),
            ("http://app.example:80", "app.example."),
            ("http://[::1]:5", "[::1]:5"),
        ):
            self.assertEqual(self.origin(server, origin, host), 200, origin)
            self.assertNotIn("Access-Control-Allow-Origin", self.fields)
        for origin, host in (
            ("http://localhost:8081", "localhost:8080"),
            ("http://localhost", "localhost:8080"),
            ("https://app.example", "app.example:80"),
            ("http://localhost:8080.evil", "localhost:8080"),
            ("http://evil/localhost:8080", "localhost:8080"),
            ("http://127.0.0.1:8080", "localhost:8080"),
            ("localhost:8080", "localhost:8080"),
            ("null", "localhost:8080"),
            ("", "localhost:8080"),
        ):
            self.assertEqual(self.origin(server, origin, host), 403, origin)

    def test_without_a_host_are_no_pages(self):
        server = self.serve()
        fields = ["Origin: http://None"]
        self.assertEqual(self.head(server, *fields, version="1.0"), 403)

    def test_are_pages_of_an_allowed_origin_that_may_read_it(self):
        origins = ["https://App.example", "http://b.example:81", "null"]
        server = self.serve(allowed_origins=origins)
        for origin in ("https://app.example", "http://b.example:81", "null"):
            self.assertEqual(self.origin(server, origin), 200)
            self.assertEqual(self.fields["Access-Control-Allow-Origin"], origin)
            self.assertEqual(self.fields["Access-Control-Allow-Credentials"], "true")
            self.assertEqual(self.fields["Vary"], "Origin")
        self.assertEqual(self.origin(server, "https://app.example:443"), 200)
        for origin in (
            "http://app.example",
            "http://b.example",
            "https://x.app.example",
        ):
            self.assertEqual(self.origin(server, origin), 403, origin)
            self.assertNotIn("Access-Control-Allow-Origin", self.fields)

    def test_are_pages_of_any_origin_where_all_are_allowed(self):
        server = self.serve(allowed_origins=["*"])
        for origin in ("https://app.example", "null", "moz-extension://1-2"):
            self.assertEqual(self.origin(server, origin), 200)
            self.assertEqual(self.fields["Access-Control-Allow-Origin"], origin)
        for origin in ("*", "", "a b", "http://"):
            self.assertEqual(self.origin(server, origin), 403, origin)

    def test_of_another_origin_may_read_why_authorize_refused_them(self):
        server = self.serve(allowed_origins=["*"], authorize=lambda _: 204)
        self.assertEqual(self.origin(server, "https://app.example"), 204)
        origin = self.fields["Access-Control-Allow-Origin"]
        self.assertEqual(origin, "https://app.example")

    def preflight(self, server, origin="https://app.example", *fields):
        ask = "Access-Control-Request-Method: GET"
        return self.head(
            server,
            "Host: localhost",
            f"Origin: {origin}",
            ask,
            *fields,
            method="OPTIONS",
        )

    def test_of_an_allowed_origin_may_ask_before(self):
        refuse = mock.Mock(return_value=False)  # a preflight carries no credentials
        server = self.serve(allowed_origins=["https://app.example"], authorize=refuse)
        headers = "Access-Control-Request-Headers: last-event-id, authorization"
        self.assertEqual(self.preflight(server, "https://app.example", headers), 204)
        allowed = self.fields["Access-Control-Allow-Headers"]
        self.assertEqual(allowed, "last-event-id, authorization")
        self.assertIn("GET", self.fields["Access-Control-Allow-Methods"])
        self.assertEqual(self.fields["Access-Control-Allow-Credentials"], "true")
        self.assertNotIn("Content-Length", self.fields)
        refuse.assert_not_called()
        self.assertEqual(self.preflight(server, "https://app.example"), 204)
        self.assertEqual(self.preflight(server, "https://evil.example"), 403)
        fields = ("Host: evil.com", "Origin: https://app.example", headers)
        ask = "Access-Control-Request-Method: GET"
        self.assertEqual(self.head(server, ask, *fields, method="OPTIONS"), 403)
        self.assertEqual(self.preflight(server, "https://evil.example"), 403)
        self.assertNotIn("Access-Control-Allow-Methods", self.fields)

    def test_cannot_ask_for_what_is_no_stream(self):
        server = self.serve(allowed_origins=["*"])
        fields = ("Host: x", "Origin: http://a", "Access-Control-Request-Method: GET")
        status = self.head(server, *fields, target="/", method="OPTIONS")
        self.assertEqual(status, 405)

    def test_must_not_fold_their_header_lines(self):
        server = self.serve(allowed_origins=["*"])
        for fold in ("Origin: http://a\r\n b", "X: y\r\n\tz"):
            self.assertEqual(self.head(server, "Host: localhost", fold), 400)

    def test_are_named_in_a_list(self):
        address = ("127.0.0.1", 0)
        for option in ("allowed_hosts", "allowed_origins"):
            with self.assertRaisesRegex(TypeError, option):
                SSEServer(address, **{option: "https://app.example"})
        for origin in ("app.example", "https://app.example/", "https://", ""):
            with self.assertRaisesRegex(ValueError, "allowed_origins"):
                SSEServer(address, allowed_origins=[origin])
        for host in ("box.example:80", "http://box.example", "", "a b"):
            with self.assertRaisesRegex(ValueError, "allowed_hosts"):
                SSEServer(address, allowed_hosts=iter([host]))

    def test_are_not_too_many(self):
        server = self.serve(max_connections=3)
        peers = [self.connect(server) for _ in range(3)]
        wait_until(lambda: len(server._requests) == 3)
        threads = threading.active_count()
        request = (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n"
        )
        for _ in range(5):
            answer = self.ask(server, request)
            self.assertTrue(answer.startswith(b"HTTP/1.1 503 "), answer)
            self.assertRegex(answer, rb"\r\nRetry-After: \d+\r\n")
            body = answer.partition(b"\r\n\r\n")[2]
            self.assertRegex(body, rb"^[^\n]*max_connections[^\n]*\n$")
            self.assertIn(f"\r\nContent-Length: {len(body)}\r\n".encode(), answer)
        self.assertEqual(threading.active_count(), threads)
        peers[0].close()
        wait_until(lambda: len(server._requests) == 2)
        self.assertTrue(self.ask(server, request).endswith(b"okay"))
        wait_until(lambda: not server._refused, "the last of the refused to be closed")

    def test_that_are_too_many_may_take_their_time_to_read_why(self):
        server = self.serve(max_connections=0)
        silent, peer = Peer(server, head=b""), Peer(server, X="x" * 20_000)
        self.addCleanup(silent.close)
        self.addCleanup(peer.close)
        wait_until(lambda: len(server._refused) == 2)
        wait_until(lambda: not server._refused)
        self.assertTrue(peer.file.read().startswith(b"HTTP/1.1 503 "))
        self.assertTrue(self.ask(server, b"").startswith(b"HTTP/1.1 503 "))

    def test_that_are_too_many_are_not_kept(self):
        server = self.serve(max_connections=0)
        few = mock.patch("sse_ref._REFUSED_AT_A_TIME", 5)
        with contextlib.ExitStack() as stack, few:
            for _ in range(20):
                stack.enter_context(socket.create_connection(server.server_address))
            wait_until(lambda: len(server._refused) == 5)

    def drip(self, server, head, pause):
        """Send a head byte by byte; return what comes back, and after how long."""
        begun = time.monotonic()
        with socket.create_connection(server.server_address, PATIENCE) as peer:
            peer.settimeout(pause)
            answer = b""
            for byte in head:
                with contextlib.suppress(OSError):
                    peer.sendall(bytes([byte]))
                try:
                    piece = peer.recv(65536)
                except socket.timeout:
                    continue
                except ConnectionError:
                    break
                if not piece:
                    break
                answer += piece
            return answer, time.monotonic() - begun

    def test_say_what_they_want_in_time(self):
        with mock.patch.object(SSEServer, "head_timeout", 0.5):
            server = self.serve()
            for head in (b"G" * 1000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000, b""):
                if head:
                    answer, seconds = self.drip(server, head, 0.02)
                    self.assertRegex(answer, rb"^(HTTP/1\.1 408 |$|HTTP/1\.1 4)")
                else:
                    begun = time.monotonic()
                    self.assertEqual(self.ask(server, b""), b"")
                    seconds = time.monotonic() - begun
                self.assertTrue(0.4 < seconds < 3, seconds)
            answer, _ = self.drip(
                server, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 90, 0.02
            )
            self.assertTrue(answer.startswith(b"HTTP/1.1 408 "), answer)
            # Who was in time may stay as long as it likes.
            peer = self.connect(server)
            peer.chunk()
            wait_until(lambda: server.clients)
            (client,) = server.clients
            time.sleep(0.7)
            client.send("here")
            self.assertEqual(peer.data(), "here")


class TheServer(ServerCase):
    """SSEServer: its own life."""

    def test_calls_on_connection_in_a_thread_a_request(self):
        idents = []
        server = self.serve(lambda _: idents.append(threading.get_ident()))
        for _ in range(3):
            self.connect(server)
        wait_until(lambda: len(idents) == 3)
        self.assertEqual(len({*idents, threading.get_ident()}), 4)

    def test_holds_a_stream_open_when_on_connection_returns(self):
        client, peer = self.open()
        self.assertFalse(client.closed)
        client.send("later")
        self.assertEqual(peer.data(), "later")

    def test_holds_streams_open_without_on_connection(self):
        server = self.serve()
        self.connect(server)
        wait_until(lambda: server.clients)

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
            wait_until(lambda: len(server._requests) == 1)
        self.assertEqual([r.exc_info[0] for r in records], [ZeroDivisionError])
        (client,) = server.clients
        client.send("b")
        self.assertEqual(other.data(), "b")

    def test_takes_a_broken_pipe_for_a_normal_end(self):
        def on_connection(client):
            client.send("a")
            raise BrokenPipeError

        server = self.serve(on_connection)
        with self.logged() as records:
            self.connect(server).finish()
            wait_until(lambda: not server._requests)
        self.assertEqual(records, [])

    def test_tells_who_is_connected(self):
        server = self.serve()
        self.assertEqual(server.clients, frozenset())
        peers = [self.connect(server) for _ in range(3)]
        wait_until(lambda: len(server.clients) == 3)
        peers[0].close()
        wait_until(lambda: len(server.clients) == 2)
        self.assertIsInstance(server.clients, frozenset)
        next(iter(server.clients)).close()
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

    def test_gives_a_slow_reader_time_at_its_end(self):
        server = self.serve(max_backlog=2**30)
        peer = self.connect(server)
        wait_until(lambda: server.clients)
        (client,) = server.clients
        flood = Flood(client.send, megabytes=12)
        flood()
        server.shutdown()
        closing = threading.Thread(target=server.server_close)
        closing.start()
        flood.check(self, peer)
        peer.finish()
        closing.join()

    def test_does_not_wait_for_a_reader_that_is_stuck(self):
        server = self.serve(max_backlog=2**30)
        server.closing_grace = 0.2
        self.connect(server)
        wait_until(lambda: server.clients)
        (client,) = server.clients
        Flood(client.send)()
        begun = time.monotonic()
        server.shutdown()
        with self.logged() as records:
            server.server_close()
        self.assertLess(time.monotonic() - begun, 2)
        self.assertIn("closing", records[0].getMessage())

    def test_waits_for_on_connection_but_not_for_ever(self):
        free = threading.Event()
        self.addCleanup(free.set)
        busy = threading.Event()

        def on_connection(client):
            client.wait(0.01)
            busy.set()
            free.wait(PATIENCE)

        server = self.serve(on_connection)
        server.closing_grace, server.closing_timeout = 0.1, 0.3
        peer = self.connect(server)
        self.assertTrue(busy.wait(PATIENCE))
        begun = time.monotonic()
        server.shutdown()
        server.server_close()
        self.assertTrue(0.3 <= time.monotonic() - begun < 2)
        peer.finish()
        with self.logged() as records:
            free.set()
            wait_until(lambda: not server._requests)
        self.assertEqual(records, [])

    def test_does_not_wait_for_a_request_that_never_came(self):
        server = self.serve()
        with socket.create_connection(server.server_address[:2]):
            wait_until(lambda: server._requests)
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

    def test_ends_a_stream_that_comes_while_it_closes(self):
        calls = []

        def authorize(handler):
            handler.server._closing = True
            return True

        server = self.serve(calls.append, authorize=authorize)
        self.assertEqual(self.connect(server).finish().events, [])
        self.assertEqual(calls, [])

    def test_can_be_closed_without_having_served(self):
        with SSEServer(("127.0.0.1", 0)) as server:
            self.assertGreater(server.server_port, 0)

    def test_refuses_what_makes_no_sense(self):
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

    def test_refuses_a_handler_class_for_on_connection(self):
        for handler in (SSERequestHandler, BaseHTTPRequestHandler):
            with self.assertRaisesRegex(TypeError, "RequestHandlerClass="):
                SSEServer(("127.0.0.1", 0), handler)

    def test_leaves_nothing_open_when_its_address_is_taken(self):
        server = self.serve()
        with self.assertRaises(OSError):
            SSEServer(server.server_address[:2])

    def test_looks_up_no_name_at_its_start(self):
        with mock.patch("socket.getfqdn", side_effect=AssertionError):
            self.assertEqual(self.serve().server_name, "127.0.0.1")

    def test_takes_a_burst_of_connections(self):
        with SSEServer(("127.0.0.1", 0)) as server:  # which accepts none yet
            peers = []
            try:
                for _ in range(200):
                    peers.append(socket.create_connection(server.server_address, 1))
            finally:
                for peer in peers:
                    peer.close()

    @unittest.skipUnless(socket.has_ipv6, "needs IPv6")
    def test_serves_by_ipv6(self):
        try:
            server = self.serve(lambda c: c.send(c.address[0]), address=("::1", 0))
        except OSError as error:
            self.skipTest(str(error))
        self.assertEqual(self.connect(server).data(), "::1")

    def test_serves_on_every_address_where_none_is_named(self):
        server = self.serve(lambda c: c.send("x"), address=("", 0))
        self.assertEqual(server.server_name, "0.0.0.0")  # noqa: S104
        peer = socket.create_connection(("127.0.0.1", server.server_port), PATIENCE)
        peer.close()


class TheCommandLine(unittest.TestCase):
    """python sse_ref.py"""

    def start(self, *arguments, **options):
        command = [sys.executable, "-u", str(MODULE), "--port", "0", *arguments]
        options.setdefault("stdin", subprocess.DEVNULL)
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self.addCleanup(self.end, process)
        process.greeting = process.stdout.readline()
        process.tries = [process.stdout.readline() for _ in range(2)]
        process.server_address = self.address(process.greeting)
        return process

    def end(self, process):
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()

    def address(self, greeting):
        found = re.fullmatch(r"Starting server\.\.\. http://(.*):(\d+)\n", greeting)
        self.assertIsNotNone(found, greeting)
        return found[1].strip("[]"), int(found[2])

    def connect(self, process, path="/sse"):
        peer = Peer(process, path)
        self.addCleanup(peer.close)
        return peer.read_head()

    def stop(self, process, number=signal.SIGTERM):
        begun = time.monotonic()
        process.send_signal(number)
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertLess(time.monotonic() - begun, 2)
        return process.stderr.read()

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
        peer = self.connect(process, "/")
        self.assertEqual(peer.file.read(), b"okay")
        self.assertEqual(self.connect(process).data(), "hi there!")

    def test_has_options_for_path_retry_and_keepalive(self):
        process = self.start("--path", "/a*", "--retry", "70", "--keepalive", "0.05")
        peer = self.connect(process, "/abc")
        self.assertEqual(peer.data(), "hi there!")
        peer.chunk()
        self.assertEqual(peer.reader.comments, [" keep-alive"])
        self.assertEqual(peer.reader.retry, 70)
        self.assertIn("'", process.tries[1])  # the shell is not to read the star

    def test_ends_in_good_order_by_signal(self):
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
        self.assertNotIn("Traceback", process.stderr.read())
        peer.finish()

    def test_stops_by_a_signal_as_soon_as_it_has_said_where_it_serves(self):
        for _ in range(3):
            self.assertEqual(self.stop(self.start()), "")

    def fail(self, *arguments):
        return subprocess.run(
            [sys.executable, str(MODULE), *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def test_says_in_one_line_what_is_wrong(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            for arguments in (
                ["--port", port],
                ["--host", "host.invalid"],
                ["--host", "203.0.113.1"],
            ):
                ended = self.fail(*arguments)
                self.assertNotEqual(ended.returncode, 0)
                self.assertRegex(ended.stderr, r"^sse_ref: cannot listen on [^\n]+\n$")
                self.assertEqual(ended.stdout, "")

    def test_has_argparse_say_what_is_wrong_with_an_option(self):
        for arguments in (
            ["--no-such-option"],
            ["--port", "70000"],
            ["--port", "x"],
            ["--path", "sse"],
            ["--keepalive", "-1"],
            ["--retry", "-1"],
        ):
            ended = self.fail(*arguments)
            self.assertEqual(ended.returncode, 2)
            self.assertRegex(
                ended.stderr, r"^usage: (.|\n)*\nsse_ref: error: [^\n]+\n$"
            )

    @unittest.skipUnless(os.name == "posix", "needs a shell")
    def test_works_with_standard_input_closed(self):
        process = self.start(stdin=None, preexec_fn=lambda: os.close(0))
        self.assertEqual(self.connect(process).data(), "hi there!")
        self.stop(process)

    @unittest.skipUnless(os.name == "posix", "needs a shell")
    def test_works_with_standard_output_and_error_closed(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = f"exec {sys.executable} {MODULE} --port {port} <&- >&- 2>&-"
        process = subprocess.Popen(command, shell=True)
        try:
            process.server_address = ("127.0.0.1", port)
            wait_until(lambda: self.is_up(process))
            self.assertEqual(self.connect(process).data(), "hi there!")
        finally:
            process.terminate()
            self.assertEqual(process.wait(PATIENCE), 0)

    def is_up(self, process):
        with contextlib.suppress(ConnectionError):
            return self.get(process) == b"200"

    @unittest.skipUnless(sys.platform == "linux", "needs a terminal of its own")
    def test_never_reads_standard_input(self):
        ours, theirs = os.pipe()
        self.addCleanup(os.close, ours)
        self.addCleanup(os.close, theirs)
        os.write(theirs, b"for somebody else\n")
        process = self.start(stdin=ours)
        self.assertEqual(self.connect(process).data(), "hi there!")
        self.stop(process)
        self.assertEqual(os.read(ours, 100), b"for somebody else\n")

    @unittest.skipUnless(sys.platform == "linux", "needs setrlimit")
    def test_raises_its_limit_of_descriptors(self):
        import resource  # noqa: PLC0415

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        process = self.start(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
        )
        peers = [self.connect(process) for _ in range(60)]
        for peer in peers:
            self.assertEqual(peer.data(), "hi there!")

    def readers(self, process, count):
        """Connect so many, and wait until lines of standard input reach them all."""
        peers = [self.connect(process) for _ in range(count)]
        for peer in peers:
            self.assertEqual(peer.chunk(), b": ok\n\n")
        deaf = {peer.socket: peer for peer in peers}
        while deaf:  # a head may come a moment before its client is subscribed
            process.stdin.write("ready?\n")
            process.stdin.flush()
            for heard in select.select(list(deaf), [], [], 0.1)[0]:
                deaf.pop(heard)
        process.stdin.write("ready\n")
        process.stdin.flush()
        for peer in peers:
            while peer.data() != "ready":
                pass
        return peers

    def test_publishes_lines_of_standard_input(self):
        process = self.start("-", stdin=subprocess.PIPE)
        (peer,) = self.readers(process, 1)
        lines = b"one\n\n two \r\n\xff\xc3\xa9\xe2\x80\xa8\nlast"
        process.stdin.buffer.write(lines[:4])
        process.stdin.flush()
        self.assertEqual(peer.data(), "one")  # at once, and no "hi there!"
        process.stdin.buffer.write(lines[4:])
        process.stdin.close()
        got = [peer.data() for _ in range(4)]
        self.assertEqual(got, ["", " two ", "\ufffdé\u2028", "last"])
        another = self.connect(process)  # its end is no reason to stop
        self.assertEqual(another.fields["Content-Type"], "text/event-stream")
        self.stop(process)
        self.assertEqual(another.finish().events, [])

    def test_publishes_every_line_in_order(self):
        process = self.start("-", stdin=subprocess.PIPE)
        peers = self.readers(process, 4)
        lines = "".join(f"{number}\n" for number in range(20_000))
        writer = threading.Thread(target=lambda: process.stdin.write(lines))
        writer.start()
        wanted = [str(number) for number in range(20_000)]
        for peer in peers:
            self.assertEqual([peer.data() for _ in range(20_000)], wanted)
        writer.join()
        process.stdin.close()
        self.stop(process)

    def test_stops_while_it_waits_for_a_line_or_gets_many(self):
        for many in (False, True):
            process = self.start("-", stdin=subprocess.PIPE)
            (peer,) = self.readers(process, 1)
            if many:
                writer = threading.Thread(target=self.pour, args=(process,))
                writer.start()
                peer.data()
            self.assertEqual(self.stop(process), "")
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            if many:
                writer.join()

    def pour(self, process):
        with contextlib.suppress(OSError, ValueError):
            while process.poll() is None:
                process.stdin.write("line\n" * 1000)

    def test_serves_on_where_standard_input_is_closed(self):
        process = self.start("-", stdin=None, preexec_fn=lambda: os.close(0))
        peer = self.connect(process)
        self.assertEqual(peer.status, b"HTTP/1.1 200 OK\r\n")
        self.stop(process)

    def test_has_options_for_who_gets_in(self):
        options = ["--allow-host", "a.example", "--allow-host", "b.example"]
        options += ["--allow-origin", "http://c.example", "--max-connections", "2"]
        process = self.start(*options)
        for host, status in (("b.example", b"200"), ("c.example", b"403")):
            peer = Peer(process, Host=host, Origin="http://c.example").read_head()
            self.assertEqual(peer.status.split()[1], status)
            peer.close()
        wait_until(lambda: self.get(process) == b"200")
        peers = [self.connect(process) for _ in range(2)]
        self.assertEqual(self.get(process), b"503")
        self.assertEqual(len(peers), 2)

    def get(self, process):
        peer = Peer(process, "/").read_head()
        peer.file.read()
        peer.close()
        return peer.status.split()[1]

    @unittest.skipUnless(sys.platform == "linux", "needs setrlimit and /proc")
    def test_bears_running_out_of_descriptors(self):
        import resource  # noqa: PLC0415

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
        time.sleep(0.5)
        self.assertLess(self.cpu(process) - before, 0.08)  # it does not spin
        for peer in waiting[:25]:
            peer.close()
        self.assertEqual(waiting[-1].read_head().data(), "hi there!")
        self.assertNotIn("Traceback", self.stop(process))

    def cpu(self, process):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class BenchHandler(QuietHandler):
    """Pages by which `bench` runs the server, which is a process of its own."""

    def serve_plain(self):
        url, query = self.path.partition("?")[::2]
        if url == "/publish":
            count, gap = query.split("&")
            publish = threading.Thread(
                target=self.publish, args=(int(count), float(gap)), daemon=True
            )
            publish.start()
        pages = Path("/proc/self/statm")
        memory = int(pages.read_text().split()[1]) * 4096 if pages.exists() else 0
        self._answer(200, f"{time.process_time()} {memory}")

    def publish(self, count, gap):
        for _ in range(count):
            self.server.channel.publish(repr(time.monotonic()))
            time.sleep(gap)


def bench_server():
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
    """Streams to a server, read by one loop; asks the server for its CPU and memory."""

    def __init__(self, port, streams):
        self.port = port
        self.selector = selectors.DefaultSelector()
        self.rest = {}  # what has come of an event by stream
        self.latencies = []
        for _ in range(streams):
            stream = socket.create_connection(("127.0.0.1", port))
            stream.sendall(b"GET /sse HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.selector.register(stream, selectors.EVENT_READ)
            self.rest[stream] = b""

    def ask(self, page="/"):
        url = f"http://127.0.0.1:{self.port}{page}"
        with urllib.request.urlopen(url) as answer:
            return [float(word) for word in answer.read().split()]

    def read(self, count, line):
        """Read until so many lines like that have come to all streams together."""
        matches = []
        while len(matches) < count:
            for key, _ in self.selector.select(PATIENCE) or sys.exit("events are lost"):
                piece = self.rest[key.fileobj] + key.fileobj.recv(2**18)
                now = time.monotonic()
                whole, newline, rest = piece.rpartition(b"\n")
                self.rest[key.fileobj] = rest
                matches += [(now, text) for text in line.findall(whole + newline)]
        return matches

    def load(self, events, gap):
        """Have events published; return seconds, CPU seconds and sorted latencies."""
        deliveries = events * len(self.rest)
        (before, _), begun = self.ask(), time.monotonic()
        self.ask(f"/publish?{events}&{gap}")
        got = self.read(deliveries, re.compile(rb"data: ([0-9.e+]+)\n"))
        seconds = time.monotonic() - begun
        latencies = sorted(now - float(text) for now, text in got)
        return seconds, self.ask()[0] - before, latencies


def bench(streams=1000, events=100):
    """Measure a channel here: python test_sse_ref.py bench [STREAMS [EVENTS]]."""
    sse_ref._raise_descriptor_limit(streams + 64)
    server = subprocess.Popen(
        [sys.executable, __file__, "bench-server"], stdout=subprocess.PIPE
    )
    try:
        port = int(server.stdout.readline())
        print(f"CPython {sys.version.split()[0]} on {os.cpu_count()} cores")
        print(f"opening {streams} streams ...", flush=True)
        memory, begun = Bench(port, 0).ask()[1], time.monotonic()
        load = Bench(port, streams)
        load.read(streams, re.compile(rb"(: ok)\n"))
        print(f"  {time.monotonic() - begun:8.2f} s to open all")
        print(
            f"  {(load.ask()[1] - memory) / streams / 1000:8.1f} kB of memory a stream"
        )
        print(f"publishing {events} events, 50 ms apart ...", flush=True)
        _, cpu, latencies = load.load(events, 0.05)
        print(f"  {cpu * 1e6 / len(latencies):8.1f} us of CPU a delivery")
        print(f"  {latencies[len(latencies) // 2] * 1e3:8.1f} ms median latency")
        print(
            f"  {latencies[len(latencies) * 99 // 100] * 1e3:8.1f} ms 99th percentile"
        )
        print("publishing 1000 events at once ...", flush=True)
        seconds, _, latencies = load.load(1000, 0)
        print(f"  {len(latencies) / seconds:8.0f} deliveries a second")
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench-server"]:
        bench_server()
    elif sys.argv[1:2] == ["bench"]:
        bench(*map(int, sys.argv[2:]))
    else:
        unittest.main()
