"""A judge behind a small local server that speaks OpenAI's chat protocol, and what such servers do wrong."""

import asyncio
import contextlib
import json
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation import judge
from lora_ggpo.evaluation.answers import AnswerFile
from lora_ggpo.evaluation.judge import Question, Server, ask_server
from tests.processes import Process

MESSAGES = [{"role": "user", "content": "Rate it. ½"}]


def reply(content, status=200, **headers):
    """An answer of the protocol, or an error with `content` as its message."""
    body = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
    return status, json.dumps(body if status == 200 else {"error": {"message": content}}), headers


@contextlib.contextmanager
def serving(answer):
    """(url, requests): a server that answers request n with `answer(n, body)`, (status, text, headers)."""
    pytest.importorskip("openai")
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "body": body, "key": self.headers.get("Authorization")})
            status, text, headers = answer(len(requests), body)
            if status is None:  # hang up
                self.connection.close()
                return
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if text.startswith("{") else "text/html")
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setattr(judge, "RETRIES", 2)


async def _ask(server):
    async with server.client() as client:
        return await server.ask(client, MESSAGES)


def ask(answer):
    """(what the judge said, requests)."""
    with serving(answer) as (url, requests):
        return asyncio.run(_ask(Server(url, "gpt-x"))), requests


def test_the_protocol(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    said, (request,) = ask(lambda *_: reply("Good.\nRating: [[7]] ½"))
    assert said == "Good.\nRating: [[7]] ½"
    assert request["path"] == "/v1/chat/completions"
    assert request["key"] == "Bearer secret"
    assert request["body"] == {"model": "gpt-x", "messages": MESSAGES, "temperature": 0}


def test_a_server_without_keys_needs_none(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert ask(lambda *_: reply("x"))[0] == "x"


@pytest.mark.parametrize("status", [429, 500, 503, None])
def test_a_busy_server_is_asked_again(status):
    said, requests = ask(lambda n, _: reply("[[5]]") if n > 2 else reply("busy", status, Retry_After="0.01"))
    assert said == "[[5]]"
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("answer", "message", "asked"),
    [
        (reply("Slow down.", 429), r"answers HTTP 429 \(Slow down\); check --judge and --judge-model\.$", 3),
        (reply("bad key secret", 401), r"refuses access \(HTTP 401\); put its key in OPENAI_API_KEY\.$", 1),
        (reply("no model gpt-x", 404), r"answers HTTP 404 \(no model gpt-x\); check", 1),
        ((400, "<html>", {}), r"answers HTTP 400; check", 1),
        ((302, "", {"Location": "http://127.0.0.1:9/"}), r"answers HTTP 302; check", 1),
        ((200, "<html>", {}), r"does not answer as OpenAI's chat protocol says", 1),
        ((200, '{"choices": []}', {}), r"does not answer as OpenAI's chat protocol says", 1),
        ((200, '{"choices": ', {}), r"does not answer as OpenAI's chat protocol says", 1),
        ((None, "", {}), r"cannot be reached \(.+\); check --judge, and that it runs\.$", 3),
    ],
)
def test_a_server_that_fails_is_one_sentence(answer, message, asked, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(lambda *_: answer) as (url, requests):
        with pytest.raises(UserError, match=message) as caught:
            asyncio.run(_ask(Server(url, "gpt-x")))
        assert len(requests) == asked
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_or_hangs(monkeypatch):
    monkeypatch.setattr(judge, "RETRIES", 1)
    with serving(lambda *_: reply("x")) as (url, _):
        pass
    with pytest.raises(UserError, match=r"cannot be reached \(.+\); check"):
        asyncio.run(_ask(Server(url, "m")))
    monkeypatch.setattr(judge, "TIMEOUT", 0.05)
    done = threading.Event()
    with serving(lambda *_: (done.wait(5), reply("x"))[1]) as (url, requests):
        with pytest.raises(UserError, match=r"cannot be reached \(.+\); check"):
            asyncio.run(_ask(Server(url, "m")))
        done.set()
        assert len(requests) == 2


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"needs openai; install it with: pip install 'lora-ggpo\[judge\]'"):
        Server("http://localhost", "m")


def questions(count):
    return [
        Question(str(n), [{"role": "user", "content": f"Rate {n}"}], lambda text: "[[" in text) for n in range(count)
    ]


def run(url, count, path, jobs=3):
    seen = []
    options = {"jobs": jobs, "progress": lambda *done: seen.append(done)}
    kept = ask_server(Server(url, "m"), questions(count), AnswerFile(path), **options)
    return {id_: answer.text for (id_, _), answer in kept.items()}, seen


def test_what_is_judged_is_kept_and_not_asked_again(tmp_path):
    def breaks(n, body):
        return reply("gone", 404) if n > 4 else reply(f"[[{body['messages'][0]['content'].split()[1]}]]")

    path = tmp_path / "judgements.jsonl"
    with serving(breaks) as (url, _), pytest.raises(UserError, match="HTTP 404"):
        run(url, 9, path, jobs=1)
    assert len(path.read_text().splitlines()) == 4
    with serving(lambda n, body: reply(f"[[{body['messages'][0]['content'].split()[1]}]]")) as (url, requests):
        said, seen = run(url, 9, path)
        assert len(requests) == 5
        assert said == {str(n): f"[[{n}]]" for n in range(9)}
        assert seen == [(n, 9) for n in range(5, 10)]
        assert run(url, 9, path)[0] == said
        assert len(requests) == 5


def test_an_answer_of_another_form_is_asked_for_twice_more(tmp_path):
    with serving(lambda n, _: reply("[[3]]" if n == 3 else "Well, seven or so.")) as (url, requests):
        assert run(url, 1, tmp_path / "a.jsonl")[0] == {"0": "[[3]]"}
        assert len(requests) == 3
    with serving(lambda n, _: reply(None if n < 3 else "half \ud800")) as (url, requests):
        assert run(url, 1, tmp_path / "b.jsonl")[0] == {"0": "half ?"}
        assert len(requests) == 3


def test_answers_on_their_way_are_kept_when_one_fails(tmp_path):
    asked = threading.Barrier(3)

    def answer(_, body):
        n = int(body["messages"][0]["content"].split()[1])
        asked.wait(5)  # all three are asked before the first is answered
        if n:
            time.sleep(0.3)
        return reply(f"[[{n}]]") if n else reply("gone", 404)

    path = tmp_path / "judgements.jsonl"
    with serving(answer) as (url, requests):
        with pytest.raises(UserError, match="HTTP 404"):
            run(url, 9, path)
        assert len(requests) == 3
    assert sorted(row["id"] for row in map(json.loads, path.read_text().splitlines())) == ["1", "2"]


def test_questions_that_the_judge_does_not_take_are_left_out_unless_it_takes_none(tmp_path):
    def answer(_, body):
        n = int(body["messages"][0]["content"].split()[1])
        return reply("content filter", 400) if n == 3 else reply(f"[[{n}]]")

    path = tmp_path / "judgements.jsonl"
    with serving(answer) as (url, requests):
        assert run(url, 6, path, jobs=1)[0] == {str(n): "" if n == 3 else f"[[{n}]]" for n in range(6)}
        assert run(url, 6, path, jobs=1)[0]["3"] == ""
        assert len(requests) == 7  # it is asked again, and no other
    for count in (3, 20):
        with serving(lambda *_: reply("no model m", 400)) as (url, requests):
            with pytest.raises(UserError, match=r"HTTP 400 \(no model m\)"):
                run(url, count, tmp_path / "none.jsonl", jobs=1)
            assert min(count, 8) <= len(requests) <= 9  # one more may be on its way


def _ask_all(url):
    ask_server(Server(url, "m"), questions(9), AnswerFile(None), jobs=3, progress=lambda *_: None)


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_a_server_that_fails():
    with serving(lambda *_: reply("busy", 503, Retry_After="60")) as (url, requests):
        process = Process(_ask_all, url)
        process.send_when(lambda: len(requests) >= 3, signal.SIGINT)
        process.wait(timeout=10)
        assert "Interrupted: Stopped" in process.stderr


@pytest.mark.parametrize("key", ["sk-secret\u201d", "sk-\rsecret"])
def test_a_key_that_is_none_is_not_shown(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters that no key has") as caught:
        Server("http://localhost", "m")
    assert "secret" not in str(caught.value)


def test_a_key_from_a_file_with_line_ends(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret\r\n")
    assert ask(lambda *_: reply("x"))[1][0]["key"] == "Bearer sk-secret"


@pytest.mark.parametrize("url", ["http://[x", "http://", "http://a b/v1"])
def test_an_address_that_is_none(url):
    with pytest.raises(UserError, match="is no address"):
        Server(url, "m")
