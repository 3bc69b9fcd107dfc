"""The page about sales that Redis cannot show, and without names. The sales are fixed."""

import pytest

from flashsale_api import responses
from flashsale_api.page import Page
from flashsale_api.responses import JSON, RequestHeaders, Respond
from flashsale_api.sales import Encoded

PHONE = b'{"itemId":"phone","saleId":"default/x","state":"Selling","allocated":1,"maxPerUser":1}'


@pytest.mark.parametrize(
    ("sales", "shown"),
    [
        (b'{"sales":[]}', "<p>There is no sale.</p>"),
        (b'{"sales":[],"unreadable":["a","b"]}', "<p>Sales that cannot be shown now: a, b.</p>"),
        (b'{"sales":[%b]}' % PHONE, '<th scope="row">phone<small>phone</small></th>'),
    ],
)
async def test_the_page_shows_each_item(sales: bytes, shown: str) -> None:
    answers = []
    page = Page(responses.fixed(200, (JSON,), sales))
    page.handle((), b"", lambda status, _, body: answers.append((status, body.decode())))
    [(status, body)] = answers
    assert status == 200
    assert shown in body


async def test_the_condition_of_a_request_is_about_the_page() -> None:
    def sales(headers: RequestHeaders, _: bytes | bytearray, respond: Respond) -> None:
        Encoded.of(b'{"sales":[]}').respond(headers, respond)

    found: list[int] = []
    Page(sales).handle([(b"if-none-match", b"*")], b"", lambda status, *_: found.append(status))
    assert found == [304]
