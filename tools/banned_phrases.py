"""Find phrases that the language rules of CONTRIBUTING.md ban, in code and docs. `make lint` runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).parent.parent

SKIPPED = (
    "CHANGELOG.md",  # lists old names
    "LICENSE",
    "benchmarks/figures.json",
    "docs/glossary.md",  # lists old words
    "requirements/",
    "tests/unit/test_banned_phrases.py",
    "tools/banned_phrases.py",
)
"""Prefixes of the paths that are not checked."""

BANNED = {
    r"(?<!there )\b(?:is|are|was|were) no (?!longer|more|less|fewer|later|earlier|greater)\w+": "is not a valid X",
    r"\b(?:whoever|those who|(?:for|of|by|to|from) who|who is|nobody|somebody|anybody)\b": "name the subject",
    r"\b(?:what|that) is ours\b|\bof ours\b": "name it",
    r"\b(?:what came|came to|what lies|what is left)\b": "name it",
    r"\bso many\b|\bso long after\b|\bso-manieth\b": "name the number",
    r"(?<!same )\bas (?:above|below)\b": "repeat it",
    r"\blet(?:s|ting)? go\b": "release, return",
    r"\b(?:take|takes|taken|took|taking) up\b(?! to)": "fetch, accept, start",
    r"\bhand(?:s|ed|ing)? (?:back|on|over|out)\b": "return, pass, assign",
    r"\b(?:hears?|heard)\b": "is notified, receives",
    r"\bthought (?:dead|alive)\b": "its circuit is open",
    r"\bcall(?:s|ing)? its members together\b": "rebalances",
    r"\b(?:tell|tells|told|telling) of\b|\b(?:is|are|be|was) told\b|\btells\b": "report, log",
    r"\bgo(?:es)? round\b|\bwent round\b": "iterate",
    r"\bpass(?:es|ed)? over\b": "skip, ignore",
    r"\bmend(?:s|ed|ing)?\b": "repair, fix",
    r"\bin peace\b|\blast words?\b|\bknows better\b": "plain words",
    r"\b(?:turnstile|errand|patience|lane|lanes|so to speak)\b": "the name of the class",
    r"\bhas to be (?:a|an|one)\b": "must be",
    r"contract(?:'s)? §|\bwire facts\b|\b(?:house|wire|pitfalls|style|contract)\.md\b": "cite docs/, an RFC or a KIP",
    r'"""(?:Nothing|Keep it|Hand on)\.?"""': "delete it",
}
"""Regular expressions for phrases, and what to write in their place."""

_DEFINITION = re.compile(r"\s*(?:async )?def ")
_PATTERNS = [(re.compile(phrase, re.IGNORECASE), advice) for phrase, advice in BANNED.items()]


def find(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line number, the phrase and the advice for each banned phrase, also in the name of a function."""
    for number, line in enumerate(text.splitlines(), 1):
        words = line.replace("_", " ") if _DEFINITION.match(line) else line
        for pattern, advice in _PATTERNS:
            for found in pattern.finditer(words):
                yield number, found[0], advice


def checked_files(prefixes: Iterable[str] = ("",)) -> list[Path]:
    """Return the text files of the repository below the prefixes, as paths relative to its root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: S607
    names = [name for name in listed.stdout.splitlines() if name.startswith(tuple(prefixes))]
    return [Path(name) for name in names if not name.startswith(SKIPPED) and (ROOT / name).is_file()]


def main() -> int:
    """Print every banned phrase as path:line; return 1 if there is one. Arguments are prefixes of the paths to check."""
    faults = [
        f"{path}:{number}: {phrase!r}: {advice}"
        for path in checked_files(sys.argv[1:] or [""])
        for number, phrase, advice in find((ROOT / path).read_text("utf-8", "replace"))
    ]
    print(*faults, sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
