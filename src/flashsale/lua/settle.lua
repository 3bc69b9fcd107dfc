-- settle: deletes outbox entries whose events Kafka has acknowledged.
--
-- KEYS  1 outbox
-- ARGV  pairs: entry id, reservation id
-- Returns the number of entries deleted.
-- Keeps invariant 2: an entry is matched by its reservation id, since a Redis that went back to an
--       older copy may give the same entry id to another reservation, which Kafka does not have.

local acknowledged = {}
for i = 1, #ARGV, 2 do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if entry and entry[2][1] == 'id' and entry[2][2] == ARGV[i + 1] then
    acknowledged[#acknowledged + 1] = ARGV[i]
  end
end
if #acknowledged == 0 then return 0 end
return redis.call('XDEL', KEYS[1], unpack(acknowledged))
