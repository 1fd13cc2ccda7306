"""From prompts to tokens in ar, diffusion and speculative mode, as a stream of events.

A call goes from `lm.py` (`BlockDiffusionLM.generate`) through `request.py` (input, checked) to `engine.py`, which runs
one of the three modes: its own ar loop, `diffusion.py`, or `speculative.py` (`drafts.py`, `check.py`, `pace.py`).
Each mode runs passes of a `Batch` (`batch.py`, made of `rows.py`, `masks.py`, `head.py` and `attention/cache.py`;
`compiled.py` for passes of fixed shapes). Imports `model`, `data` and below, never `training`. Start reading in
`lm.py`, then `engine.py`.
"""
