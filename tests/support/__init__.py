"""Helpers of the tests: oracles, how close to them results must come, calls and models."""
