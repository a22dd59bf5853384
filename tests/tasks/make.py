"""Tasks for tests."""

from lora_ggpo.tasks import TaskConfig


def task(**fields):
    """The task with these settings, of data whose labels do not matter."""
    return TaskConfig(**fields).for_labels(None)
