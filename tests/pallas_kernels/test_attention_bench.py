"""The benches of attention and softmax run at a small size and agree with the definitions."""

import importlib

import pytest

from pallas_kernels import bench


@pytest.mark.slow
@pytest.mark.parametrize("op", ["block_sparse_attention", "softmax", "sparse_decode_attention"])
def test_benches_agree_with_the_definitions(op):
    assert op in bench.operations()
    module = importlib.import_module(f"pallas_kernels.{op}.bench")
    for case in module.cases(64)[::3]:
        result = module.run(case, repeats=1)
        assert result["op"] == op and result["case"] == case.name
        assert result["max_error"] < 1e-5, result
        assert result["flops"] > 0 and result["bytes"] > 0
        assert bench.line(result, "cpu").startswith(op)
