"""The parts of every op: its description, its way into torch, and the choice of a backend.

Read in this order: `spec`, `register`, `dispatch`; then the others.
"""
