"""Tasks: how data is loaded, how text becomes tokens, and how a model is scored on them.

A new task is one file with a subclass of `Task`, and one row of `TASKS`. What does not fit a task is a UserError.
"""

from lora_ggpo.statistics.measured import Measured
from lora_ggpo.tasks.base import NO_LOSS, Task
from lora_ggpo.tasks.config import TASKS, TaskConfig
from lora_ggpo.tasks.sft import SFT

__all__ = ["NO_LOSS", "SFT", "TASKS", "Measured", "Task", "TaskConfig"]
