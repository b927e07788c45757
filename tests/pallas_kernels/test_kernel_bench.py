"""The benches run at a small size, agree with dense, and print what they promise."""

import importlib
import json
import math
import runpy
import sys
import time

import pytest

from pallas_kernels import bench, timing

KEYS = ["op", "case", "ours_ms", "dense_ms", "ratio_dense", "peer", "peer_ms", "ratio_peer", "max_error"]


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["bench", *args])
    runpy.run_module("pallas_kernels.bench", run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_operations_are_found_by_their_folders():
    assert {"block_sparse_matmul", "nm_matmul", "sampled_matmul"} <= set(bench.operations())


@pytest.mark.slow
@pytest.mark.parametrize("op", ["block_sparse_matmul", "csr_matmul", "nm_matmul", "sampled_matmul"])
def test_every_case_agrees_with_dense(op):
    module = importlib.import_module(f"pallas_kernels.{op}.bench")
    seen = set()
    for case in module.cases(64):
        kind = tuple(case.get(key) for key in ("gradients", "balanced", "block", "n"))
        if kind in seen:
            continue
        seen.add(kind)
        result = module.run(case, repeats=1)
        assert list(result)[:9] == KEYS and result["op"] == op
        assert result["max_error"] < 1e-5, result
        assert result["ratio_dense"] == pytest.approx(result["dense_ms"] / result["ours_ms"])
        assert result["peer"] is None or result["ratio_peer"] == pytest.approx(
            result["peer_ms"] / result["ours_ms"]
        )


def test_the_command_line(monkeypatch, capsys):
    module = importlib.import_module("pallas_kernels.sampled_matmul.bench")
    monkeypatch.setattr(module, "cases", lambda size: iter([CASE | {"size": size}]))
    (found,) = run(monkeypatch, capsys, "sampled_matmul", "--json", "--size=32", "--repeats=1")
    found = json.loads(found)
    assert list(found)[:9] == KEYS and found["case"] == "entries, 10.0% of 32x32, inner 4"
    (text,) = run(monkeypatch, capsys, "sampled_matmul", "--size=32", "--repeats=1")
    assert text.startswith("sampled_matmul") and "dense" in text and "BCOO" in text


def test_the_table_names_the_device_and_has_a_line_a_case(monkeypatch, capsys, tmp_path):
    module = importlib.import_module("pallas_kernels.sampled_matmul.bench")
    monkeypatch.setattr(module, "cases", lambda size: iter([CASE | {"size": 16}, CASE | {"size": 32}]))
    run(monkeypatch, capsys, "sampled_matmul", "--repeats=1", f"--table={tmp_path / 'here.md'}")
    text = (tmp_path / "here.md").read_text().splitlines()
    assert text[0].startswith("# The kernels on cpu, ") and text[0].endswith(" cores")
    assert [line.split(" | ")[1] for line in text if line.startswith("| `sampled_matmul`")] == [
        "entries, 10.0% of 16x16, inner 4",
        "entries, 10.0% of 32x32, inner 4",
    ]
    assert len({line.count("|") for line in text if line.startswith("|")}) == 1


CASE = {"inner": 4, "dtype": "float32", "block": None, "density": 0.1}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["matmul"], "unknown operation 'matmul' (known: "),
        (["--repeats=0"], "--repeats must be at least 1, got 0"),
        (["--size=0"], "--size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(args, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *args)
    assert message in capsys.readouterr().err


def test_a_sample_is_as_many_calls_as_take_a_while():
    seen = []

    def slow():
        seen.append("slow")
        time.sleep(2e-3 * timing.SAMPLE)

    fast = timing.waiting(lambda: seen.append("fast"))
    times = timing.measure({"slow": slow, "fast": fast}, repeats=2)
    assert seen.count("slow") == 4 and times["slow"] >= 2 * timing.SAMPLE  # to compile, to count, and twice
    assert seen.count("fast") > 100 and times["fast"] < 0.1


def test_four_significant_digits():
    numbers = 0.0281234, 1.23456, 99.99123, 12345.67, 0.0
    assert list(map(timing.four_digits, numbers)) == ["0.02812", "1.235", "99.99", "12346", "0.000"]


def test_errors_are_relative_to_the_largest_entry():
    assert timing.max_error([1.0, 2.0], [1.0, 4.0]) == 0.5
    assert timing.max_error([], []) == 0


def test_the_roofline_is_what_takes_longer():
    result = {"flops": 989e9, "bytes": 1.0, "ours_ms": 2.0}
    assert math.isclose(bench.roofline(result, "NVIDIA H200"), 0.5)
    assert math.isclose(bench.roofline(result | {"bytes": 4.8e9}, "NVIDIA H200"), 0.5)
    assert math.isclose(bench.roofline(result | {"bytes": 9.6e9}, "NVIDIA H200"), 1)
    assert bench.roofline(result, "cpu") is None
