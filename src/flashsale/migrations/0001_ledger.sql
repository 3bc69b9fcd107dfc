-- The ledger: the durable record of every sale, independent of Redis.

CREATE TABLE sales (
    sale_id      text        PRIMARY KEY,
    item_id      text        NOT NULL,
    display_name text,
    allocated    bigint      NOT NULL CHECK (allocated >= 0),
    max_per_user integer     NOT NULL DEFAULT 1 CHECK (max_per_user >= 1),
    starts_at    timestamptz,
    ends_at      timestamptz,
    paused       boolean     NOT NULL DEFAULT false,
    closed       boolean     NOT NULL DEFAULT false,
    -- Grows with every change of the columns above. Redis refuses a lower revision.
    revision     bigint      NOT NULL CHECK (revision >= 1),
    -- The highest value of allocated + released so far. It only grows, so that a unit that was
    -- sold again can be recorded before the release that freed it.
    capacity     bigint      NOT NULL CHECK (capacity >= 0),
    accepted     bigint      NOT NULL DEFAULT 0 CHECK (accepted >= 0),
    released     bigint      NOT NULL DEFAULT 0 CHECK (released >= 0),
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT sales_accepted_within_capacity CHECK (accepted <= capacity),
    CONSTRAINT sales_released_within_accepted CHECK (released <= accepted)
);

CREATE INDEX sales_item_id ON sales (item_id);

-- There is no foreign key to sales. The consumer locks the sale's row before it writes, so a
-- trigger per row would only repeat that check.
CREATE TABLE reservations (
    sale_id        text        NOT NULL,
    reservation_id uuid        NOT NULL,
    user_id        text        NOT NULL,
    quantity       integer     NOT NULL CHECK (quantity BETWEEN 1 AND 1000),
    -- refused: Redis accepted it, but the ledger does not count it. It exceeds the sale's capacity.
    state          text        NOT NULL CHECK (state IN ('accepted', 'released', 'refused')),
    version        integer     NOT NULL CHECK (version >= 1),
    request_key    text,
    occurred_at    timestamptz NOT NULL,
    recorded_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (sale_id, reservation_id)
);

-- The next offset to read, written in the transaction that records the events before it.
CREATE TABLE kafka_offsets (
    topic       text    NOT NULL,
    partition   integer NOT NULL,
    next_offset bigint  NOT NULL CHECK (next_offset >= 0),
    PRIMARY KEY (topic, partition)
);
