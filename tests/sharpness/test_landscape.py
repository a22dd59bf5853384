"""Slices of the loss against losses that are known."""

import pytest
import torch

from lora_ggpo.errors import UserError
from lora_ggpo.sharpness.landscape import between, filter_direction, line, plane
from tests.sharpness.small import Net, bowl_point, dense_loss, flat_values, net_point


def test_each_row_of_a_direction_is_as_long_as_the_row_of_the_model():
    point, _, _ = net_point()
    direction = filter_direction(point, seed=3)
    for name, p in point.parameters.items():
        assert torch.allclose(direction[name].norm(dim=1), p.norm(dim=1))


def test_a_line_through_a_bowl_is_its_parabola():
    torch.manual_seed(0)
    slope, curvature, theta = torch.randn(2, 3).double(), torch.rand(2, 3).double(), torch.randn(2, 3).double()
    point = bowl_point(slope, curvature, theta)
    direction = filter_direction(point, seed=0)
    d = direction["theta"]
    at = [-1.0, -0.25, 0.0, 0.5, 1.0]
    expected = [float(t * (slope * d).sum() + t**2 * (curvature * d.square()).sum() / 2) for t in at]
    assert line(point, direction, at).tolist() == pytest.approx(expected)


def test_a_plane_of_a_net_is_its_loss_there():
    point, x, labels = net_point()
    loss, centre = dense_loss(point, x, labels), flat_values(point)
    first, second = (filter_direction(point, seed) for seed in (0, 1))
    d1, d2 = (torch.cat([d.reshape(-1) for d in one.values()]) for one in (first, second))
    values = plane(point, first, second, [-1.0, 0.5], [0.0, 0.3, 1.0])
    assert values.shape == (3, 2)
    for row, t in enumerate([0.0, 0.3, 1.0]):
        for column, s in enumerate([-1.0, 0.5]):
            assert values[row, column] == pytest.approx(float(loss(centre + s * d1 + t * d2)))


def test_the_line_between_two_models_begins_and_ends_at_their_losses():
    first, _, _ = net_point()
    second, _, _ = net_point()
    with torch.no_grad():
        for p in second.model.parameters():  # the biases too, which are no coordinates of the point
            p.add_(torch.randn_like(p))
    other = {name: p.detach() for name, p in second.model.named_parameters()}
    values = between(first, second, [0.0, 0.5, 1.0])
    assert values[0] == pytest.approx(first.loss(first.parameters))
    assert values[2] == pytest.approx(first.loss(other))
    middle = {name: (p + other[name]) / 2 for name, p in first.model.named_parameters()}
    assert values[1] == pytest.approx(first.loss(middle))


def test_models_of_other_shapes_are_not_joined():
    first, _, _ = net_point()
    second, _, _ = net_point()
    second.model.second = torch.nn.Linear(5, 2)
    assert isinstance(second.model, Net)
    with pytest.raises(UserError, match="same model"):
        between(first, second, [0.0])
