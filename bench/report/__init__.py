"""The page that is written from the results."""
