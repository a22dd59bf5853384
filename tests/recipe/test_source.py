import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.recipe.source import parse_source

TEXT = """\
model: minilm
task: classification
training:
  learning_rate: 5e-4
  max_steps: 3
seeds: [0,
  1]
"""


def test_lines_of_keys_and_items():
    source = parse_source(TEXT, "r.yaml")
    assert source.where(("training", "max_steps")) == "r.yaml, line 5"
    assert source.where(("seeds", 1)) == "r.yaml, line 7"
    assert source.where(("training", "absent")) == "r.yaml, line 3"
    assert source.where(("absent",)) == "r.yaml"


def test_numbers_and_shorthands():
    values = parse_source(TEXT, "r.yaml").values
    assert values["training"]["learning_rate"] == 5e-4  # YAML 1.1, PyYAML's, would read a string
    assert values["task"] == {"kind": "classification"}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.learning_rate=1e-3", ("training", "learning_rate"), 1e-3),
        ("ggpo.sigma=0.1", ("ggpo", "sigma"), 0.1),
        ("seeds=[3, 4]", ("seeds",), [3, 4]),
        ("training=null", ("training",), None),
        ("task=sft", ("task", "kind"), "sft"),
        ("task.max_length=9", ("task", "max_length"), 9),
        ("data.text=a=b", ("data", "text"), "a=b"),
    ],
)
def test_overrides(override, path, value):
    source = parse_source(TEXT, "r.yaml", [override])
    found = source.values
    for key in path:
        found = found[key]
    assert found == value
    assert source.where(path) == f"override {override!r}"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("model: a\nmodel: b", [], r"r.yaml, line 2: model is set a second time \(first on line 1\)"),
        ("a: [1", [], r"r.yaml, line 1: this is not valid YAML"),
        ("- a", [], "a recipe is a YAML mapping"),
        ("a: !!python/object:os.system x", [], "r.yaml, line 1: this is not valid YAML"),
        (TEXT, ["steps"], "'steps' is not of the form key=value"),
        (TEXT, ["=3"], "is not of the form key=value"),
        (TEXT, ["model.size=3"], "model is 'minilm', which has no settings inside"),
        (TEXT, ["model=[1"], "is not a YAML value"),
    ],
)
def test_bad_text(text, overrides, message):
    with pytest.raises(UserError, match=message):
        parse_source(text, "r.yaml", overrides)
