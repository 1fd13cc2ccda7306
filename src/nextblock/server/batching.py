"""Continuous batching: one thread owns the model, and requests come and go between its passes.

Requests of one mode and one shape of pass are rows of one batch, which new ones join and finished ones leave; what
they choose, where they stop and what they tell is each row's own. Batches take turns, a pass each, so that no request
waits for another's end; between two turns at most one pass reads prompts, of a bounded number of tokens.
"""

from __future__ import annotations

import itertools
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nextblock.decoding.batch import Batch
from nextblock.decoding.engine import decode
from nextblock.decoding.events import Event, Finish, RowFinished, Stats
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.rows import Row
from nextblock.model.costs import NOMINAL, Costs

SHAPE = {"ar": (), "diffusion": ("block_size",), "speculative": ("block_size", "draft_paths")}
"""For each mode the options that decide the shape of its passes. All others each row of a batch has for itself."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What a step brought for one row.

    events: as they happened.
    tokens: those that were decided and have no gap before them, in the order of the answer.
    forwards: passes that the row has taken part in so far.
    finish: why the row ended; None: it goes on.
    error: what went wrong; the row has then ended.
    """

    events: Sequence[Event]
    tokens: Sequence[int]
    forwards: int
    finish: Finish | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """A row to be decoded.

    tell: called in the engine's thread after each step that brought something, until the row has ended.
    cancelled: set by anyone at any time; the row then leaves at the next step, and nothing more is told.
    """

    row: Row
    config: DecodingConfig
    tell: Callable[[Progress], None]
    cancelled: bool = False
    error: Exception | None = None
    told: int = 0
    key: Hashable = None


@dataclass(eq=False)
class _Work:
    """A batch with its jobs by row number. read: tokens of its prompts that were read, while it has no `steps`."""

    batch: Batch
    jobs: dict[int, Job]
    key: Hashable
    steps: Iterator[list[Event]] | None = None
    read: int = 0


class Engine:
    """Decodes what is submitted, from any thread, until it is closed.

    max_rows, read_tokens: as `Limits.max_rows` and `Limits.pass_tokens`.
    costs: of passes, by which drafts of automatic length go; None: nominal ones.
    log_prompts: the messages of errors, which may hold parts of prompts, are logged, too.
    stats: passes and tokens of all rows so far. alive: false after an error that the thread did not survive.
    """

    def __init__(
        self,
        lm: BlockDiffusionLM,
        max_rows: int = 32,
        read_tokens: int = 512,
        costs: Costs | None = None,
        log_prompts: bool = False,
    ) -> None:
        self.lm, self.max_rows, self.read_tokens, self.log_prompts = lm, max_rows, read_tokens, log_prompts
        self.costs = costs or NOMINAL.model_copy(deep=True)  # which learns how many drafts are kept
        self.stats, self.alive = Stats(), True
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._reading: deque[_Work] = deque()
        self._running: dict[Hashable, _Work] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def rows(self) -> int:
        """Rows that hold a place in a batch."""
        return sum(len(work.jobs) for work in [*list(self._reading), *list(self._running.values())])

    @property
    def waiting(self) -> int:
        """Rows that wait for a place."""
        return sum(not job.cancelled for job in list(self._waiting))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue rows."""
        for job in jobs:
            job.key = self._key(job)
            job.row.number = next(self._numbers)
            job.row.stop = _guarded(job)
        with self._changed:
            self._waiting.extend(jobs)
            self._changed.notify()

    def _key(self, job: Job) -> Hashable:
        """Equal for rows that may share a batch."""
        config, own, branches = job.config, None, False
        if config.mode == "speculative":
            own = job if config.draft_ahead else None  # its next drafts are made in the check's pass: none can join
            branches = config.draft_paths > 1 and job.row.random is not None  # drawn branches, or likeliest ones
        shape = tuple(getattr(config, name) for name in SHAPE[config.mode])
        return config.mode, shape, self.lm.decoder.context(len(job.row.prompt)), branches, own

    def close(self) -> None:
        """Give up what is left, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._closing or self._waiting or self._reading or self._running):
                        self._changed.wait()
                    if self._closing:
                        return
                with torch.inference_mode():
                    self._round()
        except BaseException as error:  # not raised again: Python would print its message
            self.alive = False
            log.critical("the engine stopped:\n%s", where(error, self.log_prompts))
        finally:
            gone = RuntimeError("the server is closing")
            held = [job for work in [*self._reading, *self._running.values()] for job in work.jobs.values()]
            for job in [*held, *self._waiting]:
                _tell(job, Progress([], [], job.row.passes, error=gone))
            self._waiting.clear()
            self._reading.clear()
            self._running.clear()

    def _round(self) -> None:
        """At most one pass that reads prompts, then a pass of each batch."""
        self._admit()
        if self._reading:
            self._attempt(self._reading[0], self._read)
        for work in list(self._running.values()):
            self._attempt(work, self._step)

    def _admit(self) -> None:
        """Give places to rows that wait, in their order, and gather those that can be read in one pass."""
        with self._changed:
            free, jobs = self.max_rows - self.rows, [job for job in self._waiting if not job.cancelled]
            self._waiting, jobs = deque(jobs[free:]), jobs[:free]
        gathered: list[list[Job]] = []
        for job in jobs:
            for group in gathered:
                longest = max(len(other.row.prompt) for other in [*group, job])
                if group[0].key == job.key and (len(group) + 1) * longest <= self.read_tokens:
                    group.append(job)
                    break
            else:
                gathered.append([job])
        lm = self.lm
        for group in gathered:
            rows = [job.row for job in group]
            batch = Batch(lm.decoder, lm.settings, group[0].config, rows, self.stats, costs=self.costs)
            self._reading.append(_Work(batch, {job.row.number: job for job in group}, group[0].key))

    def _attempt(self, work: _Work, action: Callable[[_Work], None]) -> None:
        """Run an action; an exception ends the rows of this batch, and no others."""
        for number, job in list(work.jobs.items()):
            if job.cancelled:
                job.row.finish = "cancelled"
                del work.jobs[number]
        try:
            action(work)
        except Exception as error:
            log.error("a pass failed:\n%s", where(error, self.log_prompts))  # as text: frames hold the cache
            self._drop(work)
            error = error.with_traceback(None)
            for job in work.jobs.values():
                _tell(job, Progress([], [], job.row.passes, error=error))

    def _drop(self, work: _Work) -> None:
        if self._running.get(work.key) is work:
            del self._running[work.key]
        else:
            self._reading.remove(work)

    def _read(self, work: _Work) -> None:
        """One pass over prompts; behind their end the rows join the batch of their kind."""
        longest = max(len(row.prompt) for row in work.batch.rows)
        if work.jobs and longest - work.read > self.read_tokens:
            work.batch.read(work.read, work.read + self.read_tokens)
            work.read += self.read_tokens
            self._reading.rotate(-1)
            return
        if work.jobs:
            self._hand_out(work, work.batch.begin(work.read))
        self._reading.remove(work)
        if not work.jobs:
            return
        running = self._running.get(work.key)
        if running is None:
            work.steps = decode(work.batch)
            self._running[work.key] = work
        else:
            running.batch.join(work.batch)
            running.jobs |= work.jobs

    def _step(self, work: _Work) -> None:
        assert work.steps is not None
        events = next(work.steps, None)
        if events is None:
            self._drop(work)
        else:
            self._hand_out(work, events)

    def _hand_out(self, work: _Work, events: list[Event]) -> None:
        """Tell each row what the step brought."""
        found: dict[int, list[Event]] = {}
        for event in events:
            found.setdefault(event.row, []).append(event)
        for number, told in found.items():
            job = work.jobs.get(number)
            if job is None:
                continue
            finish: Finish | None = next((event.reason for event in told if isinstance(event, RowFinished)), None)
            tokens = job.row.answer[job.told :]
            job.told += len(tokens)
            self.stats.new_tokens += len(tokens)
            if finish is not None:
                del work.jobs[number]
            _tell(job, Progress(told, tokens, job.row.passes, finish, job.error))


def where(error: BaseException, message: bool) -> str:
    """The traceback of an error; without its message, which may hold parts of a prompt, unless that is asked for."""
    if message:
        return "".join(traceback.format_exception(error)).rstrip()
    return "".join(traceback.format_tb(error.__traceback__)) + f"{type(error).__name__} (--log-prompts says more)"


def _tell(job: Job, progress: Progress) -> None:
    try:
        job.tell(progress)
    except Exception:  # whoever listened is gone
        job.cancelled = True


def _guarded(job: Job) -> Callable[[list[int]], Finish | None] | None:
    """The row's stop callback, whose exception ends this row alone."""
    check = job.row.stop
    if check is None:
        return None

    def guarded(answer: list[int]) -> Finish | None:
        try:
            return check(answer)
        except Exception as error:
            job.error = error
            return "criteria"

    return guarded
