"""Where the rows of a command go: no older results are replaced before its end, nor ever by a run that says less."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from . import report
from .machine import results_folder
from .report import Outcome

UNOFFICIAL = "unofficial"  # beside the results of a device, and not in git
INTERRUPTED = 130  # the exit code of a command that Ctrl-C stopped


def chosen(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The options among `names` that the command line has; their default is None or False."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]


class Results:
    """The file of one run. `with` it Ctrl-C ends the command in one line, with what was measured in a partial file.

    options: those that were given which choose something else than what README's tables show
    """

    def __init__(self, kind: str, machine: dict, out: Path | None, options: Sequence[str]):
        self.kind, self.machine, self.out, self.options = kind, machine, out, options
        self.folder = results_folder(machine) if out is None else out
        self.aside = self.folder / UNOFFICIAL if out is None else out
        self.partial, self.saved = self.aside / f"{kind}.partial.json", 0

    def save(self, protocol: dict, rows: Sequence[Outcome], sections: dict | None = None) -> None:
        """All rows so far."""
        for row in rows:
            row.judge(self.machine)
        report.write(self.partial, self.kind, self.machine, protocol, [row.as_dict() for row in rows], sections)
        self.saved = len(rows)

    def close(self, rows: Sequence[Outcome]) -> tuple[Path, str]:
        """Move the file of a run that has ended to its place; (path, what to say of it)."""
        why = None
        if self.out is None and self.options:
            why = f"a run with {' '.join(self.options)} does not replace the results that README shows"
        elif self.out is None and (trouble := report.believable(rows, self.machine)):
            why = f"{trouble}; the results that README shows stay as they are"
        path = (self.aside if why else self.folder) / f"{self.kind}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.partial.replace(path)
        return path, f"wrote {path}{f': {why}' if why else ''}"

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, KeyboardInterrupt):
            return
        kept = f"its {self.saved} rows are in {self.partial}" if self.saved else "nothing was measured yet"
        report.console().print(
            f"interrupted; {kept}, and older results stay as they were", highlight=False, markup=False, soft_wrap=True
        )
        raise SystemExit(INTERRUPTED) from None
