"""The URL of an object tier, and where its credentials may come from."""

from __future__ import annotations

import pytest

from kvstrata.core.errors import ConfigError
from kvstrata.storage.location import parse_location, region_of, s3_credentials


def test_a_whole_url():
    found = parse_location("s3://kv-cache/team/a/?endpoint=http://127.0.0.1:9000&region=eu-west-1")
    assert (found.scheme, found.bucket, found.prefix) == ("s3", "kv-cache", "team/a")
    assert found.endpoint == "http://127.0.0.1:9000"
    assert region_of(found, {"AWS_REGION": "us-west-2"}) == "eu-west-1"
    assert str(found) == "s3://kv-cache/team/a"


@pytest.mark.parametrize("url", ["s3://bucket", "gs://bucket/", "az://box/p?account=me"])
def test_short_urls(url):
    found = parse_location(url)
    assert found.endpoint == ""
    assert region_of(found, {}) == "us-east-1"
    assert region_of(found, {"AWS_DEFAULT_REGION": "x-1"}) == "x-1"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "bucket/prefix",
        "http://bucket",
        "s3:///prefix",
        "s3://buck et",
        "s3://bucket/a//b",
        "s3://bucket/../other",
        "s3://bucket/ä",
        "s3://bucket?endpoint=127.0.0.1:9000",
        "s3://bucket?endpoint=ftp://host",
        "s3://bucket?endpoint=http://",
        "az://box?region=x",
        "gs://bucket#part",
    ],
)
def test_what_is_not_a_place(url):
    with pytest.raises(ConfigError, match=r"tiers\.object") as caught:
        parse_location(url)
    assert caught.value.hint


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEYID:hunter2@bucket",
        "s3://bucket?secret_access_key=hunter2",
        "s3://bucket?endpoint=http://user:hunter2@host",
        "az://box?sas=hunter2",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as caught:
        parse_location(url)
    assert "hunter2" not in str(caught.value)


class TestCredentialsFile:
    @pytest.fixture
    def home(self, tmp_path):
        (tmp_path / ".aws").mkdir()
        (tmp_path / ".aws" / "credentials").write_text(
            "[default]\naws_access_key_id = AK1\naws_secret_access_key = S%1\n"
            "[team]\naws_access_key_id=AK2\naws_secret_access_key=S2\naws_session_token=T2\n"
        )
        return {"HOME": str(tmp_path)}

    def test_the_default_profile(self, home):
        assert s3_credentials(home) == {"access_key_id": "AK1", "secret_access_key": "S%1"}

    def test_a_named_profile(self, home):
        found = s3_credentials({**home, "AWS_PROFILE": "team"})
        assert found == {
            "access_key_id": "AK2",
            "secret_access_key": "S2",
            "session_token": "T2",
        }

    def test_another_file(self, home, tmp_path):
        other = tmp_path / "other"
        other.write_text("[default]\naws_access_key_id = AK9\naws_secret_access_key = S9\n")
        found = s3_credentials({**home, "AWS_SHARED_CREDENTIALS_FILE": str(other)})
        assert found["access_key_id"] == "AK9"

    def test_the_environment_comes_first(self, home):
        assert s3_credentials({**home, "AWS_ACCESS_KEY_ID": "AK0"}) == {}

    def test_no_file_and_no_profile(self, home, tmp_path):
        assert s3_credentials({"HOME": str(tmp_path / "nobody")}) == {}
        assert s3_credentials({**home, "AWS_PROFILE": "nobody"}) == {}

    def test_a_broken_file_is_named_and_not_quoted(self, home, tmp_path):
        (tmp_path / ".aws" / "credentials").write_text("aws_secret_access_key = hunter2\n")
        with pytest.raises(ConfigError, match="not a credentials file") as caught:
            s3_credentials(home)
        assert "hunter2" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
