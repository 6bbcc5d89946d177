// Words and numbers. Time is a parameter.

const LONG_MS = 10_000;
const STILL_WAITING = "Still waiting. All workers are busy, or the upstream is held: it refuses the key, or limits the rate.";

/** Return `{word, tone, detail}` of a job: `tone` selects icon and colour, `detail` may be empty. */
export function describe(job, now) {
	const [word, tone, detail = ""] = wordsOf(job, now);
	return { word, tone, detail };
}

function wordsOf(job, now) {
	const { state } = job;
	if (state === "refused") return refused(job.error ?? {});
	if (state === "ended") return ended(job.ending);
	if (state === "sending") return ["Sending", "wait"];
	if (job.isCancelling) return ["Cancelling", "off"];
	if (state === "waiting") return ["Waiting", "wait", now - job.at > LONG_MS ? STILL_WAITING : "Waiting for a worker."];
	return ACTIVITIES[job.activity] ?? ["Started", "run", "Waiting for the first token."];
}

const ACTIVITIES = {
	reasoning: ["Reasoning", "run"],
	call: ["Calling a tool", "run"],
	text: ["Streaming", "run"],
};

const REASONS = {
	auth: "The upstream refuses the worker's key.",
	quota: "The upstream account is empty.",
	rate_limited: "The upstream limits the rate of calls.",
	upstream_unavailable: "The upstream is not available.",
	deadline: "The deadline of the job has passed.",
};

const ENDINGS = {
	completed: ["Completed", "done"],
	interrupted: ["Interrupted", "broken", "The text above is kept."],
	failed: ["Failed", "failed"],
	rejected: ["Rejected", "failed"],
	cancelled: ["Cancelled", "off"],
	expired: ["Expired", "off"],
};

function ended({ status, error }) {
	const [word, tone, detail] = ENDINGS[status] ?? [status, "off"];
	return [word, tone, detail ?? REASONS[error?.code]];
}

const REFUSALS = {
	job_not_found: ["Unknown job", "off", "The id is wrong, or the events of the job are no longer stored."],
	cursor_lost: ["No longer stored", "off"],
	unconfirmed: ["Not confirmed", "off", "The gateway did not confirm the job. It may run all the same."],
};

function refused({ code, message }) {
	return REFUSALS[code] ?? ["Refused", "failed", message ? "" : "The gateway gave no reason."];
}

/** Explain an attempt that is not the first; empty for the first. */
export function restartNote({ attempts, cause }) {
	if (attempts < 2) return "";
	const why = { redelivered: "after a worker died", restart: "after the stream broke" }[cause];
	return `Began again${why ? ` ${why}` : ""}: attempt ${attempts}`;
}

/** Return "29 tokens reported": generated tokens, and the word for their source. */
export function tokens(ending) {
	const count = generatedTokens(ending);
	const word = sourceWord(ending.usage_source);
	if (word === "none") return "no tokens";
	return count === null ? `tokens ${word}` : `${number(count)} ${count === 1 ? "token" : "tokens"} ${word}`;
}

export function generatedTokens({ usage }) {
	const count = usage?.completion_tokens ?? usage?.output_tokens;
	return Number.isFinite(count) ? count : null;
}

export function sourceWord(source) {
	return { upstream: "reported", upstream_partial: "partial", estimated: "estimated", none: "none" }[source] ?? source;
}

/** Return a duration: "312 ms", "4.2 s", "3:05". */
export function duration(ms) {
	return ms < 999.5 ? `${Math.round(ms)} ms` : elapsed(ms);
}

/** Return a time that runs, in steps that do not flicker: "0.4 s", "12 s", "3:05". */
export function elapsed(ms) {
	if (ms < 10_000) return `${(Math.floor(Math.max(0, ms) / 100) / 10).toFixed(1)} s`;
	const seconds = Math.floor(ms / 1000);
	return seconds < 60 ? `${seconds} s` : clock(seconds);
}

function clock(seconds) {
	const two = (value) => String(value).padStart(2, "0");
	const minutes = Math.floor(seconds / 60);
	const rest = two(seconds % 60);
	return minutes < 60 ? `${minutes}:${rest}` : `${Math.floor(minutes / 60)}:${two(minutes % 60)}:${rest}`;
}

/** Return how long a job has taken (ms): queue and attempt, or the time since its submission. */
export function age(job, now) {
	const timing = job.ending?.timing;
	if (timing && Number.isFinite(timing.total)) return timing.total + (timing.queued ?? 0);
	return now - job.at;
}

/** Return a number: "1,234,567", "12.3M". */
export function number(value) {
	const options = value < 1e7 ? { maximumFractionDigits: 0 } : { maximumFractionDigits: 1, notation: "compact" };
	return value.toLocaleString("en-US", options);
}

/** Return the end of an id: ids of one minute differ there. */
export function shortId(jobId) {
	return jobId.length <= 16 ? jobId : `…${jobId.slice(-12)}`;
}

export function announcement(job) {
	const { word, detail } = describe(job, 0);
	return [`Job ${shortId(job.jobId ?? "")} ${word.toLowerCase()}.`, job.ending ? `${tokens(job.ending)}.` : "", detail]
		.filter(Boolean)
		.join(" ");
}
