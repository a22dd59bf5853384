"""Seeded choices of rows: stratified, nested, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]


def stratified_order(labels: ArrayLike, seed: int) -> Indices:
    """Return a random order of the rows in which every prefix of N rows has each class's share of N, rounded.

    A class's first row comes early, so that a prefix of at least as many rows as there are classes has them all.
    """
    values = np.asarray(labels, dtype=np.int64)
    rng = np.random.default_rng(seed)
    place = np.empty(len(values))
    for label in np.unique(values):
        rows = rng.permutation(np.flatnonzero(values == label))
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        place[rows[0]] -= 1
    return np.argsort(place, kind="stable")


def carve(labels: ArrayLike, texts: ArrayLike, fractions: dict[str, float], seed: int) -> dict[str, Indices]:
    """Divide rows into "train" and parts of the given fractions, stratified; equal `texts` (numbers) stay together.

    Returns row indices in ascending order; each part has at least one distinct text.
    """
    _, first, number = np.unique(np.asarray(texts), return_index=True, return_inverse=True)
    owner, distinct = first[number], np.sort(first)
    order = distinct[stratified_order(np.asarray(labels)[distinct], seed)]
    parts, end = {}, len(order)
    for name, fraction in fractions.items():
        size = max(1, round(fraction * len(order)))
        parts[name], end = order[max(0, end - size) : end], max(0, end - size)
    parts["train"] = order[:end]
    return {name: np.flatnonzero(np.isin(owner, chosen)) for name, chosen in parts.items()}


def flip_labels(labels: Sequence[int], classes: int, fraction: float, seed: int) -> tuple[list[int], list[bool]]:
    """Change round(fraction * n) labels, each to one of the other classes with equal chance.

    Returns the labels and, for each row, whether its label was changed. With one seed, the rows changed at a fraction
    are among those changed at a larger one, and get the same wrong label.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    shift = rng.integers(1, classes, size=len(labels))
    noisy = np.zeros(len(labels), dtype=bool)
    noisy[order[: round(fraction * len(labels))]] = True
    flipped = np.where(noisy, (np.asarray(labels) + shift) % classes, labels)
    return flipped.tolist(), noisy.tolist()
