-- settle: delete outbox entries whose events Kafka has acknowledged.
--
-- KEYS  1 outbox
-- ARGV  1 the entries, one per line: entry id,reservation id
-- Returns the number of deleted entries.
-- Invariant: an event leaves the outbox only after Kafka has acknowledged it. An entry must match
--       its reservation id, because a Redis that was restored from an older copy can give the same
--       entry id to another reservation, which Kafka does not have.

local acknowledged = {}
for entry_id, reservation_id in string.gmatch(ARGV[1], '([^,\n]+),([^,\n]+)\n') do
  local entry = redis.call('XRANGE', KEYS[1], entry_id, entry_id)[1]
  if entry and entry[2][1] == 'id' and entry[2][2] == reservation_id then
    acknowledged[#acknowledged + 1] = entry_id
  end
end
if #acknowledged == 0 then return 0 end
return redis.call('XDEL', KEYS[1], unpack(acknowledged))
