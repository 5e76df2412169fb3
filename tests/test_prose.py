"""The text of the packages keeps a few rules: plain words, short sentences, whole first lines.

python tests/test_prose.py PATH ...     prints every offence as FILE:LINE: what is wrong
python tests/test_prose.py              prints how many offences every folder has
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DONE = ["deepclust", "cluster_jobs", "README.md"]
SUFFIXES = {".py", ".yaml", ".html", ".sh", ".md"}
WORDS_PER_SENTENCE = 25
SEMICOLONS_PER_1000_WORDS = 3

# "gang" may be quoted, as the old value of cluster.where; `told` is a field of methods' Output.
BANNED = re.compile(
    r"""(?<![A-Za-z"'`])gangs?(?![a-z])
    | (?<![A-Za-z])(seat(s|ed)?|meetings?|guests?|fruit(less)?|forgiven|verdicts?|anew)(?![a-z])
    | (?<![A-Za-z.])told(?![a-z]|=|:\ dict)
    | \b(lest|whoever|zombies?|strangers?|punish\w*|stands?\ in|as\ many\ as|of\ its\ own)\b
    | (?<!there\ )\bis\ no\ (?!longer\b|more\b)\w+
    | (?<![A-Za-z])notes/ | \bDESIGN\b | \bhouse\.md""",
    re.VERBOSE | re.IGNORECASE,
)
NO_VERB = re.compile(
    r"(A|An|The|Whether|What|Where|How|Every|All|Each|One|Two|No|This|These|Those|It|That|Which|Why"
    r"|Who|When|In|On|Of|For|From|With|By|As)\b"
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Text(NamedTuple):
    """A docstring, or the paragraphs of a page: where it begins, and what it documents."""

    line: int
    text: str
    is_function: bool = False


def test_the_text_keeps_the_rules() -> None:
    offences = [offence for path in DONE for file in files(path) for offence in check(file)]
    assert not offences, "\n".join(offences)


def test_semicolons_are_rare() -> None:
    text = "\n".join(one.text for path in DONE for file in files(path) for one in texts(file))
    assert text.count(";") * 1000 <= SEMICOLONS_PER_1000_WORDS * len(text.split())


def test_the_rules_find_what_they_name(tmp_path: Path) -> None:
    page = tmp_path / "page.py"
    page.write_text('def rows():\n    """The rows; which are told; lest they stand in"""\n')
    assert len(list(check(page))) == 4  # a banned word, no full stop, no verb, semicolons
    page.write_text('def rows():\n    """Return the rows."""\n')
    assert not list(check(page))


def files(path: str | Path) -> list[Path]:
    """Return the files below a path that hold text of ours."""
    whole = ROOT / path
    found = [whole] if whole.is_file() else sorted(whole.rglob("*"))
    return [file for file in found if file.suffix in SUFFIXES]


def check(file: Path) -> Iterator[str]:
    """Yield the offences of one file as FILE:LINE: TEXT."""
    name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if match := BANNED.search(line):
            yield f"{name}:{number}: {match[0]!r} is a banned word"
    for one in texts(file):
        for what in check_text(one, is_page=file.suffix == ".md"):
            yield f"{name}:{one.line}: {what}"


def texts(file: Path) -> list[Text]:
    """Return the docstrings of a module, or the paragraphs of a page."""
    if file.suffix == ".md":
        plain = re.sub(r"^```.*?^```$", lambda code: "\n" * code[0].count("\n"), file.read_text(),
                       flags=re.MULTILINE | re.DOTALL)  # fmt: skip
        starts = re.finditer(r"(?:^(?!#| {4}|\|).+\n?)+", plain, re.MULTILINE)
        return [Text(plain.count("\n", 0, one.start()) + 1, one[0]) for one in starts]
    if file.suffix != ".py":
        return []
    return [
        Text(node.body[0].lineno, text, isinstance(node, FUNCTIONS) and not is_noun(node))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
        and (text := ast.get_docstring(node))
    ]


def is_noun(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function is a property, or a command whose docstring is its help."""
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    return any("property" in mark or ".command(" in mark or mark == "overload" for mark in marks)


def check_text(one: Text, is_page: bool) -> Iterator[str]:
    """Yield what is wrong with a docstring or a paragraph."""
    first = one.text.splitlines()[0]
    if not is_page and (not first.endswith(".") or re.search(r"[.?!] [A-Z]", first)):
        yield f"the first line is not one sentence with a full stop: {first!r}"
    if one.is_function and NO_VERB.match(first):
        yield f"the first line does not begin with a verb: {first!r}"
    if not is_page and one.text.count(";") > 1:
        yield "more than one semicolon"
    for sentence in sentences(one.text):
        if (words := len(re.findall(r"\S*\w\S*", sentence))) > WORDS_PER_SENTENCE:
            yield f"a sentence of {words} words: {sentence[:60]!r}..."


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences, without tables and code (lines that are indented or have columns)."""
    lines = ["" if re.search(r"^ |^\||\S {2,}\S", line) else line for line in text.splitlines()]
    blocks = re.split(r"\n\s*\n|:\n|\n(?=[-*] |\d\. )", "\n".join(lines))
    for block in blocks:
        yield from re.split(r"(?<=[.!?])[\"')`]?\s+", " ".join(block.split()))


def main(paths: list[str]) -> None:
    """Print the offences of these paths, or the count of every folder of the packages."""
    for path in paths:
        for offence in (one for file in files(Path.cwd() / path) for one in check(file)):
            print(offence)
    for folder in () if paths else sorted({file.parent for file in all_files()}):
        print(
            f"{sum(len(list(check(file))) for file in files(folder)):5} {folder.relative_to(ROOT)}"
        )


def all_files() -> list[Path]:
    """Return the files of both packages."""
    return [*files("deepclust"), *files("cluster_jobs")]


if __name__ == "__main__":
    main(sys.argv[1:])
