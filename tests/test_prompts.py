"""Prompt extension against a server of our own on this machine and a tiny model of a real class; no network is used."""

import json
import logging
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import vdot.cli
import vdot.prompts
from tests.conftest import ROOT
from vdot.errors import ConfigError, InputError, ServiceError
from vdot.prompts import INSTRUCTIONS, MODES, Answer, Endpoint, Extended, LocalModel, extend_prompt, find_writer

KEY = "sk-very-secret-0123456789"
SMALL = ("--size", "32*16", "--frame_num", 1, "--sample_steps", 1)


pytestmark = pytest.mark.usefixtures("one_memory_plan")


@dataclass
class Stub:
    """What the server answers, one entry a request and the last one for ever, and what it was asked."""

    url: str
    answers: list = field(default_factory=list)
    asked: list = field(default_factory=list)

    def says(self, *answers: object) -> "Stub":
        self.answers[:] = answers
        self.asked.clear()
        return self


def chat(text: str | None, **more: object) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}]}


@pytest.fixture(scope="module")
def server():
    """``server.says(...)``: a dict is a completion, a number a status, a tuple (status, body, headers); a function."""
    stub = Stub("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            stub.asked.append({"path": self.path, "headers": dict(self.headers), "body": json.loads(body)})
            answer = stub.answers[min(len(stub.asked), len(stub.answers)) - 1]
            if callable(answer):
                answer(self)
                return
            status, text, headers = answer if isinstance(answer, tuple) else (200, answer, {})
            if isinstance(answer, int):
                status, text = answer, {"error": {"message": f"no use, {KEY}\nreally"}}
            raw = text if isinstance(text, bytes) else json.dumps(text).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield stub
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting between attempts, and none of the machine's own settings."""
    waits: list[float] = []
    monkeypatch.setattr(vdot.prompts.time, "sleep", waits.append)
    for name in ("VDOT_PROMPT_URL", "VDOT_PROMPT_MODEL", "VDOT_PROMPT_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("DASH_API_KEY", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):  # a model on this machine is asked without one
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return waits


# --- what is asked and what is made of the answer --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["wan_en", "wan_zh", "wan_en_ds", "wan_zh_ds"])
def test_an_endpoint_is_asked_as_openai_would_be(mode, server):
    server.says(chat("A red ball\nrolls over  wet grass."))
    writer = find_writer(mode, "some-model", server.url, environment={"VDOT_PROMPT_KEY": KEY})
    made = extend_prompt(" a red ball ", mode, writer)
    assert made == Extended("A red ball rolls over wet grass.", " a red ball ", mode, f"some-model at {server.url}")
    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions" and asked["headers"]["Authorization"] == f"Bearer {KEY}"
    language = "en" if "en" in mode else "zh"
    assert asked["body"] == {
        "model": "some-model",
        "stream": False,
        "messages": [
            {"role": "system", "content": INSTRUCTIONS[language]},
            {"role": "user", "content": "a red ball"},
        ],
    }


def test_the_whole_address_may_be_given_and_a_key_is_not_needed(server):
    server.says(chat("x y"))
    assert Endpoint(f"{server.url}/chat/completions/", "m")("do", "a").text == "x y"
    assert Endpoint(f"{server.url}/?version=2", "m").where == server.url
    assert Endpoint(f"{server.url}/?version=2", "m")("do", "a").text == "x y"
    assert [a["path"] for a in server.asked] == ["/v1/chat/completions", "/v1/chat/completions?version=2"]
    assert "Authorization" not in server.asked[0]["headers"]


@pytest.mark.parametrize(
    "text, prompt",
    [
        ("<think>The user wants\na ball.</think>\n\nA ball.", "A ball."),
        ("The user wants a ball.</think>A ball.", "A ball."),
        ('"A ball."', "A ball."),
        ("“A ball.”", "A ball."),
        ('"Stop" says the "sign"', '"Stop" says the "sign"'),
        ("```text\nA ball.\n```", "A ball."),
        (" A\tball \u3000 rolls.\r\n", "A ball rolls."),
        ("一个红球。", "一个红球。"),
        ("A \ud83d ball", "A ball"),
    ],
)
def test_what_models_put_around_a_prompt_is_taken_off(text, prompt, server):
    server.says(chat(text))
    assert extend_prompt("a ball", "wan_en", Endpoint(server.url, "m")).prompt == prompt


@pytest.mark.parametrize("text", ["", "  \n", None, "<think>for ever and", '""', ["a"]])
def test_no_text_is_an_error_and_not_the_old_prompt(text, server):
    server.says(chat(text))
    with pytest.raises(ServiceError, match="gave no text"):
        extend_prompt("a ball", "wan_en", Endpoint(server.url, "m"))


def test_an_answer_that_is_no_prompt_and_one_that_was_cut_off(server, caplog):
    server.says(chat("word " * 1000), chat("A ball rolls and", finish_reason="length"))
    with pytest.raises(ServiceError, match="4999 characters"):
        extend_prompt("a ball", "wan_en", Endpoint(server.url, "m"))
    with caplog.at_level(logging.INFO, "vdot"):
        assert extend_prompt("a ball", "wan_en", Endpoint(server.url, "m")).prompt == "A ball rolls and"
    assert "cut off" in caplog.text


def test_an_empty_prompt_is_not_sent(server):
    server.says(chat("x"))
    with pytest.raises(InputError, match="empty"):
        extend_prompt(" \n", "wan_en", Endpoint(server.url, "m"))
    assert not server.asked


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, attempts, words",
    [
        (401, 1, r"refused the key \(HTTP 401\): set VDOT_PROMPT_KEY$"),
        (403, 1, "refused the key"),
        (404, 1, r"has no model 'm', or is no chat endpoint \(HTTP 404\): no use, \*\*\* really$"),
        (400, 1, r"HTTP 400: no use, \*\*\* really"),
        ((302, {}, {"Location": "http://127.0.0.1:1/"}), 1, "sends us elsewhere"),
        ((307, {}, {"Location": "http://127.0.0.1:1/"}), 1, "sends us elsewhere"),
        (429, 3, "HTTP 429: .*after 3 attempts: try again later"),
        (500, 3, "HTTP 500"),
        ((503, b"<html>", {}), 3, "HTTP 503, after 3 attempts"),
        ((200, b"<html>hello", {}), 1, "sent no chat completion"),
        ((200, {"choices": []}, {}), 1, "sent no chat completion"),
        ((200, {"error": "x"}, {}), 1, "sent no chat completion"),
        ((200, b"[" * 100_000, {}), 1, "sent no chat completion"),
        ((200, b" " * (2**20 + 1), {}), 1, "more than 1048576 bytes"),
    ],
)
def test_every_refusal_is_one_sentence_without_the_key_and_tries_are_counted(answer, attempts, words, server, caplog):
    server.says(answer)
    with caplog.at_level(logging.DEBUG), pytest.raises(ServiceError, match=words) as caught:
        extend_prompt("a ball", "wan_en", Endpoint(server.url, "m", KEY))
    assert len(server.asked) == attempts and "\n" not in str(caught.value)
    assert KEY not in str(caught.value) + caplog.text + repr(Endpoint(server.url, "m", KEY))


def test_an_endpoint_that_recovers_is_waited_for_as_long_as_it_asks_within_reason(server, quick):
    server.says(429, (503, {}, {"Retry-After": "7"}), chat("A ball."))
    assert extend_prompt("a ball", "wan_en", Endpoint(server.url, "m")).prompt == "A ball."
    assert quick == [1.0, 7.0]
    server.says((503, {}, {"Retry-After": "86400"}), (503, {}, {"Retry-After": "soon"}), chat("A ball."))
    extend_prompt("a ball", "wan_en", Endpoint(server.url, "m"))
    assert quick[2:] == [20.0, 3.0]


def test_an_endpoint_that_says_nothing_or_trickles_is_given_up(server):
    ended = threading.Event()

    def silent(handler: BaseHTTPRequestHandler) -> None:
        ended.wait(60)

    def trickling(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not ended.wait(0.02):
            handler.wfile.write(b" ")

    for answer in (silent, trickling):
        server.says(answer)
        start = time.monotonic()
        try:
            with pytest.raises(ServiceError, match=r"nothing came in 0.2 s, after 3 attempts"):
                extend_prompt("a ball", "wan_en", Endpoint(server.url, "m", timeout=0.2))
            assert time.monotonic() - start < 50 and len(server.asked) == 3
        finally:
            ended.set()
        ended = threading.Event()


def test_nobody_listening_and_a_connection_that_breaks(server):
    with pytest.raises(ServiceError, match=r"127.0.0.1:9/v1 does not answer: .*after 3 attempts"):
        Endpoint("http://127.0.0.1:9/v1", "m", KEY)("do", "a")
    server.says(lambda handler: handler.connection.close())
    with pytest.raises(ServiceError, match="does not answer"):
        Endpoint(server.url, "m", KEY)("do", "a")
    server.says((200, b"{}", {"Content-Length": "500"}))
    with pytest.raises(ServiceError):
        Endpoint(server.url, "m", KEY, timeout=5)("do", "a")


# --- which model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, options, env, words",
    [
        ("wan", {}, {}, "unknown use_prompt_extend 'wan': use one of plain, wan_zh, wan_en, wan_zh_ds, wan_en_ds"),
        ("wan_en", {}, {}, "needs a language model: give --prompt_model FOLDER"),
        ("wan_en", {"model": "gone"}, {}, "gone is no folder"),
        ("wan_en", {"url": "http://h/v1"}, {}, "needs a language model"),
        ("wan_en_ds", {}, {}, "dashscope.aliyuncs.com, which needs a key: set DASH_API_KEY or VDOT_PROMPT_KEY"),
        ("wan_en", {"model": "m", "url": "ftp://h/v1"}, {}, "must look like https://"),
        ("wan_en", {"model": "m", "url": "127.0.0.1:8000"}, {}, "must look like"),
        ("wan_en", {"model": "m", "url": "http://h:99999/v1"}, {}, "must look like"),
        ("wan_en", {"model": "m", "url": "http://[::1/v1"}, {}, "must look like"),
        ("wan_en", {"model": "m", "url": "http://me:pw@h/v1"}, {}, "must not hold a name or a key"),
        ("wan_en", {"model": "m", "url": "http://h/v1", "timeout": 0}, {}, "prompt_timeout must be"),
        ("wan_en", {"model": "m", "url": "http://h/v1", "timeout": float("nan")}, {}, "prompt_timeout must be"),
        ("wan_en", {"model": "m", "url": "http://h/v1"}, {"VDOT_PROMPT_KEY": f"{KEY}\nx: y"}, "characters that no key"),
        ("wan_en", {"model": "m", "url": "http://h/v1"}, {"VDOT_PROMPT_KEY": f"ключ {KEY}"}, "characters that no key"),
        ("plain", {"model": "m"}, {}, "add --use_prompt_extend"),
    ],
)
def test_what_cannot_extend_is_said_at_once(mode, options, env, words):
    with pytest.raises(ConfigError, match=words) as caught:
        find_writer(mode, **options, environment=env)
    assert KEY not in str(caught.value) and "\n" not in str(caught.value) and "pw" not in str(caught.value)


def test_keys_go_only_where_they_are_meant():
    keys = {"OPENAI_API_KEY": "openai", "DASH_API_KEY": "dash", "OPENAI_BASE_URL": "http://gate.example/v1"}
    find = lambda mode, url=None, **env: find_writer(mode, "m", url, environment={**keys, **env})  # noqa: E731
    assert find("wan_en_ds") == Endpoint(vdot.prompts.DASHSCOPE_URL, "m", "dash")
    assert find("wan_en") == Endpoint("http://gate.example/v1", "m", "openai")
    assert find("wan_en", "https://api.openai.com/v1").key == "openai"
    for other in ("http://127.0.0.1:8000/v1", "https://evil-aliyuncs.com/v1", "https://api.openai.com.evil.com/v1"):
        assert find("wan_en", other).key == ""
        assert find("wan_en", other, VDOT_PROMPT_KEY="own").key == "own"
    assert find_writer("wan_en", "m", environment={"OPENAI_API_KEY": "k"}).url == vdot.prompts.OPENAI_URL
    assert find_writer("wan_zh_ds", environment={"DASH_API_KEY": "k"}).model == "qwen-plus"
    assert find_writer("wan_en", environment={"VDOT_PROMPT_URL": "http://h/v1", "VDOT_PROMPT_MODEL": "q"}).name == (
        "q at http://h/v1"
    )
    assert find_writer("plain") is None and set(MODES) == {"plain", "wan_zh", "wan_en", "wan_zh_ds", "wan_en_ds"}


# --- a model in a folder ---------------------------------------------------------------------------------------------

TEMPLATES = {
    "none": None,
    "system": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
    "no system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
    "broken": "{{ raise_exception('never') }}",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Random Llamas of two layers, with every kind of chat template."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    made = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "vdot-tiny" / "tokenizer")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=2048,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        made[name] = folder
    return made


@pytest.mark.parametrize("template", ["none", "system", "no system"])
def test_a_local_model_answers_the_same_every_time(template, folders, monkeypatch):
    monkeypatch.setattr(vdot.prompts, "NEW_TOKENS", 12)
    writer = find_writer("wan_en", str(folders[template]))
    assert isinstance(writer, LocalModel) and str(folders[template]) in writer.name
    state = torch.random.get_rng_state()
    one, two = writer("do this", "a red ball"), find_writer("wan_zh", str(folders[template]))("do this", "a red ball")
    assert one == two and one.text.strip()
    assert torch.equal(torch.random.get_rng_state(), state) and writer._loaded is None
    assert extend_prompt("a red ball", "wan_en", writer).by == writer.name


def test_a_local_model_gets_instruction_and_prompt_in_its_own_form_and_gives_only_what_is_new(folders, monkeypatch):
    seen = []
    monkeypatch.setattr(vdot.prompts, "NEW_TOKENS", 4)
    monkeypatch.setattr(
        vdot.prompts, "_conversation", lambda *a, real=vdot.prompts._conversation: seen.append(real(*a)) or seen[-1]
    )
    for name in ("none", "system", "no system"):
        answer = LocalModel(folders[name], torch.device("cpu"))("do this", "a red ball")
        assert "red ball" not in answer.text
    assert seen == [
        "do this\n\nPrompt: a red ball\n\nParagraph:",
        "<system>do this<user>a red ball<assistant>",
        "<user>do this\n\na red ball<assistant>",
    ]


def test_a_local_model_that_ends_by_itself_is_not_cut_and_is_kept_for_tables(folders, monkeypatch):
    writer = LocalModel(folders["system"], torch.device("cpu"), keep=True)
    tokenizer, model = writer._load()
    loads = []
    monkeypatch.setattr(LocalModel, "_load", lambda self: loads.append(self) or (tokenizer, model))
    new = tokenizer("blue ball", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([new])], 1))
    assert writer("do", "a ball") == writer("do", "a ball") == Answer("blue ball", False)
    assert len(loads) == 1
    monkeypatch.setattr(vdot.prompts, "NEW_TOKENS", len(new) - 1)
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([new[:-1]])], 1))
    assert writer("do", "a ball") == Answer("blue ball", True)


def test_a_local_model_that_does_not_fit_is_a_sentence(folders, monkeypatch):
    writer = LocalModel(folders["none"], torch.device("cpu"), keep=True)
    _, model = writer._loaded = writer._load()

    def full(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(InputError, match="does not fit on the device"):
        writer("do", "a ball")


def test_folders_that_hold_no_model(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"config.json is missing"):
        find_writer("wan_en", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="cannot be loaded as a transformers text-generation model"):
        find_writer("wan_en", str(tmp_path))("do", "a")
    with pytest.raises(ConfigError, match="does not take ours"):
        find_writer("wan_en", str(folders["broken"]))("do", "a")
    with pytest.raises(InputError, match=r"too long .* 2048 tokens"):
        find_writer("wan_en", str(folders["none"]))("do", "ball " * 3000)


# --- from the command line -------------------------------------------------------------------------------------------


def test_a_run_prints_and_keeps_the_extended_prompt_and_repeats_without_asking(server, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("VDOT_PROMPT_KEY", KEY)
    server.says(chat("A red ball rolls over the grass in the sun."))
    extend = (
        "--use_prompt_extend",
        "wan_en",
        "--prompt_model",
        "some-model",
        "--prompt_url",
        f"{server.url}?secret={KEY}",
    )
    code, out, err = cli("--prompt", "ball", *SMALL, *extend, "--dry_run")
    assert code == 0 and not server.asked and f"will be written out by some-model at {server.url} (wan_en)" in out
    code, out, err = cli("--prompt", "ball", *SMALL, *extend, "--save_dir", tmp_path / "a")
    assert (code, err) == (0, "") and len(server.asked) == 1
    assert "prompt  A red ball rolls over the grass in the sun." in out and KEY not in out
    text = (tmp_path / "a" / "run.json").read_text()
    record = json.loads(text)
    assert KEY not in text and "prompt_url" not in record["config"]
    assert record["config"]["prompt"] == "A red ball rolls over the grass in the sun."
    assert record["prompt_extension"] == {
        "prompt": record["config"]["prompt"],
        "original": "ball",
        "mode": "wan_en",
        "by": f"some-model at {server.url}",
    }
    monkeypatch.delenv("VDOT_PROMPT_KEY")
    assert cli("--config", tmp_path / "a" / "run.json", "--save_dir", tmp_path / "b")[0] == 0
    plain = ("--prompt", record["config"]["prompt"], *SMALL, "--save_dir", tmp_path / "c")
    assert cli(*plain)[0] == 0 and len(server.asked) == 1
    videos = [(tmp_path / name / "out_video.mp4").read_bytes() for name in "abc"]
    assert videos[0] == videos[1] == videos[2]  # the model saw the extended prompt


def test_a_failure_is_a_sentence_with_nothing_made_and_nothing_loaded(server, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(vdot.cli.VdotPipeline, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    server.says(500)
    asked = ("--prompt", "ball", *SMALL, "--save_dir", tmp_path / "a", "--use_prompt_extend", "wan_zh")
    code, _, err = cli(*asked, "--prompt_model", "m", "--prompt_url", server.url)
    assert code == 2 and "HTTP 500" in err and err.count("\n") == 1 and not (tmp_path / "a").exists()
    code, _, err = cli(*asked)
    assert code == 2 and "needs a language model" in err and not (tmp_path / "a").exists()


def test_rows_of_a_table_are_extended_one_by_one_and_not_again(server, tmp_path, cli):
    rows = [{"id": i, "prompt": f"ball {i}", "size": "32*16", "frame_num": 1} for i in "ab"]
    table = tmp_path / "jobs.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    extend = ("--use_prompt_extend", "wan_en", "--prompt_model", "m", "--prompt_url", server.url, "--sample_steps", 1)
    server.says(chat("A ball."), 404)
    code, out, _ = cli("--jobs", table, "--save_dir", tmp_path / "out", *extend)
    assert code == 1 and "1 done, 0 skipped, 1 failed" in out and "has no model" in out
    server.says(chat("Another ball."))
    code, out, _ = cli("--jobs", table, "--save_dir", tmp_path / "out", *extend)
    assert code == 0 and "1 done, 1 skipped, 0 failed" in out and len(server.asked) == 1
    assert server.asked[0]["body"]["messages"][1]["content"] == "ball b"


def test_a_local_model_from_the_command_line(folders, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(vdot.prompts, "NEW_TOKENS", 8)
    asked = ("--prompt", "a red ball", *SMALL, "--use_prompt_extend", "wan_en", "--prompt_model", folders["system"])
    code, _, err = cli(*asked, "--save_dir", tmp_path / "a")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (code, err) == (0, "") and record["prompt_extension"]["by"] == f"the model in {folders['system']}"
    assert record["config"]["prompt"] != "a red ball" and record["config"]["prompt_model"] is None
