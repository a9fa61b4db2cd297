"""Where the bytes of a medium are."""

import base64
import binascii
from pathlib import Path

from litgpt.data.media.errors import MediumError
from litgpt.data.read.media import Medium


def find_source(medium: Medium) -> Path | bytes:
    """The file of a medium, or its bytes.

    Raises:
        MediumError: if they are not base64.
    """
    if medium.data is None:
        assert medium.path is not None
        return Path(medium.path)
    try:
        return base64.b64decode(medium.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediumError(medium.name, "not base64", str(error), "encode the bytes of the file") from None
