// The caller's identity: the key in memory, the token in the tab's storage.
import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

globalThis.document = { baseURI: "https://here.example/live/#job=x" };
const { Identity, address, errorOf } = await import("../page/api.js");

let saved, calls, answer, timers;
const store = { token: () => saved, saveToken: (token) => (saved = token) };

beforeEach(() => {
	[saved, calls, timers] = [null, [], []];
	answer = () => Response.json({ token: "t1", expires_at: new Date(Date.now() + 600_000).toISOString() }, { status: 201 });
	globalThis.fetch = async (url, options) => (calls.push({ url: String(url), ...options }), answer());
	globalThis.setTimeout = (act, ms) => timers.push(ms);
	globalThis.clearTimeout = () => {};
});

test("addresses are relative to the page", () => {
	assert.equal(String(address("v1/models")), "https://here.example/live/v1/models");
	assert.equal(String(address("v1/ws", "ws")), "wss://here.example/live/v1/ws");
});

test("a key is sent as a header, and is not stored", async () => {
	const identity = new Identity(store, 0);
	identity.use("swk_1");
	await identity.get("v1/models");
	assert.equal(calls[0].headers.authorization, "Bearer swk_1");
	assert.deepEqual([identity.hasKey, identity.canSend, saved], [true, true, null]);
});

test("a saved token identifies after a reload, for reading", async () => {
	saved = { token: "t0", expiresAt: 9e15 };
	const identity = new Identity(store, 0);
	assert.deepEqual([identity.credential(), identity.token(), identity.canSend], ["t0", "t0", false]);
});

test("a read token is asked for the jobs of the page and renewed before it expires", async () => {
	const identity = new Identity(store, 0);
	identity.use("swk_1");
	await identity.renew(() => ["acme.1"]);
	assert.deepEqual(JSON.parse(calls[0].body), { jobs: ["acme.1"], scope: "read cancel", ttl_s: 3600 });
	assert.equal(saved.token, "t1");
	assert.deepEqual([identity.credential(), identity.token()], ["swk_1", "t1"]);
	assert.ok(timers[0] > 400_000 && timers[0] <= 480_000, timers);
});

test("a time in RFC 3339 is understood", async () => {
	answer = () => Response.json({ token: "t1", expires_at: "2100-01-01T00:00:00Z" }, { status: 201 });
	const identity = new Identity(store, 0);
	identity.use("swk_1");
	await identity.renew(() => ["j"]);
	assert.equal(saved.expiresAt, Date.parse("2100-01-01T00:00:00Z"));
});

test("no token is asked for without a key or without jobs", async () => {
	const identity = new Identity(store, 0);
	await identity.renew(() => ["j"]);
	identity.use("swk_1");
	await identity.renew(() => []);
	assert.deepEqual(calls, []);
});

test("where a token may not live an hour, it lives as long as the gateway likes", async () => {
	const created = answer;
	answer = () => {
		if (calls.length > 1) return created();
		return Response.json({ error: { code: "invalid_request" } }, { status: 400 });
	};
	const identity = new Identity(store, 0);
	identity.use("swk_1");
	await identity.renew(() => ["j"]);
	assert.deepEqual(calls.map(({ body }) => JSON.parse(body).ttl_s), [3600, undefined]);
	assert.equal(saved.token, "t1");
});

test("a key without the right to tokens, and a gateway that is away, leave the page as it is", async () => {
	const identity = new Identity(store, 0);
	identity.use("swk_1");
	for (const refusal of [() => Response.json({}, { status: 403 }), () => Promise.reject(new TypeError("away"))]) {
		answer = refusal;
		await identity.renew(() => ["j"]);
		assert.deepEqual([saved, identity.credential()], [null, "swk_1"]);
	}
});

test("forgetting removes key and token", async () => {
	saved = { token: "t0", expiresAt: 9e15 };
	const identity = new Identity(store, 0);
	identity.use("swk_1");
	identity.forget();
	assert.deepEqual([identity.credential(), identity.hasKey, saved], [null, false, null]);
});

test("an error without a body names the status", async () => {
	assert.deepEqual(await errorOf(Response.json({ error: { code: "x", message: "m" } })), { code: "x", message: "m" });
	assert.equal((await errorOf(new Response("<html>", { status: 502 }))).code, "502");
	assert.match((await errorOf(Response.json({}, { status: 418 }))).message, /418/);
});
