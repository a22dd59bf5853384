"""Batches against transformers' own generation of one prompt at a time, and draws against the model's probabilities."""

import json
import re
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from typer.testing import CliRunner

from lora_ggpo import GGPO, GGPOConfig
from lora_ggpo.cli import app
from lora_ggpo.errors import DivergedError, UserError
from lora_ggpo.evaluation.answers import Answer, AnswerFile, Prompt
from lora_ggpo.evaluation.generate import Sampling, generate
from lora_ggpo.evaluation.target import Target
from lora_ggpo.models.load import load_model
from lora_ggpo.tasks.text import prompt_ids
from lora_ggpo.workspace.interrupt import Interrupted

TEXTS = ["the", "a film about a man who is", "I laughed and", "the story of a war that is not so good and not so bad"]
WARM = Sampling(max_new_tokens=8, temperature=1.0, samples=3, seed=5)


@pytest.fixture(scope="module")
def llama(tiny_llama):
    """(model, tokenizer): the tiny Llama with weights large enough that its choices are clear."""
    model, tokenizer = load_model(tiny_llama)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model, tokenizer


@pytest.fixture(scope="module")
def prompts(llama):
    return [Prompt(f"q{n}", prompt_ids(llama[1], text)) for n, text in enumerate(TEXTS)]


def run(llama, prompts, sampling, path=None, **options):
    target = Target("llama", *llama, task=None, chat=False, autocast=None, folder=None)
    return generate(target, prompts, sampling, AnswerFile(path), **options)


def texts(answers):
    return {key: answer.text for key, answer in answers.items()}


def alone(llama, text, count):
    """transformers' greedy tokens for one prompt, unpadded, without a cache, up to the end of the text."""
    model, tokenizer = llama
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=count, use_cache=False)[0, ids.shape[1] :].tolist()
    return out[: out.index(2)] if 2 in out else out


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_greedy_answers_are_those_of_one_prompt_at_a_time(llama, prompts, batch_size):
    answers = run(llama, prompts, Sampling(max_new_tokens=12), batch_size=batch_size)
    for number, text in enumerate(TEXTS):
        tokens = alone(llama, text, 12)
        answer = answers[f"q{number}", 0]
        whole = llama[1].decode(llama[1](text).input_ids + tokens, skip_special_tokens=True)
        assert text + answer.text == whole
        assert answer.tokens == len(tokens) + (answer.finish == "stop")
        assert answer.finish == ("length" if len(tokens) == 12 else "stop")


def test_the_end_of_text_ends_an_answer(llama, prompts):
    """The tokenizer's end is made the likeliest token behind a token that comes up."""
    model, tokenizer = llama
    third = alone(llama, TEXTS[0], 3)[2]
    model.generation_config.eos_token_id = [third]
    try:
        answer = run(llama, prompts[:1], Sampling(max_new_tokens=12))["q0", 0]
    finally:
        model.generation_config.eos_token_id = 2
    assert (answer.finish, answer.tokens) == ("stop", 3)
    whole = tokenizer.decode(tokenizer(TEXTS[0]).input_ids + alone(llama, TEXTS[0], 2), skip_special_tokens=True)
    assert TEXTS[0] + answer.text == whole


def test_settings_of_generation_that_came_with_the_model_do_not_count(llama, prompts):
    model, _ = llama
    plain = texts(run(llama, prompts, Sampling(max_new_tokens=12)))
    model.generation_config.repetition_penalty = 5.0
    try:
        assert texts(run(llama, prompts, Sampling(max_new_tokens=12))) == plain
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config.repetition_penalty = None


def test_stop_strings(llama, prompts):
    plain = texts(run(llama, prompts, Sampling(max_new_tokens=16)))
    stop = plain["q1", 0][7:10]
    answers = run(llama, prompts, Sampling(max_new_tokens=16, stop=(stop, "never there")), batch_size=2)
    for key, text in plain.items():
        head, found, _ = text.partition(stop)
        assert answers[key].text == head
        assert answers[key].finish == ("stop" if found else "length")
    assert answers["q1", 0].tokens < 16


def test_a_stop_string_that_the_prompt_begins_is_none(llama, prompts):
    """The prompt ends in the first half of the stop string, the answer begins with the other one."""
    text = run(llama, prompts[:1], Sampling(max_new_tokens=8))["q0", 0].text
    stop = TEXTS[0][-2:] + text[:2]
    assert run(llama, prompts[:1], Sampling(max_new_tokens=8, stop=(stop,)))["q0", 0].text == text


def test_draws_have_the_models_probabilities(llama, prompts):
    model, tokenizer = llama
    prompt = prompts[2]
    answers = run(llama, [prompt], Sampling(max_new_tokens=1, temperature=0.7, top_p=0.8, samples=2000), batch_size=500)
    with torch.no_grad():
        probabilities = (model(torch.tensor([prompt.ids])).logits[0, -1] / 0.7).double().softmax(-1)
    order = probabilities.argsort(descending=True)
    nucleus = order[: int((probabilities[order].cumsum(0) < 0.8).sum()) + 1]
    expected = Counter()
    for token in nucleus.tolist():
        text = tokenizer.decode([*prompt.ids, token], skip_special_tokens=True).removeprefix(TEXTS[2])
        expected[text] += 2000 * float(probabilities[token] / probabilities[nucleus].sum())
    observed = Counter(answer.text for answer in answers.values())
    assert observed.keys() <= expected.keys()
    common = [text for text, count in expected.items() if count >= 5]
    counts = [[of[text] for text in common] for of in (observed, expected)]
    rest = [2000 - sum(of) for of in counts]
    assert len(common) > 20
    assert stats.chisquare([*counts[0], rest[0]], [*counts[1], rest[1]]).pvalue > 1e-3


def test_an_answer_does_not_depend_on_its_batch(llama, prompts):
    one = texts(run(llama, prompts, WARM, batch_size=1))
    assert len(set(one.values())) > 6
    assert texts(run(llama, prompts[::-1], WARM, batch_size=5)) == one
    assert texts(run(llama, prompts[1:2], WARM)) == {key: text for key, text in one.items() if key[0] == "q1"}
    assert texts(run(llama, prompts, Sampling(**{**vars(WARM), "seed": 6}))) != one


@pytest.mark.parametrize("cut", [0, 9, 40])
def test_a_stopped_generation_goes_on(llama, prompts, cut, tmp_path):
    whole = run(llama, prompts, WARM, tmp_path / "whole.jsonl", batch_size=2)
    seen = []

    def interrupt(done, total):
        seen.append((done, total))
        if done == 6:
            raise KeyboardInterrupt

    path = tmp_path / "answers.jsonl"
    with pytest.raises(Interrupted, match="6 of 12 answers are kept"):
        run(llama, prompts, WARM, path, batch_size=2, progress=interrupt)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    there = 6 if cut == 0 else 5
    seen.clear()
    answers = run(llama, prompts, WARM, path, batch_size=2, progress=lambda *done: seen.append(done))
    assert seen[0] == (there, 12)
    assert seen[-1] == (12, 12)
    assert answers == whole
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 12
    assert {(line["id"], line["sample"]) for line in lines} == set(whole)


def test_more_samples_keep_those_there_are(llama, prompts, tmp_path, monkeypatch):
    first = run(llama, prompts, WARM, tmp_path / "a.jsonl")
    more = run(llama, prompts, Sampling(**{**vars(WARM), "samples": 4}), tmp_path / "a.jsonl")
    assert {key: more[key] for key in first} == first
    assert len(more) == 16
    monkeypatch.setattr(type(llama[0]), "generate", lambda *_, **__: pytest.fail("generated again"))
    assert run(llama, prompts, WARM, tmp_path / "a.jsonl") == first


def test_answers_with_odd_characters_survive(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "a\u2028b\x85c\x0b\r\nd 字"
    AnswerFile(path).add([Answer("q", 0, "x", text, 3, "stop")])
    cut = path.read_bytes()
    assert AnswerFile(path).answers["q", 0].text == text
    path.write_bytes(cut + cut[:-16])  # in the middle of a character
    assert list(AnswerFile(path).answers) == [("q", 0)]
    assert path.read_bytes() == cut


def test_answers_to_other_prompts_are_refused(llama, prompts, tmp_path):
    run(llama, prompts[:1], WARM, tmp_path / "a.jsonl")
    with pytest.raises(
        UserError, match="holds an answer to another prompt under the name q0: the data or the template"
    ):
        run(llama, [Prompt("q0", prompts[1].ids)], WARM, tmp_path / "a.jsonl")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_answers_nothing(tiny_llama, prompts, temperature):
    model, tokenizer = load_model(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(DivergedError, match="outputs are not finite"):
        run((model, tokenizer), prompts, Sampling(max_new_tokens=2, temperature=temperature))


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b"\n", b"\r\n \n"])
def test_answers_behind_a_byte_order_mark_or_a_blank_line_are_kept(llama, prompts, tmp_path, monkeypatch, before):
    path = tmp_path / "a.jsonl"
    first = run(llama, prompts, WARM, path)
    path.write_bytes(before + path.read_bytes())
    content = path.read_bytes()
    monkeypatch.setattr(type(llama[0]), "generate", lambda *_, **__: pytest.fail("generated again"))
    assert run(llama, prompts, WARM, path) == first
    assert path.read_bytes() == content


@pytest.mark.parametrize("damaged", ['{"id": "q", "note": 1}', '{"id": "q1", "sam', '{"id": 7, "sample": 0}'])
def test_a_damaged_line_is_named_and_nothing_is_lost(llama, prompts, tmp_path, damaged):
    path = tmp_path / "a.jsonl"
    run(llama, prompts, WARM, path)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], damaged, *lines[2:], lines[0][:9]]), encoding="utf-8")
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"a\.jsonl, line 3 is damaged: it holds no .*; mend that line or delete it\."):
        AnswerFile(path)
    assert path.read_bytes() == content


def test_too_long_and_pointless_requests_are_refused(llama, prompts):
    with pytest.raises(UserError, match=r"The prompt q3 has \d+ tokens; with 4090 of an answer .* the 2048 that"):
        run(llama, prompts, Sampling(max_new_tokens=4090))
    with pytest.raises(UserError, match="--samples needs a --temperature above 0"):
        Sampling(samples=2)
    with pytest.raises(UserError, match="--top-p needs a --temperature above 0"):
        Sampling(top_p=0.9)


@pytest.mark.parametrize(
    "option",
    [
        *("temperature=inf", "temperature=nan", "temperature=-1", "temperature=1e-5", "temperature=1e300"),
        *("top-p=nan", "top-p=0", "top-p=-0.5", "top-p=1.5", "max-new-tokens=0", "seed=-1"),
    ],
)
@pytest.mark.parametrize("command", [["chat", "absent"], ["suite", "gsm8k", "absent"]])
def test_values_out_of_range_are_refused_alike_everywhere(command, option):
    """Before the model is looked for: it is absent."""
    name = option.partition("=")[0]
    result = CliRunner().invoke(app, [*command, f"--{option}"])
    assert (result.exit_code, result.stdout) == (2, "")
    told = rf"(?m)^error: --{name} is \S+; it must be .*\.$|^Error: Invalid value for '--{name}': .+$"
    assert re.search(told, result.stderr)


def test_ggpo_adds_no_noise_and_the_mode_comes_back(llama, prompts):
    """A model in training with LoRA-GGPO attached answers as PEFT alone, and is in training mode afterwards."""
    base, tokenizer = llama
    torch.manual_seed(0)
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    try:
        plain = texts(run((peft, tokenizer), prompts, Sampling(max_new_tokens=8)))
        ggpo = GGPO(peft, GGPOConfig(sigma=0.5, rule="relative"))
        assert texts(run((peft, tokenizer), prompts, Sampling(max_new_tokens=8))) == plain
        assert all(module.training for module in peft.modules())
        ggpo.detach()
    finally:
        peft.unload()
    assert plain != texts(run(llama, prompts, Sampling(max_new_tokens=8)))
