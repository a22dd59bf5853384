"""Hand-made results folders, in the form that comparisons leave."""

import json

TITLES = {"lora": "LoRA", "dora": "DoRA", "sam": "SAM", "ggpo": "GGPO (relative rule)"}


def run(method, seed, values, setting="", sets=("test",), failed=None, seconds=1.0, memory=None, chosen=None):
    """A line of runs.jsonl; `values` are {metric: value}, the same on all `sets`."""
    row = {
        "setting": setting,
        "method": method,
        "title": TITLES.get(method, method),
        "seed": seed,
        "chosen": chosen or {"training.learning_rate": 0.001},
        "evaluation": {},
        "training": {},
        "failed": failed,
    }
    if not failed:
        scores = {metric: {"value": value, "se": None, "n": 100} for metric, value in values.items()}
        row["evaluation"] = dict.fromkeys(sets, scores)
        row["training"] = {
            "steps": 4,
            "seconds": 4 * seconds,
            "seconds_per_step": seconds,
            "trainable_parameters": 1000,
            "parameters": 5000,
            "peak_memory_bytes": memory,
        }
    return row


def calibration(accuracy):
    """What is drawn of the probabilities of a run, the surest of which are right."""
    confidence = [0.5 + 0.1 * i for i in range(5)]
    bins = {"confidence": confidence, "accuracy": [accuracy * c for c in confidence], "count": [20] * 5}
    return {"bins": bins, "accuracies": [1 - (1 - accuracy) * i / 19 for i in range(20)]}


def curve(method, seed, losses, setting=""):
    """A line of curves.jsonl; step i has the i-th of `losses`, the last one is followed by a validation."""
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    rows.append({"step": len(losses), "validation/log_loss": losses[-1] + 0.1})
    return {"setting": setting, "method": method, "seed": seed, "rows": rows}


def trial(method, number, score, setting="", values=None, failed=None):
    """A line of tuning.jsonl."""
    return {
        "setting": setting,
        "method": method,
        "title": TITLES.get(method, method),
        "trial": number,
        "seed": 1000,
        "values": values or {"training.learning_rate": 0.001 * (number + 1)},
        "score": score,
        "metric": "accuracy",
        "failed": failed,
    }


def write_results(folder, runs, tuning=(), curves=(), metric="accuracy", baseline="lora", command="lora-ggpo compare"):
    """Write the files of an earlier release, which has no ensembles."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("runs", runs), ("tuning", tuning), ("curves", curves)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    facts = {
        "command": command,
        "metric": metric,
        "baseline": baseline,
        "environments": [
            {"versions": {"lora-ggpo": "0.1.0", "torch": "2.9"}, "device": "CPU", "cpus": 2},
            {"versions": {"lora-ggpo": "0.1.0", "torch": "2.13"}, "device": "NVIDIA H200", "cpus": 16},
        ],
        "trials": 2 if tuning else 1,
        "seeds": sorted({row["seed"] for row in runs}),
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def write_full_grid(folder):
    """Two settings, four methods, three seeds, one set out of domain, failures, tuning and curves."""
    shift = {"lora": 0.0, "dora": 0.02, "sam": -0.03, "ggpo": 0.004}
    runs, curves, tuning = [], [], []
    for index, setting in enumerate(("label_noise=0", "label_noise=0.25")):
        for method, gain in shift.items():
            tuning += [trial(method, number, 0.8 + gain - number / 100, setting) for number in range(2)]
            for seed in range(3):
                wobble = 0.003 * ((seed * 7 + len(method) * 5) % 4)
                accuracy = 0.9 - 0.1 * index + gain + wobble
                runs.append(
                    run(
                        method,
                        seed,
                        {
                            "accuracy": accuracy,
                            "log_loss": 1 - accuracy,
                            "ece": 0.1 - wobble,
                            "scaled_ece": 0.05 + wobble,
                        },
                        setting,
                        sets=("validation", "test", "amazon-reviews", "train-noisy"),
                        failed="The loss is nan at step 3" if (method, index, seed) == ("sam", 1, 2) else None,
                        seconds=1 + 10 * abs(gain),
                        memory=1000 + len(method),
                    )
                )
                if runs[-1]["evaluation"]:
                    runs[-1]["calibration"] = {"test": calibration(accuracy)}
                losses = [0.7 - (0.1 + gain) * step + wobble for step in range(1, 5)]
                curves.append(curve(method, seed, losses, setting))
    return write_results(folder, runs, tuning, curves)


HUMP = (0.0, 0.12, 0.0, -0.08)
"""A test error, less 0.3, that rises between two descents: over the last four of five ranks."""


def write_study(folder, methods=("lora", "ggpo"), noises=(0, 0.3), seeds=5, ranks=(1, 4, 16, 64, 256), tested=True):
    """Rank and label noise; with noise, LoRA has a double descent of 12 points over ranks and 0.4 over training steps.

    Training rows are fitted from rank 64 on, those with label noise not below 256.
    """
    settings = {
        f"r={r}, label_noise={noise}": {"adapter.r": r, "data.label_noise": noise} for r in ranks for noise in noises
    }
    runs, curves = [], []
    for setting, values in settings.items():
        place, noise = ranks.index(values["adapter.r"]), values["data.label_noise"]
        for method in methods:
            double = method == "lora" and noise
            for seed in range(seeds):
                wobble = 0.002 * ((seed * 7 + place * 3 + len(method)) % 5)
                error = 0.3 + ((0.15, *HUMP)[place % 5] if double else 0.1 - 0.02 * place) + wobble
                row = run(method, seed, {"accuracy": 1 - error, "log_loss": 2 * error}, setting, ("validation", "test"))
                for part, n, wrong in (("train-clean", 70, 0.0), ("train-noisy", 30, 0.5)):
                    fitted = place >= (4 if noise else 3)
                    score = {"accuracy": 1.0 if fitted else 1 - wrong, "log_loss": 0.01 if fitted else wrong}
                    row["evaluation"][part] = {name: {"value": v, "se": None, "n": n} for name, v in score.items()}
                if not tested:
                    row["evaluation"] = {"validation": row["evaluation"]["validation"]}
                runs.append(row)
                curves.append(_study_curve(method, seed, setting, double, wobble))
    folder = write_results(folder, runs, curves=curves, command="lora-ggpo study")
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts | {"settings": settings}), encoding="utf-8")
    return folder


def _study_curve(method, seed, setting, double, wobble):
    steps = range(1, 41)
    losses = [1.0, 0.5, 0.9, 0.02, 0.02] if double else [1.0, 0.6, 0.3, 0.02, 0.02]
    rows = []
    for step in steps:
        place = (step - 1) / 10
        low, part = int(place), place - int(place)
        loss = losses[low] * (1 - part) + losses[low + 1] * part + wobble * (1 + (seed + step) % 3)
        rows.append({"step": step, "epoch": step / 8, "loss": loss})
        if step % 5 == 0:
            rows.append(
                {"step": step, "epoch": step / 8, "validation/accuracy": 1 - loss / 4, "validation/log_loss": loss}
            )
    return {"setting": setting, "method": method, "title": TITLES[method], "seed": seed, "rows": rows}
