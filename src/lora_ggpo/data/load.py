"""From a DataConfig to the splits that training and evaluation use."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from lora_ggpo.data.bundled import BUNDLED
from lora_ggpo.data.completion import as_messages, read_completions
from lora_ggpo.data.config import DataConfig
from lora_ggpo.data.labels import classes_of, is_unlabelled, read_label_names, read_targets, to_indices
from lora_ggpo.data.messages import store
from lora_ggpo.data.sampling import carve, flip_labels, stratified_order
from lora_ggpo.data.sources import ALL, FURTHER_TESTS, read_source
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError

Columns = dict[str, list[Any]]
NAMES = ("train", "validation", "test")
STRING, INTEGER = datasets.Value("string"), datasets.Value("int64")
FEATURES = {
    "id": STRING,
    "text": STRING,
    "text_pair": STRING,
    "label": INTEGER,
    "target": datasets.Value("float64"),
    "noisy": datasets.Value("bool"),
    "prompt": STRING,
    "completion": STRING,
    "messages": [{"role": STRING, "content": STRING}],
    "template": STRING,
}


@dataclass(frozen=True)
class Splits:
    """Data ready for a task; every split has a column "id".

    Attributes:
        train, validation, test: Rows in the order of the source.
        labels: The classes' names, which "label" indexes; None where there are no classes.
        out_of_domain: Extra test sets, by the name of their source, or by split if they come with the training data.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    labels: list[str] | None = None
    out_of_domain: dict[str, datasets.Dataset] = field(default_factory=dict)


def load_classification(config: DataConfig) -> Splits:
    """Load data with columns "id", "text" and "label" (an index into `labels`); train has "noisy" (bool) as well.

    With `text_pair` there is a second text, "text_pair". Labels may be names, integers or booleans; without declared
    names, the classes are the sorted labels of train. A split whose labels are withheld (no label, or -1 throughout)
    counts as missing, with a warning; the validation split then stands in for the test split. Missing validation and
    test splits are taken from train, stratified; rows with the same "text" stay together. Then train is cut to
    `train_size` and its labels are corrupted.

    Raises:
        UserError: the source or its content is not usable; the message says where and what to do.
    """
    texts, label = _text_columns(config), config.label or "label"
    tables = _main_tables(config)
    whole = next(iter(tables))
    read = {whole: _texts_and_names(tables[whole], texts, label)}
    classes = classes_of(read[whole]["label"], tables[whole], label)
    tables = _labelled(tables, label, classes)
    read |= {split: _texts_and_names(table, texts, label) for split, table in tables.items() if split != whole}
    for split, columns in read.items():
        columns["label"] = to_indices(columns["label"], classes, tables[split])
    further = _further_tests(read)
    parts = _three_splits(read, "label", "text", config)
    if config.train_size is not None and config.train_size < len(set(parts["train"]["label"])):
        raise UserError(
            f"data.train_size is {config.train_size}, but the training data has {len(set(parts['train']['label']))} "
            "classes; ask for at least one row of each."
        )
    train = _cut(parts["train"], parts["train"]["label"], config, tables[whole])
    train["label"], train["noisy"] = flip_labels(train["label"], len(classes), config.label_noise, config.noise_seed)
    others = {name: _other_domain(source, config, classes) for source, name in config.set_names.items()}
    extra = further | {name: _dataset(columns) for name, columns in others.items()}
    return Splits(_dataset(train), _dataset(parts["validation"]), _dataset(parts["test"]), classes, extra)


def load_regression(config: DataConfig) -> Splits:
    """Load data with columns "id", "text" and "target" (float64); with `text_pair` also "text_pair".

    The targets are the numbers in column `label`, else in "score", if there is one, or "label". Splits are as in
    `load_classification`, without strata.

    Raises:
        UserError: the source or its content is not usable, or label noise is asked for.
    """
    if config.label_noise:
        raise UserError("data.label_noise needs classes, which data for regression has not; set it to 0.")
    tables = _main_tables(config)
    whole = next(iter(tables))
    target = config.label or ("score" if "score" in tables[whole].columns else "label")
    texts = _text_columns(config)
    read = {whole: _texts_and_targets(tables[whole], texts, target)}
    numbers = read[whole]["target"]
    if min(numbers) == max(numbers):
        raise UserError(
            f"{tables[whole].origin}: every row has {numbers[0]:g} in column {target!r}; there is no target."
        )
    tables = _labelled(tables, target, {str(value) for value in tables[whole].values(target)})
    read |= {split: _texts_and_targets(table, texts, target) for split, table in tables.items() if split != whole}
    extra = _further_tests(read)
    parts = _three_splits(read, None, "text", config)
    train = _cut(parts["train"], [0] * len(parts["train"]["id"]), config, tables[whole])
    for source, name in config.set_names.items():
        extra[name] = _dataset(_other_scores(source, config, target))
    return Splits(_dataset(train), _dataset(parts["validation"]), _dataset(parts["test"]), None, extra)


def load_completion(config: DataConfig) -> Splits:
    """Load data with "id" and either "prompt" and "completion", or "messages" and perhaps "template".

    The columns of Alpaca, ShareGPT, MetaMathQA and CodeFeedback are brought to these. "messages" are lists of
    {"role", "content"}, with "more" where they say more (`lora_ggpo.data.messages.restore`); "template" is the JSON of
    further arguments of the chat template. Splits are as in `load_classification`, without strata.

    Raises:
        UserError: the source or its content is not usable, or label noise is asked for.
    """
    if config.label_noise:
        raise UserError("data.label_noise needs labels, which data for completion has not; set it to 0.")
    tables = _main_tables(config)
    unknown = [name for name in config.ignore if not any(name in table.columns for table in tables.values())]
    if unknown:
        raise UserError(f"{config.source} has no column {unknown[0]!r}, which data.ignore names; leave it out.")
    read: dict[str, Columns] = {split: read_completions(table, config) for split, table in tables.items()}
    chat = any("messages" in columns for columns in read.values())
    read = {split: as_messages(columns) if chat else columns for split, columns in read.items()}
    extra = _further_tests(read)
    parts = _three_splits(read, None, "messages" if chat else "prompt", config)
    train = _cut(parts["train"], [0] * len(parts["train"]["id"]), config, next(iter(tables.values())))
    for source, name in config.set_names.items():
        of_source = read_source(source, None, config.columns)
        extra[name] = _dataset(read_completions(_test_table(of_source, lambda table: False), config))
    return Splits(_dataset(train), _dataset(parts["validation"]), _dataset(parts["test"]), None, extra)


def digest(dataset: datasets.Dataset) -> str:
    """Return the sha256 over the rows, each as JSON with sorted keys: equal for equal rows in equal order."""
    sha = hashlib.sha256()
    for row in dataset:
        sha.update(json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return sha.hexdigest()


def _main_tables(config: DataConfig) -> dict[str, Table]:
    """Return the tables, the one to train on first."""
    if config.subset is not None and config.source in BUNDLED:
        raise UserError(f"data.subset is for hub data, but {config.source} is bundled; leave it out.")
    tables = read_source(config.source, config.subset, config.columns)
    if config.test_split is not None:
        if config.test_split not in tables:
            raise UserError(f"{config.source} has no validation split to test on; leave out data.test_split.")
        tables["test"] = tables.pop(config.test_split)
    if ALL in tables:
        return tables
    if "train" not in tables:
        raise UserError(f"{config.source} has no train split, only {', '.join(tables)}.")
    if not len(tables["train"]):
        raise UserError(f"{tables['train'].origin} has no rows; give data with rows in it.")
    return {split: tables[split] for split in (*NAMES, *FURTHER_TESTS) if split in tables}


def _labelled(tables: dict[str, Table], label: str, classes: Collection[str]) -> dict[str, Table]:
    """Leave out the splits without labels, with one warning; test on the validation split if that leaves no test."""
    unlabelled = [split for split in list(tables)[1:] if is_unlabelled(tables[split], label, classes)]
    if not unlabelled:
        return tables
    labelled = {split: table for split, table in tables.items() if split not in unlabelled}
    consequence = "is left out; what is missing is split off the training rows."
    if "test" in unlabelled and "validation" in labelled:
        labelled["test"] = labelled.pop("validation")
        consequence = (
            "is left out: the validation split is the test set, and validation rows are split off the training rows. "
            "Set data.test_split to validation to say so yourself."
        )
    origins = " and ".join(tables[split].origin for split in unlabelled)
    warnings.warn(f"{origins} has no labels and {consequence}", stacklevel=3)
    return labelled


def _text_columns(config: DataConfig) -> dict[str, str]:
    """The source's columns of the texts, by the names they get."""
    pair = {} if config.text_pair is None else {"text_pair": config.text_pair}
    return {"text": config.text or "text", **pair}


def _texts_and_names(table: Table, texts: dict[str, str], label: str) -> Columns:
    columns = {name: table.texts(column, name) for name, column in texts.items()}
    return {"id": table.ids(), **columns, "label": read_label_names(table, label)}


def _texts_and_targets(table: Table, texts: dict[str, str], target: str) -> Columns:
    columns = {name: table.texts(column, name) for name, column in texts.items()}
    return {"id": table.ids(), **columns, "target": read_targets(table, target)}


def _further_tests(read: dict[str, Columns]) -> dict[str, datasets.Dataset]:
    """Take the test sets beside "test" out of `read`."""
    return {split: _dataset(read.pop(split)) for split in FURTHER_TESTS if split in read}


def _three_splits(read: dict[str, Columns], stratum: str | None, text: str, config: DataConfig) -> dict[str, Columns]:
    """Take the splits that are missing from the first of the given ones."""
    wanted = {"validation": config.validation_fraction, "test": config.test_fraction}
    fractions = {split: fraction for split, fraction in wanted.items() if split not in read}
    whole = next(iter(read.values()))
    if not fractions:
        return read
    rows = len(whole["id"])
    texts = [value if isinstance(value, str) else json.dumps(value) for value in whole[text]]
    chosen = carve(whole[stratum] if stratum else [0] * rows, texts, fractions, config.split_seed)
    if min(len(part) for part in chosen.values()) == 0:
        raise UserError(
            f"{config.source} has {len(set(texts))} different texts, too few to split into train, validation and test."
        )
    given = {split: columns for split, columns in read.items() if split in wanted}
    return given | {split: _take(whole, part.tolist()) for split, part in chosen.items()}


def _cut(train: Columns, strata: Sequence[int], config: DataConfig, table: Table) -> Columns:
    size, rows = config.train_size, len(train["id"])
    if size is None:
        return dict(train)
    if size > rows:
        raise UserError(
            f"data.train_size is {size}, but {table.origin} gives {rows} rows to train on; ask for at most {rows}."
        )
    return _take(train, np.sort(stratified_order(strata, config.split_seed)[:size]).tolist())


def _other_domain(source: str, config: DataConfig, classes: list[str]) -> Columns:
    tables = read_source(source, None, config.columns)
    label = _present(config.label, tables, "label")
    table = _test_table(tables, lambda table: label in table.columns and is_unlabelled(table, label, classes))
    texts = {name: _present(column, tables, name) for name, column in _text_columns(config).items()}
    columns = _texts_and_names(table, texts, label)
    unknown = sorted(set(columns["label"]) - set(classes))
    if unknown:
        raise UserError(
            f"The out-of-domain data {source} has the labels {', '.join(sorted(set(columns['label'])))}, but the "
            f"training data has {', '.join(classes)}; rename the labels."
        )
    columns["label"] = to_indices(columns["label"], classes, table)
    return columns


def _other_scores(source: str, config: DataConfig, target: str) -> Columns:
    tables = read_source(source, None, config.columns)
    column = _present(
        target, tables, "score" if any("score" in table.columns for table in tables.values()) else "label"
    )
    table = _test_table(tables, lambda table: column in table.columns and is_unlabelled(table, column, ()))
    texts = {name: _present(given, tables, name) for name, given in _text_columns(config).items()}
    return _texts_and_targets(table, texts, column)


def _present(name: str | None, tables: dict[str, Table], default: str) -> str:
    """Return the configured column where the source has it: other domains may keep to the default names."""
    return name if name is not None and all(name in table.columns for table in tables.values()) else default


def _test_table(tables: dict[str, Table], withheld: Callable[[Table], bool]) -> Table:
    """Return the test split; without one, the validation split, or all there is."""
    for split in ("test", "validation", ALL, "train"):
        if split in tables and len(tables[split]) and not withheld(tables[split]):
            return tables[split]
    raise UserError(f"{next(iter(tables.values())).origin} has no labelled rows to test on.")


def _take(columns: Columns, rows: Sequence[int]) -> Columns:
    return {name: [values[row] for row in rows] for name, values in columns.items()}


def _dataset(columns: Columns) -> datasets.Dataset:
    features, columns = {name: FEATURES[name] for name in columns}, dict(columns)
    if "messages" in columns:
        columns["messages"] = [[store(turn) for turn in chat] for chat in columns["messages"]]
        if any("more" in turn for chat in columns["messages"] for turn in chat):
            features["messages"] = [{"role": STRING, "content": STRING, "more": STRING}]
    if "template" in columns:
        columns["template"] = [json.dumps(arguments) if arguments else None for arguments in columns["template"]]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
