"""A client for the few Kubernetes API calls that kopf does not make. kopf makes the watches."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Final

import aiohttp
import kopf
import yaml
from yarl import URL

from flashsale import cancellation
from flashsale.errors import FlashsaleError, SettingsError
from flashsale.tls import RenewedContext, relaxed
from flashsale_operator.sales.manifest import API_VERSION, PLURAL

LIST_PAGE: Final = 500
TIMEOUT: Final = aiohttp.ClientTimeout(total=10, connect=5)
FIELD_MANAGER: Final = {"fieldManager": "flashsale-operator"}
"""Parameter of every write. `metadata.managedFields` shows this name."""

_LATER: Final = (401, 408, 409, 410, 429)
"""Refusals that a repeated request may not get: no login, too slow, conflict, gone, too many."""

_WRONG: Final = (
    kopf.LoginError,
    RecursionError,  # of yaml
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)

Login = Callable[[], kopf.ConnectionInfo]


class KubeUnavailable(FlashsaleError):
    """The kube-apiserver did not answer, or refused the request."""


class KubeRefused(KubeUnavailable):
    """The kube-apiserver refused the request, and would refuse it again."""


class KubeForbidden(KubeRefused):
    """The operator's account has no right to make the request, or a policy forbids it."""


class NoFlashSales(KubeUnavailable):
    """The cluster does not serve FlashSales. A person must install the resource."""

    def __init__(self) -> None:
        super().__init__(
            "the cluster has no FlashSale resource: install the chart's CRD (crds.enabled)"
        )


@dataclass(frozen=True)
class _Connection(kopf.ConnectionInfo):
    """Connects also if the cluster's certificates are as `flashsale.tls` describes, or renewed.

    kopf's watches repeat a refused connection without end, and do not log in again meanwhile.
    """

    def as_ssl_context(self) -> ssl.SSLContext:
        logins = chain([self], iter(self._present, None))
        return RenewedContext(lambda: next(logins)._context())

    def _context(self) -> ssl.SSLContext:
        return relaxed(super().as_ssl_context())

    def _present(self) -> "_Connection":
        """Returns the present credentials. Raises `SettingsError`."""
        found = _credentials()
        if found.server != self.server:
            raise SettingsError("KUBECONFIG names another cluster now")
        return found


def log_in() -> kopf.ConnectionInfo:
    """Returns the kube-apiserver's address and the credentials.

    They come from the pod's service account, otherwise from the kubeconfig. Tokens are renewed in
    place, so callers log in again if the server refuses the credentials. Raises `SettingsError`.
    """
    found = _credentials()
    _check(found)
    return found


def _credentials() -> _Connection:
    settings = kopf.OperatorSettings()
    try:
        found = kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(
            settings=settings
        )
    except yaml.YAMLError as error:  # its text has a part of the file, which can be a token
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        raise SettingsError(f"KUBECONFIG is wrong: not YAML{where}") from None
    except _WRONG as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(f"KUBECONFIG is wrong: {why}") from error
    if found is None:
        raise SettingsError(
            "KUBECONFIG is not set: outside a pod expected the path of a kubeconfig file"
        )
    return _Connection(**{each.name: getattr(found, each.name) for each in fields(found)})


def _check(info: kopf.ConnectionInfo) -> None:
    """Raises `SettingsError` for a wrong address, user, certificate or key.

    kopf reads them only when it connects, and their errors would end the process with a traceback.
    """
    for name, address in (("server", info.server), ("proxy-url", info.proxy_url or info.server)):
        try:
            url = URL(address)
        except _WRONG:
            url = URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise SettingsError(f"KUBECONFIG is wrong: expected https://host:port as the {name}")
    try:
        info.as_http_headers()
    except _WRONG as error:
        raise SettingsError(
            f"KUBECONFIG is wrong: expected a username without : and a password: {error}"
        ) from error
    try:
        info.as_ssl_context()
    except _WRONG as error:
        given = {
            "certificate-authority": info.ca_path,
            "certificate-authority-data": info.ca_data,
            "client-certificate": info.certificate_path,
            "client-certificate-data": info.certificate_data,
            "client-key": info.private_key_path,
            "client-key-data": info.private_key_data,
        }
        names = ", ".join(name for name, value in given.items() if value)
        why = " ".join(str(error).split())
        raise SettingsError(
            f"KUBECONFIG is wrong: expected PEM, in base64 if it is data, in {names}: {why}"
        ) from error


class Kube:
    """Calls about FlashSales and Events over one HTTP session.

    Methods raise `KubeUnavailable`. A write that raised may have succeeded.
    """

    def __init__(self, login: Login) -> None:
        self._login = login
        self._server = ""
        self._session: aiohttp.ClientSession | None = None

    async def serves_flash_sales(self) -> bool:
        """Whether the cluster lists the FlashSale resource. kopf looks in the same two lists."""
        code, body = await self._call("GET", "/apis")
        _expect_success(code, body)
        versions = [each for group in body.get("groups", []) for each in group["versions"]]
        if API_VERSION not in {each["groupVersion"] for each in versions}:
            return False
        code, body = await self._call("GET", f"/apis/{API_VERSION}")
        if code == 404:
            return False
        _expect_success(code, body)
        return PLURAL in {each["name"] for each in body.get("resources", [])}

    async def flash_sale(self, namespace: str, name: str) -> dict[str, Any] | None:
        """Returns the live object, or None if it does not exist."""
        status, body = await self._call("GET", f"{_sales_path(namespace)}/{name}")
        if status == 404 and body.get("details", {}).get("name") == name:
            return None
        _expect_success(status, body)
        return body

    async def flash_sales(self, namespace: str | None) -> list[dict[str, Any]]:
        """Returns the objects of a namespace, or of all namespaces. Raises `NoFlashSales`."""
        found: list[dict[str, Any]] = []
        parameters = {"limit": str(LIST_PAGE)}
        while True:
            status, body = await self._call("GET", _sales_path(namespace), parameters=parameters)
            if status == 404:  # a namespace that does not exist has an empty list
                raise NoFlashSales
            _expect_success(status, body)
            found += body.get("items", [])
            token = body.get("metadata", {}).get("continue")
            if not token:
                return found
            parameters = {"limit": str(LIST_PAGE), "continue": token}

    async def patch_status(
        self, namespace: str, name: str, status: Mapping[str, object], resource_version: str
    ) -> dict[str, Any] | None:
        """Writes a status. Returns the object, or None if it has changed or was deleted since."""
        code, body = await self._call(
            "PATCH",
            f"{_sales_path(namespace)}/{name}/status",
            {"metadata": {"resourceVersion": resource_version}, "status": status},
            parameters=FIELD_MANAGER,
            content_type="application/merge-patch+json",
        )
        if code in (404, 409):
            return None
        _expect_success(code, body)
        return body

    async def create_event(self, namespace: str, event: Mapping[str, object]) -> bool:
        """Creates an Event. Returns False if the name exists or the namespace is being deleted."""
        code, body = await self._call(
            "POST", f"/api/v1/namespaces/{namespace}/events", event, parameters=FIELD_MANAGER
        )
        if code in (404, 409) or (code == 403 and _terminating(body)):
            return False
        _expect_success(code, body)
        return True

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        parameters: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> tuple[int, dict[str, Any]]:
        """Returns the status code and the JSON of an answer. Logs in again once after a 401."""
        code = 401
        answer: dict[str, Any] = {}
        for _ in range(2):
            session = self._session = self._session or self._open()
            async with (
                _translated(),
                session.request(
                    method,
                    # aiohttp would drop the path of a base URL, such as that of a gateway.
                    f"{self._server}{path}",
                    json=body,
                    params=parameters,
                    headers={"Content-Type": content_type},
                ) as response,
            ):
                code = response.status
                if response.content_type == "application/json":
                    answer = await response.json()
                else:
                    answer = {"message": await response.text()}
            if code != 401:
                break
            if self._session is session:
                self._session = None
            await session.close()
        return code, answer

    def _open(self) -> aiohttp.ClientSession:
        try:
            info = self._login()
        except SettingsError as error:
            raise KubeUnavailable(f"no login to the kube-apiserver: {error}") from error
        self._server = info.server.rstrip("/")
        return aiohttp.ClientSession(
            headers={**info.as_http_headers(), "Accept": "application/json"},
            connector=aiohttp.TCPConnector(limit=32, ssl=info.as_ssl_context()),
            timeout=TIMEOUT,
            proxy=info.proxy_url,
        )


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        why = str(error) or "no answer in time"
        raise KubeUnavailable(f"the kube-apiserver is away: {why}") from error
    except asyncio.CancelledError as error:
        # aiohttp cancels the DNS look-ups of a session that closes, and with them their callers.
        if cancellation.requested():
            raise
        raise KubeUnavailable("the kube-apiserver is away: its session was closed") from error


def declared_version(metadata: Mapping[str, Any]) -> tuple[object, ...]:
    """Returns the part of an object's metadata that changes with its spec and its deletion.

    A change of the status keeps it.
    """
    return tuple(metadata.get(name) for name in ("uid", "generation", "deletionTimestamp"))


def _sales_path(namespace: str | None) -> str:
    where = "" if namespace is None else f"/namespaces/{namespace}"
    return f"/apis/{API_VERSION}{where}/{PLURAL}"


def _expect_success(code: int, body: Mapping[str, Any]) -> None:
    if code < 400:
        return
    message = " ".join(str(body.get("message", "")).split())[:500]
    kind = KubeUnavailable
    if code == 403:
        kind = KubeForbidden
    elif code < 500 and code not in _LATER:
        kind = KubeRefused
    raise kind(f"the kube-apiserver refused: {code} {message}")


def _terminating(body: Mapping[str, Any]) -> bool:
    causes = (body.get("details") or {}).get("causes") or []
    return any(cause.get("reason") == "NamespaceTerminating" for cause in causes)
