"""How good and how fast a model is, and what a run takes: everything that gives numbers, tables and figures.

`identities` (the command `verify`) measures what "correct" means, `likelihood` bits per byte, `accuracy` answers to a
task, `tune` finds decoding settings; `bench` compares speeds, `plan` counts memory and FLOPs before a run, `report`
shows one that has ended. May import `training`, `decoding` and all below. Start reading in `likelihood`.
"""
