-- restore: write a page of the ledger's data into a sale that is being rebuilt.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox
-- ARGV  1 the revision that names the rebuild, 2 lease: how long others leave the sale to it, ms,
--       3 the number of buyers in the page,
--       4... pairs: user and units for each buyer, then reservation id and record
-- Returns one word:
--         restored     the page is written
--         superseded   another rebuild has the sale, or the keys are gone
-- Invariant: writes are absolute, and go only into keys that are not trusted.

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
