-- close: end a sale until its manifest is applied again. Replays are still answered. A sale that
-- has reached its end stays ended, so that applying it again does not continue it.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox, 5 holds
-- ARGV  1 sale id, 2 revision, 3 the id of the caller's engine
-- Returns one word:
--         closed       the sale is closed or ended
--         unchanged    it was already, with this revision
--         stale        Redis has a higher revision
--         unknown      the item has no keys, or they belong to another sale
--         unsupported  this version does not support the sale's format
--         other_engine another engine has the sale
-- Invariant: a closed sale accepts nothing. A fenced sale is closed too, and stays fenced.

local sale, reason = read_sale(KEYS)
if not sale then return reason end
if sale.id ~= ARGV[1] then return 'unknown' end
if foreign(sale, ARGV[3]) then return 'other_engine' end
local revision = tonumber(ARGV[2])
if not revision then return redis.error_reply('ERR malformed revision') end
if revision < sale.revision then return 'stale' end
local state = (sale.finished and sale.state ~= 'closed') and 'ended' or 'closed'
if sale.state == state and revision == sale.revision then return 'unchanged' end
redis.call('HSET', KEYS[1], 'state', state, 'revision', ARGV[2])
return 'closed'
