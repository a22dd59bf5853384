"""Models small enough for a dense Hessian."""

from types import SimpleNamespace

import torch
from torch import nn

from lora_ggpo.sharpness.point import make_point


class Net(nn.Module):
    """Two layers of tanh; like a transformers model it returns its mean loss."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, labels):
        logits = self.second(torch.tanh(self.first(x)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels))


class Bowl(nn.Module):
    """L = slope . (theta - theta*) + 1/2 (theta - theta*) diag(curvature) (theta - theta*), exactly."""

    def __init__(self, theta, slope, curvature):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.theta = nn.Parameter(theta)
        self.centre, self.slope, self.curvature = theta.clone(), slope, curvature

    def forward(self, labels):
        d = self.theta - self.centre
        return SimpleNamespace(loss=(self.slope * d).sum() + (self.curvature * d.square()).sum() / 2)


def net_point(dtype=torch.float64):
    """A net that is neither trained nor at a minimum, with batches of unequal size."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    x, labels = torch.randn(11, 4, dtype=dtype), torch.randint(0, 3, (11,))
    batches = [{"x": x[rows], "labels": labels[rows]} for rows in (slice(0, 4), slice(4, 8), slice(8, 11))]
    return make_point(net, ["first.weight", "second.weight"], batches), x, labels


def bowl_point(slope, curvature, theta=None):
    """A matrix of parameters with a loss whose rise is known everywhere."""
    theta = torch.ones_like(slope) if theta is None else theta
    return make_point(Bowl(theta, slope, curvature), ["theta"], [{"labels": torch.zeros(2, dtype=torch.long)}])


def dense_loss(point, x, labels):
    """The loss as a function of one flat vector, without the code under test."""
    net = point.model

    def loss(flat):
        first, second = flat[:20].view(5, 4), flat[20:].view(3, 5)
        hidden = torch.tanh(x @ first.T + net.first.bias)
        return nn.functional.cross_entropy(hidden @ second.T + net.second.bias, labels)

    return loss


def flat_values(point):
    return torch.cat([p.reshape(-1) for p in point.parameters.values()])
