-- cancel: end reservations, so that their units are for sale again once Kafka has the event.
--
-- KEYS  1 sale, 2 buyers, 3 reservations, 4 outbox, 5 holds
-- ARGV  1 the calls, one per line: id,order reference,traceparent,sale. Only the id is required.
--       2 the number of calls, 3 the id of the pod's engine, or ''
-- Returns the answers of change_all (transition.lua). The refusal is:
--       other_order   it is confirmed for another order than the call names
-- Invariants: a cancelled reservation stays cancelled. One that is confirmed for an order is
--       cancelled only by a call that names the order.

return change_all(function(record, order_ref)
  if record.state == 'expired' or record.state == 'cancelled' then return nil, 'replayed' end
  if record.order_ref ~= '' and record.order_ref ~= order_ref then return nil, 'other_order' end
  record.order_ref = order_ref
  return 'cancelled'
end)
