"""The endpoint: OpenAI's own client against a real server, and a test for each sentence about safety."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import http.server
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from PIL import Image

from clips_mllm import serve
from clips_mllm.model.checkpoint import load_mllm
from clips_mllm.talk.answer import Answer
from clips_mllm.talk.batch import Batch
from clips_mllm.talk.conversation import question
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import decode_limited
from clips_mllm.talk.limits import BadRequest, Limits
from clips_mllm.talk.recipes import ServeRecipe
from clips_mllm.talk.sampling import Sampling
from clips_mllm.talk.serve import remote
from clips_mllm.talk.serve.app import make_app
from clips_mllm.talk.start import read_token
from tests.helpers.server import assert_no_paths, bomb
from vision_tower.common.errors import UserError

TOKENS = 10
PRIVATE = "10.0.0.1"
PRIVATE_ADDRESSES = [
    *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1"),
    *(
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "::",
        "ff02::1",
    ),
]
LIMITS = Limits(
    images=2, image_bytes=20_000, image_pixels=1_000_000, body_bytes=100_000, new_tokens=200, rows=4, waiting=12
)


@pytest.fixture(scope="module")
def engine(talker: Path) -> Iterator[Engine]:
    with Engine(load_mllm(talker, device="cpu"), max_batch_size=LIMITS.rows, max_waiting=LIMITS.waiting) as running:
        yield running


class Served:
    """An application behind a real uvicorn on a free port of this machine."""

    def __init__(self, app: Any) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        self.address = "http://127.0.0.1:{1}".format(*self.listener.getsockname())

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[str]:
    server = Served(make_app(engine, "tiny", LIMITS))
    yield server.address
    server.stop()


@pytest.fixture(scope="module")
def client(served: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0, timeout=120)


def png(color: str = "green", size: tuple[int, int] = (40, 40)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def asked(text: str, *urls: str) -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def alone(engine: Engine, text: str, *colors: str, tokens: int = TOKENS) -> str:
    """The answer that the terminal would give."""
    images = [decode_limited(png(color)) for color in colors]
    prompt = engine.prompt([question(text, len(images))], images)
    return "".join(Answer(engine, prompt, Sampling(max_new_tokens=tokens)))


def post(served: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{served}/v1/chat/completions", json=body, timeout=120, **options)


def refusal(served: str, status: int, word: str, messages: list[Any], **fields: Any) -> dict[str, Any]:
    """The request gets `status`, in OpenAI's form, with a message that says `word` and no path."""
    found = post(served, {"model": "tiny", "messages": messages, "max_tokens": 4} | fields)
    assert found.status_code == status, found.text
    error: dict[str, Any] = found.json()["error"]
    assert word in error["message"]
    assert_no_paths(found.text)
    return error


def test_the_official_client(engine: Engine, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny' only"):
        client.models.retrieve("owner/large")
    found = client.chat.completions.create(
        model="tiny", messages=asked("What?", data_url(png("red"))), max_tokens=TOKENS
    )
    assert found.choices[0].message.content == alone(engine, "What?", "red")
    assert found.choices[0].finish_reason in ("stop", "length")
    assert found.usage is not None and 0 < found.usage.completion_tokens <= TOKENS
    text = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Why?"}], max_tokens=TOKENS
    )
    assert text.choices[0].message.content == alone(engine, "Why?")


def test_the_llm_in_four_bits(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command loads it rounded, and it answers."""
    answers = []

    def run(engine: Engine, recipe: ServeRecipe, token: str | None, address: socket.socket) -> None:
        layer: Any = engine.mllm.model.model.language_model.layers[0]
        assert type(layer.self_attn.q_proj).__name__ == "Linear4bit"
        server = Served(make_app(engine, "tiny", recipe.limits, token))
        answers.append(post(server.address, {"model": "tiny", "messages": asked("Why?"), "max_tokens": TOKENS}))
        server.stop()
        assert answers[0].json()["choices"][0]["message"]["content"] == alone(engine, "Why?")

    monkeypatch.setattr(serve, "run_server", run)
    serve.main([str(talker), "--device", "cpu", "--quantize", "4bit", "--port", "0"])
    assert answers[0].status_code == 200


def test_streaming(engine: Engine, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=asked("Tell."), max_tokens=TOKENS, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == alone(engine, "Tell.")
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_simultaneous_requests_get_their_own_answers(engine: Engine, client: openai.OpenAI) -> None:
    """More clients than rows, whole and streamed, with and without images: none gets another's answer."""
    colors = [(), ("red",), ("green", "blue"), ("blue",)]
    jobs = [(f"Question {number}?", colors[number % 4], 4 + number % 9) for number in range(12)]
    expected = [alone(engine, text, *shown, tokens=tokens) for text, shown, tokens in jobs]

    def ask(number: int) -> str:
        text, shown, tokens = jobs[number]
        messages = asked(text, *(data_url(png(color)) for color in shown))
        if number % 2:
            return (
                client.chat.completions.create(model="tiny", messages=messages, max_tokens=tokens)
                .choices[0]
                .message.content
                or ""
            )
        stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=tokens, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == expected


def test_a_conversation_goes_on(engine: Engine, client: openai.OpenAI) -> None:
    """The whole conversation comes with each request; its prefix is not read again."""
    first = asked("What?", data_url(png("red")))
    opening = client.chat.completions.create(model="tiny", messages=first, max_tokens=TOKENS)
    said = opening.choices[0].message.content
    answer = opening.choices[0].message.model_dump()  # with its nulls, as clients send it back
    assert answer["content"] == said and answer["tool_calls"] is None
    turns: list[Any] = [*first, answer, {"role": "user", "content": "And?"}]
    read: list[int] = []
    hook = engine.mllm.model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    found = client.chat.completions.create(model="tiny", messages=turns, max_tokens=TOKENS)
    hook.remove()
    assert found.usage is not None and opening.usage is not None
    assert read[0] <= found.usage.prompt_tokens - opening.usage.prompt_tokens


def test_health(served: str) -> None:
    assert httpx.get(f"{served}/health").json() == {"status": "ok", "answering": 0, "waiting": 0}


def test_a_client_that_leaves_frees_its_place(engine: Engine, served: str) -> None:
    body = {"model": "tiny", "messages": asked("Tell."), "max_tokens": 200, "stream": True}
    with httpx.stream("POST", f"{served}/v1/chat/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    for _ in range(600):
        if engine.load == (0, 0):
            return
        time.sleep(0.05)
    pytest.fail("the answer of a client that left is still being computed")


def test_a_client_that_hangs_up_frees_its_place(engine: Engine, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it waits for the whole answer, whose tokens keep coming."""
    step, steps = Batch.step, []

    def slow(self: Batch, cursors: list[Any]) -> Any:
        steps.append(len(cursors))
        time.sleep(0.1)
        return step(self, cursors)

    monkeypatch.setattr(Batch, "step", slow)
    monkeypatch.setattr(engine, "ends", set())
    body = {"model": "tiny", "messages": asked("Tell."), "max_tokens": 200}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served}/v1/chat/completions", json=body, timeout=1)
    while engine.load != (0, 0):
        time.sleep(0.05)
    assert 0 < sum(steps) < 150


# --- safety -----------------------------------------------------------------------------------------------------------


def test_binds_to_this_machine_unless_told_otherwise() -> None:
    assert ServeRecipe(model="m").host == "127.0.0.1"


def test_the_token(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Served(make_app(engine, "tiny", LIMITS, token="secret"))
    try:
        body = {"model": "tiny", "messages": asked("Why?"), "max_tokens": 2}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            found = post(server.address, body, headers=headers)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
            assert httpx.get(f"{server.address}/v1/models", headers=headers).status_code == 401
        assert httpx.get(f"{server.address}/health").status_code == 200
        right = openai.OpenAI(base_url=f"{server.address}/v1", api_key="secret", max_retries=0)
        assert right.chat.completions.create(**body).choices
    finally:
        server.stop()
    (tmp_path / "token").write_text(" secret\n")
    assert read_token(str(tmp_path / "token")) == "secret"
    monkeypatch.setenv("CLIPS_MLLM_TOKEN", "other")
    assert read_token(None) == "other"
    (tmp_path / "token").write_text("\n")
    with pytest.raises(UserError, match="empty"):
        read_token(str(tmp_path / "token"))


def test_remote_images_are_off_by_default(served: str) -> None:
    assert not Limits().remote_images
    refusal(served, 400, "switched off", asked("What?", "http://example.com/a.png"))


def test_no_file_paths(served: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    for url in (
        str(tmp_path / "a.png"),
        f"file://{tmp_path / 'a.png'}",
        "a.png",
        "ftp://x/a.png",
        "//x/a.png",
        "http:\\x",
    ):
        found = post(served, {"model": "tiny", "messages": asked("What?", url), "max_tokens": 2})
        assert found.status_code == 400 and str(tmp_path) not in found.text


@pytest.mark.parametrize(
    "address",
    PRIVATE_ADDRESSES,
)
def test_only_public_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not remote.is_public(address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    mixed = [(socket.AF_INET, 1, 6, "", ("93.184.216.34", 80)), (family, 1, 6, "", (address, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: mixed)
    with pytest.raises(BadRequest, match="not on the public internet"):
        remote.public_addresses("both.example", 80)
    assert remote.is_public("93.184.216.34") and remote.is_public("2606:2800:220:1:248:1893:25c8:1946")


def test_names_of_loopback_are_refused(served: str) -> None:
    limits = Limits(remote_images=True)
    for host in ("localhost", "127.1", "2130706433", "[::1]", "0x7f.1"):
        with pytest.raises(BadRequest, match=r"not on the public internet|cannot be found"):
            remote.fetch(f"http://{host}:{served.rpartition(':')[2]}/health", limits)
    with pytest.raises(BadRequest, match="plain"):
        remote.fetch("http://user:pass@example.com/", limits)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Any], None]], str]]:
    """Starts little web servers of this machine, which is public for the time being under the name of web.example."""
    servers: list[http.server.ThreadingHTTPServer] = []
    real = socket.getaddrinfo

    def resolve(host: Any, *rest: Any, **options: Any) -> Any:
        return real("127.0.0.1" if host == "web.example" else host, *rest, **options)

    def start(answer: Callable[[Any], None]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        servers[-1].daemon_threads = True
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://web.example:{servers[-1].server_port}"

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def reply(handler: Any, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def test_remote_images_where_switched_on(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(remote_images=True, image_bytes=20_000, fetch_seconds=1.0)
    image = png()

    def answer(handler: Any) -> None:
        match handler.path:
            case "/a.png":
                reply(handler, 200, image)
            case "/moved":
                reply(handler, 302, Location="/a.png")
            case "/inside":
                reply(handler, 302, Location=f"http://{PRIVATE}/secret")
            case "/file":
                reply(handler, 302, Location="file:///etc/passwd")
            case "/circle":
                reply(handler, 302, Location="/circle")
            case "/large":
                reply(handler, 200, b"x" * 50_000)
            case "/slow":
                handler.send_response(200)
                handler.end_headers()
                for _ in range(40):
                    handler.wfile.write(b"x")
                    handler.wfile.flush()
                    time.sleep(0.1)
            case _:
                reply(handler, 404)

    site = web(answer)
    assert remote.image_bytes(f"{site}/a.png", limits) == image
    assert remote.image_bytes(f"{site}/moved", limits) == image
    refused = {"/inside": "not on the public internet", "/file": "leads away", "/circle": "redirects", "/none": "404"}
    for path, words in (refused | {"/large": "20,000 bytes", "/slow": "in time"}).items():
        start = time.monotonic()
        with pytest.raises(BadRequest, match=words):
            remote.fetch(f"{site}{path}", limits)
        assert time.monotonic() - start < 20


def test_a_name_that_changes_its_address_leads_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the address that was checked is the one connected to."""
    answers = iter(
        [[(socket.AF_INET, 1, 6, "", ("93.184.216.34", 80))], [(socket.AF_INET, 1, 6, "", ("127.0.0.1", 80))]]
    )
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: next(answers))
    connected = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(BadRequest, match="in time"):
        remote.fetch("http://rebinding.example/a.png", Limits(remote_images=True))
    assert connected == [("93.184.216.34", 80)]


@pytest.mark.parametrize("side", [1_100, 12_000, 60_000])
def test_decompression_bombs(served: str, side: int) -> None:
    error = refusal(served, 413, "pixels", asked("What?", data_url(bomb(side))))
    assert error["code"] == "image_too_large"


def test_damaged_images(served: str) -> None:
    whole = png(size=(200, 200))
    icon = io.BytesIO()
    Image.new("RGB", (32, 32)).save(icon, "ICO")  # an image in an image: its size is known once it is decoded
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n"  # for Ghostscript to run
    for content in (b"", b"no image", whole[: len(whole) // 2], b"GIF89a" + b"\0" * 5, icon.getvalue(), script):
        refusal(served, 400, "not a readable image", asked("What?", data_url(content)))
    refusal(served, 400, "base64", asked("What?", "data:image/png;base64,@@@"))
    refusal(served, 400, "data:image/png", asked("What?", "data:text/html,<b>"))


def test_sizes(served: str) -> None:
    refusal(served, 413, "20,000 bytes", asked("What?", data_url(os.urandom(21_000))))
    refusal(served, 413, "100,000 bytes", asked("x" * 120_000))
    refusal(served, 400, "at most 2 images", asked("What?", *[data_url(png())] * 3))
    refusal(served, 400, "at most 200", asked("What?"), max_tokens=201)
    error = refusal(served, 400, "context", asked("long " * 9_000))
    assert error["code"] == "context_length_exceeded"


def test_a_full_queue(engine: Engine, served: str) -> None:
    release = threading.Event()
    holder = threading.Thread(target=engine.run, args=(lambda: release.wait(60),))
    holder.start()
    body = {"model": "tiny", "messages": asked("Why?"), "max_tokens": 2}
    try:
        most = LIMITS.rows + LIMITS.waiting
        with concurrent.futures.ThreadPoolExecutor(most) as pool:
            waiting = [pool.submit(post, served, body) for _ in range(most)]
            while engine.load[1] < most:
                time.sleep(0.02)
            found = post(served, body)
            assert found.status_code == 429 and found.headers["retry-after"] == "1"
            assert found.json()["error"]["code"] == "rate_limit_exceeded"
            release.set()
            assert {future.result().status_code for future in waiting} == {200}
    finally:
        release.set()
        holder.join()


def test_malformed_requests(served: str) -> None:
    right = {"model": "tiny", "messages": asked("Why?")}
    for wrong, place in (
        ({"tools": [{"type": "function"}]}, "tools: not supported by this server; leave it out"),
        ({"logit_bias": {"1": 2}}, "logit_bias: not supported by this server; leave it out"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"temperature": 9}, "temperature"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": asked("What is <image>?")}, "<image>"),
        ({"stop": [""]}, "stop"),
    ):
        found = post(served, right | wrong)
        assert found.status_code == 400 and place in found.json()["error"]["message"], found.text
    without_effect = {"tools": [], "logprobs": False, "response_format": {"type": "text"}, "tool_choice": "auto"}
    assert post(served, right | without_effect | {"max_tokens": 2}).status_code == 200
    nulls = dict.fromkeys(["n", "stream", "frequency_penalty", "logit_bias", "top_logprobs", "stop"])
    assert post(served, right | nulls | {"max_tokens": 2}).status_code == 200
    assert post(served, right | {"model": "other"}).status_code == 404
    kind = {"content-type": "text/plain"}
    found = httpx.post(f"{served}/v1/chat/completions", content=json.dumps(right), headers=kind)
    assert found.status_code == 415, "web pages can send text/plain to this machine without asking"
    kind = {"content-type": "application/json"}
    assert httpx.post(f"{served}/v1/chat/completions", content=b"{", headers=kind).status_code == 400
    assert httpx.get(f"{served}/docs").status_code == 404
    with pytest.raises(openai.BadRequestError, match="at most 200"):
        openai.OpenAI(base_url=f"{served}/v1", api_key="x", max_retries=0).chat.completions.create(
            model="tiny", messages=asked("Why?"), max_tokens=999
        )


def test_errors_of_ours_leak_nothing(engine: Engine, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"cannot open {Path(__file__)}")

    monkeypatch.setattr(engine, "read", fail)
    body = {"model": "tiny", "messages": asked("Why?"), "max_tokens": 2}
    found = post(served, body)
    assert found.status_code == 500 and found.json()["error"]["code"] == "server_error"
    assert_no_paths(found.text)
    found = post(served, body | {"stream": True})
    assert "server_error" in found.text
    assert_no_paths(found.text)


def test_nothing_of_a_request_stays_on_disk(served: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    post(served, {"model": "tiny", "messages": asked("What?", data_url(png())), "max_tokens": 2})
    assert list(tmp_path.iterdir()) == []


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


def test_only_safetensors_and_no_code_of_others(talker: Path, tmp_path: Path) -> None:
    """Pickles and `auto_map` code in a checkpoint are never run."""
    trap = tmp_path / "trap"
    pickled = tmp_path / "pickled"
    shutil.copytree(talker, pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(UserError, match="safetensors"):
        load_mllm(pickled, device="cpu")
    foreign = tmp_path / "foreign"
    shutil.copytree(talker, foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: ...\n")
    config |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (foreign / "config.json").write_text(json.dumps(config))
    load_mllm(foreign, device="cpu")
    assert not trap.exists()


@pytest.mark.parametrize("patience", [pytest.param(30, marks=pytest.mark.slow), 0])
def test_graceful_stop(talker: Path, patience: int) -> None:
    """SIGTERM in the middle of an answer: it is completed, or ended in words; the process ends with 0."""
    words = [sys.executable, "-m", "clips_mllm.serve", str(talker), "--port", "0", "--name", "tiny"]
    words += ["--device", "cpu", "--patience", str(patience)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.split()[3]
        assert address.startswith("http://127.0.0.1:"), line
        client = openai.OpenAI(base_url=address, api_key="x", max_retries=0)
        stream = client.chat.completions.create(model="tiny", messages=asked("Why?"), max_tokens=400, stream=True)
        chunks = iter(stream)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        if patience:
            reasons = [chunk.choices[0].finish_reason for chunk in chunks]
            assert reasons[-1] in ("stop", "length")
        else:
            with pytest.raises(openai.APIError, match="shutting down"):
                list(chunks)
        assert process.wait(60) == 0
        assert process.stderr is not None
        log = process.stderr.read()
        assert "Traceback" not in log and '"POST /v1/chat/completions HTTP/1.1" 200' in log
        assert not process.stdout.read(), "only the address: nothing that would fill a pipe which nobody reads"
    finally:
        process.kill()
        process.communicate()


def test_the_body_must_arrive_in_time(engine: Engine) -> None:
    from clips_mllm.talk.serve.app import read_body

    class Slow:
        headers = {"content-type": "application/json"}  # noqa: RUF012

        async def stream(self) -> Any:
            yield b"{"
            await asyncio.sleep(60)

    with pytest.raises(BadRequest, match="in time"):
        asyncio.run(read_body(Slow(), Limits(body_seconds=0.05)))  # type: ignore[arg-type]


@pytest.mark.slow
def test_load_in_short(talker: Path, tmp_path: Path) -> None:
    """The load program itself, for a few seconds: no error, nobody gets another's answer."""
    program = Path(__file__).parents[3] / "benchmarks" / "serve_load.py"
    output = tmp_path / "load.json"
    words = [sys.executable, str(program), str(talker), "--clients", "8", "--seconds", "4", "--output", str(output)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["requests"] >= 8 and found["errors"] == found["mixed_up"] == found["exit_code"] == 0
