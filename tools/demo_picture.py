"""Run the demo in a terminal, and write its second act as docs/images/demo.svg."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.terminal import Terminal  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "demo.svg"
COLUMNS, LINES = 110, 32
LIMIT_S = 100.0
LATER = 12  # frames after the first panel that shows a second attempt, so that its text has begun
THEME = TerminalTheme(
    (13, 17, 23),
    (230, 237, 243),
    [
        *((72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34)),
        *((88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)),
    ],
)
FONT = 'ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace'
FORMAT = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<title>make demo: a worker is killed, and its jobs begin again on another one</title>
<style>.{unique_id}-matrix {{ font-family: FONT; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}</style>
<defs>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
""".replace("FONT", FONT)


def frames(raw: bytes) -> list[str]:
    """Return the frames that the demo drew on the alternate screen, as text with colours."""
    shown = raw.rpartition(b"\x1b[?1049l")[0].decode()
    return [re.sub(r"\x1b\[\??\d*[A-HJKlh]", "", frame) for frame in shown.split("\x1b[H")]


def picture(frame: str) -> str:
    """Return a frame as an SVG that loads no font."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in frame.replace("\r", "").split("\n"):
        console.print(Text.from_ansi(line), soft_wrap=True)
    return console.export_svg(title="make demo", theme=THEME, code_format=FORMAT, unique_id="demo")


def main() -> None:
    """Write the picture."""
    command = [sys.executable, "-m", "streamworker", "demo"]
    with Terminal(command, COLUMNS, LINES, environ={"COLORTERM": "truecolor"}, draws=False) as terminal:
        terminal.finish(LIMIT_S)
    drawn = frames(terminal.raw)
    first = next(number for number, frame in enumerate(drawn) if "attempt 2" in frame)
    frame = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:8088", drawn[first + LATER])
    PICTURE.write_text(picture(frame))
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
