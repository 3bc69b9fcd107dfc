-- trust: end a rebuild. From now on the sale is open as its state and window allow.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox, 5 holds
-- ARGV  1 the revision that names the rebuild, 2 the server's run when the rebuild began,
--       3 accepted, 4 released, 5 held: units in the ledger,
--       6 the number of reservations, 7 of buyers, and 8 of holds that were written
-- Returns one word:
--         trusted      the sale is trusted again
--         superseded   another rebuild has the sale, or the keys are gone
--         restarted    the server has restarted since the rebuild began, so begin again
--         incomplete   the keys have other numbers of reservations, buyers or holds than were written
-- Invariants: allocated is at least the units that buyers hold. The run id is written last, and
--       only under the run in which the rebuild began.

local sale, reason = read_sale(KEYS)
if not sale or sale.run_id ~= 'rebuild:' .. ARGV[1] then return 'superseded' end
if server_run() ~= ARGV[2] then return 'restarted' end
local accepted, released, held = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
if not accepted or not released or not held then return redis.error_reply('ERR malformed counts') end
if redis.call('HLEN', KEYS[3]) ~= tonumber(ARGV[6])
  or redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[7])
  or redis.call('ZCARD', KEYS[5]) ~= tonumber(ARGV[8]) then
  return 'incomplete'
end
if redis.call('EXISTS', KEYS[4]) == 0 then
  -- An empty outbox must exist as a key, because a missing key counts as a loss.
  redis.call('XDEL', KEYS[4], redis.call('XADD', KEYS[4], '*', 'id', ''))
end
redis.call('HDEL', KEYS[1], 'rebuild_until_ms')
redis.call('HSET', KEYS[1], 'accepted', integer(accepted), 'released', integer(released),
  'held', integer(held),
  'allocated', integer(math.max(sale.allocated, accepted - released)), 'run_id', ARGV[2])
return 'trusted'
