"""Models and prompts of the decoding tests, and an independent reading of the paper's sampler."""

from __future__ import annotations

from typing import Any

import torch

from families import EOS_ID, MASK_ID
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.lm import BlockDiffusionLM

LENGTHS = (5, 11, 1, 7)


def language_model(model, block_size=8, **section):
    return BlockDiffusionLM(
        model, None, BlockDiffusionSettings(block_size=block_size, mask_token_id=MASK_ID, **section)
    )


def prompt(length, seed=0):
    return torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(100 * seed + length))


def padded(prompts, left=False) -> dict[str, Any]:
    """One [B, T] batch and its attention mask."""
    longest = max(p.shape[1] for p in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, p in enumerate(prompts):
        place = slice(longest - p.shape[1], None) if left else slice(0, p.shape[1])
        tokens[i, place], mask[i, place] = p[0], 1
    return {"prompts": tokens, "attention_mask": mask}


@torch.no_grad()
def full_logits(model, tokens, prompt_length, block, block_causal, denoising):
    """Logits [T, V] of the whole sequence: context causal, its last block open while it is being denoised."""
    length = len(tokens)
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            seen = j <= i
            if i >= prompt_length:
                start = prompt_length + (i - prompt_length) // block * block
                last_block = i >= length - block
                if block_causal or (denoising and last_block):
                    seen = j < start + block
            allowed[i, j] = seen
    logits = model(torch.tensor([tokens]), attention_mask=allowed[None, None], use_cache=False).logits[0].float()
    logits[:, MASK_ID] = -torch.inf
    return logits


def reference(
    model, prompt_ids, new, block, sub_blocks, rule, threshold=None, block_causal=False, shifted=True, steps=None
):
    """Greedy answer of the paper's sampler: rule is "entropy", "margin", "top" or "bound".

    It keeps no cache and knows no batch: it runs the whole sequence through the model for every step, under a dense
    mask written from the rules.
    """
    done = list(prompt_ids)
    first = None
    if shifted:
        first = int(full_logits(model, done, len(done), block, False, False)[-1].argmax())
    start = len(prompt_ids)
    while len(done) - start < new:
        current = ([first] if shifted else [MASK_ID]) + [MASK_ID] * (block - 1)
        width = block // sub_blocks
        for sub in range(sub_blocks):
            places = range(sub * width, (sub + 1) * width)
            step = 0
            ends = [i for i in range(block) if current[i] == EOS_ID] or [block]
            while masked := [i for i in places if current[i] == MASK_ID and i < ends[0]]:
                logits = full_logits(model, done + current, start, block, block_causal, True)
                here = {i: logits[len(done) + i - (1 if shifted else 0)].softmax(-1) for i in masked}
                entropy = {i: float(-(p[p > 0] * p[p > 0].log()).sum()) for i, p in here.items()}
                two = {i: p.topk(2).values.tolist() for i, p in here.items()}
                margin = {i: t[0] - t[1] for i, t in two.items()}
                top = {i: t[0] for i, t in two.items()}
                key = {"top": top, "margin": margin}.get(rule) or {i: -e for i, e in entropy.items()}
                ranked = sorted((-key[i], i) for i in masked)
                ranked = [i for _, i in ranked]
                count = 1 if steps is None else -(-len(masked) // (steps // sub_blocks - step))
                chosen = set(ranked[:count])
                if threshold is not None and rule == "bound":
                    chosen |= {
                        i for n, i in enumerate(ranked) if sum(entropy[j] for j in ranked[: n + 1]) <= threshold
                    }
                elif threshold is not None:
                    sure = margin if rule == "margin" else top
                    chosen |= {i for i in masked if sure[i] > threshold}
                for i in chosen:
                    current[i] = int(here[i].argmax())
                ends = [i for i in range(block) if current[i] == EOS_ID] or [block]
                step += 1
        done += current
        if EOS_ID in done[start:]:
            break
        if shifted:
            first = int(full_logits(model, done, start, block, block_causal, False)[-1].argmax())
    answer = done[start:][:new]
    return answer[: answer.index(EOS_ID) + 1] if EOS_ID in answer else answer
