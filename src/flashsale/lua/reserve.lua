-- reserve: decide a batch of requests for one item, in the given order.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox
-- ARGV  1 outbox limit (entries), 2 number of requests,
--       3 the requests, one per line: id,user,quantity,key,traceparent. Key and traceparent may be
--         empty. No field contains a comma or a newline.
--       4 the id of the pod's engine, or '' if the pod does not know it yet
-- Returns one string. If no request can be decided, it is one word: unknown, unsupported, fenced or
--       other_engine. Otherwise the first line describes the sale: now_ms,sale_id,allocated,
--       capacity,revision,available,outbox length,starts_ms,engine. Then follows one line per request, in order:
--         accepted ENTRY-ID | replayed RECORD | key_reused | ended | paused | not_open |
--         limit_reached | sold_out | not_enough_left | outbox_full
-- Invariants: accepted - released <= allocated. A user never has more than max_per_user units. An
--       id has one reservation. Nothing is accepted outside the sale's window, or while the sale is
--       paused, closed or fenced. The script reads and checks everything before its first write,
--       and the first write is the outbox entry. Redis does not roll back, so a script that fails
--       there (out of memory) has sold nothing.

local sale, reason = read_sale(KEYS)
if not sale then return reason end
if sale.fenced then return 'fenced' end
if foreign(sale, ARGV[4]) then return 'other_engine' end

-- Parallel lists: a table per request would cost more than the rest of the parsing.
local ids, users, quantities, request_keys, traceparents = {}, {}, {}, {}, {}
local count = 0
local parsed = 0 -- bytes: gmatch skips text that does not match, and none may be left
for id, user, quantity, key, traceparent in string.gmatch(ARGV[3],
  '([^,\n]+),([^,\n]+),(%d+),([^,\n]*),([^,\n]*)\n') do
  count = count + 1
  parsed = parsed + #id + #user + #quantity + #key + #traceparent + 5
  ids[count], users[count], quantities[count] = id, user, tonumber(quantity)
  request_keys[count], traceparents[count] = key, traceparent
  if quantities[count] < 1 then return redis.error_reply('ERR quantity below 1') end
end
local outbox_limit = tonumber(ARGV[1])
if count == 0 or count ~= tonumber(ARGV[2]) or parsed ~= #ARGV[3] or not outbox_limit then
  return redis.error_reply('ERR malformed batch')
end

local records, held = {}, {}
local known = redis.call('HMGET', KEYS[3], unpack(ids))
local bought = redis.call('HMGET', KEYS[2], unpack(users))
for n = 1, count do
  records[ids[n]] = known[n] or nil
  held[users[n]] = tonumber(bought[n] or 0)
end
local outbox_length = redis.call('XLEN', KEYS[4])

-- The answer to every request that is not a replay, if the sale accepts nothing.
local refusal
if sale.finished then refusal = 'ended'
elseif sale.state == 'paused' then refusal = 'paused'
elseif sale.now < sale.starts_ms then refusal = 'not_open'
end

local now = integer(sale.now)
local available, units = sale.available, 0
local answers, accepted = {}, {}
for n = 1, count do
  local id, user, quantity = ids[n], users[n], quantities[n]
  local record = records[id]
  if record then
    local same = tonumber(string.match(record, '^%a+,%d+,(%d+),')) == quantity
    answers[n] = same and ('replayed ' .. record) or 'key_reused'
  elseif refusal then answers[n] = refusal
  elseif held[user] + quantity > sale.max_per_user then answers[n] = 'limit_reached'
  elseif available <= 0 then answers[n] = 'sold_out'
  elseif quantity > available then answers[n] = 'not_enough_left'
  elseif outbox_length >= outbox_limit then answers[n] = 'outbox_full'
  else
    records[id] = 'accepted,1,' .. quantity .. ',' .. now .. ',' .. user .. ',' .. request_keys[n]
    held[user] = held[user] + quantity
    available, units = available - quantity, units + quantity
    outbox_length = outbox_length + 1
    accepted[#accepted + 1] = n
  end
end

local capacity = integer(sale.allocated + sale.released)
if #accepted > 0 then
  local snapshot = table.concat({ sale.id, integer(sale.allocated), capacity,
    integer(sale.revision) }, ',')
  local new_records, new_held = {}, {}
  for i, n in ipairs(accepted) do
    local id, user = ids[n], users[n]
    local record = records[id]
    answers[n] = 'accepted ' .. redis.call('XADD', KEYS[4], '*', 'id', id, 'record', record,
      'sale', snapshot, 'traceparent', traceparents[n], 'engine', sale.engine)
    new_records[2 * i - 1], new_records[2 * i] = id, record
    new_held[2 * i - 1], new_held[2 * i] = user, held[user]
  end
  redis.call('HSET', KEYS[3], unpack(new_records))
  redis.call('HSET', KEYS[2], unpack(new_held))
  redis.call('HSET', KEYS[1], 'accepted', integer(sale.accepted + units), 'last_now_ms', now)
elseif sale.state ~= 'ended' and sale.state ~= 'closed' and sale.finished then
  -- Latch the end, so that a clock that jumps back does not open the sale again.
  redis.call('HSET', KEYS[1], 'state', 'ended', 'last_now_ms', now)
end

return table.concat({ now, sale.id, integer(sale.allocated), capacity, integer(sale.revision),
  integer(available), integer(outbox_length), integer(sale.starts_ms), sale.engine }, ',')
  .. '\n' .. table.concat(answers, '\n')
