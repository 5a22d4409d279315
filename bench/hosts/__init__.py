"""The cost of statistics in the loops of other libraries."""
