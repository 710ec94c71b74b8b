"""The documentation site builds without a warning, and nothing on it comes from another server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elropt

pytest.importorskip("material", reason="needs the extra docs")
pytest.importorskip("latex2mathml", reason="needs the extra docs")

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("site")  # one build for all


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


def pages_of(site: Path) -> dict[str, str]:
    return {str(page.relative_to(site)): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}


def test_every_page_is_there(site: Path) -> None:
    pages = pages_of(site)
    sources = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    assert len(sources) > 20
    for source in sources:
        folder = source.parent if source.name == "index" else source
        assert str(folder / "index.html") in pages
    assert "development/architecture/index.html" in pages


def test_every_public_name_and_command_has_its_place(site: Path) -> None:
    api = "".join(text for name, text in pages_of(site).items() if name.startswith("api/"))
    assert [name for name in elropt.__all__ if f'id="elropt.{name}"' not in api] == []
    modules = [path.stem for path in (ROOT / "elropt" / "integrations").glob("[a-z]*.py")]
    assert [name for name in modules if f'id="elropt.integrations.{name}' not in api] == []
    assert {"elropt-inspect", "elropt-plot", "elropt-simulate"} <= set(re.findall(r'id="([\w-]+)"', api))


def test_nothing_comes_from_another_server(site: Path) -> None:
    """Links (href of <a>) may lead away; scripts, styles, fonts and images may not."""
    tag = re.compile(
        r"<(script|link|img|iframe|source|object|embed)\b[^>]*?\b(?:src|href|data)=\"?([^\s\">]+)"
    )
    loaded = {(name, target) for name, text in pages_of(site).items() for _, target in tag.findall(text)}
    assert any(target.endswith(".css") for _, target in loaded)
    assert [found for found in loaded if re.match(r"(https?:)?//", found[1])] == []
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert re.findall(r"(?:@import\s+|url\()[\"']?(?:https?:)?//", text) == [], style


def test_docstrings_are_shown_as_they_are_written(site: Path) -> None:
    """An example under "Example:" instead of "Examples:" would be a quotation, and <name> without backticks a tag."""
    api = {name: text for name, text in pages_of(site).items() if name.startswith("api/")}
    assert [name for name, text in api.items() if "<blockquote>" in text or "<name>" in text] == []


def test_pages_that_docstrings_name_are_links(site: Path) -> None:
    model = pages_of(site)["api/dynamics/index.html"]
    assert '<a href="../../theory/">docs/theory.md</a> §7' in model


def test_public_names_in_docstrings_are_links(site: Path) -> None:
    groups = pages_of(site)["api/groups/index.html"]
    assert re.search(
        r'<a [^>]*href="#elropt\.find_scale_invariant"><code>find_scale_invariant</code></a>', groups
    )
    assert re.search(r'<a [^>]*href="\.\./optimizer/#elropt\.ELRSGD"><code>ELRSGD</code></a>', groups)


def test_the_example_of_a_report_is_there(site: Path) -> None:
    pages = pages_of(site)
    assert "What it sees" in pages["guide/example-report.html"]
    assert 'href="../example-report.html"' in pages["guide/watching/index.html"]


def test_formulas_are_mathml(site: Path) -> None:
    theory = pages_of(site)["theory/index.html"]
    assert theory.count("<math ") > 150
    assert "arithmatex" not in theory
    prose = re.sub(r"<(pre|code|script|math)\b.*?</\1>", "", theory, flags=re.DOTALL)
    assert re.findall(r"\$[^<$\n]+\$|\\[a-zA-Z]+", prose) == []
