-- restore: writes a page of what the ledger knows into a sale that is being rebuilt.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox
-- ARGV  1 the revision that names the rebuild, 2 how long others are to leave the sale to it, ms,
--       3 the number of buyers in the page,
--       4... pairs: user, units held (that many), then reservation id, record (the rest)
-- Returns restored, or superseded: another rebuild has the keys, or they are gone.
-- Keeps invariant 7: writes are absolute, and only into keys that nobody trusts.

if redis.call('HGET', KEYS[1], 'run_id') ~= 'rebuild:' .. ARGV[1] then return 'superseded' end
local first_record = 4 + 2 * tonumber(ARGV[3])
redis.call('HSET', KEYS[1], 'rebuild_until_ms', integer(clock_ms() + tonumber(ARGV[2])))
if first_record > 4 then
  redis.call('HSET', KEYS[2], unpack(ARGV, 4, first_record - 1))
end
if first_record <= #ARGV then
  redis.call('HSET', KEYS[3], unpack(ARGV, first_record, #ARGV))
end
return 'restored'
