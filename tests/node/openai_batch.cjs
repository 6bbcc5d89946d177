// Runs one batch with openai-node: upload, create, poll, download. Arguments: base URL, key, input file. Prints one JSON object.
"use strict";
const fs = require("node:fs");
const { setTimeout: sleep } = require("node:timers/promises");
const { OpenAI } = require("openai");

const ENDED = new Set(["completed", "failed", "cancelled", "expired"]);

async function main([baseURL, apiKey, path]) {
  const client = new OpenAI({ baseURL, apiKey });
  const file = await client.files.create({ file: fs.createReadStream(path), purpose: "batch" });
  const created = await client.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/chat/completions",
    completion_window: "24h",
  });
  let batch = created;
  while (!ENDED.has(batch.status)) {
    await sleep(100);
    batch = await client.batches.retrieve(created.id);
  }
  const lines = async (id) => (id ? (await (await client.files.content(id)).text()).split("\n").filter(Boolean) : []);
  const listed = [];
  for await (const one of client.batches.list({ limit: 1 })) listed.push(one.id);
  process.stdout.write(
    JSON.stringify({
      created: created.status,
      batch,
      output: (await lines(batch.output_file_id)).map(JSON.parse),
      errors: (await lines(batch.error_file_id)).map(JSON.parse),
      listed,
    }),
  );
}

main(process.argv.slice(2)).catch((error) => {
  process.stderr.write(`${error.stack}\n`);
  process.exitCode = 1;
});
