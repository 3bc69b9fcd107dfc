"""The operator's core: makes Redis agree with FlashSales, by way of the ledger."""
