"""Settings that contradict themselves are refused, and say which one it is."""

import pytest
from pydantic import ValidationError

from lora_ggpo.data import DataConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label_noise", 1.0, "less than 1"),
        ("label_noise", -0.1, "greater than or equal to 0"),
        ("label_noise", float("nan"), "label_noise"),
        ("train_size", 0, "greater than 0"),
        ("validation_fraction", 0.0, "greater than 0"),
        ("test_fraction", 0.95, "validation_fraction and test_fraction must add up to less than 1"),
        ("out_of_domain", ["a.csv"], "none of them the training source"),
        ("out_of_domain", ["b.csv", "b.csv"], "must name different sources"),
        ("out_of_domain", ["b.csv", "./b.csv"], "must name different sources"),
        ("test_split", "valid", "should be 'validation'"),
        ("txet", "body", "Extra inputs"),
    ],
)
def test_bad_settings(field, value, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**{"source": "a.csv", field: value})


def test_settings_survive_json():
    config = DataConfig(source="movie-reviews", train_size=10, label_noise=0.2, out_of_domain=["amazon-reviews"])
    assert DataConfig.model_validate_json(config.model_dump_json()) == config
