"""What a user may set, and what a user did wrong: sections, a run and its stages, presets, errors, files, progress.

Imports nothing of nextblock. Start reading in `run.py`: `AdaptConfig` is a whole run.
"""
