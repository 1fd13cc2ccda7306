"""The method   (arXiv 2512.06776): `corruption` makes [noised ; clean] and its targets, `objective` their losses with
the help of `cross_entropy`, `schedules` what changes with the step. Imports `model`, `data`, `attention` and `config`.
Start reading at `corruption.corrupt`, then `objective.TwoViewLoss`.
"""
