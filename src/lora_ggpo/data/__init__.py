"""Real text in, clean splits out: bundled sets, local files, hub datasets."""

from lora_ggpo.data.bundled import BUNDLED
from lora_ggpo.data.config import DataConfig
from lora_ggpo.data.load import Splits, digest, load_classification, load_completion, load_regression

__all__ = ["BUNDLED", "DataConfig", "Splits", "digest", "load_classification", "load_completion", "load_regression"]
