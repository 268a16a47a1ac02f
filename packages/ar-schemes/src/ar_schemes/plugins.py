"""The plugin host: loads plugins one by one, remembers what went wrong, never lets one hurt others.

Every ar package owns one host; marker name = host = entry-point group = import name of the owner.
First-party parts are registered through the same hooks, win over third parties by name, and are
resolved without loading any third-party plugin.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import pluggy

from ar_schemes.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import ModuleType

log = logging.getLogger(__name__)

Status = Literal["ok", "disabled", "failed"]
HOSTS = ("ar_schemes", "ar_kernels", "ar_tuner", "ar_export", "ar_cli")
FIRST_PARTY = ("ar-schemes", "ar-kernels", "ar-tuner", "ar-export", "ar-vlm", "ar-cli")
"""Distributions that `AR_PLUGINS` does not leave out: without them commands would not work."""
BUILT_IN = "(built in)"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+-]*")
"""What a registered object may be called."""
T = TypeVar("T")


@dataclass(frozen=True)
class PluginRecord:
    """What became of one plugin of one host."""

    host: str
    name: str
    dist: str
    version: str
    status: Status
    hooks: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    error: BaseException | None = None


class PluginHost:
    """Loads and calls the plugins of one package.

    Args:
        project: marker name and entry-point group, say `ar_kernels`.
        specs: module (or namespace) with the hook specifications.
        builtins: name to module of the first-party plugins; they are registered at once.
        env: where `AR_PLUGINS` (of third parties only these), `AR_DISABLED_PLUGINS`,
            `AR_PLUGINS_STRICT` and `AR_TRACE_HOOKS` are read.
        strict: raise on the first broken plugin; None asks the environment.
        entry_points: replaces the installed entry points (tests, embedders).
    """

    def __init__(
        self,
        project: str,
        specs: ModuleType | type,
        *,
        builtins: Mapping[str, object],
        env: Mapping[str, str] = os.environ,
        strict: bool | None = None,
        entry_points: Iterable[metadata.EntryPoint] | None = None,
    ) -> None:
        self.project = project
        self._env = env
        self._strict = env.get("AR_PLUGINS_STRICT") == "1" if strict is None else strict
        self._entry_points = entry_points
        self._pm = pluggy.PluginManager(project)
        self._pm.add_hookspecs(specs)
        if env.get("AR_TRACE_HOOKS") == "1":
            self._pm.trace.root.setwriter(lambda text: log.warning("%s", text.rstrip()))
            self._pm.enable_tracing()
        self._records: dict[str, PluginRecord] = {}
        self._builtins = tuple(builtins)
        self._loaded = False
        for name, module in builtins.items():
            self._register(name, module, BUILT_IN, "")

    @property
    def records(self) -> tuple[PluginRecord, ...]:
        """What is known of each plugin so far, first-party ones first."""
        return tuple(self._records.values())

    @property
    def failures(self) -> tuple[PluginRecord, ...]:
        """The plugins that were left out because something broke."""
        return tuple(r for r in self._records.values() if r.status == "failed")

    def load(self) -> None:
        """Load the third-party plugins of this host's entry-point group, once."""
        if self._loaded:
            return
        self._loaded = True
        off = _names(self._env.get("AR_DISABLED_PLUGINS")) or frozenset()
        only = _names(self._env.get("AR_PLUGINS"))
        found = self._entry_points
        if found is None:
            found = self._installed()
        for entry in sorted(found, key=lambda e: e.name):
            dist, version = _origin(entry)
            unlisted = only is not None and entry.name not in only and dist not in FIRST_PARTY
            if entry.name in off or unlisted:
                record = PluginRecord(self.project, entry.name, dist, version, "disabled")
                self._records.setdefault(entry.name, record)
                continue
            try:
                plugin = entry.load()
            except Exception as error:  # noqa: BLE001 - a plugin may raise anything
                self._failed(entry.name, dist, version, error)
            else:
                self._register(entry.name, plugin, dist, version)

    def _installed(self) -> list[metadata.EntryPoint]:
        """Return the installed entry points of this host; one unreadable file costs only itself."""
        try:
            return list(metadata.entry_points(group=self.project))
        except Exception:  # noqa: BLE001 - a stray line in any distribution's file raises here
            out: list[metadata.EntryPoint] = []
        seen: set[str] = set()
        for dist in metadata.distributions():
            name = str(dist.metadata["Name"])
            if name in seen:  # a copy later on the path does not count
                continue
            seen.add(name)
            try:
                out += dist.entry_points.select(group=self.project)
            except Exception as error:  # noqa: BLE001 - the file at fault
                self._failed(name, name, dist.version, error)
        return out

    def each(
        self, hook: str, *, builtins_only: bool = False, **kwargs: Any
    ) -> Iterator[tuple[str, Any]]:
        """Yield (plugin name, result) of a hook, one plugin at a time, first-party ones first.

        A plugin that raises is recorded and left out; the others go on.
        """
        if not builtins_only:
            self.load()
        for name in list(self._records):
            if builtins_only and name not in self._builtins:
                continue
            plugin = self._pm.get_plugin(name)
            if plugin is None or self._records[name].status != "ok":
                continue
            for impl in self._pm.hook.__dict__[hook].get_hookimpls():
                if impl.plugin is not plugin:
                    continue
                try:
                    result = self._call(hook, plugin, kwargs)
                except Exception as error:  # noqa: BLE001 - a plugin may raise anything
                    self._broke(name, hook, error)
                else:
                    yield name, result

    def first(self, hook: str, **kwargs: Any) -> Any:
        """Return the first result of a `firstresult` hook that is not None.

        Third parties are asked before the first-party plugins, so that they can choose. Nothing
        is isolated here: a choice the user depends on must fail loudly, with the plugin named.
        """
        self.load()
        order = [n for n in self._records if n not in self._builtins] + list(self._builtins)
        for name in order:
            plugin = self._pm.get_plugin(name)
            if plugin is None or self._records[name].status != "ok":
                continue
            if not any(i.plugin is plugin for i in self._pm.hook.__dict__[hook].get_hookimpls()):
                continue
            try:
                result = self._call(hook, plugin, kwargs)
            except Exception as error:
                error.add_note(f"in hook {hook} of plugin {name} ({self._records[name].dist})")
                raise
            if result is not None:
                return result
        return None

    def notify(self, hook: str, **kwargs: Any) -> None:
        """Call a notification hook of every plugin; results are ignored, failures recorded."""
        for _ in self.each(hook, **kwargs):
            continue

    def provided(self, name: str, ids: Iterable[str]) -> None:
        """Note which names a plugin has provided, for `ar plugins`."""
        record = self._records[name]
        merged = tuple(dict.fromkeys((*record.provides, *ids)))
        self._records[name] = replace(record, provides=merged)

    def reject(self, name: str, error: BaseException) -> None:
        """Record that what a plugin returned cannot be used; raise when strict."""
        record = self._records[name]
        self._failed(name, record.dist, record.version, error, hooks=record.hooks)

    def dist_of(self, name: str) -> str:
        """Return the distribution a plugin came from."""
        return self._records[name].dist

    def _call(self, hook: str, plugin: object, kwargs: dict[str, Any]) -> Any:
        others = [p for p in self._pm.get_plugins() if p is not plugin]
        result = self._pm.subset_hook_caller(hook, others)(**kwargs)
        spec = self._pm.hook.__dict__[hook].spec
        if spec is not None and spec.opts.get("firstresult"):
            return result
        return result[0] if result else None

    def _register(self, name: str, plugin: object, dist: str, version: str) -> None:
        if name in self._records:
            owner = self._records[name].dist
            msg = (
                f"plugin name {name!r} of {dist} is already used by {owner}; rename the entry point"
            )
            self._failed(f"{name}@{dist}", dist, version, PluginError(msg))
            return
        try:
            hash(plugin)  # pluggy keeps plugins in sets: one without a hash would break every call
            self._pm.register(plugin, name=name)
            self._refuse_bad_hooks(name)
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything
            if self._pm.has_plugin(name):  # pluggy up to 1.6 leaves it half registered
                self._pm.unregister(name=name)
            self._failed(name, dist, version, error)
            return
        hooks = tuple(sorted(h.name for h in self._pm.get_hookcallers(plugin) or ()))
        self._records[name] = PluginRecord(self.project, name, dist, version, "ok", hooks)

    def _refuse_bad_hooks(self, name: str) -> None:
        """Refuse what pluggy would accept in silence: unknown hooks, aliases, defaults."""
        callers = [h for h in vars(self._pm.hook).values() if isinstance(h, pluggy.HookCaller)]
        known = sorted(h.name for h in callers if h.has_spec())
        for caller in callers:
            for impl in caller.get_hookimpls():
                if impl.plugin_name != name:
                    continue
                if not caller.has_spec() and not impl.optionalhook:
                    msg = (
                        f"plugin {name}: unknown hook {caller.name!r}; "
                        f"{self.project} knows {', '.join(known)}"
                    )
                    raise PluginError(msg)
                if impl.opts.get("specname"):
                    msg = f"plugin {name}: name the function {caller.name}, without specname"
                    raise PluginError(msg)
                if getattr(impl.function, "__defaults__", None):
                    msg = (
                        f"plugin {name}: {caller.name} gives arguments default values, which "
                        "pluggy passes or not by version; leave the defaults out"
                    )
                    raise PluginError(msg)

    def _broke(self, name: str, hook: str, error: Exception) -> None:
        error.add_note(f"in hook {hook} of plugin {name}")
        record = self._records[name]
        self._failed(name, record.dist, record.version, error, hooks=record.hooks)

    def _failed(
        self,
        name: str,
        dist: str,
        version: str,
        error: BaseException,
        *,
        hooks: tuple[str, ...] = (),
    ) -> None:
        if self._strict or dist == BUILT_IN:
            raise error
        log.warning("%s: plugin %s (%s %s) left out: %s", self.project, name, dist, version, error)
        self._records[name] = PluginRecord(
            self.project, name, dist, version, "failed", hooks, error=error
        )


class Registry(Generic[T]):
    """Named objects of one kind, collected from one registration hook of a host.

    Built-in names resolve without loading third parties. A name that is taken is refused, with
    both owners named.
    """

    def __init__(
        self, host: PluginHost, hook: str, *, kind: Any, name_of: Callable[[T], str]
    ) -> None:
        self._host = host
        self._hook = hook
        self._kind = kind
        self._name_of = name_of
        self._items: dict[str, T] = {}
        self._owner: dict[str, str] = {}
        self._seen: set[str] = set()
        self._all = False

    def find(self, name: str) -> T | None:
        """Return the object of a name, or None; third parties load only if it is not built in."""
        self._collect(builtins_only=True)
        folded = name.casefold()
        item = self._items.get(folded)
        if item is None:
            self._collect(builtins_only=False)
            item = self._items.get(folded)
        return item

    def all(self) -> dict[str, T]:
        """Return every object by name, in order of registration."""
        self._collect(builtins_only=False)
        return {self._name_of(item): item for item in self._items.values()}

    def owner(self, name: str) -> str:
        """Return the plugin that registered a name."""
        return self._owner[name.casefold()]

    def _collect(self, *, builtins_only: bool) -> None:
        if self._all or (builtins_only and self._seen):
            return
        for plugin, result in self._host.each(self._hook, builtins_only=builtins_only):
            if plugin in self._seen:
                continue
            self._seen.add(plugin)
            try:
                self._add(plugin, list(result or ()))
            except Exception as error:  # noqa: BLE001 - a plugin may return anything
                self._host.reject(plugin, error)
        self._all = not builtins_only

    def _add(self, plugin: str, items: list[Any]) -> None:
        fresh: dict[str, T] = {}
        for item in items:
            if not isinstance(item, self._kind):
                msg = f"{self._hook} of {plugin} returned {item!r}, not a {self._kind.__name__}"
                raise PluginError(msg)
            name = self._name_of(item)
            if not isinstance(name, str) or not NAME.fullmatch(name):
                msg = (
                    f"{self._hook} of {plugin}: the name {name!r} is not allowed; use letters, "
                    "digits and _ . : + -"
                )
                raise PluginError(msg)
            key = name.casefold()
            if key in self._items or key in fresh:
                owner = self._owner.get(key, plugin)
                msg = (
                    f"{self._hook}: the name {name!r} of plugin {plugin} "
                    f"({self._host.dist_of(plugin)}) is already taken by plugin {owner} "
                    f"({self._host.dist_of(owner)}); choose another name"
                )
                raise PluginError(msg)
            fresh[key] = item
        self._items |= fresh
        self._owner |= dict.fromkeys(fresh, plugin)
        self._host.provided(plugin, [self._name_of(i) for i in fresh.values()])


def _origin(entry: metadata.EntryPoint) -> tuple[str, str]:
    """Return (distribution, version) of an entry point, `?` where its metadata does not say."""
    if entry.dist is None:
        return "?", "?"
    facts = entry.dist.metadata
    return str(facts["Name"] or "?"), str(facts["Version"] or "?")


def _names(text: str | None) -> frozenset[str] | None:
    return None if text is None else frozenset(n.strip() for n in text.split(",") if n.strip())
