"""README and docs/: code runs, JSON is accepted, links lead somewhere, and the messages explained are those raised."""

from __future__ import annotations

import ast
import json
import math
import multiprocessing
import os
import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import hjson
import pytest
import torch

import ds_looksam
from benchmarks.scale import in_fresh_process
from ds_looksam.cli.check import check
from ds_looksam.config.params import LookSAMConfig, RhoSchedule

ROOT = Path(__file__).parent.parent
PACKAGE = Path(ds_looksam.__file__).parent  # not always beside the tests: tests/run_wheel.sh
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``language`` is everything after the fence, "python run" say."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    assert len(re.findall("^```", text, re.M)) % 2 == 0, f"{page}: a fence is not closed"
    for found in re.finditer("^```([^\n]*)\n(.*?)\n?^```$", text, re.M | re.S):
        yield Block(page.name, text.count("\n", 0, found.start()) + 1, found[1].strip(), found[2])


def prose(page: Path) -> str:
    return re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.S)


ALL = [block for page in PAGES for block in blocks(page)]


def as_object(block: Block) -> dict[str, Any]:
    """A block that shows keys only is a piece of an object."""
    text = block.text.strip()
    return hjson.loads(text if text.startswith("{") else "{" + text + "}")


@pytest.mark.parametrize("block", [block for block in ALL if block.language.startswith(("json", "python"))], ids=str)
def test_blocks_are_what_they_say(block, tmp_path):
    if block.language != "json":
        ast.parse(block.text, str(block))
        return
    values = as_object(block)
    if block.text.strip().startswith("{"):
        json.loads(block.text)  # a whole configuration is JSON, not only Hjson
    if "optimizer" in values:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"train_batch_size": 8} | values))
        assert check(path).settings is not None


class WithLoss(torch.nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.head(inputs), labels)


IMAGES = 256


def run_blocks(folder: str, code: list[tuple[str, str, dict[str, Any]]]) -> list[tuple[int, int]]:
    """In an empty folder, with the names that all pages use: updates and evaluations of the engine that each made.

    A process of its own: DeepSpeed's loader starts workers, which a rank process of tests/ranks.py must not.
    """
    import deepspeed

    from launch import distributed

    multiprocessing.set_start_method("fork", force=True)  # of the workers
    os.chdir(folder)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    store = torch.distributed.FileStore(f"{folder}/store", 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed("gloo", verbose=False)
    counted = []
    for text, where, config in code:
        torch.manual_seed(1)
        Path("config.json").write_text(json.dumps(config))
        names: dict[str, Any] = {"data": [(torch.randn(12), torch.tensor(i % 5)) for i in range(IMAGES)],
                                 "model": WithLoss(), "network": WithLoss().head,
                                 "criterion": torch.nn.functional.cross_entropy}
        exec(compile(text, where, "exec"), names)
        engine = names["engine"]
        counted.append((engine.looksam.updates, engine.looksam.evaluations))
        engine.destroy()
    distributed.leave()
    return counted


def test_python_runs(tmp_path):
    """With the configuration that the page shows last before it as "config.json"."""
    code, expected, config = [], [], {}
    for block in ALL:
        if block.language == "json" and "train_batch_size" in as_object(block):
            config = as_object(block)
        elif block.language == "python run":
            code.append((block.text, str(block), config))
            updates, k = IMAGES // config["train_batch_size"], config["optimizer"]["params"]["k"]
            expected.append((updates, updates + math.ceil(updates / k)))
    assert {where.partition(":")[0] for _, where, _ in code} >= {"README.md", "migrating.md"}
    assert in_fresh_process(run_blocks, str(tmp_path), code) == expected


def test_the_other_librarys_snippet_runs_and_evaluates_every_step_twice():
    """What its reuse comes to: test_migrating.py."""
    library = pytest.importorskip("pytorch_optimizer")
    [block] = [block for block in ALL if block.language == "python with pytorch_optimizer"]
    network, evaluations = WithLoss().head, []
    network.register_forward_hook(lambda *_: evaluations.append(None))
    exec(compile(block.text, str(block), "exec"), {
        "torch": torch, "LookSAM": library.LookSAM, "network": network, "criterion": torch.nn.functional.cross_entropy,
        "loader": [(torch.randn(4, 12), torch.randint(0, 5, (4, ))) for _ in range(12)]})
    assert len(evaluations) == 2 * 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_leads_to_is_there_and_it_says_whom_it_is_for(page):
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            found = (page.parent / file) if file else page
            assert found.exists() and (not anchor or anchor in anchors(found)), target
    for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|sh|json|md))`", text):
        name = name.replace("NAME", "base")
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name
    if page.parent.name == "docs":
        assert re.match(r"# [^\n]+\n\n\*Read this if you ", page.read_text())
        assert page.name == "index.md" or f"\n| [{page.name}]({page.name}) |" in prose(ROOT / "docs" / "index.md")
    assert page.name != "README.md" or len(page.read_text().splitlines()) < 150


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_on_the_trainer_shows_the_examples_callback():
    [block] = [block for block in ALL if block.page == "integrations.md" and "class LogLookSAM" in block.text]
    assert block.text in (ROOT / "examples" / "gpt2_lora.py").read_text()


def test_the_page_of_keys_lists_each_with_its_default_and_its_words():
    page = (ROOT / "docs" / "keys.md").read_text()
    table = page[page.index("| key of `params` |"):].partition("\n\n")[0]
    rows = {key: (default, words)
            for key, default, words in re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.*) \|$", table, re.M)}
    shown = LookSAMConfig().model_dump() | {"rho_schedule": {"type": RhoSchedule().type}}
    assert {key: json.loads(default) for key, (default, _) in rows.items()} == shown
    words = {key: set(re.findall(r'"(\w+)"', " ".join(row))) for key, row in rows.items()}
    for key in ("layer_scale", "ascent", "rounding", "v_dtype"):
        assert words[key] == set(get_args(LookSAMConfig.model_fields[key].annotation))
    assert words["rho_schedule"] == {*RhoSchedule.model_fields, *get_args(RhoSchedule.model_fields["type"].annotation)}


ERRORS = ("LookSAMConfigError", "LookSAMReplayError", "LookSAMCheckpointError", "LookSAMVersionError",
          "ImportError", "FileExistsError", "_damaged")
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"


def literal(node: ast.AST) -> str:
    """The constant words of an expression, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(literal, node.values))
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return "…"


def errors_and_words() -> tuple[dict[str, str], str]:
    """The message of each error made in the package, by place; and every literal of the package."""
    errors, words = {}, []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "cli":  # explains itself
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                words.append(literal(node))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
                message = "is damaged" if node.func.id == "_damaged" else literal(node.args[0])
                if re.search(r"\w{4}", message):  # else it is put together elsewhere
                    errors[f"{path.relative_to(PACKAGE)}:{node.lineno}: {message}"] = message
    return errors, "\n".join(words)


def test_troubleshooting_explains_every_message_and_quotes_what_is_said():
    import accelerate.utils.dataclasses
    import deepspeed.runtime.engine

    errors, words = errors_and_words()
    assert len(errors) > 30
    # What the page quotes, in headings and in the text: not what stands in code.
    quoted = [" ".join(quote.split()) for quote in
              re.findall(r'"([^"]+)"', re.sub(r"`[^`]*`", "", prose(TROUBLESHOOTING)))]
    assert [where for where, message in errors.items() if not any(quote in message for quote in quoted)] == []
    theirs = "".join(Path(module.__file__).read_text() for module in (deepspeed.runtime.engine,
                                                                      accelerate.utils.dataclasses))
    parts = TROUBLESHOOTING.read_text().split("## From DeepSpeed and Hugging Face\n")
    for part, said, least in zip(parts, (words, theirs.replace("`", "")), (20, 3), strict=True):
        headings = re.findall(r'^### "(.*)"$', part, flags=re.M)
        assert len(headings) >= least
        assert [h for h in headings if h not in said and h.replace("LookSAM", "{}") not in said] == []


def api_page() -> str:
    return runpy.run_path(str(ROOT / "docs" / "build_api.py"))["page"]()


def test_the_api_reference_is_up_to_date():
    """Built in a fresh process: torch wraps methods of optimizers when the first one is made."""
    assert in_fresh_process(api_page) == (ROOT / "docs" / "api.md").read_text(), "run: python docs/build_api.py"
