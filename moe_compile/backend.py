"""The backend `moe_ep` of torch.compile, found through the entry point group `torch_dynamo_backends`."""

import functools
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any, cast

from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend, register_backend
from torch.fx import GraphModule

from moe_compile import cpu, cuda, dynamo_hook, dynamo_reports
from moe_compile.errors import MoeCompileError
from moe_compile.lower import aot_eager, inductor_settings
from moe_compile.options import MOVES, Options
from moe_compile.pipeline import PASS_NAMES

log = logging.getLogger(__name__)


def moe_ep(
    gm: GraphModule, example_inputs: Sequence[Tensor], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a graph in which Dynamo has put proven rewrites in the place of expert loops (dynamo_hook.py)."""
    parsed = Options.parse(options, PASS_NAMES)
    regions = dynamo_reports.regions_here()
    if not regions:
        if parsed.strict:
            raise MoeCompileError("strict: no expert region was found in this graph")
        log.info("no expert region found in this graph; it is compiled by %s as it is", parsed.inner)
    else:
        log.info("%d of %d expert regions rewritten", sum(r.matched for r in regions), len(regions))
    return _compile_inner(gm, example_inputs, parsed, mode, any(r.strategy in MOVES for r in regions))


def _compile_inner(
    gm: GraphModule, inputs: Sequence[Tensor], options: Options, mode: str | None, collectives: bool
) -> Callable[..., Any]:
    if options.inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        settings = dict(list_mode_options(mode)) if mode and mode != "default" else {}
        settings |= inductor_settings(options.skip, collectives)
        return cast(Callable[..., Any], compile_fx(gm, list(inputs), config_patches=settings))
    if options.inner == "aot_eager":
        return aot_eager(gm, inputs, options.skip)
    return lookup_backend(options.inner)(gm, list(inputs))


def options_of(compiler_fn: Any) -> Options | None:
    """The options of a compiler function, if it is this backend however wrapped."""
    given: dict[str, Any] | None = None
    for _ in range(8):
        if compiler_fn is moe_ep:
            return _parsed(repr(given), _Box(given))
        kwargs = getattr(compiler_fn, "kwargs", None) or getattr(compiler_fn, "keywords", None)
        if isinstance(kwargs, dict) and "options" in kwargs:
            given = kwargs["options"]
        inner = [getattr(compiler_fn, a, None) for a in ("_torchdynamo_orig_backend", "compiler_fn", "func")]
        compiler_fn = next((f for f in inner if f is not None), None)
        if compiler_fn is None:
            return None
    return None


class _Box:
    """A dict as a cache argument: equal to any other, since the key beside it says what it holds."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Box)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=64)
def _parsed(_key: str, box: _Box) -> Options:
    return Options.parse(box.value, PASS_NAMES)


def _register() -> None:
    """Make the name known where the package is a plain checkout, without the entry point of an installation."""
    if "moe_ep" not in entry_points(group="torch_dynamo_backends").names:
        register_backend(moe_ep, name="moe_ep")


cpu.register()
cuda.register()
dynamo_hook.install(options_of)
_register()
