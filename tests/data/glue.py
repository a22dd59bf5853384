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


# --- the files as GLUE distributes them: tabs, no quoting, some without a header --------------------------------------

# subset -> columns of text, column of the label
RAW = {
    "cola": (("sentence",), "label"),
    "mrpc": (("#1 String", "#2 String"), "Quality"),
    "mnli": (("sentence1", "sentence2"), "gold_label"),
    "wnli": (("sentence1", "sentence2"), "label"),
}
_HEADERS = {
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "mnli": "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}
_LINES = {
    "cola": "gj04\t{label}\t{mark}\t{second}",
    "mrpc": "{label}\t10{n}\t20{n}\t{first}\t{second}",
    "mnli": "{n}\tfiction\t{first}\t{second}\tneutral\t{label}",
    "wnli": "{n}\t{first}\t{second}\t{label}",
}


def raw_rows(subset, split):
    """(label, first text, second text): every third text opens a quote, every fifth closes one."""
    names = TASKS["mnli"][1] if subset == "mnli" else ["0", "1"]
    return [
        (names[n % len(names)], '"' * (n % 3 == 0) + f"Let {n} be.", f"A {split} of {n}." + '"' * (n % 5 == 0))
        for n in range(60 if split == "train" else 9)
    ]


def save_raw(folder, subset):
    """Write train.tsv, dev.tsv (dev_matched.tsv) and for WNLI a test.tsv without labels."""
    folder.mkdir(parents=True)
    head = [_HEADERS[subset]] if subset in _HEADERS else []
    for split in ("train", "dev"):
        lines = [
            _LINES[subset].format(label=label, first=first, second=second, n=n, mark="*" * (label == "0"))
            for n, (label, first, second) in enumerate(raw_rows(subset, split))
        ]
        name = "dev_matched" if subset == "mnli" and split == "dev" else split
        (folder / f"{name}.tsv").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    if subset == "wnli":
        (folder / "test.tsv").write_text('index\tsentence1\tsentence2\n0\t"One.\tTwo.\n1\tThree.\tFour."\n')
