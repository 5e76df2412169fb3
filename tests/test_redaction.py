"""Secrets stay out of everything that people see, however a URL or a recipe writes them."""

from __future__ import annotations

import signal

import pytest

from deepclust import errors
from deepclust.errors import HIDDEN, argument, command, holds_secrets, redact, remember, shown

SECRET = "S3cr3tW0rd"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(errors, "_secrets", {})


@pytest.mark.parametrize(
    "text",
    [
        f"https://bob:{SECRET}@h/x.tar",
        f"https://bob:p@{SECRET}@h/x.tar",
        f"https://bob:{SECRET}/y@h/x.tar",
        f"https://bob:y/{SECRET}@h/x.tar",
        f"https://bob:{SECRET}?y@h/x.tar",
        f"https://bob:p@s?{SECRET}@h/x.tar",
        f"https://bob:it's{SECRET}@h/x.tar",
        f'https://bob:a"{SECRET}@h/x.tar',
        f"https://{SECRET}@h/x.tar",
        f"https://h/x.tar?sig={SECRET}",
        f"https://h/x.tar?a=(1)&sig={SECRET}",
        f"https://h/x.tar?a='1'&sig={SECRET}",
        f"https://h/x.tar;token={SECRET}",
        f"https://h/x;token={SECRET}/y.tar",
        f"https://h/x.tar#access_token={SECRET}",
        f"https://h:8080/x.tar?sig=a@{SECRET}",
        f"https://bob:8080/{SECRET}@h/x.tar",
        f"s3://key:{SECRET}@bucket/x.tar",
        f"zip://x.tar::https://bob:{SECRET}@h/y.tar?sig={SECRET}",
        f"['https://bob:{SECRET}@h/x.tar', 'https://h/y.tar?sig={SECRET}']",
        f"https://bob:{SECRET}@h/x.tar,https://bob:{SECRET}@h/y.tar",
        f"HTTPS://bob:{SECRET}@h/x.tar: 403, and (https://h/y?sig={SECRET})",
        f"http://[::1]:9/x?sig={SECRET}",
        f"Max retries exceeded with url: /x?sig={SECRET}",
        f"url='https://h/x?q=it's&sig={SECRET}'",
    ],
)
def test_no_spelling_of_a_url_shows_its_secret(text):
    assert SECRET not in redact(text)
    assert SECRET not in redact(f"cannot read {text}: HTTP 403")


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/folder/x-{000..146}.tar",
        "https://host:8443/folder/x.tar",
        "http://[2001:db8::1]:80/x.tar",
        "s3://bucket/me@home/x.tar is missing",
        "cannot read /data/x.tar: what now? 3 = 2 + 1",
        "a=b, c:d@e",
    ],
)
def test_what_is_not_secret_stays(text):
    assert redact(text) == text


@pytest.mark.parametrize("piece", ["x", "-", "a-", "token", "x+", "?a=", 'a="', " auth"])
def test_a_long_text_is_looked_through_in_no_time(piece):
    text = piece * (20_000 // len(piece))
    signal.alarm(10)  # patterns that go back and forth take minutes
    try:
        assert redact(text) in (text, "")  # of a query nothing is left
        command(text)
    finally:
        signal.alarm(0)


def test_a_text_keeps_its_words_around_a_url():
    text = redact("403, url='https://u:p@h/a.tar?s=1', then 's3://k:s@b/x' (https://h/y?a=b).")
    assert text == "403, url='https://h/a.tar', then 's3://b/x' (https://h/y)."


def test_a_secret_that_was_met_is_hidden_in_parts_of_its_url_and_when_it_is_unquoted():
    remember("https://bob:pass%2Fword@h/x.tar?X-Sig=ab%2Bcdefgh&n=1")
    for text in ("pass%2Fword", "pass/word", "ab+cdefgh", "Authorization: bob:pass%2Fword"):
        assert redact(f"<{text}>").strip("<>").removeprefix("Authorization: ") == HIDDEN
    assert redact("bob and n=1 stay") == "bob and n=1 stay"


def test_a_recipe_is_shown_without_its_secrets_and_otherwise_as_it_is():
    tree = {
        "seed": 0,
        "data": {"shards": f"https://b:{SECRET}@h/x.tar", "size": 32, "mean": [0.1, 0.2]},
        "ray": {"env": {"WANDB": SECRET, "N": 1}, "address": f"http://u:{SECRET}@h:8265"},
        "slurm": {
            "setup": [f"export AWS_SECRET_ACCESS_KEY={SECRET}", "module load cuda/12",
                      f"wandb login {SECRET}", f"tool --api-key '{SECRET}'", f"A=1 B='x {SECRET}'"],
            "sbatch": {"export": f"ALL,TOKEN={SECRET}", "nice": 3},
        },
    }  # fmt: skip
    there = shown(tree)
    assert SECRET not in str(there)
    assert there["slurm"]["setup"][1] == "module load cuda/12"
    assert (there["seed"], there["data"]["size"], there["data"]["mean"]) == (0, 32, [0.1, 0.2])
    assert list(there["ray"]["env"]) == ["WANDB", "N"]
    assert holds_secrets(tree)
    assert not holds_secrets({"data": {"shards": "/data/x", "mean": [0.5]}, "ray": {"cpus": 2}})


@pytest.mark.parametrize(
    "word",
    [
        f"ray.env.KEY={SECRET}",
        f"ray.env={{KEY: {SECRET}}}",
        f"ray={{env: {{KEY: {SECRET}}}}}",
        f"slurm.setup=[export A={SECRET}, 'B={SECRET} run']",
        f"slurm={{setup: ['export A={SECRET}']}}",
        f"data.shards=https://b:{SECRET}@h/x?s={SECRET}",
        f"data.shards=[s3://k:{SECRET}@b/x]",
        f"https://b:{SECRET}@h/x",
        f"ray.env={{KEY: [{SECRET}",
    ],
)
def test_an_override_is_shown_without_its_secret(word):
    assert SECRET not in argument(word)


def test_ordinary_arguments_stay():
    for word in (
        "train.epochs=3",
        "--run",
        "runs/a=b",
        "cluster.k=1000,3000",
        "/usr/bin/x",
    ):
        assert argument(word) == word
    assert (
        command("module load cuda/12 && ulimit -n 4096") == "module load cuda/12 && ulimit -n 4096"
    )
