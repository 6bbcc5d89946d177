// Requests. Addresses are relative: the page works below any path.

import { claims } from "./store.js";

const TTL_S = 3600;
const RENEW_AT = 0.8;

export function address(path, scheme = "http") {
	const url = new URL(path, document.baseURI);
	url.hash = "";
	if (scheme === "ws") url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
	return url;
}

/** A key, which is kept in memory, or a read token, which survives a reload of the tab. */
export class Identity {
	#store;
	#key = "";
	#token;
	#renewal = null;

	constructor(store, now) {
		this.#store = store;
		this.#token = store.token(now);
		this.isRequired = true;
	}

	get canSend() {
		return !this.isRequired || this.hasKey;
	}

	get hasKey() {
		return this.#key !== "";
	}

	credential() {
		return this.#key || this.#token?.token || null;
	}

	/** Return what may be part of an address. */
	token() {
		return this.#token?.token ?? null;
	}

	use(key) {
		this.#key = key;
	}

	forget() {
		clearTimeout(this.#renewal);
		this.#key = "";
		this.#token = null;
		this.#store.saveToken(null);
	}

	/** Get a read token for these jobs, and renew it while there is a key. Keys without that right get none. */
	async renew(jobIds) {
		clearTimeout(this.#renewal);
		if (!this.#key || jobIds().length === 0) return;
		const wanted = { jobs: claims(jobIds()), scope: "read cancel" };
		let response = await this.post("v1/tokens", { ...wanted, ttl_s: TTL_S }).catch(() => null);
		if (response?.status === 400) response = await this.post("v1/tokens", wanted); // a shorter life may be allowed
		if (response?.status !== 201) return;
		const { token, expires_at } = await response.json();
		const expiresAt = Date.parse(expires_at);
		this.#token = { token, expiresAt };
		this.#store.saveToken(this.#token);
		const left = Math.min(expiresAt - Date.now(), TTL_S * 1000);
		this.#renewal = setTimeout(() => this.renew(jobIds), Math.max(10_000, left * RENEW_AT));
	}

	get(path) {
		return fetch(address(path), { headers: this.#headers(), cache: "no-store" });
	}

	post(path, body) {
		const headers = { ...this.#headers(), "content-type": "application/json" };
		return fetch(address(path), { method: "POST", headers, body: JSON.stringify(body) });
	}

	#headers() {
		const credential = this.credential();
		return credential === null ? {} : { authorization: `Bearer ${credential}` };
	}
}

export async function errorOf(response) {
	const body = await response.json().catch(() => null);
	return body?.error ?? { code: String(response.status), message: `The gateway answered ${response.status}.` };
}
