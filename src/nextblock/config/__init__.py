"""What a user may set, and what a user did wrong: option sections, a run and its stages, presets, errors, files.

Imports nothing of nextblock. Start reading in `run.py`: `AdaptConfig` is a whole run.
"""
