"""A judge behind a small local server that speaks OpenAI's chat protocol, and what such servers do wrong."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation import judge
from lora_ggpo.evaluation.generate import AnswerFile
from lora_ggpo.evaluation.judge import Question, Server, ask_server

MESSAGES = [{"role": "user", "content": "Rate it. ½"}]


def reply(content, status=200, **headers):
    """An answer of the protocol, or an error with `content` as its message."""
    body = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
    return status, json.dumps(body if status == 200 else {"error": {"message": content}}), headers


@contextlib.contextmanager
def serving(answer):
    """(url, requests): a server that answers request n with `answer(n, body)`, (status, text, headers)."""
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


def ask(answer, **settings):
    """(what the judge said, requests, pauses)."""
    pauses = []
    with serving(answer) as (url, requests):
        said = Server(url, "gpt-x", pause=pauses.append, **settings).ask(MESSAGES)
    return said, requests, pauses


def test_the_protocol(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    said, (request,), pauses = ask(lambda *_: reply("Good.\nRating: [[7]] ½"))
    assert said == "Good.\nRating: [[7]] ½"
    assert request["path"] == "/v1/chat/completions"
    assert request["key"] == "Bearer secret"
    assert request["body"] == {"model": "gpt-x", "messages": MESSAGES, "temperature": 0}
    assert pauses == []


def test_no_key_is_sent_where_there_is_none(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert ask(lambda *_: reply("x"))[1][0]["key"] is None


@pytest.mark.parametrize("status", [429, 500, 503, None])
def test_a_busy_server_is_asked_again_ever_more_slowly(status):
    said, requests, pauses = ask(lambda n, _: reply("[[5]]") if n > 3 else reply("busy", status))
    assert said == "[[5]]"
    assert len(requests) == 4
    assert pauses == [1.0, 2.0, 4.0]


def test_a_server_that_says_when_is_believed():
    assert ask(lambda n, _: reply("x") if n > 1 else reply("busy", 429, Retry_After="7"))[2] == [7.0]
    assert ask(lambda n, _: reply("x") if n > 1 else reply("busy", 429, Retry_After="9000"))[2] == [60.0]
    assert ask(lambda n, _: reply("x") if n > 1 else reply("b", 429, Retry_After="Fri, 1 Jan 2027 0:00"))[2] == [1.0]


@pytest.mark.parametrize(
    ("answer", "message", "asked"),
    [
        (reply("Slow down.", 429), r"answers HTTP 429 \(Slow down\); check --judge and --judge-model\.$", 7),
        (reply("bad key secret", 401), r"refuses access \(HTTP 401\); put its key in OPENAI_API_KEY\.$", 1),
        (reply("no model gpt-x", 404), r"answers HTTP 404 \(no model gpt-x\); check", 1),
        ((400, "<html>", {}), r"answers HTTP 400; check", 1),
        ((302, "", {"Location": "http://127.0.0.1:9/"}), r"answers HTTP 302; check", 1),
        ((200, "<html>", {}), r"does not answer as OpenAI's chat protocol says", 1),
        ((200, '{"choices": []}', {}), r"does not answer as OpenAI's chat protocol says", 1),
        ((None, "", {}), r"cannot be reached \(.+\); check --judge, and that it runs\.$", 7),
    ],
)
def test_a_server_that_fails_is_one_sentence(answer, message, asked, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(lambda *_: answer) as (url, requests):
        with pytest.raises(UserError, match=message) as caught:
            Server(url, "gpt-x", pause=lambda _: None).ask(MESSAGES)
        assert len(requests) == asked
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_or_hangs(monkeypatch):
    with serving(lambda *_: reply("x")) as (url, _):
        pass
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused"):
        Server(url, "m", pause=lambda _: None).ask(MESSAGES)
    monkeypatch.setattr(judge, "TIMEOUT", 0.05)
    monkeypatch.setattr(judge, "RETRIES", 1)
    done = threading.Event()
    with serving(lambda *_: (done.wait(5), reply("x"))[1]) as (url, requests):
        with pytest.raises(UserError, match=r"cannot be reached \(timed out\)"):
            Server(url, "m", pause=lambda _: None).ask(MESSAGES)
        done.set()
        assert len(requests) == 2


def questions(count):
    return [
        Question(str(n), [{"role": "user", "content": f"Rate {n}"}], lambda text: "[[" in text) for n in range(count)
    ]


def run(url, count, path, jobs=3):
    seen = []
    server = Server(url, "m", pause=lambda _: None)
    kept = ask_server(server, questions(count), AnswerFile(path), jobs=jobs, progress=lambda *done: seen.append(done))
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
