"""Small causal models with chat templates in the styles of well-known ones, on SmolLM2's vocabulary."""

import copy
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Style(NamedTuple):
    """What ends texts (the tokenizer's eos token), what ends turns, and the template."""

    eos: str
    end: str
    template: str


def _each(turn, prompt, last=""):
    turns = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    return f"{{{{ bos_token }}}}{turns}{{% if add_generation_prompt %}}{prompt}{{% else %}}{last}{{% endif %}}"


STYLES = {
    "qwen": Style(
        "<|endoftext|>",
        "<|im_end|>",
        _each("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"),
    ),
    "llama3": Style(
        "<|end_of_text|>",
        "<|eot_id|>",
        _each("<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot_id|>", "<|head|>assistant<|/head|>\n\n"),
    ),
    "gemma": Style(
        "<eos>",
        "<end_of_turn>",
        _each("<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n", "<start_of_turn>assistant\n"),
    ),
    "mistral": Style(
        "</s>",
        "</s>",
        _each("{{ ' ' + m.content + eos_token if m.role == 'assistant' else '[INST] ' + m.content + '[/INST]' }}", ""),
    ),
    "phi3": Style(
        "<|endoftext|>",
        "<|end|>",
        _each("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n", "{{ eos_token }}"),
    ),
}
ENDLESS = _each("{{ m.role }}: {{ m.content }}\n", "assistant: ")
DATED = STYLES["qwen"]._replace(
    template="It is {{ strftime_now('%A, %d %B %Y') }}.\n" + STYLES["qwen"].template,
)


def save(folder, tokenizer, style):
    """Save a random Llama of one layer whose tokenizer is `tokenizer` in that style; it ends texts in eos alone."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = style.template
    tokenizer.add_special_tokens({"eos_token": style.eos, "pad_token": style.eos})
    tokenizer.add_tokens([style.end], special_tokens=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **_SIZES, **ends)).save_pretrained(folder)
    return str(folder)
