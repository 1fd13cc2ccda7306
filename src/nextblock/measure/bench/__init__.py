"""Measure speed fairly: the same prompts, contestants in turn, medians of ratios, every forward pass counted.

`prompts`   what is decoded, and how: a task or a file; variants of the decoding options
`contest`   the contestants, and the rounds in which they take turns
`decoding`  `nextblock bench decode`: transformers' generate against the three modes
`scores`    modes on a built-in task: accuracy, and speeds in turns
`forwards`  one forward pass of 1, 2, 4, ... positions; random models of real shapes
`figures`   tables and plots
"""
