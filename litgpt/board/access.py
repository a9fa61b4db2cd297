"""Who may ask the board: programs and pages that have the key, and no page of another origin."""

import ipaddress
import socket

from fastapi import Request

from litgpt.infer.server.errors import ApiError


def check_host(own_host: str, request: Request) -> None:
    """Check that a request names this server by an address, and not by a name that somebody else may point to it.

    A browser sends the name in its address bar. The page of another site whose name is changed to point to this machine
    (DNS rebinding) has the name of that site.

    Raises:
        ApiError: 403 if it names another host.
    """
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if not (name.lower() in ("localhost", own_host.lower(), socket.gethostname().lower()) or is_address(name)):
        raise ApiError(
            403, f"host: {name[:200]} is not a name of this server; use its address", kind="permission_error"
        )


def is_address(name: str) -> bool:
    """Whether a host is an IP address, in brackets if it is one of version 6."""
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True


def check_origin(request: Request) -> None:
    """Check that a request does not come from the page of another origin.

    Raises:
        ApiError: 403 if it does.
    """
    page, host = request.headers.get("origin"), request.headers.get("host", "")
    site = request.headers.get("sec-fetch-site", "none")
    is_own = page is None or page in (f"http://{host}", f"https://{host}")
    if not is_own or site not in ("none", "same-origin"):
        raise ApiError(403, "origin: requests of other pages are not answered", kind="permission_error")
