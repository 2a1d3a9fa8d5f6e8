"""What a function could read in Python: listed once, so that it can be guarded and compared.

A rewritten function runs no Python of the original, so every value that the original's Python may have looked at is
frozen in it.  `read_walk.reads` lists those values as paths from what Dynamo can name: the module it is called on, the
function itself, and the globals of Python modules.  What cannot be named or compared is a refusal.
"""

import sys
import types
from typing import Any, NamedTuple

import torch
from torch import nn

SIMPLE = (int, float, bool, str, type(None), torch.dtype, torch.device)
TORCH_OWN = ("_is_full_backward_hook", "_is_hf_initialized")  # attributes of modules and tensors that nobody reads
Path = tuple[tuple[str, Any], ...]


class Read(NamedTuple):
    """`how` the value at the end of `path` is compared.

    path  steps from a root: ("module", "experts.0"), ("fn", "") or ("globals", "package.module"), then
          ("attr", name), ("item", key) or ("cell", number)
    how   "equals"; "code": a function with this code; "is": this very object; "length": this type and length;
          "type": this type; "absent": the last attribute does not exist
    """

    path: Path
    how: str
    value: Any

    def __str__(self) -> str:
        return spell(self.path)


def hold(known: tuple[Read, ...], fn: types.FunctionType, module: nn.Module) -> bool:
    """Whether another call would read the same values."""
    return all(_same(read, fn, module) for read in known)


def _same(read: Read, fn: types.FunctionType, module: nn.Module) -> bool:
    try:
        value = follow(read.path, fn, module)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return read.how == "absent"
    match read.how:
        case "equals":
            return type(value) is type(read.value) and (
                value == read.value or (value != value and read.value != read.value)
            )
        case "code":
            return getattr(value, "__code__", None) is read.value
        case "is":
            return value is read.value
        case "length":
            return (type(value), len(value)) == read.value
        case "type":
            return type(value) is read.value
    return False


def follow(path: Path, fn: types.FunctionType, module: nn.Module) -> Any:
    """The value at the end of a path."""
    value: Any = None
    for step, key in path:
        match step:
            case "module":
                value = module.get_submodule(key)
            case "fn":
                value = fn
            case "globals":
                value = sys.modules[key]
            case "attr":
                value = getattr(value, key)
            case "item":
                value = value[key]
            case "cell":
                value = value.__closure__[key].cell_contents
    return value


def spell(path: Path) -> str:
    text = ""
    for step, key in path:
        match step:
            case "module":
                text = f"self.{key}" if key else "self"
            case "fn":
                text = "the function"
            case "globals":
                text = key
            case "attr":
                text += f".{key}"
            case "item":
                text += f"[{key!r}]"
            case "cell":
                text += f".__closure__[{key}]"
    return text
