"""The method: corruption, the two losses, the schedules of block size and weights   (arXiv 2512.06776).

Imports `model`, `data`, `attention` and `config`. Start reading in `corruption.py`, then `objective.py`.
"""
