-- sale.lua: put in front of every other script; how a sale is read and when it may be trusted.
--
-- read_sale(keys), of the item's keys sale, buyers, reservations and outbox, returns the sale as a
-- table of numbers and strings, or nil and a reason:
--   unknown      there is no such sale
--   unsupported  its format or a field is not one that this version speaks
-- Invariant 7: sale.fenced says that the keys were written under another run of the Redis server
-- (it restarted, failed over or was restored) or wait for a rebuild, so that they may lack what the
-- ledger has; sale.torn that a key is gone which a sale with accepted units has (an emptied stream
-- stays a key).
-- sale.now is Redis' clock in ms; it never runs backwards for a sale, whatever the machine's does.

local FORMAT = '1'
local STATES = { open = true, paused = true, ended = true, closed = true }

local function integer(n)
  return string.format('%.0f', n)
end

-- A server that was demoted and promoted again keeps its run_id, but has another master_replid2:
-- the replication id of the master that it followed. (Not master_replid, which also changes when a
-- master gets its first replica.)
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
    'allocated', 'accepted', 'released', 'max_per_user', 'starts_ms', 'ends_ms', 'last_now_ms')
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
  }
  if f[1] ~= FORMAT or not sale.id or not sale.run_id or not STATES[sale.state]
    or not (sale.revision and sale.allocated and sale.accepted and sale.released
      and sale.max_per_user and sale.starts_ms and sale.ends_ms and sale.last_now_ms) then
    return nil, 'unsupported'
  end
  sale.torn = sale.accepted > 0 and redis.call('EXISTS', keys[2], keys[3], keys[4]) < 3
  sale.fenced = sale.torn or sale.run_id ~= server_run()
  sale.now = math.max(clock_ms(), sale.last_now_ms)
  sale.finished = sale.state == 'closed' or sale.state == 'ended' or sale.now >= sale.ends_ms
  sale.available = sale.allocated - sale.accepted + sale.released
  return sale
end

-- Whether another sale may take the place of this one: it is finished, Kafka has all of it, and the
-- ledger has recorded the units that it accepted.
local function replaceable(sale, outbox, sale_id, recorded)
  return sale.id == sale_id and sale.finished and sale.accepted == tonumber(recorded)
    and redis.call('XLEN', outbox) == 0
end
