"""The certificates of a cluster satisfy the strictest TLS peers."""

import base64
import json
import socket
import ssl
import threading
from pathlib import Path

import pytest

from dev.cluster import pki

ADDRESS = "10.99.0.1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pki.make(tmp_path / "pki", f"https://{ADDRESS}:6443", ("127.0.0.1", ADDRESS))
    return tmp_path / "pki"


@pytest.mark.parametrize("user", pki.USERS)
def test_a_user_and_the_api_server_accept_each_other(folder: Path, user: str) -> None:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.crt"))
    server.load_cert_chain(folder / "apiserver.crt", folder / "apiserver.key")
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    client.load_cert_chain(folder / f"{user}.crt", folder / f"{user}.key")
    for context in (server, client):
        context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    left, right = socket.socketpair()

    def accept() -> None:
        with server.wrap_socket(left, server_side=True) as connection:
            subjects.append(dict(pair[0] for pair in connection.getpeercert()["subject"]))  # type: ignore[index,misc] # verified, so not None

    subjects: list[dict[str, str]] = []
    thread = threading.Thread(target=accept)
    thread.start()
    with client.wrap_socket(right, server_hostname=ADDRESS):
        thread.join()
    common_name, organisation = pki.USERS[user]
    assert subjects[0]["commonName"] == common_name
    assert organisation is None or subjects[0]["organizationName"] == organisation


def test_a_kubeconfig_has_the_user_and_the_authority(folder: Path) -> None:
    config = json.loads((folder / "kubelet.kubeconfig").read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    assert cluster["server"] == f"https://{ADDRESS}:6443"
    for encoded, name in (
        (cluster["certificate-authority-data"], "ca.crt"),
        (user["client-certificate-data"], "kubelet.crt"),
        (user["client-key-data"], "kubelet.key"),
    ):
        assert base64.b64decode(encoded) == (folder / name).read_bytes()


def test_only_the_owner_can_read_the_keys(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
