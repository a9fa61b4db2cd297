"""What a request must have before it is read: the key, and a size within the limit."""

import hmac

from fastapi import Request

from litgpt.infer.server.errors import ApiError


def check_key(key: str, request: Request) -> None:
    """Check that a request has the key as a bearer token.

    Raises:
        ApiError: 401 if not.
    """
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent.encode(), key.encode()):
        raise ApiError(401, "The API key is missing or wrong.", kind="authentication_error", code="invalid_api_key")


def check_size(limit: int, request: Request) -> None:
    """Check that a request names the size of its body, and that it is at most `limit` bytes.

    Raises:
        ApiError: 411 or 413 if not.
    """
    size = request.headers.get("content-length", "0" if request.method in ("GET", "HEAD") else "")
    if request.method == "POST" and not size.isdecimal():
        raise ApiError(411, "content-length: is missing; send the size of the body")
    if size.isdecimal() and int(size) > limit:
        raise ApiError(413, f"the body has {size} bytes, but the limit is {limit}")
