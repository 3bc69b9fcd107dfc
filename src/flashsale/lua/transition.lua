-- transition.lua: shared functions of confirm, cancel and expire. Each changes reservations of one
-- trusted sale, whatever its window, and whether it is paused or closed.
--
-- A change gets the next version, an outbox entry with the whole record, and leaves the holds. Its
-- units stay taken until `settle` finds that Kafka has the event.

-- parse(text) returns a record of the key reservations, or nil if the text is none:
--   state,version,quantity,accepted_ms,user,key[,expires_ms,confirmed_ms,order reference]
-- A record without the last three was confirmed at once. The previous version called it accepted.
local function parse(text)
  local state, version, quantity, accepted_ms, user, key, rest =
    string.match(text, '^(%a+),(%d+),(%d+),(%d+),([^,]*),([^,]*)(.*)$')
  if not state then return nil end
  local expires_ms, confirmed_ms, order_ref = string.match(rest, '^,(%d*),(%d*),([^,]*)$')
  if rest ~= '' and not expires_ms then return nil end
  return {
    state = state == 'accepted' and 'confirmed' or state,
    version = tonumber(version),
    quantity = tonumber(quantity),
    accepted_ms = accepted_ms,
    user = user,
    key = key,
    expires_ms = expires_ms or '',
    confirmed_ms = confirmed_ms or accepted_ms,
    order_ref = order_ref or '',
  }
end

-- commit(sale, changes) writes changes { id, record text, quantity, was held, traceparent }, and
-- returns the outbox entry of each. The first write is an outbox entry: see `reserve`.
local function commit(sale, changes)
  if #changes == 0 then return {} end
  local entries, records, ended, units = {}, {}, {}, 0
  local snapshot = snapshot_of(sale)
  -- The holds are written after the outbox. A key of another type must fail here, not there.
  redis.call('ZCARD', KEYS[5])
  for n, change in ipairs(changes) do
    local id, record, quantity, was_held, traceparent = unpack(change)
    entries[n] = redis.call('XADD', KEYS[4], '*', 'id', id, 'record', record, 'sale', snapshot,
      'traceparent', traceparent, 'engine', sale.engine)
    records[2 * n - 1], records[2 * n] = id, record
    if was_held then
      ended[#ended + 1] = id
      units = units + quantity
    end
  end
  redis.call('HSET', KEYS[3], unpack(records))
  if #ended > 0 then redis.call('ZREM', KEYS[5], unpack(ended)) end
  redis.call('HSET', KEYS[1], 'held', integer(sale.held - units), 'last_now_ms', integer(sale.now))
  return entries
end

-- line_of(sale) returns the first line of an answer:
--   now_ms,sale_id,allocated,capacity,revision,engine
local function line_of(sale)
  return integer(sale.now) .. ',' .. snapshot_of(sale) .. ',' .. sale.engine
end

-- text_of(sale, record, state) returns the text of the next version of a record.
local function text_of(sale, record, state)
  return table.concat({ state, integer(next_version(sale, record.version)),
    integer(record.quantity), record.accepted_ms, record.user, record.key, record.expires_ms,
    record.confirmed_ms, record.order_ref }, ',')
end

-- change_all(decide) decides the calls in ARGV[1], one per line: id,order reference,traceparent,sale.
-- A call that names its sale is refused if the item has another one. ARGV[2] is the number of calls,
-- and ARGV[3] the id of the pod's engine or ''. decide(record, order_ref, now) returns the next state
-- and may change the record, or it returns nil and an answer.
-- Returns one word (unknown, unsupported, fenced or other_engine), or the line of the sale and one
-- line per call, in order:
--   changed ENTRY-ID RECORD | replayed RECORD | other_sale | unknown_reservation | unreadable |
--   a refusal
-- An unreadable record is answered for its own call only. The other calls are decided.
local function change_all(decide)
  local sale, reason = read_sale(KEYS)
  if reason then return reason end
  if foreign(sale, ARGV[3]) then return 'other_engine' end
  local ids, order_refs, traceparents, sale_ids, parsed = {}, {}, {}, {}, 0
  for id, order_ref, traceparent, sale_id in string.gmatch(ARGV[1],
    '([^,\n]+),([^,\n]*),([^,\n]*),([^,\n]*)\n') do
    ids[#ids + 1] = id
    order_refs[#ids], traceparents[#ids], sale_ids[#ids] = order_ref, traceparent, sale_id
    parsed = parsed + #id + #order_ref + #traceparent + #sale_id + 4
  end
  if #ids == 0 or #ids ~= tonumber(ARGV[2]) or parsed ~= #ARGV[1] then
    return redis.error_reply('ERR malformed batch')
  end
  local texts, known = {}, redis.call('HMGET', KEYS[3], unpack(ids))
  for n, id in ipairs(ids) do texts[id] = known[n] or nil end
  local answers, changes, changed = {}, {}, {}
  local now = integer(sale.now)
  for n, id in ipairs(ids) do
    local record = texts[id] and parse(texts[id])
    if sale_ids[n] ~= '' and sale_ids[n] ~= sale.id then
      answers[n] = 'other_sale'
    elseif not record then
      answers[n] = texts[id] and 'unreadable' or 'unknown_reservation'
    else
      local state, answer = decide(record, order_refs[n], now)
      if state then
        texts[id] = text_of(sale, record, state)
        changes[#changes + 1] =
          { id, texts[id], record.quantity, record.state == 'held', traceparents[n] }
        changed[#changes] = n
      else
        answers[n] = answer == 'replayed' and 'replayed ' .. texts[id] or answer
      end
    end
  end
  -- A primary without its replicas refuses writes, because another server may have replaced it. This
  -- write, which needs no memory, lets it refuse answers that change nothing, too.
  if #changes == 0 then redis.call('ZREM', KEYS[5], '') end
  for i, entry in ipairs(commit(sale, changes)) do
    answers[changed[i]] = 'changed ' .. entry .. ' ' .. changes[i][2]
  end
  return line_of(sale) .. '\n' .. table.concat(answers, '\n')
end
