"""A real S3 protocol server on loopback, for tests of what runs against buckets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "ecos-box"


class S3Server:
    """moto's server on a free port, which can be stopped and come back on the same one."""

    def __init__(self) -> None:
        self._port = 0
        self.start()

    def start(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def boto(self) -> Any:
        """A client of another make than s3fs, to look at the bucket from outside."""
        return boto3.client("s3", endpoint_url=self.endpoint)

    def keys(self) -> list[str]:
        listing = self.boto().list_objects_v2(Bucket=BUCKET)
        return sorted(item["Key"] for item in listing.get("Contents", []))

    def versions(self, key: str) -> int:
        """How often an object was written."""
        found = self.boto().list_object_versions(Bucket=BUCKET, Prefix=key)
        return len(found.get("Versions", []))


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server with one empty, versioned bucket; s3fs finds it through the environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTEDMARKER")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-marker")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("AWS_PROFILE", raising=False)
        boto = server.boto()
        boto.create_bucket(Bucket=BUCKET)
        boto.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
        try:
            yield server
        finally:
            server.stop()
