"""README and docs/: code runs, JSON is accepted, links lead somewhere, and the messages explained are those raised."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import hjson
import pytest
import torch

import ds_looksam
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
    lines, start = page.read_text().splitlines(), None
    for i, line in enumerate(lines):
        if line.startswith("```"):
            if start is None:
                start = i
            else:
                yield Block(page.name, start + 1, lines[start][3:].strip(), "\n".join(lines[start + 1:i]))
                start = None
    assert start is None, f"{page}: the fence in line {start} is not closed"


ALL = [block for page in PAGES for block in blocks(page)]


def of(language: str) -> list[Block]:
    return [block for block in ALL if block.language.split()[:1] == [language]]


def as_object(block: Block) -> dict[str, Any]:
    """A block that shows keys only is a piece of an object."""
    text = block.text.strip()
    return hjson.loads(text if text.startswith("{") else "{" + text + "}")


def test_there_is_something_to_run():
    pages_run = {block.page for block in ALL if block.language == "python run"}
    assert pages_run >= {"README.md", "migrating.md"} and len(of("json")) >= 4


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json(block, tmp_path):
    values = as_object(block)
    if block.text.strip().startswith("{"):
        json.loads(block.text)  # a whole configuration is JSON, not only Hjson
    if "optimizer" in values:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"train_batch_size": 8} | values))
        assert check(path).settings is not None


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_is_python(block):
    ast.parse(block.text, str(block))


class WithLoss(torch.nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.head(inputs), labels)


def run_block(text: str, where: str, config: dict[str, Any]) -> tuple[int, int]:
    """Run a block with the names that all pages use; the updates and evaluations of the engine it made.

    The configuration that the page shows last before it is "config.json".
    """
    torch.manual_seed(1)
    Path("config.json").write_text(json.dumps(config))
    names: dict[str, Any] = {"data": [(torch.randn(12), torch.tensor(i % 5)) for i in range(IMAGES)],
                             "model": WithLoss(), "network": WithLoss().head,
                             "criterion": torch.nn.functional.cross_entropy}
    exec(compile(text, where, "exec"), names)
    engine = names["engine"]
    counted = engine.looksam.updates, engine.looksam.evaluations
    engine.destroy()
    return counted


IMAGES = 256


def run_blocks() -> None:
    """In a process of its own, in an empty folder: read blocks from stdin, leave what they counted in counted.json."""
    import deepspeed

    from launch import distributed

    store = torch.distributed.FileStore(str(Path("store").resolve()), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed("gloo", verbose=False)
    Path("counted.json").write_text(json.dumps([run_block(*block) for block in json.load(sys.stdin)]))
    distributed.leave()


def test_python_runs(tmp_path):
    code, expected, config = [], [], {}
    for block in ALL:
        if block.language == "json" and "train_batch_size" in as_object(block):
            config = as_object(block)
        elif block.language == "python run":
            code.append((block.text, str(block), config))
            updates, k = IMAGES // config["train_batch_size"], config["optimizer"]["params"]["k"]
            expected.append([updates, updates + math.ceil(updates / k)])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                                "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    # A process of its own: DeepSpeed's loader starts workers, which a rank process of tests/ranks.py must not.
    result = subprocess.run([sys.executable, "-c", "from tests.test_docs import run_blocks; run_blocks()"],
                            cwd=tmp_path, input=json.dumps(code), env=environment, capture_output=True, text=True,
                            timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "counted.json").read_text()) == expected


def test_what_the_page_says_of_pytorch_optimizer():
    """Its snippet runs, evaluates every step twice, and reuses tensor by tensor."""
    library = pytest.importorskip("pytorch_optimizer")
    [block] = [block for block in ALL if block.language == "python with pytorch_optimizer"]
    torch.manual_seed(1)
    network, evaluations = WithLoss().head, []
    network.register_forward_hook(lambda *_: evaluations.append(None))
    names: dict[str, Any] = {
        "torch": torch, "LookSAM": library.LookSAM, "network": network, "criterion": torch.nn.functional.cross_entropy,
        "loader": [(torch.randn(4, 12), torch.randint(0, 5, (4, ))) for _ in range(12)]}
    exec(compile(block.text, str(block), "exec"), names)
    assert len(evaluations) == 2 * 12

    # One more reuse step, on which each tensor's correction must be alpha of its own gradient's norm.
    optimizer = names["optimizer"]
    names["closure"]()
    optimizer.first_step(zero_grad=True)
    names["closure"]()
    before = [p.grad.clone() for p in network.parameters()]
    optimizer.second_step()
    for p, g in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close((p.grad - g).norm(), 0.7 * g.norm(), rtol=1e-4, atol=0)  # rounding of fp32 sums


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            found = (page.parent / file) if file else page
            assert found.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_that_the_pages_name_exist():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|sh|json|md))`", text):
            name = name.replace("NAME", "base")
            assert (ROOT / name).exists() or (PACKAGE / name).exists(), f"{page.name}: {name}"


def test_the_first_screen_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_every_page_says_whom_it_is_for_and_has_a_line_in_the_index(page):
    assert re.match(r"# [^\n]+\n\n\*For whoever ", page.read_text())
    assert page.name == "index.md" or f"\n| [{page.name}]({page.name}) |" in re.sub(
        "<!--.*?-->", "", (ROOT / "docs" / "index.md").read_text(), flags=re.S)


def test_the_page_on_the_trainer_shows_the_examples_callback():
    [block] = [block for block in ALL if block.page == "integrations.md" and "class LogLookSAM" in block.text]
    assert block.text in (ROOT / "examples" / "gpt2_lora.py").read_text()


def test_the_page_of_keys_lists_each_with_its_default_and_its_words():
    page = (ROOT / "docs" / "keys.md").read_text()
    table = page[page.index("| key of `params` |"):].partition("\n\n")[0]
    rows = {key: (default, words)
            for key, default, words in re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.*) \|$", table, re.M)}
    assert rows.keys() == LookSAMConfig.model_fields.keys()
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
                message = "is damaged" if node.func.id == "_damaged" else "".join(map(literal, node.args[:1]))
                if re.search(r"\w{4}", message):  # else it is put together elsewhere
                    errors[f"{path.relative_to(PACKAGE)}:{node.lineno}: {message}"] = message
    return errors, "\n".join(words)


def quotations() -> list[str]:
    """What the page quotes, in headings and in the text: not what stands in code."""
    text = re.sub(r"```.*?```|`[^`]*`", "", TROUBLESHOOTING.read_text(), flags=re.S)
    return [" ".join(words.split()) for words in re.findall(r'"([^"]+)"', text)]


def test_troubleshooting_explains_every_message():
    errors, _ = errors_and_words()
    assert len(errors) > 30
    quoted = quotations()
    assert [where for where, message in errors.items() if not any(words in message for words in quoted)] == []


def test_troubleshooting_quotes_what_is_said():
    import accelerate.utils.dataclasses
    import deepspeed.runtime.engine

    _, words = errors_and_words()
    ours, theirs = TROUBLESHOOTING.read_text().split("## From DeepSpeed and Hugging Face\n")
    headings = re.findall(r'^### "(.*)"$', ours, flags=re.M)
    assert len(headings) > 20
    assert [heading for heading in headings if heading not in words] == []
    sources = "".join(Path(module.__file__).read_text() for module in (deepspeed.runtime.engine,
                                                                       accelerate.utils.dataclasses)).replace("`", "")
    headings = [h.replace("LookSAM", "{}") for h in re.findall(r'^### "(.*)"$', theirs, flags=re.M)]
    assert len(headings) >= 3
    assert [heading for heading in headings if heading not in sources] == []


def test_the_api_reference_is_up_to_date():
    shown = subprocess.run([sys.executable, "docs/build_api.py", "-"], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=250, check=True).stdout
    assert shown == (ROOT / "docs" / "api.md").read_text(), "run: python docs/build_api.py"

