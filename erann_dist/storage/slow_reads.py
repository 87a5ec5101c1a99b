"""Counts the reads from S3 that the faster of the two clients could not do."""

import threading
import time

_SLOW_AT_LEAST = 32  # reads by s3fs before an incident is reported
_GIVE_UP_AFTER, _TRY_AGAIN_S = 8, 60.0  # failures in a row of the fast client, and the pause after them


class SlowReads:
    """How often clips in S3 were read by s3fs because Arrow's faster client failed. For any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fast = self._slow = self._in_a_row = 0
        self._again_at = 0.0
        self._why = ""

    def is_fast_worth_trying(self) -> bool:
        """False for a while after several failures in a row, each of which may have run into its timeout."""
        return time.monotonic() >= self._again_at

    def note(self, why: str | None) -> None:
        """Record that the fast client was tried. why: the reason if it failed and s3fs did not."""
        with self._lock:
            if why is None:
                self._fast += 1
                self._in_a_row = 0
                return
            self._why = why
            self._slow += 1
            self._in_a_row += 1
            if self._in_a_row >= _GIVE_UP_AFTER:
                self._again_at = time.monotonic() + _TRY_AGAIN_S

    def note_slow(self) -> None:
        """Record that only s3fs was tried."""
        with self._lock:
            self._slow += 1

    @property
    def problem(self) -> str | None:
        """One line, when most reads were slow."""
        if self._slow < _SLOW_AT_LEAST or self._slow <= self._fast:
            return None
        return f"clips from S3 are read by s3fs, several times slower: Arrow's client fails with {self._why}"
