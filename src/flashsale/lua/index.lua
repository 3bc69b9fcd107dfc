-- index: read the index of items, and whether it can be trusted.
--
-- KEYS  1 the engine's id, 2 the index of items, 3 the server's run at the last claim
-- ARGV  1 'items' to read the index, or ''
-- Returns the id of the engine that has claimed Redis or '', 1 if it was claimed under this run of
--       the server and 0 otherwise, and the items.
-- Invariant: an older copy of Redis' files can lack items. It has the run of another process, so it
--       counts as not claimed until the operator has added all items again.

local run = redis.call('GET', KEYS[3])
return { redis.call('GET', KEYS[1]) or '', run == server_run() and 1 or 0,
  ARGV[1] == 'items' and redis.call('SMEMBERS', KEYS[2]) or {} }
