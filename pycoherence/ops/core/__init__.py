"""What every op is made of: its description, its way into torch, and the choice of a backend.

Read in this order: `spec`, `register`, `dispatch`; then the others.
"""
