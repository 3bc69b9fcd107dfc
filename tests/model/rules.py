"""The parts of the protocol, each of which a run of the model can leave out, and its durations.

For each part, a test shows a run that fails without it. The durations are the code's own.
"""

from dataclasses import dataclass
from typing import Final

from flashsale import heartbeat
from flashsale_api import batcher, sweeper
from flashsale_operator.sales import decision, drain

BEAT: Final = heartbeat.INTERVAL_SECONDS
EXPIRY: Final = float(heartbeat.EXPIRY_SECONDS)
CALL_DEADLINE: Final = heartbeat.CALL_DEADLINE_SECONDS
SWEEP_AGE: Final = sweeper.SWEEP_AGE_MS / 1000
CALLS_IN_FLIGHT: Final = batcher.CALLS_IN_FLIGHT
SETTLED_BEFORE: Final = drain.CALL_DEADLINE_MS / 1000
"""A heartbeat sampled this long after a fence counts everything accepted before the fence."""

SEED_SECONDS: Final = decision.SEED_MS / 1000
"""Greatest age of an operator's observation when it seeds. A rebuild takes longer than this."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Which parts of the protocol are in force. `Rules()` is the whole protocol.

    Each field names the module that implements it. `release_when_acknowledged` and
    `settle_matches_version` are about releases, which exist only in the model so far.
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
    release_when_acknowledged: bool = True
    """Only in the model: `settle` gives a released unit back to the sale and to the buyer's limit.
    `release` does not, because Kafka does not have the event yet."""
    settle_matches: bool = True
    """settle.lua: an outbox entry is deleted only if it has the acknowledged reservation's id."""
    late_answers_ignored: bool = True
    """batcher.py: a reply that arrives after the call's deadline is ignored."""
    unseen_pods_awaited: bool = True
    """drain.py: a pod without a heartbeat may be alive until a heartbeat would have expired."""
    rewound_ledger_noticed: bool = True
    """recorder.py: if the ledger has a lower offset, reading goes back to that offset."""

    settle_matches_version: bool = True
    """Only in the model: the acknowledgement of an acceptance does not settle the release of the
    same reservation."""
    replays_published: bool = True
    """batcher.py: a pod that answers 202 for a replay also publishes the event. If the first call
    was executed but its reply was lost, no pod has the event in memory."""
    cut_off_events_refused: bool = True
    """recorder.py: an event that was accepted before the sale's last rebuild, and was not in it,
    is refused."""
    refused_may_return: bool = True
    """recorder.py: a refused id that is accepted again, under the same key, is recorded."""
    rebuild_guarded: bool = True
    """fence.lua, restore.lua, trust.lua, rebuild.py: each write of a rebuild names its rebuild and
    its run of the server, and is refused if either has changed."""
    seed_is_fresh: bool = True
    """apply.lua, decision.py: an operator seeds a sale without a rebuild only once, and only soon
    after its observation."""
    fence_on_replication_id: bool = True
    """sale.lua: the fence compares the replication id as well, because a server that was demoted
    and promoted again keeps its run_id."""
    fence_latched: bool = True
    """sale.lua: a script that finds a sale under another run makes it untrusted for good, because
    the server can forget its replication id."""
    lost_mark_ends_rebuild: bool = True
    """fence.lua: a rebuild whose mark is gone ends, because the pods' heartbeats are gone too."""
    operator_commits_kept: bool = True
    """ledger.py: every commit of an operator is on the standby, so no revision is taken twice."""
    fenced_not_republished: bool = True
    """page.lua: the records of a fenced sale are not published again."""
    heartbeats_of_this_run: bool = True
    """heartbeat.py: a heartbeat with the clock of another run reports nothing yet."""
    ledger_knows_more: bool = True
    """decision.py, fence.lua: a sale with fewer accepted units than the ledger is rebuilt."""
