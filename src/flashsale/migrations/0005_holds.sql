-- Reservations that are held until they are confirmed, cancelled or expired.

-- How long a reservation is held, in seconds. Null: it is confirmed at once.
ALTER TABLE sales ADD COLUMN hold_seconds integer CHECK (hold_seconds BETWEEN 1 AND 86400);
-- The expired holds of a buyer above which the sale refuses the buyer.
ALTER TABLE sales ADD COLUMN max_expired_holds integer NOT NULL DEFAULT 3
    CHECK (max_expired_holds >= 1);
-- Units of reservations that are held.
ALTER TABLE sales ADD COLUMN held bigint NOT NULL DEFAULT 0;
ALTER TABLE sales ADD CONSTRAINT sales_held_within_accepted
    CHECK (held BETWEEN 0 AND accepted - released);
-- Changes that a rebuild did not find and that arrived after it. Redis took them back.
ALTER TABLE sales ADD COLUMN voided bigint NOT NULL DEFAULT 0;

-- The name changes, so that a consumer or an operator of the previous version waits for the ledger
-- instead of reading states that it does not know.
ALTER TABLE reservations RENAME COLUMN occurred_at TO accepted_at;
-- refused: Redis accepted it, but the ledger does not count it. It exceeds the sale's capacity, or
-- it came after a rebuild that did not find it.
ALTER TABLE reservations DROP CONSTRAINT reservations_state_check;
ALTER TABLE reservations
    ADD COLUMN expires_at timestamptz,
    ADD COLUMN confirmed_at timestamptz,
    ADD COLUMN order_ref text,
    -- The state that the last change replaced, or null for a new row.
    ADD COLUMN former_state text;
-- The consumer finds the former state in the row that it changes.
DROP INDEX reservations_refused;

-- One statement, so that a large table is rewritten once. The previous version called a confirmed
-- reservation accepted. It had no other final state than released.
ALTER TABLE reservations
    ALTER COLUMN version TYPE bigint,
    ALTER COLUMN state TYPE text USING
        CASE state WHEN 'accepted' THEN 'confirmed' WHEN 'released' THEN 'cancelled' ELSE state END,
    ALTER COLUMN confirmed_at TYPE timestamptz USING
        CASE WHEN state <> 'refused' THEN accepted_at END,
    ADD CONSTRAINT reservations_state_check
        CHECK (state IN ('held', 'confirmed', 'cancelled', 'expired', 'refused'));
