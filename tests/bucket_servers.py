"""Servers of buckets on this machine, to be run as a process: S3's by moto, Google Cloud Storage's by its emulator.

Both hold one bucket, called `bucket`, in memory. The process prints the variables that let clients find them.
"""

import json
import socket
import threading

import boto3
from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def main() -> None:
    s3, gs = free_port(), free_port()
    ThreadedMotoServer("127.0.0.1", s3).start()
    create_server("localhost", gs, in_memory=True, default_bucket="bucket").start()
    variables = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "STORAGE_EMULATOR_HOST": f"http://localhost:{gs}",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google itself what kind of bucket it is
    }
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys).create_bucket(
        Bucket="bucket"
    )
    print(json.dumps(variables), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
