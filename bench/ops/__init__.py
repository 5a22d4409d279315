"""Each op against plain torch."""
