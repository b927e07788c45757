"""Runs in local processes: each worker imports once and then executes many runs.

A worker is pinned to its share of the cores. XLA sizes its thread pool by the cores it may use, so that two
workers on two cores do not fight over both.
"""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# How long a worker has to save its state when it is told to stop, in seconds.
GRACE = 20.0


@dataclasses.dataclass(frozen=True)
class Task:
    """One run: a config (picklable) and the folder it works in."""

    config: Any
    workdir: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened to a task: it started, finished (with a summary), or failed (with a sentence)."""

    task: int
    kind: str
    summary: dict | None = None
    error: str = ""


Function = Callable[[Any, pathlib.Path], dict]


def train(config, workdir: pathlib.Path) -> dict:
    """Executes one run of `sparsejax.training` and gives back its summary."""
    from sparsejax import training
    from sparsejax.allocator import keep_freed_memory

    keep_freed_memory()
    # pretrained runs lie beside the others, so that rows share them
    return training.run(config, workdir, progress=False, runs=workdir.parent)


def execute(tasks: Sequence[Task], function: Function, jobs: int = 1) -> Iterator[Event]:
    """Executes tasks in order and yields what happens to them.

    A task that raises, or kills its worker, fails without stopping the others. With one job the tasks run in
    this process; with more in spawned ones, for which `function` must be importable. When the iteration is
    abandoned (Ctrl-C), the workers get SIGTERM and the time to save.
    """
    if jobs == 1 or len(tasks) <= 1:
        for index, task in enumerate(tasks):
            yield Event(index, "started")
            yield _attempt(index, task, function)
        return
    pool = [_Worker(function, cores) for cores in shares(min(jobs, len(tasks)))]
    try:
        yield from _dispatch(tasks, pool)
    finally:
        for worker in pool:
            worker.terminate()
        for worker in pool:
            worker.join()


def shares(jobs: int) -> list[set[int] | None]:
    """The cores of each worker: equal shares of those this process may use (None where it cannot be said)."""
    if not hasattr(os, "sched_setaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if jobs >= len(cores):
        return [{cores[job % len(cores)]} for job in range(jobs)]
    return [set(cores[job::jobs]) for job in range(jobs)]


def _attempt(index: int, task: Task, function: Function) -> Event:
    """Executes one task; an error becomes a sentence, and its traceback a file in the workdir."""
    try:
        return Event(index, "finished", function(task.config, task.workdir))
    except Exception as error:
        try:
            task.workdir.mkdir(parents=True, exist_ok=True)
            (task.workdir / "error.txt").write_text(traceback.format_exc())
        except OSError:
            pass  # A workdir that cannot be written is most likely the error itself.
        sentence = (str(error).splitlines() or [""])[0]
        return Event(index, "failed", error=f"{type(error).__name__}: {sentence}")


def _dispatch(tasks: Sequence[Task], pool: list["_Worker"]) -> Iterator[Event]:
    """Hands out tasks to idle workers until all are done; replaces workers that die."""
    waiting = list(range(len(tasks)))[::-1]
    idle, busy = list(pool), {}
    while waiting or busy:
        while waiting and idle:
            worker, index = idle.pop(0), waiting.pop()
            busy[worker], worker.busy = index, True
            yield Event(index, "started")
            worker.pipe.send((index, tasks[index]))
        ready = multiprocessing.connection.wait([worker.pipe for worker in busy])
        for worker in [worker for worker in busy if worker.pipe in ready]:
            index, worker.busy = busy.pop(worker), False
            try:
                yield worker.pipe.recv()
                idle.append(worker)
            except EOFError:
                worker.process.join()
                code = worker.process.exitcode
                yield Event(index, "failed", error=f"the worker died with exit code {code}")
                pool.remove(worker)
                pool.append(_Worker(worker.function, worker.cores))
                idle.append(pool[-1])


class _Worker:
    """A process that executes the tasks it is sent, on the given cores."""

    def __init__(self, function: Function, cores: set[int] | None):
        self.function, self.cores, self.busy = function, cores, False
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, function), daemon=True)
        mine = os.sched_getaffinity(0) if cores else None
        if cores:
            os.sched_setaffinity(0, cores)  # Inherited, hence in force before the child imports anything.
        try:
            self.process.start()
        finally:
            if cores:
                os.sched_setaffinity(0, mine)
        theirs.close()

    def terminate(self):
        """Asks the process to end: an idle one sees its pipe close, a busy one saves its run on SIGTERM."""
        self.pipe.close()
        if self.busy:
            self.process.terminate()

    def join(self):
        """Waits for the end, and enforces it after a while."""
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(pipe, function: Function):
    """The worker's loop; it ends when the other end of the pipe is gone."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C then reaches the parent alone, which decides.
    try:
        while True:
            index, task = pipe.recv()
            pipe.send(_attempt(index, task, function))
    except (EOFError, BrokenPipeError):
        return
