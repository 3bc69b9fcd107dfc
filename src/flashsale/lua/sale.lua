-- sale.lua: shared functions, prepended to every other script. They read a sale and decide whether
-- its keys can be trusted.
--
-- read_sale(keys) takes the item's keys (sale, buyers, reservations, outbox, holds). It returns the
-- sale, which is a table of numbers and strings. If the sale cannot be used, it also returns the
-- reason. With the first two reasons, the sale is nil:
--   unknown      the item has no sale
--   unsupported  this version does not support the sale's format, or a field is invalid
--   fenced       the keys were written under another run of the Redis server (it restarted, failed
--                over or was restored), or they wait for a rebuild, or the sale is torn: it has
--                accepted units and one of its keys is missing, or it has held units and no holds
--                (an emptied stream still is a key)
-- Invariant: a sale whose keys may lack data that the ledger has is never trusted.
--
-- Some fields of the sale:
--   now          Redis' clock in ms. It never runs backwards for a sale, even if the machine's clock
--                does.
--   engine       the id of the engine that applied the sale, or '' if the previous version did
--   held         units of reservations that are not confirmed yet
--   hold_ms      how long a new reservation is held, or 0 if it is confirmed at once
--   rebuilt      the revision of the sale's last rebuild, or 0
--   finished     whether the sale is closed or ended, and so accepts nothing any more
--
-- Under another run the fence is latched: read_sale writes a run_id that no server has. Otherwise a
-- server that forgets its master_replid2 could have the run again under which it lost writes. The
-- write uses pcall, because a server without its replicas refuses it and must still say fenced.

local FORMAT = '1'
local STATES = { open = true, paused = true, ended = true, closed = true }

local format = string.format

-- tostring would round a number of more than 14 digits.
local function integer(n)
  return format('%d', n)
end

-- A server that was demoted and promoted again keeps its run_id, but its master_replid2 changes to
-- the replication id of the master that it followed. master_replid does not serve, because it also
-- changes when a master gets its first replica. The searches are plain, because a pattern, which Lua
-- tries at each character, costs twice as much as INFO itself.
local own_run -- a call reads it once, for all its items
local function server_run()
  if own_run then return own_run end
  local info = redis.call('INFO', 'server', 'replication')
  local _, run = string.find(info, 'run_id:', 1, true)
  local _, replid2 = string.find(info, 'master_replid2:', run, true)
  own_run = string.sub(info, run + 1, run + 40) .. ':'
    .. string.sub(info, replid2 + 1, replid2 + 40)
  return own_run
end

-- Returns the time in ms, and the microseconds since then.
local own_ms, own_micros -- a call reads them once, for all its items
local function clock_ms()
  if not own_ms then
    local time = redis.call('TIME')
    own_micros = time[2] % 1000
    own_ms = time[1] * 1000 + (time[2] - own_micros) / 1000
  end
  return own_ms, own_micros
end

-- The last 14 digits of the id of an acceptance's outbox entry: the last digit of the version, the
-- last 32 bits of the reservation's id, and 000. Redis counts up from the last id of a millisecond,
-- so an id that it makes does not end in 000. Nil if the reservation's id has no such bits.
local function entry_mark(reservation_id, version)
  local bits = tonumber(string.sub(reservation_id, -8), 16)
  return bits and (version % 10 * 10000000000 + bits) * 1000
end

-- A field that the previous version did not write has its default. A wrong value is nil.
local function number(text, default)
  if not text or text == '' then return default end
  return tonumber(text)
end

-- The version of a reservation's next change. It exceeds every version that a rebuild did not find.
local function next_version(sale, version)
  return math.max(version, 1000 * sale.rebuilt) + 1
end

-- A buyer's units and expired holds, as in the key buyers: UNITS, or UNITS,EXPIRED-HOLDS. Two nils
-- if the text is neither.
local function buyer(text)
  if not text then return 0, 0 end
  local units = tonumber(text)
  if units then return units, 0 end
  local counted, expired = string.match(text, '^(%d+),(%d+)$')
  return tonumber(counted), tonumber(expired)
end

local function buyer_text(units, expired)
  return expired > 0 and integer(units) .. ',' .. integer(expired) or units
end

-- When a hold may be ended: a tenth of its length after its time, but at most 30 s after it. So a
-- buyer who pays in the last second gets the unit.
local function due_ms(accepted_ms, expires_ms)
  return expires_ms + math.min(math.floor((expires_ms - accepted_ms) / 10), 30000)
end

local function snapshot_of(sale)
  return format('%s,%d,%d,%d', sale.id, sale.allocated, sale.allocated + sale.released,
    sale.revision)
end

local function read_sale(keys)
  local key = keys[1]
  local f = redis.call('HMGET', key, 'format', 'sale_id', 'run_id', 'revision', 'state',
    'allocated', 'accepted', 'released', 'max_per_user', 'starts_ms', 'ends_ms', 'last_now_ms',
    'engine', 'hold_ms', 'max_expired_holds', 'held', 'rebuilt')
  if not f[1] then
    return nil, redis.call('EXISTS', key) == 0 and 'unknown' or 'unsupported'
  end
  local run_id, state, last_now_ms = f[3], f[5], tonumber(f[12])
  local ends_ms = f[11] == '' and math.huge or tonumber(f[11])
  local now = last_now_ms and math.max(clock_ms(), last_now_ms)
  -- Lua gives a table of more than 16 fields room for 32, which takes noticeably longer.
  local sale = {
    id = f[2],
    run_id = run_id,
    revision = tonumber(f[4]),
    state = state,
    allocated = tonumber(f[6]),
    accepted = tonumber(f[7]),
    released = tonumber(f[8]),
    max_per_user = tonumber(f[9]),
    starts_ms = f[10] == '' and 0 or tonumber(f[10]),
    engine = f[13] or '',
    hold_ms = number(f[14], 0),
    max_expired_holds = number(f[15], 3),
    held = number(f[16], 0),
    rebuilt = number(f[17], 0),
    now = now,
    finished = state == 'closed' or state == 'ended' or now and ends_ms and now >= ends_ms,
  }
  if f[1] ~= FORMAT or not sale.id or not run_id or not STATES[state]
    or not (sale.revision and sale.allocated and sale.accepted and sale.released
      and sale.max_per_user and sale.starts_ms and ends_ms and now
      and sale.hold_ms and sale.max_expired_holds and sale.held and sale.rebuilt) then
    return nil, 'unsupported'
  end
  local other_run = run_id ~= server_run()
  if other_run and string.match(run_id, '^%x+:%x+$') then
    redis.pcall('HSET', key, 'run_id', 'fenced')
  end
  local torn = sale.accepted > 0 and redis.call('EXISTS', keys[2], keys[3], keys[4]) < 3
    or sale.held > 0 and redis.call('EXISTS', keys[5]) == 0
  return sale, (other_run or torn) and 'fenced' or nil
end

-- Whether the ledger has the whole sale: Kafka has all its events, no hold is open, and the ledger
-- has recorded all its accepted and released units.
local function recorded(sale, keys, accepted, released)
  return redis.call('XLEN', keys[4]) == 0 and redis.call('EXISTS', keys[5]) == 0
    and sale.held == 0 and sale.accepted == tonumber(accepted)
    and sale.released == tonumber(released)
end

-- Whether another sale may replace this one, which must be `sale_id`, finished and recorded.
local function replaceable(sale, keys, sale_id, accepted, released)
  return sale.id == sale_id and sale.finished and recorded(sale, keys, accepted, released)
end

-- Whether the sale belongs to another engine than the caller's. An empty id matches every engine,
-- because the previous version had none.
local function foreign(sale, engine)
  return engine ~= '' and sale.engine ~= '' and sale.engine ~= engine
end

-- Calls decide(keys, n) for each item of the call, with the n-th five of KEYS. Returns the results
-- in order. An item whose part fails has the error as its result, and disturbs no other item.
local function of_each_item(decide)
  local results, keys = {}, {}
  for n = 1, #KEYS / 5 do
    for i = 1, 5 do keys[i] = KEYS[5 * n - 5 + i] end
    local done, result = pcall(decide, keys, n)
    if not done and type(result) ~= 'table' then result = redis.error_reply('ERR ' .. result) end
    results[n] = result
  end
  return results
end
