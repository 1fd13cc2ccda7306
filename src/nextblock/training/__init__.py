"""From rows to a trained checkpoint: the step, the loop, checkpoints, resuming, several ranks, the export.

Imports `recipe` and below, never `decoding`. Start reading in `step.py`: `train_step` is one optimizer step.
"""
