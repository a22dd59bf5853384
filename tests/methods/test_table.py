"""The names and combinations of methods."""

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.methods.table import METHODS, find_method


def test_methods_combine():
    both = find_method("dora+ggpo")
    assert both.title == "DoRA + GGPO (relative rule)"
    assert both.settings == {"adapter.use_dora": True, **find_method("ggpo").settings}
    assert both.tuned == find_method("ggpo").tuned
    assert find_method("pissa+ggpo").learning_rate == find_method("pissa").learning_rate
    assert find_method("low-rank+half-epochs").factors == {
        **find_method("low-rank").factors,
        **find_method("half-epochs").factors,
    }
    assert len({method.name for method in METHODS}) == len(METHODS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dorra", "did you mean dora"),
        ("?", "the methods are lora, "),
        ("pissa+eva", "PiSSA and EVA both set adapter.init_lora_weights"),
        ("full+dora", "full fine-tuning and DoRA both set adapter;"),
        ("ggpo+flat-lora", "both set ggpo.rule"),
        ("full+low-rank", "both set adapter;"),
    ],
)
def test_methods_that_cannot_be(name, message):
    with pytest.raises(UserError, match=message):
        find_method(name)
