# ruff: noqa: INP001 - a script that `helm test` passes to Python, not a module
"""Buy the only unit of a temporary sale and find it in the ledger.

This needs every component: the operator opens the sale, the API sells the unit and the consumer
records it. An API that verifies tokens sells nothing to the test, which has no token. Then the test
ends once the sale is open and the API has refused a buyer without a token.
"""

import asyncio
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashsale import addresses, ledger
from flashsale.tls import relaxed

DEADLINE_SECONDS = 60.0
ACCOUNT = Path(os.environ.get("ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
NAMESPACE = os.environ["NAMESPACE"]
NAME = f"helm-test-{uuid.uuid4().hex[:8]}"
ITEM = os.environ.get("ITEM_PREFIX", "") + NAME
USER_HEADER = os.environ.get("USER_HEADER")
NEEDS_TOKEN = "NEEDS_TOKEN" in os.environ
SALE = {
    "apiVersion": "flashsale.dev/v1alpha1",
    "kind": "FlashSale",
    "metadata": {"name": NAME},
    "spec": {"itemId": ITEM, "displayName": "helm test", "stock": 1},
}


def call(method: str, url: str, body: object = None, **headers: str) -> tuple[int, Any]:
    """Send a request and return the status and JSON of the response.

    An error status is returned like any other. The status is 0 if there was no response. A proxy
    can answer with a text that is no JSON, which is returned as it is.
    """
    request = urllib.request.Request(  # noqa: S310 - the cluster's own addresses
        url,
        method=method,
        data=json.dumps(body).encode() if body is not None else None,
        headers={"Content-Type": "application/json", **headers},
    )
    secure = url.startswith("https:")
    context = relaxed(ssl.create_default_context(cafile=ACCOUNT / "ca.crt")) if secure else None
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as response:  # noqa: S310
            return response.status, content(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, content(error.read())
    except OSError as error:
        return 0, str(error)


def content(body: bytes) -> Any:  # noqa: ANN401
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def flash_sales(method: str, path: str = "", body: object = None) -> tuple[int, Any]:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    resource = f"apis/flashsale.dev/v1alpha1/namespaces/{NAMESPACE}/flashsales"
    token = (ACCOUNT / "token").read_text()
    url = f"https://{host}:{port}/{resource}{path}"
    return call(method, url, body, Authorization=f"Bearer {token}")


def created() -> tuple[int, Any]:
    """Create the FlashSale. The name is random, so a FlashSale that exists is ours."""
    status, answer = flash_sales("POST", body=SALE)
    return 201 if status == 409 and "AlreadyExists" in str(answer) else status, answer


def deleted() -> tuple[int, Any]:
    """Delete the FlashSale. An earlier call whose answer was lost may have deleted it."""
    status, answer = flash_sales("DELETE", f"/{NAME}")
    return 200 if status == 404 else status, answer


def buy(user: str) -> tuple[int, Any]:
    body = {"userId": user, "itemId": ITEM, "quantity": 1}
    headers = {"Idempotency-Key": NAME} | ({USER_HEADER: user} if USER_HEADER else {})
    return call("POST", f"{os.environ['API']}/reserve", body, **headers)


def state() -> tuple[object, Any]:
    status, sale = call("GET", f"{os.environ['API']}/sales/{ITEM}")
    return sale["state"] if status == 200 else status, sale


def recorded(reservation: str) -> str | None:
    """Return a reservation's state in the ledger, None if the ledger does not have it."""

    async def fetch() -> str | None:
        url = os.environ["FLASHSALE_DATABASE_URL"].rstrip("\r\n")
        pool = await ledger.connect(addresses.database_url(url))
        try:
            state: str | None = await pool.fetchval(
                "SELECT state FROM reservations WHERE sale_id = $1 AND reservation_id = $2",
                f"{NAMESPACE}/{NAME}",
                reservation,
            )
            return state
        finally:
            await pool.close()

    return asyncio.run(fetch())


def until(step: str, expected: object, look: Callable[[], tuple[object, Any]]) -> Any:  # noqa: ANN401
    """Call `look` until it returns `expected` and a detail, and return the detail.

    Prints an error message and exits after `DEADLINE_SECONDS`.
    """
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        found, detail = look()
        if found == expected:
            print(f"{step}: {found}", flush=True)
            return detail
        if time.monotonic() > deadline:
            # The text of sys.exit would be lost if the deletion failed, too.
            print(f"{step}: expected {expected}, got {found}: {detail}", file=sys.stderr)
            sys.exit(1)
        time.sleep(0.5)


try:
    until(f"create the FlashSale {NAMESPACE}/{NAME}", 201, created)
    if NEEDS_TOKEN:
        until("open the sale", "Selling", state)
        until("refuse a buyer without a token", 401, lambda: buy("first"))
    else:
        bought = until("buy one unit", 202, lambda: buy("first"))
        until("refuse a second buyer", 409, lambda: buy("second"))
        until(
            "record in the ledger",
            "confirmed",
            lambda: (recorded(bought["reservationId"]), bought),
        )
finally:
    until("delete the FlashSale", 200, deleted)
