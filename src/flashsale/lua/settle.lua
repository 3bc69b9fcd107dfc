-- settle: delete outbox entries of some items whose events Kafka has acknowledged. An entry that
-- ends a reservation gives its units back to the sale, and to the buyer's limit.
--
-- KEYS  for each item: sale, buyers, reservations, outbox, holds
-- ARGV  one for each item: the entries, one per line: entry id,reservation id,version
-- Returns for each item the number of deleted entries, or the error that its part ended with.
-- Invariants: an event leaves the outbox only after Kafka has acknowledged it. An entry must match
--       its reservation and version, because a Redis that was restored from an older copy can give
--       the same entry id to another event, which Kafka does not have. The id of an acceptance's
--       entry has a mark to match, and any other entry is read. A unit is released once, and only
--       after Kafka has the release. A rebuild reads the counts of an untrusted sale from the
--       ledger, so they are not touched here. While buyers have more units than a lowered stock,
--       released units are not sold again. The first write is the deletion, which Redis permits
--       when it is out of memory. It then permits the other writes too. Everything is read before
--       it, because Redis does not roll back. If a buyer cannot be read, the entry stays.

local function settle(keys, item)
  local acknowledged, releases, seen = {}, {}, {}
  for entry_id, reservation_id, version in string.gmatch(ARGV[item],
    '([^,\n]+),([^,\n]+),(%d+)\n') do
    local mark = entry_mark(reservation_id, tonumber(version))
    local marked = mark and tonumber(string.sub(entry_id, -14)) == mark
    local entry = not marked and not seen[entry_id]
      and redis.call('XRANGE', keys[4], entry_id, entry_id)[1]
    if marked then
      acknowledged[#acknowledged + 1] = entry_id
    elseif entry and entry[2][1] == 'id' and entry[2][2] == reservation_id then
      local state, own_version, quantity, user =
        string.match(entry[2][4] or '', '^(%a+),(%d+),(%d+),%d+,([^,]+),')
      if own_version == version then
        seen[entry_id] = true
        if state == 'expired' or state == 'cancelled' then
          releases[#releases + 1] =
            { entry_id, user, tonumber(quantity), state == 'expired' and 1 or 0 }
        else
          acknowledged[#acknowledged + 1] = entry_id
        end
      end
    end
  end
  local sale, reason
  if #releases > 0 then sale, reason = read_sale(keys) end
  -- A pod of a version that supports the sale can still give the units back.
  if reason == 'unsupported' then return 0 end
  local trusted = sale and not reason
  local buyers = {}
  for _, release in ipairs(releases) do
    local entry_id, user, quantity, ended = unpack(release)
    local units, expired
    if trusted then units, expired = buyer(buyers[user] or redis.call('HGET', keys[2], user)) end
    if units then
      buyers[user] = buyer_text(units - quantity, expired + ended)
      sale.released = sale.released + quantity
    end
    if units or not trusted then acknowledged[#acknowledged + 1] = entry_id end
  end
  if #acknowledged == 0 then return 0 end
  local deleted = redis.call('XDEL', keys[4], unpack(acknowledged))
  if not next(buyers) then return deleted end

  for user, text in pairs(buyers) do redis.call('HSET', keys[2], user, text) end
  local stock, revision = string.match(redis.call('HGET', keys[1], 'stock') or '', '^(%d+),(%d+)$')
  local allocated = sale.allocated
  if tonumber(revision) == sale.revision then
    allocated = math.min(allocated, math.max(tonumber(stock), sale.accepted - sale.released))
  end
  redis.call('HSET', keys[1], 'released', integer(sale.released), 'allocated', integer(allocated))
  return deleted
end

return of_each_item(settle)
