// The connection: its phases, and the websocket that follows them.
import assert from "node:assert/strict";
import { test } from "node:test";
import { PHASES, delay, describeLink, move, verdict } from "../page/link.js";
import { Link } from "../page/socket.js";

test("every input leads to a phase that exists, and every phase can be left", () => {
	for (const [phase, rows] of Object.entries(PHASES)) {
		for (const next of Object.values(rows)) assert.ok(next in PHASES, `${phase} -> ${next}`);
		assert.ok(Object.keys(rows).length > 0);
	}
	assert.equal(move("live", "connect"), "live");
});

const verdicts = {
	lost: [1000, 1001, 1005, 1006, 1011, 1012, 1013, 4408],
	expired: [4401],
	refused: [1008, 1009, 1010, 4400, 4403, 4429, 4999],
};
for (const [word, codes] of Object.entries(verdicts)) {
	for (const code of codes) test(`close code ${code} is ${word}`, () => assert.equal(verdict(code), word));
}

test("delays grow to a bound, and differ between pages", () => {
	assert.deepEqual([delay(0, 0), delay(0, 0.999), delay(1, 0)], [250, 500, 500]);
	assert.deepEqual([delay(5, 0), delay(50, 0), delay(1e9, 0.9999)], [7500, 7500, 14_999]);
});

const shown = [
	[{ phase: "live" }, 0, true, "Live", "done"],
	[{ phase: "live" }, 0, false, "Read only", "done"],
	[{ phase: "connecting" }, 0, true, "Connecting", "wait"],
	[{ phase: "connecting", tries: 2 }, 2400, true, "Reconnecting", "broken"],
	[{ phase: "pausing", tries: 1 }, 2400, true, "Reconnecting in 3 s", "broken"],
	[{ phase: "pausing", tries: 1 }, 100, true, "Reconnecting", "broken"],
	[{ phase: "offline" }, 0, true, "Offline", "off"],
	[{ phase: "expired", reason: "" }, 0, true, "Token expired", "broken"],
	[{ phase: "expired", reason: "wrong key" }, 0, true, "Not accepted", "failed"],
	[{ phase: "refused", reason: "" }, 0, true, "Refused", "failed"],
	[{ phase: "idle" }, 0, true, "No key", "off"],
];
for (const [state, leftMs, canSend, word, tone] of shown) {
	test(`the header says ${word}`, () => {
		const said = describeLink(state, leftMs, canSend);
		assert.deepEqual([said.word, said.tone], [word, tone]);
	});
}

test("the header names what to check when no connection succeeds", () => {
	assert.match(describeLink({ phase: "pausing", tries: 1 }, 0, true).detail, /continue where they stopped/);
	assert.equal(describeLink({ phase: "connecting", tries: 0 }, 0, true).detail, "");
	for (const tries of [1, 5]) {
		const details = ["pausing", "connecting"].map((phase) => describeLink({ phase, tries }, 0, true).detail);
		assert.equal(details[0], details[1]); // the words stay while it tries again
	}
	assert.match(describeLink({ phase: "pausing", tries: 4 }, 0, true).detail, /gateway\.cors_origins/);
});

/** A browser whose time stands still until `advance`, and whose sockets do what the test says. */
function fakeBrowser() {
	const browser = { now: 1000, sockets: [], timers: new Map(), next: 1 };
	browser.Date = { now: () => browser.now };
	browser.Math = { random: () => 0 };
	browser.setTimeout = (act, ms) => (browser.timers.set(browser.next, { act, at: browser.now + ms }), browser.next++);
	browser.setInterval = (act, ms) => (browser.timers.set(browser.next, { act, at: browser.now + ms, every: ms }), browser.next++);
	browser.clearTimeout = browser.clearInterval = (id) => browser.timers.delete(id);
	browser.advance = (ms) => {
		const end = browser.now + ms;
		for (;;) {
			const [id, timer] = [...browser.timers].filter(([, t]) => t.at <= end).sort((a, b) => a[1].at - b[1].at)[0] ?? [];
			if (timer === undefined) break;
			browser.now = timer.at;
			if (timer.every) timer.at += timer.every;
			else browser.timers.delete(id);
			timer.act();
		}
		browser.now = end;
	};
	browser.WebSocket = class {
		constructor(url, protocols) {
			Object.assign(this, { url, protocols, sent: [], isClosed: false });
			browser.sockets.push(this);
		}
		send(data) {
			this.sent.push(JSON.parse(data));
		}
		close() {
			this.isClosed = true;
		}
		receive(message) {
			this.onmessage({ data: JSON.stringify(message) });
		}
	};
	return browser;
}

function connected(credential = () => "swk_1") {
	const browser = fakeBrowser();
	const seen = { phases: [], messages: [], lives: 0 };
	const on = { phase: () => seen.phases.push(link.phase), live: () => (seen.lives += 1), message: (m) => seen.messages.push(m) };
	const link = new Link("ws://here/v1/ws", credential, on, browser);
	link.connect();
	return { browser, link, seen, socket: () => browser.sockets.at(-1) };
}

const welcome = (socket) => {
	socket.onopen();
	socket.receive({ type: "welcome" });
};

test("the credential is the first message, never part of the address", () => {
	const { socket, link, seen } = connected();
	assert.deepEqual([socket().url, socket().protocols], ["ws://here/v1/ws", ["streamworker.v1"]]);
	socket().onopen();
	assert.deepEqual(socket().sent, [{ type: "auth", token: "swk_1" }]);
	assert.equal(link.send({ type: "ping" }), false);
	socket().receive({ type: "welcome" });
	assert.deepEqual(seen.phases, ["connecting", "live"]);
	assert.equal(link.send({ type: "ping" }), true);
});

test("without a credential nothing is sent before the welcome", () => {
	const { socket } = connected(() => null);
	socket().onopen();
	assert.deepEqual(socket().sent, []);
});

test("a lost connection is opened again after a growing delay", () => {
	const { browser, link, socket } = connected();
	for (const wait of [250, 500, 1000]) {
		socket().onclose({ code: 1006, reason: "" });
		assert.equal(link.phase, "pausing");
		assert.equal(link.retryAt - browser.now, wait);
		const before = browser.sockets.length;
		browser.advance(wait - 1);
		assert.equal(browser.sockets.length, before);
		browser.advance(1);
		assert.equal(browser.sockets.length, before + 1);
	}
	welcome(socket());
	assert.equal(link.tries, 0);
});

test("the gateway's own delay wins", () => {
	const { browser, link, socket } = connected();
	welcome(socket());
	socket().receive({ type: "closing", reason: "shutdown", reconnect_after_ms: 4321 });
	socket().onclose({ code: 1012, reason: "" });
	assert.equal(link.retryAt - browser.now, 4321);
});

test("an expired token is not tried again", () => {
	for (const end of [(s) => s.onclose({ code: 4401 }), (s) => (s.receive({ type: "closing", reason: "token_expired", reconnect_after_ms: 0 }), s.onclose({ code: 1000 }))]) {
		const { browser, link, socket } = connected();
		welcome(socket());
		end(socket());
		assert.equal(link.phase, "expired");
		browser.advance(60_000);
		assert.equal(browser.sockets.length, 1);
	}
});

test("a refused connection is not tried again, and names the reason", () => {
	const { browser, link, socket } = connected();
	welcome(socket());
	socket().onclose({ code: 4403, reason: "not your tenant" });
	browser.advance(60_000);
	assert.deepEqual([link.phase, link.reason, browser.sockets.length], ["refused", "not your tenant", 1]);
});

test("a connection without a welcome is given up after ten seconds", () => {
	const { browser, link, socket } = connected();
	const first = socket();
	browser.advance(10_000);
	assert.deepEqual([first.isClosed, link.phase], [true, "pausing"]);
});

test("a connection that is silent in spite of pings is given up", () => {
	const { browser, link, socket } = connected();
	welcome(socket());
	const first = socket();
	browser.advance(20_000);
	assert.deepEqual(first.sent.at(-1), { type: "ping" });
	first.receive({ type: "pong" });
	browser.advance(40_000);
	assert.equal(link.phase, "live");
	browser.advance(20_000);
	assert.deepEqual([first.isClosed, link.phase], [true, "pausing"]);
});

test("messages of a connection that was given up are ignored", () => {
	const { link, socket, seen } = connected();
	welcome(socket());
	const first = socket();
	link.stop("offline");
	first.receive({ type: "event", id: "j1" });
	first.onclose({ code: 1006 });
	assert.deepEqual([link.phase, seen.messages], ["offline", []]);
	link.connect();
	assert.equal(link.phase, "connecting");
});

test("a pause waits for its caller", () => {
	const { browser, link } = connected();
	link.stop("forgotten");
	link.pause(3000);
	assert.deepEqual([link.phase, link.retryAt - browser.now], ["pausing", 3000]);
	browser.advance(60_000);
	assert.equal(browser.sockets.length, 1);
});

test("events reach the page, pings do not", () => {
	const { socket, seen } = connected();
	welcome(socket());
	socket().receive({ type: "event", id: "j1" });
	socket().receive({ type: "pong" });
	assert.deepEqual(seen.messages, [{ type: "event", id: "j1" }]);
	assert.equal(seen.lives, 1);
});
