"""The endpoint: OpenAI's own client against a real server, and a test of each security claim of docs/chat.md."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
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
from clips_mllm.talk.conversation import user_message
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import decode_limited
from clips_mllm.talk.kv_cache import DecodingBatch
from clips_mllm.talk.recipe import Limits, ServeRecipe
from clips_mllm.talk.sampling import Sampling
from clips_mllm.talk.serve import image_url
from clips_mllm.talk.serve.app import make_app
from clips_mllm.talk.serve.errors import BadRequest
from clips_mllm.talk.start import read_token
from tests.helpers.errors import raises_user_error
from tests.helpers.server import assert_no_paths, bomb

TOKENS = 10
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
    images=2,
    image_bytes=20_000,
    image_pixels=1_000_000,
    body_bytes=100_000,
    new_tokens=200,
    batch_size=4,
    queue_size=12,
)


@pytest.fixture(scope="module")
def engine(chat_mllm: Path) -> Iterator[Engine]:
    with Engine(
        load_mllm(chat_mllm, device="cpu"), max_batch_size=LIMITS.batch_size, max_waiting=LIMITS.queue_size
    ) as running:
        yield running


class RunningServer:
    """An application in uvicorn on a free port of the loopback address."""

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
    server = RunningServer(make_app(engine, "tiny", LIMITS))
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


def user(text: str, *urls: str) -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def engine_answer(engine: Engine, text: str, *colors: str, tokens: int = TOKENS) -> str:
    """Answer without HTTP."""
    images = [decode_limited(png(color)) for color in colors]
    prompt = engine.prompt([user_message(text, len(images))], images)
    return "".join(engine.answer(prompt, Sampling(max_new_tokens=tokens)))


def post(served: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{served}/v1/chat/completions", json=body, timeout=120, **options)


def rejection(served: str, status: int, messages: list[Any], **fields: Any) -> dict[str, Any]:
    """Send a request that gets `status`; return its error, in OpenAI's format and without paths."""
    response = post(served, {"model": "tiny", "messages": messages, "max_tokens": 4} | fields)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["message"] and error["code"]
    assert_no_paths(response.text)
    return error


@contextlib.contextmanager
def rejects(*codes: str) -> Iterator[None]:
    with pytest.raises(BadRequest) as rejected:
        yield
    assert rejected.value.code in codes


def test_official_client(engine: Engine, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("owner/large")
    response = client.chat.completions.create(
        model="tiny", messages=user("What?", data_url(png("red"))), max_tokens=TOKENS
    )
    assert response.choices[0].message.content == engine_answer(engine, "What?", "red")
    assert response.choices[0].finish_reason in ("stop", "length")
    assert response.usage is not None and 0 < response.usage.completion_tokens <= TOKENS
    text = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Why?"}], max_tokens=TOKENS
    )
    assert text.choices[0].message.content == engine_answer(engine, "Why?")


def test_4bit_quantization(chat_mllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command loads quantized weights, and the endpoint answers."""
    answers = []

    def run(engine: Engine, recipe: ServeRecipe, token: str | None, bound: socket.socket) -> None:
        layer: Any = engine.mllm.model.model.language_model.layers[0]
        assert type(layer.self_attn.q_proj).__name__ == "Linear4bit"
        server = RunningServer(make_app(engine, "tiny", recipe.limits, token))
        answers.append(post(server.address, {"model": "tiny", "messages": user("Why?"), "max_tokens": TOKENS}))
        server.stop()
        assert answers[0].json()["choices"][0]["message"]["content"] == engine_answer(engine, "Why?")

    monkeypatch.setattr(serve, "run_server", run)
    serve.main([str(chat_mllm), "--device", "cpu", "--quantize", "4bit", "--port", "0"])
    assert answers[0].status_code == 200


def test_streaming(engine: Engine, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=user("Tell."), max_tokens=TOKENS, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == engine_answer(engine, "Tell.")
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_concurrent_answers_equal_single_ones(engine: Engine, client: openai.OpenAI) -> None:
    """More clients than batch rows, complete and streamed, with and without images."""
    image_colors = [(), ("red",), ("green", "blue"), ("blue",)]
    jobs = [(f"Question {number}?", image_colors[number % 4], 4 + number % 9) for number in range(12)]
    expected = [engine_answer(engine, text, *colors, tokens=tokens) for text, colors, tokens in jobs]

    def ask(number: int) -> str:
        text, colors, tokens = jobs[number]
        messages = user(text, *(data_url(png(color)) for color in colors))
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


def test_image_detail(client: openai.OpenAI) -> None:
    """The default "auto" is accepted; other values select a resolution, and the model has only one."""
    image: dict[str, Any] = {"url": data_url(png())}

    def ask(detail: str) -> Any:
        content: Any = [{"type": "image_url", "image_url": image | {"detail": detail}}]
        return client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=2, user="someone"
        )

    assert ask("auto").choices
    for detail in ("low", "high"):
        with pytest.raises(openai.BadRequestError) as rejected:
            ask(detail)
        assert rejected.value.param is not None and rejected.value.param.endswith("image_url.detail")


def test_later_requests_reuse_the_prefix(engine: Engine, client: openai.OpenAI) -> None:
    """Each request contains the whole conversation, with earlier answers as the client returns them (with nulls)."""
    first = user("What?", data_url(png("red")))
    opening = client.chat.completions.create(model="tiny", messages=first, max_tokens=TOKENS)
    answer = opening.choices[0].message.model_dump()
    assert answer["content"] and answer["tool_calls"] is None
    turns: list[Any] = [*first, answer, {"role": "user", "content": "And?"}]
    read: list[int] = []
    hook = engine.mllm.model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    response = client.chat.completions.create(model="tiny", messages=turns, max_tokens=TOKENS)
    hook.remove()
    assert response.usage is not None and opening.usage is not None
    assert read[0] <= response.usage.prompt_tokens - opening.usage.prompt_tokens


def test_health(served: str) -> None:
    assert httpx.get(f"{served}/health").json() == {"status": "ok", "answering": 0, "waiting": 0}


def test_disconnected_streaming_client_cancels_its_request(engine: Engine, served: str) -> None:
    body = {"model": "tiny", "messages": user("Tell."), "max_tokens": 200, "stream": True}
    with httpx.stream("POST", f"{served}/v1/chat/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    for _ in range(600):
        if engine.load == (0, 0):
            return
        time.sleep(0.05)
    pytest.fail("the answer of a client that left is still being computed")


def test_disconnected_waiting_client_cancels_its_request(
    engine: Engine, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client waits for the complete answer, which is still being decoded."""
    step, sizes = DecodingBatch.step, []

    def slow(self: DecodingBatch, tokens: list[int], lengths: list[int]) -> Any:
        sizes.append(len(tokens))
        time.sleep(0.1)
        return step(self, tokens, lengths)

    monkeypatch.setattr(DecodingBatch, "step", slow)
    monkeypatch.setattr(engine, "eos_tokens", set())
    body = {"model": "tiny", "messages": user("Tell."), "max_tokens": 200}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served}/v1/chat/completions", json=body, timeout=1)
    while engine.load != (0, 0):
        time.sleep(0.05)
    assert 0 < sum(sizes) < 150


# --- security ---------------------------------------------------------------------------------------------------------


def test_default_address_is_loopback() -> None:
    assert ServeRecipe(model="m").host == "127.0.0.1"


def test_token(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RunningServer(make_app(engine, "tiny", LIMITS, token="secret"))
    try:
        body = {"model": "tiny", "messages": user("Why?"), "max_tokens": 2}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            response = post(server.address, body, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
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
    with raises_user_error(file=tmp_path / "token"):
        read_token(str(tmp_path / "token"))


def test_remote_images_are_off_by_default(served: str) -> None:
    assert not Limits().remote_images
    error = rejection(served, 400, user("What?", "http://example.com/a.png"))
    assert error["code"] == "remote_images_disabled"


def test_image_urls_are_never_files(served: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    for url in (
        str(tmp_path / "a.png"),
        f"file://{tmp_path / 'a.png'}",
        "a.png",
        "ftp://x/a.png",
        "//x/a.png",
        "http:\\x",
    ):
        response = post(served, {"model": "tiny", "messages": user("What?", url), "max_tokens": 2})
        assert response.status_code == 400 and str(tmp_path) not in response.text
        assert response.json()["error"]["code"] in ("invalid_image_url", "remote_images_disabled")


@pytest.mark.parametrize("address", PRIVATE_ADDRESSES)
def test_private_addresses_are_rejected(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not image_url.is_public(address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    mixed = [(socket.AF_INET, 1, 6, "", ("93.184.216.34", 80)), (family, 1, 6, "", (address, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: mixed)
    with rejects("host_not_public"):
        image_url.public_addresses("both.example", 80)
    assert image_url.is_public("93.184.216.34") and image_url.is_public("2606:2800:220:1:248:1893:25c8:1946")


def test_names_of_loopback_are_rejected(served: str) -> None:
    limits = Limits(remote_images=True)
    for host in ("localhost", "127.1", "2130706433", "[::1]", "0x7f.1"):
        with rejects("host_not_public", "host_not_found"):
            image_url.fetch(f"http://{host}:{served.rpartition(':')[2]}/health", limits)
    with rejects("invalid_image_url"):
        image_url.fetch("http://user:pass@example.com/", limits)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Any], None]], str]]:
    """Starts local web servers; the name web.example resolves to them, and their address counts as public."""
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
    monkeypatch.setattr(image_url, "is_public", lambda address: address == "127.0.0.1")
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


def test_remote_images_if_enabled(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(remote_images=True, image_bytes=20_000, fetch_seconds=1.0)
    image = png()

    def answer(handler: Any) -> None:
        match handler.path:
            case "/a.png":
                reply(handler, 200, image)
            case "/moved":
                reply(handler, 302, Location="/a.png")
            case "/inside":
                reply(handler, 302, Location=f"http://{PRIVATE_ADDRESSES[1]}/secret")
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
    assert image_url.image_bytes(f"{site}/a.png", limits) == image
    assert image_url.image_bytes(f"{site}/moved", limits) == image
    codes = {"/inside": "host_not_public", "/file": "invalid_redirect", "/circle": "too_many_redirects"}
    codes |= {"/none": "fetch_failed", "/large": "image_too_large", "/slow": "fetch_failed"}
    for path, code in codes.items():
        start = time.monotonic()
        with rejects(code):
            image_url.fetch(f"{site}{path}", limits)
        assert time.monotonic() - start < 20, "/slow takes longer without the deadline"


def test_dns_rebinding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection uses the address that was checked, if the name resolves to another one later."""
    answers = iter(
        [[(socket.AF_INET, 1, 6, "", ("93.184.216.34", 80))], [(socket.AF_INET, 1, 6, "", ("127.0.0.1", 80))]]
    )
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: next(answers))
    connected = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", connect)
    with rejects("fetch_failed"):
        image_url.fetch("http://rebinding.example/a.png", Limits(remote_images=True))
    assert connected == [("93.184.216.34", 80)]


@pytest.mark.parametrize("side", [1_100, 12_000, 60_000])
def test_decompression_bombs(served: str, side: int) -> None:
    error = rejection(served, 413, user("What?", data_url(bomb(side))))
    assert error["code"] == "image_too_large"


def test_damaged_images(served: str) -> None:
    complete = png(size=(200, 200))
    icon = io.BytesIO()
    Image.new("RGB", (32, 32)).save(icon, "ICO")  # contains another image, whose size is only known after decoding
    script = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n"  # an endless loop for Ghostscript
    )
    for content in (b"", b"no image", complete[: len(complete) // 2], b"GIF89a" + b"\0" * 5, icon.getvalue(), script):
        assert rejection(served, 400, user("What?", data_url(content)))["code"] == "invalid_image"
    for url in ("data:image/png;base64,@@@", "data:text/html,<b>"):
        assert rejection(served, 400, user("What?", url))["code"] == "invalid_image_url"


def test_size_limits(served: str) -> None:
    assert rejection(served, 413, user("What?", data_url(os.urandom(21_000))))["code"] == "image_too_large"
    assert rejection(served, 413, user("x" * 120_000))["code"] == "request_too_large"
    assert rejection(served, 400, user("What?", *[data_url(png())] * 3))["code"] == "too_many_images"
    assert rejection(served, 400, user("What?"), max_tokens=201)["param"] == "max_tokens"
    assert rejection(served, 400, user("long " * 9_000))["code"] == "context_length_exceeded"


def test_full_queue(engine: Engine, served: str) -> None:
    release = threading.Event()
    blocker = threading.Thread(target=engine.run, args=(lambda: release.wait(60),))
    blocker.start()
    body = {"model": "tiny", "messages": user("Why?"), "max_tokens": 2}
    try:
        capacity = LIMITS.batch_size + LIMITS.queue_size
        with concurrent.futures.ThreadPoolExecutor(capacity) as pool:
            waiting = [pool.submit(post, served, body) for _ in range(capacity)]
            while engine.load[1] < capacity:
                time.sleep(0.02)
            response = post(served, body)
            assert response.status_code == 429 and response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "rate_limit_exceeded"
            release.set()
            assert {future.result().status_code for future in waiting} == {200}
    finally:
        release.set()
        blocker.join()


def test_malformed_requests(served: str) -> None:
    right = {"model": "tiny", "messages": user("Why?")}
    for wrong, param in (
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"store": True}, "store"),
        ({"metadata": {"run": "1"}}, "metadata"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"temperature": 9}, "temperature"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "Bob"}]}, "messages.0.name"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": user("What is <image>?")}, None),
        ({"stop": [""]}, "stop"),
    ):
        response = post(served, right | wrong)
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
    defaults = {"tools": [], "logprobs": False, "response_format": {"type": "text"}, "tool_choice": "auto", "user": "u"}
    assert post(served, right | defaults | {"max_tokens": 2, "store": False}).status_code == 200
    nulls = dict.fromkeys(["n", "stream", "frequency_penalty", "logit_bias", "top_logprobs", "stop"])
    assert post(served, right | nulls | {"max_tokens": 2}).status_code == 200
    assert post(served, right | {"model": "other"}).status_code == 404
    kind = {"content-type": "text/plain"}
    response = httpx.post(f"{served}/v1/chat/completions", content=json.dumps(right), headers=kind)
    assert response.status_code == 415, "web pages can send text/plain without a CORS preflight"
    kind = {"content-type": "application/json"}
    assert httpx.post(f"{served}/v1/chat/completions", content=b"{", headers=kind).status_code == 400
    assert httpx.get(f"{served}/docs").status_code == 404
    with pytest.raises(openai.BadRequestError) as rejected:
        openai.OpenAI(base_url=f"{served}/v1", api_key="x", max_retries=0).chat.completions.create(
            model="tiny", messages=user("Why?"), max_tokens=999
        )
    assert rejected.value.param == "max_tokens"


def test_internal_errors_reveal_nothing(engine: Engine, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"cannot open {Path(__file__)}")

    monkeypatch.setattr(engine, "read", fail)
    body = {"model": "tiny", "messages": user("Why?"), "max_tokens": 2}
    response = post(served, body)
    assert response.status_code == 500 and response.json()["error"]["code"] == "server_error"
    assert_no_paths(response.text)
    response = post(served, body | {"stream": True})
    assert "server_error" in response.text
    assert_no_paths(response.text)


def test_requests_leave_no_files(served: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    post(served, {"model": "tiny", "messages": user("What?", data_url(png())), "max_tokens": 2})
    assert list(tmp_path.iterdir()) == []


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


def test_checkpoints_cannot_run_code(chat_mllm: Path, tmp_path: Path) -> None:
    """Neither pickles nor `auto_map` code."""
    trap = tmp_path / "trap"
    pickled = tmp_path / "pickled"
    shutil.copytree(chat_mllm, pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
    with raises_user_error():
        load_mllm(pickled, device="cpu")
    foreign = tmp_path / "foreign"
    shutil.copytree(chat_mllm, foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: ...\n")
    config |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (foreign / "config.json").write_text(json.dumps(config))
    load_mllm(foreign, device="cpu")
    assert not trap.exists()


@pytest.mark.parametrize("seconds", [pytest.param(30, marks=pytest.mark.slow), 0])
def test_graceful_shutdown(chat_mllm: Path, seconds: int) -> None:
    """SIGTERM during an answer: it is completed, or ends with an error after the time limit; the exit code is 0."""
    command = [sys.executable, "-m", "clips_mllm.serve", str(chat_mllm), "--port", "0", "--name", "tiny"]
    command += ["--device", "cpu", "--shutdown_seconds", str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.split()[3]
        assert address.startswith("http://127.0.0.1:"), line
        client = openai.OpenAI(base_url=address, api_key="x", max_retries=0)
        stream = client.chat.completions.create(model="tiny", messages=user("Why?"), max_tokens=400, stream=True)
        chunks = iter(stream)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        if seconds:
            reasons = [chunk.choices[0].finish_reason for chunk in chunks]
            assert reasons[-1] in ("stop", "length")
        else:
            with pytest.raises(openai.APIError) as ended:
                list(chunks)
            assert ended.value.code == "unavailable"
        assert process.wait(60) == 0
        assert process.stderr is not None
        log = process.stderr.read()
        assert "Traceback" not in log and '"POST /v1/chat/completions HTTP/1.1" 200' in log
        assert not process.stdout.read(), "only the address: a full pipe would block the server"
    finally:
        process.kill()
        process.communicate()


def test_body_time_limit(engine: Engine) -> None:
    from clips_mllm.talk.serve.app import read_body

    class Slow:
        headers = {"content-type": "application/json"}  # noqa: RUF012

        async def stream(self) -> Any:
            yield b"{"
            await asyncio.sleep(60)

    with pytest.raises(BadRequest) as rejected:
        asyncio.run(read_body(Slow(), Limits(body_seconds=0.05)))  # type: ignore[arg-type]
    assert rejected.value.status == 408


@pytest.mark.slow
def test_load_program(chat_mllm: Path, tmp_path: Path) -> None:
    """benchmarks/serve_load.py for a few seconds: no errors and no wrong answers."""
    program = Path(__file__).parents[3] / "benchmarks" / "serve_load.py"
    output = tmp_path / "load.json"
    command = [
        sys.executable,
        str(program),
        str(chat_mllm),
        "--clients",
        "8",
        "--seconds",
        "4",
        "--output",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["requests"] >= 8 and report["errors"] == report["wrong_answers"] == report["exit_code"] == 0
