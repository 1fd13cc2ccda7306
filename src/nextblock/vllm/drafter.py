"""The speculator that vLLM's runner asks between two of its steps: what the engine's own model proposes.

A step of vLLM is a causal pass over a row's known token and its drafts: the check of speculative mode, and the commit
of diffusion mode, both of which yield one more token. Then `Drafter.propose` is called. It runs the model once over
[known, mask, mask, ...] of each row; rows in diffusion mode go on until their block is decided, and their check keeps
everything.

Letters: R rows, N places that are read, V vocabulary, k drafts of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextblock.config.sections import validate
from nextblock.decoding.options import DecodingConfig
from nextblock.model.adapter_files import fingerprint
from nextblock.model.correction import Correction, load_correction
from nextblock.model.loading import weights_folder
from nextblock.vllm.adapter import VllmAdapter
from nextblock.vllm.blocks import Block, Request
from nextblock.vllm.checks import check_engine, draft_adapter, request_options, settings_of
from nextblock.vllm.passes import DraftPasses
from nextblock.vllm.plugin import around, register


class Drafter:
    """`speculative_config={"method": "custom_class", "model": "nextblock.vllm.Drafter", ...}`.

    config: vLLM's VllmConfig.
    passes: None until the cache is there.
    """

    def __init__(self, config: Any) -> None:
        """Called by vLLM's runner before the model is loaded; UsageError as of `checks.check_engine`."""
        check_engine(config)
        register()
        settings = settings_of(config)
        assert settings is not None
        self.config, self.settings = config, settings
        self.block_size = config.num_speculative_tokens + 1
        self.passes: DraftPasses | None = None
        self._requests: dict[str, DecodingConfig | Request] = {}
        mend_expand_kernel()

        from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # pyright: ignore[reportMissingImports]

        around(GPUModelRunner, "initialize_kv_cache", _attach_when_ready)

    def load_model(self, target: Any) -> None:
        """Take the engine's model, once it is loaded."""
        self.model = target
        stored, model = draft_adapter(self.config), self.config.model_config
        folder = Path(weights_folder(model.model, model.revision))
        device, vocabulary = next(target.parameters()).device, model.get_vocab_size()
        self.adapter = None if stored is None else VllmAdapter(target, stored)
        digest = fingerprint(folder) if stored is None else stored.digest
        home = folder if stored is None else stored.folder
        self.correction: Correction | None = load_correction(home, device, vocabulary, self.settings, digest)

    def attach(self, runner: Any) -> None:
        """Take the runner, once its cache is there."""
        self.runner, self.passes = runner, DraftPasses(runner)
        # The limit of the context holds for each row (`_width`), not for the batch as soon as one row is near it.
        runner.effective_drafter_max_model_len = runner.max_model_len + self.block_size
        sample = runner._sample

        def decided(logits: Tensor | None, metadata: Any) -> Any:
            if logits is not None:
                self.keep_decided(logits, metadata)
            if metadata is not None and not any(metadata.num_draft_tokens):
                metadata = None  # a check without any draft, which on CPUs fails under top-k alone, is plain sampling
            return sample(logits, metadata)

        runner._sample = decided

    # ------------------------------------------------------------------------------------------ drafts

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of each row of the runner's batch; called by it behind each step.

        Args:
            sampled_token_ids: what each row has gained by the step; nothing while its prompt is read.
            num_tokens_no_spec: the length of each row's prompt and answer. token_ids_cpu: these tokens [R, _].
        """
        ids = self.runner.input_batch.req_ids
        self._requests = {name: kept for name, kept in self._requests.items() if name in self.runner.requests}
        drafts, blocks, plain = [list[int]() for _ in sampled_token_ids], dict[int, Block](), dict[int, list[int]]()
        starts = {row: int(num_tokens_no_spec[row]) - 1 for row, gained in enumerate(sampled_token_ids) if gained}
        for row, start in starts.items():
            request, known = self._request(ids[row]), int(token_ids_cpu[row, start])
            if isinstance(request, Request) and (left := request.pending(start + 1)):
                drafts[row] = left  # of a block that a short step has cut
            elif (width := self._width(request, row, start)) < 2:
                continue
            elif isinstance(request, Request):
                blocks[row] = Block(request, known, self.settings.mask_token_id, width)
            else:
                plain[row] = [known] + [self.settings.mask_token_id] * (width - 1)
        self._denoise(starts, blocks, plain, drafts)
        for row, block in blocks.items():
            request = block.request
            request.planned, request.start = block.decided, starts[row] + 1
            drafts[row] = block.decided
        return drafts

    def _denoise(
        self, starts: dict[int, int], blocks: dict[int, Block], plain: dict[int, list[int]], drafts: list[list[int]]
    ) -> None:
        """One pass for all rows, and more for those whose block is not decided yet."""
        while rows := [*plain, *(row for row, block in blocks.items() if block.masked())]:
            tokens = [plain[row] if row in plain else blocks[row].tokens for row in rows]
            masked = [[*range(1, len(plain[row]))] if row in plain else blocks[row].masked() for row in rows]
            parts = self._logits(rows, [starts[row] for row in rows], tokens, masked)
            if plain:
                chosen = self._choose(parts[: len(plain)], [line[0] for line in plain.values()])
                for row, line in zip(plain, chosen, strict=True):
                    drafts[row] = line
            for row, part in zip(rows[len(plain) :], parts[len(plain) :], strict=True):
                blocks[row].decide(part)
            plain = {}

    def _width(self, request: DecodingConfig | Request, row: int, start: int) -> int:
        """Tokens of the block that begins with a row's known token at position `start`; below 2: no draft."""
        assert self.passes is not None
        options = request.options if isinstance(request, Request) else request
        if options.mode == "ar":
            return 0
        size = options.block_size or self.block_size
        return min(size, self.runner.max_model_len - start, self.passes.room(row, start))

    def _request(self, name: str) -> DecodingConfig | Request:
        """How a request of the runner is decoded."""
        found = self._requests.get(name)
        if found is None:
            params = self.runner.requests[name].sampling_params
            found = options = request_options(self.settings, self.block_size, params.extra_args)
            if options.mode == "diffusion":
                drawn = {
                    "temperature": params.temperature,
                    "top_p": params.top_p,
                    "top_k": max(0, params.top_k) or None,
                }
                random = None
                if params.temperature:
                    random = torch.Generator()
                    random.seed() if params.seed is None else random.manual_seed(params.seed)
                ends = frozenset((params.stop_token_ids or ()) if params.ignore_eos else params.all_stop_token_ids)
                found = Request(validate(DecodingConfig, {**options.model_dump(), **drawn}), ends, random)
            self._requests[name] = found
        return found

    def _logits(
        self, rows: list[int], starts: list[int], tokens: Sequence[list[int]], masked: Sequence[list[int]]
    ) -> list[Tensor]:
        """Of each row float32 logits [N, V] that decide its masked positions: position i - 1 decides i."""
        assert self.passes is not None
        adapter = self.adapter
        with nullcontext() if adapter is None else adapter.open():
            embed = (lambda flat: {"input_ids": flat}) if adapter is None else adapter.embed
            hidden = self.passes.run(rows, starts, tokens, embed)
        firsts, total = list[int](), 0
        for block in tokens:
            firsts.append(total)
            total += len(block)
        places = [first + place - 1 for first, line in zip(firsts, masked, strict=True) for place in line]
        logits = self.model.compute_logits(hidden[torch.tensor(places, device=hidden.device)]).float()
        logits[:, self.settings.mask_token_id : self.settings.mask_token_id + 1] = -torch.inf
        return list(logits.split([len(line) for line in masked]))

    def _choose(self, parts: Sequence[Tensor], known: list[int]) -> list[list[int]]:
        """The drafts of rows, the likeliest tokens of logits [k, V]; with a correction head each corrects the next."""
        if self.correction is None:
            return [part.argmax(-1).tolist() for part in parts]
        longest = max(len(part) for part in parts)
        logits = torch.stack([torch.nn.functional.pad(part, (0, 0, 0, longest - len(part))) for part in parts])
        before = torch.tensor(known, device=logits.device)
        _, tokens = self.correction.in_order(logits, before, lambda number, own: own.argmax(-1))
        return [line[: len(part)] for line, part in zip(tokens.tolist(), parts, strict=True)]

    # ------------------------------------------------------------------------------------------ check

    def keep_decided(self, logits: Tensor, metadata: Any) -> None:
        """Let a step choose what diffusion mode has decided: elsewhere its logits [N, V] become -inf.

        Args:
            metadata: vLLM's SpecDecodeMetadata, None where no row has a draft. A row's places lie side by side.
        """
        batch = self.runner.input_batch
        for row, name in enumerate(batch.req_ids):
            request = self._requests.get(name)
            if not isinstance(request, Request):
                continue
            drafts = 0 if metadata is None else metadata.num_draft_tokens[row]
            last = row if metadata is None else int(metadata.bonus_logits_indices[row])
            wanted = request.pending(int(batch.num_tokens_no_spec[row]))
            for place, token in zip(range(last - drafts, last + 1), wanted, strict=False):
                logits[place] = -torch.inf
                logits[place, token] = 0


def _attach_when_ready(old: Any) -> Any:
    def initialize(runner: Any, *args: Any, **options: Any) -> None:
        old(runner, *args, **options)
        drafter, profiling = getattr(runner, "drafter", None), options.get("is_profiling", args[1:2] == (True,))
        if isinstance(drafter, Drafter) and not profiling:
            drafter.attach(runner)

    return initialize


def mend_expand_kernel() -> None:
    """Put a working kernel in place of vLLM's for CPUs, which drops what it has computed.

    Its `_expand_kernel_impl` fills an int64 copy of its output: temperature, top-k and top-p of each draft are then
    what the memory held before. vLLM sets the kernel after it has called `register`, hence the call at this place.
    """
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if current_platform.is_cpu():
        from vllm.triton_utils.dispatcher import register_kernels  # pyright: ignore[reportMissingImports]

        register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": expand})


def expand(
    output: Tensor,
    input_val: Tensor,
    cu_num_tokens: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int = 0,
) -> None:
    """Each row's value once for each of its tokens: input [R], ends of the rows in the output [R] -> output [N]."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    value = torch.where(input_val == replace_from, replace_to, input_val).to(output.dtype)
    output.copy_(value.repeat_interleave(counts))
