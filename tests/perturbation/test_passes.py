"""Where noise is: in the training passes of the model and nowhere else, whatever ran or failed before."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ggpo.perturbation import GGPO, GGPOConfig

from .nets import TARGETS, Checkpointed, Net, adapted, batch, gradients, loss_of, net, shake

EXACT = {"rtol": 0, "atol": 0}


def perturbed(base=None, config=None, **settings):
    """(model, GGPO, a copy of the model that is stock PEFT)."""
    model = adapted(base or net(), config)
    stock = copy.deepcopy(model)
    return model, GGPO(model, GGPOConfig(**{"sigma": 0.3, "beta": 1.0, **settings})), stock


def add_reference(model):
    """As TRL does for DPO and GRPO: a second adapter, used for passes without gradients."""
    model.add_adapter("ref", LoraConfig(r=2, target_modules=TARGETS))
    shake(model)
    return model.double()


def reference_pass(model, x):
    with torch.no_grad():
        model.set_adapter("ref")
        y = model(x)
        model.set_adapter("default")
    return y


QUIET = {
    "no_grad": lambda model, x: torch.no_grad()(model)(x),
    "inference_mode": lambda model, x: torch.inference_mode()(model)(x),
    "reference adapter": reference_pass,
    "submodule": lambda model, x: model.base_model.model(x),
    "checkpointed submodule": lambda model, x: checkpoint(model.base_model.model, x, use_reentrant=False),
}


@pytest.mark.parametrize("when", ["first", "before backward", "after backward", "after step"])
@pytest.mark.parametrize("kind", QUIET)
def test_other_passes_are_plain_and_leave_training_as_it_is(kind, when):
    """Outputs are those of stock PEFT bit for bit; losses, gradients and GGPO's state those of a run without them."""
    runs = []
    for quiet in (False, True):
        torch.manual_seed(0)
        model = add_reference(adapted(net()))
        stock, ggpo = copy.deepcopy(model), GGPO(model, GGPOConfig(sigma=0.3, beta=1.0))
        losses = []

        def other(now, model=model, stock=stock, quiet=quiet):
            if quiet and when == now:
                assert torch.equal(QUIET[kind](model, batch(9)), QUIET[kind](stock, batch(9)))

        for step in range(3):
            other("first")
            loss = loss_of(model(batch(step)))
            other("before backward")
            loss.backward()
            other("after backward")
            ggpo.step()
            other("after step")
            losses.append(loss.detach())
        runs.append((torch.stack(losses), gradients(model), ggpo.state_dict()))
    torch.testing.assert_close(runs[1], runs[0], **EXACT)
    norms = [value for key, value in runs[1][2].items() if "norms" in key]
    assert len(norms) == 4
    assert all(value.max() > 0 for value in norms)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_two_passes_of_one_step_around_a_reference_pass(reentrant):
    """DPO: chosen, reference, rejected, one backward pass. Blocks run again see the noise of their own pass."""
    results = []
    for mode, quiet in ((None, False), (reentrant, True)):
        torch.manual_seed(2)
        model = adapted(Checkpointed(), LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down"]))
        model.add_adapter("ref", LoraConfig(r=3, target_modules=["up"]))
        shake(model)
        model.double().base_model.model.reentrant = mode
        ggpo, x = GGPO(model, GGPOConfig(sigma=0.3, beta=1.0)), batch(0).requires_grad_()
        for _ in range(2):
            model.zero_grad()
            chosen = loss_of(model(x))
            if quiet:
                reference_pass(model, x)
            rejected = loss_of(model(0.5 * x))
            if quiet:
                reference_pass(model, 0.5 * x)
            torch.nn.functional.softplus(chosen - rejected).backward()
            ggpo.step()
        results.append((chosen, rejected, gradients(model), x.grad, ggpo.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def test_a_checkpointed_submodule_called_directly_is_plain_when_it_runs_again():
    model, ggpo, stock = perturbed()
    loss_of(model(batch(0))).backward()
    ggpo.step()
    for one in (model, stock):
        one.zero_grad()
        loss_of(checkpoint(one.base_model.model, batch(1), use_reentrant=False)).backward()
    torch.testing.assert_close(gradients(model), gradients(stock), **EXACT)


def test_a_whole_model_that_is_checkpointed_runs_again_under_its_own_draw():
    results = []
    for run in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
        model, ggpo, _ = perturbed()
        loss = loss_of(run(model, batch(0))) + loss_of(run(model, batch(1)))
        loss.backward()
        ggpo.step()
        results.append((loss, gradients(model), ggpo.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


class Failing(Net):
    """Raises where it is told to: midway in the forward or in the backward pass."""

    where = None

    def forward(self, x):
        h = torch.tanh(self.inp(x))
        if self.where == "forward":
            raise RuntimeError("midway")
        if self.where == "backward":
            h.register_hook(self.fail)
        return self.head(h + self.down(torch.tanh(self.up(h))))

    def fail(self, gradient):
        raise RuntimeError("midway")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_is_noisy_behind_a_pass_that_raised(where):
    torch.manual_seed(0)
    model, ggpo, stock = perturbed(Failing())
    model.base_model.model.where = where
    with pytest.raises(RuntimeError, match="midway"):
        loss_of(model(batch(0))).backward()
    model.base_model.model.where = None
    for one in (model, stock):
        one.zero_grad()
        loss_of(checkpoint(one.base_model.model, batch(1), use_reentrant=False)).backward()
    torch.testing.assert_close(gradients(model), gradients(stock), **EXACT)
    assert not torch.equal(model(batch(0)), model(batch(0)))
    loss_of(model(batch(0))).backward()
    ggpo.step()
    assert any("norms" in key for key in ggpo.state_dict()), "capturing went on"


def test_a_frozen_part_that_runs_without_gradients_inside_a_training_pass_is_noisy():
    """The pass is decided on where it enters the model: reentrant checkpointing has no gradients inside either."""

    class Frozen(Net):
        def forward(self, x):
            with torch.no_grad():
                h = torch.tanh(self.inp(x))
            self.hidden = h
            return self.head(h)

    torch.manual_seed(0)
    model, _, stock = perturbed(Frozen())
    assert not torch.equal(model(batch(0)), stock(batch(0)))
    assert not torch.equal(model.base_model.model.hidden, stock.base_model.model.hidden)


def test_outputs_in_an_object_are_tied_to_their_pass():
    class Wrapped(Checkpointed):
        def forward(self, x):
            return SimpleNamespace(y=super().forward(x), rest=[None, "text"])

    results = []
    for mode in (None, False):
        torch.manual_seed(2)
        model = adapted(Wrapped(), LoraConfig(r=2, target_modules=["up", "down"]))
        model.base_model.model.reentrant = mode
        ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=1.0))
        first = model(batch(0)).y
        model(batch(1))
        loss_of(first).backward()
        ggpo.step()
        results.append((gradients(model), ggpo.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    assert len(results[0][1]) == 8


def test_generation_in_training_mode_is_plain():
    """GRPO's rollouts: the model stays in training mode, and training goes on as if nothing had been generated."""
    ids = torch.tensor([[1, 5, 7, 9]])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    runs = []
    for generates in (False, True):
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes))
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
        stock, ggpo = copy.deepcopy(model), GGPO(model, GGPOConfig(sigma=0.5))
        for _ in range(2):
            if generates:
                settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
                found, expected = (
                    one.generate(ids, return_dict_in_generate=True, **settings) for one in (model, stock)
                )
                torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **EXACT)
            loss = model(ids, labels=ids).loss
            loss.backward()
            ggpo.step()
        runs.append((loss, gradients(model), ggpo.state_dict()))
    torch.testing.assert_close(runs[1], runs[0], **EXACT)


def test_a_model_that_is_a_part_of_another_is_noisy_in_its_own_passes_alone():
    model, _, stock = perturbed()
    whole = nn.Sequential(model, nn.Linear(5, 5).double())
    assert not torch.equal(whole(batch(0)), whole[1](stock(batch(0))))
