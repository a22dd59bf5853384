import dataclasses
import json
import math

import pytest

from lora_ggpo.perturbation import GGPOConfig

CHANGED = {
    "sigma": 0.1,
    "beta": 0.5,
    "rule": "relative",
    "noise": "dense",
    "noise_rank": 3,
    "schedule": "cosine",
    "redraw": "optimizer-step",
    "ranks": "agree",
    "seed": 7,
    "gradient": "lstsq",
    "ema": 0.9,
    "strict": True,
    "rise": 0.05,
}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"sigma": -0.1}, ">= 0"),
        ({"sigma": math.nan}, "finite"),
        ({"sigma": math.inf}, "finite"),
        ({"sigma": "0.1"}, "number"),
        ({"sigma": True}, "number"),
        ({"beta": -1}, ">= 0"),
        ({"beta": None}, "number"),
        ({"beta": 1.5, "rule": "relative"}, "[0, 1]"),
        ({"rule": "papers"}, "paper, relative, sd-scripts"),
        ({"noise": "uniform"}, "factored, dense"),
        ({"noise_rank": 0}, "integer >= 1"),
        ({"noise_rank": 2.0}, "integer >= 1"),
        ({"schedule": "step"}, "constant, cosine, linear"),
        ({"redraw": 3}, "micro-batch, optimizer-step"),
        ({"ranks": "both"}, "differ, agree"),
        ({"gradient": ["lora"]}, "lora, lstsq, sketch"),
        ({"seed": -1}, ">= 0"),
        ({"seed": 1.0}, "integer"),
        ({"seed": True}, "integer"),
        ({"ema": 1}, "[0, 1)"),
        ({"ema": -0.1}, "[0, 1)"),
        ({"strict": 1}, "true or false"),
    ],
)
def test_bad_field_gives_one_sentence_with_field_and_range(values, expected):
    with pytest.raises(ValueError, match=rf"GGPOConfig\.{next(iter(values))} must be") as caught:
        GGPOConfig(**values)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_range_of_beta_belongs_to_its_rule():
    assert GGPOConfig(beta=100.0).beta == 100.0
    assert GGPOConfig(beta=1, rule="relative").beta == 1


def test_defaults_are_the_papers():
    config = GGPOConfig()
    assert (config.sigma, config.beta, config.rule, config.schedule) == (0.03, 0.01, "paper", "constant")
    assert (config.redraw, config.ema) == ("micro-batch", 0)


def test_round_trip_through_json():
    assert set(CHANGED) == {field.name for field in dataclasses.fields(GGPOConfig)}, "a field is not covered here"
    config = GGPOConfig(**CHANGED)
    assert config != GGPOConfig()
    assert GGPOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict() == CHANGED
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sigma = 1.0


def test_from_dict_names_the_unknown_key_and_checks_values():
    with pytest.raises(ValueError, match=r"no field 'sgima'.*sigma, beta"):
        GGPOConfig.from_dict({"sgima": 0.1})
    with pytest.raises(ValueError, match=r"GGPOConfig\.sigma"):
        GGPOConfig.from_dict({"sigma": -1})


def test_noises_of_release_0_1_0_are_what_comes_closest():
    assert GGPOConfig.from_dict({"noise": "auto"}) == GGPOConfig()
    for name in ("table", "gaussian", "rademacher"):
        assert GGPOConfig(noise=name) == GGPOConfig(noise="dense")
