"""Work as a reproducible number: executed bytecodes, and bytes that methods of `bytes` read."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

# Methods that read or copy their whole object; `startswith` and the like do not.
_WHOLE = frozenset({"decode", "lstrip", "partition", "removeprefix", "replace", "rstrip", "split", "strip"})


def work_of(action: Callable[[], object]) -> int:
    """Run the action and return the work. Unlike time it does not depend on the machine."""
    work = 0

    def on_opcode(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal work
        frame.f_trace_opcodes = True
        work += event == "opcode"
        return on_opcode

    def on_call(_frame: FrameType, event: str, function: Any) -> None:
        nonlocal work
        if (
            event == "c_call"
            and type(getattr(function, "__self__", None)) is bytes
            and function.__name__ in _WHOLE
        ):
            work += len(function.__self__)

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(on_opcode)
    sys.setprofile(on_call)
    try:
        action()
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    return work
