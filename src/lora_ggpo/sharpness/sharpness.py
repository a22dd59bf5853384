r"""How the loss rises around a trained model: on average, at worst, and by its curvature.

With theta* the trained values (`Point.parameters`) and L the mean loss of the point's sample:

expected sharpness
    E[L(theta* + eps)] - L(theta*), eps_ij = tau_i z_ij with one of the `NoiseLaw`. Draws come in pairs +eps, -eps,
    which cancels the odd orders: what is left is 1/2 tr(H diag(tau^2)) + O(eps^4).
worst-case sharpness
    max L(theta* + delta) - L(theta*) over ||delta / |theta*| ||_2 <= rho sqrt(d), adaptive sharpness (arXiv
    2102.11600) with the radius counted in d coordinates, so that rho is the root mean square of the relative change.
    Found by projected gradient ascent, hence a lower bound.
curvature
    Largest eigenvalues (Lanczos, scipy's ARPACK), trace (Hutchinson) and spectral density (stochastic Lanczos
    quadrature) of the Hessian, by Hessian-vector products. No dense Hessian is formed, and no more than 2 k + 4
    vectors are kept for k eigenvalues.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from lora_ggpo.perturbation.scales import Norms, relative
from lora_ggpo.sharpness.point import Parameters, Point, move, row_norms_squared, rows_view
from lora_ggpo.statistics.measured import Measured, measure_mean

NoiseLaw = Literal["isotropic", "rows", "guided"]
"""``"isotropic"``: one tau for all entries. ``"rows"``: tau_i ~ ||W'_i||, LoRA-GGPO's with beta = 0. ``"guided"``:
LoRA-GGPO's rule "relative" with the exact dL/dW'. All three have the energy sum tau^2 = sigma^2 ||theta*||^2."""


# --- on average ----------------------------------------------------------------------------------------------------


def noise_sizes(point: Point, law: NoiseLaw, beta: float = 0.5) -> Parameters:
    """tau of each row at sigma = 1, shaped to multiply the matrices; `beta` is the gradient's share in ``"guided"``."""
    weight = row_norms_squared(point.parameters, point.row_dims)
    if law == "isotropic":
        tau = math.sqrt(sum(float(norms.sum()) for norms in weight.values()) / point.size)
        return {name: torch.full_like(p[:1, :1], tau) for name, p in point.parameters.items()}
    guide, beta = {name: torch.zeros_like(norms) for name, norms in weight.items()}, beta if law == "guided" else 0.0
    if law == "guided":
        guide = row_norms_squared(point.gradient(point.parameters), point.row_dims)
    sizes = {}
    for name, norms in weight.items():
        dim = point.row_dims[name]
        columns = point.parameters[name].shape[1 - dim]
        tau2, _ = relative(1.0, beta, Norms(norms, guide[name], norms, norms.clone, columns))
        sizes[name] = rows_view(tau2.sqrt(), dim)
    return sizes


def expected_sharpness(point: Point, sizes: Parameters, sigma: float, draws: int, *, seed: int = 0) -> Measured:
    """E[L(theta* + sigma sizes z)] - L(theta*), over `draws` pairs of opposite z ~ N(0, 1).

    Points of equal shapes get the same z for the same seed, so that their sharpness can be compared in pairs.
    """
    at_centre, rises = point.loss(point.parameters), []
    for draw in range(draws):
        noise = _noise(point, sizes, seed + draw)
        pair = [point.loss(move(point.parameters, noise, sign * sigma)) for sign in (1.0, -1.0)]
        rises.append(sum(pair) / 2 - at_centre)
    return measure_mean(np.array(rises))


def _noise(point: Point, sizes: Parameters, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) * sizes[name]
        for name, p in point.parameters.items()
    }


# --- at worst ------------------------------------------------------------------------------------------------------


def worst_sharpness(point: Point, rho: float, steps: int = 10, restarts: int = 2, *, seed: int = 0) -> Measured:
    """The largest rise found within adaptive distance rho; its error is how much the best and worst restart differ.

    The first restart begins at theta*, so that its first step is adaptive SAM's; the others at random places inside.
    A lower bound of the true maximum.
    """
    scale = {name: p.abs() for name, p in point.parameters.items()}
    radius, at_centre = rho * math.sqrt(point.size), point.loss(point.parameters)
    best = []
    for restart in range(restarts):
        u = {name: torch.zeros_like(p) for name, p in scale.items()}  # delta = |theta*| u with ||u|| <= radius
        if restart:
            u = _noise(point, {name: torch.ones_like(p[:1, :1]) for name, p in scale.items()}, seed + restart)
            u = _rescale(u, radius / 2)
        rises = []
        for step in range(steps):
            here = move(point.parameters, _times(scale, u))
            ascent = _rescale(_times(scale, point.gradient(here)), radius * (1.0 if step == 0 else 0.5))
            u = _clip(move(u, ascent), radius)
            rises.append(point.loss(move(point.parameters, _times(scale, u))) - at_centre)
        best.append(np.max(rises))  # nan if any is
    return Measured(float(np.max(best)), float(np.ptp(best)), restarts)


def _times(one: Parameters, other: Parameters) -> dict[str, Tensor]:
    return {name: p * other[name] for name, p in one.items()}


def _norm(vector: Parameters) -> float:
    return math.sqrt(sum(float(p.square().sum()) for p in vector.values()))


def _rescale(vector: Parameters, length: float) -> dict[str, Tensor]:
    norm = _norm(vector)
    return {name: p * (length / norm if norm else 0.0) for name, p in vector.items()}


def _clip(vector: Parameters, length: float) -> dict[str, Tensor]:
    return _rescale(vector, length) if _norm(vector) > length else dict(vector)


# --- curvature -----------------------------------------------------------------------------------------------------


def top_eigenvalues(
    point: Point, count: int, *, tol: float = 0.05, products: int = 60, seed: int = 0
) -> list[Measured]:
    """The `count` algebraically largest eigenvalues of the Hessian, the largest first.

    Args:
        tol: Residual at which an eigenvalue counts as found, relative to it.
        products: Hessian-vector products to spend, about.

    Returns:
        Each with the norm of its residual ||Hv - lambda v||, within which an eigenvalue of H lies. Fewer than `count`
        where Lanczos has not converged by then.
    """

    first = next(iter(point.parameters.values()))

    def product(v: NDArray[Any]) -> NDArray[Any]:
        vector = torch.from_numpy(v.reshape(-1)).to(first.device, first.dtype)
        return point.hessian_product(vector).cpu().numpy()

    size, dtype = point.size, np.float64 if first.dtype == torch.float64 else np.float32
    start = np.random.default_rng(seed).standard_normal(size).astype(dtype)
    # The vectors are what takes memory: few of them, and restarts instead.
    vectors = min(size, 2 * count + 4)
    rounds = max(1, (products - vectors) // (vectors - count))
    linear = LinearOperator((size, size), matvec=product, dtype=dtype)
    try:
        values, found = eigsh(linear, k=count, which="LA", v0=start, tol=tol, ncv=vectors, maxiter=rounds)
    except ArpackNoConvergence as error:
        values, found = error.eigenvalues, error.eigenvectors
    pairs = sorted(zip(values.tolist(), found.T, strict=True), key=lambda pair: -pair[0])
    return [Measured(value, float(np.linalg.norm(product(v) - value * v)), 1) for value, v in pairs]


def trace(point: Point, draws: int, *, sizes: Tensor | None = None, seed: int = 0) -> Measured:
    """tr(D H D) by Hutchinson's estimator with random signs; D = diag(`sizes`), the identity by default.

    With the tau of a noise law at sigma = 1 it is twice the second-order part of the expected sharpness over sigma^2.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = (point.signs(generator) * (1 if sizes is None else sizes) for _ in range(draws))
    return measure_mean(np.array([float(v @ point.hessian_product(v)) for v in vectors]))


def flat(parameters: Parameters, like: Parameters) -> Tensor:
    """One number an entry in the Hessian's order, from values that broadcast to the matrices of `like`."""
    return torch.cat([parameters[name].expand_as(p).reshape(-1) for name, p in like.items()])


def spectral_density(
    point: Point, vectors: int = 20, repeats: int = 3, points: int = 512, *, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Density of the eigenvalues by stochastic Lanczos quadrature (arXiv 1901.10159).

    Args:
        vectors: Lanczos steps of each start: the density is a sum of as many peaks, each 1/`vectors` of the range wide.
        repeats: Random starts.

    Returns:
        Grid of eigenvalues, mean density there, and its standard error over the starts; float64 (points,).
    """
    generator = torch.Generator().manual_seed(seed)
    ritz = [_lanczos(point, point.signs(generator), vectors) for _ in range(repeats)]
    low, high = min(values.min() for values, _ in ritz), max(values.max() for values, _ in ritz)
    width = max((high - low) / vectors, abs(high) * 1e-9)
    grid = np.linspace(low - 3 * width, high + 3 * width, points)
    densities = [
        (weights * np.exp(-(((grid[:, None] - values) / width) ** 2) / 2)).sum(1) / (width * math.sqrt(2 * math.pi))
        for values, weights in ritz
    ]
    return grid, np.mean(densities, axis=0), np.std(densities, axis=0, ddof=1) / math.sqrt(repeats)


def _lanczos(point: Point, start: Tensor, steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ritz values of the Krylov space of `start`, and the weight of each in it.

    Old vectors are not kept, so rounding may bring copies of a Ritz value; they share its weight.
    """
    previous, v, beta = torch.zeros_like(start), start / start.norm(), 0.0
    alphas, betas = [], []
    for _ in range(min(steps, point.size)):
        w = point.hessian_product(v) - beta * previous
        alphas.append(float(w @ v))
        w -= alphas[-1] * v
        beta = float(w.norm())
        betas.append(beta)
        if beta <= 1e-6 * max(map(abs, alphas)):  # the space is exhausted
            break
        previous, v = v, w / beta
    values, basis = eigh_tridiagonal(np.array(alphas), np.array(betas[:-1]))
    return values, basis[0] ** 2
