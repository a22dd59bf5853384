"""Real text in, clean splits out: bundled sets, local files, hub datasets.

Data that cannot be used is a UserError, whose message says where it is wrong and what to do.
"""

from lora_ggpo.data.bundled import BUNDLED
from lora_ggpo.data.completion import CompletionReader
from lora_ggpo.data.config import DataConfig
from lora_ggpo.data.labels import LabelReader
from lora_ggpo.data.load import Splits, digest

__all__ = ["BUNDLED", "CompletionReader", "DataConfig", "LabelReader", "Splits", "digest"]
