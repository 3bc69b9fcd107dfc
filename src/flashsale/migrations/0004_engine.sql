-- The engine that this ledger belongs to: one row.

CREATE TABLE engine (
    singleton     boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    -- Redis and every event carry it, so that the parts of two engines recognize one another.
    id            uuid    NOT NULL DEFAULT gen_random_uuid(),
    -- FLASHSALE_ENGINE of the first process. Null until then.
    name          text,
    -- host:port/db of the Redis that the sales were seeded in. Null before the first sale.
    redis_address text
);

-- The previous version had one name for all engines.
INSERT INTO engine (name)
SELECT CASE
    WHEN EXISTS (SELECT FROM sales) OR EXISTS (SELECT FROM kafka_offsets) THEN 'flashsale'
END;
