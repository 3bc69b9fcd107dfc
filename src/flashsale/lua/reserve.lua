-- reserve: decide a batch of requests for each of some items, in the given order.
--
-- KEYS  for each item: sale, buyers, reservations, outbox, holds
-- ARGV  1 outbox limit (entries), 2 the id of the pod's engine, or '' if the pod does not know it
--       yet. Then two for each item: the number of its requests, and the requests, one per line:
--         id,user,quantity,key,traceparent. Key and traceparent may be empty. No field contains a
--         comma or a newline.
-- Returns one string for each item, or the error that its part ended with. If no request of the
--       item can be decided, the string is one word: unknown, unsupported, fenced or other_engine.
--       Otherwise the first line describes the sale: now_ms,available,starts_ms,version,hold_ms,
--       held,sale_id,allocated,capacity,revision,engine. A reservation that was accepted now has
--       this version, and is held for hold_ms or confirmed if that is 0. `held` are the units of all
--       holds. Then follows one line per request, in order:
--         accepted ENTRY-ID | replayed RECORD | key_reused | ended | paused | not_open |
--         limit_reached UNITS MAX_PER_USER | too_many_holds | sold_out | not_enough_left |
--         outbox_full | unreadable
--       UNITS are those that the user has. With `unreadable`, Redis has a damaged record of the
--       reservation, or a damaged entry of the user. The other requests are decided.
-- Invariants: accepted - released <= allocated. A user never has more than max_per_user units. An
--       id has one reservation, also after that has ended. Nothing is accepted outside the sale's
--       window, or while the sale is paused, closed or fenced. For each item the script reads and
--       checks everything before its first write. Before the outbox entry it writes only the
--       sale's clock. Redis does not roll back, so a part that fails up to there (out of memory)
--       has sold nothing. The id of an entry has its mark, so that `settle` need not read it. If
--       the clock ran backwards, or the reservation's id has no mark, Redis makes the id of the
--       entry.

-- The lists are used again for each item, because a new list takes as long as a small command.
local ids, users, quantities, request_keys, traceparents = {}, {}, {}, {}, {}
local answers, accepting, new_records, new_buyers, new_holds = {}, {}, {}, {}, {}

-- Reads the requests of an item into the lists. Returns their number, or nil if they are malformed.
local function parse(lines)
  local count, position = 0, 1
  while position <= #lines do
    local _, last, id, user, quantity, key, traceparent = string.find(lines,
      '^([^,\n]+),([^,\n]+),(%d+),([^,\n]*),([^,\n]*)\n', position)
    if not last or tonumber(quantity) < 1 then return nil end
    count, position = count + 1, last + 1
    ids[count], users[count], quantities[count] = id, user, tonumber(quantity)
    request_keys[count], traceparents[count] = key, traceparent
  end
  return count
end

local function decide(keys, item)
  local sale, reason = read_sale(keys)
  if reason then return reason end
  if foreign(sale, ARGV[2]) then return 'other_engine' end
  local outbox_limit, count = tonumber(ARGV[1]), parse(ARGV[2 * item + 2])
  if count == 0 or count ~= tonumber(ARGV[2 * item + 1]) or not outbox_limit then
    return redis.error_reply('ERR malformed batch')
  end

  local known = redis.call('HMGET', keys[3], unpack(ids, 1, count))
  local bought = redis.call('HMGET', keys[2], unpack(users, 1, count))
  local outbox_length = redis.call('XLEN', keys[4])

  -- The answer to every request that is not a replay, if the sale accepts nothing.
  local refusal
  if sale.finished then refusal = 'ended'
  elseif sale.state == 'paused' then refusal = 'paused'
  elseif sale.now < sale.starts_ms then refusal = 'not_open'
  end

  local now, first_version = integer(sale.now), next_version(sale, 0)
  local holds, version = sale.hold_ms > 0, integer(first_version)
  local expires_ms = sale.now + sale.hold_ms
  local state = holds and 'held,' or 'confirmed,'
  local ending = holds and ',' .. integer(expires_ms) .. ',,' or ''
  local due = holds and integer(due_ms(sale.now, expires_ms))
  local snapshot, _, micros = snapshot_of(sale), clock_ms()
  local available = sale.allocated - sale.accepted + sale.released
  local accepted, units = 0, 0
  local records, owned = {}, {} -- what the batch has changed, by id and by user
  for n = 1, count do
    local id, user, quantity = ids[n], users[n], quantities[n]
    local record = records[id] or known[n]
    local user_units, user_expired = buyer(owned[user] or bought[n])
    if record then
      local own = tonumber(string.match(record, '^%a+,%d+,(%d+),'))
      answers[n] = own == quantity and 'replayed ' .. record or own and 'key_reused' or 'unreadable'
    elseif refusal then answers[n] = refusal
    elseif not user_units then answers[n] = 'unreadable'
    elseif user_units + quantity > sale.max_per_user then
      answers[n] = 'limit_reached ' .. integer(user_units) .. ' ' .. integer(sale.max_per_user)
    elseif holds and user_expired >= sale.max_expired_holds then answers[n] = 'too_many_holds'
    elseif available <= 0 then answers[n] = 'sold_out'
    elseif quantity > available then answers[n] = 'not_enough_left'
    elseif outbox_length + accepted >= outbox_limit then answers[n] = 'outbox_full'
    else
      record = state .. version .. ',' .. quantity .. ',' .. now .. ',' .. user .. ','
        .. request_keys[n] .. ending
      accepted, units, available = accepted + 1, units + quantity, available - quantity
      accepting[accepted] = n
      records[id], owned[user] = record, buyer_text(user_units + quantity, user_expired)
      new_records[2 * accepted - 1], new_records[2 * accepted] = id, record
      new_buyers[2 * accepted - 1], new_buyers[2 * accepted] = user, owned[user]
      new_holds[2 * accepted - 1], new_holds[2 * accepted] = due, id
    end
  end

  if accepted > 0 then
    -- A user without the right to one of these commands, or holds of another type, must fail here,
    -- where nothing is sold. XX adds nothing.
    redis.call('HSET', keys[1], 'last_now_ms', now)
    if holds then redis.call('ZADD', keys[5], 'XX', 0, '') end
    for i = 1, accepted do
      local n, id, record = accepting[i], new_records[2 * i - 1], new_records[2 * i]
      local mark = entry_mark(id, first_version)
      local entry = mark and redis.pcall('XADD', keys[4],
        format('%s-%d%014d', now, 128 * micros + i, mark), 'id', id,
        'record', record, 'sale', snapshot, 'traceparent', traceparents[n], 'engine', sale.engine)
      if type(entry) ~= 'string' then
        entry = redis.call('XADD', keys[4], '*', 'id', id, 'record', record, 'sale', snapshot,
          'traceparent', traceparents[n], 'engine', sale.engine)
      end
      answers[n] = 'accepted ' .. entry
    end
    redis.call('HSET', keys[3], unpack(new_records, 1, 2 * accepted))
    redis.call('HSET', keys[2], unpack(new_buyers, 1, 2 * accepted))
    if holds then
      sale.held = sale.held + units
      redis.call('ZADD', keys[5], unpack(new_holds, 1, 2 * accepted))
    end
    redis.call('HSET', keys[1], 'accepted', integer(sale.accepted + units),
      'held', integer(sale.held))
  elseif sale.state ~= 'ended' and sale.state ~= 'closed' and sale.finished then
    -- Latch the end, so that a clock that jumps back does not open the sale again.
    redis.call('HSET', keys[1], 'state', 'ended', 'last_now_ms', now)
  end

  return format('%s,%d,%d,%s,%d,%d,%s,%s\n', now, available, sale.starts_ms, version,
    sale.hold_ms, sale.held, snapshot, sale.engine) .. table.concat(answers, '\n', 1, count)
end

return of_each_item(decide)
