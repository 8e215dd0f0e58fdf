"""What obstore's errors say: denied, expired, and in whose words."""

from __future__ import annotations

import html
import re

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError


def is_denied(error: BaseException) -> bool:
    """A listing that is denied comes as a generic error."""
    return isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or "403 Forbidden" in str(error)


def may_be_expired(error: BaseException) -> bool:
    """Whether new credentials could help: S3 says so with status 400, others with 403, a HEAD without words."""
    text = str(error)
    return is_denied(error) or "ExpiredToken" in text or ("performing HEAD" in text and "400 Bad Request" in text)


def first_line(error: BaseException) -> str:
    """obstore's message without its Rust debug dump; S3's own words where it said any."""
    text = str(error).split("\n\nDebug source:")[0]
    if said := re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text, re.DOTALL):
        text = f"{said[1]}: {html.unescape(said[2])}"
    return " ".join(text.split())[:400] or type(error).__name__
