"""Classification: a class for each text or pair of texts, from a new head on the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, Value
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_ggpo.data.labels import LabelReader
from lora_ggpo.models.architecture import HEADED, label_head
from lora_ggpo.statistics.calibration import calibration_metrics, softmax
from lora_ggpo.statistics.measured import RESAMPLES, SEED, Floats, Integers, Measured, measure_share
from lora_ggpo.tasks.base import CHUNK, Batch, Row, Score, Task, encoded_row


class ClassTask(Task):
    """A task in which a row has one of the data's classes; its scores become probabilities of the classes."""

    reader = LabelReader
    columns = frozenset({"text", "text_pair", "label", "label_noise", "ignore"})
    metrics = ("accuracy", "f1", "mcc", "log_loss", "brier", "ece")
    loss = "log_loss"
    averages = True
    features: ClassVar = {"label": Value("int64")}

    def finish(self, scores: Floats) -> Floats:
        return softmax(scores)

    def measure(self, scores: Floats, rows: Dataset) -> dict[str, Measured]:
        return classification_metrics(scores, np.asarray(rows["label"], dtype=np.int64))

    def lines(self, scores: Floats, rows: Dataset) -> list[dict[str, Any]]:
        return [
            {
                "id": id_,
                "label": label,
                "predicted": int(row.argmax()),
                "probabilities": [float(f"{p:.6g}") for p in row],
            }
            for id_, label, row in zip(rows["id"], rows["label"], scores, strict=True)
        ]


class Classification(ClassTask):
    """A new head on the model gives each class a logit."""

    architecture = HEADED
    features: ClassVar = {**ClassTask.features, "labels": Value("int64")}

    @property
    def head(self) -> dict[str, Any]:
        return label_head(self.labels or [])

    def rows(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[Row]]:
        return encode_texts(dataset, tokenizer, self.config.max_length, "label")

    def scorer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Score:
        return head_scorer(model)


def encode_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, value: str
) -> Iterator[list[Row]]:
    """Rows of a text or two for a model with a head, which is to give the column `value`."""
    for batch in dataset.iter(CHUNK):
        second = batch.get("text_pair")
        encoded = tokenizer(batch["text"], second, truncation=True, max_length=max_length)
        more = {name: batch[name] for name in ("id", value) if name in batch}
        if second is not None and "token_type_ids" in encoded:
            more["token_type_ids"] = encoded["token_type_ids"]
        yield [
            encoded_row(ids, batch[value][row], **{name: values[row] for name, values in more.items()})
            for row, ids in enumerate(encoded["input_ids"])
        ]


def head_scorer(model: nn.Module) -> Score:
    """The outputs of the model's head."""

    def score(batch: Batch) -> Tensor:
        logits: Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        return logits

    return score


def classification_metrics(probabilities: Floats, labels: Integers) -> dict[str, Measured]:
    """Accuracy, macro F1, Matthews correlation, log loss (nats), Brier score and calibration error of predictions.

    Args:
        probabilities: (n, classes), rows sum to 1. The most probable class is the prediction.
        labels: (n,) indices of the right classes.

    Standard errors: binomial for accuracy; for F1, the correlation and the calibration error the standard deviation
    over 1000 bootstrap resamples of the examples (seeded, so the same data give the same figure); s / sqrt(n) for the
    log loss and the Brier score.
    Macro F1 averages over the classes that occur in the labels or the predictions.
    """
    n, predicted = len(labels), probabilities.argmax(axis=1)
    # F1 and the correlation depend on the data through the confusion counts alone, and drawing n examples with
    # replacement draws those counts from a multinomial: that is the bootstrap at a fraction of its cost.
    classes = int(max(labels.max(), predicted.max())) + 1
    cells, counts = np.unique(labels * classes + predicted, return_counts=True)
    draws = np.random.default_rng(SEED).multinomial(n, counts / n, size=RESAMPLES)
    found = _f1_mcc(cells // classes, cells % classes, np.vstack([counts, draws]), classes)
    (f1, mcc), (f1_se, mcc_se) = found[0].tolist(), found[1:].std(axis=0, ddof=1).tolist()
    return {
        "accuracy": measure_share(labels == predicted),
        "f1": Measured(f1, f1_se, n),
        "mcc": Measured(mcc, mcc_se, n),
        **calibration_metrics(probabilities, labels),
    }


def _f1_mcc(rows: Integers, columns: Integers, counts: Integers, classes: int) -> Floats:
    """Macro F1 and Matthews correlation, (tables, 2), of confusion tables given as the counts in the same cells."""
    tables = len(counts)
    first = classes * np.arange(tables)[:, None]

    def totals(places: Integers, weights: Integers) -> Floats:
        """(tables, classes): the counts of each class, to which a cell belongs by its row or its column."""
        counted = np.bincount((first + places).ravel(), weights.ravel(), tables * classes)
        return counted.astype(np.float64).reshape(tables, classes)

    right, true, said = totals(rows, counts * (rows == columns)), totals(rows, counts), totals(columns, counts)
    occurs = true + said > 0
    f1 = (2 * right / np.where(occurs, true + said, 1)).sum(axis=1) / occurs.sum(axis=1)
    n = counts.sum(axis=1)
    spread = (n**2 - (true**2).sum(axis=1)) * (n**2 - (said**2).sum(axis=1))
    agreement = n * right.sum(axis=1) - (true * said).sum(axis=1)
    return np.stack([f1, np.where(spread > 0, agreement / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)], axis=1)
