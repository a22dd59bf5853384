"""Rows in the format of GLUE's tasks, saved as a folder of files: columns, class names, idx and withheld labels."""

import json

import datasets

# subset -> columns of text, class names in order of the index
TASKS = {
    "mnli": (("premise", "hypothesis"), ["entailment", "neutral", "contradiction"]),
    "sst2": (("sentence",), ["negative", "positive"]),
    "cola": (("sentence",), ["unacceptable", "acceptable"]),
    "qnli": (("question", "sentence"), ["entailment", "not_entailment"]),
    "mrpc": (("sentence1", "sentence2"), ["not_equivalent", "equivalent"]),
}
SIZES = {"train": 60, "validation": 9, "test": 5}
MNLI_SPLITS = {
    "validation": ("validation_matched", "validation_mismatched"),
    "test": ("test_matched", "test_mismatched"),
}


def rows(subset, split):
    """The rows of a split. The labels of test are -1, but MRPC's, which are public."""
    columns, names = TASKS[subset]
    withheld = split.startswith("test") and subset != "mrpc"
    return [
        {column: f"The {split} {column} has number {n}, so it does." for column in columns}
        | {"label": -1 if withheld else n % len(names), "idx": n}
        for n in range(SIZES[split.partition("_")[0]])
    ]


def splits(subset):
    names = [name for split in SIZES for name in (MNLI_SPLITS.get(split, [split]) if subset == "mnli" else [split])]
    return {name: rows(subset, name) for name in names}


def as_datasets(subset):
    """The splits as the hub serves them, with class names."""
    columns, names = TASKS[subset]
    features = {column: datasets.Value("string") for column in columns}
    features |= {"label": datasets.ClassLabel(names=names), "idx": datasets.Value("int32")}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(values, features=datasets.Features(features))
            for split, values in splits(subset).items()
        }
    )


def save(folder, subset, form):
    """Write "parquet", named as in the hub's repositories, or "jsonl", which has no class names; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, data in as_datasets(subset).items():
        if form == "parquet":
            data.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
        else:
            lines = [json.dumps(row) for row in splits(subset)[split]]
            (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)
