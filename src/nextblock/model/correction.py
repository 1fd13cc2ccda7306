"""A correction head: what the token before a draft tells about it.

Drafts are predicted side by side, so each is blind to its neighbour's choice. The head adds to the logits of the
likeliest candidates of a place a low-rank bias that depends on the token chosen before it.

Letters: B rows, k drafts of each, N places, V vocabulary, c candidates, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from nextblock.config.errors import UsageError, one_line
from nextblock.config.sections import BlockDiffusionSettings, CorrectionConfig

FOLDER, WEIGHTS, DESCRIPTION = "correction", "correction.safetensors", "correction.json"
"""A folder of its own, because some programs load every safetensors file that they find beside a model."""


class Correction(nn.Module):
    """logits'(v) = logits(v) + <P[previous], F[v]> for the c likeliest v, others as they are; nothing before training.

    previous, following: P and F, [V, r].
    """

    def __init__(self, vocabulary: int, config: CorrectionConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        self.previous = nn.Parameter(torch.randn(vocabulary, config.rank, device=device))
        self.following = nn.Parameter(torch.zeros(vocabulary, config.rank, device=device))

    def forward(self, logits: Tensor, previous: Tensor) -> Tensor:
        """Corrected logits [N, V] of places behind the tokens int64 [N] `previous`."""
        likeliest = logits.detach().topk(min(self.config.candidates, logits.shape[-1])).indices
        bias = torch.einsum("nr,ncr->nc", self.previous[previous], self.following[likeliest])
        return logits.scatter_add(-1, likeliest, bias.to(logits.dtype))

    def in_order(
        self, logits: Tensor, previous: Tensor, choose: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Each row's places from the first to the last: corrected logits [B, k, V] and tokens int64 [B, k].

        Args:
            logits: [B, k, V].
            previous: int64 [B], the token before the first place.
            choose: (number of the place, its corrected logits [B, V]) -> the tokens chosen there, int64 [B], which
                correct the next place.
        """
        # What needs no choice is done for all places at once: on small models each operation costs more than its work.
        likeliest = logits.detach().topk(min(self.config.candidates, logits.shape[-1])).indices
        following = self.following[likeliest].unbind(1)
        corrected, tokens = torch.empty_like(logits), previous.new_empty(logits.shape[:2])
        for number, (own, places) in enumerate(zip(logits.unbind(1), likeliest.unbind(1), strict=True)):
            bias = torch.bmm(following[number], self.previous[previous].unsqueeze(-1)).squeeze(-1)
            corrected[:, number] = own = own.scatter_add(-1, places, bias.to(own.dtype))
            tokens[:, number] = previous = choose(number, own)
        return corrected, tokens

    def pairs(self, logits: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest candidates of each place behind each of those of the place before, w of them.

        Args:
            logits: [B, k, V]. previous: int64 [B], the token before the first place.
        Returns:
            Their logits and tokens, [B, k, w], and their corrected logits [B, k, w, w], by the candidate before and by
            themselves; before the first place all are `previous`.
        """
        count, width = min(self.config.candidates, logits.shape[-1]), min(self.config.candidates + 1, logits.shape[-1])
        # One more than are corrected: it is the choice where the others fall below it.
        value, token = logits.topk(width)
        after = self.following[token]
        after[:, :, count:] = 0
        before = torch.cat([previous[:, None, None].expand(-1, -1, width), token[:, :-1]], dim=1)
        return value, token, value.unsqueeze(2) + (self.previous[before] @ after.mT).to(value.dtype)

    def likeliest_in_order(self, logits: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """As `in_order` where the likeliest token is chosen at each place; how many operations does not grow with k.

        What each candidate of a place makes of each candidate of the next is computed for all places at once. The
        choice is then a walk through a table of indices, on the host.
        """
        value, token, scores = self.pairs(logits, previous)
        width = value.shape[-1]
        walks = []
        for line in scores.argmax(-1).tolist():
            walk = [0]
            for step in line:
                walk.append(step[walk[-1]])
            walks.append(walk)
        walk = torch.tensor(walks).to(logits.device).unsqueeze(-1)
        own = scores.gather(2, walk[:, :-1].unsqueeze(-1).expand(-1, -1, 1, width)).squeeze(2)
        return logits.scatter(-1, token, own), token.gather(2, walk[:, 1:]).squeeze(-1)


def save_correction(
    folder: Path,
    head: Correction,
    settings: BlockDiffusionSettings,
    parent: str,
    digest: str,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a head into a model's or an adapter's folder, with the name and fingerprint of the model it belongs to."""
    own = folder / FOLDER
    own.mkdir(parents=True, exist_ok=True)
    save_file({name: table.detach().to("cpu", dtype) for name, table in head.named_parameters()}, own / WEIGHTS)
    described = {
        "parent": parent,
        "fingerprint": digest,
        "block_size": settings.block_size,
        **head.config.model_dump(),
    }
    (own / DESCRIPTION).write_text(json.dumps(described, indent=2), encoding="utf-8")


def has_correction(folder: Path) -> bool:
    """Whether the folder of an adapter or of a model holds a head."""
    return (folder / FOLDER).is_dir()


def load_correction(
    folder: Path, device: torch.device, vocabulary: int, settings: BlockDiffusionSettings, digest: str
) -> Correction | None:
    """The head in the folder of an adapter or of a model with these settings; None where there is none.

    Args:
        vocabulary: rows of the model's input embedding.
        digest: fingerprint of the model that the head must belong to.
    Raises:
        UsageError: a head that is not whole, or of another model or block size.
    """
    own = folder / FOLDER
    if not own.is_dir():
        return None
    cure = f"delete {own}, or bring the one that was trained with it"
    try:
        described: dict[str, Any] = json.loads((own / DESCRIPTION).read_text(encoding="utf-8"))
        belongs = described["fingerprint"], described["block_size"]
        config = CorrectionConfig(rank=described["rank"], candidates=described["candidates"])
        head = Correction(vocabulary, config, device)
        if belongs == (digest, settings.block_size):
            head.load_state_dict(load_file(own / WEIGHTS))
            return head.requires_grad_(False).eval()
    except Exception as error:  # of whatever kind a file raises that is missing, cut or of another program
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UsageError(f"{own} holds no whole correction head ({reason}); {cure}") from None
    raise UsageError(
        f"correction head {own} belongs to {described['parent']} (weights {str(belongs[0])[:8]}) and blocks of "
        f"{belongs[1]}, not to weights {digest[:8]} and blocks of {settings.block_size}; {cure}"
    )


@contextmanager
def without_correction(model: PreTrainedModel) -> Iterator[Correction | None]:
    """The plain model inside the `with` block; yields the head that was at it, if there was one."""
    head: Any = model._modules.pop("correction", None)
    try:
        yield head
    finally:
        if head is not None:
            model.correction = head
