"""Batches of prompts answered by copies of a model on a Ray cluster (extra `ray`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nextblock.config.errors import UsageError
from nextblock.config.files import user_path

Batches = Sequence[tuple[int, Any]]  # number of the first prompt, and what is given to `answer` with it
LOST_IN_TURN = 5  # for each copy, without an answer in between
Answer = Callable[[Any, int, Any], Any]  # (model, number, batch) -> what is handed on


def answered_on_cluster(
    load: Callable[..., Any], arguments: dict[str, Any], answer: Answer, batches: Batches, copies: int
) -> Iterator[Any]:
    """`answer(load(**arguments), number, batch)` of every batch, in order, by that many copies of the model.

    A copy takes one GPU where the cluster has any, else one CPU core. What a lost machine was at is done again by
    another copy, so each batch comes once. The cluster is the one that RAY_ADDRESS names, else this machine.

    Raises:
        UsageError: Ray is missing, there is no such cluster, or it has no room for one copy.
    """
    ray = _ray()
    began = not ray.is_initialized()
    if began:
        try:
            ray.init(log_to_driver=False, configure_logging=False)
        except ConnectionError as error:
            raise UsageError(f"no Ray cluster answers: {error}; start one, or unset RAY_ADDRESS") from None
    try:
        room = ray.cluster_resources()
        kind = "GPU" if room.get("GPU") else "CPU"
        if room.get(kind, 0) < 1:
            raise UsageError(f"the Ray cluster has no free {kind} for a copy of the model; add a machine")
        yield from _run(ray, load, arguments, answer, batches, min(copies, int(room[kind])), kind)
    finally:
        if began:
            ray.shutdown()


def _ray() -> Any:
    try:
        ray: Any = import_module("ray")  # by name: it is not among the development tools
        import_module("ray.exceptions")
    except ImportError:
        raise UsageError("--ray needs Ray; install it with pip install 'nextblock[ray]'") from None
    return ray


def _run(
    ray: Any,
    load: Callable[..., Any],
    arguments: dict[str, Any],
    answer: Answer,
    batches: Batches,
    copies: int,
    kind: str,
) -> Iterator[Any]:
    """The outputs. What is idle takes the next batch, and a batch of a lost copy is the next one.

    Ray Data's own pool of actors waits for ever where a machine is lost and no other takes its place (Ray 2.60).
    """
    shared = ray.put(list(batches))

    @ray.remote(**{f"num_{kind.lower()}s": 1})
    class Copy:
        def start(self) -> None:
            self.model, self.batches = load(**arguments), ray.get(shared)

        def answer(self, number: int) -> Any:
            return answer(self.model, *self.batches[number])

    waiting, idle, outputs, told, lost = deque(range(len(batches))), [], {}, 0, 0
    running: dict[Any, tuple[Any, int | None]] = {
        copy.start.remote(): (copy, None) for copy in (Copy.remote() for _ in range(copies))
    }
    while told < len(batches):
        ((reference, *_), _) = ray.wait(list(running))
        copy, number = running.pop(reference)
        try:
            output = ray.get(reference)
        except ray.exceptions.RayActorError:  # its machine or its process is gone
            lost += 1
            if lost > LOST_IN_TURN * copies:
                raise UsageError("copies of the model end again and again; see the logs of the Ray cluster") from None
            waiting.extendleft([] if number is None else [number])
            copy = Copy.remote()  # waits until a machine has room for it
            running[copy.start.remote()] = (copy, None)
        except ray.exceptions.RayTaskError as error:
            raise UsageError(f"a copy of the model on the Ray cluster failed: {error.cause}") from None
        else:
            idle.append(copy)
            if number is not None:
                outputs[number], lost = output, 0
        while waiting and idle:
            copy, number = idle.pop(), waiting.popleft()
            running[copy.answer.remote(number)] = (copy, number)
        while told in outputs:
            yield outputs.pop(told)
            told += 1


def absolute(path: str | Path | None) -> str | Path | None:
    """A local path as other processes find it; a Hub id as it is."""
    found = None if path is None else user_path(path)
    return path if found is None or not found.exists() else found.resolve()
