-- The consumer announces recorded reservations in a topic for order services.

-- The next event to announce, at most next_offset. A consumer of the previous version announces
-- nothing, so its new rows begin at 0. The next consumer announces what that one recorded.
ALTER TABLE kafka_offsets ADD COLUMN announced_offset bigint NOT NULL DEFAULT 0;
-- Everything recorded before this migration is not announced.
UPDATE kafka_offsets SET announced_offset = next_offset;

-- The revision of the last rebuild that was announced.
ALTER TABLE sales ADD COLUMN announced_revision bigint NOT NULL DEFAULT 0;
UPDATE sales SET announced_revision = rebuilt_revision;
-- The index is nearly empty, so every consumer can look often.
CREATE INDEX sales_not_announced ON sales (sale_id) WHERE rebuilt_revision > announced_revision;
