"""What people train, one row of docs/models.md each; every file here adds some as its `ROWS`.

`python tests/table.py` writes the page, and tests/test_rows.py proves each row.
"""
