"""Clocks, machines, results and models, for all commands."""
