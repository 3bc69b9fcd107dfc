-- free: deletes the keys of a closed sale of which everything is recorded. Its replays are not
-- answered any more.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox
-- ARGV  1 sale id, 2 the revision of the ledger's row that says closed, 3 the units that the
--         ledger has accepted
-- Returns one word:
--         freed        the keys are gone
--         unknown      no keys, or another sale's
--         unsupported  a format that this version does not speak
--         open         not closed, or another revision is there: it was applied again
--         unrecorded   the outbox has events, or the counts differ
-- Keeps invariant 2 (an event leaves the outbox only for Kafka) and, since the ledger's row stays
--       and says what was sold, invariant 7: without keys the sale is lost, never new.

local sale, reason = read_sale(KEYS)
if not sale then return reason end
if sale.id ~= ARGV[1] then return 'unknown' end
local revision, recorded = tonumber(ARGV[2]), tonumber(ARGV[3])
if not revision or not recorded then return redis.error_reply('ERR malformed row') end
if (sale.state ~= 'closed' and sale.state ~= 'ended') or sale.revision ~= revision then
  return 'open'
end
if redis.call('XLEN', KEYS[4]) > 0 or sale.accepted ~= recorded then return 'unrecorded' end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
return 'freed'
