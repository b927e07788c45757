"""Trees are packed leaf by leaf, in the format that their masks suggest, and the report says why."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen

import sparsejax
from sparsejax import flops, formats, nn, patterns
from sparsejax.formats import BitmapArray, BlockSparseArray, CSRArray, NMArray


def scores(shape, seed=0):
    return jax.random.uniform(jax.random.key(seed), shape)


UNSTRUCTURED = patterns.Unstructured()
# shape, mask (made when the test runs), format and a piece of the reason
PICKS = {
    "2:4": (
        (64, 48),
        lambda: patterns.NM(2, 4).mask(scores((64, 48))),
        "2:4",
        "2 of every 4 along axis -2 are kept",
    ),
    "1:4": ((64, 48), lambda: patterns.NM(1, 4).mask(scores((64, 48))), "1:4", "1 of every 4"),
    "4:8": ((64, 48), lambda: patterns.NM(4, 8).mask(scores((64, 48))), "4:8", "4 of every 8"),
    "1:16": ((3, 3, 32, 8), lambda: patterns.NM(1, 16).mask(scores((3, 3, 32, 8))), "1:16", "1 of every 16"),
    "N:M along outputs": (
        (32, 64),
        lambda: patterns.NM(2, 4, -1).mask(scores((32, 64))),
        "bitmap",
        "50.0% kept",
    ),
    "blocks": (
        (128, 96),
        lambda: patterns.Block((16, 32)).mask(scores((128, 96)), 0.75),
        "block:16x32",
        "25.0% of the blocks are kept",
    ),
    # one of four blocks in every column is also 16:64 and the like: blocks go first
    "regular blocks": (
        (64, 32),
        lambda: jnp.kron(jnp.eye(4), jnp.ones((16, 8))).astype(bool),
        "block:16x8",
        "25.0% of the blocks are kept, 25.0% with padding",
    ),
    "many blocks": (
        (128, 96),
        lambda: patterns.Block((16, 32)).mask(scores((128, 96)), 0.25),
        "bitmap",
        "75.0% kept",
    ),
    "small blocks": (
        (64, 64),
        lambda: patterns.Block((4, 4)).mask(scores((64, 64)), 0.75),
        "bitmap",
        "25.0% kept",
    ),
    # block-ELL would pad every column to the full one
    "a full column of blocks": (
        (128, 128),
        lambda: jnp.zeros((128, 128), bool).at[:, :16].set(True).at[16:32, 16:32].set(True),
        "bitmap",
        "the smallest of dense 65,536, bitmap 11,264, csr 14,340 bytes",
    ),
    "unstructured": ((64, 48), lambda: UNSTRUCTURED.mask(scores((64, 48)), 0.5), "bitmap", "50.0% kept"),
    "very sparse": ((64, 512), lambda: UNSTRUCTURED.mask(scores((64, 512)), 0.99), "csr", "1.0% kept"),
    "hardly sparse": ((64, 48), lambda: UNSTRUCTURED.mask(scores((64, 48)), 0.01), "dense", "99.0% kept"),
    "all kept": ((8, 8), lambda: jnp.ones((8, 8), bool), "dense", "100.0% kept"),
    "none kept": ((512, 256), lambda: jnp.zeros((512, 256), bool), "csr", "0.0% kept"),
    "a vector": ((100,), lambda: UNSTRUCTURED.mask(scores((100,)), 0.9), "bitmap", "10.0% kept"),
    "no entries": ((0, 4), lambda: jnp.zeros((0, 4), bool), "dense", "it has no entries"),
    "scalar mask": ((8, 8), lambda: jnp.asarray(True), "dense", "not sparsified"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICKS)
def test_the_pick_and_its_reason(name):
    shape, mask, format, reason = PICKS[name]
    mask = mask()
    w = jax.random.normal(jax.random.key(1), shape)
    packed, report = sparsejax.pack({"kernel": w}, {"kernel": mask})
    (record,) = report
    assert (record.path, record.format) == ("kernel", format) and reason in record.reason
    if format == "dense":
        assert isinstance(packed["kernel"], jax.Array) and record.packed_bytes == record.dense_bytes
    else:
        assert packed["kernel"].format == format
        assert record.packed_bytes == packed["kernel"].nbytes < record.dense_bytes == w.nbytes
    chex.assert_trees_all_equal(
        sparsejax.unpack(packed), sparsejax.apply_masks({"kernel": w}, {"kernel": mask})
    )
    single = formats.pack(w, mask)
    assert type(single) is type(packed["kernel"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(16, 4), (60, 70), (1, 300), (300, 1)])
def test_unstructured_leaves_take_the_smallest_format(shape, dtype):
    w = jnp.ones(shape, dtype)
    for sparsity in (0.0, 0.02, 0.3, 0.75, 0.93, 0.96, 0.99):
        mask = UNSTRUCTURED.mask(scores(shape, 3), sparsity)
        packed, report = sparsejax.pack({"kernel": w}, {"kernel": mask})
        if isinstance(packed["kernel"], (NMArray, BlockSparseArray)):
            continue  # by chance: one column of 300 is an N:M mask if it has the right count
        sizes = [w.nbytes, *(formats.pack(w, mask, format).nbytes for format in ("bitmap", "csr"))]
        assert report.packed_bytes == min(sizes)


def test_predicted_bytes_are_reached():
    # N:M and blocks are taken only if smaller than dense: 7:8 in two bytes takes more
    mask = patterns.NM(7, 8).mask(scores((64, 8)))
    for dtype, kind in ((jnp.bfloat16, "bitmap"), (jnp.float32, "7:8")):
        _, report = sparsejax.pack({"kernel": jnp.ones((64, 8), dtype)}, {"kernel": mask})
        assert report[0].format == kind
    assert formats.pack(jnp.ones((64, 8), jnp.bfloat16), mask, "7:8").nbytes > 64 * 8 * 2


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.Dense(32)(x.reshape(len(x), -1))
        return nn.Dense(10)(linen.relu(x))


def net():
    model, x = Net(), jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    params = model.init(jax.random.key(1), x)["params"]
    masks = sparsejax.masks.dense_masks(params)
    masks["Conv_0"]["kernel"] = patterns.NM(2, 4).mask(jnp.abs(params["Conv_0"]["kernel"]))
    masks["Dense_0"]["kernel"] = UNSTRUCTURED.mask(jnp.abs(params["Dense_0"]["kernel"]), 0.98)
    masks["Dense_1"]["kernel"] = patterns.Block((8, 10)).mask(jnp.abs(params["Dense_1"]["kernel"]), 0.75)
    return model, params, masks, x


@pytest.mark.slow
def test_a_model_is_packed_and_unpacked():
    model, params, masks, x = net()
    packed, report = sparsejax.pack(params, masks)
    assert [type(packed[name]["kernel"]) for name in ("Conv_0", "Dense_0", "Dense_1")] == [
        NMArray,
        CSRArray,
        BlockSparseArray,
    ]
    assert packed["Conv_0"]["bias"] is params["Conv_0"]["bias"]
    expected = model.apply({"params": params, "masks": masks}, x)
    found = jax.jit(lambda packed: model.apply({"params": sparsejax.unpack(packed)}, x))(packed)
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    kept = formats.unpack_masks(packed)
    assert jax.tree.structure(kept) == jax.tree.structure(masks)
    chex.assert_trees_all_equal(kept, masks)
    assert [record.path for record in report] == list(sparsejax.masks.flatten(params))
    assert report.dense_bytes == flops.bytes_dense(params)
    assert report.packed_bytes == flops.bytes_dense(packed) < report.dense_bytes


def test_the_report_is_a_table():
    _, params, masks, _ = net()
    lines = str(sparsejax.pack(params, masks)[1]).splitlines()
    assert len(lines) == 1 + len(jax.tree.leaves(params)) + 1
    assert re.fullmatch(r"path +format +dense bytes +packed bytes +ratio +reason", lines[0])
    row = next(line for line in lines if line.startswith("Conv_0/kernel"))
    assert re.fullmatch(r"Conv_0/kernel +2:4 +1,152 +616 +1\.87x +2 of every 4 along axis -2 are kept", row)
    assert re.fullmatch(r"total +19,016 +1,764 +10\.78x", lines[-1])
    assert len({line.find("x  ") for line in lines[1:-1]}) == 1  # columns are aligned


def test_formats_may_be_asked_for():
    _, params, masks, _ = net()
    packed, report = sparsejax.pack(params, masks, "bitmap")
    assert all(isinstance(packed[name]["kernel"], BitmapArray) for name in ("Conv_0", "Dense_0", "Dense_1"))
    assert {record.reason for record in report} == {"asked for", "not sparsified"}
    rules = {"Dense_*": "csr", "Dense_1/kernel": "block:4x2", "Conv_0/*": "dense"}
    packed, report = sparsejax.pack(params, masks, rules)
    assert [record.format for record in report if "kernel" in record.path] == ["dense", "csr", "block:4x2"]
    # a dense leaf is masked all the same
    chex.assert_trees_all_equal(sparsejax.unpack(packed), sparsejax.apply_masks(params, masks))


@pytest.mark.parametrize("source", ["2:4", "block:4x4", "bitmap", "csr"])
def test_conversions(source):
    w = jax.random.normal(jax.random.key(2), (16, 8))
    mask = jnp.kron(jnp.ones((2, 2)), jnp.kron(jnp.array([[1, 0], [0, 1]]), jnp.ones((4, 2)))).astype(bool)
    mask = mask if source != "2:4" else patterns.NM(2, 4).mask(jnp.abs(w))
    packed = formats.pack(w, mask, "block:4x2" if source == "block:4x4" else source)
    for target in ("nm", "bitmap", "csr"):
        other = formats.convert(packed, target)
        chex.assert_trees_all_equal(other.to_dense(), packed.to_dense())
        chex.assert_trees_all_equal(other.mask(), packed.mask())


def test_lists_are_arrays():
    packed = formats.pack([[1.0, 2.0]], [[True, False]], "csr")
    assert packed.to_dense().tolist() == [[1.0, 0.0]]


def test_what_cannot_be_packed():
    w, mask = jnp.ones((4, 4)), jnp.ones((4, 4), bool)
    message = "the mask of weight has shape (4,), but it must be of the weight's shape (4, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        formats.pack(w, mask[0], "dense")
    message = "weight is packed already, as csr; sparsejax.formats.convert changes the format"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        formats.pack(formats.pack(w, mask, "csr"), mask, "bitmap")


def test_bad_input():
    _, params, masks, _ = net()
    with pytest.raises(
        ValueError, match=r"^Conv_0/kernel is not 1:4 along axis -2: .* from \(0, 0, 0, 0\) keep 2$"
    ):
        sparsejax.pack(params, masks, "1:4")
    with pytest.raises(
        ValueError, match=r"^unknown format 'ell' for Conv_0/kernel \(known: dense, nm, N:M such as"
    ):
        sparsejax.pack(params, masks, "ell")
    with pytest.raises(ValueError, match="^format rule 'Dnse_0/kernel' matches no parameter"):
        sparsejax.pack(params, masks, {"Dnse_0/kernel": "csr"})
    with pytest.raises(ValueError, match="the mask of Dense_0/kernel has shape"):
        sparsejax.pack(
            params, masks | {"Dense_0": {"kernel": jnp.ones((3, 3), bool), "bias": jnp.asarray(True)}}
        )
    with pytest.raises(
        ValueError, match="^Conv_0/kernel cannot be packed as any format inside jax.jit, where"
    ):
        jax.jit(lambda params: sparsejax.pack(params, masks)[0])(params)
