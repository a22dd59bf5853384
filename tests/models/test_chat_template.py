"""What is learnt to end a turn ends generation, everywhere; the day that a template writes is that of the run."""

import copy
import json
import os
from datetime import date, datetime
from itertools import pairwise

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import chat_template_utils

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.generate import end_tokens
from lora_ggpo.evaluation.target import load_target
from lora_ggpo.models.chat_template import end_of_turn, remove_day, write_day, written_day
from lora_ggpo.models.load import load_model
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.merge import merge_run
from lora_ggpo.training.reuse import evaluate_run
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.chat_styles import DATED, ENDLESS, STYLES, save
from tests.recipes import recipe_text
from tests.tasks.make import task

TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi! Some write <|im_end|> and <|end|>."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4."},
]
LORA = {"r": 2, "target_modules": "all-linear"}


@pytest.fixture
def trained(smollm2, tmp_path):
    """Trains a model of a style on conversations and returns the run folder."""

    def trained(style, adapter=LORA):
        data = tmp_path / "data.jsonl"
        data.write_text(
            "\n".join(json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, *TALK[1:]]}) for n in range(10))
        )
        model = save(tmp_path / "model", smollm2[1], style)
        training = {"max_steps": 1, "learning_rate": 1e-2}
        text = recipe_text(
            model, data, tmp_path / "runs", task={"max_length": 128}, adapter=adapter, ggpo=None, training=training
        )
        return train(parse_recipe(text, "r.yaml"), Reporter(quiet=True))[0].folder

    return trained


def ends_of_turns(row):
    """The last token of each stretch that is learnt."""
    labels = [*row["labels"], -100]
    return [one for one, following in pairwise(labels) if one != -100 and following == -100]


@pytest.mark.parametrize("name", STYLES)
def test_the_token_that_a_turn_is_learnt_to_end_in_ends_generation(name, smollm2, tmp_path):
    style = STYLES[name]
    model, tokenizer = load_model(save(tmp_path / "model", smollm2[1], style))
    rows = task(kind="sft").encode(Dataset.from_list([{"messages": TALK}]), tokenizer)
    end, eos = tokenizer.convert_tokens_to_ids([style.end, style.eos])
    assert ends_of_turns(rows[0]) == [end, end]
    assert set(end_tokens(model, tokenizer)) == {end, eos}
    assert tokenizer.eos_token_id == eos
    pair = Dataset.from_dict({"prompt": ["2+2?"], "completion": [" 4"]})
    assert ends_of_turns(task(kind="sft").encode(pair, tokenizer)[0]) == [eos]
    asked = task(kind="sft", chat_template=True).encode(pair, tokenizer)
    assert ends_of_turns(asked[0]) == [end]


@pytest.mark.parametrize("adapter", [LORA, None])
def test_a_run_and_what_is_merged_of_it_end_where_turns_do(trained, tmp_path, adapter):
    run = trained(STYLES["qwen"], adapter)
    target = load_target(str(run))
    both = {*target.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])}
    assert set(end_tokens(target.model, target.tokenizer)) == both
    weights = run / ("adapter" if adapter else "model")
    assert set(GenerationConfig.from_pretrained(weights).eos_token_id) == both
    if adapter:
        merge_run(run, tmp_path / "merged")
        assert set(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id) == both


def test_a_template_without_an_end_is_refused_before_training(trained, tmp_path):
    with pytest.raises(UserError, match=r"ends an assistant's turn in '\\n', which is no special token, so a model"):
        trained(STYLES["qwen"]._replace(template=ENDLESS))
    assert not list(tmp_path.rglob("log.jsonl"))


def test_an_irregular_end_is_refused(smollm2):
    tokenizer = copy.deepcopy(smollm2[1])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.content|length > 5 %}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(UserError, match=r"Row 0: .* does not end this assistant's turn in <\|im_end\|>"):
        task(kind="sft").encode(Dataset.from_list([{"messages": TALK[2:]}]), tokenizer)


def test_tokens_that_are_not_called_special_end_a_turn_where_no_other_does(smollm2):
    tokenizer = copy.deepcopy(smollm2[1])
    tokenizer.add_tokens(["<|stop|>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|stop|>{% endfor %}"
    assert end_of_turn(tokenizer).token == "<|stop|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|stop|><|im_end|>{% endfor %}"
    assert end_of_turn(tokenizer).token == "<|im_end|>"


# --- the day -------------------------------------------------------------------------------------------------------

FORMATS = ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%A", "%-d.%-m.%y", "%Y年%m月%d日", "100%%d %%%d", "%j %U %x", "no day"]


def set_clock(monkeypatch, now):
    """Set the clock that transformers gives to templates."""
    clock = type("Clock", (datetime,), {"now": classmethod(lambda cls: now)})
    monkeypatch.setattr(chat_template_utils, "datetime", clock)


@pytest.mark.parametrize("format", FORMATS)
def test_a_day_is_written_as_transformers_writes_it(smollm2, monkeypatch, format):
    tokenizer = copy.deepcopy(smollm2[1])
    inside = "{% macro day() %}{{ strftime_now(form) }}{% endmacro %}{{ day() }}"
    template = (
        f"\n{{%- set form = '{format}' %}}\n{{% if strftime_now is defined %}}{{{{ strftime_now(form) }}}}{{% endif %}}"
    )
    tokenizer.chat_template = template = template + inside.replace("form)", f"'{format}')")
    set_clock(monkeypatch, datetime(2024, 7, 6))
    expected = tokenizer.apply_chat_template(TALK, tokenize=False)
    set_clock(monkeypatch, datetime(1999, 1, 1))
    write_day(tokenizer, date(2025, 1, 1))
    write_day(tokenizer, date(2024, 7, 6))
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == expected
    assert written_day(tokenizer) == date(2024, 7, 6)
    remove_day(tokenizer)
    assert tokenizer.chat_template == template


def test_a_run_keeps_its_day(trained, tmp_path, monkeypatch):
    run = trained(DATED)
    begun = date.fromisoformat(json.loads((run / "versions.json").read_text())["begun"])
    scores = json.loads((run / "metrics.json").read_text())["evaluation"]
    assert AutoTokenizer.from_pretrained(run / "adapter").chat_template == DATED.template
    set_clock(monkeypatch, datetime(1999, 1, 1))
    assert evaluate_run(run) == scores
    target = load_target(str(run))
    prompt = target.prompt("q", target.conversation(["2+2?"], []))
    assert f"It is {begun:%A, %d %B %Y}." in target.tokenizer.decode(prompt.ids)


def test_the_day_of_an_earlier_release_s_run_is_that_of_its_recipe(trained):
    run = trained(DATED)
    versions = json.loads((run / "versions.json").read_text())
    del versions["begun"]
    (run / "versions.json").write_text(json.dumps(versions))
    os.utime(run / "recipe.yaml", (datetime(2023, 5, 4, 12).timestamp(),) * 2)
    with pytest.warns(UserWarning, match=r"does not say on which day .* 2023-05-04 is taken, the date of its recipe"):
        target = load_target(str(run))
    assert written_day(target.tokenizer) == date(2023, 5, 4)
