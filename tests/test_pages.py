"""What README.md and docs/ tell people: links that lead somewhere, commands that are accepted."""

import re
import shlex
from itertools import pairwise

import pytest

from magnetar.engine.config.schema import load_config
from magnetar.launchers.main import COMMANDS, main
from tests.ranks import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("[!.]*/README.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# A page is written by hand and answers a task, so it begins with the command that does it.
TASKS = (
    *("checkpoints", "clusters", "commands", "first-run", "models", "promises", "tour"),
    *("torchscale", "translation", "tried-and-left-out", "your-own-text"),
)


def anchors(text: str) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[str]:
    """Every `magnetar ...` in a block of code, without what the shell does with it."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.match(r"(?:\$ |  )?(magnetar .*)", line) for line in lines]
    return [re.split(r" [<>|] ", match[1])[0] for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


COMMAND_LINES = sorted({line for page in PAGES for line in commands(page.read_text("utf-8"))})


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_of_a_page_exists_with_its_options(line, capsys):
    name, *rest = shlex.split(line, comments=True)[1:]
    if name == "--help":
        return
    assert name in COMMANDS
    subcommand = rest[:1] if name in ("convert", "config") else []
    with pytest.raises(SystemExit) as ended:
        main([name, *subcommand, "--help"])
    assert ended.value.code in (0, None)
    explained = capsys.readouterr().out
    for word in rest:
        if word.startswith("ds_configs/"):
            assert (ROOT / word).exists()
        if re.match(r"--?[a-zA-Z]", word):
            assert re.search(rf"(?<![\w-]){re.escape(word.partition('=')[0])}\b", explained), word


@pytest.mark.parametrize("name", TASKS)
def test_a_page_of_a_task_begins_with_its_command(name):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert re.match(r"# [^\n]+\n\n```\n", text)


def test_the_readme_is_a_screen_and_a_half():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if " ds_configs/" in line])
def test_every_config_of_a_page_resolves_with_its_changes(line):
    words = shlex.split(line, comments=True)
    config = next(word for word in words if word.startswith("ds_configs/"))
    load_config(ROOT / config, [value for word, value in pairwise(words) if word == "--set"])
