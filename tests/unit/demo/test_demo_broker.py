import importlib.util
import sys
import tempfile
from pathlib import Path

import pytest

from streamworker.demo.broker import EmbeddedBroker, find_binary
from streamworker.demo.child import accepts


@pytest.mark.embedded
@pytest.mark.skipif(importlib.util.find_spec("noida_db") is None, reason="needs the demo extra")
def test_embedded_broker_listens_and_removes_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with EmbeddedBroker() as running:
        host, port = running.bootstrap.split(":")
        assert accepts(int(port), host)
        assert list(tmp_path.iterdir())
    assert not accepts(int(port), host)
    assert not list(tmp_path.iterdir())
    running.stop()


def test_embedded_broker_without_the_extra_raises_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "noida_db", None)
    with pytest.raises(RuntimeError, match=r"pip install 'streamworker\[demo\]'"):
        find_binary()
