-- restore: write a page of the ledger's data into a sale that is being rebuilt.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox, 5 holds
-- ARGV  1 the revision that names the rebuild, 2 lease: how long others leave the sale to it, ms,
--       3 the number of buyers in the page,
--       4... pairs: user and units (or units,expired holds) for each buyer, then reservation id and
--         record. A held record is added to the holds.
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
  local holds = {}
  for n = first_record, #ARGV, 2 do
    local accepted_ms, expires_ms =
      string.match(ARGV[n + 1], '^held,%d+,%d+,(%d+),[^,]+,[^,]*,(%d+),')
    if expires_ms then
      holds[#holds + 1] = integer(due_ms(tonumber(accepted_ms), tonumber(expires_ms)))
      holds[#holds + 1] = ARGV[n]
    end
  end
  if #holds > 0 then redis.call('ZADD', KEYS[5], unpack(holds)) end
end
return 'restored'
