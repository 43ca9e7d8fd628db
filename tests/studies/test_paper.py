"""The paper: its numbers come from the CSVs, its text is consistent, and who has no TeX is told what to install."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy_project import ROOT, Project

from cachemedic.core.files import digest, read_sealed, seal
from cachemedic.studies.paper_numbers import IN_PAGE, Claim, Number, claims_page, load, macros, page

PAPER = ROOT / "paper"
SECTIONS = {path.stem: path.read_text() for path in sorted((PAPER / "sections").glob("*.tex"))}
README = (ROOT / "README.md").read_text()
TEXT = "\n".join([(PAPER / "main.tex").read_text(), *SECTIONS.values()])
# Definitions and chosen settings may hold numerals; everything else reports what was measured.
DEFINITIONS = {"pretrained", "method", "token_aware", "operators", "bounds", "threat_model", "objective", "setup"}
NAMES = ("GPT-2", "WikiText-2", "SST-2", "SmolLM2")
OWN_MACROS = {"Kh", "Vh", "Kc", "Vc", "T", "F", "R", "E", "KL"}
LATEX_MACROS = {"Omega", "Gamma", "Theta", "Phi", "Psi", "Delta", "Bigl", "Bigr"}


def used_macros(text: str) -> set[str]:
    return set(re.findall(r"\\([A-Z][A-Za-z]*)", text)) - OWN_MACROS - LATEX_MACROS


def in_readme() -> set[str]:
    return {name for name, _ in IN_PAGE.findall(README)}


def arguments(command: str) -> set[str]:
    found = re.findall(rf"\\{command}(?:\[[^]]*\])?{{([^}}]*)}}", TEXT)
    return {name.strip() for names in found for name in names.split(",")}


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = "base,reader,recovery,recovery_low,recovery_high,n\na,A,-0.0001,-0.25,0.5,1234\na,B,0.5,,,2\nb,A,1,1,1,3\n"
    (tmp_path / "demo.csv").write_text(rows)
    (tmp_path / "demo.json").write_bytes(seal({"sha256": digest(rows.encode())}))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "latex"),
    [
        ({"where": {"base": "b"}, "column": "recovery", "format": ".1%"}, r"\ensuremath{100.0\%}"),
        ({"where": {"base": "a", "reader": "A"}, "column": "recovery", "interval": True, "format": ".2f"},
         r"\ensuremath{0.00} [\ensuremath{-0.25}, \ensuremath{0.50}]"),
        ({"where": {"base": "a", "reader": "A"}, "column": "n", "format": ",.0f"}, r"\ensuremath{1{,}234}"),
        ({"where": {"base": ["a", "b"]}, "column": "recovery", "over": "max"}, r"\ensuremath{1.000}"),
        ({"column": "base", "over": "distinct", "format": ".0f"}, r"\ensuremath{2}"),
    ],
)  # fmt: skip
def test_numbers_are_taken_and_typeset_as_declared(results: Path, options: dict, latex: str) -> None:
    assert Number("Demo", "demo", **options).latex(results) == latex


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": {"base": "c"}, "column": "recovery"}, r"\\Demo from results/demo.csv: no row left has base = 'c'"),
        ({"where": {"base": ["a", "c"]}, "column": "n", "over": "max"}, "no row left has base = 'c'; there are: a, b"),
        ({"where": {"base": "a"}, "column": "recovery"}, "2 rows are selected; name one"),
        ({"where": {"base": "b"}, "column": "recovry"}, "did you mean 'recovery'"),
        ({"where": {"bas": "b"}, "column": "recovery"}, "did you mean 'base'"),
        ({"where": {"reader": "B"}, "column": "recovery", "interval": True}, "the value is not defined"),
        ({"column": "n", "over": "median"}, "unknown `over` of Demo 'median'"),
        ({"column": "recovery", "over": "max", "interval": True}, "an interval is that of one row"),
    ],
)
def test_wrong_numbers_are_one_clear_error(results: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Number("Demo", "demo", **options).latex(results)


def test_names_and_keys_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'Rank8' cannot name a macro"):
        Number("Rank8", "demo", "recovery")
    with pytest.raises(ValueError, match="none.csv does not exist; `make results/none.csv` makes it"):
        Number("Demo", "none", "recovery").latex(tmp_path)
    declaration = '[[claim]]\nsays = ""\nsection = ""\ncsv = "demo"\n[claim.numbers]\nDemo = { column = "n", %s }\n'
    (tmp_path / "paper").mkdir()
    path = tmp_path / "paper/numbers.toml"
    path.write_text(declaration % 'forma = ".2f"')
    with pytest.raises(ValueError, match="unknown key of Demo in paper/numbers.toml 'forma'"):
        load(tmp_path)
    path.write_text(2 * (declaration % 'over = "max"'))
    with pytest.raises(ValueError, match="the macro Demo is declared twice"):
        load(tmp_path)
    for text, message in (
        ("[[claim]", "paper/numbers.toml is missing or damaged"),
        ("[[claim]]", "a claim in paper/numbers.toml lacks says, section, csv, numbers"),
        ("claim = [1]", "a claim in paper/numbers.toml lacks says"),
        (declaration.replace('column = "n", %s', ""), "Demo in paper/numbers.toml lacks column"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="paper/numbers.toml is missing or damaged"):
        load(tmp_path)


def test_generated_files_are_those_of_the_committed_results() -> None:
    claims = load()
    assert (PAPER / "numbers.tex").read_text() == macros(claims), "run `make paper`"
    assert (PAPER / "CLAIMS.md").read_text() == claims_page(claims), "run `make paper`"
    assert page("README.md", claims) == README, "run `make paper`"


def test_numbers_of_the_readme_are_put_where_their_names_stand(results: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for file in ("demo.csv", "demo.json"):
        shutil.copy(tmp_path / file, tmp_path / "results")
    claim = Claim("", "README", "demo", (Number("Demo", "demo", "n", over="max", format=",.0f"),))
    (tmp_path / "README.md").write_text("| a | <!--Demo-->?<!----> | <!--Demo--><!----> | <!-- a comment --> |\n")
    filled = "| a | <!--Demo-->1,234<!----> | <!--Demo-->1,234<!----> | <!-- a comment --> |\n"
    assert page("README.md", [claim], tmp_path) == filled
    (tmp_path / "README.md").write_text("<!--Demi-->?<!---->")
    with pytest.raises(ValueError, match="did you mean 'Demo'"):
        page("README.md", [claim], tmp_path)


# --- text -------------------------------------------------------------------------------------------------------------


def test_every_claim_is_made_where_it_says_and_shown_by_what_exists() -> None:
    for claim in load():
        if claim.section == "README":
            used = in_readme()
        else:
            used = used_macros("\n".join(SECTIONS[section.strip()] for section in claim.section.split(",")))
        assert {number.name for number in claim.numbers} <= used, claim.says
        assert all((ROOT / path).is_file() for path in claim.shown), claim.says
        notebook = read_sealed(ROOT / "results" / f"{claim.csv}.json")["notebook"]
        assert notebook is None or (ROOT / "notebooks" / f"{notebook}.ipynb").is_file()


def test_every_macro_is_declared() -> None:
    declared = {number.name for claim in load() for number in claim.numbers}
    assert used_macros("\n".join(SECTIONS.values())) | in_readme() == declared


@pytest.mark.parametrize("section", sorted(set(SECTIONS) - DEFINITIONS))
def test_numerals_outside_of_definitions_are_macros(section: str) -> None:
    text = re.sub(r"(?m)(?<!\\)%.*$", "", SECTIONS[section])
    text = re.sub(r"\\(?:cite[a-z]*|ref|eqref|label|input|includegraphics)(?:\[[^]]*\])?{[^}]*}", "", text)
    for name in NAMES:
        text = text.replace(name, "")
    assert not re.findall(r".{0,40}\d.{0,20}", text), "numbers of results come from paper/numbers.toml"


def test_citations_labels_and_figures_exist() -> None:
    entries = re.findall(r"(?m)^@\w+{([^,]+),", (PAPER / "refs.bib").read_text())
    assert len(entries) == len(set(entries))
    assert set(entries) == arguments("cite[tp]")
    tables = "\n".join((PAPER / f"{name}.tex").read_text() for name in arguments("input") if name.startswith("tables/"))
    labels = re.findall(r"\\label{([^}]*)}", TEXT + tables)
    assert len(labels) == len(set(labels))
    assert arguments("ref") | arguments("eqref") <= set(labels)
    assert all((ROOT / "figures" / f"{name}.pdf").is_file() for name in arguments("includegraphics"))
    assert {f"sections/{name}" for name in SECTIONS} <= arguments("input")


def test_the_paper_is_signed_by_the_contributors() -> None:
    assert arguments("author") == {"the CacheMedic++ contributors"}


# --- make paper -------------------------------------------------------------------------------------------------------


def test_without_tex_a_person_is_told_what_to_install(tmp_path: Path) -> None:
    project, programs = Project(tmp_path / "project"), tmp_path / "programs"
    programs.mkdir()
    for name in ("make", "cat", "cksum", "mkdir", "mv"):
        (programs / name).symlink_to(str(shutil.which(name)))
    command = ["make", "paper", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=project.root, env={"PATH": str(programs)}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "make paper needs latexmk of a TeX distribution. Debian and Ubuntu: apt-get install latexmk" in done.stderr
    assert not (project.root / ".venv").exists(), "said before anything is installed"


def test_make_asks_for_every_style_that_the_paper_uses() -> None:
    asked = re.search(r"TEX_STYLES := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text())
    assert asked is not None
    assert arguments("usepackage") == set(asked[1].replace("\\", "").split())
