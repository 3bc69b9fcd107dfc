"""The tools reach this machine's processes although the environment names a proxy."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.request import getproxies

import pytest

from dev.stack import loopback


class Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - a parent's name
        """Log nothing."""


def test_a_process_of_this_machine_is_asked_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert getproxies()["http"] == "http://127.0.0.1:9"
    with HTTPServer(("127.0.0.1", 0), Hello) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with loopback.get(f"http://127.0.0.1:{server.server_port}/", 5) as answer:
            assert answer.read() == b"hello"
        thread.join()
