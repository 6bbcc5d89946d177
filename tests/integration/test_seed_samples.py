"""Programs as providers print them for a streaming endpoint, run on the gateway with nothing changed but the base URL."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from streamworker.practice import PracticeUpstream, expected_text
from tests.brokers.requirement import need
from tests.integration.gateways import KEY, gateway, open_keys
from tests.integration.stage import Stage
from tests.node import node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.brokers.apache import ApacheKafka

pytestmark = pytest.mark.asyncio(loop_scope="module")

BASE = "https://api.siati.ai/v1"
[TEXT] = expected_text("apertus-70b-instruct", [{"role": "user", "content": "Conta da 1 a 10."}])

CURL = r"""
curl -N https://api.siati.ai/v1/chat/completions \
-H "Authorization: Bearer $SIATI_API_KEY" \
-H "Content-Type: application/json" \
-d '{
"model": "apertus-70b-instruct",
"stream": true,
"stream_options": {"include_usage": true},
"messages": [{"role": "user", "content": "Conta da 1 a 10."}]
}'
"""

PYTHON = """
from openai import OpenAI
import os
client = OpenAI(
    base_url="https://api.siati.ai/v1",
    api_key=os.environ["SIATI_API_KEY"],
)
stream = client.chat.completions.create(
    model="apertus-70b-instruct",
    messages=[{"role": "user", "content": "Conta da 1 a 10."}],
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    delta = chunk.choices[0].delta.content
    if delta:
        print(delta, end="", flush=True)
"""

# TypeScript: `res.body!` is JavaScript without the mark, and `return` needs a function around it.
TYPESCRIPT = r"""
const res = await fetch("https://api.siati.ai/v1/chat/completions", {
  method: "POST",
  headers: {
    "Authorization": `Bearer ${process.env.SIATI_API_KEY}`,
    "Content-Type": "application/json",
  },
  body: JSON.stringify({
    model: "apertus-70b-instruct",
    stream: true,
    messages: [{ role: "user", content: "Conta da 1 a 10." }],
  }),
});
const reader = res.body!.getReader();
const decoder = new TextDecoder();
let buf = "";
while (true) {
  const { value, done } = await reader.read();
  if (done) break;
  buf += decoder.decode(value, { stream: true });
  for (const line of buf.split("\n")) {
    if (!line.startsWith("data: ")) continue;
    const data = line.slice(6).trim();
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    const delta = chunk.choices?.[0]?.delta?.content;
    if (delta) process.stdout.write(delta);
  }
  buf = buf.split("\n").pop() || "";
}
"""


PAGE = (Path(__file__).parents[2] / "docs" / "openai.md").read_text()


def printed(language: str, base: str) -> str:
    """Return the program of docs/openai.md in this language, for this base URL and key."""
    [code] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(code).replace("http://localhost:8088/v1", base).replace("swk_...", KEY)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bases(
    apache_kafka: ApacheKafka, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, str]]:
    """Base URLs of two gateways, by `gateway.chat_usage`."""
    directory = tmp_path_factory.mktemp("samples")
    async with (
        PracticeUpstream() as practice,
        Stage(
            apache_kafka, practice, lambda name: f"samples.{name}.{secrets.token_hex(4)}", directory
        ) as stage,
    ):
        open_keys(stage, directory)
        await stage.open()
        async with (
            stage.worker(),
            gateway(stage) as chunk,
            gateway(stage, gateway__chat_usage="finish") as finish,
        ):
            ports = {"chunk": chunk.port, "finish": finish.port}
            yield {place: f"http://127.0.0.1:{port}/v1" for place, port in ports.items()}


async def run(*command: str) -> tuple[int | None, str, str]:
    """Run a program; return its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, "SIATI_API_KEY": KEY, "STREAMWORKER_KEY": KEY},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("place", ["chunk", "finish"])
async def test_curl_sample_prints_the_stream(bases: dict[str, str], place: str) -> None:
    """Event by event, to `[DONE]`, with the usage."""
    if shutil.which("curl") is None:
        need("curl is not on the PATH")
    code, out, _ = await run("sh", "-c", CURL.replace(BASE, bases[place]))

    assert code == 0
    assert out.endswith("data: [DONE]\n\n")
    assert '"usage":{"prompt_tokens"' in out


async def test_python_sample_prints_the_text(bases: dict[str, str]) -> None:
    """It takes `choices[0]` of every chunk, so the usage has to be on the finish chunk."""
    code, out, err = await run(sys.executable, "-c", PYTHON.replace(BASE, bases["finish"]))

    assert (code, out) == (0, TEXT), err


async def test_python_sample_prints_the_text_and_fails_on_openais_own_usage_chunk(
    bases: dict[str, str],
) -> None:
    """With `chat_usage = "chunk"` it fails as it does on OpenAI's API: that chunk has no choices."""
    code, out, err = await run(sys.executable, "-c", PYTHON.replace(BASE, bases["chunk"]))

    assert (code, out) == (1, TEXT)
    assert "IndexError" in err


@pytest.mark.parametrize("place", ["chunk", "finish"])
async def test_typescript_sample_prints_the_text(bases: dict[str, str], tmp_path: Path, place: str) -> None:
    """It parses each line of each read on its own."""
    code = TYPESCRIPT.replace(BASE, bases[place]).replace("res.body!", "res.body")
    file = tmp_path / "sample.cjs"
    file.write_text(f"(async () => {{{code}}})();")
    exit_code, out, err = await run(node(), str(file))

    assert (exit_code, out) == (0, TEXT), err


@pytest.mark.parametrize("place", ["chunk", "finish"])
async def test_python_program_of_the_docs_prints_the_text(bases: dict[str, str], place: str) -> None:
    """It has at most ten lines, and runs as printed."""
    code = printed("python", bases[place])
    exit_code, out, err = await run(sys.executable, "-c", code)

    assert (exit_code, out) == (0, TEXT), err
    assert len([line for line in code.splitlines() if line]) <= 10


async def test_curl_command_of_the_docs_prints_the_stream(bases: dict[str, str]) -> None:
    """To its end."""
    if shutil.which("curl") is None:
        need("curl is not on the PATH")
    code, out, _ = await run("sh", "-c", printed("sh", bases["chunk"]))

    assert code == 0
    assert out.endswith("data: [DONE]\n\n")
