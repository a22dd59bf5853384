"""Forgetting is the rise of the mean token loss of general text, and exactly 0 where training changes nothing."""

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ggpo.data.bundled import GENERAL_TEXT
from lora_ggpo.data.general import GeneralTextConfig, read_general_text
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.folder import read_run
from lora_ggpo.training.forgetting import BEFORE, text_to_keep
from lora_ggpo.training.scorer import fixed_sample
from tests.recipes import GUIDED, recipe_text, write_pairs, write_rows
from tests.training.runs import assert_same, invoke, refused, trained, unfinish, works

TEXTS = [f"a {'good ' * (n % 5)}film of {n} people who {'never ' * (n % 3)}met." for n in range(7)]
STILL = ("training.learning_rate=0",)


@pytest.fixture(scope="module")
def recipe(tiny_llama, tmp_path_factory):
    """A recipe that asks for forgetting on TEXTS, cut at 24 tokens."""
    folder = tmp_path_factory.mktemp("forgetting")
    texts = write_rows(folder / "texts.jsonl", [{"body": text} for text in TEXTS])
    general = {"source": str(texts), "text": "body", "max_length": 24}
    data = write_pairs(folder / "data.jsonl")
    text = recipe_text(tiny_llama, data, folder / "runs", forgetting=general, training={"learning_rate": 0.05})
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def measured(folder):
    """The metrics of general text of a run, and what its folder holds of the time before."""
    return read_run(folder).metrics["evaluation"][GENERAL_TEXT], json.loads((folder / BEFORE).read_text())


def mean_loss(model, tokenizer):
    """As PEFT's method_comparison has it, a text at a time and in float64."""
    losses = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model.double().eval()(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.fixture(scope="module")
def run(recipe):
    return trained(recipe)


def test_it_is_the_rise_of_the_mean_token_loss(run, tiny_llama):
    found, _ = measured(run)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    before = mean_loss(AutoModelForCausalLM.from_pretrained(tiny_llama), tokenizer)
    after = mean_loss(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), run / "adapter"), tokenizer
    )
    assert abs(after - before) > 1e-3
    assert found["base_loss"]["value"] == pytest.approx(before, abs=1e-6)
    assert found["loss"]["value"] == pytest.approx(after, abs=1e-6)
    assert found["forgetting"]["value"] == pytest.approx(after - before, abs=2e-6)
    assert found["forgetting"]["n"] == len(TEXTS)
    assert 0 < found["forgetting"]["se"] < math.inf


@pytest.mark.parametrize(
    "method",
    [
        [f"ggpo={json.dumps(GUIDED)}"],
        ["adapter.use_dora=true"],
        ["adapter=null"],
        ["adapter.init_lora_weights=pissa", f"ggpo={json.dumps(GUIDED)}"],
        ["adapter.init_lora_weights=sc_lora", f"ggpo={json.dumps(GUIDED)}"],
    ],
    ids=["ggpo", "dora", "full", "pissa", "sc_lora"],
)
def test_what_learns_nothing_forgets_exactly_nothing(method, recipe, run, tmp_path):
    found, before = measured(trained(recipe, *STILL, *method, f"output={tmp_path}"))
    assert found["forgetting"] == {"value": 0.0, "se": 0.0, "n": len(TEXTS)}
    assert found["loss"] == found["base_loss"]
    same = measured(run)[1]["losses"]
    assert before["losses"] == (pytest.approx(same, rel=1e-5) if "init_lora_weights" in str(method) else same)


def test_random_starting_values_are_not_the_model_before(recipe, run, tmp_path):
    _, before = measured(trained(recipe, *STILL, "adapter.init_lora_weights=false", f"output={tmp_path}"))
    assert before == measured(run)[1]


@pytest.mark.parametrize("method", ["optimizer=lora-fa", f"ggpo={json.dumps(GUIDED)}"], ids=["lora-fa", "ggpo"])
def test_to_measure_changes_nothing(method, recipe, tmp_path):
    changes = (method, "adapter.lora_dropout=0.1", "training.max_steps=2")
    measured_, plain = (
        trained(recipe, *changes, *asked, f"output={tmp_path / name}")
        for name, asked in (("measured", ()), ("plain", ("forgetting=null",)))
    )
    assert_same(measured_, plain)
    one, other = (read_run(folder).metrics["training"]["trainable_parameters"] for folder in (measured_, plain))
    assert one == other


def test_a_run_that_goes_on_measures_from_the_beginning(recipe, run, tmp_path):
    folder = trained(recipe, "training.save_steps=2", f"output={tmp_path}")
    whole = measured(folder)
    assert whole == measured(run)
    unfinish(folder)
    (folder / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    assert measured(trained(recipe, "training.save_steps=2", f"output={tmp_path}")) == whole


def test_text_that_changes_on_the_way_is_refused(recipe, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"body": text} for text in TEXTS])
    changes = (f"output={tmp_path / 'runs'}", f"forgetting.source={texts}")
    folder = trained(recipe, *changes)
    (folder / "metrics.json").unlink()
    write_rows(texts, [{"body": text} for text in TEXTS[1:]])
    with pytest.raises(UserError, match=r"The text of forgetting has changed since .* was begun; put it back"):
        trained(recipe, *changes)


def test_a_run_that_starts_from_general_text_goes_on_as_if_it_had_not_stopped(recipe, tmp_path):
    changes = ("adapter.init_lora_weights=sc_lora", "training.save_steps=1", "training.max_steps=2", "score_rows=2")
    folder = trained(recipe, *changes, f"output={tmp_path}")
    whole = shutil.copytree(folder, tmp_path / "whole")
    unfinish(folder)
    (folder / "checkpoints" / "checkpoint-2" / "trainer_state.json").unlink()
    assert_same(trained(recipe, *changes, f"output={tmp_path}"), whole)


def test_what_is_kept_from_is_not_what_is_measured_on_where_there_is_other_text(recipe, tiny_llama, tiny_bert):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)

    def kept(*changes):
        asked = parse_recipe(recipe.read_text(), "r.yaml", changes)
        rows = text_to_keep(asked, model, tokenizer)["input_ids"]
        return asked.forgetting, {tokenizer.decode(ids, skip_special_tokens=True) for ids in rows}

    config, others = kept("forgetting.rows=3", "forgetting.max_length=100")
    measured_on = set(fixed_sample(read_general_text(config), 3)["text"])
    assert (len(measured_on), others) == (3, set(TEXTS) - measured_on)
    assert kept("forgetting.max_length=100")[1] == set(TEXTS)
    assert len(kept("forgetting=null")[1]) == 100  # the bundled text
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    encoded = text_to_keep(parse_recipe(recipe.read_text(), "r.yaml", ["forgetting=null"]), model, tokenizer)
    assert max(encoded["length"]) == 512 == tokenizer.model_max_length


def test_no_trial_of_settings_measures_it(recipe, tmp_path):
    folder = trained(recipe, "score_test=false", f"output={tmp_path}")
    assert not (folder / BEFORE).exists()
    assert GENERAL_TEXT not in read_run(folder).metrics["evaluation"]


def test_the_card_and_show_have_it(run):
    value = measured(run)[0]["forgetting"]
    shown = works(invoke("show", run)).output
    card = (run / "adapter" / "README.md").read_text()
    for text in (shown, card):
        assert f"{value['value']:.4f} ± {value['se']:.4f}" in text
    assert "Forgetting is the rise of the loss on general text" in card
    assert "source: texts.jsonl" in card


def test_a_model_without_such_a_loss_is_refused(recipe_file):
    refused(
        invoke("train", recipe_file, "forgetting=general-text"),
        "forgetting is the rise of a causal language model's loss, which task classification has none of",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forgetting.text=wrong", "has no column 'wrong', its columns are body. Name the column with forgetting.text."),
        ("forgetting.source=nowhere.jsonl", "nowhere.jsonl"),
        ("forgetting.rows=0", "forgetting.rows must be greater than 0"),
        ("forgetting.max_length=9999", "forgetting.max_length = 9999 is more than the 2048 tokens the model can read"),
    ],
)
def test_mistakes(text, message, recipe, tmp_path):
    refused(invoke("train", recipe, text, f"output={tmp_path}"), message)


def test_the_bundled_text_is_whole_and_plain():
    config = parse_recipe(recipe_text("m", "d.jsonl", "o", forgetting="general-text"), "r.yaml").forgetting
    assert config == GeneralTextConfig()
    rows = read_general_text(config)
    assert len(rows) == len(set(rows["text"])) == 100
    assert all(500 <= len(text) <= 1500 and text == " ".join(text.split()) and "<" not in text for text in rows["text"])
