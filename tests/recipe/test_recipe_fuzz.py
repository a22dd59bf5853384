"""Whatever the text of a recipe or an override is, one sentence says what is wrong with it."""

import copy
import math

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from lora_ggpo.errors import UserError
from lora_ggpo.recipe.explain import sections
from lora_ggpo.recipe.recipe import Recipe, load_recipe, parse_recipe
from lora_ggpo.recipe.source import dump_yaml

VALUES = {
    "model": "minilm",
    "task": {"kind": "classification"},
    "data": {"source": "movie-reviews"},
    "adapter": {"r": 4, "target_modules": ["query"]},
    "ggpo": {"sigma": 0.1},
    "training": {"max_steps": 3},
    "output": "runs/x",
}
TEXT = yaml.safe_dump(VALUES, sort_keys=False)
PATHS = [(*section, field) for section, model in sections(Recipe).items() for field in model.model_fields]
PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.binary(max_size=3) | st.text(max_size=8)
)
PLAIN |= st.sampled_from(["", "no", "auto", "1e5", "epoch", "all-linear", "adamw_torch", "{text}"])
KEYS = st.text(max_size=5) | st.integers() | st.booleans() | st.none()
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
TAGS = "int float bool null timestamp binary set omap pairs str python/object:x"
PIECES = [f"!!{tag} " for tag in TAGS.split()] + ["!x ", "&a ", "*a", "<<: ", "[", "{", "]", "}", "- ", "? ", ": "]
PIECES += ["2001-99-99", "0x_", "0b_", "1:99", "__", "\n", "  ", "1e999", "---", "...", "%YAML 1.1", "\ufeff", "\x00"]
PIECES += ["model: ", "task: ", "a", "1"]
CHARACTERS = st.text(alphabet="&*!<>|-?:,[]{}#'\"\\%@` \n\tab01.e_x~=\x00é\u2028", max_size=30)
SCRAPS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | CHARACTERS


def accepted(read, *arguments):
    """What `read` gives, or None where it says in one line what is wrong."""
    try:
        return read(*arguments)
    except UserError as error:
        message = str(error)
    assert message.isprintable()
    return None


@given(SCRAPS)
@example("a: " + "[" * 1000)
@example("{a: " * 1000)
@example("a: &x [*x]")
@example("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]")
@example("%YAML 1." + "9" * 5000)
@example("model: " + "9" * 5000)
@example('"a\\nb": 1')
def test_text(text):
    accepted(parse_recipe, text, "r.yaml")


@given(st.binary(max_size=40))
def test_bytes(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(content)
    accepted(load_recipe, file)


@given(st.lists(st.tuples(st.integers(0, len(TEXT)), st.integers(0, 6), SCRAPS), min_size=1, max_size=3))
def test_edits_of_a_recipe(edits):
    text = TEXT
    for at, cut, new in edits:
        text = text[:at] + new + text[at + cut :]
    accepted(parse_recipe, text, "r.yaml")


@given(st.lists(st.tuples(st.sampled_from(PATHS), ANYTHING), min_size=1, max_size=2))
@example([(("adapter", "arrow_config"), {})])
@example([(("training", "deepspeed"), {"a": b"\xff"})])
@example([(("training", "learning_rate"), math.nan)])
def test_values_of_settings(changes):
    """What is accepted can be written into the run folder and read from there."""
    values = copy.deepcopy(VALUES)
    for path, value in changes:
        section = values
        for key in path[:-1]:
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section = section[key]
        section[path[-1]] = value
    recipe = accepted(parse_recipe, yaml.safe_dump(values, allow_unicode=True), "r.yaml")
    if recipe:
        resolved = recipe.resolved(0)
        assert repr(parse_recipe(dump_yaml(resolved), "again").resolved(0)) == repr(resolved)


@given(st.lists(st.sampled_from([".".join(path) for path in PATHS]) | st.text(max_size=6), max_size=2), SCRAPS)
@example(["training.max_steps"], "2001-99-99")
@example(["model"], "[" * 1000)
def test_overrides(keys, value):
    accepted(parse_recipe, TEXT, "r.yaml", [f"{'.'.join(keys)}={value}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 2001-99-99", "r.yaml, line 1: this is not valid YAML: this cannot be read as timestamp; put it in quotes"),
        ("x: 1\na: !!int b", "r.yaml, line 2: this is not valid YAML: this cannot be read as int"),
        (
            "a: &b [1]\nc: *b",
            "r.yaml, line 2: this is not valid YAML: an alias (*name) is not read; write the value out",
        ),
        ("a: " + "[" * 1000, "r.yaml is not a recipe: its values are nested too deeply."),
        ("a: \x1b[2J", "r.yaml is not valid YAML: unacceptable character #x001b"),
        ("a: !!binary aGk=", "could not determine a constructor for the tag 'tag:yaml.org,2002:binary'"),
    ],
)
def test_what_pyyaml_does_not_catch_is_said_in_its_place(text, message):
    with pytest.raises(UserError) as error:
        parse_recipe(text, "r.yaml")
    assert message in str(error.value)
