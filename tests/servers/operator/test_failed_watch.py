"""The operator's process if a kube-apiserver answers a watch in a way that ends kopf."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flashsale_operator.sales.manifest import API_VERSION, GROUP, KIND, PLURAL, VERSION

_VERSION = {"groupVersion": API_VERSION, "version": VERSION}


def _resource(plural: str, kind: str, *, namespaced: bool) -> dict[str, object]:
    return {
        "name": plural,
        "singularName": kind.lower(),
        "kind": kind,
        "namespaced": namespaced,
        "verbs": ["get", "list", "watch"],
    }


_LISTS = {
    "/api": {"versions": ["v1"]},
    "/api/v1": {
        "groupVersion": "v1",
        "resources": [_resource("namespaces", "Namespace", namespaced=False)],
    },
    "/apis": {"groups": [{"name": GROUP, "versions": [_VERSION], "preferredVersion": _VERSION}]},
    f"/apis/{API_VERSION}": {
        "groupVersion": API_VERSION,
        "resources": [_resource(PLURAL, KIND, namespaced=True)],
    },
}
_EMPTY = {"metadata": {"resourceVersion": "1"}, "items": []}
_STATUS = {"kind": "Status", "status": "Failure", "code": 500, "message": "connection lost"}


class Apiserver(BaseHTTPRequestHandler):
    """Serves no FlashSales, and answers each watch with `status`, `headers` and `line`."""

    status = 200
    headers_of_watch: tuple[tuple[str, str], ...] = ()
    line = ""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        watch = "watch=" in query
        body = (self.line if watch else json.dumps(_LISTS.get(path, _EMPTY))).encode() + b"\n"
        self.send_response(self.status if watch else 200)
        for name, value in self.headers_of_watch if watch else ():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def apiserver(request: pytest.FixtureRequest) -> Iterator[str]:
    status, headers, line = request.param
    members = {"status": status, "headers_of_watch": headers, "line": line}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answering", (Apiserver,), members))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("apiserver", "reason"),
    [
        ((200, (), json.dumps({"type": "ERROR", "object": _STATUS})), "connection lost"),
        ((200, (), "<html>"), "JSONDecodeError"),
        ((400, (), json.dumps({**_STATUS, "code": 400})), "connection lost"),
        ((429, (("Retry-After", "Wed, 21 Oct 2026 07:28:00 GMT"),), "{}"), "21 Oct"),
    ],
    indirect=["apiserver"],
    ids=["error event", "not JSON", "bad request", "date to retry after"],
)
def test_a_watch_that_ends_kopf_is_one_line_and_exit_code_1(
    tmp_path: Path, apiserver: str, reason: str
) -> None:
    kubeconfig = {
        "current-context": "a",
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
        "clusters": [{"name": "a", "cluster": {"server": apiserver}}],
        "users": [{"name": "a", "user": {"token": "secret"}}],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
    done = subprocess.run(
        [sys.executable, "-m", "flashsale_operator"],
        env={
            "PATH": os.environ["PATH"],
            "KUBECONFIG": str(tmp_path / "kubeconfig"),
            "FLASHSALE_REDIS_URL": "redis://127.0.0.1:1/0",
            "FLASHSALE_KAFKA_BOOTSTRAP": "127.0.0.1:1",
            "FLASHSALE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
            "FLASHSALE_LISTEN": "127.0.0.1:0",
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    lines = [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]
    assert [line for line in lines if "exception" in line] == []
    ended = lines[-1]["message"]
    assert ended.startswith("the operator ends, because it cannot watch the FlashSales: ")
    assert reason in ended
