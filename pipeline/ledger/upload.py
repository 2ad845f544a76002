"""The copy of a published output to where the job wants it, when that is not on this machine.

X.upload.json notes, before anything is copied, that what lies at these URLs is this run's from now on, and at the end,
which version of each is there. So a stranger's file is refused, an interrupted copy is made again, and a finished one
is not. The summary is copied last: its appearance is the sign that all is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline import remote
from pipeline.errors import DataError, OutputError, Problem, WriteError
from pipeline.ledger.files import DISK, Files, Patience, RunPaths
from pipeline.ledger.publish import replace_file
from pipeline.remote import RemoteError


class Upload:
    """Of the run that publishes `output`, to `url`; `companions` are the suffixes of what goes with it."""

    def __init__(self, output: Path, url: str, companions: Collection[str] = (), files: Files = DISK) -> None:
        self._paths = paths = RunPaths(output)
        self._url = url
        self._files = files
        self._sources = {
            url: paths.output,
            **{url + suffix: paths.companion(suffix) for suffix in companions},
            f"{url}.summary.json": paths.summary,
        }

    def refuse_stranger(self) -> None:
        """OutputError where a file that is not this run's is in the way, or where nobody answers."""
        noted = self._noted()["versions"]
        for url in self._sources:
            try:
                version = remote.version_of(url)
            except RemoteError as error:
                raise OutputError(Problem(f"cannot be reached: {error}", file=url)) from error
            if version is not None and version != noted.get(url, "none") and noted.get(url, "none") is not None:
                message = "exists and is not of this run; move it away or write to another output.path"
                raise OutputError(Problem(message, file=url))

    def finish(self) -> bool:
        """Copy what is not there yet; False where there was nothing to do.

        Raises DataError where what was put there is another's now, OutputError for a stranger's file, and WriteError
        where copying fails: the answers are safe here, and the same command copies them.
        """
        publication = self._publication()
        if self.is_noted:
            return self._put_missing(publication, self._noted()["versions"])
        self.refuse_stranger()
        versions: dict[str, str | None] = dict.fromkeys(self._sources)
        self._note(publication, versions)
        for url, source in self._sources.items():
            versions[url] = self._put(source, url)
        self._note(publication, versions)
        return True

    @property
    def is_noted(self) -> bool:
        """Whether all that is published now was copied; asks nobody. Raises OSError while nothing is published."""
        noted = self._noted()
        return noted["publication"] == self._publication() and all(map(noted["versions"].get, self._sources))

    def _publication(self) -> str:
        """What tells one publication of the run from another."""
        return hashlib.sha256(self._paths.summary.read_bytes()).hexdigest()

    def _put_missing(self, publication: str, versions: dict[str, str | None]) -> bool:
        has_put = False
        for url, source in self._sources.items():
            try:
                version = remote.version_of(url)
            except RemoteError as error:
                raise self._failed(url, error) from error
            if version is None:
                versions[url] = self._put(source, url)
                has_put = True
            elif version != versions[url]:
                message = "has changed since it was put there; move it away to have it put there again"
                raise DataError(Problem(message, file=url))
        if has_put:
            self._note(publication, versions)
        return has_put

    def _put(self, source: Path, url: str) -> str:
        try:
            return remote.put(source, url)
        except RemoteError as error:
            raise self._failed(url, error) from error

    def _failed(self, url: str, error: RemoteError) -> WriteError:
        message = f"cannot be put there: {error}. The answers are safe at {self._paths.output}"
        return WriteError(Problem(f"{message}; the same command tries again", file=url))

    def _noted(self) -> dict[str, Any]:
        try:
            noted = json.loads(self._paths.upload.read_bytes())
            return {"publication": noted["publication"], "versions": dict(noted["versions"])}
        except (OSError, ValueError, LookupError, TypeError):  # nothing was noted, or by nobody that we know
            return {"publication": None, "versions": {}}

    def _note(self, publication: str, versions: dict[str, str | None]) -> None:
        record = {"object": "upload", "publication": publication, "versions": versions}
        data = (json.dumps(record, indent=1) + "\n").encode()
        replace_file(self._files, Patience(), self._paths.upload, data)
