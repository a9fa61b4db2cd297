"""Errors in the form of OpenAI's API."""

from typing import Any

from litgpt.errors import UserError


class ApiError(Exception):
    """An error that a client gets.

    Attributes:
        status: of HTTP.
        kind: of OpenAI's errors, such as `invalid_request_error`.
        param: the field of the request that is wrong, or None.
        code: for programs, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def to_body(self) -> dict[str, Any]:
        """The body of the response, in which characters of the request that UTF-8 cannot encode are question marks."""
        message, param = (text and text.encode(errors="replace").decode() for text in (str(self), self.param))
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}


def describe_user_error(error: UserError) -> ApiError:
    """The error of a request that the model cannot answer."""
    message = str(error)
    key = message.partition(":")[0]
    is_long = "exceed" in message and "context" in message
    code = "context_length_exceeded" if is_long else None
    return ApiError(400, message, param=key if key.isidentifier() else None, code=code)


def describe_validation_errors(errors: list[Any]) -> ApiError:
    """The first error of a body that does not have the form of its route."""
    first = errors[0]
    words = [str(word) for word in first["loc"] if word != "body"]
    field, message = ".".join(words), first["msg"]
    return ApiError(400, f"{field}: {message}" if field else message, param=words[0] if words else None)
