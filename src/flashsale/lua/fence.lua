-- fence: mark an item's sale as untrusted until this rebuild has rebuilt it. The rebuild calls it
-- first, repeats it while it waits for events in flight, and at last calls it to begin writing.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox, 5 holds
-- ARGV  1 sale id, 2 revision, 3 stock, 4 max per user, 5 starts_ms or '', 6 ends_ms or '',
--         7 state (open, paused, closed), 8 display name or '', 9 hold_ms or 0, 10 the most
--         expired holds of a buyer: the ledger's row. Its revision was taken for this rebuild and
--         names it.
--       11 lease: how long later rebuilds leave the sale to this one, ms,
--       12 replace: '' or the id of the finished sale that this one may replace,
--       13 the accepted and 14 the released units that the ledger has recorded for the sale in 12,
--       15 step: 'fence' for the first call, 'wait' for a repeat, 'begin' to empty the keys for
--         `restore`,
--       16 the accepted and 17 the held units that the ledger has recorded for this sale,
--       18 the id of the caller's engine, 19 the server's run when the rebuild began, or '',
--       20 the longest lease, ms. One that ends later was taken under the clock of a former server.
--       21 the revision of the last rebuild in the ledger, or 0
-- Returns one word:
--         fenced       the sale waits for this rebuild. If it had no keys, there is a marker now.
--         begun        the keys are empty, and only this rebuild can write them
--         trusted      the sale is complete and needs no rebuild
--         rebuilding   another rebuild has the sale. Of two that start together, the one with the
--                      higher revision wins.
--         superseded   the server has another run than when the rebuild began, or the mark of this
--                      rebuild is gone: Redis lost it, another rebuild has the sale, or the sale
--                      was closed meanwhile
--         undrained    cannot begin: the outbox has events that Kafka lacks
--         conflict     another sale has the item, and it is not finished and recorded
--         unsupported  this version does not support the sale's format
--         other_engine another engine has the item
-- Invariants: the outbox is never dropped. An untrusted sale stays untrusted. An ended sale stays
--       ended, even if it was closed since. A sale with fewer accepted units than the ledger, or
--       fewer units that are no longer held, or from before the ledger's last rebuild, is never
--       trusted, whatever its run. A rebuild that was overtaken finds another mark and cannot write
--       anything more. A rebuild whose mark was lost ends: Redis then lost the pods' heartbeats
--       too, on which the wait depends.

local sale, reason = read_sale(KEYS)
if reason == 'unsupported' then return reason end
if not tonumber(ARGV[2]) or not tonumber(ARGV[9]) or not tonumber(ARGV[10])
  or not tonumber(ARGV[11]) or not tonumber(ARGV[16]) or not tonumber(ARGV[17])
  or not tonumber(ARGV[20]) or not tonumber(ARGV[21])
  or not (ARGV[15] == 'fence' or ARGV[15] == 'wait' or ARGV[15] == 'begin') then
  return redis.error_reply('ERR malformed rebuild')
end
local mine = 'rebuild:' .. ARGV[2]
local mark = { 'run_id', mine, 'rebuild_until_ms', integer(clock_ms() + tonumber(ARGV[11])) }

local function write()
  local state = sale and sale.state == 'ended' and 'ended' or ARGV[7]
  redis.call('HSET', KEYS[1], 'format', FORMAT, 'sale_id', ARGV[1],
    'revision', ARGV[2], 'state', state, 'stock', ARGV[3] .. ',' .. ARGV[2],
    'allocated', ARGV[3], 'accepted', '0', 'released', '0', 'max_per_user', ARGV[4],
    'starts_ms', ARGV[5], 'ends_ms', ARGV[6], 'display_name', ARGV[8], 'hold_ms', ARGV[9],
    'max_expired_holds', ARGV[10], 'held', '0', 'rebuilt', ARGV[2], 'engine', ARGV[18],
    'last_now_ms', integer(sale and sale.now or clock_ms()), unpack(mark))
end

if sale and foreign(sale, ARGV[18]) then return 'other_engine' end

if ARGV[19] ~= '' and ARGV[19] ~= server_run() then return 'superseded' end
if ARGV[15] ~= 'fence' and (not sale or sale.run_id ~= mine) then return 'superseded' end

if ARGV[15] == 'begin' then
  if sale.revision > tonumber(ARGV[2]) then return 'superseded' end
  if redis.call('XLEN', KEYS[4]) > 0 then return 'undrained' end
  redis.call('DEL', KEYS[2], KEYS[3], KEYS[5])
  write()
  return 'begun'
end

if sale and sale.id ~= ARGV[1] then
  if not replaceable(sale, KEYS, ARGV[12], ARGV[13], ARGV[14]) then return 'conflict' end
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5])
  sale = nil
end
if not sale then
  write()
  return 'fenced'
end
local accepted, held = tonumber(ARGV[16]), tonumber(ARGV[17])
-- The previous version wrote no rebuilt.
local outdated = redis.call('HGET', KEYS[1], 'rebuilt') and sale.rebuilt < tonumber(ARGV[21])
if not reason and not outdated and sale.accepted >= accepted
  and sale.accepted - sale.held >= accepted - held then
  return 'trusted'
end
local other = tonumber(string.match(sale.run_id, '^rebuild:(%d+)$'))
local until_ms = tonumber(redis.call('HGET', KEYS[1], 'rebuild_until_ms') or 0)
local left_ms = until_ms and until_ms - clock_ms() or 0
if other and other > tonumber(ARGV[2]) and left_ms > 0 and left_ms <= tonumber(ARGV[20]) then
  return 'rebuilding'
end
redis.call('HSET', KEYS[1], unpack(mark))
return 'fenced'
