-- A sale that was closed at its end or later stays ended when its keys are gone.

-- Null if the sale is not closed, or if the previous version closed it.
ALTER TABLE sales ADD COLUMN closed_at timestamptz;
