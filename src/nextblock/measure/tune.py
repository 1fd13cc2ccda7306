"""`nextblock tune`: the fastest decoding settings whose quality stays within what the user allows.

Quality is the accuracy on a built-in task's training split (its test split stays unseen), or, for a file of
prompts, the share of answers that equal AR mode's token for token. A coarse grid on a part of the examples
shows which settings are worth a closer look; those and their neighbours are then measured on all of them.
Every setting takes turns with AR mode on the same prompts; a speed is the median over rounds of the ratio.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from nextblock.config.errors import UsageError, nearest
from nextblock.config.progress import Update, counter
from nextblock.data.text import decode
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import DecodingConfig, resolve_config
from nextblock.measure.bench.contest import Round, alternate, compared, make_batches, our_mode
from nextblock.measure.bench.decoding import check_length
from nextblock.measure.bench.prompts import Options, Prompts, variant_name
from nextblock.measure.statistics import mcnemar, wilson
from nextblock.model.decoder import end_tokens

TUNED = {  # what is tuned of each mode; the values left out of a name are the defaults of `DecodingConfig`
    "diffusion": ("block_size", "threshold", "sampler", "sub_blocks"),
    "speculative": ("block_size", "draft_length", "draft_ahead", "draft_paths"),
}
MODES = tuple(TUNED)
THRESHOLDS = (0.99, 0.9, 0.75, 0.5)  # coarse; the fine pass goes halfway to the neighbours
ROUNDS = 8
KEPT = 3  # settings of a mode that the coarse pass hands on, each with its neighbours
SMALLEST_COARSE = 8  # examples


@dataclass(frozen=True)
class Trial:
    """One setting, measured.

    stage: "coarse" (a part of the examples) or "fine" (all of them).
    quality: accuracy, or agreement with AR mode, 0 to 1.
    interval: of the quality, 95 % (`statistics.wilson`).
    drop: AR mode's quality on the same examples less this one, in points. drop_error: its standard error.
    p_value: of no drop and no gain, from the same examples (`statistics.mcnemar`).
    speedup: tokens per second over AR mode's in the same round, median over rounds.
    tokens_per_forward: answer tokens over all forward passes of their rows.
    """

    name: str
    mode: str
    options: Options
    stage: str
    examples: int
    quality: float
    interval: tuple[float, float]
    drop: float
    drop_error: float
    p_value: float
    speedup: float
    tokens_per_second: float
    tokens_per_forward: float
    chosen: bool = False


@dataclass(frozen=True)
class Tuning:
    """What was measured, and the choice.

    measure: "accuracy" or "agreement with AR".
    trials: every setting once, from the last pass it was in; AR mode first.
    best: the fastest allowed setting of each mode; None where none is allowed.
    """

    measure: str
    source: str
    max_drop: float
    trials: list[Trial]
    best: dict[str, Trial | None]

    @property
    def winner(self) -> Trial | None:
        """The fastest of the modes' best, if any is allowed."""
        return _fastest(trial for trial in self.best.values() if trial is not None)

    def decoding(self) -> Options:
        """Default arguments of `generate` for the checkpoint: the winner's.

        With them the other mode's own options, from its fastest allowed setting of the same block size, for
        both modes read one `block_size`.
        """
        winner = self.winner
        if winner is None:
            return {}
        size, taken = winner.options["block_size"], (winner.mode, "ar")
        allowed = [t for t in self.trials if t.stage == "fine" and t.mode not in taken and t.drop <= self.max_drop]
        other = _fastest(t for t in allowed if t.options["block_size"] == size)
        return {**(other.options if other else {}), **winner.options}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        return {"measure": self.measure, "prompts": values.pop("source"), **values, "decoding": self.decoding()}


def _fastest(trials: Iterable[Trial]) -> Trial | None:
    return max(trials, key=lambda trial: trial.speedup, default=None)


def tune(
    lm: BlockDiffusionLM,
    prompts: Prompts,
    *,
    max_drop: float = 2.0,
    modes: Sequence[str] = MODES,
    extra: Sequence[Options] = (),
    batch: int = 1,
    max_new_tokens: int = 160,
    on_call: Update = lambda done, total: None,
) -> Tuning:
    """Find the fastest diffusion and speculative settings within `max_drop`.

    Args:
        prompts: all of them are used in the fine pass, about a quarter in the coarse one.
        max_drop: most points of accuracy (or of agreement) to lose against AR mode.
        modes: "diffusion", "speculative" or both.
        extra: settings to try besides the grid, from `parse_variant`.
        batch: prompts decoded together.
        on_call: (batches decoded so far, batches of this pass), after each.
    Raises:
        UsageError: a model without settings, or bad input.
    """
    settings = lm.settings
    if settings is None:
        raise UsageError(
            "this checkpoint has no block_diffusion settings, so there is nothing to tune; adapt it first"
        )
    wanted = list(dict.fromkeys([*modes, *(options["mode"] for options in extra)]))
    if unknown := next((mode for mode in wanted if mode not in MODES), None):
        raise UsageError(f"mode '{unknown}' cannot be tuned{nearest(unknown, MODES)}")
    if not 0 <= max_drop <= 100:
        raise UsageError(f"max_drop={max_drop} must lie between 0 and 100 points")
    encoded = prompts.encode(lm)
    check_length(lm, encoded, max_new_tokens)
    make_batches(encoded, batch)
    given = [complete(options, settings.block_size) for options in extra]
    candidates = given + [options for mode in modes for options in coarse_grid(mode, settings.block_size)]
    runner = _Runner(lm, prompts, encoded, batch, max_new_tokens, on_call)
    count = min(len(encoded), max(SMALLEST_COARSE, len(encoded) // 4, batch))
    coarse = runner.measure(_unique(candidates), count, "coarse")
    close = [near for m in modes for near in _worth_a_closer_look([t for t in coarse if t.mode == m], max_drop)]
    fine = runner.measure(_unique(given + close), len(encoded), "fine")
    again = [trial.options for trial in fine]
    trials = fine + [trial for trial in coarse if trial.options not in again]
    best = {mode: _fastest(t for t in fine if t.mode == mode and t.drop <= max_drop) for mode in wanted}
    chosen = [trial.options for trial in best.values() if trial is not None]
    trials = [replace(t, chosen=t.stage == "fine" and t.options in chosen) for t in trials]
    best = {mode: trial and replace(trial, chosen=True) for mode, trial in best.items()}
    return Tuning("accuracy" if prompts.task else "agreement with AR", prompts.source, max_drop, trials, best)


# ------------------------------------------------------------------------------------------- candidates


def complete(options: Options, trained: int) -> Options:
    """A setting with every tuned option of its mode named, so that it means the same in any checkpoint.

    What a checkpoint sets already would otherwise leak into a setting that leaves it out.
    """
    fields = DecodingConfig.model_fields
    defaults = {name: fields[name].default for name in TUNED[options["mode"]]}
    return {"mode": options["mode"], **defaults, "block_size": trained, **options}


def setting_name(options: Options) -> str:
    """The setting in words, without what stands at its default; block size and threshold are always named."""
    fields, always = DecodingConfig.model_fields, ("mode", "block_size", "threshold")
    return variant_name({k: v for k, v in options.items() if k in always or v != fields[k].default})


def block_sizes(trained: int) -> list[int]:
    """The trained block size and its next three divisors, largest first; not 1 unless it is all there is."""
    divisors = [size for size in range(trained, 1, -1) if trained % size == 0]
    return divisors[:4] or [trained]


def coarse_grid(mode: str, trained: int) -> list[Options]:
    """Settings of one mode to begin with."""
    grid: list[Options] = []
    for size in block_sizes(trained):
        if mode == "diffusion":
            grid += [{"mode": mode, "block_size": size, "threshold": threshold} for threshold in THRESHOLDS]
        else:  # drafting ahead needs room for the next draft behind the check
            grid += [{"mode": mode, "block_size": size, "draft_ahead": n} for n in ((0, 2) if size >= 3 else (0,))]
    return [complete(options, trained) for options in grid]


def neighbours(options: Options) -> list[Options]:
    """Settings one small change away."""
    size = options["block_size"]
    changes: list[Options] = []
    if options["mode"] == "speculative":
        changes = [{"draft_length": n} for n in (None, size // 2, 3 * size // 4) if n != 0]
        if ahead := options["draft_ahead"]:
            changes += [{"draft_ahead": n} for n in (ahead // 2, 2 * ahead) if n]
        elif (paths := options["draft_paths"]) > 1:
            changes += [{"draft_paths": n} for n in (paths // 2, 2 * paths)]
        else:
            changes.append({"draft_paths": 2})
        return [{**options, **change} for change in changes]
    if (threshold := options["threshold"]) in THRESHOLDS:
        grid = (1.0, *THRESHOLDS, 0.0)
        place = grid.index(threshold)
        changes = [{"threshold": round((threshold + grid[place + step]) / 2, 4)} for step in (-1, 1)]
    changes += [{"sampler": sampler} for sampler in ("entropy", "margin") if sampler != options["sampler"]]
    if size % 2 == 0 and size >= 4:
        changes.append({"sub_blocks": 2})
    return [{**options, **change} for change in changes]


def _worth_a_closer_look(coarse: Sequence[Trial], max_drop: float) -> list[Options]:
    """The fastest that may still be allowed, given how few examples were seen; the fastest one's neighbours too.

    And the setting that lost least, so that something is left if all of these turn out to lose too much.
    """
    if not coarse:
        return []
    possible = [t for t in coarse if t.drop - t.drop_error <= max_drop]
    fastest = sorted(possible, key=lambda t: -t.speedup)[:KEPT]
    safest = min(coarse, key=lambda t: (t.drop, -t.speedup))
    return [trial.options for trial in (*fastest, safest)] + [
        near for trial in (fastest or [safest])[:2] for near in neighbours(trial.options)
    ]


def _unique(candidates: Sequence[Options]) -> list[Options]:
    return [options for index, options in enumerate(candidates) if options not in candidates[:index]]


# --------------------------------------------------------------------------------------------- measuring


@dataclass
class _Runner:
    """Measures settings in turns with AR mode, and grades each answer once."""

    lm: BlockDiffusionLM
    prompts: Prompts
    encoded: list[list[int]]
    batch: int
    max_new_tokens: int
    on_call: Update
    grades: dict[tuple[int, str], bool] = field(default_factory=dict)

    def measure(self, candidates: Sequence[Options], count: int, stage: str) -> list[Trial]:
        """AR mode and the candidates on the first `count` prompts (whole batches of them)."""
        for options in candidates:
            resolve_config(self.lm.settings, options)  # refuse before an hour of decoding, not after
        ends = end_tokens(self.lm.decoder, self.lm.tokenizer)
        limits = self.max_new_tokens, ends, self.prompts.task.stop if self.prompts.task else ()
        entries = [our_mode(self.lm, options, *limits) for options in [{"mode": "ar"}, *candidates]]
        batches = make_batches(self.encoded[:count], self.batch)
        share = -(-len(batches) // ROUNDS)
        rounds = [batches[start : start + share] for start in range(0, len(batches), share)]
        advance = counter(self.on_call, len(entries) * (len(batches) + 1))
        alternate(entries, [batches[:1]], advance)  # warm up
        results = alternate(entries, rounds, advance)
        reference = self._right(results[0], results[0])
        pairs = zip(entries, results, strict=True)
        return [self._trial(entry.options, own, results[0], reference, stage) for entry, own in pairs]

    def _right(self, own: Sequence[Round], ar: Sequence[Round]) -> list[bool]:
        """For each prompt whether its answer is right: graded, or the same tokens as AR mode's."""
        answers = [answer for r in own for answer in r.answers]
        if self.prompts.task is None:
            return [a == b for a, b in zip(answers, (answer for r in ar for answer in r.answers), strict=True)]
        return [self._grade(index, answer) for index, answer in enumerate(answers)]

    def _grade(self, index: int, answer: list[int]) -> bool:
        text = decode(self.lm.tokenizer, answer)
        if (index, text) not in self.grades:
            assert self.prompts.task is not None
            self.grades[index, text] = self.prompts.task.grade(text, self.prompts.cases[index])
        return self.grades[index, text]

    def _trial(self, options: Options, own: list[Round], ar: list[Round], reference: list[bool], stage: str) -> Trial:
        right = self._right(own, ar)
        lost = [100 * (before - now) for before, now in zip(reference, right, strict=True)]
        speeds: Any = {name: compared(own, ar)[name] for name in ("speedup", "tokens_per_second")}
        return Trial(
            name=setting_name(options),
            mode=options["mode"],
            options=options,
            stage=stage,
            examples=len(lost),
            quality=fmean(right),
            interval=wilson(fmean(right), len(right)),
            drop=fmean(lost),
            drop_error=stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 else 0.0,
            p_value=mcnemar(reference, right),
            **speeds,
            tokens_per_forward=sum(r.new_tokens for r in own) / sum(r.row_forwards for r in own),
        )
