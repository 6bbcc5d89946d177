// Reading deltas of many providers.
import assert from "node:assert/strict";
import { test } from "node:test";
import { split } from "../page/delta.js";

const none = { text: "", reasoning: "", refusal: "", calls: [] };
const cases = {
	"content": [{ role: "assistant", content: "Hi" }, { text: "Hi" }],
	"empty delta": [{}, {}],
	"null members": [{ content: null, reasoning: null, refusal: null, tool_calls: null, function_call: null }, {}],
	"members of other types": [{ content: 7, refusal: {}, tool_calls: "x", reasoning_details: 3 }, {}],
	"parts of content": [{ content: [{ type: "text", text: "a" }, null, "b", { type: "text", text: "c" }] }, { text: "ac" }],
	"thinking parts": [{ content: [{ thinking: "x" }, { thinking: [{ text: "y" }, 5] }] }, { reasoning: "xy" }],
	"reasoning_content": [{ reasoning_content: "r" }, { reasoning: "r" }],
	"reasoning": [{ reasoning: "r" }, { reasoning: "r" }],
	"reasoning under both names": [{ reasoning_content: "r", reasoning: "r" }, { reasoning: "r" }],
	"reasoning_details": [{ reasoning_details: [{ text: "a" }, { summary: "b" }, {}] }, { reasoning: "ab" }],
	"refusal": [{ refusal: "no" }, { refusal: "no" }],
	"function": [{ tool_calls: [{ index: 2, function: { name: "f", arguments: "{}" } }] }, { calls: [{ index: 2, name: "f", input: "{}" }] }],
	"no index": [{ tool_calls: [{ function: { name: "f" } }, { function: { name: "g" } }] }, { calls: [{ index: 0, name: "f", input: "" }, { index: 1, name: "g", input: "" }] }],
	"custom tool": [{ tool_calls: [{ index: 0, custom: { name: "sql", input: "select" } }] }, { calls: [{ index: 0, name: "sql", input: "select" }] }],
	"call without content": [{ tool_calls: [{ index: 0 }] }, { calls: [{ index: 0, name: "", input: "" }] }],
	"function_call": [{ function_call: { name: "f", arguments: "{" } }, { calls: [{ index: 0, name: "f", input: "{" }] }],
};

for (const [name, [delta, expected]] of Object.entries(cases)) {
	test(`split reads ${name}`, () => assert.deepEqual(split(delta), { ...none, ...expected }));
}
