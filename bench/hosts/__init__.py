"""What statistics cost in the loops of other libraries."""
