-- confirm: confirm reservations that are held, each for an order of the shop.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox, 5 holds
-- ARGV  1 the calls, one per line: id,order reference,traceparent,sale. The last two may be empty.
--       2 the number of calls, 3 the id of the pod's engine, or ''
-- Returns the answers of change_all (transition.lua). The refusals are:
--       hold_expired, cancelled   the reservation has ended
--       other_order               it is confirmed for another order
-- Invariants: a hold can be confirmed until it is expired, also after its time. A confirmed
--       reservation never expires. A reservation has at most one order.

if string.find('\n' .. ARGV[1], '\n[^,\n]*,,') then
  return redis.error_reply('ERR no order reference')
end

return change_all(function(record, order_ref, now)
  if record.state == 'expired' then return nil, 'hold_expired' end
  if record.state == 'cancelled' then return nil, 'cancelled' end
  if record.state == 'confirmed' then
    if record.order_ref == order_ref then return nil, 'replayed' end
    if record.order_ref ~= '' then return nil, 'other_order' end
  else
    record.confirmed_ms = now
  end
  record.order_ref = order_ref
  return 'confirmed'
end)
