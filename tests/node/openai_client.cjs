// Runs chat completions with openai-node, and responses where the body has `input`. Each line of standard input is a case, each line of standard output its outcome.
"use strict";
const readline = require("node:readline");
const { OpenAI } = require("openai");

async function ask({ base_url, api_key, body, max_retries = 0, timeout_s = 30, headers = {}, stop_after = null, abort_after_s = null }) {
  const client = new OpenAI({ baseURL: base_url, apiKey: api_key, maxRetries: max_retries, timeout: timeout_s * 1000 });
  const outcome = { texts: {}, calls: {}, finish: {}, usage: null, streamworker: null, chunks: 0, events: [], error: null };
  const gather = (choice, said) => {
    const at = String(choice.index);
    if (said.content) outcome.texts[at] = (outcome.texts[at] ?? "") + said.content;
    for (const [place, call] of (said.tool_calls ?? []).entries()) {
      const calls = (outcome.calls[at] ??= {});
      const one = (calls[String(call.index ?? place)] ??= { name: "", arguments: "" });
      one.name += call.function?.name ?? "";
      one.arguments += call.function?.arguments ?? "";
    }
    if (choice.finish_reason) outcome.finish[at] = choice.finish_reason;
  };
  const controller = new AbortController();
  if (abort_after_s !== null) setTimeout(() => controller.abort(), abort_after_s * 1000);
  try {
    if ("input" in body) {
      for await (const event of await client.responses.create(body)) outcome.events.push(event.type);
      return outcome;
    }
    const answer = await client.chat.completions.create(body, { headers, signal: controller.signal });
    for await (const chunk of body.stream ? answer : [answer]) {
      outcome.chunks += 1;
      for (const choice of chunk.choices ?? []) gather(choice, choice.delta ?? choice.message);
      outcome.usage = chunk.usage ?? outcome.usage;
      outcome.streamworker = chunk.streamworker ?? outcome.streamworker;
      if (stop_after !== null && outcome.chunks >= stop_after) break;
    }
  } catch (error) {
    outcome.error = { class: error.constructor.name, code: error.code ?? null, status: error.status ?? null };
  }
  return outcome;
}

async function main() {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const outcome = await ask(JSON.parse(line));
    process.stdout.write(JSON.stringify(outcome) + "\n");
  }
}

main();
