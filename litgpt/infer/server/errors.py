"""Errors in the form of OpenAI's API."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

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


def write_error(error: ApiError) -> JSONResponse:
    """The response for an error."""
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.to_body(), error.status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer errors in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def handle_api(_request: Request, error: ApiError) -> Response:
        return write_error(error)

    @app.exception_handler(UserError)
    async def handle_user(_request: Request, error: UserError) -> Response:
        return write_error(describe_user_error(error))

    @app.exception_handler(RequestValidationError)
    async def handle_body(_request: Request, error: RequestValidationError) -> Response:
        return write_error(describe_validation_errors(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def handle_http(_request: Request, error: HTTPException) -> Response:
        return write_error(ApiError(error.status_code, str(error.detail)))
