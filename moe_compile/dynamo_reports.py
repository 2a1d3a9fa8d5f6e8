"""What became of each candidate that Dynamo met: a report, for the graph under translation and for who collects them.

A candidate that is inlined as it is (`Refused`) may turn out to hold the experts in a function that it calls, or to
need weights that are gathered first.
"""

import contextlib
import contextvars
import dataclasses
import logging
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import RestartAnalysis

from moe_compile.errors import MoeCompileError
from moe_compile.kinds import Declined, Kind
from moe_compile.options import Options
from moe_compile.parallel import gather
from moe_compile.report import RegionReport

log = logging.getLogger(__name__)

_records: "weakref.WeakKeyDictionary[Any, list[RegionReport]]" = weakref.WeakKeyDictionary()
Collected = list[tuple[nn.Module, RegionReport]]
collector: contextvars.ContextVar[Collected | None] = contextvars.ContextVar("moe_compile_regions", default=None)


def regions_here() -> list[RegionReport]:
    """The regions of the graph that is being compiled."""
    context = torch._guards.TracingContext.try_get()
    return _records.get(context, []) if context is not None else []


class Refused:
    """A candidate that is inlined as it is, for the reason in `report`."""

    def __init__(self, report: RegionReport, module: nn.Module) -> None:
        self.report, self.module = report, module
        self.boxes: list[list[Any]] = [box for box in (regions_here(), collector.get()) if box is not None]

    @contextlib.contextmanager
    def gathered(self, tx: Any) -> Iterator[None]:
        """If inlining fails on weights that are sharded, do it again with the hooks that gather them."""
        try:
            yield
        except RestartAnalysis:
            raise
        except Exception as error:
            if self._inside() or not gather.fall_back(self.module, self.report.reason or ""):
                raise
            log.debug("%s gathers its experts: %s", self.report.module, self.report.reason)
            tx.speculation_log.clear()
            raise RestartAnalysis(restart_reason="sharded experts are gathered") from error

    def _inside(self) -> bool:
        """Whether a function that it calls turned out to hold the experts."""
        for box in self.boxes:
            reports = [entry[1] if isinstance(entry, tuple) else entry for entry in box]
            at = next((i for i, r in enumerate(reports) if r is self.report), len(box))
            if any(r.matched for r in reports[at + 1 :]):
                return True
        return False

    @contextlib.contextmanager
    def unless_inside(self, options: Options) -> Iterator[None]:
        """If the experts turn out to be in a function that it calls, it was no region itself: its report goes."""
        try:
            yield
        finally:
            inner = False
            for box in self.boxes:
                reports = [entry[1] if isinstance(entry, tuple) else entry for entry in box]
                at = next((i for i, r in enumerate(reports) if r is self.report), len(box))
                if any(r.matched for r in reports[at + 1 :]):
                    inner = True
                    del box[at]
            if options.strict and not inner:
                raise MoeCompileError(
                    f"strict: {self.report.module or 'the model'} ({self.report.location}) "
                    f"is not rewritten: {self.report.reason}"
                )


def record(kind: Kind | Declined, fn: types.FunctionType, owner: Any) -> RegionReport:
    """The report on a proof or a refusal, with where the function stands, kept for the graph and the collector."""
    code = fn.__code__
    report = dataclasses.replace(
        kind.report,
        module=_module_name(owner),
        location=f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}",
    )
    log.debug("%s %s: %s", report.module, report.location, "rewritten" if report.matched else report.reason)
    context = torch._guards.TracingContext.try_get()
    if context is not None:
        _records.setdefault(context, []).append(report)
    if (into := collector.get()) is not None:
        into.append((owner.value, report))
    return report


def _module_name(owner: Any) -> str:
    """The qualified name, from the source that Dynamo knows the module by: `model.layers.0.mlp`."""
    source, parts = owner.source, []
    while source is not None:
        kind, member = type(source).__name__, getattr(source, "member", None)
        index = getattr(source, "index", None)
        if kind in (
            "DictGetItemSource",
            "GetItemSource",
            "NNModuleSource",
            "UnspecializedNNModuleSource",
        ) and isinstance(index, (str, int)):
            parts.append(str(index))
        elif isinstance(member, str) and member not in (
            "_modules",
            "__dict__",
            "__closure__",
            "cell_contents",
            "_orig_mod",
        ):
            parts.append(member)
        source = getattr(source, "base", None)
    return ".".join(reversed(parts))
