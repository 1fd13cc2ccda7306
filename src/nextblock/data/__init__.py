"""From files, Hub data sets and built-in tasks to packed rows of tokens.

Imports `config`. Start reading in `rows.py` (what a row is), then `stream.py` (endless rows).
"""
