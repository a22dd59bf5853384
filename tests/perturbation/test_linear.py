import pytest
import torch
import torch.nn.functional as F

from lora_ggpo.perturbation import perturbed_linear
from lora_ggpo.perturbation.linear import Thin, thin_linear
from lora_ggpo.perturbation.noise import Factors, Seeded


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def materialised(weight, tau, seed, fan_in_fan_out=False):
    n = weight.shape[0] if fan_in_fan_out else weight.shape[1]
    eps = Seeded(seed, tau.double(), n).matrix()
    return eps.T if fan_in_fan_out else eps


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "lead"),
    [(6, 4, ()), (6, 4, (3,)), (4, 6, (2, 3)), (5, 5, (2, 1, 3)), (6, 4, (0,)), (1, 1, (2,)), (301, 5000, (2, 2))],
)
def test_output_and_gradients_equal_autograd_on_the_materialised_weight(fan_in_fan_out, bias, m, n, lead):
    weight = normal(*((n, m) if fan_in_fan_out else (m, n)), seed=1)
    leaves = [normal(*lead, n, seed=2), weight, normal(m, seed=3) if bias else None]
    tau, dy = normal(m, seed=4).abs(), normal(*lead, m, seed=5)

    mine = [None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves]
    y = perturbed_linear(*mine, tau, 17, fan_in_fan_out)
    y.backward(dy)

    theirs = [None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves]
    dense = theirs[1] + materialised(weight, tau, 17, fan_in_fan_out)
    expected = F.linear(theirs[0], dense.T if fan_in_fan_out else dense, theirs[2])
    expected.backward(dy)

    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    for a, b in zip(mine, theirs, strict=True):
        if a is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)
    assert torch.equal(mine[1], weight)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_gradcheck(fan_in_fan_out):
    x, w, b = normal(2, 3, 4, seed=1), normal(4, 5, seed=2), normal(5, seed=3)
    w = w if fan_in_fan_out else w.T
    inputs = [t.contiguous().requires_grad_() for t in (x, w, b)]
    tau = normal(5, seed=4).abs()
    assert torch.autograd.gradcheck(lambda x, w, b: perturbed_linear(x, w, b, tau, 3, fan_in_fan_out), inputs, eps=1e-5)


def test_strided_input_weight_and_gradient():
    x = normal(4, 3, seed=1).T.requires_grad_()
    w, tau = normal(8, 10, seed=2)[::2, 1:9:2], normal(4, seed=3).abs()
    y = perturbed_linear(x, w, None, tau, 3)
    y.backward(torch.ones(1, 1, dtype=torch.float64).expand(3, 4))
    dense = w + materialised(w, tau, 3)
    torch.testing.assert_close(y, x @ dense.T)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_low_precision_weights(dtype, bias):
    """The perturbed weight is formed in float32 and rounded once: eps is not rounded by itself, nor lost."""
    x, w = normal(5, 64, seed=1).to(dtype).requires_grad_(), normal(32, 64, seed=2, scale=0.125).to(dtype)
    b = normal(32, seed=3).to(dtype) if bias else None
    tau, bits = normal(32, seed=4).abs().float() * 1e-2, w.clone()
    y = perturbed_linear(x, w, b, tau, 3)
    dy = normal(5, 32, seed=5).to(dtype)
    y.backward(dy)
    dense = (w.double() + materialised(w, tau, 3)).to(dtype).double()
    expected = F.linear(x.double(), dense, None if b is None else b.double())
    assert y.dtype == x.grad.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert (y - expected).abs().max() < tolerance * expected.abs().max()
    assert (x.grad - dy.double() @ dense).abs().max() < tolerance * x.grad.abs().max()
    assert torch.equal(w, bits)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast(weight_dtype, autocast_dtype):
    x, w = normal(5, 64, seed=1).float().requires_grad_(), normal(32, 64, seed=2, scale=0.125).to(weight_dtype)
    b, tau = normal(32, seed=3).float(), normal(32, seed=4).abs().float() * 1e-2
    with torch.autocast("cpu", autocast_dtype):
        y = perturbed_linear(x, w, b, tau, 3)
    y.float().sum().backward()
    dense = w.double() + materialised(w, tau, 3)
    assert (y.dtype, x.grad.dtype) == (autocast_dtype, torch.float32)
    expected = F.linear(x.double(), dense, b.double())
    assert (y - expected).abs().max() < 2e-2 * expected.abs().max()
    assert (x.grad - dense.sum(0)).abs().max() < 2e-2 * x.grad.abs().max()


def test_autocast_leaves_float64_alone_as_torch_does():
    x, w = normal(5, 6, seed=1), normal(4, 6, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, w).dtype == torch.float64
        assert perturbed_linear(x, w, None, torch.ones(4, dtype=torch.float64), 3).dtype == torch.float64


@pytest.mark.parametrize("frozen", [True, False])
def test_autograd_keeps_the_weight_and_tau_only(frozen):
    x, w = normal(50, 40, seed=1).requires_grad_(), normal(30, 40, seed=2)
    b, tau = normal(30, seed=3).requires_grad_(), normal(30, seed=4).abs()
    w.requires_grad_(not frozen)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = perturbed_linear(x, w, b, tau, 3)
    expected = {w.data_ptr(), tau.data_ptr()} | (set() if frozen else {x.data_ptr()})
    assert {t.data_ptr() for t in saved} == expected
    kept = [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert kept == []


def test_gradient_of_the_bias_and_of_the_weight_without_one_of_the_input():
    x, w, b = normal(5, 6, seed=1), normal(4, 6, seed=2).requires_grad_(), normal(4, seed=3).requires_grad_()
    perturbed_linear(x, w, b, torch.ones(4, dtype=torch.float64), 3).sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand(4, 6))
    torch.testing.assert_close(b.grad, torch.full((4,), 5.0, dtype=torch.float64))


def test_second_derivative_is_refused_not_wrong():
    x = normal(5, 6, seed=1).requires_grad_()
    y = perturbed_linear(x, normal(4, 6, seed=2), None, torch.ones(4, dtype=torch.float64), 3)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_interleaved_layers_do_not_share_results():
    x, tau = normal(3, 6, seed=1).requires_grad_(), torch.ones(4, dtype=torch.float64)
    w = [normal(4, 6, seed=i) for i in (2, 3)]
    y = [perturbed_linear(x, weight, None, tau, 7 + i) for i, weight in enumerate(w)]
    dense = [weight + materialised(weight, tau, 7 + i) for i, weight in enumerate(w)]
    for i in (0, 1):
        torch.testing.assert_close(y[i], x @ dense[i].T)
    (y[0].sum() * 2 + y[1].sum()).backward()
    torch.testing.assert_close(x.grad, (2 * dense[0] + dense[1]).sum(0).expand(3, 6))


# --- thin factors --------------------------------------------------------------------------------------------------


def thin_case(ranks=(3,), lead=(2, 5), k=4):
    """y, x, and A, B and s of each adapter, and eps = U V."""
    n, m = 6, 7
    y, x = normal(*lead, m, seed=1), normal(*lead, n, seed=2)
    adapters = [(normal(r, n, seed=10 + i), normal(m, r, seed=20 + i), 0.5 + i) for i, r in enumerate(ranks)]
    return y, x, adapters, Factors(normal(k, n, seed=3), normal(m, k, seed=4)) if k else None


@pytest.mark.parametrize("ranks", [(3,), (2, 4), (1, 1, 5)])
@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("lead", [(2, 5), (), (0,), (3,)])
@pytest.mark.parametrize("w0", [None, normal(7, 6, seed=6), normal(6, 7, seed=6).T])
def test_thin_factors_equal_autograd_on_the_whole_weight(ranks, k, lead, w0):
    y, x, adapters, noise = thin_case(ranks, lead, k)
    bias, results = normal(7, seed=5), []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (y, x, *(t for a, b, _ in adapters for t in (a, b)))]
        pairs = [Thin(a, b, s) for a, b, (_, _, s) in zip(leaves[2::2], leaves[3::2], adapters, strict=True)]
        if fused:
            out = thin_linear(leaves[1], leaves[0] * 1 if w0 is None else (w0, bias), pairs, noise)
        else:
            w = sum(s * b @ a for a, b, s in pairs) + (noise.matrix() if noise else 0)
            out = leaves[0] + leaves[1] @ w.T if w0 is None else bias + leaves[1] @ (w0 + w).T
        out.backward(normal(*lead, 7, seed=9))
        results.append((out.detach(), [leaf.grad for leaf in leaves]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_thin_factors_save_the_input_and_its_product_with_a_alone():
    y, x, ((a, b, s),), noise = thin_case(lead=(50,))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        thin_linear(leaves[0], y, [Thin(a, b, s)], noise)
    assert {t.data_ptr() for t in leaves} <= {t.data_ptr() for t in saved}
    (product,) = [t for t in saved if t.data_ptr() not in {leaf.data_ptr() for leaf in leaves}]
    torch.testing.assert_close(product, x @ a.T)
    assert product.untyped_storage().nbytes() == 50 * 3 * 8


@pytest.mark.parametrize(("of_y", "of_x"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_thin_factors_in_mixed_precision(of_y, of_x):
    y, x, ((a, b, s),), noise = thin_case()
    rounded = x.to(getattr(torch, of_x))
    out = thin_linear(rounded, y.to(getattr(torch, of_y)), [Thin(a.float(), b.float(), s)], noise)
    expected = y + x @ (s * b @ a + noise.matrix()).T
    assert out.dtype == getattr(torch, of_y)
    assert (out - expected).abs().max() < 2e-2 * expected.abs().max()
