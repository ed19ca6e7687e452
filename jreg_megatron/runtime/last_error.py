"""Find in a run's output why it failed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from jreg_megatron.runtime.errors import LINE_START

# torchrun's --tee puts "[default1]:" before a rank's lines; torch puts "[rank1]: " before traceback lines.
_LINE = re.compile(r"(?:\[default\d+\]: ?)?(?P<text>(?:\[rank(?P<rank>\d+)\]: ?)?(?P<rest>.*))")
# The last line of a traceback. Excluded: torchrun's own, which only says that a rank failed, and the error of
# Python's shutdown.
_ERROR = re.compile(r"[\w.]*(?:Error|Exception)(?<!ChildFailedError)(?::|$)(?! sys.meta_path is None)")
# At the end torchrun prints these details of the rank that failed first, one per line.
_ROOT_CAUSE = "Root Cause (first observed failure)"
_DETAIL = re.compile(r"(?P<name>rank|exitcode|traceback)\s*: (?P<value>.*)")


@dataclass
class LastError:
    """Reads the lines of a run. Its ``str()`` is the line with the reason of the failure."""

    _ours: str = ""
    _of_ranks: dict[str, str] = field(default_factory=dict)
    _last: str = ""
    _root_cause: dict[str, str] | None = None

    def read(self, line: str) -> None:
        """Read the next line."""
        found = _LINE.match(line.strip())
        assert found is not None
        text, rank, rest = found["text"], found["rank"] or "", found["rest"]
        self._last = text or self._last
        if rest.startswith(LINE_START):
            self._ours = rest.removeprefix(LINE_START)
        elif _ERROR.match(rest):
            self._of_ranks[rank] = text
        elif rest.startswith(_ROOT_CAUSE):
            self._root_cause = {}
        elif self._root_cause is not None and (detail := _DETAIL.match(rest)):
            self._root_cause.setdefault(detail["name"], detail["value"])

    def __str__(self) -> str:
        """The first of these that exists: this package's last error; the error of the rank that torchrun saw
        fail first; the error of the first rank that printed one (others fail because of it); the last line.
        """
        why = self._ours or self._of_root_cause() or self._of_first_rank()
        return why or self._last or "nothing was printed"

    def _of_root_cause(self) -> str:
        cause = self._root_cause or {}
        rank = cause.get("rank", "").partition(" ")[0]
        if not rank:
            return ""
        error, signal = self._of_ranks.get(rank), cause.get("traceback", "")
        if error is None and signal.startswith("Signal"):
            return f"rank {rank}: {signal}"
        return error or self._of_ranks.get("") or f"rank {rank}: exit code {cause.get('exitcode')}"

    def _of_first_rank(self) -> str:
        return next((error for rank, error in self._of_ranks.items() if rank), self._of_ranks.get("", ""))
