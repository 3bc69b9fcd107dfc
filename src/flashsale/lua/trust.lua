-- trust: ends a rebuild; from now on the sale is what the ledger said when it was written.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox
-- ARGV  1 the revision that names the rebuild, 2 the server's run when the rebuild began,
--       3 accepted, 4 released: units in the ledger,
--       5 the number of reservations, 6 the number of buyers that were written
-- Returns one word:
--         trusted      the sale is open for what its state and window allow
--         superseded   another rebuild has the keys, or they are gone
--         restarted    the server has restarted since: begin again
--         incomplete   the keys do not hold what was written
-- Keeps invariants 1 (allocated is at least what is held) and 7: the run id is written last, and
--       only under the run that the rebuild began in.

local sale, reason = read_sale(KEYS)
if not sale or sale.run_id ~= 'rebuild:' .. ARGV[1] then return 'superseded' end
if server_run() ~= ARGV[2] then return 'restarted' end
local accepted, released = tonumber(ARGV[3]), tonumber(ARGV[4])
if not accepted or not released then return redis.error_reply('ERR malformed counts') end
if redis.call('HLEN', KEYS[3]) ~= tonumber(ARGV[5])
  or redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[6]) then
  return 'incomplete'
end
if redis.call('EXISTS', KEYS[4]) == 0 then
  -- An outbox that is empty is a key all the same: one that is missing is a loss.
  redis.call('XDEL', KEYS[4], redis.call('XADD', KEYS[4], '*', 'id', ''))
end
redis.call('HDEL', KEYS[1], 'rebuild_until_ms')
redis.call('HSET', KEYS[1], 'accepted', integer(accepted), 'released', integer(released),
  'allocated', integer(math.max(sale.allocated, accepted - released)), 'run_id', ARGV[2])
return 'trusted'
