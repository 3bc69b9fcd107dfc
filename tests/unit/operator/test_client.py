"""The Kubernetes client, against answers of a real server at bad moments."""

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import kopf
import pytest
import trustme
from aiohttp import web

from flashsale_operator.kubernetes.client import Kube, KubeUnavailable, NoFlashSales, log_in

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(
    answer: Answer, path: str = "", certificates: Path | None = None
) -> AsyncIterator[Kube]:
    """Yields a client of a server with this answer. Its logins have the tokens 1, 2, …

    The client's address of the server ends in `path`. `certificates` is a folder with the
    certificate of the server and the authority that the client trusts.
    """
    context = None
    if certificates is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.pem")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    host, port = runner.addresses[0][:2]
    logins = 0
    scheme = "http" if context is None else "https"
    authority = None if certificates is None else str(certificates / "ca.crt")

    def log_in() -> kopf.ConnectionInfo:
        nonlocal logins
        logins += 1
        server = f"{scheme}://{host}:{port}{path}"
        return kopf.ConnectionInfo(server=server, token=str(logins), ca_path=authority)

    kube = Kube(log_in)
    yield kube
    await kube.close()
    await runner.cleanup()


def answers(status: int, **body: object) -> Answer:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    return answer


async def test_an_expired_token_is_renewed() -> None:
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers["Authorization"])
        known = seen[-1] == "Bearer 2"
        return web.json_response({"metadata": {}}, status=200 if known else 401)

    async with serving(answer) as kube:
        assert await kube.flash_sale("shop", "phone") == {"metadata": {}}
        await kube.flash_sale("shop", "phone")
    assert seen == ["Bearer 1", "Bearer 2", "Bearer 2"]


async def test_a_renewed_authority_of_the_cluster_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by connections of the same session, because kopf's watches keep theirs."""
    authority = trustme.CA()
    served = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
    served.write_to_path(tmp_path / "server.pem")
    kubeconfig = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))

    def trust(trusted: trustme.CA, server: str) -> None:
        data = base64.b64encode(trusted.cert_pem.bytes()).decode()
        cluster = {"server": server, "certificate-authority-data": data}
        config = {
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        kubeconfig.write_text(json.dumps(config))

    async with serving(answers(200), certificates=tmp_path) as kube:
        address = kube._login().server
        trust(trustme.CA(), address)
        info = log_in()
        connector = aiohttp.TCPConnector(ssl=info.as_ssl_context(), force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def status() -> int:
                async with session.get(address) as answer:
                    return answer.status

            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await status()
            trust(authority, address)
            assert await status() == 200
            assert not caplog.text
            kubeconfig.write_text("half a file: [")
            assert await status() == 200
            assert "so the former ones are: KUBECONFIG is wrong" in caplog.text
            trust(trustme.CA(), "https://another.cluster")
            assert await status() == 200
            trust(trustme.CA(), address)
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await status()


async def test_calls_go_through_the_proxy_of_the_kubeconfig() -> None:
    """kopf's own calls do, too."""
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(str(request.url))
        return web.json_response({"metadata": {}})

    async with serving(answer) as proxy:
        address = proxy._login().server
        kube = Kube(lambda: kopf.ConnectionInfo(server="http://kube.invalid", proxy_url=address))
        assert await kube.flash_sale("shop", "phone") == {"metadata": {}}
        await kube.close()
    assert [url.partition("/apis/")[0] for url in seen] == ["http://kube.invalid"]


async def test_an_unknown_account_does_not_log_in_endlessly() -> None:
    async with serving(answers(401, message="Unauthorized")) as kube:
        with pytest.raises(KubeUnavailable, match="401 Unauthorized"):
            await kube.flash_sale("shop", "phone")


async def test_only_a_404_that_names_the_object_means_that_it_is_deleted() -> None:
    async with serving(answers(404, details={"name": "phone", "kind": "flashsales"})) as kube:
        assert await kube.flash_sale("shop", "phone") is None

    async def no_such_path(_: web.Request) -> web.Response:
        return web.Response(status=404, text="404 page not found")

    async with serving(no_such_path) as kube:
        with pytest.raises(KubeUnavailable, match="404 page not found"):
            await kube.flash_sale("shop", "phone")
        with pytest.raises(NoFlashSales, match="install the chart's CRD"):
            await kube.flash_sales(None)


@pytest.mark.parametrize("path", ["", "/", "/k8s/clusters/c-1", "/k8s/clusters/c-1/"])
async def test_a_server_can_be_below_a_path(path: str) -> None:
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.path_qs)
        return web.json_response({"metadata": {}})

    async with serving(answer, path) as kube:
        await kube.flash_sale("shop", "phone")
        await kube.flash_sales("shop")
    sales = f"{path.rstrip('/')}/apis/flashsale.dev/v1alpha1/namespaces/shop/flashsales"
    assert seen == [f"{sales}/phone", f"{sales}?limit=500"]


@pytest.mark.parametrize(
    ("versions", "resources", "served"),
    [
        ([], [], False),
        (["flashsale.dev/v1alpha1"], None, False),
        (["flashsale.dev/v1alpha1"], ["flashsales/status"], False),
        (["flashsale.dev/v1"], ["flashsales"], False),
        (["apps/v1", "flashsale.dev/v1alpha1"], ["flashsales", "flashsales/status"], True),
    ],
)
async def test_flashsales_are_served_once_both_lists_of_the_server_have_them(
    versions: list[str], resources: list[str] | None, served: bool
) -> None:
    """The lists are not updated at the same moment."""

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/apis":
            groups = [{"versions": [{"groupVersion": version}]} for version in versions]
            return web.json_response({"groups": groups})
        assert request.path == "/apis/flashsale.dev/v1alpha1"
        if resources is None:
            return web.Response(status=404, text="404 page not found")
        return web.json_response({"resources": [{"name": name} for name in resources]})

    async with serving(answer) as kube:
        assert await kube.serves_flash_sales() is served


async def test_a_server_that_refuses_its_lists_is_away() -> None:
    async with serving(answers(503, message="starting")) as kube:
        with pytest.raises(KubeUnavailable, match="503 starting"):
            await kube.serves_flash_sales()


async def test_a_status_based_on_an_older_object_is_not_written() -> None:
    for code, written in ((200, True), (404, False), (409, False)):
        async with serving(answers(code)) as kube:
            patched = await kube.patch_status("shop", "phone", {}, "1")
            assert (patched is not None) is written


async def test_an_existing_event_or_a_deleted_namespace_is_no_failure() -> None:
    terminating = {"causes": [{"reason": "NamespaceTerminating"}]}
    for answer, made in (
        (answers(201), True),
        (answers(409), False),
        (answers(404), False),
        (answers(403, details=terminating), False),
    ):
        async with serving(answer) as kube:
            assert await kube.create_event("shop", {}) is made
    async with serving(answers(403, message="forbidden")) as kube:
        with pytest.raises(KubeUnavailable, match="403 forbidden"):
            await kube.create_event("shop", {})


async def test_all_pages_of_a_list_are_read() -> None:
    async def answer(request: web.Request) -> web.Response:
        page = int(request.query.get("continue", "0"))
        onward = {"continue": str(page + 1)} if page < 2 else {}
        return web.json_response({"metadata": onward, "items": [{"page": page}]})

    async with serving(answer) as kube:
        assert await kube.flash_sales("shop") == [{"page": 0}, {"page": 1}, {"page": 2}]


async def test_the_error_about_a_server_that_is_away_is_one_line() -> None:
    kube = Kube(lambda: kopf.ConnectionInfo(server="http://127.0.0.1:1"))
    with pytest.raises(KubeUnavailable, match=r"the kube-apiserver is away: [^\n]+$"):
        await kube.flash_sale("shop", "phone")
    await kube.close()


@asynccontextmanager
async def resolving(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[Kube, asyncio.Task[Any]]]:
    """Yields a client, and a call of it whose DNS look-up has begun and does not end."""
    began = asyncio.Event()

    async def look_up(*_: object, **__: object) -> None:
        began.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    kube = Kube(lambda: kopf.ConnectionInfo(server="http://kube.invalid"))
    call = asyncio.create_task(kube.flash_sale("shop", "phone"))
    async with asyncio.timeout(30):
        await began.wait()
    yield kube, call
    await kube.close()


async def test_a_session_that_closes_does_not_end_the_tasks_of_other_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a 401 one call closes the session of all. aiohttp then cancels DNS look-ups."""
    async with resolving(monkeypatch) as (kube, call):
        await kube.close()
        with pytest.raises(KubeUnavailable, match="its session was closed"):
            await call


async def test_a_call_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    async with resolving(monkeypatch) as (_, call):
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_an_answer_that_is_not_json_is_an_error() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="{", content_type="application/json")

    async with serving(answer) as kube:
        with pytest.raises(KubeUnavailable):
            await kube.flash_sales(None)
