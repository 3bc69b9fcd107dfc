-- Every reconcile of a FlashSale looks for its refused and its expired reservations.

-- Most reservations have other states. Without the index, each query reads all of them.
CREATE INDEX reservations_refused_or_expired ON reservations (sale_id, state)
    WHERE state IN ('refused', 'expired');
