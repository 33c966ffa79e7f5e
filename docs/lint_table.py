"""Write the table of rules into docs/lint.md from the rules themselves: ``python docs/lint_table.py``.

The page is committed, so that it can be read without a build; a test fails when it is out of date.
"""

from pathlib import Path

from chiasm.data.lint import all_rules

PAGE = Path(__file__).with_name("lint.md")
BEGIN, END = (
    "% Rules, written by docs/lint_table.py: change the rules, not this table.\n",
    "% End of the rules.\n",
)
GROUPS = {
    "C0": "The row",
    "C1": "The text",
    "C2": "Pictures and videos",
    "C3": "Boxes",
    "C4": "Length",
    "C5": "Duplicates and leaks",
    "C6": "Learning",
}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _example(text: str) -> str:
    """As code if it is a piece of a row, else as it is."""
    return f"`` {_cell(text)} ``" if any(c in text for c in '"<[{') else _cell(text)


def _prose(text: str) -> str:
    """Tags in prose are code: Markdown would take them for HTML."""
    words = [f"`{w}`" if w.startswith("<") and "`" not in w else w for w in _cell(text).split(" ")]
    return " ".join(words)


def table() -> str:
    """A table for each group."""
    lines: list[str] = []
    for group, title in GROUPS.items():
        lines += [
            f"### {title}",
            "",
            "| code | rule | severity | finds | example | remedy |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {one.code} | {one.name} | {one.severity} | {_prose(one.says)} | {_example(one.example)} "
            f"| {_prose(one.remedy)} |"
            for one in all_rules()
            if one.code.startswith(group)
        ]
        lines.append("")
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
