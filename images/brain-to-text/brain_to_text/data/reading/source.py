"""The interface for reading trials from a store, and what its implementations share: counts, retries, errors."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from brain_to_text.data.schema import ObjectVersion, TrialRef
from estiba.errors import DataError, StoreError
from estiba.storage import Store
from estiba.storage.s3_client import requester_pays
from estiba.storage.s3_errors import remedy_for

RETRY_S = 180.0
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 5.0
MAX_RENEWALS = 4
"""Credential renewals per request, after which it counts as denied."""
MAX_ABSENCES = 3
"""How often the store must say that an object does not exist. A gateway that restarts says it now and then."""


@dataclass
class ReadCounts:
    """Counts since the source was opened."""

    gets: int = 0
    bytes_fetched: int = 0
    retries: int = 0
    hedged: int = 0
    renewals: int = 0


class Source(ABC):
    """Reads trials from a store."""

    def __init__(self) -> None:
        self.counts = ReadCounts()

    @abstractmethod
    def fetch(self, ref: TrialRef) -> Future[Any]:
        """Start to read a trial. The future's result is an argument of `decode`; it may raise DataError, StoreError."""

    @abstractmethod
    def decode(self, ref: TrialRef, fetched: Any) -> np.ndarray:
        """Return the features, [T, C]. Raises DataError for bytes that do not decode."""

    @abstractmethod
    def close(self) -> None: ...


class BadTrial(DataError):
    """The stored values of a trial do not decode or are not finite. Only such trials may be skipped.

    An object that changed and a store that does not respond say nothing about the trial.
    """


class Retries:
    """The retries of one read: growing pauses within RETRY_S, and a limited number of credential renewals."""

    def __init__(self) -> None:
        self._deadline, self._pause_s = time.monotonic() + RETRY_S, FIRST_PAUSE_S
        self._renewals = self._absences = 0

    def may_repeat(self) -> bool:
        return time.monotonic() + self._pause_s <= self._deadline

    def may_renew(self) -> bool:
        self._renewals += 1
        return self._renewals <= MAX_RENEWALS

    def may_be_absent(self) -> bool:
        """Return whether the object may still exist although the store has just said that it does not."""
        self._absences += 1
        return self._absences < MAX_ABSENCES

    def next_pause_s(self) -> float:
        pause_s = self._pause_s * random.uniform(0.5, 1.0)
        self._pause_s = min(self._pause_s * 2, MAX_PAUSE_S)
        return pause_s


def changed_error(ref: TrialRef, current: object) -> DataError:
    return DataError(
        f"{ref.url}: is no longer the object that was indexed, at {ref.name}: expected {ref.version}; found {current}. "
        "Restore the old object; or, to use the new one, index it again (`brain-to-text index LOCATION --rebuild`)"
    )


def replaced_error(store: Store, ref: TrialRef, retries: Retries) -> DataError | StoreError | None:
    """After a 404, a 412 or another ETag: ask the store which version it has, and return the error that names both.

    Returns None if the indexed version is still there, or may be, so that the read is worth another attempt.
    """
    try:
        entry = store.head(ref.path)
    except StoreError as error:
        return error
    if entry is None:
        return None if retries.may_be_absent() else changed_error(ref, "no such object")
    current = ObjectVersion.from_entry(entry, ref.url)
    return None if current.is_same_content(ref.version) else changed_error(ref, current)


def read_error(ref: TrialRef, reason: str, *, denied: bool, part: str = "") -> StoreError:
    """Return the error for a read that failed for good."""
    problem = f"{ref.url}: {ref.name}{part} cannot be read"
    if remedy := remedy_for(reason):
        return StoreError(f"{problem}: {reason}; {remedy}")
    if denied:
        payer = "" if requester_pays() else ", or set AWS_REQUEST_PAYER=requester if the requester pays for this bucket"
        return StoreError(f"{problem}: access denied ({reason}); allow s3:GetObject for this role{payer}")
    return StoreError(
        f"{problem}: {reason}; gave up after {RETRY_S:.0f} s: check the endpoint and the network, and run again"
    )
