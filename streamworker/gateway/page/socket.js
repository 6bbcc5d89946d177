// One websocket for all jobs. It connects again after every loss.

import { delay, move, verdict } from "./link.js";

const PROTOCOL = "streamworker.v1";
const PING_MS = 20_000;
const DEAD_MS = 45_000;
const WELCOME_MS = 10_000;

export class Link {
	#socket = null;
	#timer = null;
	#heartbeat = null;
	#heardAt = 0;
	tries = 0; // that failed one after another

	/**
	 * `credential()` returns a key, a token or null. `on` has `phase()`, called after every change; `live()`, called
	 * when messages may be sent; and `message(object)`. `browser` is the window, or a fake of it.
	 */
	constructor(url, credential, on, browser) {
		Object.assign(this, { url, credential, on, browser, phase: "idle", reason: "", retryAt: 0 });
	}

	/** Connect now, unless a connection is open or being opened. */
	connect() {
		if (!this.#change("connect")) return;
		this.#clear();
		const socket = new this.browser.WebSocket(this.url, [PROTOCOL]);
		this.#socket = socket;
		let end = null;
		socket.onopen = () => {
			const token = this.credential();
			if (token) socket.send(JSON.stringify({ type: "auth", token }));
		};
		socket.onmessage = ({ data }) => {
			if (socket !== this.#socket) return;
			const message = JSON.parse(data);
			this.#heardAt = this.#now();
			if (message.type === "welcome") this.#welcome();
			else if (message.type === "closing") end = message;
			else if (message.type !== "pong") this.on.message(message);
		};
		socket.onclose = ({ code, reason }) => {
			if (socket === this.#socket) this.#closed(code, reason, end);
		};
		this.#timer = this.browser.setTimeout(() => this.#lose(), WELCOME_MS);
	}

	/** Wait for `ms`; the caller connects then. */
	pause(ms) {
		this.retryAt = this.#now() + ms;
		this.stop("lost");
	}

	/** Close the connection until `connect` is called. `input` is one of `PHASES`. */
	stop(input) {
		this.#abandon();
		this.#change(input);
	}

	/** Send a message; return false if the connection is not live. */
	send(message) {
		if (this.phase !== "live") return false;
		this.#socket.send(JSON.stringify(message));
		return true;
	}

	#welcome() {
		this.#clear();
		this.tries = 0;
		this.reason = "";
		this.#heartbeat = this.browser.setInterval(() => this.#beat(), PING_MS);
		this.#change("welcome");
		this.on.live();
	}

	// A browser does not report that the other end is gone, and answers pings unseen.
	#beat() {
		if (this.#now() - this.#heardAt > DEAD_MS) this.#lose();
		else this.send({ type: "ping" });
	}

	#lose() {
		this.#abandon();
		this.#closed(1006, "", null);
	}

	#closed(code, reason, end) {
		this.#socket = null;
		this.#clear();
		const input = end?.reason === "token_expired" ? "expired" : verdict(code);
		this.reason = input === "refused" ? reason : "";
		const wait = end?.reconnect_after_ms ?? delay(this.tries, this.browser.Math.random());
		this.tries += 1;
		this.retryAt = this.#now() + wait;
		if (input === "lost") this.#timer = this.browser.setTimeout(() => this.connect(), wait);
		this.#change(input);
	}

	#abandon() {
		const socket = this.#socket;
		this.#socket = null;
		this.#clear();
		socket?.close();
	}

	#clear() {
		this.browser.clearTimeout(this.#timer);
		this.browser.clearInterval(this.#heartbeat);
	}

	#change(input) {
		const next = move(this.phase, input);
		if (next === this.phase) return false;
		this.phase = next;
		this.on.phase();
		return true;
	}

	#now() {
		return this.browser.Date.now();
	}
}
