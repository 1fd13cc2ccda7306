"""Runs on two processes: the result of one process, one line for one mistake, nobody left waiting."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nextblock.config.run import AdaptConfig, load_config
from nextblock.config.sections import Source
from nextblock.model.parent import byte_tokenizer
from nextblock.training.checkpoint import list_checkpoints
from nextblock.workflows.store_writer import merge, part_name, write_part
from runs import adapt_rank, config_of, finish, launch, start, weights

pytestmark = pytest.mark.slow
LOOSE: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-4}  # Adam enlarges rounding errors of small gradients


def cli_rank(rank: int, each: list[list[str]]) -> None:
    """`nextblock` with the arguments of this rank; on bad input it ends the communication before it exits."""
    from nextblock.cli.main import main

    sys.argv = ["nextblock", *each[rank]]
    with pytest.raises(SystemExit) as ended:
        main()
    if ended.value.code:
        assert not torch.distributed.is_initialized()
    sys.exit(ended.value.code)


def on_two(processes: Any, tmp_path: Path, config: AdaptConfig, stop_after: int | None = None) -> None:
    assert finish(launch(processes, tmp_path, adapt_rank, config.model_dump(mode="json"), stop_after)) == [0, 0]


def on_one(processes: Any, config: AdaptConfig) -> None:
    process = start(processes, config)
    process.join()
    assert process.exitcode == 0


def losses(output: Path) -> list[float]:
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "kind" not in record]


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    mine, wanted = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(mine[name], value, **LOOSE, msg=name)


@pytest.fixture(scope="module")
def alone(place, processes, tmp_path_factory) -> Callable[[int], Path]:
    """Output folder of the run on one process, for a number of shards."""
    made: dict[int, Path] = {}

    def run(shards: int) -> Path:
        if shards not in made:
            made[shards] = tmp_path_factory.mktemp("alone") / "run"
            on_one(processes, config_of(place, made[shards], data__shards=shards))
        return made[shards]

    return run


@pytest.mark.parametrize(
    ("shards", "overrides"),
    [
        (1, {}),
        (2, {"training__micro_batch_rows": 1}),
        (2, {"training__fsdp": True}),
        (2, {"training__fsdp": True, "training__micro_batch_rows": 1, "training__gradient_checkpointing": True}),
        (2, {"training__fsdp": True, "training__micro_batch_rows": 1, "machine__hold_gradients": True}),
    ],
)
def test_two_processes_give_the_losses_and_weights_of_one(place, processes, alone, tmp_path, shards, overrides):
    on_two(processes, tmp_path, config_of(place, tmp_path / "run", data__shards=shards, **overrides))
    assert_same_run(tmp_path / "run", alone(shards))


def test_copies_of_a_model_in_shards_give_the_losses_and_weights_of_one_process(place, processes, tmp_path):
    """Two copies in two shards each; the checkpoint has each shard once, and one process goes on from it."""
    options = {"data__shards": 2, "training__batch_rows": 8, "training__micro_batch_rows": 1}
    alone = config_of(place, tmp_path / "alone", **options)
    on_one(processes, alone)
    hybrid = config_of(place, tmp_path / "run", training__fsdp=True, machine__shard_over=2, **options)
    values = hybrid.model_dump(mode="json")
    assert finish(launch(processes, tmp_path, adapt_rank, values, 9, count=4)) == [0] * 4
    assert len(losses(tmp_path / "run")) == 9
    saved = list_checkpoints(tmp_path / "run")[-1]
    parts = [sum(file.stat().st_size for file in saved.glob(f"__{rank}_*")) for rank in range(4)]
    assert max(parts) < 2 * min(parts)
    on_one(processes, load_config(values, {"training.fsdp": False, "machine.shard_over": None}))
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def unshared_rank(rank: int, values: dict[str, Any]) -> None:
    """Train; fail where the gradient of a micro-batch would be kept whole until the last one."""
    import accelerate

    from nextblock.training.loop import train

    def kept(self: Any, model: Any) -> None:
        raise AssertionError("no_sync holds all of the gradient on each rank")

    anything: Any = accelerate.Accelerator
    anything.no_sync = kept
    train(load_config(values))


def test_sharded_gradients_are_shared_out_after_every_micro_batch(place, processes, tmp_path):
    options = {"training__fsdp": True, "training__micro_batch_rows": 1, "training__steps": 9}
    config = config_of(place, tmp_path / "run", **options)
    assert finish(launch(processes, tmp_path, unshared_rank, config.model_dump(mode="json"))) == [0, 0]


def launched_rank(rank: int, environment: dict[str, str], values: dict[str, Any]) -> None:
    """Train as `accelerate launch` would have it, in shards."""
    from nextblock.training.loop import train

    os.environ.update(environment)
    assert train(load_config(values)).is_sharded


def test_fsdp_of_the_launcher_is_ours_whatever_it_says_of_wrapping_and_loading(place, processes, alone, tmp_path):
    said = {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_OFFLOAD_PARAMS": "false",
    }
    config = config_of(place, tmp_path / "run", data__shards=2)
    assert finish(launch(processes, tmp_path, launched_rank, said, config.model_dump(mode="json"))) == [0, 0]
    assert_same_run(tmp_path / "run", alone(2))


def test_accelerate_launch_with_fsdp_is_that_run_on_two_cpu_processes_too(place, alone, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(config_of(place, tmp_path / "run", data__shards=2).model_dump(mode="json")))
    launcher = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--main_process_port", "0"]
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "nextblock", "adapt", str(config)],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert_same_run(tmp_path / "run", alone(2))


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_checkpoint_of_two_processes_resumes_on_one_and_back(place, processes, alone, tmp_path, fsdp):
    options = {"data__shards": 2, "training__fsdp": fsdp}
    config = config_of(place, tmp_path / "run", **options)
    on_two(processes, tmp_path, config, stop_after=5)  # the last checkpoint is that of step 4, or of 2
    assert len(losses(tmp_path / "run")) == 5
    ranks = launch(processes, tmp_path, adapt_rank, config.model_dump(mode="json"), 8)
    assert finish(ranks) == [0, 0]
    on_one(processes, config)
    assert_same_run(tmp_path / "run", alone(2))
    back = config_of(place, tmp_path / "back", **options)
    process = processes.Process(target=adapt_rank, args=(0, back.model_dump(mode="json"), 7))
    process.start()
    process.join()
    on_two(processes, tmp_path, back)
    assert_same_run(tmp_path / "back", alone(2))


def test_sigterm_to_one_rank_stops_both_after_the_same_step_with_a_checkpoint(place, processes, alone, tmp_path):
    config = config_of(place, tmp_path / "run", data__shards=2, training__checkpoint_every=1000)
    ranks = launch(processes, tmp_path, adapt_rank, config.model_dump(mode="json"))
    while not (tmp_path / "run" / "log.jsonl").exists() or not losses(tmp_path / "run"):
        assert ranks[0].is_alive()
        time.sleep(0.002)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert finish(ranks) == [0, 0]
    (saved,) = list_checkpoints(tmp_path / "run")
    assert 0 < int(saved.name.removeprefix("step-")) < 12
    on_one(processes, config)
    assert_same_run(tmp_path / "run", alone(2))


def failing_rank(rank: int, how: str, each: list[list[str]]) -> None:
    """`cli_rank`, but rank 1 does not write its part of the second checkpoint."""
    import nextblock.training.checkpoint as module

    real, saves = module.save, []

    def save(*args: Any, **options: Any) -> None:
        saves.append(1)
        if rank == 1 and len(saves) == 2 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args, **options)
        if rank == 1 and len(saves) == 2 and how == "slow":
            time.sleep(6)
        if rank == 1 and len(saves) == 2 and how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module.save = save
    if how == "slow":
        module.TIMEOUT = timedelta(seconds=3)
    cli_rank(rank, each)


def late_rank(rank: int, values: dict[str, Any], output: Path) -> None:
    """Rank 0 is slow to clear the folder of a checkpoint; each tells whether that was done before it began."""
    import nextblock.training.checkpoint as module

    save, remove, cleared = module.save, module.shutil.rmtree, output.parent / "cleared"

    def late(folder: Any, **options: Any) -> None:
        if module.PARTIAL in str(folder):
            time.sleep(1)
            cleared.touch()
        remove(folder, **options)

    def told(*args: Any, **options: Any) -> None:
        (output.parent / f"begun-{rank}").write_text(str(cleared.exists()))
        save(*args, **options)

    module.save = told
    if rank == 0:
        module.shutil.rmtree = late
    adapt_rank(rank, values)


def test_no_rank_makes_the_folder_of_a_checkpoint_while_rank_0_clears_it(place, processes, tmp_path):
    config = config_of(place, tmp_path / "run", data__shards=2, training__checkpoint_every=12)
    values = config.model_dump(mode="json")
    assert finish(launch(processes, tmp_path, late_rank, values, tmp_path / "run")) == [0, 0]
    assert [(tmp_path / f"begun-{rank}").read_text() for rank in range(2)] == ["True", "True"]


def test_torchrun_starts_a_run_again_one_of_whose_processes_is_killed(place, processes, tmp_path):
    """Elastic restarts: the weights are those of a run that lost nothing."""
    options = {"data__shards": 2, "training__steps": 40, "training__checkpoint_every": 3}
    on_two(processes, tmp_path, config_of(place, tmp_path / "undisturbed", **options))
    output, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(json.dumps(config_of(place, output, **options).model_dump(mode="json")))
    launcher = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    adapt = ["-m", "nextblock", "adapt", str(config), "--resume", "auto"]
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *launcher, *adapt])
    try:
        while not list_checkpoints(output):
            assert run.poll() is None
            time.sleep(0.002)
        ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        reached = len(losses(output))
        assert run.wait(300) == 0
    finally:
        run.kill()
    assert 3 <= reached < 40
    assert len(losses(output)) == 40
    assert weights(output) == weights(tmp_path / "undisturbed")


FAILURES = {
    "full": "step-00000004: No space left on device; free space and resume with --resume auto",
    "slow": "step-00000004: a rank did not write its part within 0:00:03; see to its storage and resume with",
}


@pytest.mark.parametrize("how", [*FAILURES, "killed"])
def test_a_part_that_is_not_written_stops_both_processes_and_the_checkpoint_before_is_left(
    place, processes, alone, tmp_path, how
):
    config = tmp_path / "run.yaml"
    options = {"data__shards": 2, "training__checkpoint_every": 2}
    run = config_of(place, tmp_path / "run", **options)
    config.write_text(json.dumps(run.model_dump(mode="json")))
    ranks = launch(processes, tmp_path, failing_rank, how, [["adapt", str(config)]] * 2)
    statuses = finish(ranks)
    if how == "killed":
        assert statuses[0] != 0
        assert statuses[1] == -signal.SIGKILL
    else:
        assert statuses == [2, 2]
        said = "".join((tmp_path / f"stderr-{rank}").read_text() for rank in range(2))
        assert said.count("error: ") == 1
        assert FAILURES[how] in " ".join(said.split())
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
    on_two(processes, tmp_path, run)
    assert_same_run(tmp_path / "run", alone(2))


def rank_in_its_folder(rank: int, each: list[list[str]], folders: list[Path]) -> None:
    """`cli_rank` in a folder of its own, as on a machine of its own."""
    os.chdir(folders[rank])
    cli_rank(rank, each)


def refusal(
    processes: Any, folder: Path, first: list[str], second: list[str], folders: tuple[Path, ...] = (Path(), Path())
) -> str:
    """What two ranks with these command lines say, both ending with status 2."""
    ranks = launch(processes, folder, rank_in_its_folder, [["adapt", *first], ["adapt", *second]], folders)
    assert finish(ranks) == [2, 2]
    said = [(folder / f"stderr-{rank}").read_text() for rank in range(2)]
    lines = [line for text in said for line in text.splitlines() if line.startswith("error")]
    assert len(lines) == 1, said
    return lines[0]


def test_what_stops_one_of_two_processes_stops_both_with_one_line(place, processes, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(config_of(place, tmp_path / "run").model_dump(mode="json")))
    given = [str(config)]
    assert "training.seed is 0 on rank 0 and 1 on rank 1" in refusal(
        processes, tmp_path, given, [*given, "--training.seed", "1"]
    )
    assert "resume is True on rank 0 and False on rank 1" in refusal(
        processes, tmp_path, [*given, "--resume", "auto"], given
    )
    assert "absent.yaml does not exist" in refusal(processes, tmp_path, given, ["absent.yaml"])
    three = [*given, "--training.batch_rows", "3"]
    assert "training.batch_rows=3 does not divide over 2 processes; use 2" in refusal(
        processes, tmp_path, three, three
    )
    over = [*given, "--training.fsdp", "true", "--machine.shard_over", "3"]
    assert "machine.shard_over=3 does not divide 2 processes; use a divisor" in refusal(
        processes, tmp_path, over, over
    )
    held = [*given, "--machine.hold_gradients", "true"]
    assert "machine.shard_over and machine.hold_gradients are of FSDP2; set training.fsdp=true" in refusal(
        processes, tmp_path, held, held
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["data.jsonl", "store"])
def test_ranks_that_see_other_text_under_one_path_are_refused_with_its_name(place, processes, tmp_path, source):
    folders = (tmp_path / "0", tmp_path / "1")
    for rank, folder in enumerate(folders):
        folder.mkdir()
        text = (place / "sums.jsonl").read_text()
        (folder / "data.jsonl").write_text(text.replace("plus", "Plus") if rank else text)
        given, part = Source(path=str(folder / "data.jsonl")), folder / "store" / part_name(0, 0, 1)
        write_part(part, given, byte_tokenizer(), part=(0, 1), part_bytes=8192)
        merge(folder / "store", 0)
    config = tmp_path / "run.yaml"
    run = config_of(place, tmp_path / "run", data__sources=[{"path": source}])
    config.write_text(json.dumps(run.model_dump(mode="json")))
    said = refusal(processes, tmp_path, [str(config)], [str(config)], folders)
    assert f"data source {source} holds other text on rank 1 than on rank 0; give all machines the same" in said
    assert not (tmp_path / "run").exists()


def test_a_finished_stage_that_is_changed_ends_both_processes_with_one_line(place, processes, tmp_path):
    stages = [{"name": "a", "training": {"steps": 9}}, {"name": "b", "training": {"steps": 5}}]
    run = config_of(place, tmp_path / "run", stages=stages)
    on_two(processes, tmp_path, run, stop_after=13)  # stage b has a checkpoint of its second step, if not its fourth
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run.model_dump(mode="json")))
    changed = [str(config), "--stages.0.optimizer.lr", "0.5", "--resume", "auto"]
    said = refusal(processes, tmp_path, changed, changed)
    assert "stage-1-a is finished: optimizer.lr was 0.003, is 0.5 (set it in a stage to come); set" in said
    ranks = launch(processes, tmp_path, cli_rank, [["adapt", str(config), "--resume", "auto"]] * 2)
    assert finish(ranks) == [0, 0]
    assert len(losses(tmp_path / "run")) == 14


def lose_source(rank: int, each: list[list[str]]) -> None:
    """`cli_rank`, but the data of rank 1 vanish in the middle of the run."""
    import nextblock.data.feed as module
    from nextblock.config.errors import UsageError

    real = module.Feed._read
    batches: list[int] = []

    def read(self: Any) -> Any:
        batches.append(1)
        if rank == 1 and len(batches) > 3:
            raise UsageError("data file sums.jsonl cannot be read: No such file or directory; restore it")
        return real(self)

    module.Feed._read = read
    cli_rank(rank, each)


def test_data_that_vanish_for_one_rank_in_mid_run_stop_both_with_one_line(place, processes, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(config_of(place, tmp_path / "run").model_dump(mode="json")))
    ranks = launch(processes, tmp_path, lose_source, [["adapt", str(config)]] * 2)
    assert finish(ranks) == [2, 2]
    said = "".join((tmp_path / f"stderr-{rank}").read_text() for rank in range(2))
    assert said.count("error: data file sums.jsonl cannot be read") == 1
    assert len(losses(tmp_path / "run")) == 3
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-00000002", "step-00000003"]
