"""What the tests of all surfaces ask of a layer, and the blocks of code that the documents show."""

import re
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn import functional

from lora_ggpo.perturbation.noise import Factors
from lora_ggpo.perturbation.rows import group_layers

DOCS = Path(__file__).parents[2] / "docs"
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def run_block(page, heading):
    """The names that the first block of Python under a heading of a page defines."""
    text = (DOCS / page).read_text(encoding="utf-8")
    block = re.search(rf"^#+ {re.escape(heading)}\n.*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, f"{page} has no block under {heading}"
    names = {}
    exec(compile(block[1], f"{page}: {heading}", "exec"), names)
    return names


def assert_documented(surface, package):
    """The table of docs/images.md names the release of a package that its tests have just been run with."""
    rows = (DOCS / "images.md").read_text(encoding="utf-8").splitlines()
    found = [row for row in rows if re.match(rf"\|\W*{re.escape(surface)}\b", row)]
    assert found, surface
    assert all(f"| {package} {version(package)} |" in row for row in found), f"{package} {version(package)}: {found}"


def check_noise(layer, images=(5, 6)):
    """In float64 the noise of an attached layer, on its output and in dL/dx, is that of a dense eps on its weight."""
    base, linear = layer.base, layer.kind.linear
    x = torch.randn((2, 5, layer.n) if linear else (2, base.in_channels, *images), dtype=torch.float64)
    x.requires_grad_()
    noise = Factors(*(torch.randn(shape, dtype=torch.float64) for shape in ((3, layer.n), (layer.m, 3))))
    plain, eps, layer.noise = layer.original(x), noise.u @ noise.v, noise
    layer.passes.begin(training=True)
    noisy = layer.forward(x)
    layer.passes.end()
    layer.noise = None
    if linear:
        added = functional.linear(x, eps)
    else:
        convolution = {3: functional.conv1d, 4: functional.conv2d}[base.weight.dim()]
        added = convolution(x, eps.view(base.weight.shape), None, base.stride, base.padding)
    torch.testing.assert_close(noisy - plain, added, **CLOSE)
    direction = torch.randn_like(noisy)
    (given,), (expected,) = (torch.autograd.grad(y, x, direction, retain_graph=True) for y in (noisy, plain + added))
    torch.testing.assert_close(given, expected, **CLOSE)


def weight_norms(layer):
    """||W'_i||^2 (m,) as the sizes of the noise are made from it."""
    (group,) = group_layers([layer])
    return group._weight_norms()[0]
