"""A small Llama that chats, and runs of it."""

import json

import pytest
from transformers import AutoTokenizer

from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests import tiny
from tests.recipes import GUIDED, recipe_text

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + ('</s>' if m.role == 'assistant' else '\\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chat_llama(tmp_path_factory):
    """Folder of the tiny Llama with a chat template."""
    folder = tiny.save_llama(tmp_path_factory.mktemp("chat-llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    """A JSONL file of 30 conversations."""
    path = tmp_path_factory.mktemp("conversations") / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}]}
        for n in range(30)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="session")
def chat_runs(chat_llama, conversations, tmp_path_factory):
    """Folder of two finished GGPO runs on these conversations."""
    output = tmp_path_factory.mktemp("runs") / "sft"
    text = recipe_text(
        chat_llama,
        conversations,
        output,
        task={"max_length": 64},
        adapter={"lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False},
        ggpo=GUIDED,
        training={"max_steps": 2, "learning_rate": 1e-2},
        seeds=[0, 1],
    )
    train(parse_recipe(text, "r"), Reporter(quiet=True))
    return output
