"""Whole jobs: adapt a model and report on it; experiments; own answers as training data; `generate` of transformers.

Imports `measure` and below. Start reading in `adapt.py`.
"""
