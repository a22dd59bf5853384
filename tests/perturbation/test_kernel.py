"""The GPU kernel: against Philox, Box and Muller and matrix products written out in numpy and float64.

Without a GPU it runs in Triton's interpreter (conftest.py asks for it), if Triton is installed; with one it is
compiled, and the whole method is tested on the device too.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_ggpo.perturbation import GGPO, GGPOConfig, perturbed_linear

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
pytest.importorskip("triton")
kernel = pytest.importorskip("lora_ggpo.perturbation.kernel")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
SEED = 0x7EDC_BA98_7654_3210


def philox(key: int, counter: np.ndarray, row: np.ndarray) -> list[np.ndarray]:
    """Four words of 32 bits: Salmon et al. (2011), section 3.3, with 7 rounds."""
    low, half = np.uint64(0xFFFF_FFFF), np.uint64(32)
    keys = [key & 0xFFFF_FFFF, key >> 32]
    x = [counter, row, np.zeros_like(row), np.zeros_like(row)]
    for _ in range(7):
        first, second = np.uint64(0xD251_1F53) * x[0], np.uint64(0xCD9E_8D57) * x[2]
        x = [
            (second >> half) ^ x[1] ^ np.uint64(keys[0]),
            second & low,
            (first >> half) ^ x[3] ^ np.uint64(keys[1]),
            first & low,
        ]
        keys = [(keys[0] + 0x9E37_79B9) & 0xFFFF_FFFF, (keys[1] + 0xBB67_AE85) & 0xFFFF_FFFF]
    return x


def noise(seed: int, rows: int, columns: int, first: int = 0) -> np.ndarray:
    """z (rows, columns) in float64, from the kernel's documentation."""
    i, j = np.meshgrid(np.arange(first, first + rows), np.arange(columns), indexing="ij")
    words = philox(seed, (j // 8).astype(np.uint64), i.astype(np.uint64))
    word = np.choose(j % 8 // 2, words).astype(np.int64)
    odd = j % 2 == 1
    sign = 1 - 2 * np.where(odd, word >> 30 & 1, word >> 31)
    u = ((word & 0xFFFF) + 0.5) / 2**16
    phi = ((word >> 16 & 0x3FFF) + 0.5) / 2**14 * np.pi / 2
    return sign * np.sqrt(-2 * np.log(u)) * np.where(odd, np.sin(phi), np.cos(phi))


def drawn(seed: int, rows: int, columns: int, first: int = 0) -> np.ndarray:
    out = torch.full((rows, columns), torch.nan, device=DEVICE)
    kernel.perturb_rows(out, None, torch.ones(rows, device=DEVICE), seed, first)
    return out.double().cpu().numpy()


def test_philox_is_the_published_one():
    # Random123's own vectors are for 10 rounds; of 7 rounds known_answers.txt has this one, for counter and key 0.
    words = philox(0, np.zeros(1, np.uint64), np.zeros(1, np.uint64))
    assert [int(word[0]) for word in words] == [0x5F6F_B709, 0x0D89_3F64, 0x4F12_1F81, 0x4F73_0A48]


@pytest.mark.parametrize(("rows", "columns", "first"), [(1, 1, 0), (5, 7, 2), (37, 576, 0), (16, 1536, 100)])
def test_noise_is_that_of_the_documentation(rows, columns, first):
    np.testing.assert_allclose(drawn(SEED, rows, columns, first), noise(SEED, rows, columns, first), rtol=0, atol=2e-4)


@pytest.mark.slow
def test_moments_and_correlations():
    rows, columns = 64, 4096
    z = drawn(5, rows, columns)
    count = z.size
    assert abs(z.mean()) < 5 * count**-0.5
    assert abs((z**2).mean() - 1) < 5 * (2 / count) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / count) ** 0.5
    for shifted in (z[1:] * z[:-1], z[:, 1:] * z[:, :-1], z[:, 2:] * z[:, :-2], z[:, 8:] * z[:, :-8]):
        assert abs(shifted.mean()) < 5 * shifted.size**-0.5
    assert abs((z * drawn(6, rows, columns)).mean()) < 5 * count**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_weight_are_perturbed_and_rounded_once(dtype, transposed):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*((600, 70) if transposed else (70, 600)), generator=generator).to(DEVICE, dtype)
    weight = weight.t() if transposed else weight
    scale = torch.rand(70, generator=generator).to(DEVICE)
    before, out = weight.clone(), torch.empty(20, 600, dtype=dtype, device=DEVICE)
    kernel.perturb_rows(out, weight[50:], scale[50:], 3, 50)
    eps = scale[50:, None].double().cpu() * torch.from_numpy(noise(3, 20, 600, 50))
    rounding = torch.finfo(dtype).eps * (0.5 if GPU else 1)  # the interpreter cuts off
    torch.testing.assert_close(out.double().cpu(), weight[50:].double().cpu() + eps, rtol=rounding, atol=3e-4)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "rank"), [(1, 1, 1), (70, 130, 4), (32, 64, 16), (40, 100, 150)])
@pytest.mark.parametrize("layout", ["rows", "columns", "unaligned"])
def test_products_with_w0_of_all_layers_at_once(dtype, m, n, rank, layout):
    def stored(weight: torch.Tensor) -> torch.Tensor:
        if layout == "columns":
            return weight.t().contiguous().t()
        behind = torch.empty(m * n + 1, dtype=dtype, device=DEVICE)[1:] if layout == "unaligned" else None
        return weight if behind is None else behind.copy_(weight.flatten()).view(m, n)

    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter multiplies bfloat16 as if it were integers")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(m, n, generator=generator).to(DEVICE, dtype) for _ in range(3)]
    sb, a = (torch.randn(3, *shape, generator=generator).to(DEVICE) for shape in ((m, rank), (rank, n)))
    found = kernel.w0_terms_at_once([stored(weight) for weight in weights], sb, a)
    products = torch.stack(weights).double() @ a.double().mT
    sizes = sb.double().norm(dim=-1) * products.norm(dim=-1)  # terms that cancel are no more exact than this
    error = (found - (sb.double() * products).sum(-1)).abs() / sizes
    # Two parts of 16 bits keep 2^-16 (bfloat16) of A; the interpreter cuts off where a GPU rounds.
    assert error.max() < {torch.float32: 1e-5, torch.bfloat16: 5e-5, torch.float16: 1e-5}[dtype]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_input_gradient_on_the_device(dtype, monkeypatch):
    from lora_ggpo.perturbation import linear

    monkeypatch.setattr(linear, "_KERNEL_ENTRIES", 100 * 384)  # several blocks of rows
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(*shape, generator=generator) for shape in ((9, 384), (250, 384), (9, 250)))
    tau = torch.rand(250, generator=generator)
    x, weight, dy = (t.to(DEVICE, dtype) for t in (x, weight, dy))
    x.requires_grad_()
    y = perturbed_linear(x, weight, None, tau.to(DEVICE), 17)
    y.backward(dy)
    z = torch.from_numpy(noise(17, 250, 384)).to(DEVICE)
    dense = weight.double() + tau.to(DEVICE).double()[:, None] * z
    bound = {torch.float32: 1e-3, torch.bfloat16: 2e-2}[dtype]  # TF32 is off; bf16 rounds W0 + eps and the product
    for mine, theirs in ((y, x.double() @ dense.t()), (x.grad, dy.double() @ dense)):
        assert torch.linalg.norm(mine.double() - theirs) < bound * torch.linalg.norm(theirs)


@needs_gpu
def test_row_norms_of_a_16_bit_weight_on_the_device():
    torch.manual_seed(0)
    net = get_peft_model(nn.Sequential(nn.Linear(640, 320)), LoraConfig(r=4, target_modules=["0"])).to(DEVICE)
    net.base_model.model[0].base_layer.to(torch.bfloat16)
    module = net.base_model.model[0]
    nn.init.normal_(module.lora_B["default"].weight)
    ggpo = GGPO(net, GGPOConfig(sigma=0.1))
    net(torch.randn(2, 640, device=DEVICE, dtype=torch.bfloat16))
    a, b = (getattr(module, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    whole = module.base_layer.weight.double() + module.scaling["default"] * b @ a
    expected = 0.1 * whole.norm(dim=1) / 640**0.5
    torch.testing.assert_close(ggpo.layers[0].tau.double(), expected, rtol=1e-5, atol=0)


@needs_gpu
@pytest.mark.parametrize("kind", ["factored", "dense"])
def test_w0_is_bit_identical_and_steps_are_repeatable_on_the_device(kind):
    def losses() -> list[float]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(torch.bfloat16)
        net = get_peft_model(net, LoraConfig(r=4, target_modules=["0", "2"])).to(DEVICE)
        base = [p for p in net.parameters() if not p.requires_grad]
        before = [p.clone() for p in base]
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        ggpo = GGPO(net, GGPOConfig(sigma=0.1, rule="relative", beta=0.5, noise=kind))
        x = torch.randn(32, 256, device=DEVICE, dtype=torch.bfloat16)
        found = []
        for _ in range(20):
            loss = F.mse_loss(net(x).float(), x.float())
            loss.backward()
            optimizer.step()
            ggpo.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert all(torch.equal(p, q) for p, q in zip(base, before, strict=True))
        return found

    assert losses() == losses()
