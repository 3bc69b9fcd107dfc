-- The uid of the FlashSale that declared the sale, or null if flashsalectl applied it. The operator
-- closes a sale whose FlashSale no longer exists, even one deleted while the operator was down.

ALTER TABLE sales ADD COLUMN resource_uid text;
