"""The experts classes of the installed transformers, found in its sources: no table of model names."""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

EXPERTS, WIDTH = 5, 8
SMALL = {"hidden_": WIDTH, "latent": WIDTH, "intermediate": 12, "experts": EXPERTS}  # by a part of the name
REACHED = {"limit": 0.5, "softcap": 1.5}  # bounds of activations, where narrow experts meet them
DECORATOR = "use_experts_implementation"


@dataclass(frozen=True)
class Family:
    """A decorated experts class: its family, its name, its source without the names of class and config, its config."""

    name: str
    cls: str
    source: str
    config: str  # the class that `__init__` says its config has, "" if it does not say

    def __str__(self) -> str:
        return f"{self.name}-{self.cls}"

    def module(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.name}.modeling_{self.name}")


@functools.cache
def families() -> tuple[Family, ...]:
    """All classes that transformers gives several forms to, in the order of their files."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return ()
    found = []
    for path in sorted((Path(spec.origin).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        if f"@{DECORATOR}" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and any(DECORATOR in ast.unparse(d) for d in node.decorator_list):
                found.append(Family(path.parent.name, node.name, _source(node), _config_class(node)))
    return tuple(found)


def representatives() -> tuple[Family, ...]:
    """The first family of each different source."""
    return tuple({f.source: f for f in reversed(families())}.values())[::-1]


def build(family: Family, implementation: str = "eager", cls: Any = None) -> nn.Module:
    """The experts alone, narrow, with random weights; `cls`: another class in the place of the family's."""
    cls = getattr(family.module(), family.cls) if cls is None else cls
    more = {name: _small(name) for name in [*inspect.signature(cls.__init__).parameters][2:]}
    module = cls(shrunk(family, implementation), **more)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def shrunk(family: Family, implementation: str) -> Any:
    """The family's default config with small numbers where its experts look."""
    config = _default_config(family)
    for name in sorted(set(re.findall(r"config\.(\w+)", family.source))):
        if _small(name) is not None and isinstance(getattr(config, name), int | None):
            setattr(config, name, _small(name))
    for name, value in list(vars(config).items()):
        bound = next((b for part, b in REACHED.items() if part in name), None)
        if bound is not None and isinstance(value, float | int):
            setattr(config, name, bound)
    config._experts_implementation = implementation
    return config


def _small(name: str) -> int | None:
    return next((n for part, n in SMALL.items() if part in name), None)


def _default_config(family: Family) -> Any:
    module = family.module()
    if cls := getattr(module, family.config, None):
        return cls()
    configs = importlib.import_module(f"transformers.models.{family.name}.configuration_{family.name}")
    needed = set(re.findall(r"config\.(\w+)", family.source))
    classes = [c for c in vars(configs).values() if isinstance(c, type) and c.__module__ == configs.__name__]
    for cls in sorted(classes, key=lambda c: "Text" not in c.__name__):
        if needed <= {*dir(config := cls()), *getattr(config, "attribute_map", {})}:
            return config
    raise AssertionError(f"no config of {family.name} has {needed}")


def _config_class(node: ast.ClassDef) -> str:
    init = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__")
    annotation = init.args.args[1].annotation
    return ast.unparse(annotation).strip("'\"") if annotation is not None else ""


def _source(node: ast.ClassDef) -> str:
    """What the class does: without its name, its docstrings and its annotations."""
    text = [ast.unparse(d) for d in node.decorator_list] + [ast.unparse(b) for b in node.bases]
    for child in node.body:
        for f in ast.walk(child):
            if isinstance(f, ast.FunctionDef):
                f.returns = None
                for a in f.args.args:
                    a.annotation = None
                if ast.get_docstring(f) is not None:
                    f.body = f.body[1:]
        if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            text.append(ast.unparse(child))
    return "\n".join(text)
