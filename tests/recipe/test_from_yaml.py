"""Recipes in files and at URLs, and the errors of those that cannot be read."""

import http.server
import threading

import pytest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\nseed: 2\n", "bad.yaml:2: not valid YAML (duplicate key 'seed')"),
        (b"seed: [1\n", "bad.yaml:2: not valid YAML"),
        (b"a: *b\n", "bad.yaml:1: not valid YAML (aliases are not supported)"),
        (b"- seed\n", "bad.yaml: contains a list; use keys and values"),
        (b"seed: \xff\n", "bad.yaml:1: not UTF-8 (byte 0xff); convert it to UTF-8"),
        (b"seed: \x00\n", "bad.yaml: not valid YAML"),
        (b"1: 2\n", "bad.yaml:1: not valid YAML (key 1 is not a string)"),
        (b"a: " + b"[" * 5000, "bad.yaml: nested too deeply"),
        (b"seed: !!int x\n", "bad.yaml: not valid YAML (invalid literal"),
        (b"!!python/object/apply:os.system [ls]\n", "bad.yaml:1: not valid YAML"),
        (b"data: [1]\n", "data: [1] is not valid"),
        (
            b"train: 7\n",
            "train: 7 is a single value for a group of settings; set train.save_interval or its other keys",
        ),
        (b"optimizer: {class_path: 3}\n", "optimizer.class_path: 3 is not valid"),
        (b"optimizer: {class_path: AdamW, init_args: 3}\n", "optimizer.init_args: 3 is not valid"),
        (b"model_config: 5\n", "model_config: 5 is not valid; use keys and values or null"),
    ],
)
def test_an_invalid_file_is_an_error_in_one_line(litgpt, tmp_path, content, message):
    (tmp_path / "bad.yaml").write_bytes(content)
    assert message in litgpt("pretrain", "x", "--config", tmp_path / "bad.yaml").error_line()


def test_a_missing_file_and_a_folder_are_errors_in_one_line(litgpt, tmp_path):
    assert f"{tmp_path}/no.yaml: no such file" in litgpt("pretrain", "--config", tmp_path / "no.yaml").error_line()
    assert f"{tmp_path}: cannot be read (Is a directory)" in litgpt("pretrain", "--config", tmp_path).error_line()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Serve the folder of the test over HTTP; return the URL."""
    monkeypatch.setenv("NO_PROXY", "*")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("config")
def test_a_recipe_comes_from_a_url(litgpt, site, user_module):
    recipe = litgpt("pretrain", "--config", f"{site}/mine.yaml", "--seed", "1").recipe
    assert (recipe.seed, recipe.train.max_tokens) == (1, 3000)
    assert "404" in litgpt("pretrain", "--config", f"{site}/no.yaml").error_line()
    chosen = litgpt("pretrain", "--config", f"{site}/mine.yaml", "--data", user_module, "--data.path", "a")
    assert chosen.recipe.data.path == "a"


@pytest.mark.parametrize(
    "text", ["data: {class_path: own_letters.Letters}", "optimizer: own.Thing", "optimizer: {class_path: os.system}"]
)
def test_a_recipe_from_a_url_cannot_name_a_foreign_class(litgpt, tmp_path, site, text):
    (tmp_path / "their.yaml").write_text(f"model_name: x\n{text}\n")
    line = litgpt("pretrain", "--config", f"{site}/their.yaml").error_line()
    assert "is not a class of litgpt, and only the command line and files on this machine may name others" in line


def test_a_date_is_a_string(litgpt, tmp_path):
    (tmp_path / "dated.yaml").write_text("data: {class_path: Conversations, sources: [r.jsonl], date: 2024-02-28}\n")
    flags = ("--data", "Conversations", "--data.sources", "[r.jsonl]", "--data.date", "2024-02-28")
    for words in (flags, ("--config", tmp_path / "dated.yaml")):
        assert litgpt("finetune", "x", *words).recipe.data.date == "2024-02-28"
