// What survives a reload.
import assert from "node:assert/strict";
import { test } from "node:test";
import { newJob } from "../page/job.js";
import { Store, claims } from "../page/store.js";

function memory(limit = Infinity) {
	const kept = new Map();
	return {
		kept,
		sessionStorage: {
			getItem: (name) => kept.get(name) ?? null,
			setItem: (name, value) => {
				if (value.length > limit) throw new Error("QuotaExceededError");
				kept.set(name, value);
			},
			removeItem: (name) => kept.delete(name),
		},
	};
}
const job = (jobId, more = {}) => newJob({ key: "k", jobId, at: 1, ...more });

test("jobs come back with what finds their events", () => {
	const browser = memory();
	const saved = job("acme.1", { model: "m", prompt: "p", place: "3.7.w", attempt: "a", attempts: 2 });
	new Store(browser).saveJobs([saved]);
	const [found] = new Store(browser).jobs();
	assert.deepEqual(found, { jobId: "acme.1", model: "m", prompt: "p", at: 1, place: "3.7.w", attempt: "a", attempts: 2 });
	assert.equal(newJob(found).state, "waiting");
});

test("jobs without an id and unknown jobs are not kept, and the newest 200 are", () => {
	const store = new Store(memory());
	store.saveJobs([newJob({ at: 0 }), job("gone", { error: { code: "job_not_found" } })]);
	assert.deepEqual(store.jobs(), []);
	store.saveJobs(Array.from({ length: 250 }, (_, n) => job(`j${n}`)));
	assert.equal(store.jobs().length, 200);
	assert.equal(store.jobs()[0].jobId, "j50");
});

test("long prompts are cut", () => {
	const store = new Store(memory());
	store.saveJobs([job("j", { prompt: "x".repeat(9999) })]);
	assert.equal(store.jobs()[0].prompt.length, 200);
	store.saveJobs([job("j", { prompt: "x".repeat(199) + "🌈".repeat(9) })]);
	assert.equal(store.jobs()[0].prompt, "x".repeat(199));
	store.saveJobs([job("j", { prompt: "🌈".repeat(100) })]);
	assert.equal(store.jobs()[0].prompt, "🌈".repeat(100));
});

test("a token is valid until it expires", () => {
	const store = new Store(memory());
	store.saveToken({ token: "t", expiresAt: 2000 });
	assert.equal(store.token(1999).token, "t");
	assert.equal(store.token(2000), null);
	store.saveToken(null);
	assert.equal(store.token(0), null);
});

const broken = ["{", "null", "7", '"x"', "[1, null, {}]", '{"token": 5, "expiresAt": 9}'];
for (const text of broken) {
	test(`storage with ${text} is ignored`, () => {
		const browser = memory();
		for (const name of ["streamworker.jobs", "streamworker.token"]) browser.kept.set(name, text);
		const store = new Store(browser);
		assert.deepEqual(store.jobs(), []);
		assert.equal(store.token(0), null);
	});
}

test("a browser that blocks storage, and a full one, cost the reload only", () => {
	const blocked = { get sessionStorage() { throw new Error("SecurityError"); } };
	for (const browser of [blocked, memory(10)]) {
		const store = new Store(browser);
		store.saveJobs([job("j1")]);
		assert.deepEqual(store.jobs(), []);
	}
});

test("a token names the ids themselves while there are few", () => {
	assert.deepEqual(claims(["b", "a", "b"]), ["b", "a"]);
	assert.equal(claims(Array.from({ length: 64 }, (_, n) => `j${n}`)).length, 64);
});

test("a token for many jobs has one prefix per tenant, and covers every job", () => {
	const ids = Array.from({ length: 100 }, (_, n) => `acme.0199f3c2-${1000 + n}`).concat(["beta.7", "0199f3"]);
	const prefixes = claims(ids);
	assert.deepEqual(prefixes, ["acme.0199f3c2-10*", "beta.7*", "0199f3*"]);
	for (const id of ids) assert.ok(prefixes.some((prefix) => id.startsWith(prefix.slice(0, -1))));
});

test("a prefix of a tenant contains its dot", () => {
	const ids = Array.from({ length: 70 }, (_, n) => `acme.${String.fromCharCode(48 + n)}`);
	assert.deepEqual(claims(ids), ["acme.*"]);
});
