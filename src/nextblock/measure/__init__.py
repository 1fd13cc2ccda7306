"""How good and how fast: likelihood, accuracy, the ten identities, settings search, benchmarks, plans, reports.

Imports `training`, `decoding` and below. Start reading in `identities.py` or `likelihood.py`.
"""
