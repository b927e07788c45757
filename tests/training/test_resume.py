"""Interrupted runs end with the bits of uninterrupted ones."""

import json
import random
import shutil
import signal
import time

import pytest

from sparsejax import training
from sparsejax.training.problem import Problem

HASHES = ("params_sha256", "masks_sha256")


def assert_same(first, second, folders):
    assert [first[key] for key in HASHES] == [second[key] for key in HASHES]
    a, b = ((folder / "metrics.jsonl").read_bytes() for folder in folders)
    assert a == b


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """`(summary, workdir)` of the tiny run, finished in one go."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return training.run(tiny(), workdir, progress=False), workdir


@pytest.fixture
def unfinished(uninterrupted, tmp_path):
    """A copy of that run, killed between its last checkpoint and its summary."""
    workdir = tmp_path / "unfinished"
    shutil.copytree(uninterrupted[1], workdir)
    (workdir / "summary.json").unlink()
    return workdir


def test_crashes_leave_no_trace(tiny, uninterrupted, tmp_path, crash_after):
    whole, folder = uninterrupted
    for batches in (7, 33, 39):  # from steps 0, 0 and 20
        with crash_after(batches):
            training.run(tiny(), tmp_path, progress=False)
    resumed = training.run(tiny(), tmp_path, progress=False)
    assert_same(whole, resumed, (folder, tmp_path))


def test_crash_between_last_checkpoint_and_summary(tiny, uninterrupted, unfinished):
    whole, folder = uninterrupted
    again = training.run(tiny(), unfinished, progress=False)
    assert {key for key in whole if whole[key] != again[key]} <= {"seconds"}
    assert_same(whole, again, (folder, unfinished))


def damage(folder, how):
    """Truncates, empties or zeroes the largest array file of a checkpoint."""
    largest = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    size = largest.stat().st_size
    largest.write_bytes(
        {"truncated": largest.read_bytes()[: size // 2], "empty": b"", "zeros": bytes(size)}[how]
    )


@pytest.mark.parametrize("how", ["truncated", "empty", "zeros", "missing"])
def test_damaged_newest_checkpoint_is_skipped(tiny, uninterrupted, unfinished, caplog, how):
    newest = unfinished / "checkpoints" / "60"
    if how == "missing":
        shutil.rmtree(newest / "tree")
    else:
        damage(newest, how)
    resumed = training.run(tiny(), unfinished, progress=False)
    assert "checkpoint 60 is damaged and is skipped" in caplog.text
    assert_same(uninterrupted[0], resumed, (uninterrupted[1], unfinished))


def test_all_checkpoints_damaged_starts_again(tiny, uninterrupted, unfinished, caplog):
    for checkpoint in (unfinished / "checkpoints").iterdir():
        damage(checkpoint, "truncated")
    resumed = training.run(tiny(), unfinished, progress=False)
    assert caplog.text.count("is damaged and is skipped") == 2
    assert_same(uninterrupted[0], resumed, (uninterrupted[1], unfinished))


def test_signal_handlers_are_restored(tiny, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    training.run(tiny(steps=2, checkpoint_every=0), tmp_path, progress=False)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_saves_and_resumes(tiny, uninterrupted, tmp_path, monkeypatch, capsys, number, code):
    whole, folder = uninterrupted
    original = Problem.batches

    def batches(self, steps, start=0):
        for index, batch in enumerate(original(self, steps, start), start):
            if index == 37:
                signal.raise_signal(number)
            yield batch

    with monkeypatch.context() as context, pytest.raises(SystemExit) as leaving:
        context.setattr(Problem, "batches", batches)
        training.run(tiny(), tmp_path, progress=False)
    assert leaving.value.code == code
    assert "stopped at step 38 of 60: saved; run the same command again to resume" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "38").is_dir()
    assert_same(whole, training.run(tiny(), tmp_path, progress=False), (folder, tmp_path))


# --- real processes ----------------------------------------------------------------------------------

FAST = (
    "--config.steps=1500",
    "--config.checkpoint_every=60",
    "--config.log_every=50",
    "--config.curves=False",
)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_at_random_moments(command, tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    whole = command(folders[0], *FAST)
    output, errors = whole.communicate()
    assert whole.returncode == 0, errors
    for attempt in range(3):
        process = command(folders[1], *FAST)
        if attempt:
            wait_for(lambda: list((folders[1]).glob("checkpoints/[0-9]*")), process)
        else:
            wait_for((folders[1] / "metrics.jsonl").exists, process)
        time.sleep(random.uniform(0.0, 2.0))
        process.kill()
        process.communicate()
    process = command(folders[1], *FAST)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert_same(first, second, folders)


@pytest.mark.slow
def test_sigterm_exits_zero_and_other_config_two(command, tmp_path):
    process = command(tmp_path, *FAST, "--config.steps=100000")
    wait_for(lambda: list(tmp_path.glob("checkpoints/[0-9]*")), process)
    process.terminate()
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "run the same command again to resume" in output
    other = command(tmp_path, *FAST, "--config.steps=200000")
    output, errors = other.communicate()
    assert other.returncode == 2
    assert "steps: 100000 -> 200000" in errors and "Traceback" not in errors
