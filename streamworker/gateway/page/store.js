// What survives a reload of this tab: the jobs with their cursors, and a read token; not the key.

const JOBS = "streamworker.jobs";
const TOKEN = "streamworker.token";
const MAX_JOBS = 200;
const MAX_PROMPT = 200;
const MAX_IDS = 64;

export class Store {
	#storage;

	/** `browser.sessionStorage` raises where storage is blocked. */
	constructor(browser) {
		try {
			this.#storage = browser.sessionStorage;
		} catch {
			this.#storage = null;
		}
	}

	saveJobs(jobs) {
		const kept = jobs
			.filter((job) => job.jobId !== null && job.error?.code !== "job_not_found")
			.slice(-MAX_JOBS)
			.map(({ jobId, model, prompt, at, place, attempt, attempts }) => {
				const shown = prompt.slice(0, MAX_PROMPT).replace(/[\ud800-\udbff]$/, ""); // no half character
				return { jobId, model, prompt: shown, at, place, attempt, attempts };
			});
		this.#write(JOBS, kept);
	}

	jobs() {
		const saved = this.#read(JOBS);
		return Array.isArray(saved) ? saved.filter((job) => job && typeof job.jobId === "string") : [];
	}

	/** Keep a token, `{token, expiresAt}` in ms, or forget it (null). */
	saveToken(token) {
		this.#write(TOKEN, token);
	}

	/** Return the token if it is valid at `now` (ms), else null. */
	token(now) {
		const saved = this.#read(TOKEN);
		return saved && typeof saved.token === "string" && saved.expiresAt > now ? saved : null;
	}

	#read(name) {
		try {
			return JSON.parse(this.#storage.getItem(name));
		} catch {
			return null;
		}
	}

	#write(name, value) {
		try {
			if (value === null) this.#storage.removeItem(name);
			else this.#storage.setItem(name, JSON.stringify(value));
		} catch {
			// Full or blocked: a reload asks for the key again.
		}
	}
}

/** Return the `jobs` of a read token: these ids or, for many, one prefix per tenant. */
export function claims(jobIds) {
	const ids = [...new Set(jobIds)];
	if (ids.length <= MAX_IDS) return ids;
	const tenants = new Map();
	for (const id of ids) {
		const tenant = id.slice(0, id.indexOf(".") + 1);
		tenants.set(tenant, common(tenants.get(tenant) ?? id, id));
	}
	return [...tenants.values()].slice(0, MAX_IDS).map((prefix) => `${prefix}*`);
}

function common(one, other) {
	let length = 0;
	while (length < one.length && one[length] === other[length]) length += 1;
	return one.slice(0, length);
}
