"""From bucket to bucket over a server that speaks S3; run where `pip install 'overnight[s3-test]'` was."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import overnight, write_job

moto = pytest.importorskip("moto.server", reason="needs moto and s3fs")
boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")

LINES = b"".join(json.dumps({"id": n, "prompt": f"say {n}"}).encode() + b"\n" for n in range(50))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    served = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    served.start()
    host, port = served.get_host_and_port()
    url = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "canary",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield url
    served.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the server
def test_from_a_bucket_to_a_bucket(tmp_path: Path, server: str) -> None:
    client = boto3.client("s3", endpoint_url=server)
    client.create_bucket(Bucket="night")
    client.put_object(
        Bucket="night", Key="in/a.jsonl.gz", Body=gzip.compress(LINES[: len(LINES) // 2].rpartition(b"\n")[0])
    )
    client.put_object(Bucket="night", Key="in/b.jsonl", Body=LINES)
    job = write_job(
        tmp_path,
        [],
        input={"path": "s3://night/in/*"},
        output={"path": "s3://night/out/x.jsonl.gz", "local_directory": str(tmp_path / "local")},
    )
    environment = {"OVERNIGHT_CACHE": str(tmp_path / "cache")}
    first = overnight("run", job, **environment)
    assert first.returncode == 0, first.stderr
    assert "copied to s3://night/out/x.jsonl.gz" in first.stderr and "canary" not in first.stderr
    body = client.get_object(Bucket="night", Key="out/x.jsonl.gz")["Body"].read()
    assert body == (tmp_path / "local/night/out/x.jsonl.gz").read_bytes()
    assert json.loads(gzip.decompress(body).splitlines()[-1])["completed"] > 70
    again = overnight("run", job, **environment)
    assert again.returncode == 0 and "copied" not in again.stderr
    client.put_object(Bucket="night", Key="in/b.jsonl", Body=LINES.replace(b"say 7", b"say 8"))
    changed = overnight("run", job, **environment)
    assert changed.returncode == 65 and "s3://night/in/b.jsonl" in changed.stderr
    client.put_object(Bucket="night", Key="in/b.jsonl", Body=LINES)
    client.put_object(Bucket="night", Key="out/x.jsonl.gz", Body=b"another's")
    assert overnight("run", job, **environment).returncode == 65
    lacking = overnight("run", job, "--set", "output.path=s3://none/x.jsonl", **environment)
    assert lacking.returncode == 74 and "The answers are safe at" in lacking.stderr
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == ["night"]
