"""Measure speed fairly: the same prompts, contestants in turn, medians of ratios, every forward pass counted.

`prompts` says what is decoded and how, `contest` who takes part and how turns are taken; `decoding` compares with
transformers' generate, `scores` grades modes on a task, `forwards` times single passes. Start reading in `contest`.
"""
