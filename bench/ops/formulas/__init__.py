"""Formulas that several files of `plain/` share."""
