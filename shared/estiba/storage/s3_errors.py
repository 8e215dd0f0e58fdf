"""Classify and shorten obstore's errors."""

from __future__ import annotations

import html
import re

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

REMEDIES = (
    ("ExpiredToken", "renew the credentials, or give the job a role that renews them"),
    ("RequestTimeTooSkewed", "set this machine's clock; it differs from the service's by too much"),
    ("InvalidObjectState", "the object is archived: restore it, or copy it to another storage class"),
    ("kms:", "allow this role kms:Decrypt, and for outputs kms:GenerateDataKey, with the key of the bucket"),
    ("KMS.", "the KMS key of the object cannot be used; enable it, or copy the object with another key"),
    ("InvalidAccessKeyId", "correct AWS_ACCESS_KEY_ID; the service does not know it"),
    ("SignatureDoesNotMatch", "correct AWS_SECRET_ACCESS_KEY, and the region"),
)
"""What a service's message contains, and the remedy. They come with the same status as a missing permission."""


def remedy_for(text: str) -> str | None:
    """Return the remedy for a service's error message, or None if it names no cause of its own."""
    return next((remedy for marker, remedy in REMEDIES if marker in text), None)


def is_denied(error: BaseException) -> bool:
    """Return whether access was denied. A denied listing arrives as a generic error."""
    return isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or "403 Forbidden" in str(error)


def may_be_expired(error: BaseException) -> bool:
    """Return whether new credentials could help. S3 replies with 400, others with 403; a HEAD has no body."""
    text = str(error)
    return is_denied(error) or "ExpiredToken" in text or ("performing HEAD" in text and "400 Bad Request" in text)


def first_line(error: BaseException) -> str:
    """Return S3's own message, or else obstore's without its Rust debug output."""
    text = str(error).split("\n\nDebug source:")[0]
    if answer := re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text, re.DOTALL):
        text = f"{answer[1]}: {html.unescape(answer[2])}"
    return " ".join(text.split())[:400] or type(error).__name__
