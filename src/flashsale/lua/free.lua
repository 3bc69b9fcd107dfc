-- free: delete the keys of a closed sale that is recorded completely. Its replays are not answered
-- any more.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox, 5 holds
-- ARGV  1 sale id, 2 the revision of the closed ledger row, 3 the ledger's accepted and 4 its
--       released units, 5 the id of the caller's engine
-- Returns one word:
--         freed        the keys are deleted
--         unknown      the item has no keys, or they belong to another sale
--         unsupported  this version does not support the sale's format
--         other_engine another engine has the sale
--         open         not closed, or at another revision: it was applied again
--         unrecorded   the outbox has events, a hold is open, or the counts differ
-- Invariants: an event leaves the outbox only after Kafka has acknowledged it. The ledger's row
--       stays, so a sale without keys counts as lost, never as new.

local sale, reason = read_sale(KEYS)
if not sale then return reason end
if sale.id ~= ARGV[1] then return 'unknown' end
if foreign(sale, ARGV[5]) then return 'other_engine' end
local revision = tonumber(ARGV[2])
if not revision or not tonumber(ARGV[3]) or not tonumber(ARGV[4]) then
  return redis.error_reply('ERR malformed row')
end
if (sale.state ~= 'closed' and sale.state ~= 'ended') or sale.revision ~= revision then
  return 'open'
end
if not recorded(sale, KEYS, ARGV[3], ARGV[4]) then return 'unrecorded' end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5])
return 'freed'
