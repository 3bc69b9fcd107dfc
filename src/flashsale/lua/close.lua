-- close: ends a sale for good, until it is applied again. Replays are still answered. A sale whose
-- end was reached stays ended, so that applying it again does not continue it.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox
-- ARGV  1 sale id, 2 revision
-- Returns closed, unchanged, stale (a higher revision is there), unknown (no keys, or another
--       sale's) or unsupported.
-- Keeps invariant 5: a closed sale accepts nothing. A fenced sale is closed too, and stays fenced.

local sale, reason = read_sale(KEYS)
if not sale then return reason end
if sale.id ~= ARGV[1] then return 'unknown' end
local revision = tonumber(ARGV[2])
if not revision then return redis.error_reply('ERR malformed revision') end
if revision < sale.revision then return 'stale' end
local state = (sale.finished and sale.state ~= 'closed') and 'ended' or 'closed'
if sale.state == state and revision == sale.revision then return 'unchanged' end
redis.call('HSET', KEYS[1], 'state', state, 'revision', ARGV[2])
return 'closed'
