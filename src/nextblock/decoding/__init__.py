"""From prompts to tokens: AR, diffusion and speculative mode, and the checks that none of them cheats.

Imports `model` and below, never `training`. Start reading in `lm.py` (`BlockDiffusionLM`), then `engine.py`.
"""
