"""Check that the Hugging Face hub can be reached, before its client, which tries for much longer."""

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

CONNECT_SECONDS = 5.0  # seconds


def check_hub_connection() -> None:
    """Check that a connection to the hub can be opened, unless a proxy opens it.

    Raises:
        ConnectionError: with the reason if not, or if the hub's client is set to stay offline.
    """
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    url = urlsplit(constants.ENDPOINT)
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    if {url.scheme, "all"} & getproxies().keys() and not proxy_bypass(host):
        return
    faults: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            faults.append(error.strerror or str(error))

    # in a thread, because the resolution of names has no timeout of its own
    thread = threading.Thread(target=connect, name="connect", daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if thread.is_alive() or faults:
        reason = faults[0] if faults else f"no answer in {CONNECT_SECONDS:g} s"
        raise ConnectionError(f"{host}: {reason}")
