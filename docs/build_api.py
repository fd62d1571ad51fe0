"""Writes docs/api.md from the docstrings of what ``ds_looksam`` exports.

    python docs/build_api.py        # write it
    python docs/build_api.py -      # print it
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
from deepspeed import DeepSpeedEngine

import ds_looksam
from ds_looksam.config.params import RhoSchedule
from ds_looksam.engines.host import HostEngine

TARGET = Path(__file__).parent / "api.md"
INTRODUCTION = """# API reference

*Read this if you look up a public name.*

Built from the docstrings by `python docs/build_api.py`; a test compares the two. "Collective" means that every rank
must make the call. All names are in `ds_looksam`. The JSON block `optimizer.params` is `LookSAMConfig`.
"""
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$")
ITEM = re.compile(r"^    (\S[^:]*): (.*)$")


def page() -> str:
    lines = [INTRODUCTION]
    for name in sorted(set(ds_looksam.__all__) - {"__version__"}, key=str.lower):
        lines += entry(name, getattr(ds_looksam, name))
        if name == "LookSAMConfig":
            lines += entry("config.RhoSchedule", RhoSchedule)
    return "\n".join(lines).rstrip() + "\n"


def entry(name: str, thing: Any) -> Iterator[str]:
    """One exported name: a heading, its docstring, and the members that have one of their own."""
    yield f"## `{name}{signature(thing)}`\n"
    yield markdown(inspect.getdoc(thing) or "")
    if not inspect.isclass(thing):
        return
    for member, value in members(thing).items():
        inner = value.fget if isinstance(value, property) else value
        if member.startswith("_") or not inspect.isfunction(inner) or not inner.__doc__:
            continue
        shown = member if isinstance(value, property) else member + signature(inner)
        yield f"### `{name}.{shown}`\n"
        yield markdown(inspect.getdoc(inner) or "")


def members(thing: type) -> dict[str, Any]:
    """A class's own; of the engine what its users call: properties, and methods that a DeepSpeedEngine has too."""
    if not issubclass(thing, HostEngine):
        return dict(vars(thing))
    own = thing.__mro__[:thing.__mro__.index(HostEngine)]
    return {name: value for part in reversed(own) for name, value in vars(part).items()
            if isinstance(value, property) or hasattr(DeepSpeedEngine, name)}


def signature(thing: Any) -> str:
    """As in the source. Of classes only where users call them: not engines, exceptions and validated models."""
    if inspect.isclass(thing) and issubclass(
            thing, (BaseException, pydantic.BaseModel, ds_looksam.LookSAMEngine, ds_looksam.LookSAMStatus)):
        return ""
    parameters = [p for p in inspect.signature(thing).parameters.values() if p.name != "self"]
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


def markdown(docstring: str) -> str:
    """A docstring in Google's style, with reStructuredText's quotes, as Markdown."""
    text = re.sub(r"(?m)^::\n\n", "", docstring)  # a paragraph that only says that code follows
    text = re.sub(r":\w+:`~?\.?([^`]*)`", r"`\1`", text).replace("``", "`").replace("::\n", ":\n")
    lines, in_section = [], False
    for line in text.splitlines():
        if found := SECTION.match(line):
            lines += [f"**{found[1]}**", ""]
            in_section = True
        elif in_section and line.startswith("    "):
            item = ITEM.match(line)
            lines.append(f"- `{item[1]}`: {item[2]}" if item else "  " + line.strip())
        else:
            in_section = in_section and not line
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["-"]:
        print(page(), end="")
    else:
        TARGET.write_text(page())
