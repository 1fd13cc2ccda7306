"""The shared tiny models must be able to show an error, else the identities prove nothing."""

from __future__ import annotations

import torch

from families import EOS_ID, VOCABULARY, tiny_model

LENGTH = 12


def _tokens() -> torch.Tensor:
    return torch.randint(EOS_ID + 1, VOCABULARY - 1, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def _causal_without(query: int, key: int) -> torch.Tensor:
    """The causal mask, bool [1, 1, T, T], with one (query, key) pair taken out."""
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    allowed[query, key] = False
    return allowed[None, None]


@torch.no_grad()
def test_a_bool_causal_mask_gives_the_plain_causal_forward(family_model):
    tokens = _tokens()
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    masked = family_model(tokens, attention_mask=allowed, use_cache=False).logits
    plain = family_model(tokens, use_cache=False).logits
    torch.testing.assert_close(masked, plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_mask_entry_changes_that_row_visibly_and_no_earlier_one(family_model):
    tokens = _tokens()
    plain = family_model(tokens, use_cache=False).logits[0]
    cut = family_model(tokens, attention_mask=_causal_without(query=6, key=3), use_cache=False).logits[0]
    torch.testing.assert_close(cut[:6], plain[:6], rtol=1e-5, atol=1e-5)
    assert (cut[6] - plain[6]).abs().max() > 1e-2


@torch.no_grad()
def test_logits_are_far_from_uniform(family_model):
    logits = family_model(_tokens(), use_cache=False).logits
    assert logits.std(-1).min() > 0.3


def test_equal_seeds_give_equal_weights_and_leave_the_global_state(family):
    before = torch.random.get_rng_state()
    first, again, other = (tiny_model(family, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert not torch.equal(weight, other[name]), name
