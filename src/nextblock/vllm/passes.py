"""A draft pass of vLLM's own model over its own paged cache, every token of a row's block seeing the whole block.

vLLM's runner writes and reads its cache through block tables. A draft pass uses those of its last step. It writes
behind a row's computed tokens alone, where the next step writes again, so that nothing of it is left.

Letters: R rows, T tokens of all rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nextblock.config.errors import UsageError


class DraftPasses:
    """Draft passes of one runner of vLLM (`GPUModelRunner`, of which that for CPUs is one)."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        for group in (group for groups in runner.attn_groups for group in groups):
            if not group.backend.supports_non_causal():
                raise UsageError(
                    f"attention backend {group.backend.get_name()} has causal attention alone; choose another, as "
                    "--attention-backend FLASH_ATTN"
                )

    def room(self, row: int, start: int) -> int:
        """Tokens of a row from position `start` on for which the cache has a place."""
        tables = self.runner.input_batch.block_table
        pages = [tables[number] for number in range(len(self.runner.attn_groups))]
        return min(int(t.num_blocks_per_row[row]) * t.block_size for t in pages) - start

    def run(self, rows: Sequence[int], starts: Sequence[int], tokens: Sequence[Sequence[int]], embed: Any) -> Tensor:
        """Final hidden states [T, D] of the rows' blocks, one behind the other.

        Args:
            rows: of the runner's batch. starts: the position of each row's first token.
            embed: tokens int64 [T] -> what the model takes as `input_ids` and `inputs_embeds`.
        """
        runner = self.runner
        widths = [len(block) for block in tokens]
        ends = torch.tensor([start + width for start, width in zip(starts, widths, strict=True)], dtype=torch.int32)
        bounds = torch.tensor([0, *accumulate(widths)], dtype=torch.int32)
        spans = [torch.arange(start, start + width) for start, width in zip(starts, widths, strict=True)]
        position = torch.cat(spans).to(runner.device)
        row = torch.tensor(rows, device=runner.device)
        row_of = row.repeat_interleave(torch.tensor(widths, device=runner.device))
        metadata, slots = self._metadata(row, row_of, position, bounds, ends)
        flat = torch.tensor([token for block in tokens for token in block], device=runner.device)

        from vllm.forward_context import set_forward_context  # pyright: ignore[reportMissingImports]

        with set_forward_context(metadata, runner.vllm_config, num_tokens=len(flat), slot_mapping=slots):
            return runner.model(positions=position, **embed(flat))

    def _metadata(
        self, row: Tensor, row_of: Tensor, position: Tensor, bounds: Tensor, ends: Tensor
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What each layer's attention is told, and the slots [T] of the cache where it writes."""
        from vllm.v1.attention.backend import CommonAttentionMetadata  # pyright: ignore[reportMissingImports]

        metadata, slots = dict[str, Any](), dict[str, Tensor]()
        for number, groups in enumerate(self.runner.attn_groups):
            table = self.runner.input_batch.block_table[number]
            pages = table.get_device_tensor(self.runner.input_batch.num_reqs)
            page = pages[row_of, position // table.block_size].long()
            slot = page * table.block_size + position % table.block_size
            common = CommonAttentionMetadata(
                query_start_loc=bounds.to(row.device),
                query_start_loc_cpu=bounds,
                seq_lens=ends.to(row.device),
                seq_lens_cpu_upper_bound=ends,
                num_reqs=len(row),
                num_actual_tokens=len(position),
                max_query_len=int(bounds.diff().max()),
                max_seq_len=int(ends.max()),
                block_table_tensor=pages[row],
                slot_mapping=slot,
                causal=False,
            )
            for group in groups:
                built = group.build_metadata(common)
                assert getattr(built, "causal", False) is False, f"{group.backend.get_name()} would be causal"
                metadata |= dict.fromkeys(group.layer_names, built)
                slots |= dict.fromkeys(group.layer_names, slot)
        return metadata, slots
