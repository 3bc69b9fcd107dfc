-- claim: claim Redis for an engine, and add items to its index.
--
-- KEYS  1 the engine's id, 2 the index of items, 3 the server's run at the last claim
-- ARGV  1 the id of the caller's engine, 2... the items that should have keys
-- Returns the id of the engine that has claimed Redis.
-- Invariants: an engine's claim is never taken by another one. The items are added at the moment of
--       the claim. With two calls, Redis could lose its keys in between. Then an API pod would take
--       a lost item for an unknown one. The run tells a pod that the server has lost no item since.

local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return owner end
for n = 2, #ARGV do redis.call('SADD', KEYS[2], ARGV[n]) end
if not owner then redis.call('SET', KEYS[1], ARGV[1]) end
redis.call('SET', KEYS[3], server_run())
return ARGV[1]
