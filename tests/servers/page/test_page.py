"""GET / in a real Chromium. Needs Redis, Kafka, and an installed Chromium.

PICTURES=FOLDER keeps the picture of the page as FOLDER/page.png, with a longer history.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

import httpx
import pytest
from playwright.async_api import Browser, Locator, Page, Route, async_playwright, expect

from dev import debian
from dev.services import Addresses, ApiServer
from flashsale.inventory import Inventory
from flashsale.reservations import OrderCall
from tests.support.api import reserve
from tests.support.orders import NewApi, Shop

Visit: TypeAlias = Callable[..., Awaitable[Page]]

BROWSERS: Final = "chromium", "chromium-browser", "google-chrome"
MS: Final = 60_000
"""How long a page may take to show a change, on a busy machine."""
PHONE: Final = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
DESKTOP: Final = {"viewport": {"width": 1280, "height": 800}}

expect.set_options(timeout=MS)


def _installed() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Chromium. In CI it is installed from Debian's packages if it is missing."""
    if _installed() is None and os.environ.get("CI") == "true":
        debian.require({"chromium": "chromium"}, "the test of the page")
    if (path := _installed()) is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    return path


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium)
        yield browser
        await browser.close()


@pytest.fixture
async def visit(browser: Browser, shop: Shop) -> AsyncIterator[Visit]:
    """A function that opens the page in a new browser profile.

    The page must report no error, such as a violation of its Content-Security-Policy. Chromium also
    reports each answer from 400 on.
    """
    errors: list[str] = []

    async def visit(url: str = "", **options: Any) -> Page:  # noqa: ANN401 - of new_context
        context = await browser.new_context(**options)
        page = await context.new_page()
        page.set_default_timeout(MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        await page.goto(url or str(shop.buyers.base_url))
        return page

    yield visit
    assert [error for error in errors if not error.startswith("Failed to load resource")] == []


def card_of(page: Page, name: str) -> Locator:
    return page.get_by_role("article", name=name)


def button_of(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=f"Reserve one unit of {name}")


async def test_a_visitor_buys_a_unit_and_meets_the_limit(shop: Shop, visit: Visit) -> None:
    await shop.open(10, hold_seconds=None, max_per_user=1, display_name="Phone A")
    page = await visit()
    card = card_of(page, "Phone A")
    await expect(card).to_contain_text("Selling")
    await button_of(page, "Phone A").click()
    await expect(card.get_by_role("status")).to_have_text("Confirmed. One unit is yours.")
    await expect(card.get_by_role("listitem")).to_contain_text("1 unit confirmed")
    await expect(
        card.get_by_role("img", name="Of 10 units, 1 confirmed, 0 held, 9 available")
    ).to_be_visible()
    await expect(
        card.get_by_role("img", name="Units taken in the last five minutes: from 0 to 1")
    ).to_be_visible()
    await page.reload()
    await expect(card.get_by_role("listitem")).to_contain_text("1 unit confirmed")
    await button_of(page, "Phone A").click()
    await expect(card.get_by_role("status")).to_have_text(
        "You already have 1 unit of this sale. One buyer can have 1 unit."
    )
    assert (await shop.sale()).accepted == 1


async def test_a_visitor_watches_a_hold_expire(shop: Shop, visit: Visit) -> None:
    await shop.open(1, hold_seconds=2, display_name="Phone B")
    page = await visit()
    card = card_of(page, "Phone B")
    await button_of(page, "Phone B").click()
    await expect(card.get_by_role("status")).to_have_text("Your hold has expired.")
    await expect(card.get_by_role("listitem")).to_contain_text("1 unit expired")
    await expect(card.locator(".n-available")).to_have_text("1")


async def test_a_reservation_shows_its_countdown_and_later_states(shop: Shop, visit: Visit) -> None:
    await shop.open(1, hold_seconds=600, display_name="Phone C")
    page = await visit()
    card = card_of(page, "Phone C")
    async with page.expect_response("**/reserve") as answered:
        await button_of(page, "Phone C").click()
    path = (await (await answered.value).all_headers())["location"]
    own = card.get_by_role("listitem")
    await expect(own).to_contain_text("1 unit held: pay within 9:")
    await expect(card.get_by_role("timer")).to_contain_text("The next hold expires in 10:")
    await expect(card).to_contain_text("Sold out")
    stranger = await visit()
    await button_of(stranger, "Phone C").click()
    await expect(card_of(stranger, "Phone C").get_by_role("status")).to_contain_text(
        "Sold out. 1 unit is only held"
    )
    assert (await shop.confirm(path)).status_code == 200
    await expect(own).to_contain_text("1 unit confirmed")
    assert (await shop.cancel(path, "o1")).status_code == 200
    await expect(own).to_contain_text("1 unit cancelled")
    await expect(card).to_contain_text("Selling")


async def test_a_sale_that_is_not_open_says_when(shop: Shop, visit: Visit) -> None:
    spec = await shop.open(display_name="Phone D", starts_ms=None)
    now_ms = (await shop.inventory.server()).now_ms
    await shop.inventory.apply(replace(spec, starts_ms=now_ms + 3_600_000), 2)
    page = await visit()
    card, status = card_of(page, "Phone D"), card_of(page, "Phone D").get_by_role("status")
    await expect(card.get_by_role("timer")).to_contain_text("Opens in 59:")
    await button_of(page, "Phone D").click()
    await expect(status).to_contain_text("The sale is not open yet. It opens at ")
    ends = replace(spec, starts_ms=now_ms - 1_000, ends_ms=now_ms + 3_600_000, paused=True)
    await shop.inventory.apply(ends, 3)
    await expect(card.get_by_role("timer")).to_contain_text("Closes in 59:")
    await expect(page.locator("#news")).to_have_text("Phone D: Paused")
    await button_of(page, "Phone D").click()
    await expect(status).to_have_text("The sale is paused. Nothing was reserved.")


async def test_an_old_answer_of_a_cdn_does_not_set_the_clock_back(shop: Shop, visit: Visit) -> None:
    spec = await shop.open(display_name="Phone K", starts_ms=None)
    now_ms = (await shop.inventory.server()).now_ms
    await shop.inventory.apply(replace(spec, starts_ms=now_ms + 3_600_000), 2)

    async def cached(route: Route) -> None:
        answer = await route.fetch()
        sent = parsedate_to_datetime(answer.headers["date"]) - timedelta(seconds=300)
        headers = answer.headers | {"date": format_datetime(sent, usegmt=True), "age": "300"}
        await route.fulfill(response=answer, headers=headers)

    page = await visit("about:blank")
    await page.route("**/sales", cached)
    await page.goto(str(shop.buyers.base_url))
    connection = page.locator("#connection")
    await expect(connection).to_have_text("The numbers may be old: a cache sent them.")
    clock = card_of(page, "Phone K").get_by_role("timer")
    await expect(clock).to_contain_text("Opens in 59:")
    await page.unroute_all(behavior="wait")
    # The API answers 304 without an Age.
    await expect(connection).to_have_text("Live, updated once per second.")
    assert await page.evaluate("offset") == 0
    await expect(clock).to_contain_text("Opens in 59:")


async def test_a_lost_sale_keeps_its_card_without_numbers(shop: Shop, visit: Visit) -> None:
    await shop.open(10, display_name="Phone O")
    page = await visit()
    card = card_of(page, "Phone O")
    await expect(card.locator(".n-available")).to_have_text("10")
    await shop.redis.delete(*shop.keys.sold)
    await expect(card.locator(".state")).to_have_text("Unknown")
    await expect(card.locator(".n-available")).to_have_text("-")
    await expect(page.locator("main > p")).to_contain_text("Sales that cannot be shown now: ")


async def test_a_gateway_s_404_does_not_forget_a_reservation(shop: Shop, visit: Visit) -> None:
    await shop.open(10, hold_seconds=600, display_name="Phone L")
    page = await visit()
    own = card_of(page, "Phone L").get_by_role("listitem")
    await button_of(page, "Phone L").click()
    await expect(own).to_contain_text("1 unit held")

    async def lost(route: Route) -> None:
        await route.fulfill(status=404, content_type="text/html", body="default backend")

    await page.route("**/reservations/*", lost)
    async with page.expect_response("**/reservations/*"):
        pass
    await page.unroute("**/reservations/*")
    await page.reload()
    await expect(own).to_contain_text("1 unit held")


async def test_an_order_whose_answer_was_lost_is_not_counted_twice(
    shop: Shop, visit: Visit
) -> None:
    await shop.open(10, hold_seconds=None, display_name="Phone E")
    page = await visit()
    status = card_of(page, "Phone E").get_by_role("status")

    async def lose(route: Route) -> None:
        await route.fetch()
        await route.abort()

    await page.route("**/reserve", lose)
    await button_of(page, "Phone E").click()
    await expect(status).to_contain_text("The answer got lost, so you may have a reservation.")
    await page.unroute("**/reserve")
    await button_of(page, "Phone E").click()
    await expect(status).to_have_text("Confirmed. One unit is yours.")
    assert (await shop.sale()).accepted == 1


async def test_an_order_whose_answer_was_lost_survives_a_reload(shop: Shop, visit: Visit) -> None:
    await shop.open(10, hold_seconds=None, display_name="Phone I")
    page = await visit()
    status = card_of(page, "Phone I").get_by_role("status")

    async def lose(route: Route) -> None:
        await route.fetch()
        await route.abort()

    await page.route("**/reserve", lose)
    await button_of(page, "Phone I").click()
    await expect(status).to_contain_text("The answer got lost, so you may have a reservation.")
    await page.unroute("**/reserve")
    await page.reload()
    await expect(status).to_contain_text("The answer got lost, so you may have a reservation.")
    await button_of(page, "Phone I").click()
    await expect(status).to_have_text("Confirmed. One unit is yours.")
    assert (await shop.sale()).accepted == 1


async def test_a_reservation_in_a_newer_sale_of_the_item_is_filed_there(
    shop: Shop, visit: Visit
) -> None:
    await shop.open(10, hold_seconds=None, display_name="Phone P")
    page = await visit()
    sale_id = (await shop.sale()).sale_id

    async def newer(route: Route) -> None:
        answer = await route.fetch()
        await route.fulfill(response=answer, json=await answer.json() | {"saleId": "shop/newer"})

    await page.route("**/reserve", newer)
    await button_of(page, "Phone P").click()
    await expect(card_of(page, "Phone P").get_by_role("status")).to_have_text(
        "Another sale of this item has begun. Your reservation is in it."
    )
    assert await page.evaluate("[...Object.keys(stored.paths)]") == ["shop/newer"]
    assert sale_id != "shop/newer"


async def test_a_refusal_leaves_no_doubt_unless_an_answer_was_lost_before(
    shop: Shop, visit: Visit
) -> None:
    await shop.open(10, hold_seconds=None, display_name="Phone Q")
    page = await visit()
    status = card_of(page, "Phone Q").get_by_role("status")

    async def fenced(route: Route) -> None:
        problem = {"type": "urn:flashsale:problem:fenced", "title": "Fenced", "status": 503}
        await route.fulfill(status=503, content_type="application/problem+json", json=problem)

    async def lose(route: Route) -> None:
        await route.abort()

    await page.route("**/reserve", fenced)
    await button_of(page, "Phone Q").click()
    await expect(status).to_contain_text("Nothing was reserved.")
    assert await page.evaluate("stored.keys") == {}
    await page.route("**/reserve", lose)
    await button_of(page, "Phone Q").click()
    await expect(status).to_contain_text("The answer got lost")
    await page.unroute("**/reserve", lose)
    async with page.expect_response("**/reserve"):
        await button_of(page, "Phone Q").click()
    await expect(button_of(page, "Phone Q")).to_have_attribute("aria-busy", "false")
    await expect(status).to_contain_text("The answer got lost")
    assert len(await page.evaluate("Object.values(stored.keys)")) == 1


async def test_two_tabs_remember_the_reservations_of_both(shop: Shop, visit: Visit) -> None:
    await shop.open(10, hold_seconds=None, display_name="Phone J")
    first = await visit()
    second = await first.context.new_page()
    await second.goto(str(shop.buyers.base_url))
    for page in (first, second):
        await button_of(page, "Phone J").click()
        await expect(card_of(page, "Phone J").get_by_role("status")).to_have_text(
            "Confirmed. One unit is yours."
        )
    await first.reload()
    await expect(card_of(first, "Phone J").get_by_role("listitem")).to_have_count(2)


async def test_the_page_recovers_from_an_outage(
    shop: Shop, visit: Visit, new_order_api: NewApi
) -> None:
    await shop.open(display_name="Phone F")
    api = new_order_api()
    page = await visit(api.url)
    connection = page.locator("#connection")
    await expect(connection).to_have_text("Live, updated once per second.")
    api.kill()
    await expect(connection).to_have_text("The numbers may be old: the server does not answer.")
    await asyncio.to_thread(api.start)
    await expect(connection).to_have_text("Live, updated once per second.")


async def test_an_api_that_knows_its_buyers_refuses_the_page_s_user(
    shop: Shop, visit: Visit, order_engine: Addresses, tmp_path: Path
) -> None:
    await shop.open(10, display_name="Phone M")
    setting = {"FLASHSALE_USER_HEADER": "x-user-id"}
    with ApiServer(tmp_path / "api", order_engine, settings=setting) as api:
        for headers in ({"x-user-id": "ann"}, {}):
            page = await visit(api.url, extra_http_headers=headers)
            await button_of(page, "Phone M").click()
            await expect(card_of(page, "Phone M").get_by_role("status")).to_contain_text(
                "this page can only show its sales."
            )


async def test_a_browser_without_timeouts_of_requests_can_buy(shop: Shop, visit: Visit) -> None:
    """Safari 15, the last one of some phones, has no AbortSignal.timeout."""
    await shop.open(10, hold_seconds=None, display_name="Phone N")
    page = await visit("about:blank")
    await page.add_init_script("delete AbortSignal.timeout")
    await page.goto(str(shop.buyers.base_url))
    assert await page.evaluate("AbortSignal.timeout === undefined")
    await button_of(page, "Phone N").click()
    await expect(card_of(page, "Phone N").get_by_role("status")).to_have_text(
        "Confirmed. One unit is yours."
    )


async def test_the_keyboard_is_enough(shop: Shop, visit: Visit) -> None:
    await shop.open(10, hold_seconds=None, display_name="Phone G")
    page = await visit()
    button = button_of(page, "Phone G")
    await expect(button).to_be_visible()
    for _ in range(50):
        await page.keyboard.press("Tab")
        if await button.evaluate("each => each === document.activeElement"):
            break
    await expect(button).to_be_focused()
    assert await button.evaluate("each => getComputedStyle(each).outlineStyle") == "solid"
    await page.keyboard.press("Enter")
    status = card_of(page, "Phone G").get_by_role("status")
    await expect(status).to_have_text("Confirmed. One unit is yours.")
    await expect(button).to_be_focused()


async def test_a_hostile_name_stays_text(shop: Shop, visit: Visit) -> None:
    name = "<img src=x onerror=alert(1)>"
    await shop.open(display_name=name)
    for scripts in (True, False):
        page = await visit(java_script_enabled=scripts)
        shown = page.get_by_role("article") if scripts else page.get_by_role("row")
        await expect(shown.filter(has_text=name)).to_be_visible()
        assert await page.locator("img").count() == 0


async def test_without_javascript_the_page_is_a_table(shop: Shop, visit: Visit) -> None:
    await shop.open(10, display_name="Phone H")
    await shop.hold()
    page = await visit(java_script_enabled=False)
    row = page.get_by_role("row").filter(has_text="Phone H")
    # The table is as old as the cached answer of GET /sales.
    for _ in range(30):
        if "Phone H" in await page.locator("table").inner_text():
            break
        await asyncio.sleep(1)
        await page.reload()
    await expect(row.get_by_role("rowheader")).to_have_text(f"Phone H{shop.item}")
    await expect(page.get_by_role("columnheader", name="Available")).to_be_visible()
    await expect(page.get_by_role("button")).to_have_count(0)


@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
async def test_no_width_needs_horizontal_scrolling(
    shop: Shop, visit: Visit, tmp_path: Path, size: dict[str, Any], scheme: str, scripts: bool
) -> None:
    await shop.open(12_000, display_name="A sale with a name that is longer than a phone is wide")
    page = await visit(color_scheme=scheme, java_script_enabled=scripts, **size)
    await expect(page.get_by_role("article" if scripts else "table").first).to_be_visible()
    # Playwright evaluates also in a page whose own scripts are off.
    width = await page.evaluate("document.documentElement.scrollWidth")
    assert width == size["viewport"]["width"]
    colour = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 21, 27)"}[scheme]
    picture = await page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert picture.startswith(b"\x89PNG")


async def test_the_picture_has_a_history(
    shop: Shop, visit: Visit, new_order_api: NewApi, tmp_path: Path
) -> None:
    """The page's clock runs faster than the server's, so a picture has five minutes of history."""
    folder = os.environ.get("PICTURES")
    steps = 25 if folder else 3
    engine = f"{shop.inventory.engine}-picture"
    api = new_order_api(engine=engine)
    shop = replace(shop, inventory=Inventory(shop.redis, engine))
    await shop.inventory.index.claim(engine)
    now_ms = (await shop.inventory.server()).now_ms
    for item, name, changes in (
        ("phone", "Phone, 128 GB", {"units": 100, "hold_seconds": 600, "max_per_user": 5}),
        ("tickets", "Concert, front row", {"units": 40, "hold_seconds": None}),
        ("headphones", "Headphones", {"units": 2_000, "starts_ms": now_ms + 754_000}),
    ):
        await replace(shop, item=item).open(display_name=name, **changes)
    page = await visit("about:blank", viewport={"width": 1280, "height": 584})
    await page.clock.install(time=now_ms / 1000 - 12 * steps)
    await page.goto(api.url)
    await expect(page.get_by_role("article")).to_have_count(3)
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as buyers:
        for step in range(steps):
            for user in range(round(6 / (1 + step / 8))):
                held = await reserve(buyers, "phone", f"user-{step}-{user}")
                if user % 2:
                    call = OrderCall(held.json()["reservationId"], "o1")
                    await shop.inventory.change("confirm", "phone", [call], timeout_seconds=5)
                await reserve(buyers, "tickets", f"user-{step}-{user}")
            await asyncio.sleep(1.2)  # until the cached answer is old
            await page.clock.fast_forward(12_000)
    await button_of(page, "Phone, 128 GB").click()
    await expect(card_of(page, "Phone, 128 GB").get_by_role("listitem")).to_contain_text("held")
    where = Path(folder or tmp_path) / "page.png"
    await page.screenshot(path=where, full_page=True)
    assert where.stat().st_size < 150_000
