"""Records and the scripts' answers: read them, write them, and refuse anything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsale.errors import ContractViolation
from flashsale.fields import SALE_ID_PATTERN, USER_ID_PATTERN
from flashsale.reservations import (
    Answer,
    BatchReply,
    Expired,
    OutboxEntry,
    Outcome,
    Record,
    Snapshot,
    State,
    Transition,
    TransitionAnswer,
    TransitionReply,
    parse_expired,
    parse_reply,
    parse_transitions,
)

HELD = "held,1,2,1000,ann,k,61000,,"
times = st.integers(0, 4_102_444_800_000)
names = st.from_regex(USER_ID_PATTERN)
versions = st.integers(1, 2**53)
optional_names = st.one_of(st.just(""), names)
records = st.builds(
    Record,
    st.sampled_from(State),
    versions,
    st.integers(1, 1_000),
    times,
    names,
    optional_names,
    st.none() | times,
    st.none() | times,
    optional_names,
)


@given(records)
def test_the_text_of_a_record_is_read_as_the_same_record(record: Record) -> None:
    assert Record.parse(str(record)) == record
    assert str(Record.parse(str(record))) == str(record)


def test_a_held_record_has_no_time_of_confirmation() -> None:
    record = Record(State.HELD, 1, 2, 1_000, "ann", "k", 61_000)
    assert str(record) == HELD
    assert Record.parse(HELD) == record


@pytest.mark.parametrize("state", ["accepted", "confirmed"])
def test_a_record_without_a_hold_was_confirmed_when_it_was_accepted(state: str) -> None:
    record = Record(State.CONFIRMED, 1, 2, 1_000, "ann", "", None, 1_000, "")
    assert Record.parse(f"{state},1,2,1000,ann,") == record


@pytest.mark.parametrize(
    "text",
    [
        "",
        "held",
        "held,1,2,1000,ann",
        "held,1,2,1000,ann,k,61000",
        "held,1,2,1000,ann,k,61000,",
        f"{HELD},",
        "refused,1,2,1000,ann,k",
        "HELD,1,2,1000,ann,k,61000,,",
        "held,one,2,1000,ann,k,61000,,",
        "held,1,2.5,1000,ann,k,61000,,",
        "held,1,2,soon,ann,k,61000,,",
        "held,1,2,1000,ann,k,later,,",
        "held,1,2,1000,ann,k,61000,now,",
        "held,1,2,253402300800000,ann,k,61000,,",
        "held,1,2,1000,ann,k,253402300800000,,",
        "confirmed,1,2,1000,ann,k,61000,253402300800000,",
        "confirmed,1,2,-1,ann,k",
    ],
)
def test_another_text_is_not_a_record(text: str) -> None:
    with pytest.raises(ContractViolation, match="not a reservation record"):
        Record.parse(text)


@given(records, st.from_regex(SALE_ID_PATTERN), versions, st.sampled_from(["", "e-1"]))
def test_an_outbox_entry_has_the_whole_event(
    record: Record, sale_id: str, revision: int, engine: str
) -> None:
    fields = {
        "id": "r-1",
        "record": str(record),
        "sale": f"{sale_id},7,9,{revision}",
        "traceparent": "",
        "engine": engine,
    }
    entry = OutboxEntry.parse("x", "5-1", fields)
    snapshot = Snapshot(sale_id, 7, 9, revision, engine)
    assert entry == OutboxEntry("x", "5-1", "r-1", record, snapshot, "")
    for missing in ("id", "record", "sale", "traceparent"):
        others = {name: text for name, text in fields.items() if name != missing}
        with pytest.raises(ContractViolation, match="outbox entry 5-1"):
            OutboxEntry.parse("x", "5-1", others)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("accepted 5-1", Answer(Outcome.ACCEPTED, "5-1")),
        (f"replayed {HELD}", Answer(Outcome.REPLAYED, HELD)),
        *((word, Answer(word)) for word in Outcome if word not in {"accepted", "replayed"}),
    ],
)
def test_each_answer_to_a_request_is_read(line: str, answer: Answer) -> None:
    reply = parse_reply(f"1000,5,0,3001,60000,4,default/phone,7,9,3,e-1\nsold_out\n{line}")
    assert reply == BatchReply(
        now_ms=1_000,
        snapshot=Snapshot("default/phone", 7, 9, 3, "e-1"),
        available=5,
        starts_ms=0,
        version=3_001,
        hold_ms=60_000,
        held=4,
        answers=[Answer(Outcome.SOLD_OUT), answer],
    )


@pytest.mark.parametrize("word", ["unknown", "unsupported", "fenced", "other_engine"])
def test_one_word_answers_a_whole_batch(word: str) -> None:
    assert parse_reply(word) is Outcome(word)
    assert parse_transitions(word) is Transition(word)
    assert parse_expired(word) is Transition(word)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (f"changed 5-1 {HELD}", (Transition.CHANGED, "5-1", Record.parse(HELD))),
        (f"replayed {HELD}", (Transition.REPLAYED, "", Record.parse(HELD))),
        *(
            (word, (word, "", None))
            for word in Transition
            if word not in {Transition.CHANGED, Transition.REPLAYED}
        ),
    ],
)
def test_each_answer_to_a_call_is_read(
    line: str, answer: tuple[Transition, str, Record | None]
) -> None:
    reply = parse_transitions(f"1000,default/phone,7,9,3,\nother_order\n{line}")
    expected = [TransitionAnswer(Transition.OTHER_ORDER), TransitionAnswer(*answer)]
    assert reply == TransitionReply(1_000, Snapshot("default/phone", 7, 9, 3), expected)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_each_expired_hold_is_read(count: int) -> None:
    record = Record(State.EXPIRED, 2, 1, 1_000, "ann", "", 61_000)
    holds = [(f"r-{n}", f"5-{n}", record) for n in range(count)]
    lines = "".join(f"\n{own_id} {entry_id} {text}" for own_id, entry_id, text in holds)
    reply = parse_expired(f"1000,default/phone,7,9,3,e-1{lines}")
    assert reply == Expired(1_000, Snapshot("default/phone", 7, 9, 3, "e-1"), holds)
