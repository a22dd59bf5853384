"""torch.compile: the compiled model is the eager one, in one graph, whatever draw, step or pass comes next."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ggpo.perturbation import GGPO, GGPOConfig

from .nets import Block, Checkpointed, adapted, batch, gradients, loss_of, net, shake

pytestmark = pytest.mark.slow

CLOSE = {"rtol": 1e-10, "atol": 1e-12}

WHOLE = ["wrapper", pytest.param("function", marks=pytest.mark.thorough)]
"""Two ways to compile a model as a whole, of which tests of a run show both."""


class Counter(CompileCounterWithBackend):
    """A backend that compiles as ``aot_eager`` does, and counts its graphs."""

    def __init__(self):
        super().__init__("aot_eager")

    def wrapper(self, model):
        return torch.compile(model, backend=self, fullgraph=True)

    def parts(self, model):
        """Where a whole graph cannot be had."""
        return torch.compile(model, backend=self)

    def in_place(self, model):
        model.compile(backend=self, fullgraph=True)
        return model

    def function(self, model):
        return torch.compile(lambda *args, **kwargs: model(*args, **kwargs), backend=self, fullgraph=True)

    def blocks(self, model):
        for block in model.base_model.model.blocks:
            block.compile(backend=self, fullgraph=True)
        return model


@pytest.fixture
def counter():
    torch._dynamo.reset()
    counters.clear()
    yield Counter()
    torch._dynamo.reset()


def eager(model):
    return model


def perturbed(model, **settings):
    return GGPO(model, GGPOConfig(**{"sigma": 0.3, "beta": 1.0, **settings}), total_steps=4)


def small():
    """Two layers: the compiler takes its time for each."""
    torch.manual_seed(2)
    return Block(6)


def train(called, model, ggpo, steps=3, accumulation=2, clip=None, evaluates=True):
    """Optimizer steps with an evaluation after each, which takes a graph of its own: all that they show."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    seen = []
    for step in range(steps):
        for micro in range(accumulation):
            loss = loss_of(called(batch(accumulation * step + micro)))
            loss.backward()
            seen.append(loss.detach())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        seen.append(gradients(model))
        optimizer.step()
        ggpo.step()
        optimizer.zero_grad()
        seen.append({layer.name: layer.tau.clone() for layer in ggpo.layers})
        seen.append(ggpo.metrics())
        if evaluates:
            model.eval()
            with torch.no_grad():
                seen.append(called(batch(9)))
            model.train()
    return seen, ggpo.state_dict()


SETTINGS = {
    "paper": {},
    "relative, ramp, sketch": {"rule": "relative", "schedule": "cosine", "gradient": "sketch"},
    "sd-scripts, one draw a step": {"rule": "sd-scripts", "beta": 1e-3, "redraw": "optimizer-step"},
}


def pair(way, counter, settings=None, make=small, config=None, **train_settings):
    """What an eager and a compiled run of the same model show."""
    runs = []
    for compile_ in (eager, getattr(counter, way)):
        model = adapted(make(), config)
        ggpo = perturbed(model, **(settings or {}))
        runs.append(train(compile_(model), model, ggpo, **train_settings))
    return runs


@pytest.mark.parametrize(
    ("way", "settings", "make"),
    [
        ("wrapper", "paper", net),
        ("wrapper", "relative, ramp, sketch", small),
        ("wrapper", "sd-scripts, one draw a step", small),
        ("function", "relative, ramp, sketch", small),
    ],
)
def test_a_run_is_the_eager_one_in_one_graph(way, settings, make, counter):
    """And one for evaluation: no draw, no step and no change from one to the other compiles anything anew."""
    expected, found = pair(way, counter, SETTINGS[settings], make)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_a_model_compiled_in_place_is_the_eager_one(counter):
    expected, found = pair("in_place", counter)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert counter.frame_count == 2


@pytest.mark.parametrize("way", ["wrapper", "function"])
def test_gradient_norms_are_those_before_clipping(way, counter):
    """Clipped to 1e-3, gradients would move A and B, and the noise with them, otherwise."""
    expected, found = pair(way, counter, {"rule": "relative"}, clip=1e-3, evaluates=False)
    torch.testing.assert_close(found, expected, **CLOSE)
    norms = [value for key, value in found[1].items() if "norms" in key]
    assert len(norms) == 2
    assert all(value.max() > 1e-4 for value in norms)


def dora():
    return LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], use_dora=True)


def dropout():
    return LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], lora_dropout=0.5)


def test_dropout(counter):
    expected, found = pair("wrapper", counter, config=dropout())
    torch.testing.assert_close(found, expected, **CLOSE)
    assert counter.frame_count == 2


def test_dora_whose_forward_the_compiler_cannot_trace_whole(counter):
    expected, found = pair("parts", counter, config=dora(), steps=2, evaluates=False)
    torch.testing.assert_close(found, expected, **CLOSE)


def blocks(depth=2):
    torch.manual_seed(2)
    return Checkpointed(depth)


BLOCKS = LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down"])


def test_blocks_compiled_one_by_one_share_a_graph(counter):
    expected, found = pair("blocks", counter, SETTINGS["relative, ramp, sketch"], lambda: blocks(3), BLOCKS)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert counter.frame_count == 3, "the first block, whose input needs no gradient, the others, and evaluation"


@pytest.mark.parametrize("way", [*WHOLE, "blocks"])
def test_what_checkpointing_runs_again_has_the_noise_of_its_pass(way, counter):
    """Two forward passes before one backward pass, with a draw each."""
    runs = []
    for reentrant, compile_ in ((None, eager), (False, getattr(counter, way))):
        model = adapted(blocks(), BLOCKS)
        model.base_model.model.reentrant = reentrant
        ggpo = perturbed(model)
        called, seen = compile_(model), []
        for step in range(2):
            first, second = called(batch(step)), called(batch(step))
            assert not torch.allclose(first, second)
            (loss_of(first) + loss_of(second).square()).backward()
            ggpo.step()
            seen += [first.detach(), second.detach(), gradients(model), ggpo.metrics()]
        runs.append((seen, ggpo.state_dict()))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)
    assert not counters["graph_break"]


def test_reentrant_checkpointing_breaks_the_graph_and_nothing_else(counter):
    runs = []
    for reentrant, compiles in ((None, False), (True, True)):
        model = adapted(blocks(), BLOCKS)
        model.base_model.model.reentrant = reentrant
        ggpo = perturbed(model)
        called, x = counter.parts(model) if compiles else model, batch(0).requires_grad_()
        for _ in range(2):
            first, second = called(x), called(0.5 * x)
            (loss_of(first) + loss_of(second).square()).backward()
            ggpo.step()
        runs.append((first, second, gradients(model), ggpo.state_dict(), ggpo.metrics()))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)


def test_two_draws_in_one_graph_are_two(counter):
    """As R-Drop has it: the same input twice."""
    runs = []
    for compiles in (False, True):
        model = adapted(small())
        ggpo = perturbed(model)

        def both(x, model=model):
            return model(x), model(x)

        called = torch.compile(both, backend=counter, fullgraph=True) if compiles else both
        first, second = called(batch(0))
        assert not torch.allclose(first, second)
        (loss_of(first) + loss_of(second).square()).backward()
        ggpo.step()
        runs.append((first, second, gradients(model), ggpo.state_dict()))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)
    assert counter.frame_count == 1


def fails(gradient):
    raise RuntimeError("midway")


@pytest.mark.parametrize("way", ["wrapper", pytest.param("blocks", marks=pytest.mark.thorough)])
def test_passes_without_noise_are_plain_also_behind_a_backward_pass_that_raised(way, counter):
    model = adapted(blocks(), BLOCKS)
    stock = copy.deepcopy(model)
    ggpo = perturbed(model)
    called = getattr(counter, way)(model)
    for raises in (False, True):
        y = called(batch(0).requires_grad_())
        if raises:
            y.register_hook(fails)
            with pytest.raises(RuntimeError, match="midway"):
                loss_of(y).backward()
        else:
            loss_of(y).backward()
            ggpo.step()
        for quiet in (torch.no_grad(), torch.inference_mode()):
            with quiet:
                torch.testing.assert_close(called(batch(1)), stock(batch(1)), **CLOSE)
        inner = (one.base_model.model(batch(1)) for one in (called, stock))
        torch.testing.assert_close(*inner, **CLOSE)
        assert not torch.allclose(called(batch(1)), stock(batch(1)))


@pytest.mark.parametrize("way", WHOLE)
def test_an_adapter_that_is_switched_to_is_perturbed(way, counter):
    runs = []
    for compile_ in (eager, getattr(counter, way)):
        model = adapted(small())
        model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
        shake(model)
        model.double()
        ggpo, seen = perturbed(model), []
        called = compile_(model)
        for name in ("default", "other", "default", "other"):
            model.set_adapter(name)
            model.zero_grad()
            seen.append(called(batch(0)))
            loss_of(seen[-1]).backward()
            ggpo.step()
            seen.append(gradients(model))
        runs.append((seen, ggpo.state_dict(), ggpo.metrics()))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)


def test_two_adapters_at_once(counter):
    runs = []
    for compile_ in (eager, counter.wrapper):
        model = adapted(small())
        model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
        shake(model)
        model.double()
        model.base_model.set_adapter(["default", "other"])
        runs.append(train(compile_(model), model, perturbed(model)))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)
    assert counter.frame_count == 2


def test_attached_to_the_wrapper_afterwards(counter):
    """Also to one that has run already: what was compiled without noise is not what runs then."""
    runs = []
    for compile_ in (eager, counter.wrapper):
        model = adapted(small())
        called = compile_(model)
        plain = called(batch(0))
        ggpo = perturbed(called)
        runs.append((plain, *train(called, model, ggpo)))
        ggpo.detach()
        torch.testing.assert_close(called(batch(1)), copy.deepcopy(model)(batch(1)), **CLOSE)
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)


@pytest.mark.parametrize("way", WHOLE)
def test_autocast(way, counter):
    """Products of bfloat16: the two differ by the order of sums, and agree as far as its 8 bits go."""
    runs = []
    for compile_ in (eager, getattr(counter, way)):
        model = adapted(small(), dtype=torch.float32)
        ggpo = perturbed(model)
        called = compile_(model)
        for step in range(2):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = called(batch(step, dtype=torch.float32))
            loss_of(y.float()).backward()
            ggpo.step()
        runs.append((y.float(), gradients(model)))
    assert runs[1][0].dtype == runs[0][0].dtype
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=0.03, atol=0.03)
    for name, value in runs[0][1].items():
        assert (runs[1][1][name] - value).norm() < 0.05 * value.norm(), name


@pytest.mark.parametrize("way", [*WHOLE, "in_place"])
def test_a_copy_draws_for_itself_and_a_detached_model_is_plain(way, counter):
    model = adapted(small())
    stock = copy.deepcopy(model)
    ggpo = perturbed(model)
    called = getattr(counter, way)(model)
    loss_of(called(batch(0))).backward()
    ggpo.step()
    model.zero_grad()
    twin, twin_ggpo = copy.deepcopy((model, ggpo))
    results = [loss_of(one(batch(1))) for one in (called, twin)]
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    for one in results:
        one.backward()
    ggpo.step()
    twin_ggpo.step()
    torch.testing.assert_close(twin_ggpo.state_dict(), ggpo.state_dict(), **CLOSE)
    ggpo.detach()
    torch.testing.assert_close(called(batch(2)), stock(batch(2)), **CLOSE)
    assert not torch.allclose(twin(batch(2)), stock(batch(2)))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("way", WHOLE)
def test_dense_noise_breaks_graphs_and_is_the_eager_one(way, counter):
    runs = []
    for compiles in (False, True):
        model = adapted(small())
        ggpo = perturbed(model, noise="dense")
        called = model
        if compiles:
            called = torch.compile(model if way == "wrapper" else lambda x, model=model: model(x), backend=counter)
        runs.append(train(called, model, ggpo))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)
    first = counter.frame_count
    loss_of(called(batch(0))).backward()
    assert counter.frame_count == first, "a draw compiles nothing"


def test_a_step_without_the_model_is_told(counter):
    model = adapted(small())
    ggpo = perturbed(model)
    called = counter.wrapper(model)
    loss_of(called.base_model.model(batch(0))).backward()
    with pytest.warns(UserWarning, match="saw no gradient"):
        ggpo.step()
    loss_of(called(batch(0))).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ggpo.step()


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def llama(dtype=torch.float64, checkpoints=False):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, **SIZES)).to(dtype)
    base.config.use_cache = False
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).to(dtype)
    if checkpoints:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.disable_input_require_grads()  # which reentrant checkpointing needs, and no whole graph can have
    return model.train()


def train_llama(called, model, **settings):
    ggpo, seen = perturbed(model, **settings), []
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        result = called(input_ids=ids, labels=ids)
        result.loss.backward()
        seen += [result.loss.detach(), result.logits.detach(), gradients(model)]
        optimizer.step()
        ggpo.step()
        optimizer.zero_grad()
        seen.append(ggpo.metrics())
    return seen, ggpo.state_dict()


@pytest.mark.parametrize("checkpoints", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_a_llama_is_one_graph(checkpoints, counter):
    runs = []
    for compile_ in (eager, counter.wrapper):
        model = llama(checkpoints=checkpoints and compile_ is not eager)
        runs.append(train_llama(compile_(model), model))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)
    assert counter.frame_count == 1
    assert not counters["graph_break"]


def test_a_run_by_inductor(counter, monkeypatch):
    """In float32: it changes the order of sums."""
    monkeypatch.setattr(inductor, "compile_threads", 1)  # processes of its own would import torch first
    runs = []
    for compiles in (False, True):
        model = adapted(small(), dtype=torch.float32)
        called, ggpo = torch.compile(model, fullgraph=True) if compiles else model, perturbed(model)
        losses = []
        for step in range(3):
            loss = loss_of(called(batch(step, dtype=torch.float32)))
            loss.backward()
            ggpo.step()
            losses.append(loss.detach())
        runs.append((losses, gradients(model), ggpo.state_dict()))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.thorough
def test_a_llama_by_inductor(counter):
    runs = []
    for compiles in (False, True):
        model = llama(torch.float32)
        runs.append(train_llama(torch.compile(model, fullgraph=True) if compiles else model, model))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_whole_model_that_is_checkpointed_runs_again_under_its_own_draw(counter):
    runs = []
    for compiles in (False, True):
        model = adapted(small())
        ggpo = perturbed(model)
        called = counter.wrapper(model) if compiles else model
        loss = loss_of(checkpoint(called, batch(0), use_reentrant=False))
        (loss + loss_of(checkpoint(called, batch(1), use_reentrant=False))).backward()
        ggpo.step()
        runs.append((loss, gradients(model), ggpo.state_dict()))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)
