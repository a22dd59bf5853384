"""Axes of a grid, as they are written on the command line."""

import re

import pytest

from lora_ggpo.comparison.axes import (
    NO_ADAPTER,
    axes_of,
    parse_axes,
    recipe_values,
    refuse_dropped,
    refuse_fixed,
    setting_name,
    settings_of,
    short_names,
)
from lora_ggpo.errors import UserError
from lora_ggpo.methods.table import RECIPE, Method, find_method
from lora_ggpo.recipe.source import parse_source


def test_all_combinations_by_name():
    axes = parse_axes(["adapter.r=1,16", "data.label_noise=0, 0.3"], "--axis")
    assert axes == {"adapter.r": (1, 16), "data.label_noise": (0, 0.3)}
    settings = settings_of(axes)
    assert list(settings) == [f"r={r}, label_noise={noise}" for r in (1, 16) for noise in (0, 0.3)]
    assert settings["r=16, label_noise=0.3"] == {"adapter.r": 16, "data.label_noise": 0.3}
    assert axes_of(settings.values()) == {"adapter.r": [1, 16], "data.label_noise": [0, 0.3]}
    assert settings_of({}) == {"": {}}


def test_joined_settings_take_the_same_value():
    axes = parse_axes(["adapter.r+adapter.lora_alpha=0,8"], "--axis")
    settings = settings_of(axes)
    assert list(settings) == ["r=0", "r=8"]
    assert recipe_values(settings["r=8"]) == {"adapter.r": 8, "adapter.lora_alpha": 8}
    assert recipe_values(settings["r=0"]) == NO_ADAPTER


def test_values_are_yaml():
    axes = parse_axes(["training.learning_rate=1e-4,0.001", "ggpo.rule=paper,null,true"], "--axis")
    assert axes == {"training.learning_rate": (1e-4, 0.001), "ggpo.rule": ("paper", None, True)}


def test_names_are_as_short_as_they_can_be():
    names = short_names(["sam.rho", "mgpo.rho", "adapter.r", "dtype"])
    assert list(names.values()) == ["sam.rho", "mgpo.rho", "r", "dtype"]
    assert setting_name({"sam.rho": 1}, ["sam.rho", "data.train_size"]) == "rho=1"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["adapter.r"], "'adapter.r' is not of the form key=value,value, such as adapter.r=1,4,16"),
        (["=1"], "is not of the form"),
        (["adapter.r=4,"], "is not of the form"),
        (["adapter.r=4", "adapter.r=8"], "--axis adapter.r is given twice"),
        (["adapter.r=4", "adapter.lora_alpha+adapter.r=8"], "--axis adapter.r is given twice"),
        (["adapter.r+=4"], "is not of the form"),
        (["adapter.r+seeds=4"], "--axis seeds is no setting that can vary"),
        (["seeds=1,2"], "--axis seeds is no setting that can vary; use --seeds"),
        (["score_test=true,false"], "can vary; leave it out"),
        (["data.source=[a"], "is not a YAML value"),
    ],
)
def test_what_is_no_axis(texts, message):
    with pytest.raises(UserError, match=message):
        parse_axes(texts, "--axis")


def test_keys_can_be_held_to_a_section():
    with pytest.raises(UserError, match=r"of the form data\.key=value,value, such as data\.label_noise=0,0\.3"):
        parse_axes(["adapter.r=4"], "--vary", within="data.")


@pytest.mark.parametrize(
    ("method", "key", "message"),
    [
        ("lora", "ggpo.sigma", "--axis ggpo.sigma cannot vary with method lora, which sets ggpo to null; leave"),
        ("lora", "ggpo", "which sets ggpo to null"),
        ("lora", "adapter.use_dora", "which sets adapter.use_dora to false"),
        ("full", "adapter.r", "which sets adapter to null"),
        ("full", "data.label_noise+adapter.r", "which sets adapter to null"),
        ("ggpo", "ggpo.rule", "which sets ggpo.rule to relative"),
        ("ggpo", "ggpo", "which sets ggpo.rule to relative"),
        ("dora+ggpo", "ggpo.beta", r"method dora\+ggpo, which sets ggpo.beta to 0.5"),
        ("lora", "adapter.monteclora_config.num_samples", "which sets adapter.monteclora_config to null"),
        ("lora-plus", "optimizer.kind", "which sets optimizer.kind to lora-plus"),
    ],
)
def test_what_a_method_leaves_no_choice_of(method, key, message):
    with pytest.raises(UserError, match=message):
        refuse_fixed(find_method(method), [key], "--axis")


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("lora", "adapter.r"),
        ("lora", "training.learning_rate"),
        ("full", "data.train_size"),
        ("ggpo", "ggpo.sigma"),
        ("ggpo", "ggpo.noise"),
        ("mgpo", "mgpo.rho"),
        ("bi-lora", "bi_lora.rank"),
        ("monteclora", "adapter.monteclora_config.sample_scaler"),
        ("lora-sam", "sam.rho"),
        ("lora-plus", "optimizer.lr_ratio"),
    ],
)
def test_what_a_method_leaves_open(method, key):
    refuse_fixed(find_method(method), [key], "--axis")


AS_IT_STANDS = Method(RECIPE, "the recipe", "", plain=False)


def test_the_recipe_leaves_everything_open():
    refuse_fixed(AS_IT_STANDS, ["ggpo.rule", "adapter.use_dora"], "--axis")


@pytest.mark.parametrize(
    "override",
    [
        *("ggpo.sigma=0.3", "ggpo=relative", "ggpo={}", "ggpo={sigma: 0.3}", "optimizer=lora-fa"),
        *("adapter.use_dora=true", "adapter={use_dora: true}", "adapter={r: 4, monteclora_config: {num_samples: 4}}"),
    ],
)
def test_an_override_that_no_method_takes_is_refused(override):
    """It would be dropped: every method begins as plain LoRA."""
    source, methods = parse_source("", "recipe", [override]), [find_method("lora"), find_method("ggpo")]
    with pytest.raises(
        UserError, match=f"^override '{re.escape(override)}' would change nothing: .* add recipe to --methods"
    ):
        refuse_dropped(source, methods)
    refuse_dropped(source, [*methods, AS_IT_STANDS])


@pytest.mark.parametrize(
    "override", ["ggpo=null", "adapter.type=lora", "adapter.r=4", "adapter={r: 4}", "adapter.lora_dropout=0.2"]
)
def test_an_override_that_methods_take_or_agree_with(override):
    refuse_dropped(parse_source("", "recipe", [override]), [find_method("lora"), find_method("ggpo")])
