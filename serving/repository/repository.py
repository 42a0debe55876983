"""The served models: those of a repository folder, now and after each change of the folder."""

import asyncio
import logging
import threading
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from serving import artifact as artifacts
from serving.artifact import MANIFEST, MANIFEST_DIGEST, ArtifactError
from serving.errors import InvalidRequest, ServingError, UnknownModel
from serving.metrics.registry import CLASSIFY, Metrics
from serving.repository.served_model import ServedModel
from serving.runtime import RuntimeSetupError, return_free_memory
from serving.settings import Settings

_MAX_SHOWN_CHARACTERS = 64  # the most characters of a client's text: errors go out in headers of limited size

# The rows that others get for each row of an answer that waits for its client, before the client gets its next one. So
# it gets a sixteenth of their turns.
_ROWS_AN_UNREAD_ROW = 15

_logger = logging.getLogger(__name__)


class State(StrEnum):
    """The states of a version, in Triton's words."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass
class Entry:
    """A version of a model: its state, the reason for it, and the served model."""

    name: str
    version: str
    state: State
    reason: str = ""
    model: ServedModel | None = None
    #: The description of its files at the last attempt to load it.
    look: str = ""


class LoadError(ServingError):
    """A model cannot be loaded as a client requested. The text says why."""

    code = InvalidRequest.code
    reason = "invalid"


class Repository:
    """The models of ``<folder>/<name>/<version>/``: of each, the ``settings.versions`` highest versions.

    A new version is loaded, verified and warmed beside the served ones before it replaces them. A replaced version is
    closed after its last answer. If a version cannot be loaded, the next lower one is served instead, and the version
    is not tried again until its folder changes.
    """

    def __init__(self, settings: Settings, metrics: Metrics, graphs: Iterable[str] = (CLASSIFY,)) -> None:
        """Prepare a repository. graphs: the names of the graphs that the services need; no others are opened."""
        self._settings = settings
        self._graphs = frozenset(graphs)
        self._metrics = metrics
        self._folder = settings.repository
        self._entries: dict[tuple[str, str], Entry] = {}
        self._current: dict[str, list[ServedModel]] = {}  # by name, the highest version first
        #: The version for requests without a model's name. None if there are several models, or none.
        self.default: ServedModel | None = None
        #: The only served version, or None if there are several or none.
        self.only: ServedModel | None = None
        self._unloaded: set[str] = set()  # unloaded by request, until a load request
        self._changing = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()
        self._left_alone: set[str] = set()  # models without a version in their folder that the log has reported
        self._unusable_names: list[str] = []  # of folders, as the log has reported them
        self._failures: list[Exception] = []

    async def open(self) -> None:
        """Load all models. Raises ArtifactError or RuntimeSetupError if a model has no version that can be served."""
        settings = self._settings
        if settings.only_model or settings.model_version or not self._names():
            artifacts.find(self._folder, settings.only_model, settings.model_version)
        await self.scan()
        if not self._current:
            if not self._failures:  # folders without a version
                artifacts.find(self._folder, self._names()[0])
            raise self._failures[0]

    async def scan(self) -> None:
        """Load and remove models until the served ones match the folder."""
        async with self._changing:
            self._failures = []
            await self._report_names()
            # Removed models too, so that they are forgotten.
            known = {name for name, _ in self._entries}
            for name in sorted({*await asyncio.to_thread(self._names), *self._current, *known}):
                await self._scan_model(name)

    def get(self, name: str, version: str) -> ServedModel:
        """Return a served model. Raises InvalidRequest or UnknownModel.

        name: empty for the only model. version: empty for the highest.
        """
        if not name:
            if self.default and not version:
                return self.default
            if len(self._current) > 1:
                raise InvalidRequest("model_name", f"empty; this server has several models: {self._known()}")
            name = next(iter(self._current), "")
        models = self._current.get(name, ())
        if not version and models:
            return models[0]
        for model in models:
            if model.artifact.version == version:
                return model
        wanted = f"{name[:_MAX_SHOWN_CHARACTERS]!r}" + (
            f" version {version[:_MAX_SHOWN_CHARACTERS]!r}" if version else ""
        )
        raise UnknownModel(f"model_name, model_version: {wanted} is not served; there is: {self._known() or 'none'}")

    def models(self) -> list[ServedModel]:
        """Return all served versions."""
        # A copy, since the metrics page calls from its own thread.
        return [model for models in list(self._current.values()) for model in models]

    def note_unread(self, client: Hashable, rows: int) -> None:
        """Note that rows of answers wait for their client, which gets fewer turns until it has read them.

        rows: a negative number of them once they are read.
        """
        for model in self.models():
            for graph in model.graphs.values():
                graph.batcher.hold_back(client, _ROWS_AN_UNREAD_ROW * rows)

    def index(self) -> list[Entry]:
        """Return all versions that are served, are being loaded, or could not be loaded."""
        return [entry for _, entry in sorted(self._entries.items(), key=lambda item: (item[0][0], int(item[0][1])))]

    async def load(self, name: str) -> None:
        """Load the present versions of a model's folder, also those that failed before. Raises LoadError."""
        async with self._changing:
            self._unloaded.discard(name)
            for entry in self._entries.values():
                if entry.name == name and not entry.model:
                    entry.look = ""
            self._failures = []
            found = await asyncio.to_thread(self._names)
            if name in found or any(name == known for known, _ in self._entries):
                await self._scan_model(name)
            if name not in self._current:
                reasons = [entry.reason for entry in self._entries.values() if entry.name == name and entry.reason]
                raise LoadError(
                    f"model_name: {name[:_MAX_SHOWN_CHARACTERS]!r} "
                    + (f"cannot be served: {reasons[-1]}" if reasons else "is not there")
                )

    async def unload(self, name: str) -> None:
        """Stop serving a model until a load request for it. Raises UnknownModel."""
        async with self._changing:
            if name not in self._current:
                raise UnknownModel(
                    f"model_name: {name[:_MAX_SHOWN_CHARACTERS]!r} is not served; there is: {self._known() or 'none'}"
                )
            self._unloaded.add(name)
            await self._scan_model(name)

    async def close(self) -> None:
        """Close all models when the requests that use them are answered."""
        async with self._changing:
            for model in self.models():
                self._leave(model)
            self._current.clear()
            self._choose_default()
            await asyncio.gather(*self._leaving)

    def _known(self) -> str:
        return ", ".join(
            f"{name} version {', '.join(model.artifact.version for model in models)}"
            for name, models in self._current.items()
        )

    def _names(self) -> list[str]:
        only = self._settings.only_model
        found = artifacts.names(self._folder)
        return [name for name in found if only in ("", name)]

    def _versions(self, name: str) -> list[tuple[str, str]]:
        """Return (version, description of its files) for the repository's versions of a model, the highest first."""
        only = self._settings.model_version
        found = [version for version in artifacts.versions(self._folder, name) if only in ("", version)]
        return [(version, _look(self._folder / name / version)) for version in found]

    async def _report_names(self) -> None:
        """Log folders whose names no model can have, once."""
        found = await asyncio.to_thread(artifacts.unusable_names, self._folder)
        for name in found:
            if name not in self._unusable_names:
                _logger.error(
                    "%r is not served: a model's name has up to 128 printable characters and does not begin with a dot",
                    name,
                )
        self._unusable_names = found

    async def _scan_model(self, name: str) -> None:
        before = self._current.get(name, [])
        wanted: list[ServedModel] = []
        found = await asyncio.to_thread(self._versions, name)
        for key in [key for key, entry in self._entries.items() if key[0] == name and not entry.model]:
            if key[1] not in dict(found):
                del self._entries[key]
        if name not in self._unloaded:
            for version, look in found:
                entry = self._entries.get((name, version))
                if not entry or entry.look != look or entry.state is State.UNLOADING:
                    entry = await self._load(name, version, look, before)
                if entry.model:
                    wanted.append(entry.model)
                if len(wanted) == self._settings.versions:
                    break
            if wanted:
                self._left_alone.discard(name)
            elif before:
                if name not in self._left_alone:
                    _logger.error("%s: no version in its folder can be served; the one before stays", name)
                    self._left_alone.add(name)
                wanted = before[:1]
        if wanted:
            self._current[name] = wanted
        else:
            self._current.pop(name, None)
        self._choose_default()
        for model in before:
            if model not in wanted:
                self._leave(model)

    def _choose_default(self) -> None:
        """Find the default model in advance: nearly every request asks for it, more than once."""
        models = next(iter(self._current.values())) if len(self._current) == 1 else []
        self.default = models[0] if models else None
        self.only = self.default if len(models) == 1 else None

    async def _load(self, name: str, version: str, look: str, before: list[ServedModel]) -> Entry:
        """Load a version beside the served ones. An error is logged and kept in the entry."""
        old = self._entries.get((name, version))
        entry = self._entries[name, version] = Entry(name, version, State.LOADING, look=look)
        folder = self._folder / name / version
        plan = before[0].classify.plan if before else None
        try:
            model = await _in_thread(lambda: ServedModel(folder, self._settings, self._metrics, plan, self._graphs))
        except asyncio.CancelledError:  # it will be tried again
            entry.state, entry.look = State.UNAVAILABLE, ""
            raise
        except Exception as error:
            self._failures.append(error)
            expected = isinstance(error, (ArtifactError, RuntimeSetupError))
            _logger.error("%s version %s is not served: %s", name, version, error, exc_info=not expected)
            self._metrics.model_loads.labels(name, "failed").inc()
            # Clients may read it, so it does not contain the repository's path.
            reason = str(error).replace(f"{self._folder}/", "") if expected else "internal error; see the server's log"
            entry.state, entry.reason = State.UNAVAILABLE, reason
            if old and old.model and old.model in before:  # its folder has changed; the loaded version still serves
                entry.state, entry.model = State.READY, old.model
            return entry
        model.start()
        model.announce()
        self._metrics.model_loads.labels(name, "failed")  # start at 0, so that a rate counts the first one too
        self._metrics.model_loads.labels(name, "ok").inc()
        entry.state, entry.model = State.READY, model
        return entry

    def _leave(self, model: ServedModel) -> None:
        """Start to close a model that gets no further requests, without waiting for its requests."""
        task = asyncio.create_task(self._close_and_free(model))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _close_and_free(self, model: ServedModel) -> None:
        await self._close(model)
        del model  # now its memory is free
        await asyncio.to_thread(return_free_memory)

    async def _close(self, model: ServedModel) -> None:
        key = (model.artifact.name, model.artifact.version)
        entry = self._entries.get(key)
        if entry and entry.model is model:
            entry.state, entry.reason = State.UNLOADING, ""
        await model.close()
        if entry and entry.model is model and self._entries.get(key) is entry:
            del self._entries[key]
        successor = self._entries[key].model if key in self._entries else None
        if successor:  # the same version after a change of its folder
            model.withdraw(successor)
            _logger.info("%s version %s, as its folder was before, is unloaded", *key)
        else:
            self._metrics.forget(*key)
            _logger.info("%s version %s is unloaded", *key)


async def _in_thread(load: Callable[[], ServedModel]) -> ServedModel:
    """Load in a daemon thread. A thread of ``asyncio.to_thread`` would keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ServedModel] = loop.create_future()

    def deliver(outcome: ServedModel | Exception) -> None:
        if future.cancelled():
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def work() -> None:
        outcome: ServedModel | Exception
        try:
            outcome = load()
        except Exception as error:
            outcome = error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(deliver, outcome)

    threading.Thread(target=work, name="loading", daemon=True).start()
    return await future


def _look(folder: Path) -> str:
    """Describe the files of a version, to detect changes: a version that failed may be complete later.

    Other files in the folder, such as ``.DS_Store`` or a note, do not count.
    """
    found = []
    for name in sorted({MANIFEST, MANIFEST_DIGEST, *artifacts.files_named_by(folder / MANIFEST)}):
        with suppress(OSError, ValueError):  # missing, or not a file's name
            state = (folder / name).stat()
            found.append(f"{name} {state.st_size} {state.st_mtime_ns}")
    return "\n".join(found)
