-- reserve: decide a batch of requests for each of some items, in the given order.
--
-- KEYS  for each item: sale, buyers, reservations, outbox, holds
-- ARGV  1 outbox limit (entries), 2 the id of the pod's engine, or '' if the pod does not know it
--       yet. Then two for each item: the number of its requests, and the requests, one per line:
--         id,user,quantity,key,traceparent. Key and traceparent may be empty. No field contains a
--         comma or a newline.
-- Returns one string for each item, or the error that its part ended with. If no request of the
--       item can be decided, the string is one word: unknown, unsupported, fenced or other_engine.
--       Otherwise the first line describes the sale: now_ms,sale_id,allocated,capacity,revision,
--       available,starts_ms,version,hold_ms,held,engine. A reservation that was accepted now has
--       this version, and is held for hold_ms or confirmed if that is 0. `held` are the units of all
--       holds. Then follows one line per request, in order:
--         accepted ENTRY-ID | replayed RECORD | key_reused | ended | paused | not_open |
--         limit_reached UNITS MAX_PER_USER | too_many_holds | sold_out | not_enough_left |
--         outbox_full
--       UNITS are those that the user has.
-- Invariants: accepted - released <= allocated. A user never has more than max_per_user units. An
--       id has one reservation, also after that has ended. Nothing is accepted outside the sale's
--       window, or while the sale is paused, closed or fenced. For each item the script reads and
--       checks everything before its first write, and the first write is the outbox entry. Redis
--       does not roll back, so a part that fails there (out of memory) has sold nothing. The id of
--       an entry has its mark, so that `settle` need not read it. If the clock ran backwards, or
--       the reservation's id has no mark, Redis makes the id of the entry.

local function decide(keys, item)
  local sale, reason = read_sale(keys)
  if not sale then return reason end
  if sale.fenced then return 'fenced' end
  if foreign(sale, ARGV[2]) then return 'other_engine' end

  -- Parallel lists: a table per request would cost more than the rest of the parsing.
  local ids, users, quantities, request_keys, traceparents = {}, {}, {}, {}, {}
  local count, expected, lines = 0, tonumber(ARGV[2 * item + 1]), ARGV[2 * item + 2]
  local parsed = 0 -- bytes: gmatch skips text that does not match, and none may be left
  for id, user, quantity, key, traceparent in string.gmatch(lines,
    '([^,\n]+),([^,\n]+),(%d+),([^,\n]*),([^,\n]*)\n') do
    count = count + 1
    parsed = parsed + #id + #user + #quantity + #key + #traceparent + 5
    ids[count], users[count], quantities[count] = id, user, tonumber(quantity)
    request_keys[count], traceparents[count] = key, traceparent
    if quantities[count] < 1 then return redis.error_reply('ERR quantity below 1') end
  end
  local outbox_limit = tonumber(ARGV[1])
  if count == 0 or count ~= expected or parsed ~= #lines or not outbox_limit then
    return redis.error_reply('ERR malformed batch')
  end

  local records, units_of, expired_of = {}, {}, {}
  local known = redis.call('HMGET', keys[3], unpack(ids))
  local bought = redis.call('HMGET', keys[2], unpack(users))
  for n = 1, count do
    records[ids[n]] = known[n] or nil
    units_of[users[n]], expired_of[users[n]] = buyer(bought[n])
  end
  local outbox_length = redis.call('XLEN', keys[4])

  -- The answer to every request that is not a replay, if the sale accepts nothing.
  local refusal
  if sale.finished then refusal = 'ended'
  elseif sale.state == 'paused' then refusal = 'paused'
  elseif sale.now < sale.starts_ms then refusal = 'not_open'
  end

  local now = integer(sale.now)
  local available, units = sale.available, 0
  local first_version = next_version(sale, 0)
  local holds, version = sale.hold_ms > 0, integer(first_version)
  local state = holds and 'held' or 'confirmed'
  local expires = integer(sale.now + sale.hold_ms)
  local due = integer(due_ms(sale.now, sale.now + sale.hold_ms))
  local ending = holds and ',' .. expires .. ',,' or ''
  local answers, accepted = {}, {}
  for n = 1, count do
    local id, user, quantity = ids[n], users[n], quantities[n]
    local record = records[id]
    if record then
      local same = tonumber(string.match(record, '^%a+,%d+,(%d+),')) == quantity
      answers[n] = same and ('replayed ' .. record) or 'key_reused'
    elseif refusal then answers[n] = refusal
    elseif units_of[user] + quantity > sale.max_per_user then
      answers[n] = 'limit_reached ' .. integer(units_of[user]) .. ' ' .. integer(sale.max_per_user)
    elseif holds and expired_of[user] >= sale.max_expired_holds then answers[n] = 'too_many_holds'
    elseif available <= 0 then answers[n] = 'sold_out'
    elseif quantity > available then answers[n] = 'not_enough_left'
    elseif outbox_length >= outbox_limit then answers[n] = 'outbox_full'
    else
      records[id] = state .. ',' .. version .. ',' .. quantity .. ',' .. now .. ',' .. user .. ','
        .. request_keys[n] .. ending
      units_of[user] = units_of[user] + quantity
      available, units = available - quantity, units + quantity
      outbox_length = outbox_length + 1
      accepted[#accepted + 1] = n
    end
  end

  local capacity = integer(sale.allocated + sale.released)
  if #accepted > 0 then
    local snapshot = snapshot_of(sale)
    local new_records, new_buyers, new_holds = {}, {}, {}
    for i, n in ipairs(accepted) do
      local id, user = ids[n], users[n]
      local record, mark = records[id], entry_mark(id, first_version)
      local entry = mark and redis.pcall('XADD', keys[4],
        format('%s-%d%014d', now, 128 * sale.micros + i, mark), 'id', id,
        'record', record, 'sale', snapshot, 'traceparent', traceparents[n], 'engine', sale.engine)
      if type(entry) ~= 'string' then
        entry = redis.call('XADD', keys[4], '*', 'id', id, 'record', record, 'sale', snapshot,
          'traceparent', traceparents[n], 'engine', sale.engine)
      end
      answers[n] = 'accepted ' .. entry
      new_records[2 * i - 1], new_records[2 * i] = id, record
      new_buyers[2 * i - 1], new_buyers[2 * i] = user, buyer_text(units_of[user], expired_of[user])
      if holds then new_holds[2 * i - 1], new_holds[2 * i] = due, id end
    end
    redis.call('HSET', keys[3], unpack(new_records))
    redis.call('HSET', keys[2], unpack(new_buyers))
    if holds then
      sale.held = sale.held + units
      redis.call('ZADD', keys[5], unpack(new_holds))
    end
    redis.call('HSET', keys[1], 'accepted', integer(sale.accepted + units), 'last_now_ms', now,
      'held', integer(sale.held))
  elseif sale.state ~= 'ended' and sale.state ~= 'closed' and sale.finished then
    -- Latch the end, so that a clock that jumps back does not open the sale again.
    redis.call('HSET', keys[1], 'state', 'ended', 'last_now_ms', now)
  end

  return table.concat({ now, sale.id, integer(sale.allocated), capacity, integer(sale.revision),
    integer(available), integer(sale.starts_ms), version,
    integer(sale.hold_ms), integer(sale.held), sale.engine }, ',')
    .. '\n' .. table.concat(answers, '\n')
end

return of_each_item(decide)
