"""Try a model in the terminal: what it answers appears as it is generated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from transformers import TextStreamer

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.answers import AnswerFile
from lora_ggpo.evaluation.generate import Sampling, generate
from lora_ggpo.evaluation.target import Target
from lora_ggpo.workspace.interrupt import Interrupted, Terminated

HELP = "/reset begins a new conversation, /quit ends."


class Chat:
    """A conversation with `target`; without a chat template every line is continued on its own.

    Args:
        system: What the conversation begins with.
    """

    def __init__(self, target: Target, sampling: Sampling, system: str | None = None) -> None:
        if system and not target.chat:
            raise UserError(f"--system needs a chat template, which {target.name} does not use; leave it out.")
        self._target, self._sampling, self._system = target, sampling, system
        self._count = 0
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._turns: list[str] = []
        self._answers: list[str] = []

    def answer(self, text: str) -> str:
        """Print and return the answer to `text`; Ctrl-C cuts it short.

        Raises:
            UserError: the conversation leaves no room for an answer; it is as it was before.
        """
        if not self._target.chat:
            self.reset()
        conversation = self._target.conversation([*self._turns, text], self._answers, self._system)
        prompt = self._target.prompt(str(self._count), conversation)
        limit = self._target.tokenizer.model_max_length
        if len(prompt.ids) + self._sampling.max_new_tokens > limit:
            raise UserError(f"The conversation is longer than the {limit} tokens that the model can read: /reset.")
        streamer = _Collector(self._target)
        try:
            generate(self._target, [prompt], self._sampling, AnswerFile(None), streamer=streamer)
        except Interrupted as error:
            if isinstance(error.__cause__, Terminated):
                raise
            streamer.end()
        said = "".join(streamer.parts).strip()
        self._count += 1
        self._turns.append(text)
        self._answers.append(said)
        return said


class _Collector(TextStreamer):
    """Prints the answer's text as transformers does, and keeps it."""

    def __init__(self, target: Target) -> None:
        super().__init__(target.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.parts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.parts.append(text)
        super().on_finalized_text(text, stream_end)


def run_chat(chat: Chat, source: TextIO, say: Callable[[str], None]) -> None:
    """Answer the lines of `source` until it ends or says /quit.

    Args:
        say: Prints what is not an answer.
    """
    for line in _lines(source, say):
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
        elif line.startswith("/"):
            say(f"{line.split()[0]} is no command: {HELP}")
        elif line:
            try:
                chat.answer(line)
            except UserError as error:
                say(str(error))


def _lines(source: TextIO, say: Callable[[str], None]) -> Iterator[str]:
    terminal = source.isatty()
    if terminal:
        say(HELP)
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = source.readline()
        if not line:
            return
        yield line.strip()
