"""URLs of folders in object stores, such as s3://bucket/run."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from litgpt.errors import UserError

URL = re.compile(r"(?P<protocol>s3|gs):/{1,2}(?P<path>[^/\s?#][^\s?#]*)")


class Client(NamedTuple):
    """The package that speaks to an object store, and the extra of this project that installs it."""

    package: str
    extra: str


CLIENTS = {"s3": Client("s3fs", "s3"), "gs": Client("gcsfs", "gcs")}


def find_url(value: Path | str) -> str | None:
    """Find the URL that a setting is, also as a path, which has lost a slash; None for a local path or another name."""
    match = URL.fullmatch(str(value))
    return f"{match['protocol']}://{match['path'].rstrip('/')}" if match else None


def format_path(value: Path | str) -> str:
    """Format a path; a URL with both of its slashes, of which a path has lost one."""
    return find_url(value) or str(value)


def check_client(key: str, url: str) -> None:
    """Check that the package is installed that speaks to the object store of a URL.

    Raises:
        UserError: naming `key` and the command that installs it.
    """
    client = CLIENTS[url.partition(":")[0]]
    if find_spec(client.package) is None:
        raise UserError(f"{key}: {url} needs {client.package}; run: pip install 'litgpt[{client.extra}]'")
