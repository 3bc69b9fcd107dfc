-- page: read a page of a sale's reservations together with the sale's current numbers. One script
-- reads both, so that no record is paired with the numbers of a later rebuild.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox, 5 holds
-- ARGV  1 cursor of HSCAN, 2 about how many reservations
-- Returns one word (unknown, unsupported or fenced), or a list: the next cursor ('0' at the end),
--       sale id, allocated, capacity, revision and engine, then id and record in turn.
-- Invariant: the records of an untrusted sale are not read, because they may be an older copy.

local sale, reason = read_sale(KEYS)
if reason then return reason end
local scanned = redis.call('HSCAN', KEYS[3], ARGV[1], 'COUNT', ARGV[2])
local page = { scanned[1], sale.id, integer(sale.allocated),
  integer(sale.allocated + sale.released), integer(sale.revision), sale.engine }
for _, text in ipairs(scanned[2]) do page[#page + 1] = text end
return page
