"""The operator: makes the ledger and Redis match FlashSale resources. Includes flashsalectl."""
