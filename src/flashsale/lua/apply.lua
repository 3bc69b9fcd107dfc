-- apply: make Redis agree with a sale's manifest. The script is absolute and idempotent: it writes
-- the manifest's values, never a difference. It does not change the counts of sold units.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox, 5 holds
-- ARGV  1 sale id, 2 revision, 3 stock, 4 max per user, 5 starts_ms or '', 6 ends_ms or '',
--       7 state (open, paused), 8 display name or '', 9 hold_ms or 0,
--       10 the most expired holds of a buyer,
--       11 seed: '', or the time of Redis' clock (ms) until which the caller may create the keys.
--         The caller has just seen in the ledger that no data of this sale can be lost. The limit
--         stops a caller that was suspended since then.
--       12 replace: '' or the id of the finished sale that this one may replace,
--       13 the accepted and 14 the released units that the ledger has recorded for the sale in 12,
--       15 the id of the caller's engine, or '' to keep the sale's
-- Returns one word:
--         seeded, changed, unchanged   Redis agrees with the manifest
--         stale        Redis has a higher revision, so the caller's row is outdated
--         missing      the keys are missing and may not be created
--         fenced       written under another run of the server, or torn: it must be rebuilt
--         conflict     another sale has the item, and it is not finished and recorded
--         ended        the sale has reached its end, and an ended sale stays ended
--         unsupported  this version does not support the sale's format
--         other_engine another engine has the item
-- Invariants: allocated is never lowered below the units that buyers have. Applying a manifest
--       again changes nothing. A sale that may lack data is not opened.

local sale_id, revision, stock = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
if not revision or not stock or not tonumber(ARGV[4]) or not tonumber(ARGV[9])
  or not tonumber(ARGV[10])
  or (ARGV[7] ~= 'open' and ARGV[7] ~= 'paused') then
  return redis.error_reply('ERR malformed sale')
end

-- The stock has its revision, because the previous version leaves this field as it is.
local declared = ARGV[3] .. ',' .. ARGV[2]

local function write(allocated, engine)
  redis.call('HSET', KEYS[1], 'format', FORMAT, 'sale_id', sale_id, 'run_id', server_run(),
    'revision', ARGV[2], 'state', ARGV[7], 'stock', declared, 'allocated', integer(allocated),
    'max_per_user', ARGV[4], 'starts_ms', ARGV[5], 'ends_ms', ARGV[6], 'display_name', ARGV[8],
    'hold_ms', ARGV[9], 'max_expired_holds', ARGV[10], 'engine', engine)
end

local may_seed = ARGV[11] ~= '' and clock_ms() <= tonumber(ARGV[11])

local function seed()
  write(stock, ARGV[15])
  redis.call('HSET', KEYS[1], 'accepted', '0', 'released', '0', 'held', '0', 'rebuilt', '0',
    'last_now_ms', integer(clock_ms()))
  return 'seeded'
end

local sale, reason = read_sale(KEYS)
if reason == 'unsupported' then return reason end

if not sale then
  if not may_seed or redis.call('EXISTS', KEYS[2], KEYS[3], KEYS[4], KEYS[5]) > 0 then
    return 'missing'
  end
  return seed()
end

if foreign(sale, ARGV[15]) then return 'other_engine' end
if sale.id ~= sale_id then
  if not replaceable(sale, KEYS, ARGV[12], ARGV[13], ARGV[14]) then return 'conflict' end
  if not may_seed then return 'missing' end
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5])
  return seed()
end

if revision < sale.revision then return 'stale' end
if reason then return reason end
if sale.state == 'ended' then return 'ended' end
if sale.state ~= 'closed' and sale.finished then
  redis.call('HSET', KEYS[1], 'state', 'ended', 'last_now_ms', integer(sale.now))
  return 'ended'
end

local allocated = math.max(stock, sale.accepted - sale.released)
local engine = ARGV[15] ~= '' and ARGV[15] or sale.engine
if revision == sale.revision and ARGV[7] == sale.state and allocated == sale.allocated
  and engine == sale.engine and redis.call('HGET', KEYS[1], 'stock') == declared then
  return 'unchanged'
end
write(allocated, engine)
return 'changed'
