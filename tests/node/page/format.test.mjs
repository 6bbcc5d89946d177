// Words and numbers.
import assert from "node:assert/strict";
import { test } from "node:test";
import * as format from "../page/format.js";
import { newJob } from "../page/job.js";

const job = (members) => ({ ...newJob({ jobId: "0199f3c2-7a10-7c3e-9f00-0000000000c8", at: 1000 }), ...members });
const ended = (status, error = null, more = {}) => job({ state: "ended", ending: { status, error, usage_source: "none", usage: null, ...more } });

const words = [
	["sending", job({ state: "sending" }), "Sending", "wait", /^$/],
	["waiting", job({}), "Waiting", "wait", /Waiting for a worker/],
	["waiting for long", job({ at: -60_000 }), "Waiting", "wait", /upstream is held: it refuses the key/],
	["started", job({ state: "running" }), "Started", "run", /first token/],
	["reasoning", job({ state: "running", activity: "reasoning" }), "Reasoning", "run", /^$/],
	["streaming", job({ state: "running", activity: "text" }), "Streaming", "run", /^$/],
	["tool call", job({ state: "running", activity: "call" }), "Calling a tool", "run", /^$/],
	["cancelling", job({ state: "running", isCancelling: true }), "Cancelling", "off", /^$/],
	["completed", ended("completed"), "Completed", "done", /^$/],
	["interrupted", ended("interrupted", { code: "truncated" }), "Interrupted", "broken", /text above is kept/],
	["failed", ended("failed", { code: "upstream_rejected" }), "Failed", "failed", /^$/],
	["held key", ended("failed", { code: "auth" }), "Failed", "failed", /^The upstream refuses the worker's key\.$/],
	["held account", ended("expired", { code: "quota" }), "Expired", "off", /^The upstream account is empty\.$/],
	["held rate", ended("failed", { code: "rate_limited" }), "Failed", "failed", /^The upstream limits the rate/],
	["rejected", ended("rejected", { code: "invalid_job" }), "Rejected", "failed", /^$/],
	["cancelled", ended("cancelled", { code: "cancelled" }), "Cancelled", "off", /^$/],
	["expired", ended("expired", { code: "deadline" }), "Expired", "off", /deadline/],
	["a status of a later version", ended("paused"), "paused", "off", /^$/],
	["unknown job", job({ state: "refused", error: { code: "job_not_found", message: "not since 2:00" } }), "Unknown job", "off", /id is wrong/],
	["lost cursor", job({ state: "refused", error: { code: "cursor_lost", message: "gone" } }), "No longer stored", "off", /^$/],
	["refused", job({ state: "refused", error: { code: "invalid_job", message: "model is missing" } }), "Refused", "failed", /^$/],
	["not confirmed", job({ state: "refused", jobId: null, error: { code: "unconfirmed" } }), "Not confirmed", "off", /may run all the same/],
	["refused without a reason", job({ state: "refused" }), "Refused", "failed", /no reason/],
];
for (const [name, state, word, tone, detail] of words) {
	test(`describe has a word for ${name}`, () => {
		const said = format.describe(state, 2000);
		assert.deepEqual([said.word, said.tone], [word, tone]);
		assert.match(said.detail, detail);
	});
}

test("a restart is explained by its cause", () => {
	assert.equal(format.restartNote({ attempts: 1, cause: "new" }), "");
	assert.equal(format.restartNote({ attempts: 2, cause: "redelivered" }), "Began again after a worker died: attempt 2");
	assert.equal(format.restartNote({ attempts: 3, cause: "restart" }), "Began again after the stream broke: attempt 3");
	assert.equal(format.restartNote({ attempts: 2, cause: null }), "Began again: attempt 2");
});

test("tokens have the word for their source, and unknown is not zero", () => {
	const usage = { completion_tokens: 1204 };
	assert.equal(format.tokens({ usage, usage_source: "upstream" }), "1,204 tokens reported");
	assert.equal(format.tokens({ usage: { completion_tokens: 1 }, usage_source: "upstream_partial" }), "1 token partial");
	assert.equal(format.tokens({ usage: { output_tokens: 7 }, usage_source: "estimated" }), "7 tokens estimated");
	assert.equal(format.tokens({ usage: null, usage_source: "none" }), "no tokens");
	assert.equal(format.tokens({ usage: {}, usage_source: "upstream" }), "tokens reported");
	assert.equal(format.tokens({ usage: { completion_tokens: 0 }, usage_source: "upstream" }), "0 tokens reported");
	assert.equal(format.sourceWord("later"), "later");
});

for (const [value, words] of [[0, "0"], [70.4, "70"], [9_999_999, "9,999,999"], [12_345_678, "12.3M"], [123_456_789_012, "123.5B"]]) {
	test(`number ${value}`, () => assert.equal(format.number(value), words));
}

const durations = [[0, "0 ms"], [312.4, "312 ms"], [999.4, "999 ms"], [999.6, "0.9 s"], [1000, "1.0 s"], [4249, "4.2 s"], [9999, "9.9 s"], [10_000, "10 s"], [59_999, "59 s"], [60_000, "1:00"], [185_000, "3:05"], [3_600_000, "1:00:00"], [36_610_000, "10:10:10"]];
for (const [ms, words] of durations) test(`duration ${ms}`, () => assert.equal(format.duration(ms), words));

test("elapsed never runs backwards below zero", () => assert.equal(format.elapsed(-5), "0.0 s"));

test("the age of an ended job is queue and attempt, of another the time since it was submitted", () => {
	assert.equal(format.age(job({}), 3500), 2500);
	assert.equal(format.age(ended("completed", null, { timing: { queued: 40, total: 4200 } }), 99_999), 4240);
	assert.equal(format.age(ended("completed", null, { timing: { queued: null, total: 4200 } }), 99_999), 4200);
	assert.equal(format.age(ended("rejected"), 3000), 2000);
});

test("short ids keep the end, where ids of one minute differ", () => {
	assert.equal(format.shortId("0199f3c2-7a10-7c3e-9f00-0000000000c8"), "…0000000000c8");
	assert.equal(format.shortId("count-1"), "count-1");
});

test("an announcement is one sentence each for state and tokens", () => {
	const done = ended("completed", null, { usage: { completion_tokens: 29 }, usage_source: "upstream" });
	assert.equal(format.announcement(done), "Job …0000000000c8 completed. 29 tokens reported.");
	assert.match(format.announcement(ended("failed", { code: "auth" })), /failed\. no tokens\. The upstream refuses/);
});
