"""Whole jobs: adapt a model and report on it; a model's own answers as training data.

Imports `measure` and below. Start reading in `adapt.py`.
"""
