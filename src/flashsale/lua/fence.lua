-- fence: says that an item's sale may not be trusted until it is rebuilt, and by whom. Called first,
-- again and again while the rebuild waits for what is on its way, and at last to begin writing.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox
-- ARGV  1 sale id, 2 revision, 3 allocated, 4 max per user, 5 starts_ms or '', 6 ends_ms or '',
--         7 state (open, paused, closed, ended), 8 display name or '': the ledger's row, whose
--         revision was taken for this rebuild and names it,
--       9 how long rebuilds that come later are to leave the sale to this one, ms,
--       10 replace: '' or the id of the finished sale whose place this one may take,
--       11 the units that the ledger has accepted for the sale in 10,
--       12 begin: '1' to empty the keys for `restore`, '' to fence
-- Returns one word:
--         fenced       the sale, or a marker where there was none, waits for this rebuild
--         begun        the keys are empty; only this rebuild writes them
--         trusted      the sale is whole: there is nothing to rebuild
--         rebuilding   another rebuild has it; of two that begin at once, the one that the ledger
--                      knows last
--         superseded   to begin: it waits for another rebuild, or was closed meanwhile
--         undrained    to begin: the outbox holds events that Kafka lacks
--         conflict     the item has another sale that is not finished, drained and recorded
--         unsupported  a format that this version does not speak
-- Keeps invariants 2 (the outbox is never dropped) and 7. A rebuild that is overtaken by another
--       finds its mark gone and can write nothing more.

local sale, reason = read_sale(KEYS)
if reason == 'unsupported' then return reason end
if not tonumber(ARGV[2]) or not tonumber(ARGV[9]) then
  return redis.error_reply('ERR malformed rebuild')
end
local mine = 'rebuild:' .. ARGV[2]
local mark = { 'run_id', mine, 'rebuild_until_ms', integer(clock_ms() + tonumber(ARGV[9])) }

local function write()
  redis.call('HSET', KEYS[1], 'format', FORMAT, 'sale_id', ARGV[1],
    'revision', ARGV[2], 'state', ARGV[7], 'allocated', ARGV[3], 'accepted', '0', 'released', '0',
    'max_per_user', ARGV[4], 'starts_ms', ARGV[5], 'ends_ms', ARGV[6], 'display_name', ARGV[8],
    'last_now_ms', integer(sale and sale.now or clock_ms()), unpack(mark))
end

if ARGV[12] == '1' then
  if not sale or sale.run_id ~= mine or sale.revision > tonumber(ARGV[2]) then
    return 'superseded'
  end
  if redis.call('XLEN', KEYS[4]) > 0 then return 'undrained' end
  redis.call('DEL', KEYS[2], KEYS[3])
  write()
  return 'begun'
end

if sale and sale.id ~= ARGV[1] then
  if not replaceable(sale, KEYS[4], ARGV[10], ARGV[11]) then return 'conflict' end
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
  sale = nil
end
if not sale then
  write()
  return 'fenced'
end
if not sale.fenced then return 'trusted' end
local other = tonumber(string.match(sale.run_id, '^rebuild:(%d+)$'))
local until_ms = tonumber(redis.call('HGET', KEYS[1], 'rebuild_until_ms') or 0)
if other and until_ms and other > tonumber(ARGV[2]) and until_ms > clock_ms() then
  return 'rebuilding'
end
redis.call('HSET', KEYS[1], unpack(mark))
return 'fenced'
