"""Who may look at whom: the rule of the two-view pass (Eq. 4), the forms in which layers read it, and the keys and
values that decoding keeps.

Imports `config`. Start reading in `rule.py`: `block_diffusion_rule` is the rule.
"""
