-- look: read a sale, and one of its reservations, in one round trip. It changes nothing.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox, 5 holds
-- ARGV  1 the id of a reservation, or ''
-- Returns a JSON list of strings: Redis' clock in ms, the server's run, the length of the outbox,
--       the number of keys 2 to 4 that exist, the number of open holds, the reservation's record or
--       '', and then the fields of the sale, each name followed by its value. An item without a sale
--       has no fields.
-- Invariant: the sale, the reservation and the clock belong to the same moment of the same server.

local record = ARGV[1] ~= '' and redis.call('HGET', KEYS[3], ARGV[1]) or ''
local found = { integer(clock_ms()), server_run(), integer(redis.call('XLEN', KEYS[4])),
  integer(redis.call('EXISTS', KEYS[2], KEYS[3], KEYS[4])),
  integer(redis.call('ZCARD', KEYS[5])), record }
for _, text in ipairs(redis.call('HGETALL', KEYS[1])) do
  found[#found + 1] = text
end
return cjson.encode(found)
