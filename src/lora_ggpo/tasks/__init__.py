"""Tasks: how text becomes tokens, and how a model is scored on them."""

from lora_ggpo.tasks.config import Metric, TaskConfig
from lora_ggpo.tasks.encode import collator, encode
from lora_ggpo.tasks.evaluate import evaluate, predict, predict_values, prediction_metrics

__all__ = ["Metric", "TaskConfig", "collator", "encode", "evaluate", "predict", "predict_values", "prediction_metrics"]
