// Words and numbers of the page. Pure functions: time is a parameter.

const WAIT_IS_LONG_MS = 10_000;

/** Return `{word, tone, detail}` of a job: `tone` selects icon and colour, `detail` may be empty. */
export function describe(job, now) {
	const { state } = job;
	if (state === "refused") return refused(job.error ?? {});
	if (state === "ended") return ended(job.ending);
	if (state === "sending") return { word: "Sending", tone: "wait", detail: "" };
	if (job.isCancelling) return { word: "Cancelling", tone: "off", detail: "" };
	if (state === "waiting") {
		const isLong = now - job.at > WAIT_IS_LONG_MS;
		return {
			word: "Waiting",
			tone: "wait",
			detail: isLong ? "Still waiting: all workers are busy, or the upstream is held." : "Waiting for a worker.",
		};
	}
	const words = { reasoning: "Reasoning", call: "Calling a tool", text: "Streaming" };
	const detail = job.activity === null ? "Waiting for the first token." : "";
	return { word: words[job.activity] ?? "Started", tone: "run", detail };
}

const REASONS = {
	auth: "Held: the upstream refuses the worker's key.",
	quota: "Held: the upstream account is empty.",
	rate_limited: "Held: the upstream limits the rate of calls.",
	upstream_unavailable: "The upstream is not available.",
	deadline: "The deadline of the job has passed.",
};

const ENDINGS = {
	completed: ["Completed", "done"],
	interrupted: ["Interrupted", "broken"],
	failed: ["Failed", "failed"],
	rejected: ["Rejected", "failed"],
	cancelled: ["Cancelled", "off"],
	expired: ["Expired", "off"],
};

function ended({ status, error }) {
	const [word, tone] = ENDINGS[status] ?? [status, "off"];
	const reason = status === "interrupted" ? "The text above is kept." : REASONS[error?.code];
	return { word, tone, detail: reason ?? "" };
}

function refused({ code, message }) {
	const word = { job_not_found: "Unknown job", cursor_lost: "No longer stored" }[code];
	return { word: word ?? "Refused", tone: word ? "off" : "failed", detail: message ?? "The gateway gave no reason." };
}

/** Return the explanation of an attempt that is not the first; empty for the first. */
export function restartNote({ attempts, cause }) {
	if (attempts < 2) return "";
	const why = { redelivered: "after a worker died", restart: "after the stream broke" }[cause];
	return `Began again${why ? ` ${why}` : ""}: attempt ${attempts}`;
}

/** Return "29 tokens reported": the count of generated tokens and the word for its source. */
export function tokens(ending) {
	const count = generatedTokens(ending);
	const word = sourceWord(ending.usage_source);
	if (ending.usage_source === "none") return "no tokens";
	return count === null ? `tokens ${word}` : `${number(count)} ${count === 1 ? "token" : "tokens"} ${word}`;
}

/** Return the generated tokens of a terminal event, or null. */
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

/** Return the time that a job has run, in steps that do not flicker: "0.4 s", "12 s", "3:05". */
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

/** Return how long a job has taken, in ms: queue and attempt when it has ended, else since its submission. */
export function age(job, now) {
	const timing = job.ending?.timing;
	if (timing && Number.isFinite(timing.total)) return timing.total + (timing.queued ?? 0);
	return now - job.at;
}

export function number(value) {
	return Math.round(value).toLocaleString("en-US");
}

/** Return the end of an id: ids of one minute differ there. */
export function shortId(jobId) {
	return jobId.length <= 16 ? jobId : `…${jobId.slice(-12)}`;
}

/** Return the announcement of an ending for screen readers. */
export function announcement(job) {
	const { word, detail } = describe(job, 0);
	return [`Job ${shortId(job.jobId ?? "")} ${word.toLowerCase()}.`, job.ending ? `${tokens(job.ending)}.` : "", detail]
		.filter(Boolean)
		.join(" ");
}
