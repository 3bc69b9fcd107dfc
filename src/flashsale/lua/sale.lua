-- sale.lua: shared functions, prepended to every other script. They read a sale and decide whether
-- its keys can be trusted.
--
-- read_sale(keys) takes the item's keys (sale, buyers, reservations, outbox). It returns the sale
-- as a table of numbers and strings, or nil and a reason:
--   unknown      the item has no sale
--   unsupported  this version does not support the sale's format, or a field is invalid
--
-- Invariant: a sale whose keys may lack data that the ledger has is never trusted.
--   sale.fenced  The keys were written under another run of the Redis server (it restarted, failed
--                over or was restored), or they wait for a rebuild, or the sale is torn.
--   sale.torn    The sale has accepted units and one of its keys is missing. An emptied stream
--                still is a key.
--   sale.now     Redis' clock in ms. It never runs backwards for a sale, even if the machine's
--                clock does.
--   sale.engine  The id of the engine that applied the sale, or '' if the previous version did.
--
-- Under another run the fence is latched: read_sale writes a run_id that no server has. Otherwise a
-- server that forgets its master_replid2 could have the run again under which it lost writes. The
-- write uses pcall, because a server without its replicas refuses it and must still say fenced.

local FORMAT = '1'
local STATES = { open = true, paused = true, ended = true, closed = true }

local function integer(n)
  return string.format('%.0f', n)
end

-- A server that was demoted and promoted again keeps its run_id, but its master_replid2 changes to
-- the replication id of the master that it followed. master_replid does not serve, because it also
-- changes when a master gets its first replica.
local function server_run()
  local info = redis.call('INFO', 'server', 'replication')
  return string.match(info, 'run_id:(%x+)') .. ':' .. string.match(info, 'master_replid2:(%x+)')
end

local function clock_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function read_sale(keys)
  local key = keys[1]
  local f = redis.call('HMGET', key, 'format', 'sale_id', 'run_id', 'revision', 'state',
    'allocated', 'accepted', 'released', 'max_per_user', 'starts_ms', 'ends_ms', 'last_now_ms',
    'engine')
  if not f[1] then
    return nil, redis.call('EXISTS', key) == 0 and 'unknown' or 'unsupported'
  end
  local sale = {
    id = f[2],
    run_id = f[3],
    revision = tonumber(f[4]),
    state = f[5],
    allocated = tonumber(f[6]),
    accepted = tonumber(f[7]),
    released = tonumber(f[8]),
    max_per_user = tonumber(f[9]),
    starts_ms = f[10] == '' and 0 or tonumber(f[10]),
    ends_ms = f[11] == '' and math.huge or tonumber(f[11]),
    last_now_ms = tonumber(f[12]),
    engine = f[13] or '',
  }
  if f[1] ~= FORMAT or not sale.id or not sale.run_id or not STATES[sale.state]
    or not (sale.revision and sale.allocated and sale.accepted and sale.released
      and sale.max_per_user and sale.starts_ms and sale.ends_ms and sale.last_now_ms) then
    return nil, 'unsupported'
  end
  sale.torn = sale.accepted > 0 and redis.call('EXISTS', keys[2], keys[3], keys[4]) < 3
  local other_run = sale.run_id ~= server_run()
  if other_run and string.match(sale.run_id, '^%x+:%x+$') then
    redis.pcall('HSET', key, 'run_id', 'fenced')
  end
  sale.fenced = sale.torn or other_run
  sale.now = math.max(clock_ms(), sale.last_now_ms)
  sale.finished = sale.state == 'closed' or sale.state == 'ended' or sale.now >= sale.ends_ms
  sale.available = sale.allocated - sale.accepted + sale.released
  return sale
end

-- Whether another sale may replace this one: it is finished, Kafka has all its events, and the
-- ledger has recorded all its accepted units.
local function replaceable(sale, outbox, sale_id, recorded)
  return sale.id == sale_id and sale.finished and sale.accepted == tonumber(recorded)
    and redis.call('XLEN', outbox) == 0
end

-- Whether the sale belongs to another engine than the caller's. An empty id matches every engine,
-- because the previous version had none.
local function foreign(sale, engine)
  return engine ~= '' and sale.engine ~= '' and sale.engine ~= engine
end
