-- fence: says that an item's sale may not be trusted until it is rebuilt, and begins a rebuild.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox
-- ARGV  1 sale id, 2 revision, 3 allocated, 4 max per user, 5 starts_ms or '', 6 ends_ms or '',
--         7 state (open, paused, closed, ended), 8 display name or '': the ledger's row,
--       9 token: '' to fence only; else the rebuild that begins, to which the keys belong from now
-- Returns one word:
--         fenced       a marker stands where there was no sale, or the sale was fenced already
--         begun        the keys are empty and wait for the rebuild with this token
--         trusted      the sale is whole: there is nothing to rebuild
--         undrained    the outbox holds events that Kafka lacks
--         conflict     the item has another sale
--         unsupported  a format that this version does not speak
-- Keeps invariants 2 (the outbox is never dropped) and 7. A rebuild that is overtaken by another
--       finds its token gone and can write nothing more.

local sale, reason = read_sale(KEYS)
if reason == 'unsupported' then return reason end
if sale and sale.id ~= ARGV[1] then return 'conflict' end
if sale and not sale.fenced then return 'trusted' end

local function write(run_id)
  redis.call('HSET', KEYS[1], 'format', FORMAT, 'sale_id', ARGV[1], 'run_id', run_id,
    'revision', ARGV[2], 'state', ARGV[7], 'allocated', ARGV[3], 'accepted', '0', 'released', '0',
    'max_per_user', ARGV[4], 'starts_ms', ARGV[5], 'ends_ms', ARGV[6], 'display_name', ARGV[8],
    'last_now_ms', integer(sale and sale.now or clock_ms()))
end

if ARGV[9] == '' then
  -- No server has an empty run id.
  if not sale then write('') elseif sale.torn then redis.call('HSET', KEYS[1], 'run_id', '') end
  return 'fenced'
end
if redis.call('XLEN', KEYS[4]) > 0 then return 'undrained' end
redis.call('DEL', KEYS[2], KEYS[3])
write('rebuild:' .. ARGV[9])
return 'begun'
