// The state of a job: the rules for readers of the event stream.
import assert from "node:assert/strict";
import { test } from "node:test";
import { MAX_CHARACTERS, TRANSITIONS, isOver, newJob, reduce } from "../page/job.js";

const started = (attempt = "a", more = {}) => ({ type: "started", attempt, seq: 0, ts: 1000, model: "m", cause: "new", ...more });
const delta = (seq, content, attempt = "a", more = {}) => ({
	type: "delta", attempt, seq, ts: 1000 + seq, choice: 0, delta: { content }, finish_reason: null, ...more,
});
const usage = (seq, attempt = "a", more = {}) => ({ type: "usage", attempt, seq, status: "completed", usage_source: "upstream", ...more });
const submitted = { type: "submitted", job_id: "j1", cursor: "3.7.w" };

const play = (inputs, job = newJob({ key: "k", at: 500 })) => inputs.reduce((state, input) => reduce(state, input), job);
const text = (job) => job.choices.map((choice) => choice.text);

test("a job is sent, waits, runs and ends", () => {
	const states = [];
	let job = newJob({ key: "k", at: 500 });
	for (const input of [null, submitted, started(), delta(1, "Hi"), usage(2)]) {
		if (input) job = reduce(job, input);
		states.push(job.state);
	}
	assert.deepEqual(states, ["sending", "waiting", "running", "running", "ended"]);
	assert.equal(job.jobId, "j1");
	assert.equal(job.place, "3.7.w");
	assert.deepEqual(text(job), ["Hi"]);
});

test("a job with an id is looked up", () => {
	assert.equal(newJob({ jobId: "j1", at: 0 }).state, "waiting");
	assert.equal(newJob({ at: 0 }).state, "sending");
});

test("the text is the concatenation of the deltas, by choice, in the order of the choices", () => {
	const job = play([submitted, started(), delta(1, "b", "a", { choice: 1 }), delta(2, "a"), delta(3, "B", "a", { choice: 1 })]);
	assert.deepEqual(job.choices.map((choice) => [choice.index, choice.text]), [[0, "a"], [1, "bB"]]);
	assert.equal(job.deltas, 3);
});

test("a started event voids the text and counts the attempt", () => {
	const job = play([submitted, started(), delta(1, "old"), started("b", { cause: "redelivered" }), delta(1, "new", "b")]);
	assert.deepEqual(text(job), ["new"]);
	assert.deepEqual([job.attempts, job.cause, job.generation, job.deltas], [2, "redelivered", 2, 1]);
});

test("a started event of the same attempt does not count again", () => {
	const job = play([started()], newJob({ jobId: "j1", at: 0, attempt: "a", attempts: 2 }));
	assert.equal(job.attempts, 2);
});

test("deltas and endings of a former attempt are ignored", () => {
	const before = play([submitted, started("b"), delta(1, "x", "b")]);
	for (const stale of [delta(2, "y", "a"), usage(9, "a")]) assert.equal(reduce(before, stale), before);
});

test("events that come twice are ignored", () => {
	const before = play([submitted, started(), delta(1, "x"), delta(2, "y")]);
	for (const again of [delta(1, "x"), delta(2, "y"), usage(2)]) assert.equal(reduce(before, again), before);
});

test("a snapshot replaces the text, and deltas go on behind it", () => {
	const snapshot = {
		type: "snapshot", attempt: "a", seq: 5,
		choices: [{ choice: 0, message: { role: "assistant", content: "one two", reasoning_content: "why" }, finish_reason: null }],
	};
	const job = play([submitted, started(), delta(1, "zzz"), snapshot, delta(5, "no"), delta(6, " three")]);
	assert.deepEqual(text(job), ["one two three"]);
	assert.equal(job.choices[0].reasoning, "why");
	assert.equal(job.generation, 2);
	assert.equal(job.attempts, 1);
});

test("a snapshot of another attempt counts the attempt", () => {
	const job = play([{ type: "snapshot", attempt: "b", seq: 3, choices: [] }], newJob({ jobId: "j", at: 0, attempt: "a", attempts: 1 }));
	assert.equal(job.attempts, 2);
	assert.equal(job.activity, null);
});

test("an ended job stays as it is", () => {
	const ended = play([submitted, started(), usage(1)]);
	for (const input of [started("b"), delta(2, "x"), usage(3), submitted, { type: "refused", error: {} }, { type: "cancelling" }]) {
		assert.equal(reduce(ended, input), ended);
	}
});

test("names that the page does not know are ignored in every state", () => {
	for (const state of Object.keys(TRANSITIONS)) {
		const job = { ...newJob({ at: 0 }), state };
		assert.equal(reduce(job, { type: "position" }), job);
		assert.equal(reduce(job, { type: "progress", attempt: "a", seq: 1 }), job);
	}
});

test("an ending may come before any start", () => {
	const job = play([submitted, usage(0, "a", { status: "expired" })]);
	assert.equal(job.state, "ended");
	assert.equal(job.ending.status, "expired");
});

test("a refused job can be tried again, an ended one cannot", () => {
	const refused = play([submitted, { type: "refused", error: { code: "job_not_found" } }]);
	assert.deepEqual([refused.state, refused.error.code, isOver(refused)], ["refused", "job_not_found", true]);
	const again = reduce(refused, { type: "retried" });
	assert.deepEqual([again.state, again.error, isOver(again)], ["waiting", null, false]);
	assert.equal(TRANSITIONS.ended.retried, undefined);
});

test("cancelling is shown until the ending comes", () => {
	const job = play([submitted, started(), { type: "cancelling" }]);
	assert.equal(job.isCancelling, true);
	assert.equal(reduce(job, usage(1, "a", { status: "cancelled" })).isCancelling, false);
});

test("the cursor follows the events", () => {
	let job = newJob({ jobId: "j", at: 0 });
	job = reduce(job, started(), "7.1.0.ff");
	assert.equal(job.cursor, "7.1.0.ff");
	job = reduce(job, { type: "live" });
	assert.deepEqual([job.cursor, job.isLive], ["7.1.0.ff", true]);
});

test("time to the first delta is the worker's, and the ending corrects it", () => {
	const job = play([submitted, started(), delta(1, "x"), delta(2, "y")]);
	assert.equal(job.firstDeltaMs, 1);
	assert.equal(reduce(job, usage(3, "a", { timing: { first_delta: 312 } })).firstDeltaMs, 312);
	assert.equal(play([submitted, started("a", { ts: 9999 }), delta(1, "x")]).firstDeltaMs, 0);
});

test("deltas without a choice count, and change no text", () => {
	const job = play([submitted, started(), delta(1, "x"), { ...delta(2, ""), choice: null, delta: {}, extra: {} }]);
	assert.deepEqual([job.seq, job.deltas, text(job)], [2, 2, ["x"]]);
});

test("the activity is that of the last delta that had any", () => {
	const call = { tool_calls: [{ index: 0, function: { name: "f", arguments: "{" } }] };
	const steps = [[{ role: "assistant" }, null], [{ reasoning: "hm" }, "reasoning"], [{ content: "x" }, "text"], [call, "call"], [{}, "call"], [{ refusal: "no" }, "text"]];
	let job = play([submitted, started()]);
	steps.forEach(([inner, activity], n) => {
		job = reduce(job, { ...delta(n + 1), delta: inner });
		assert.equal(job.activity, activity);
	});
});

test("fragments of tool calls are joined by their index", () => {
	const call = (index, name, args) => ({ tool_calls: [{ index, function: { name, arguments: args } }] });
	const inputs = [call(0, "f", '{"a"'), call(1, "g", "[]"), call(0, undefined, ": 1}")].map((inner, n) => ({ ...delta(n + 1), delta: inner }));
	const job = play([submitted, started(), ...inputs]);
	assert.deepEqual(job.choices[0].calls, [{ index: 0, name: "f", input: '{"a": 1}' }, { index: 1, name: "g", input: "[]" }]);
});

test("the text of one job is bounded", () => {
	const half = "x".repeat(MAX_CHARACTERS / 2);
	const job = play([submitted, started(), delta(1, half), delta(2, half), delta(3, "more"), usage(4)]);
	assert.equal(job.choices[0].text.length, MAX_CHARACTERS);
	assert.equal(job.deltas, 3);
	assert.equal(job.state, "ended");
});

test("no input changes the job that it is applied to", () => {
	const freeze = (value) => {
		if (value && typeof value === "object") Object.values(Object.freeze(value)).forEach(freeze);
		return value;
	};
	let job = freeze(newJob({ key: "k", at: 0 }));
	for (const input of [submitted, started(), delta(1, "a"), delta(2, "b"), started("b"), delta(1, "c", "b"), usage(2, "b")]) {
		job = freeze(reduce(job, input));
	}
	assert.equal(job.state, "ended");
});
