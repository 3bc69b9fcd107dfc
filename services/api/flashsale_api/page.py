"""GET /: a page that shows the sales live, and as a table without JavaScript.

`page.html` has the page's style and script inside. A strict Content-Security-Policy allows exactly
these two by their hashes, and no other source.
"""

import re
from base64 import b64encode
from collections.abc import Iterable
from functools import partial
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Final

import msgspec

from flashsale_api.responses import NOT_STORED, Handler, Headers, RequestHeaders, Respond
from flashsale_api.sales import Encoded, SaleList, SaleView

PAGE_PATH: Final = b"/"

_PLACE: Final = "<!--sales-->"
_HEADS: Final = "Item", "State", "Confirmed", "Held", "Available", "Allocated", "Opens", "Closes"


class _Problem(msgspec.Struct, frozen=True):
    title: str


_decode_sales = msgspec.json.Decoder(SaleList).decode
_decode_problem = msgspec.json.Decoder(_Problem).decode


class Page:
    """The endpoint. `sales` is the handler of GET /sales, whose answers the page shows."""

    def __init__(self, sales: Handler) -> None:
        self._sales = sales
        text = (files("flashsale_api") / "page.html").read_text(encoding="utf-8")
        self._before, _, self._after = text.partition(_PLACE)
        self._headers: Headers = (
            (b"content-type", b"text/html; charset=utf-8"),
            (b"content-security-policy", _policy(text).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cross-origin-resource-policy", b"same-origin"),
        )
        self._shown: tuple[bytes, Encoded] | None = None
        """An answer of GET /sales, and the page that shows it."""

    def handle(self, headers: RequestHeaders, body: bytes | bytearray, respond: Respond) -> None:
        """Answers GET and HEAD. The page is rendered again only if the sales have changed."""
        # The condition of the request is about the page, not about the sales.
        self._sales((), body, partial(self._answer, headers, respond))

    def _answer(
        self,
        headers: RequestHeaders,
        respond: Respond,
        status: int,
        sent: Headers,
        body: bytes,
    ) -> None:
        if status != 200:
            kept = tuple(each for each in sent if each[0] == b"retry-after")
            title = escape(_decode_problem(body).title)
            page = self._page(f"<p>The sales cannot be shown: {title}. Try again in a moment.</p>")
            respond(status, (*self._headers, *kept, NOT_STORED), page)
            return
        if self._shown is None or self._shown[0] != body:
            page = self._page(_content(_decode_sales(body)))
            self._shown = body, Encoded.of(page, self._headers)
        self._shown[1].respond(headers, respond)

    def _page(self, content: str) -> bytes:
        return f"{self._before}{content}{self._after}".encode()


def _policy(text: str) -> str:
    """Returns the Content-Security-Policy of a page."""
    style, script = (
        " ".join(
            f"'sha256-{b64encode(sha256(part.encode()).digest()).decode()}'"
            for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        )
        for tag in ("style", "script")
    )
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {script}",
            f"style-src {style}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _content(found: SaleList) -> str:
    if found.unreadable:
        names = escape(", ".join(found.unreadable))
        return f"<p>Sales that cannot be shown now: {names}.</p>{_table(found.sales)}"
    return _table(found.sales) or "<p>There is no sale.</p>"


def _table(sales: Iterable[SaleView]) -> str:
    rows = "".join(f"<tr>{_cells(sale)}</tr>\n" for sale in sales)
    if not rows:
        return ""
    heads = "".join(f'<th scope="col">{head}</th>' for head in _HEADS)
    return (
        '<div class="table" role="region" aria-label="Sales" tabindex="0"><table>\n'
        f"<caption>All sales</caption>\n<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{rows}</tbody>\n</table></div>"
    )


def _cells(sale: SaleView) -> str:
    name = escape(sale.display_name or sale.item_id)
    held, available = sale.held or 0, sale.available
    numbers = ["-", "-", "-", f"{sale.allocated:,}"]
    if available is not None:
        counts = sale.allocated - available - held, held, available
        numbers[:3] = (f"{count:,}" for count in counts)
    state = re.sub(r"(?<=[a-z])[A-Z]", lambda letter: f" {letter[0].lower()}", sale.state)
    return "".join(
        (
            f'<th scope="row">{name}<small>{escape(sale.item_id)}</small></th>',
            f"<td>{escape(state)}</td>",
            *(f'<td class="number">{number}</td>' for number in numbers),
            *(f"<td>{_time(time)}</td>" for time in (sale.starts_at, sale.ends_at)),
        )
    )


def _time(time: str | None) -> str:
    """Returns an RFC 3339 time of the API as people read it, in UTC."""
    return f'<time datetime="{time}">{time[:10]} {time[11:19]} UTC</time>' if time else ""
