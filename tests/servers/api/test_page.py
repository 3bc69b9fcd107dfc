"""GET /: the page as bytes. `tests/servers/page` looks at it in a browser."""

import re
from base64 import b64encode
from hashlib import sha256

import httpx
from redis.asyncio import Redis

from dev.stack.servers import RedisServer
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.sale import rfc3339_of_ms
from tests.support.api import OWN_SALE, OpenSale, problem, reserve
from tests.support.eventually import until


async def test_the_page_has_a_table_of_the_sales(
    http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    name = "<script>alert(1)</script> \"Tom\" & 'Ann'"
    starts = 1_700_000_000_000
    await open_sale(item, 12_000, hold_seconds=60, starts_ms=starts, display_name=name)
    assert (await reserve(http, item)).status_code == 202

    async def row() -> str | None:
        page = (await http.get("/")).text
        found = re.search(rf"<tr>(?:(?!</tr>).)*<small>{item}</small>.*?</tr>", page)
        return found[0] if found and "11,999" in found[0] else None

    found = await until(row)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &quot;Tom&quot; &amp; &#x27;Ann&#x27;" in found
    cells = re.findall(r"<td[^>]*>(.*?)</td>", found)
    assert cells[:5] == ["Selling", "0", "1", "11,999", "12,000"]
    assert cells[5] == f'<time datetime="{rfc3339_of_ms(starts)}">2023-11-14 22:13:20 UTC</time>'


async def test_only_the_page_s_own_style_and_script_may_run(http: httpx.AsyncClient) -> None:
    answer = await http.get("/")
    policy = dict(
        each.split(" ", 1) for each in answer.headers["content-security-policy"].split("; ")
    )
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = b64encode(sha256(content.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg')", answer.text)


async def test_the_page_is_cached_like_the_sales(own_http: httpx.AsyncClient) -> None:
    """The engine is the test's own, because no other sale may change the page."""

    async def shown() -> httpx.Response | None:
        answer = await own_http.get("/")
        return answer if f"<small>{OWN_SALE.item_id}</small>" in answer.text else None

    page = await until(shown)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"] == (await own_http.get("/sales")).headers["cache-control"]
    etag = page.headers["etag"]
    again = await own_http.get("/", headers={"If-None-Match": etag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    head = await own_http.head("/?from=mail")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(page.content))
    assert head.headers["content-security-policy"] == page.headers["content-security-policy"]
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        answer = await own_http.request(method, "/")
        problem(answer, 405, "method-not-allowed")
        assert answer.headers["allow"] == "GET, HEAD"


async def test_without_redis_the_page_says_so(
    own_http: httpx.AsyncClient, own_redis: RedisServer
) -> None:
    assert (await own_http.get("/")).status_code == 200
    own_redis.kill()

    async def unavailable() -> httpx.Response | None:
        answer = await own_http.get("/")
        return answer if answer.status_code == 503 else None

    answer = await until(unavailable)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["retry-after"] == "1"
    assert "The sales cannot be shown: Redis does not answer." in answer.text
    assert "</html>" in answer.text


async def test_a_sale_shows_when_its_next_hold_expires(
    http: httpx.AsyncClient, open_sale: OpenSale, inventory: Inventory, redis: Redis, item: str
) -> None:
    await open_sale(item, hold_seconds=60)
    assert "nextExpiryAt" not in (await http.get(f"/sales/{item}")).json()
    for user in ("ann", "bob"):
        assert (await reserve(http, item, user)).status_code == 202
    first = (await inventory.holds({item: 0}))[item].first_due_ms

    async def shown() -> bool:
        sale = (await http.get(f"/sales/{item}")).json()
        listed = (await http.get("/sales")).json()["sales"]
        return sale.get("nextExpiryAt") == rfc3339_of_ms(first) and sale in listed

    await until(shown)
    run = (await inventory.sales([item]))[item].run_id
    await redis.hset(ItemKeys.of(item).sale, "run_id", "0")

    async def fenced() -> dict[str, object] | None:
        found: dict[str, object] = (await http.get(f"/sales/{item}")).json()
        return found if found["state"] == "Fenced" else None

    assert not {"nextExpiryAt", "available", "held"} & set(await until(fenced))

    async def dashes() -> list[str] | None:
        found = re.search(rf"<small>{item}</small></th>(.*?)</tr>", (await http.get("/")).text)
        cells = re.findall(r"<td[^>]*>(.*?)</td>", found[1]) if found else []
        return cells if cells[:1] == ["Fenced"] else None

    assert (await until(dashes))[1:5] == ["-", "-", "-", "100"]
    await redis.hset(ItemKeys.of(item).sale, "run_id", run)
