"""The parts of the protocol that can be left out of the model, one by one, to see what they are
for; and the durations, which are the code's own.
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
"""A heartbeat sampled this long after a fence counts all that was accepted before it."""

SEED_SECONDS: Final = decision.SEED_MS / 1000
"""How old what an operator observed may be when it seeds: a rebuild takes longer."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The protocol; `Rules()` is all of it. Each field says where the code has it.

    Two of them are about releases, which the code does not have yet.
    """

    publish_at_once: bool = True
    """publishing.py: the pod that accepted publishes from memory, before any sweep."""
    fence: bool = True
    """sale.lua: a sale written under another run of the server is fenced."""
    barrier: bool = True
    """barrier.py: outbox empty, pods hold nothing, then the ledger at the topic's ends."""
    capacity_in_events: bool = True
    """recording.py: the ledger's capacity rises to what an event was accepted under."""
    release_when_acknowledged: bool = True
    """DESIGN.md, not in the code yet: `settle` adds to `released` and to what the buyer may buy,
    `release` does not."""
    settle_matches: bool = True
    """settle.lua: an entry is deleted only if it is the reservation's that was acknowledged."""
    late_answers_disbelieved: bool = True
    """batching.py: an answer that comes after the call's deadline is not an answer."""
    unseen_pods_awaited: bool = True
    """barrier.py: who is in no heartbeat may be alive, until one would have expired."""
    rewound_ledger_noticed: bool = True
    """recording.py: reading goes back to the stored offset when the ledger has less."""

    settle_matches_version: bool = True
    """Not in the code, where a reservation has one version yet: an acknowledged acceptance does not
    settle the release of the same reservation."""
    replays_published: bool = True
    """batching.py: a pod that answers 202 because of a replay publishes the event too; it is in
    nobody's memory if the call that was executed was never answered."""
    cut_off_events_refused: bool = True
    """recording.py: what was accepted before the sale's last rebuild and comes after it."""
    refused_may_return: bool = True
    """recording.py: an id that was refused and is accepted again, under the same key, is recorded.
    """
    rebuild_guarded: bool = True
    """fence.lua, restore.lua, trust.lua, rebuild.py: each write of a rebuild says which rebuild and
    which run of the server it belongs to, and is refused by another."""
    seed_is_fresh: bool = True
    """apply.lua, decision.py: an operator seeds without a rebuild once, and only soon after it
    looked."""
    fence_on_replication_id: bool = True
    """sale.lua: a server that was demoted and promoted again has the run_id that it had, and
    another replication id behind it."""
