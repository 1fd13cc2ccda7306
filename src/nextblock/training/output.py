"""The output folder of a run: refused, held, filled with its result, and left as it was if no step was done."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, PreTrainedModel

from nextblock.config.errors import TrainingStopped, UsageError
from nextblock.config.files import LOCK, locked, make_folder, to_yaml, unwritten, user_path, whole_folder
from nextblock.config.run import AdaptConfig
from nextblock.model.adapter_files import fingerprint, save_adapter
from nextblock.model.correction import save_correction, without_correction
from nextblock.model.loading import weights_folder
from nextblock.model.lora import LoraAdapter
from nextblock.model.mask_token import choose_mask_token
from nextblock.model.parent import load_parent, parent_tokenizer
from nextblock.training.checkpoint import list_checkpoints
from nextblock.training.export import export, export_settings, write_parts
from nextblock.training.log import TRACKERS
from nextblock.training.ranks import errors_on_all_ranks, is_main
from nextblock.training.run import LOG, RESOLVED_CONFIG, Run


@contextmanager
def run_folder(output: Path, stages: list[AdaptConfig]) -> Iterator[None]:
    """The output folder for this run alone. All ranks together; rank 0 holds it."""
    with ExitStack() as held:
        held.enter_context(writing(output))
        with errors_on_all_ranks():
            if is_main():
                held.enter_context(locked(output))
                held.enter_context(nothing_left(output, stages))
        yield


def write_config(config: AdaptConfig) -> None:
    """Write a run's or a stage's resolved configuration into its output folder, which is made if missing."""
    make_folder(Path(config.output))
    text = to_yaml(config.model_dump(mode="json"))
    (Path(config.output) / RESOLVED_CONFIG).write_text(text, encoding="utf-8")


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """One line for a disk that is full or cannot be written, wherever the run meets it."""
    try:
        yield
    except Exception as error:  # an OSError for Python, and something else for each library that writes
        if isinstance(error, UsageError) or (why := unwritten(error)) is None:
            raise
        reason, cure = why
        where = getattr(error, "filename", None) or output
        raise TrainingStopped(f"cannot write {where}: {reason}; {cure}, then go on with --resume auto") from None


@contextmanager
def nothing_left(output: Path, stages: list[AdaptConfig]) -> Iterator[None]:
    """Where a new run ends before its first step is done, take away what it has put into the output folder.

    Of one that has made a step everything stays: the log shows how it came to its end.
    """
    used = not is_empty(output)
    try:
        yield
    except BaseException:
        log = output / LOG
        if not (used or (log.is_file() and log.stat().st_size)):
            for folder in (output / TRACKERS, *(Path(stage.output) for stage in stages)):
                if folder != output:
                    shutil.rmtree(folder, ignore_errors=True)
            for name in (RESOLVED_CONFIG, LOG):
                (output / name).unlink(missing_ok=True)
        raise


def export_run(run: Run, output: Path) -> None:
    """Write what the run ends with: a Hugging Face folder, or the draft adapter's. All ranks call it together.

    Raises:
        UsageError: it cannot be written; what was in the folder stays as it was.
    """
    folder = output  # of rank 0 it becomes a folder that takes the place of what was there when all is written
    with ExitStack() as until_written:
        with errors_on_all_ranks(), writing(output):
            if is_main():
                folder = until_written.enter_context(whole_folder(output))
                write_result(run, folder)
        if run.is_sharded:
            write_parts(folder, run.decoder.model, export_dtype(run), lambda: writing(output))
        with errors_on_all_ranks(), writing(output):
            until_written.close()


def write_result(run: Run, folder: Path) -> None:
    """Write what the run ends with, but for weights that are spread over ranks."""
    write_adapters(run, folder)
    if run.decoder.adapter is not None:
        return
    model, dtype = run.decoder.model if run.lora is None else merged_model(run, run.lora), export_dtype(run)
    with without_correction(model) as head:
        export(folder, model, run.tokenizer, run.settings, dtype, weights=not run.is_sharded)
    if head is not None and run.settings is not None:
        dtype = dtype or head.previous.dtype
        save_correction(folder, head, run.settings, run.config.model.path, fingerprint(folder), dtype)


def rehearse_export(run: Run) -> None:
    """Write what a run ends with, but for the model's weights, to a folder that goes again. All ranks together.

    Raises:
        UsageError: the parent's configuration or tokenizer is such that it cannot be written, or read again.
    """
    with errors_on_all_ranks(), writing(run.output), TemporaryDirectory() as name:
        if not is_main():
            return
        try:
            write_adapters(run, Path(name))
            if run.decoder.adapter is None:
                export_settings(Path(name), run.decoder.model, run.tokenizer, run.settings)
                AutoTokenizer.from_pretrained(name, trust_remote_code=run.config.model.trust_remote_code)
        except Exception as error:  # of whatever kind a config or a tokenizer raises
            if isinstance(error, UsageError) or unwritten(error):
                raise
            why = str(error).strip().split("\n")[0]
            raise UsageError(f"the result of this parent could not be written: {why}; mend the files of it") from None


def write_adapters(run: Run, folder: Path) -> None:
    """Write the draft adapter, or that of LoRA, if the run trains one."""
    model, settings = run.config.model, run.settings
    if run.lora is not None:
        run.lora.save(folder / "adapter")
    elif run.decoder.adapter is not None:
        assert settings is not None
        parent, dtype = weights_folder(model.source, model.revision), export_dtype(run) or torch.float32
        save_adapter(folder, run.decoder.adapter, settings, model.source, parent, dtype)


def export_dtype(run: Run) -> torch.dtype | None:
    """That of the exported weights; None: as trained."""
    name = run.config.model.export_dtype
    return None if name is None else getattr(torch, name)


def check_space(run: Run, stages: list[AdaptConfig]) -> None:
    """UsageError where the disk has less room than a new run certainly takes: checkpoints kept, and models."""
    trained = sum(p.numel() * p.element_size() for p in run.trained.parameters())
    checkpoint = trained * (3 if run.config.optimizer.name == "adamw" else 1)  # weights and two moments
    model = 0
    if run.decoder.adapter is None:
        size = (export_dtype(run) or run.decoder.model.dtype).itemsize
        model = sum(p.numel() for p in run.decoder.model.parameters()) * size
    needed = 0
    for options in (stage.training for stage in stages):
        needed += min(options.keep_last, math.ceil(options.steps / options.checkpoint_every)) * checkpoint + model
    with errors_on_all_ranks():
        free = shutil.disk_usage(run.output).free if is_main() else needed
        if free < needed:
            raise UsageError(
                f"output folder {run.output} has {free / 2**30:.2f} GiB of free space, and the run would leave "
                f"{needed / 2**30:.2f} GiB in it ({checkpoint / 2**30:.2f} GiB a checkpoint); free space, lower "
                "training.keep_last, or choose another --output"
            )


def merged_model(run: Run, lora: LoraAdapter) -> PreTrainedModel:
    """The parent with the updates added: the run's own model, or where that is quantized one loaded again, whole."""
    config = run.config
    if config.model.quantization is None:
        return lora.merge()
    assert config.lora is not None
    whole = load_parent(config.model.model_copy(update={"quantization": None}), "cpu")
    if run.mask_token_id is not None:
        choose_mask_token(whole, parent_tokenizer(config.model), config.model.mask_token)
    again = LoraAdapter(whole.model, config.lora, run.mask_token_id, config.model.path)
    again.weights.load_state_dict(lora.weights.state_dict())
    return again.merge()


def check_output(output: Path, stages: list[AdaptConfig], resume: bool) -> None:
    """Refuse a folder with something in it, unless it is a run that is to be resumed, and one that cannot be made."""
    if user_path(output, "output").is_file():
        raise UsageError(f"output {output} is a file; give a folder")
    above = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"output folder {output} cannot be made: {above} cannot be written; choose another")
    empty = is_empty(output)
    if not empty and not resume:
        if is_main():
            with locked(output):  # a run that goes on there is named
                pass
        raise UsageError(f"output folder {output} is not empty; choose another --output, or go on with --resume auto")
    if not empty and not (output / RESOLVED_CONFIG).is_file():
        raise UsageError(f"output folder {output} is not that of a run ({RESOLVED_CONFIG} is missing); choose another")
    if not resume:
        return
    own = {Path(stage.output) for stage in stages}
    held = [folder for folder in (output, *sorted(output.glob("stage-*"))) if list_checkpoints(folder)]
    if others := [folder for folder in held if folder not in own]:
        raise UsageError(
            f"cannot resume: {others[0]} holds checkpoints of a run with other stages; set the stages back, or "
            f"start in a new --output, with model.path={output} if that run is finished"
        )
    if not held and any((output / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UsageError(
            f"cannot resume: {output} holds a finished model and no checkpoint to go on from; choose another --output"
        )


def is_empty(folder: Path) -> bool:
    """Whether nothing is there but a lock."""
    return not folder.is_dir() or all(path.name == LOCK for path in folder.iterdir())
