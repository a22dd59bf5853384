"""Ask a judge: a server that speaks OpenAI's chat protocol, or a model of one's own."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.generate import Answer, AnswerFile, Key, Prompt, Sampling, generate
from lora_ggpo.evaluation.target import Messages, load_target
from lora_ggpo.tasks.evaluate import Progress
from lora_ggpo.training.interrupt import Interrupted

KEY = "OPENAI_API_KEY"
RETRIES = 6
TIMEOUT = 300.0
"""Seconds that a server may take for an answer."""

_LONGEST_PAUSE = 60.0
_MAX_TOKENS = 1024
_BUSY = (408, 409, 429, 500, 502, 503, 504)


class Question(NamedTuple):
    """What the judge is asked, under a name of its own, and whether an answer is of the form that was asked for."""

    id: str
    messages: Messages
    is_answered: Callable[[str], bool]


@dataclass(frozen=True)
class Server:
    """A server that speaks OpenAI's protocol.

    Attributes:
        url: Such as https://api.openai.com/v1 or http://localhost:8000/v1.
        model: Its name there.
        pause: Waits so many seconds.
    """

    url: str
    model: str
    pause: Callable[[float], None] = time.sleep

    def ask(self, messages: Messages) -> str:
        """The answer to `messages`, at temperature 0; a server that is busy or fails is asked again, ever more slowly.

        Raises:
            UserError: it cannot be reached, refuses, or answers in another protocol.
        """
        for attempt in range(RETRIES + 1):
            try:
                return self._content(self._post({"model": self.model, "messages": messages, "temperature": 0}))
            except (OSError, http.client.HTTPException) as error:
                final = attempt == RETRIES or (isinstance(error, urllib.error.HTTPError) and error.code not in _BUSY)
                if final:
                    raise UserError(self._why(error)) from error
                self.pause(_seconds(error, attempt))
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(KEY)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with _OPENER.open(request, timeout=TIMEOUT) as response:
            content: bytes = response.read()
        return content

    def _content(self, body: bytes) -> str:
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"The judge at {self.url} does not answer as OpenAI's chat protocol says.") from error
        # null is an empty answer; half a surrogate pair could not be written to a file
        return str(content or "").encode("utf-8", "replace").decode()

    def _why(self, error: Exception) -> str:
        if not isinstance(error, urllib.error.HTTPError):
            reason = getattr(error, "reason", None) or error
            return f"The judge at {self.url} cannot be reached ({reason}); check --judge, and that it runs."
        if error.code in (401, 403):
            return f"The judge at {self.url} refuses access (HTTP {error.code}); put its key in {KEY}."
        return f"The judge at {self.url} answers HTTP {error.code}{_said(error)}; check --judge and --judge-model."


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: it would carry the key to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _seconds(error: Exception, attempt: int) -> float:
    header = error.headers.get("Retry-After") if isinstance(error, urllib.error.HTTPError) else None
    try:
        asked = float(header or 0)
    except ValueError:  # a date
        asked = 0.0
    return min(_LONGEST_PAUSE, max(asked, 2.0**attempt))


def _said(error: urllib.error.HTTPError) -> str:
    try:
        message = json.loads(error.read(10_000))["error"]["message"]
    except (ValueError, LookupError, TypeError, OSError):
        return ""
    return f" ({' '.join(str(message).split())[:300].rstrip('.')})"


def ask_server(
    server: Server, questions: Sequence[Question], kept: AnswerFile, *, jobs: int, progress: Progress
) -> dict[Key, Answer]:
    """Ask `server` all `questions` that `kept` has no answer to, `jobs` at a time.

    A question whose answer is not of the form asked for is asked twice more.

    Raises:
        UserError: as `Server.ask`; what was answered is kept.
        Interrupted: Ctrl-C; likewise.
    """
    todo = _missing(questions, kept)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_judged, server, question) for question in todo]
        try:
            for done, future in enumerate(as_completed(futures), len(questions) - len(todo) + 1):
                kept.add([future.result()])
                progress(done, len(questions))
        except KeyboardInterrupt as error:
            raise Interrupted("Stopped; what is judged is kept: give the same command again.") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return {(question.id, 0): kept.answers[question.id, 0] for question in questions}


def ask_model(
    name: str, questions: Sequence[Question], kept: AnswerFile, *, batch_size: int, progress: Progress
) -> dict[Key, Answer]:
    """As `ask_server`, with the model or run `name` as the judge; it answers greedily, so it is asked once.

    Raises:
        UserError: as `load_target` and `generate`.
    """
    target = load_target(name)
    if not target.chat:
        raise UserError(f"The judge {name} has no chat template; choose an instruction-tuned model.")
    prompts = [target.prompt(question.id, question.messages) for question in questions]
    sampling = Sampling(max_new_tokens=_MAX_TOKENS)
    options: dict[str, Any] = {"batch_size": batch_size, "autocast": target.autocast, "progress": progress}
    return generate(target.model, target.tokenizer, prompts, sampling, kept, **options)


def _missing(questions: Sequence[Question], kept: AnswerFile) -> list[Question]:
    wanted = {prompt.id for prompt, _ in kept.missing([_as_prompt(question) for question in questions], 1)}
    return [question for question in questions if question.id in wanted]


def _as_prompt(question: Question) -> Prompt:
    return Prompt(question.id, list(json.dumps(question.messages).encode()))


def _judged(server: Server, question: Question) -> Answer:
    for _ in range(3):
        text = server.ask(question.messages)
        if question.is_answered(text):
            break
    return Answer(question.id, 0, _as_prompt(question).digest, text, 0, "stop")  # its tokens are not ours to count
