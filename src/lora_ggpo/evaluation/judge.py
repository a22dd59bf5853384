"""Ask a judge: a server that speaks OpenAI's chat protocol, or a model of one's own."""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.generate import Answer, AnswerFile, Key, Prompt, Sampling, generate
from lora_ggpo.evaluation.target import Messages, Target
from lora_ggpo.tasks.evaluate import Progress
from lora_ggpo.workspace.interrupt import Interrupted

KEY = "OPENAI_API_KEY"
RETRIES = 6
TIMEOUT = 300.0
"""Seconds that a server may take for an answer."""

_LONGEST_PAUSE = 60.0
_MAX_TOKENS = 1024
_BUSY = (408, 409, 429, 500, 502, 503, 504)
_REFUSALS = (400, 413, 422)
_PATIENCE = 8
"""Refusals, and no answer, after which nothing more is asked."""

Pause = Callable[[float], Any]


class Question(NamedTuple):
    """What the judge is asked, under a name of its own, and whether an answer is of the form that was asked for."""

    id: str
    messages: Messages
    is_answered: Callable[[str], bool]


class RefusedError(UserError):
    """The judge does not take this question."""


@dataclass(frozen=True)
class Server:
    """A server that speaks OpenAI's protocol, with the key of the environment, if there is one.

    Attributes:
        url: Such as https://api.openai.com/v1 or http://localhost:8000/v1.
        model: Its name there.

    Raises:
        UserError: the url, or the key, is none.
    """

    url: str
    model: str

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise UserError(f"--judge {self.url} is no address; give one such as http://localhost:8000/v1.")
        if not (_key().isascii() and _key().isprintable()):
            raise UserError(f"{KEY} holds characters that no key has; set it again.")

    def ask(self, messages: Messages, pause: Pause) -> str:
        """The answer to `messages`, at temperature 0; a server that is busy or fails is asked again, ever more slowly.

        Args:
            pause: Waits so many seconds.

        Raises:
            UserError: it cannot be reached, refuses, or answers in another protocol.
        """
        for attempt in range(RETRIES + 1):
            try:
                return self._content(self._post({"model": self.model, "messages": messages, "temperature": 0}))
            except (OSError, http.client.HTTPException) as error:
                code = error.code if isinstance(error, urllib.error.HTTPError) else None
                if attempt == RETRIES or (code is not None and code not in _BUSY):
                    kind = RefusedError if code in _REFUSALS else UserError
                    raise kind(self._why(error)) from error
                pause(_seconds(error, attempt))
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if _key():
            headers["Authorization"] = f"Bearer {_key()}"
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


def _key() -> str:
    return os.environ.get(KEY, "").strip()


def _is_address(url: str) -> bool:
    try:
        named = bool(urllib.parse.urlsplit(url).hostname)
    except ValueError:
        return False
    return named and url.isascii() and url.isprintable() and " " not in url


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
    server: Server,
    questions: Sequence[Question],
    kept: AnswerFile,
    *,
    jobs: int,
    progress: Progress,
    pause: Pause | None = None,
) -> dict[Key, Answer]:
    """Ask `server` all `questions` that `kept` has no answer to, `jobs` at a time.

    A question whose answer is not of the form asked for is asked twice more. One that the server does not take has an
    empty answer, which is not kept.

    Args:
        pause: As `Server.ask` takes it; by default one that Ctrl-C and another question's failure end.

    Raises:
        UserError: as `Server.ask`, or every question is refused; what was answered, also to the questions that were on
            their way, is kept.
        Interrupted: Ctrl-C; what was answered is kept.
    """
    todo, refused = _missing(questions, kept), dict[Key, Answer]()
    stop = threading.Event()
    found, done = _answers(server, todo, jobs, pause or stop.wait, stop), len(questions) - len(todo)
    failure: Exception | None = None
    try:
        for question, answer in found:
            if isinstance(answer, Answer):
                kept.add([answer])
            elif isinstance(answer, RefusedError) and (kept.answers or len(refused) + 1 < min(_PATIENCE, len(todo))):
                refused[question.id, 0] = _as_answer(question, "")
            else:
                failure = failure or answer
                stop.set()
            done += 1
            progress(done, len(questions))
    except KeyboardInterrupt as error:
        stop.set()
        raise Interrupted("Stopped; what is judged is kept: give the same command again.") from error
    if failure:
        raise failure
    return {key: kept.answers.get(key) or refused[key] for key in ((question.id, 0) for question in questions)}


def _answers(
    server: Server, questions: Sequence[Question], jobs: int, pause: Pause, stop: threading.Event
) -> Iterator[tuple[Question, Answer | Exception]]:
    """Answers, or why there is none, as they come; none is begun once `stop` is set, as by a failure.

    From threads that the process does not wait for: after Ctrl-C it may end while a server takes its time.
    """
    waiting, lock = iter(questions), threading.Lock()
    found: queue.SimpleQueue[tuple[Question, Answer | Exception] | None] = queue.SimpleQueue()

    def work() -> None:
        while not stop.is_set():
            with lock:
                question = next(waiting, None)
            if question is None:
                break
            try:
                found.put((question, _judged(server, question, pause)))
            except Exception as error:
                if not isinstance(error, RefusedError):
                    stop.set()
                found.put((question, error))
        found.put(None)

    for _ in range(jobs):
        threading.Thread(target=work, daemon=True).start()
    working = jobs
    while working:
        one = found.get()
        if one is None:
            working -= 1
        else:
            yield one


def ask_model(
    target: Target, questions: Sequence[Question], kept: AnswerFile, *, batch_size: int, progress: Progress
) -> dict[Key, Answer]:
    """As `ask_server`, with a model as the judge; it answers greedily, so it is asked once.

    Raises:
        UserError: as `generate`.
    """
    prompts = [target.prompt(question.id, question.messages) for question in questions]
    sampling = Sampling(max_new_tokens=_MAX_TOKENS)
    options: dict[str, Any] = {"batch_size": batch_size, "autocast": target.autocast, "progress": progress}
    return generate(target.model, target.tokenizer, prompts, sampling, kept, **options)


def _missing(questions: Sequence[Question], kept: AnswerFile) -> list[Question]:
    wanted = {prompt.id for prompt, _ in kept.missing([_as_prompt(question) for question in questions], 1)}
    return [question for question in questions if question.id in wanted]


def _as_prompt(question: Question) -> Prompt:
    return Prompt(question.id, list(json.dumps(question.messages).encode()))


def _judged(server: Server, question: Question, pause: Pause) -> Answer:
    for _ in range(3):
        text = server.ask(question.messages, pause)
        if question.is_answered(text):
            break
    return _as_answer(question, text)


def _as_answer(question: Question, text: str) -> Answer:
    return Answer(question.id, 0, _as_prompt(question).digest, text, 0, "stop")  # its tokens are not ours to count
