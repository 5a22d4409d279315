"""Ways to compute an op in plain torch, in a file of its name; see `bench/ops/ways.py`."""
