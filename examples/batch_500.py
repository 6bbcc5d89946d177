"""Ask 500 questions with a batch file, and print the answers. Run it again after any interruption."""

import json
import subprocess
import sys
from pathlib import Path

MODEL = "apertus-70b-instruct"
requests = Path("questions.jsonl")
with requests.open("w") as file:
    for n in range(500):
        body = {"model": MODEL, "messages": [{"role": "user", "content": f"Quanto fa {n} per {n}?"}]}
        file.write(json.dumps({"custom_id": f"square-{n}", "body": body}) + "\n")

subprocess.run([sys.executable, "-m", "streamworker", "batch", requests, "--sort"], check=True)
for line in Path("questions.out.jsonl").read_text().split("\n")[:-1]:
    answer = json.loads(line)
    print(answer["custom_id"], answer["response"]["body"]["choices"][0]["message"]["content"])
