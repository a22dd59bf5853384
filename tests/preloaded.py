"""What `tests.processes` imports once, so that its processes need not."""

import datasets
import matplotlib.pyplot
import peft
import sklearn.metrics
import torch
import transformers.trainer

import lora_ggpo.cli
import lora_ggpo.training.run

__all__ = ["datasets", "lora_ggpo", "matplotlib", "peft", "sklearn", "torch", "transformers"]
