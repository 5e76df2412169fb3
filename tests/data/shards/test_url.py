from __future__ import annotations

from pathlib import Path

import pytest

from deepclust.data.shards.url import Url, common_folder, is_url, redact
from deepclust.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://b/x", True),
        ("https://h/x", True),
        ("C:/x", False),
        ("a:b/c", False),
        ("/x//y", False),
    ],
)
def test_urls_are_known_from_paths(text, expected):
    assert is_url(text) is expected


def test_a_url_is_shown_without_its_secrets():
    signed = "https://me:sesame@host/dir/a.tar?X-Signature=open&b=%2F"
    assert f"{Url(signed)}" == repr(Url(signed)) == "https://host/dir/a.tar"
    text = redact(f"403, url='{signed}', then s3://key:sesame@bucket/x (and so on)")
    assert text == "403, url='https://host/dir/a.tar', then s3://bucket/x (and so on)"


def test_names_are_those_that_a_disk_would_show():
    assert Url("https://host/a/b%20c.tar?sig=a/b").name == "b c.tar"
    assert Url("s3://bucket/a/b%20c?.tar").name == "b%20c?.tar"
    with pytest.raises(DataError, match="is not a valid name for a shard"):
        _ = Url("https://host/..%2Fx.tar").name


def test_neighbours_keep_the_signature():
    folder = Url("https://host/a/x.tar?sig=1").parent
    assert (folder / "y.tar").text == "https://host/a/y.tar?sig=1"
    assert (Url("s3://bucket/x.tar").parent / "y").text == "s3://bucket/y"


@pytest.mark.parametrize(
    ("texts", "folder"),
    [
        (["s3://b/p/x.tar", "s3://b/p/y.tar"], "s3://b/p"),
        (["s3://b/p/x.tar", "s3://b/pq/y.tar"], "s3://b"),
        (["https://u:p@h/a/b/x.tar", "https://u:p@h/a/c/y.tar"], "https://h/a"),
        (["https://one/x.tar", "https://two/y.tar"], "https://one"),
        (["/a/b/x.tar", "/a/c/y.tar"], "/a"),
    ],
)
def test_the_common_folder_is_the_deepest(texts, folder):
    shards = [Url(text) if is_url(text) else Path(text) for text in texts]
    assert str(common_folder(shards)) == folder
