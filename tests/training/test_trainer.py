import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from lora_ggpo.training.trainer import EpochSampler


def test_order_depends_on_seed_and_epoch_alone():
    lengths = [(7 * i) % 31 + 1 for i in range(200)]
    for group_size in (None, 8):
        orders = []
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
            sampler = EpochSampler(lengths, seed, group_size)
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        assert all(sorted(order) == list(range(200)) for order in orders)
        assert orders[0] == orders[3]
        assert orders[0] != orders[1]
        assert orders[0] != orders[2]


def test_groups_hold_rows_of_like_length():
    lengths = [(7 * i) % 31 + 1 for i in range(256)]

    def padding(order):
        batches = [[lengths[i] for i in order[start : start + 8]] for start in range(0, 256, 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(list(EpochSampler(lengths, 0, 8))) < 0.3 * padding(list(EpochSampler(lengths, 0, None)))


@pytest.mark.parametrize(("rows", "size"), [(1, 4), (5, 8), (100, 3), (1000, 4), (1001, 16)])
def test_groups_are_those_of_transformers(rows, size):
    lengths = np.random.default_rng(rows).integers(1, 20, rows)
    expected = get_length_grouped_indices(lengths.tolist(), size, generator=torch.Generator().manual_seed(3))
    assert list(EpochSampler(lengths, 3, size)) == expected
