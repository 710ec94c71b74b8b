"""What mkdocs does for this site beside its plugins.

- Pages that lie outside of docs/ (`PAGES`) are shown as they are.
- The page of the command line is made from the command.
- The menu of the results has the pages that docs/results/index.md links to, in its order.
- A link to another file of the repository leads to a copy of it in the site, under source/ (Markdown belongs into
  `PAGES`).
- guide/example-report.html is what `elropt report` makes of guide/example-run.jsonl.
- Formulas ($…$ and ```math, as GitHub shows them) become MathML, which browsers show without a script.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

import typer
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

import elropt
from elropt.cli import app
from elropt.diagnosis import diagnose
from elropt.report_page import report_page
from elropt.run_history import read_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # the page on the site: the file of the repository
    "development/contributing.md": "CONTRIBUTING.md",
    "development/architecture.md": "ARCHITECTURE.md",
    "development/benchmarks.md": "benchmarks/README.md",
    "development/kernels.md": "kernels/README.md",
    "development/emulation.md": "tests/emulation/README.md",
    "development/changelog.md": "CHANGELOG.md",
}
PAGE_OF = {source: page for page, source in PAGES.items()} | {"README.md": "index.md"}
FENCE = re.compile(r"(^[ ]*```.*?^[ ]*```[ ]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
NAMED_PAGE = re.compile(r"(?<![\w/.])docs/([\w/-]+\.md)(?![^<]*(?:</a>|>))")
LINKED = "|".join(name for name in elropt.__all__ if name != "control")  # which is also an ordinary word
PUBLIC_NAME = re.compile(rf"<code>((?:elropt\.)?({LINKED}))</code>(?!</a>|</h\d)")
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>',
    re.DOTALL,
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the menu of the results."""
    (menu,) = (entry["Results"] for entry in config.nav if "Results" in entry)
    index = Path(config.docs_dir, "results", "index.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([\w-]+\.md)\)", index)
    menu += [f"results/{page}" for page in dict.fromkeys(linked)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `PAGES`, the page of the command line and the example of a report."""
    files.append(File.generated(config, "api/command.md", content=command_page()))
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    run = read_run(Path(config.docs_dir, "guide", "example-run.jsonl"), all_layers=True)
    page = report_page(run, diagnose(run), title="example-run.jsonl")
    files.append(File.generated(config, "guide/example-report.html", content=page))
    return files


def command_page() -> str:
    """What `elropt --help` and the help of its commands say."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="elropt")
    text = get_docs_for_click(obj=command, ctx=context, name="elropt", title="The command line")
    return re.sub(r"^\* `--help`: .*\n", "", text, flags=re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mend links that lead out of docs/."""
    here = page.file.src_uri
    folder = posixpath.dirname(PAGES.get(here, f"docs/{here}"))

    def on_site(match: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(folder, match[1]))
        if source.startswith("docs/"):
            target = source.removeprefix("docs/")
        elif source in PAGE_OF:
            target = PAGE_OF[source]
        elif (ROOT / source).is_file() and not source.endswith(".md"):
            target = f"source/{source}"
            if files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
        else:
            return match[0]  # which mkdocs reports
        return posixpath.relpath(target, posixpath.dirname(here) or ".") + (match[2] or "")

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(on_site, text) for text in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write formulas in MathML, and make links of the pages and the public names that a page names."""

    def link(match: re.Match[str]) -> str:
        named = files.get_file_from_path(match[1])
        if named is None:
            return match[0]
        return f'<a href="{named.url_relative_to(page.file)}">{match[0]}</a>'

    html = NAMED_PAGE.sub(link, FORMULA.sub(mathml, html))
    if not page.file.src_uri.startswith("api/"):
        return html
    return PUBLIC_NAME.sub(r'<autoref identifier="elropt.\2" optional>\g<0></autoref>', html)


def mathml(match: re.Match[str]) -> str:
    """A formula that arithmatex has found. Primes are no exponents: browsers make those too small."""
    block = match["block"] is not None
    tex = html.unescape(match["block"] if block else match["inline"]).replace("'", "′")
    return convert(tex, display="block" if block else "inline")
