"""Recipes of small runs, and the rows that they train on."""

import json

import yaml

GUIDED = {"sigma": 0.05, "rule": "relative", "beta": 0.5}


def recipe_text(model, source, output, **changes):
    """Four quick steps of plain LoRA on prompts and completions, as YAML.

    Each of `changes` is a field of the recipe. One that is a section, such as ``training={"max_steps": 2}``, keeps
    what it does not name; of ``data`` and ``task`` as well.
    """
    fields = {
        "model": str(model),
        "task": {"kind": "sft", "max_length": 32},
        "data": {"source": str(source), "validation_fraction": 0.2, "test_fraction": 0.2},
        "adapter": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "use_cpu": True,
        },
        "output": str(output),
        "precision": "fp32",  # whatever the machine
    }
    for name, value in changes.items():
        section = fields.get(name)
        fields[name] = section | value if isinstance(section, dict) and isinstance(value, dict) else value
    return yaml.safe_dump(fields, sort_keys=False)


def write_guided(folder, model, reviews):
    """12 quick steps of GGPO on an encoder, 8 to an epoch, with every source of chance in use; returns the file."""
    text = recipe_text(
        model,
        reviews,
        folder / "runs",
        task={"kind": "classification", "max_length": 24},
        data={"validation_fraction": 0.167, "test_fraction": 0.167, "label_noise": 0.25},
        adapter={"r": 4, "lora_dropout": 0.1, "target_modules": ["query", "value"]},
        ggpo=GUIDED,
        training={"max_steps": 12, "per_device_train_batch_size": 8, "save_steps": 3},
        validate_every=6,
    )
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder / "recipe.yaml"


def write_pairs(path, count=24):
    """Prompts and completions of very different lengths, as JSONL."""
    rows = [{"prompt": f"the {'film ' * (n % 5)}{n}", "completion": f"is {'good ' * (n % 7)}."} for n in range(count)]
    return write_rows(path, rows)


def write_rows(path, rows):
    """Any rows, as JSONL."""
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
