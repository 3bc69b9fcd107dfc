-- expire: end a batch of holds that are due.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox, 5 holds
-- ARGV  1 the most holds to expire, 2 the id of the pod's engine, or ''
-- Returns one word (unknown, unsupported, fenced or other_engine), or the line of the sale
--       (transition.lua) and one line per expired hold:
--         ID ENTRY-ID RECORD
-- Invariants: only a held reservation expires, and only when it is due. A due hold whose record is
--       missing or cannot be read stays, so that it is reported as overdue. It does not stop the
--       holds behind it.

-- The most pages that a call reads. It bounds the time that unreadable records can take.
local PAGES = 16

local sale, reason = read_sale(KEYS)
if reason then return reason end
if foreign(sale, ARGV[2]) then return 'other_engine' end
local limit = tonumber(ARGV[1])
if not limit or limit < 1 then return redis.error_reply('ERR limit below 1') end

local changes, seen = {}, 0
for _ = 1, PAGES do
  local wanted = limit - #changes
  local due = redis.call('ZRANGEBYSCORE', KEYS[5], '-inf', integer(sale.now), 'LIMIT',
    integer(seen), integer(wanted))
  local texts = #due > 0 and redis.call('HMGET', KEYS[3], unpack(due)) or {}
  for n, id in ipairs(due) do
    local record = texts[n] and parse(texts[n])
    if record and record.state == 'held' then
      changes[#changes + 1] = { id, text_of(sale, record, 'expired'), record.quantity, true, '' }
    end
  end
  seen = seen + #due
  if #due < wanted or #changes == limit then break end
end
local lines = { line_of(sale) }
for n, entry in ipairs(commit(sale, changes)) do
  lines[n + 1] = changes[n][1] .. ' ' .. entry .. ' ' .. changes[n][2]
end
return table.concat(lines, '\n')
