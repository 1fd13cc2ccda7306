"""From files, Hub data sets and built-in tasks to packed rows of tokens.

A document comes from a source (`records`, `files`, `formats`, `cursors`, `sources`), is drawn in the share of its
source (`mixture`), becomes token ids (`chat`, `encode`), is packed into rows (`rows`, `stream`) and reaches the ranks
(`feed`). Imports `tasks` and `config`. Start reading in `rows.py` (what a row is), then `stream.py` (endless rows).
"""
