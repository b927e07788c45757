"""The loop: `run(config, workdir)` trains, logs, evaluates, saves and resumes."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from sparsejax.masks import densities, find_field, flatten, get_masks, is_sparsified
from sparsejax.training.checkpoint import Checkpoints
from sparsejax.training.config import resolve
from sparsejax.training.curves import draw
from sparsejax.training.interrupt import StopRequest
from sparsejax.training.mesh import build_mesh, check_batch, is_main, to_host
from sparsejax.training.metrics import MetricsWriter
from sparsejax.training.pretrained import check_fits, obtain
from sparsejax.training.problem import Problem, load_problem
from sparsejax.training.session import Book, Carry, Session
from sparsejax.training.step import all_finite, copy_tree, measure_masks, zero_meters
from sparsejax.training.summary import (
    layer_macs,
    read_summary,
    show,
    summarise,
    training_flops,
    write_summary,
)
from sparsejax.training.workdir import prepare


def run(config, workdir, mesh=None, progress: bool = True, runs=None) -> dict[str, Any]:
    """Trains what `config` describes, or resumes it, or returns the summary of the finished run.

    The folder `workdir` receives `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
    `summary.json` and `curves.png`. A run that was killed at any moment and is started again with the same
    arguments ends with the same bits in its parameters, masks and metrics as one that was not.

    Args:
      config: an `ml_collections.ConfigDict` or a mapping; see `sparsejax.training.resolve`.
      workdir: the folder of this run; created if missing.
      mesh: None for one device, `"data:4,model:2"`, or a `jax.sharding.Mesh` with these axes.
      progress: show a progress bar on stderr and the summary on stdout.
      runs: the folder of pretrained runs (`config.pretrained`), each in a folder named by its hash; default
        `workdir/pretrained`. Runs that share the folder share the pretraining.

    Returns:
      The summary, as in `summary.json`.

    Raises:
      ValueError, FileNotFoundError: one sentence about a mistake in the arguments.
      FloatingPointError: the loss is not finite any more; the last good checkpoint is kept.
      SystemExit: after SIGTERM (code 0) or Ctrl-C (code 130), once the state is saved.
    """
    config = resolve(config)
    mesh = build_mesh(mesh)
    check_batch(mesh, batch_size=config["batch_size"], eval_batch_size=config["eval_batch_size"])
    workdir = prepare(workdir, config, write=is_main())
    summary = read_summary(workdir)
    if summary is None:
        begun = time.perf_counter()
        problem = load(config, Path(runs) if runs else workdir / "pretrained", mesh, progress)
        with StopRequest() as stop:
            summary = _Trainer(problem, workdir, stop, progress, begun).run()
    if progress and is_main():
        show(summary, workdir)
    return summary


def load(config: dict, runs: Path, mesh, progress: bool) -> Problem:
    """The problem, with the network it starts from if `config.pretrained` names one."""
    if "pretrained" not in config:
        return load_problem(config, mesh)
    load_problem(config, mesh)  # a mistake in the configuration must not wait for the pretraining

    def train(config, workdir):
        shown = progress and not (workdir / "summary.json").exists()  # a finished run is not news
        if shown and is_main():
            tqdm.write(f"pretraining in {workdir}")
        run(config, workdir, mesh, shown, runs)

    problem = load_problem(config, mesh, obtain(config["pretrained"], runs, mesh, train))
    check_fits(problem.converted["params"], problem.shapes["params"])
    return problem


class _Trainer:
    """One session of a run: from its newest checkpoint to its end or to a signal."""

    def __init__(self, problem: Problem, workdir: Path, stop: StopRequest, progress: bool, begun: float):
        self.problem, self.config, self.workdir, self.stop = problem, problem.config, workdir, stop
        self.session = Session(problem)
        self.macs = layer_macs(problem)
        self.book = Book()
        self.checkpoints = None
        if self.config["checkpoint_every"]:
            self.checkpoints = Checkpoints(workdir / "checkpoints", self.config["keep_checkpoints"])
        self.writer = None
        self.begun = begun
        self.total = sum(phase.length for phase in problem.phases)
        self.progress = progress and is_main()
        self.bar = None

    def run(self) -> dict[str, Any]:
        try:
            carry = self._restore() or self._start(0, None)
            bar = {"total": self.total, "initial": self.book.step, "unit": "step", "mininterval": 0.5}
            with tqdm(disable=not self.progress, **bar) as self.bar:
                for index in range(self.book.phase, len(self.problem.phases)):
                    if index > self.book.phase:
                        carry = self._start(index, carry)
                    carry = self._train_phase(carry)
            return self._finish(carry)
        finally:
            if self.writer:
                self.writer.close()
            if self.checkpoints:
                self.checkpoints.close()

    # --- where to begin ------------------------------------------------------------------------------

    def _restore(self) -> Carry | None:
        found = self.checkpoints.restore(self.session.template) if self.checkpoints else None
        carry = None
        if found:
            carry, book = found
            self.book = Book(**book)
            self.begun -= self.book.seconds
            if self.progress:
                tqdm.write(f"resuming from step {self.book.step} of {self.total}")
        if is_main():
            self.writer = MetricsWriter(self.workdir, self.book.step)
        return carry

    def _start(self, index: int, carry: Carry | None) -> Carry:
        self.book.phase = index
        self.book.phase_step = self.problem.phases[index].start
        self.book.density_steps = {}
        return self.session.start(index, carry)

    # --- training ------------------------------------------------------------------------------------

    def _train_phase(self, carry: Carry) -> Carry:
        phase, book = self.problem.phases[self.book.phase], self.book
        if book.phase_step == phase.steps:
            return carry
        if len(self.problem.phases) > 1:
            self.bar.set_description(phase.name, refresh=False)
        step, put = self.session.train_step(phase, carry.state), self.session.put
        alone = jax.process_count() == 1
        for batch in self.problem.batches(phase.steps, book.phase_step):
            carry = carry._replace(state=step(carry.state, put(batch)))
            book.phase_step += 1
            book.step += 1
            self.bar.update()
            due = self._due(phase)
            stopping = self.stop.signal if alone else "log" in due and self.stop.agreed()
            if due or stopping:
                carry = self._boundary(phase, carry, due, stopping)
        return carry

    def _due(self, phase) -> tuple[str, ...]:
        step, last = self.book.phase_step, self.book.phase_step == phase.steps

        def at(name):
            every = self.config[name]
            return last if every == 0 else last or step % every == 0

        evaluate, save = at("eval_every"), self.checkpoints is not None and at("checkpoint_every")
        due = {
            "log": evaluate or at("log_every"),
            "eval": evaluate,
            "save": save,
            "anchor": step == phase.anchor,
        }
        return tuple(name for name, is_due in due.items() if is_due)

    def _boundary(self, phase, carry: Carry, due: tuple[str, ...], stopping: int) -> Carry:
        self._check_finite(carry)
        if "log" in due:
            carry = self._log(phase, carry, "eval" in due)
        if "anchor" in due:
            carry = self.session.remember(carry)
        if "save" in due or (stopping and self.checkpoints):
            self.book.seconds = time.perf_counter() - self.begun
            self.checkpoints.save(self.book.step, carry, dataclasses.asdict(self.book))
        if stopping:
            self._leave(stopping)
        return carry

    def _check_finite(self, carry: Carry) -> None:
        bad = int(carry.state.bad_step)
        if bad >= 0:
            what = f"loss stopped being finite at step {self.book.step - self.book.phase_step + bad}"
        elif not bool(all_finite(carry.state.params)):
            what = f"parameters are not finite any more at step {self.book.step}"
        else:
            return
        self._stop(what)

    def _stop(self, what: str) -> None:
        good = self.checkpoints.latest() if self.checkpoints else None
        kept = "no checkpoint had been saved" if good is None else (
            f"the last good checkpoint, of step {good}, is kept in {self.workdir / 'checkpoints'}"
        )  # fmt: skip
        raise FloatingPointError(
            f"the {what}; {kept}; the same command would stop again: change the configuration (a lower learning "
            "rate?) and take another workdir"
        )

    def _leave(self, number: int) -> None:
        if self.checkpoints:
            self.checkpoints.close()
            advice = "saved; run the same command again to resume"
        else:
            advice = "nothing is saved because config.checkpoint_every is 0"
        if is_main():
            tqdm.write(f"stopped at step {self.book.step} of {self.total}: {advice}")
        raise SystemExit(StopRequest.exit_code(number))

    # --- logging -------------------------------------------------------------------------------------

    def _log(self, phase, carry: Carry, evaluate: bool) -> Carry:
        state, book = carry.state, self.book
        own = get_masks(state.opt_state)
        masks = self.session.masks(state)
        found = measure_masks(masks, carry.logged, find_field(state.opt_state, "fired"))
        meters = jax.device_get(state.meters)
        sparsified = [name for name, mask in flatten(own).items() if is_sparsified(mask)]
        for name, value in zip(sparsified, meters.get("density", ()), strict=True):
            book.density_steps[name] = book.density_steps.get(name, 0.0) + float(value)
        count = float(meters["count"])
        _, schedule = self.session.transform(phase)
        entry = {"step": book.step}
        if len(self.problem.phases) > 1:
            entry |= {"phase": phase.name, "phase_step": book.phase_step}
        entry |= {
            "train_loss": float(meters["loss"]) / count,
            "train_accuracy": float(meters["correct"]) / count,
        }
        entry["learning_rate"] = float(schedule(book.phase_step - 1))
        entry |= {key: found[key] for key in ("sparsity", "churn", "exploration_rate") if key in found}
        metrics = jax.device_get(find_field(state.opt_state, "metrics") or {})
        entry |= {name: float(value) for name, value in metrics.items()}
        if evaluate:
            entry |= self._evaluate(state) | {"density": found["density"]}
            if not math.isfinite(entry["test_loss"]):
                self._stop(f"test loss is not finite at step {book.step}")
            book.last = entry
        if self.problem.dataset.classes is None:
            entry.pop("train_accuracy")
        if self.writer:
            self.writer.write(entry)
        if book.phase_step == phase.steps:
            book.history.append(self._record(phase, entry, state))
        self._show(entry)
        fresh = self.session.place_like(zero_meters(own), state.meters)
        return carry._replace(state=state._replace(meters=fresh), logged=copy_tree(masks))

    def _evaluate(self, state) -> dict[str, float]:
        found = {}
        for split in ("validation", "test"):
            if getattr(self.problem.dataset, split) is not None:
                measured = self.session.evaluate(state, split)
                found |= {f"{split}_{name}": value for name, value in measured.items()}
        return found

    def _record(self, phase, entry, state) -> dict[str, Any]:
        mean = {name: value / phase.length for name, value in self.book.density_steps.items()}
        backward = find_field(state.opt_state, "backward_masks")
        backward = None if backward is None else densities(to_host(backward))
        ratio = training_flops(self.macs, phase.method, mean, backward)
        record = {"name": phase.name, "steps": phase.length, "train_flops_ratio": ratio}
        return record | {
            key: entry[key] for key in ("sparsity", "test_loss", "test_accuracy") if key in entry
        }

    def _show(self, entry) -> None:
        shown = {"loss": f"{entry['train_loss']:.3f}"}
        if "test_accuracy" in entry:
            shown["test"] = f"{entry['test_accuracy']:.2%}"
        self.bar.set_postfix(shown, refresh=False)

    # --- the end -------------------------------------------------------------------------------------

    def _finish(self, carry: Carry) -> dict[str, Any]:
        self.book.seconds = time.perf_counter() - self.begun
        summary = summarise(self.session, carry, self.book)
        if is_main():
            if self.config["curves"]:
                draw(self.workdir, summary)
            write_summary(self.workdir, summary)
        return summary
