"""Methods from names and keywords, as configs give them."""

import pytest

from sparsejax import compress


def test_methods_build_on_methods():
    assert compress.build("dsnot", initial="sparsegpt").name == compress.dsnot(compress.sparsegpt()).name
    nested = compress.build("rtn", initial={"name": "wanda"}, bits=3)
    assert nested.name == "wanda+rtn3"
    assert compress.build("pv_tuning", distil={"k": 2}).name == "pv_tuning"


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("rtn", {"initial": "flap"}, "initial of method 'rtn' must be a layer-wise method, got 'flap'"),
        ("stun", {"method": "flap"}, "method of method 'stun' must be a layer-wise method, got 'flap'"),
        (
            "rtn",
            {"initial": {"scope": "row"}},
            "initial of method 'rtn' must have the name of a method, got {'scope'",
        ),
        ("sparsegpt", {"damping": "x"}, "method 'sparsegpt' cannot take {'damping': 'x'}"),
        ("rtn", {"initial": "wand"}, "unknown method 'wand'; did you mean 'wanda'"),
        ("pv_tuning", {"distil": {"top": 2}}, "distil must be keywords of topkld"),
    ],
)
def test_bad_keywords_are_one_sentence(name, keywords, message):
    with pytest.raises(ValueError, match=message):
        compress.build(name, **keywords)
