-- The traces of rebuilds of a sale in Redis.

-- The revision of the last rebuild. An event that was accepted before the rebuild and first arrives
-- after it is refused, because Redis sells those units again.
ALTER TABLE sales ADD COLUMN rebuilt_revision bigint NOT NULL DEFAULT 0;

-- Units that Redis had accepted and whose events were missing everywhere at a rebuild.
ALTER TABLE sales ADD COLUMN lost bigint NOT NULL DEFAULT 0 CHECK (lost >= 0);

-- The index is nearly empty, so every batch can check cheaply for repeats of refused events.
CREATE INDEX reservations_refused ON reservations (sale_id, reservation_id)
    WHERE state = 'refused';
