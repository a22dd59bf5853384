"""The terminal chat against transformers' own generation, and as a command with a pipe."""

import io

import pytest
import torch
from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.chat import Chat, run_chat
from lora_ggpo.evaluation.generate import Sampling
from lora_ggpo.evaluation.target import load_target

SHORT = Sampling(max_new_tokens=5)


@pytest.fixture(scope="module")
def target(chat_llama):
    return load_target(chat_llama)


def talk(target, text, sampling=SHORT, **options):
    """What is said beside the answers, which are printed."""
    said = []
    run_chat(Chat(target, sampling, **options), io.StringIO(text), said.append)
    return said


def expected(target, messages):
    ids = target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = target.model.generate(ids, do_sample=False, max_new_tokens=5)
    return target.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def user(text):
    return {"role": "user", "content": text}


def test_a_conversation_is_kept_until_it_is_reset(target, capsys):
    said = talk(target, "one\ntwo\n\n/reset\ntwo\n/quit\nthree\n", system="Be kind.")
    system = {"role": "system", "content": "Be kind."}
    first = expected(target, [system, user("one")])
    second = expected(target, [system, user("one"), {"role": "assistant", "content": first}, user("two")])
    alone = expected(target, [system, user("two")])
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()] == [first, second, alone]
    assert alone != second
    assert said == []


def test_without_a_chat_template_each_line_is_continued_on_its_own(tiny_llama, capsys):
    plain = load_target(tiny_llama)
    talk(plain, "one\ntwo\n")
    both = capsys.readouterr().out
    talk(plain, "two\n")
    assert both.endswith(capsys.readouterr().out)
    with pytest.raises(UserError, match=r"--system needs a chat template, which .* does not use"):
        Chat(plain, SHORT, "Be kind.")


def test_draws_are_those_of_the_seed(target, capsys):
    for seed in (1, 1, 2):
        talk(target, "one\ntwo\n", Sampling(max_new_tokens=5, temperature=1.0, seed=seed))
        print("|")
    first, again, other, _ = capsys.readouterr().out.split("|\n")
    assert first == again != other


def test_what_is_no_command_or_too_long_is_said(target, capsys):
    said = talk(target, f"/rest\n{'word ' * 3000}\none\n")
    assert said[0] == "/rest is no command: /reset begins a new conversation, /quit ends."
    assert said[1] == "The conversation is longer than the 2048 tokens that the model can read: /reset."
    assert capsys.readouterr().out.strip() == expected(target, [user("one")])


def test_ctrl_c_cuts_an_answer_short(target, monkeypatch, capsys):
    chat = Chat(target, SHORT)
    real = type(target.model).generate

    def generate(self, *args, streamer, **options):
        real(self, *args, streamer=streamer, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(target.model), "generate", generate)
        chat.answer("one")
    assert len(chat._answers) == 1
    chat.answer("two")


def test_the_command_reads_a_pipe(chat_runs):
    """Which may hold what is no text."""
    command = ["chat", str(chat_runs / "seed-0"), "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, command, input=b"one\xff\n/quit\n")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip()


def test_one_of_several_runs_must_be_chosen(chat_runs):
    result = CliRunner().invoke(app, ["chat", str(chat_runs)])
    assert result.exit_code == 2
    assert result.stderr == f"error: {chat_runs} holds 2 runs; choose one, such as {chat_runs / 'seed-0'}.\n"
