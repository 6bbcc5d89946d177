"""Remove secrets from text. Error bodies echo keys, headers and URLs, and exceptions quote their arguments."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Redactor", "without_message"]

_MASK = "***"
_SHAPES = re.compile(
    r"""(?ix)
    (?P<keep>  \b(?:bearer|basic)\s+
             | \b(?:api[-_ ]?key|x-api-key|access[-_]token|client[-_]secret|password|passwd)
               \\*["']?\s*[:=]\s*\\*["']?      # backslashes: JSON quoted inside JSON
             | ://[^\s/:@"']*: (?=[^\s/@"']+@)
    ) [^\s"'&,;@}\\]+
    | \b(?:sk|pk|rk|gsk|hf|xai|csk|fw|swk)[-_][A-Za-z0-9*_-]{8,}
    | \bey[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*     # a JWT
    """,
)


class Redactor:
    """A callable that replaces known secrets, and text that looks like a secret, with `***`."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # Longest first, because one secret may contain another. Very short secrets would mask ordinary words.
        self._secrets = sorted({secret for secret in secrets if len(secret) >= 4}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return the text with secrets replaced."""
        for secret in self._secrets:
            text = text.replace(secret, _MASK)
        return _SHAPES.sub(lambda match: (match["keep"] or "") + _MASK, text)

    def __repr__(self) -> str:
        return f"<Redactor of {len(self._secrets)} secrets>"


def without_message(error: BaseException, *, causes: int = 16) -> BaseException:
    """Return an exception of the same name and traceback, causes included, with empty messages.

    Messages may quote the job: those of `KeyError` and `int()` do. The traceback is enough to find the fault.
    """
    kind = type(error)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    silent: BaseException = type(kind.__name__, (Exception,), names)().with_traceback(error.__traceback__)
    if causes:  # a chain of causes may be circular
        if error.__cause__ is not None:
            silent.__cause__ = without_message(error.__cause__, causes=causes - 1)
        elif error.__context__ is not None and not error.__suppress_context__:
            silent.__context__ = without_message(error.__context__, causes=causes - 1)
    return silent
