-- What a rebuild of a sale in Redis leaves behind.

-- The revision of the last rebuild. What was accepted before it and comes after it was not in it:
-- Redis sells those units again, so it is refused.
ALTER TABLE sales ADD COLUMN rebuilt_revision bigint NOT NULL DEFAULT 0;

-- Units that Redis had accepted and whose events were nowhere when it was rebuilt.
ALTER TABLE sales ADD COLUMN lost bigint NOT NULL DEFAULT 0 CHECK (lost >= 0);

-- Nearly empty, so that every batch can look whether it brings one of them again.
CREATE INDEX reservations_refused ON reservations (sale_id, reservation_id)
    WHERE state = 'refused';
