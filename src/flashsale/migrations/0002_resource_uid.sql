-- The uid of the FlashSale that declared the sale; null for one that flashsalectl applied. The
-- operator closes a sale whose FlashSale is gone, also one that was deleted while it was down.

ALTER TABLE sales ADD COLUMN resource_uid text;
