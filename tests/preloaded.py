"""What `tests.processes` imports once, so that its processes need not."""

import gc

import datasets
import matplotlib.pyplot
import peft
import sklearn.metrics
import torch
import transformers.trainer

import lora_ggpo.cli
import lora_ggpo.training.run
from tests import quick

__all__ = ["datasets", "lora_ggpo", "matplotlib", "peft", "quick", "sklearn", "torch", "transformers"]

gc.collect()
gc.freeze()  # see conftest.py
