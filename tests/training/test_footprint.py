"""Planned memory of hosts and planned traffic, against what real processes allocate and send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from families import tiny_model
from nextblock.config.errors import UsageError
from nextblock.config.run import load_config
from nextblock.measure.plan import Plan, plan
from nextblock.model.parent import model_shape
from nextblock.training.footprint import communication, count_parameters
from runs import config_of, finish, launch

NAMES = ("all_gather_single", "reduce_scatter_single")


def counting_rank(rank: int, values: dict[str, Any], small: str, told: str) -> None:
    """Write down the most bytes that preparing the run took, and those that a step received, by collective."""
    import torch

    from nextblock.training.devices import GIB, peak_memory_gib, reset_peak_memory
    from nextblock.training.setup import prepare
    from nextblock.training.step import train_step

    config = load_config(values)
    prepare(load_config(values, {"model.path": small})).feed.close()  # what is imported and made once
    reset_peak_memory(torch.device("cpu"))
    before = peak_memory_gib(torch.device("cpu"))
    run = prepare(config)
    most = (peak_memory_gib(torch.device("cpu")) - before) * GIB
    distributed: Any = torch.distributed
    new = hasattr(distributed, "all_gather_single")  # the names in torch 2.13
    names = ("all_gather_single", "reduce_scatter_single") if new else NAMES
    received: dict[str, int] = dict.fromkeys((*names, "all_reduce"), 0)

    def counted(name: str) -> Any:
        real = getattr(distributed, name)

        def call(*given: Any, group: Any = None, **options: Any) -> Any:
            tensors = [x for x in (*given, *options.values()) if isinstance(x, torch.Tensor)]
            size = max(x.numel() * x.element_size() for x in tensors)
            ranks = distributed.get_world_size(group)
            received[name] += (2 if name == "all_reduce" else 1) * size * (ranks - 1) // ranks
            return real(*given, group=group, **options)

        return call

    for name in received:
        setattr(distributed, name, counted(name))
    train_step(run, 0)
    run.feed.close()
    Path(told).joinpath(f"rank-{rank}.json").write_text(
        json.dumps({"loading": most, "received": [*received.values()]})
    )


WIDE = {"vocab_size": 16_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
CASES: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "shards, a tied head": (2, True, {}),
    "copies, gradients held": (4, False, {"machine__shard_over": 2, "machine__hold_gradients": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_loading_takes_and_a_step_receives_what_is_planned(place, processes, tmp_path, case):
    """Memory within 25 %, traffic within 2 %, which sums of losses and norms take."""
    count, tied, options = CASES[case]
    tiny_model("llama", tie_word_embeddings=tied, **WIDE).save_pretrained(tmp_path / "parent")
    sizes = {"training__batch_rows": 8, "training__micro_batch_rows": 1, "growth__b_0": 4, "growth__delta": 100}
    options = {"model__path": str(tmp_path / "parent"), "training__fsdp": True, **sizes, **options}
    config = config_of(place, tmp_path / "run", **options)
    places = str(place / "llama"), str(tmp_path)
    ranks = launch(processes, tmp_path, counting_rank, config.model_dump(mode="json"), *places, count=count)
    assert finish(ranks) == [0] * count, (tmp_path / "stderr-0").read_text()
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(count)]
    planned = plan(config, device="cpu", devices=count)
    assert max(rank["loading"] for rank in found) == pytest.approx(planned.host_memory["loading"], rel=0.25)
    sent = planned.communication
    weights, gradients, copies = found[0]["received"]
    assert weights == pytest.approx(sent["weights"], rel=0.02)
    assert gradients == pytest.approx(sent["gradients"], rel=0.02)
    assert copies == pytest.approx(sent.get("copies", 0), rel=0.02, abs=5000)


def planned(place: Path, tmp_path: Path, **overrides: Any) -> Plan:
    return plan(config_of(place, tmp_path / "run", training__batch_rows=8, **overrides), device="l4", devices=4)


def test_a_process_holds_one_tensor_while_it_reads_its_part_and_else_the_whole_model(place, tmp_path):
    """Where the device is a GPU; with the part of a checkpoint in training, and the whole model to evaluate it."""
    parts = planned(place, tmp_path, training__fsdp=True)
    whole, copies = planned(place, tmp_path), planned(place, tmp_path, training__fsdp=True, machine__shard_over=2)
    assert parts.host_memory["loading"] == 4 * 260 * 32
    assert whole.host_memory["loading"] == 4 * parts.parameters
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = planned(place, tmp_path, training__fsdp=True, model__scratch={"vocab_size": 260, **sizes})
    assert made.host_memory["loading"] == 4 * made.parameters
    for one in (parts, whole, copies):
        assert one.host_memory["training"] == one.checkpoint_bytes // 4
    evaluated = planned(place, tmp_path, training__fsdp=True, training__evaluate_rows=2, data__held_out=0.1)
    assert evaluated.host_memory["end"] >= 4 * evaluated.parameters


def test_fewer_devices_to_a_copy_hold_more_each_and_held_gradients_are_whole(place, tmp_path):
    micro = {"training__fsdp": True, "training__micro_batch_rows": 1}
    all_share, two_share = planned(place, tmp_path, **micro), planned(place, tmp_path, machine__shard_over=2, **micro)
    assert two_share.memory["optimizer"] == 2 * all_share.memory["optimizer"]
    held = planned(place, tmp_path, machine__hold_gradients=True, **micro)
    assert held.memory["gradients"] == 4 * all_share.parameters
    assert held.communication["gradients"] * 2 == all_share.communication["gradients"]
    assert held.communication["weights"] == all_share.communication["weights"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"training.fsdp": True, "machine.shard_over": 3}, "machine.shard_over=3 does not divide 4 devices"),
        ({"machine.hold_gradients": True}, "machine.shard_over and machine.hold_gradients are of FSDP2"),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(place, tmp_path, overrides, said):
    config = load_config(config_of(place, tmp_path / "run").model_dump(mode="json"), overrides)
    with pytest.raises(UsageError, match=said):
        plan(config, device="l4", devices=4)


def test_one_process_receives_nothing_and_copies_of_a_whole_model_receive_its_gradients_alone(place, tmp_path):
    config = config_of(place, tmp_path / "run")
    counts = count_parameters(config, model_shape(config.model))
    assert communication(config, counts, 1, 1) == {}
    assert communication(config, counts, 4, 1) == {"gradients": 2 * 4 * counts.parent * 3 // 4}
