"""Tasks for tests, and how models do on them."""

from lora_ggpo.tasks import TaskConfig


def task(**fields):
    """The task with these settings, of data whose labels do not matter."""
    return TaskConfig(**fields).for_labels(None)


def evaluate(task, model, rows, tokenizer, **options):
    """The metrics of encoded rows; `options` are those of `Task.score`."""
    return task.measure(task.score(model, rows, tokenizer, **options), rows)
