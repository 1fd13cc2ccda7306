"""A parent loaded straight to the shards of FSDP2: each rank reads its own part of the files, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import DistributedType, fsdp2_prepare_model
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from nextblock.config.errors import UsageError, one_line
from nextblock.config.sections import CorrectionConfig, ModelConfig
from nextblock.model.decoder import Decoder
from nextblock.model.fakes import bare_model
from nextblock.model.loading import choose_attention, located
from nextblock.model.mask_token import mean_row
from nextblock.model.parent import parent_config
from nextblock.recipe.objective import TwoViewLoss
from nextblock.training.checkpoint import weights_of
from nextblock.training.ranks import errors_on_all_ranks, gather


@dataclass
class BareParent:
    """A parent without its weights, and the file that holds each of them.

    decoder: parameters are on the meta device until `shard`, in float32, as what is trained whole is; buffers are not.
    made: rows of embedding and head that no file holds, of a mask token that was added.
    """

    decoder: Decoder
    files: dict[str, Path]
    made: range = range(0)

    def make_rows(self, decoder: Decoder, rows: range) -> None:
        """Let `shard` make up these rows of embedding and head."""
        self.made = rows

    def shard(self, accelerator: Accelerator) -> Any:
        """The objective, shared out as accelerate does it and with this rank's weights in it. All ranks together.

        Raises:
            UsageError: a file that cannot be read.
        """
        loss, device = fsdp2_prepare_model(accelerator, TwoViewLoss(self.decoder)), accelerator.device
        loss._apply(lambda value: torch.empty_like(value, device=device) if value.is_meta else value)
        with errors_on_all_ranks():
            try:
                self._read()
            except Exception as error:  # of whatever kind a file raises that is cut or gone
                raise UsageError(f"cannot load model {self.decoder.model.name_or_path}: {one_line(error)}") from None
        vars(loss)["_is_accelerate_prepared"] = True  # accelerate then notes it, and does nothing to it
        return accelerator.prepare_model(loss)

    @torch.no_grad()
    def _read(self) -> None:
        model: Any = self.decoder.model
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        growing = {id(p) for table in tables for p in table.parameters()}
        grown = {name for name, p in model.named_parameters() if id(p) in growing}
        for name, value in weights_of(model).items():
            # Opened for each tensor: pages of a file that were read count as this process's memory until it is closed.
            with safe_open(self.files[name], "pt") as file:
                if not isinstance(value, DTensor):  # a buffer
                    value.copy_(file.get_tensor(name))
                    continue
                shape, place = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
                self._read_rows(value.to_local(), file.get_slice(name), place[0], shape[0], name in grown)

    def _read_rows(self, local: torch.Tensor, stored: Any, first: int, count: int, grown: bool) -> None:
        """Fill the rows from the `first` one on. FSDP2 cuts along the first dimension."""
        stop = min(first + count, stored.get_shape()[0])
        if first < stop:
            local[: stop - first] = stored[first:stop]
        start, stop = max(first, self.made.start), min(first + count, self.made.stop)
        if grown and start < stop:
            local[start - first : stop - first] = mean_row(stored[: self.made.start])


def bare_parent(
    config: ModelConfig, correction: CorrectionConfig | None, accelerator: Accelerator
) -> BareParent | None:
    """The parent of a sharded run, to be filled; None where each rank loads it whole. All ranks call it together."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return None
    with errors_on_all_ranks():
        found = whole_because(config, correction) or _bare(config, accelerator.device)
    why = next((said for said in gather(found if isinstance(found, str) else None) if said), None)
    if isinstance(found, BareParent) and why is None:
        return found
    accelerator.print(f"loading: each process reads the whole model and then keeps its part, because {why}")
    return None


def whole_because(config: ModelConfig, correction: CorrectionConfig | None) -> str | None:
    """Why ranks cannot read their parts alone, where the configuration tells; None: the files decide."""
    if config.scratch is not None:
        return "its weights are random"
    if config.source.lower().endswith(".gguf"):
        return "a GGUF file has to be unpacked"
    return None if correction is None else "a correction head begins with random weights"


def _bare(config: ModelConfig, device: torch.device) -> BareParent | str:
    """The parent without weights, or why its files cannot be read in parts."""
    shape, (source, where) = parent_config(config), located(config.source, config.revision)
    if getattr(shape, "quantization_config", None) or getattr(shape, "transformers_weights", None):
        return "config.json names quantized weights or files of its own"
    shape.name_or_path = source
    with init_empty_weights(include_buffers=False):
        model = bare_model(shape, torch.float32, choose_attention(shape, config.attention, device))
    model.tie_weights()  # again: in there each registration of a parameter made another
    if not type(model).__module__.startswith("transformers."):
        return "its code comes with it"
    try:
        model.generation_config = _generation_config(source, where["revision"])
        files, shapes = stored_weights(source, where["revision"])
    except Exception:  # what it means is said when the model is loaded whole
        return "its files cannot be listed"
    own, every = weights_of(model), model.state_dict()
    if wrong := next((name for name in own if shapes.get(name) != tuple(own[name].shape)), None):
        return f"the files do not hold {wrong} under this name and in this shape"
    if twice := next((name for name in every.keys() - own.keys() if name in shapes), None):
        return f"the files hold {twice}, which the config ties to another"
    as_stored = revert_weight_conversion(model, own)
    if as_stored.keys() != own.keys() or any(as_stored[name] is not value for name, value in own.items()):
        return "transformers stores its weights in another form"
    return BareParent(Decoder(model), files)


def _generation_config(source: str, revision: str | None) -> GenerationConfig:
    """What `from_pretrained` gives a model."""
    try:
        return GenerationConfig.from_pretrained(source, revision=revision or "main")
    except OSError:
        own: dict[str, Any] = {"config_file_name": "config.json", "_from_model_config": True}
        return GenerationConfig.from_pretrained(source, revision=revision or "main", **own)


def stored_weights(source: str, revision: str | None) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """The safetensors file that holds each weight of a folder or Hub id, and the weight's shape."""

    def find(name: str) -> str | None:
        return cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    paths: Any = [find("model.safetensors")]
    if paths == [None]:
        index: Any = find("model.safetensors.index.json")
        paths, _ = get_checkpoint_shard_files(source, index, revision=revision)
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                files[name], shapes[name] = Path(path), tuple(file.get_slice(name).get_shape())
    return files, shapes


def gathered(loss: Any, work: Callable[[], None]) -> None:
    """Run `work`, which runs the model of a sharded objective, inside its forward pass. All ranks call it together.

    There FSDP2 gathers embedding, layers and head as each is used. Afterwards nothing stays gathered: shards may be
    written to before the next pass.
    """
    vars(loss)["forward"] = lambda _: work()
    try:
        loss(None)  # torch 2.11 reads the first argument on CUDA
    finally:
        del vars(loss)["forward"]
    for part in loss.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
