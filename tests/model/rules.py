"""The parts of the protocol, each of which a run of the model can leave out, and its durations.

For each part, a test shows a run that fails without it. The durations are the code's own.
"""

from dataclasses import dataclass
from typing import Final

from flashsale import heartbeat, nodes
from flashsale_api import calls, sweeper
from flashsale_operator.sales import decision, drain

BEAT: Final = heartbeat.INTERVAL_SECONDS
EXPIRY: Final = float(heartbeat.EXPIRY_SECONDS)
CALL_DEADLINE: Final = heartbeat.CALL_DEADLINE_SECONDS
SWEEP_AGE: Final = sweeper.SWEEP_AGE_MS / 1000
CALLS_IN_FLIGHT: Final = calls.CALLS_IN_FLIGHT
SETTLED_BEFORE: Final = drain.SAMPLED_AFTER_MS / 1000
"""A heartbeat sampled this long after a fence counts everything accepted before the fence."""

SILENT: Final = 2 * nodes.PROBE_SECONDS
"""How long a primary of a cluster can be silent until each pod has closed its link to it."""

SEED_SECONDS: Final = decision.SEED_MS / 1000
"""Greatest age of an operator's observation when it seeds. A rebuild takes longer than this."""

ACKNOWLEDGED_WITHIN: Final = 2.0
"""A confirmation or cancellation is answered 200 only if Kafka acknowledges its event this soon
after the script call began. A rebuild waits longer than the call's deadline and this time: at
least until the heartbeat of an unseen pod would have expired."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Which parts of the protocol are in force. `Rules()` is the whole protocol.

    Each field names the module that implements it, or `holds` for a part of
    docs/adr/0018-holds.md.
    """

    publish_at_once: bool = True
    """publisher.py: the pod that accepted a reservation publishes it from memory at once."""
    fence: bool = True
    """sale.lua: a sale that was written under another run of the server is fenced."""
    drain: bool = True
    """drain.py: a rebuild waits until the outbox is empty, no pod holds an event, and the ledger
    has read the topic to its ends."""
    capacity_in_events: bool = True
    """recorder.py: the ledger raises a sale's capacity to the capacity in each event."""
    settle_matches: bool = True
    """settle.lua: an outbox entry is deleted only if it has the acknowledged reservation's id."""
    late_calls_expected: bool = True
    """batcher.py: if a call was repeated, a refusal is not final. The first call can still be on
    its way, and accept the request once the sale has a unit again."""
    late_answers_ignored: bool = True
    """calls.py: a reply that arrives after the call's deadline is ignored."""
    unseen_pods_awaited: bool = True
    """drain.py: a pod without a heartbeat may be alive until a heartbeat would have expired."""
    rewound_ledger_noticed: bool = True
    """recorder.py: if the ledger has a lower offset, reading goes back to that offset."""
    replays_published: bool = True
    """batcher.py: a pod that answers 202 for a replay also publishes the event. If the first call
    was executed but its reply was lost, no pod has the event in memory."""
    cut_off_events_refused: bool = True
    """recorder.py: an event that was made before the sale's last rebuild, and was not in it, is
    void. A reservation that the ledger does not know is refused."""
    ends_recorded: bool = True
    """recorder.py: the end of a reservation is recorded even if it does not fit. Redis sells its
    units again, and the capacity in the next events contains them."""
    refused_versions_grow: bool = True
    """recorder.py: a refused row keeps its newest version. An older one cannot return alone."""
    refused_may_return: bool = True
    """recorder.py: a refused id that is accepted again, under the same key, is recorded."""
    rebuild_guarded: bool = True
    """fence.lua, restore.lua, trust.lua, rebuild.py: each write of a rebuild names its rebuild and
    its run of the server, and is refused if either has changed."""
    seed_is_fresh: bool = True
    """apply.lua, decision.py: an operator seeds a sale without a rebuild only once, and only soon
    after its observation."""
    served_not_seeded: bool = True
    """decision.py: a sale that Redis had before is never seeded. If the ledger lost it too, the
    events in Kafka are read first."""
    fence_on_replication_id: bool = True
    """sale.lua: the fence compares the replication id as well, because a server that was demoted
    and promoted again keeps its run_id."""
    fence_latched: bool = True
    """sale.lua: a script that finds a sale under another run makes it untrusted for good, because
    the server can forget its replication id."""
    lost_mark_ends_rebuild: bool = True
    """fence.lua: a rebuild whose mark is gone ends, because the pods' heartbeats are gone too."""
    other_run_ends_rebuild: bool = True
    """holds: a rebuild ends if Redis has another run than when it began, because the heartbeats in
    a copy can look expired while their pods live."""
    operator_commits_kept: bool = True
    """ledger.py: every commit of an operator is on the standby, so no revision is taken twice."""
    fenced_not_republished: bool = True
    """page.lua: the records of a fenced sale are not published again."""
    times_ahead_ignored: bool = True
    """heartbeat.py, recovery.py: after a failover to a server whose clock is behind, the heartbeat
    of a dead pod and the lease of a dead rebuild do not last longer. The same is true after the
    clock was set back."""
    set_clock_ends_rebuild: bool = True
    """drain.py: a rebuild ends if the clock was set during its wait, because the heartbeat of a
    living pod then looks expired, or is ahead."""
    silent_links_closed: bool = True
    """nodes.py: a pod closes its link to a primary that does not answer. A primary that was frozen,
    replaced and thawed executes the calls that it got meanwhile."""
    ledger_knows_more: bool = True
    """decision.py, fence.lua: a sale with fewer accepted units than the ledger is rebuilt."""
    rebuilds_compared: bool = True
    """decision.py, fence.lua: a sale from before the ledger's last rebuild is rebuilt."""
    closed_rebuilds_compared: bool = True
    """decision.py: so is one that the ledger has closed, although it has the ledger's counts."""

    # Holds: the state machine.

    expiry_is_a_transition: bool = True
    """holds: one script finds the due holds and changes them, so no confirmation comes between."""
    expiry_has_grace: bool = True
    """holds: a hold expires some time after its `expires`, so a payment in the last second wins."""
    confirmed_needs_order: bool = True
    """holds: a reservation that is confirmed for an order is cancelled only with its reference."""
    unpaid_order_is_set: bool = True
    """holds: `confirm` gives a reservation of a sale without holds its order reference."""
    ended_not_replayed: bool = True
    """holds: a repeated `reserve` is not answered 202 if its hold has expired or was cancelled."""
    only_expiry_counts: bool = True
    """holds: cancellations by the shop do not count for the limit of expired holds."""
    limit_spares_changes: bool = True
    """holds: a full outbox refuses `reserve` only."""
    unique_versions: bool = True
    """holds: a version is above all versions of before the sale's last rebuild, so no two changes
    of a reservation have the same one."""

    # Holds: durable before 200.

    confirmation_waits: bool = True
    """holds: a confirmation is answered 200 only after Kafka has acknowledged its event."""
    cancellation_waits: bool = True
    """holds: the same of a cancellation."""
    repeats_wait: bool = True
    """holds: a repeated confirmation or cancellation publishes the event again, and waits."""
    late_acknowledgements_ignored: bool = True
    """holds: an acknowledgement after `ACKNOWLEDGED_WITHIN` is answered 202. The sale may have
    been rebuilt without the event, and is then about to sell the unit again."""
    orders_need_a_heartbeat: bool = True
    """heartbeat.py: a pod asks a server that takes none of its heartbeats about no order. A
    primary that was cut off and replaced takes no write, and would give outdated answers."""
    memory_by_version: bool = True
    """holds: the publisher tells a reservation's events apart by version, so the acknowledgement of
    one is not taken for that of another."""

    # Holds: settling and recording.

    release_when_acknowledged: bool = True
    """holds: only `settle` gives a released unit back to the sale and to the buyer's limit, because
    until then Kafka may not have the event."""
    released_above_stock_withdrawn: bool = True
    """holds: while buyers have more units than a lowered stock, no released one is sold again."""
    settle_matches_version: bool = True
    """holds: `settle` deletes an entry only if it has the acknowledged event's version."""
    void_before_fold: bool = True
    """holds: the ledger drops void events before it keeps one event per reservation."""
    void_changes_dropped: bool = True
    """holds: an event of before the last rebuild changes no known reservation either."""
    counted_by_difference: bool = True
    """holds: the ledger counts by the difference of a reservation's old and new state."""
    announced_is_kept: bool = True
    """holds: announcing starts at the offsets that are announced, not at those that are
    recorded."""

    # Holds: rebuilding and freeing.

    holds_restored: bool = True
    """holds: a rebuild restores when each hold expires."""
    holds_extended: bool = True
    """holds: for some time after a rebuild no hold expires, because a confirmation may be lost."""
    orders_restored: bool = True
    """holds: a rebuild restores the order references."""
    expired_counts_restored: bool = True
    """holds: a rebuild restores how many holds of each buyer have expired."""
    decided_units_compared: bool = True
    """holds: a sale with fewer units that are not held than the ledger is rebuilt."""
    freed_without_holds: bool = True
    """holds: keys are deleted only if no hold is open."""
    freed_if_all_recorded: bool = True
    """holds: keys are deleted only if released and held units are equal to the ledger's too."""
    closed_holds_rebuilt: bool = True
    """holds: a closed sale without keys is rebuilt if the ledger has open holds."""
