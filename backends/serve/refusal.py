"""What a request is answered with where it is not answered as asked. Imports nothing heavy."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A request that is refused, in the form in which OpenAI's clients read it.

    Args:
        param: the field that is wrong. code: for programs.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def as_dict(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def another_model(asked: Any, served: str) -> Refusal:
    """Of a request that names another model than the one that is ``served``."""
    status = 404 if isinstance(asked, str) else 400
    message = f"The model {asked!r} is not served here. Ask for {served!r}"
    return Refusal(message, param="model", code="model_not_found", status=status)
