"""Measurements of pycoherence; `python -m bench --help` lists them."""
