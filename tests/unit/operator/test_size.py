"""`flashsalectl size` computes the worked examples of docs/operations.md from measured figures."""

import json
import re
import shlex
from statistics import median

import msgspec
import pytest

from bench.holds import CONFIRMATIONS, STEADY
from bench.results import Findings
from flashsale_operator.ctl import size
from flashsale_operator.ctl.commands import run
from tests.support.paths import DOCS

SIZING = (DOCS / "operations.md").read_text().partition("\n## Sizing\n")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"^\$ flashsalectl (size .*)\n((?:(?!\$|```).*\n)*)", SIZING, re.MULTILINE)


def test_the_example_has_the_output_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    [(arguments, output)] = EXAMPLES

    assert run(shlex.split(arguments), {}) == 0
    assert capsys.readouterr() == (output, "")


def test_the_table_of_sizes_has_the_output_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = re.findall(
        r"^\| (1|10|100),000 \| ([\d,]+) \| (none|\d+ s) \| (.*) \|$", SIZING, re.MULTILINE
    )
    assert {(buyers, hold == "none") for buyers, _, hold, _ in rows} == {
        (buyers, without) for buyers in ("1", "10", "100") for without in (True, False)
    }
    for buyers, stock, hold, cells in rows:
        holds = [] if hold == "none" else ["--hold", hold.removesuffix(" s")]
        line = ["size", "--buyers", f"{buyers}000", "--stock", stock.replace(",", ""), *holds]
        assert run(line, {}) == 0
        output = capsys.readouterr().out
        found = re.findall(r"^(?:API|consumer|Redis) +(\d+)|([\d.,]+ [MG]B)", output, re.MULTILINE)
        assert [number or amount for number, amount in found] == cells.split(" | ")


def test_the_tables_have_the_constants() -> None:
    for process in ("API", "Redis", "consumer"):
        refused = size.REFUSED.get(process, "")
        row = f"| {process} | {size.ACCEPTED[process]} | {refused} | {size.CONFIRMED[process]} |"
        assert row.replace("|  |", "| |") in SIZING


def test_the_constants_cover_the_measured_figures() -> None:
    found = msgspec.json.decode((DOCS / "performance.json").read_bytes(), type=Findings)
    for process in ("API", "Redis"):
        for constant, rounds in (
            (size.ACCEPTED, found.reserve["accepted"]),
            (size.REFUSED, found.reserve["sold out, with keys"]),
            (size.CONFIRMED, found.holds.confirmed[STEADY]),
        ):
            assert constant[process] >= median(one.cpu[process] for one in rounds) - 0.005
    assert size.ACCEPTED["consumer"] >= median(one.cpu["consumer"] for one in found.drains)
    large = max(found.memory, key=lambda one: one.stock)
    assert large.bytes_each <= size.REDIS_BYTES
    assert CONFIRMATIONS == 5_000


def test_confirmations_need_pods_of_their_own_if_holds_are_short() -> None:
    short, long, without = (size.size_of(50_000, 50_000, hold) for hold in (1, 600, None))

    assert short.api_pods > long.api_pods == without.api_pods
    assert short.redis_primaries > long.redis_primaries


def test_redis_is_planned_with_the_share_of_a_core_that_the_measurements_name() -> None:
    assert f"* 1.22 / {size.REDIS_LOAD}\n" in (DOCS / "performance.md").read_text()
    assert size.size_of(120_000, 1, None).redis_primaries == 1
    assert size.size_of(200_000, 1, None).redis_primaries == 2  # one core would be fully used


def test_the_topics_grow_to_the_limit_of_their_size() -> None:
    most = size.size_of(1, 100_000_000, None)

    assert most.kafka_disk == 2 * 3 * 15 * 1024**3
    assert size.size_of(1, 10_000_000, None).kafka_disk == 3 * 10_000_000 * 1300


def test_json_has_whole_numbers_and_the_wishes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["size", "--buyers", "1000", "--stock", "100", "-o", "json"], {}) == 0

    found = json.loads(capsys.readouterr().out)
    assert (found["buyers"], found["stock"], found["holdSeconds"]) == (1000, 100, None)
    assert (found["accepted"], found["refused"]) == (100, 900)
    assert found["kafkaDisk"] == 100 * 1300 * 3
    assert {type(value) for name, value in found.items() if name != "holdSeconds"} == {int}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("--stock 1", "Missing option '--buyers'."),
        ("--buyers 1", "Missing option '--stock'."),
        ("--buyers 0 --stock 1", "'--buyers': 0 is not in the range 1<=x<=100000000."),
        ("--buyers 1 --stock -1", "'--stock': -1 is not in the range 1<=x<=100000000."),
        ("--buyers 1 --stock 1.5", "'--stock': '1.5' is not a valid integer range."),
        ("--buyers 1 --stock 1 --hold 0", "'--hold': 0 is not in the range 1<=x<=86400."),
        ("--buyers 1 --stock 1 --hold 10m", "'--hold': '10m' is not a valid integer range."),
        ("--buyers 1 --stock 1 -o yaml", "'yaml' is not one of 'table', 'json'."),
    ],
)
def test_an_impossible_value_is_named(
    arguments: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["size", *arguments.split()], {}) == 2

    printed = capsys.readouterr()
    assert printed.out == ""
    assert error in printed.err
