"""One step: one normalisation however the batch is split (identity 8), and what stops it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from layouts import CHAT, PLAIN, PROMPTED, make_rows
from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig
from nextblock.data.rows import Rows, check_tokens
from nextblock.training.loop import train
from nextblock.training.run import StepMetrics
from nextblock.training.setup import prepare
from nextblock.training.step import train_step
from runs import config_of, weights


class GivenRows:
    """A stream that always gives the same rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def peek(self) -> Rows:
        return self.rows

    next = peek


class KeepGradients:
    """In the optimizer's place: remembers the gradients and leaves the weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.param_groups: list[dict[str, Any]] = []

    def step(self) -> None:
        self.gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def zero_grad(self) -> None:
        self.model.zero_grad()


def step_in_float64(config: AdaptConfig, rows: Rows, step: int) -> tuple[StepMetrics, list[Tensor]]:
    run: Any = prepare(config)
    run.decoder.model.double()
    run.feed, run.optimizer = GivenRows(rows), KeepGradients(run.decoder.model)
    return train_step(run, step), run.optimizer.gradients


@pytest.mark.parametrize("step", [0, 5, 11])  # block sizes 1, 2 and 4
def test_loss_and_gradients_do_not_depend_on_the_split_into_micro_batches(place, tmp_path, step):
    rows = make_rows([PLAIN, PROMPTED, CHAT, [[28]], [[3]], [[-20, 2]]], 32)
    splits = []
    for size in (None, 1, 2, 4):
        config = config_of(
            place, tmp_path, training__batch_rows=6, training__micro_batch_rows=size, optimizer__grad_clip=1e9
        )
        splits.append(step_in_float64(config, rows, step))
    whole, wanted = splits[0]
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for metrics, gradients in splits[1:]:
        assert metrics.loss == pytest.approx(whole.loss, rel=1e-6)
        assert metrics.tokens == whole.tokens == int((rows.offset >= 0).sum())
        for ours, theirs in zip(gradients, wanted, strict=True):
            # The norms and rotary angles of the model are float32 inside, whatever its dtype.
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7 * scale)


def test_with_soft_targets_and_drafts_lost_too_the_split_into_micro_batches_does_not_enter(place, tmp_path):
    rows = make_rows([PLAIN, PROMPTED, CHAT, [[28]], [[3]], [[-20, 2]]], 32, ended=True)
    options: dict[str, Any] = {"training__batch_rows": 6, "optimizer__grad_clip": 1e9, "recipe__views": 2}
    results = [
        step_in_float64(
            config_of(
                place,
                tmp_path,
                **options,
                training__micro_batch_rows=n,
                recipe__soft_weight=w,
                recipe__accept_weight=2 * w,
                recipe__full_mask_share=0.5,
            ),
            rows,
            11,
        )
        for n, w in ((None, 0.7), (2, 0.7), (None, 0.0))
    ]
    (whole, wanted), (split, found), (without, _) = results
    assert whole.loss == pytest.approx(split.loss, rel=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7 * scale)
    masked = (without.loss * without.tokens - 0.5 * without.ar_loss * ar_count(rows)) / without.diffusion_loss * 2
    more = 0.7 * whole.soft_loss + 1.4 * whole.lost_drafts
    assert 0 < whole.lost_drafts < 1
    assert whole.loss - without.loss == pytest.approx(more * masked / (2 * whole.tokens), rel=1e-4)
    assert math.isnan(without.soft_loss)
    assert math.isnan(without.lost_drafts)


def ar_count(rows: Rows) -> int:
    return int(((rows.offset[:, 1:] >= 0) & (rows.document[:, 1:] == rows.document[:, :-1])).sum())


def test_a_step_reports_the_mean_losses_and_their_weighted_sum_over_n(place, tmp_path):
    rows = make_rows([PLAIN, PROMPTED, CHAT, [[28]]], 32)
    metrics, _ = step_in_float64(config_of(place, tmp_path), rows, 11)
    assert metrics.block_size == 4
    assert metrics.ar_weight == 0.5
    ar_tokens = sum(n - 1 for n in (13, 6, 1, 5, 28)) + sum((9, 4)) + sum((6, 7))
    masked = (metrics.loss * metrics.tokens - 0.5 * metrics.ar_loss * ar_tokens) / metrics.diffusion_loss
    assert masked == pytest.approx(round(masked), abs=1e-3)
    assert 0 < masked < metrics.tokens


def test_a_non_finite_loss_stops_before_the_update_and_names_the_rows(place, tmp_path):
    run: Any = prepare(config_of(place, tmp_path))
    with torch.no_grad():
        run.decoder.model.model.norm.weight[0] = torch.inf
    before = {name: value.clone() for name, value in run.decoder.model.state_dict().items()}
    with pytest.raises(UsageError, match=r"step 3: loss nan .* not finite \(rows \[0, 1, 2, 3\]\)"):
        train_step(run, 3)
    for name, value in run.decoder.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_non_finite_loss_is_told_by_the_step_of_the_run_whatever_the_stage(place, tmp_path):
    run: Any = prepare(config_of(place, tmp_path))
    run.first_step = 20
    with torch.no_grad():
        run.decoder.model.model.norm.weight[0] = torch.inf
    with pytest.raises(UsageError, match="step 23: loss nan"):
        train_step(run, 3)


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The rows of this step hold what the run refuses."""
    real, taken = check_tokens, []

    def check(rows: Rows, *rest: Any) -> None:
        taken.append(rows)
        if len(taken) > step + 1:  # one look at them comes before the run
            raise UsageError("all.jsonl:77: message 1 has no content")
        real(rows, *rest)

    for module in ("setup", "step"):
        monkeypatch.setattr(f"nextblock.training.{module}.check_tokens", check)


def test_bad_data_in_mid_run_leave_the_log_and_a_checkpoint_of_the_steps_until_there(
    place, tmp_path, monkeypatch, undisturbed
):
    config = config_of(place, tmp_path / "run", training__checkpoint_every=1000)
    with monkeypatch.context() as patch:
        fail_at(patch, 5)
        with pytest.raises(UsageError, match=r"no content; .*step-00000005 holds the steps until here"):
            train(config)
        assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 5
        fail_at(patch, 0)
        with pytest.raises(UsageError, match=r"no content; .*step-00000005 holds"):  # as long as nothing is mended
            train(config, resume=True)
    train(config, resume=True)
    assert weights(tmp_path / "run") == undisturbed[0]


def test_bad_data_before_the_first_step_leave_no_folder(place, tmp_path, monkeypatch):
    fail_at(monkeypatch, 0)
    with pytest.raises(UsageError, match="no content"):
        train(config_of(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
