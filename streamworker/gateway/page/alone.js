// One job alone, read with the browser's own EventSource.

import { address, errorOf } from "./api.js";

const AGAIN_MS = 3000;
const NAMES = ["started", "delta", "usage", "snapshot"];

/**
 * Read a job's events from its cursor, if it has one, until its end. `on` has `event(event, cursor)`, `live()`,
 * `expired()` and `refused(error)`. Return a function that stops reading.
 */
export function readJob({ jobId, cursor }, identity, on) {
	const path = `v1/jobs/${encodeURIComponent(jobId)}`;
	let source = null;
	let isStopped = false;
	let isExpired = false;
	let timer = null;

	function open() {
		const url = address(`${path}/events`);
		if (identity.token()) url.searchParams.set("access_token", identity.token());
		if (cursor) url.searchParams.set("cursor", cursor);
		else url.searchParams.set("replay", "snapshot");
		source = new EventSource(url);
		source.onopen = on.live;
		source.onerror = failed;
		for (const name of NAMES) source.addEventListener(name, take);
		source.addEventListener("position", (message) => (cursor = message.lastEventId));
		source.addEventListener("closing", (message) => {
			// EventSource connects again by itself, with the last id.
			isExpired = JSON.parse(message.data).reason === "token_expired";
		});
	}

	function take(message) {
		cursor = message.lastEventId;
		on.event(JSON.parse(message.data), cursor);
		if (message.type === "usage") stop();
	}

	async function failed() {
		if (isStopped) return;
		if (isExpired) {
			stop();
			on.expired();
		} else if (source.readyState === EventSource.CLOSED) {
			// EventSource takes every status but 200 as final, and hides it.
			const response = await identity.get(path).catch(() => null);
			if (isStopped) return;
			if (!response || response.ok || response.status >= 500) {
				timer = setTimeout(open, AGAIN_MS);
				return;
			}
			stop();
			if (response.status === 401) on.expired();
			else on.refused(await errorOf(response));
		}
	}

	function stop() {
		isStopped = true;
		clearTimeout(timer);
		source?.close();
	}

	open();
	return stop;
}
