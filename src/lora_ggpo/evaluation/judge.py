"""Ask a judge: a server that speaks OpenAI's chat protocol, or a model of one's own."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from lora_ggpo.errors import UserError, first_line
from lora_ggpo.evaluation.answers import Answer, AnswerFile, Key, Prompt
from lora_ggpo.evaluation.generate import Sampling, generate
from lora_ggpo.evaluation.suite_run import Options, SuiteRun
from lora_ggpo.evaluation.target import Messages, load_target
from lora_ggpo.tasks.base import Progress
from lora_ggpo.workspace.files import file_name, json_digest
from lora_ggpo.workspace.interrupt import Interrupted

KEY = "OPENAI_API_KEY"
RETRIES = 10
"""Times that a busy server is asked again, after pauses that grow to 8 seconds or are those that the server names."""
TIMEOUT = 300.0
"""Seconds that a server may take for an answer."""

_MAX_TOKENS = 1024
_REFUSALS = (400, 413, 422)
_PATIENCE = 8
"""After this many refusals and no answer, nothing more is asked."""


class Question(NamedTuple):
    """A question to the judge, its name, and a check of whether an answer has the form that was asked for."""

    id: str
    messages: Messages
    is_answered: Callable[[str], bool]


class _RefusedError(UserError):
    """The judge does not take this question."""


@dataclass(frozen=True)
class Server:
    """A server that speaks OpenAI's protocol, with the key of the environment, if there is one.

    Attributes:
        url: Such as https://api.openai.com/v1 or http://localhost:8000/v1.
        model: Its name there.

    Raises:
        UserError: the package openai is not installed, or the url or the key cannot be one.
    """

    url: str
    model: str

    def __post_init__(self) -> None:
        self.client()

    def client(self) -> Any:
        """A client for one event loop, which asks again while the server is busy."""
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError as error:
            raise UserError(
                "A judge on a server needs openai; install it with: pip install 'lora-ggpo[judge]'"
            ) from error
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{KEY} holds characters that no key has; set it again.")
        try:
            if not urlsplit(self.url).hostname or " " in self.url:
                raise ValueError("no host")
            # A redirection is not followed: it would send the conversations, or the key, to another server.
            http = DefaultAsyncHttpxClient(follow_redirects=False)
            return AsyncOpenAI(
                api_key=key or "none", base_url=self.url, max_retries=RETRIES, timeout=TIMEOUT, http_client=http
            )
        except Exception as error:  # which one depends on the HTTP library below
            raise UserError(f"--judge {self.url} is no address; give one such as http://localhost:8000/v1.") from error

    async def ask(self, client: Any, messages: Messages) -> str:
        """The answer to `messages`, at temperature 0.

        Raises:
            UserError: the server cannot be reached, refuses, or answers in another protocol.
        """
        from openai import APIError

        try:
            said = await client.chat.completions.create(model=self.model, messages=messages, temperature=0)
            content = said.choices[0].message.content
        except APIError as error:
            raise self._failure(error) from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"The judge at {self.url} does not answer as OpenAI's chat protocol says.") from error
        # null is an empty answer; half a surrogate pair could not be written to a file
        return str(content or "").encode("utf-8", "replace").decode()

    def _failure(self, error: Any) -> UserError:
        code = getattr(error, "status_code", None)
        if code is None:
            reason = first_line(error.__cause__ or error).rstrip(".")
            return UserError(f"The judge at {self.url} cannot be reached ({reason}); check --judge, and that it runs.")
        if code in (401, 403):
            return UserError(f"The judge at {self.url} refuses access (HTTP {code}); put its key in {KEY}.")
        message = error.body.get("message") if isinstance(error.body, dict) else None
        said = f" ({' '.join(str(message).split())[:300].rstrip('.')})" if message else ""
        kind = _RefusedError if code in _REFUSALS else UserError
        return kind(f"The judge at {self.url} answers HTTP {code}{said}; check --judge and --judge-model.")


def find_server(options: Options) -> Server | None:
    """The server that the user chose as the judge; None if it is a model.

    Raises:
        UserError: no judge is given, or half of one.
    """
    if not options.judge:
        raise UserError("mt-bench needs a judge: give --judge URL --judge-model NAME, or a model folder as --judge.")
    served = options.judge.startswith(("http://", "https://"))
    if served != bool(options.judge_model):
        missing, needless = "needs --judge-model, its name there", "is no http:// address, so leave out --judge-model"
        raise UserError(f"--judge {options.judge} {missing if served else needless}.")
    return Server(options.judge, options.judge_model) if options.judge_model else None


def ask_judge(run: SuiteRun, server: Server | None, questions: Sequence[Question]) -> dict[Key, Answer]:
    """The judgements of `server`, or of the model that the user chose, kept in a file of that judge alone."""
    ask: Callable[..., dict[Key, Answer]]
    if server:
        name, identity = server.model, [server.url, server.model]
        ask = partial(ask_server, server, questions, jobs=run.jobs)
    else:
        name = str(run.options.judge)
        target = load_target(name)
        if not target.chat:
            raise UserError(f"The judge {name} has no chat template; choose an instruction-tuned model.")
        identity = [target.fingerprint(), str(target.model.dtype), str(target.autocast)]
        prompts = [target.prompt(question.id, question.messages) for question in questions]
        sampling = Sampling(max_new_tokens=_MAX_TOKENS)  # greedy, so to ask again would change nothing
        ask = partial(generate, target, prompts, sampling, batch_size=run.batch_size)
    kept = AnswerFile(run.folder / f"judgements-{file_name(name)}-{json_digest(identity)[:8]}.jsonl")
    with run.reporter.task(f"judge {run.target.name}") as shown:
        shown.begin(len(kept.answers))
        return ask(kept, progress=shown.update)


def ask_server(
    server: Server, questions: Sequence[Question], kept: AnswerFile, *, jobs: int, progress: Progress
) -> dict[Key, Answer]:
    """Ask `server` all `questions` that `kept` has no answer to, `jobs` at a time.

    A question whose answer has another form than was asked for is asked up to twice more. A question that the server
    refuses has an empty answer, which is not kept.

    Raises:
        UserError: as `Server.ask`, or every question is refused. What was answered is kept, also to the questions that
            were on their way.
        Interrupted: Ctrl-C; what was answered is kept.
    """
    wanted = {prompt.id for prompt, _ in kept.missing([_as_prompt(question) for question in questions], 1)}
    todo = [question for question in questions if question.id in wanted]
    waiting, done = iter(todo), itertools.count(len(questions) - len(todo) + 1)
    refused: dict[Key, Answer] = {}
    failures: list[UserError] = []

    async def work(client: Any) -> None:
        for question in waiting:
            try:
                kept.add([await _judge(server, client, question)])
            except _RefusedError as error:
                refused[question.id, 0] = _as_answer(question, "")
                if not kept.answers and len(refused) >= min(_PATIENCE, len(todo)):
                    failures.append(error)
            except UserError as error:
                failures.append(error)
            progress(next(done), len(questions))
            if failures:  # nothing more is begun; what is on its way in other workers is waited for
                return

    async def work_all() -> None:
        async with server.client() as client:
            await asyncio.gather(*(work(client) for _ in range(jobs)))

    try:
        asyncio.run(work_all())
    except KeyboardInterrupt as error:
        raise Interrupted("Stopped; what is judged is kept: give the same command again.") from error
    if failures:
        raise failures[0]
    return {key: kept.answers.get(key) or refused[key] for key in ((question.id, 0) for question in questions)}


async def _judge(server: Server, client: Any, question: Question) -> Answer:
    for _ in range(3):
        text = await server.ask(client, question.messages)
        if question.is_answered(text):
            break
    return _as_answer(question, text)


def _as_prompt(question: Question) -> Prompt:
    return Prompt(question.id, list(json.dumps(question.messages).encode()))


def _as_answer(question: Question, text: str) -> Answer:
    return Answer(question.id, 0, _as_prompt(question).digest, text, 0, "stop")  # its tokens are not ours to count
