// The state of one job. `reduce` is the rule for readers of the event stream: on `started` forget the text,
// on `snapshot` replace it, on `delta` append, on `usage` stop; ignore other names.

import { split } from "./delta.js";

/** state -> input -> next state. An input without a row changes nothing. */
export const TRANSITIONS = {
	sending: { submitted: "waiting", refused: "refused" },
	waiting: { started: "running", snapshot: "running", delta: "running", usage: "ended", refused: "refused" },
	running: { started: "running", snapshot: "running", delta: "running", usage: "ended", refused: "refused" },
	refused: { retried: "waiting" },
	ended: {},
};

/** Kept of one job: a page must not grow without a bound. */
export const MAX_CHARACTERS = 1_000_000;

/** Return a job that is submitted or, if it has a `jobId`, looked up. Times are ms since the epoch. */
export function newJob(members) {
	return {
		key: "",
		jobId: null,
		model: "",
		prompt: "",
		at: 0,
		isAlone: false,
		place: null, // the cursor that the submission returned: reading from there finds the first event
		cursor: null, // behind the last event
		attempt: null,
		attempts: 0,
		cause: null,
		state: members.jobId ? "waiting" : "sending",
		isLive: false,
		isCancelling: false,
		error: null,
		ending: null,
		...EMPTY,
		generation: 0, // grows when the text is replaced: a view starts anew
		...members,
	};
}

const EMPTY = {
	seq: -1,
	choices: [],
	characters: 0,
	deltas: 0,
	activity: null, // of the last delta: "reasoning", "text" or "call"
	startedTs: null, // by the worker's clock
	firstDeltaMs: null,
};

export const isOver = ({ state }) => state === "ended" || state === "refused";

/** Return the job after a message of the gateway, or after an event with its cursor. */
export function reduce(job, input, cursor = null) {
	if (input.type === "live") return { ...job, isLive: true };
	if (input.type === "cancelling") return isOver(job) ? job : { ...job, isCancelling: true };
	const state = TRANSITIONS[job.state][input.type];
	if (state === undefined || isStale(job, input)) return job;
	return { ...job, ...INPUTS[input.type](job, input), state, cursor: cursor ?? job.cursor };
}

// A worker that lost the job's partition may still write a few deltas of the former attempt.
function isStale({ attempt, seq }, { type, ...event }) {
	return (type === "delta" || type === "usage") && attempt !== null && (event.attempt !== attempt || event.seq <= seq);
}

const INPUTS = {
	submitted: (_, { job_id, cursor }) => ({ jobId: job_id, place: cursor }),
	refused: (_, { error }) => ({ error, isCancelling: false }),
	retried: () => ({ error: null }),
	started: (job, event) => ({
		...begun(job, event),
		model: event.model ?? job.model,
		cause: event.cause,
		startedTs: event.ts,
	}),
	snapshot: (job, event) => {
		const choices = event.choices.map(({ choice, message }) => grown(newChoice(choice), split(message)));
		const characters = choices.reduce((sum, choice) => sum + size(choice), 0);
		return { ...begun(job, event), choices, characters, activity: characters ? "text" : null };
	},
	delta: (job, event) => {
		const common = { attempt: event.attempt, seq: event.seq, deltas: job.deltas + 1 };
		if (typeof event.choice !== "number") return common;
		const part = split(event.delta);
		const characters = job.characters + size(part);
		const first = job.startedTs === null ? null : Math.max(0, event.ts - job.startedTs);
		return {
			...common,
			characters,
			activity: activityOf(part) ?? job.activity,
			firstDeltaMs: job.firstDeltaMs ?? first,
			choices: characters > MAX_CHARACTERS ? job.choices : withPart(job.choices, event.choice, part),
		};
	},
	usage: (job, event) => ({
		ending: event,
		attempt: event.attempt,
		seq: event.seq,
		isCancelling: false,
		firstDeltaMs: event.timing?.first_delta ?? job.firstDeltaMs,
	}),
};

function begun({ attempt, attempts, generation }, event) {
	return {
		...EMPTY,
		attempt: event.attempt,
		attempts: event.attempt === attempt ? Math.max(1, attempts) : attempts + 1,
		seq: event.seq,
		generation: generation + 1,
	};
}

function activityOf({ text, refusal, calls, reasoning }) {
	if (text || refusal) return "text";
	if (calls.length) return "call";
	return reasoning ? "reasoning" : null;
}

const newChoice = (index) => ({ index, text: "", reasoning: "", refusal: "", calls: [] });

function size({ text, reasoning, refusal, calls }) {
	return calls.reduce((sum, call) => sum + call.input.length, text.length + reasoning.length + refusal.length);
}

function withPart(choices, index, part) {
	if (!choices.some((choice) => choice.index === index)) choices = [...choices, newChoice(index)];
	return choices
		.map((choice) => (choice.index === index ? grown(choice, part) : choice))
		.sort((one, other) => one.index - other.index);
}

function grown(choice, part) {
	return {
		...choice,
		text: choice.text + part.text,
		reasoning: choice.reasoning + part.reasoning,
		refusal: choice.refusal + part.refusal,
		calls: part.calls.reduce(withCall, choice.calls),
	};
}

function withCall(calls, { index, name, input }) {
	if (!calls.some((call) => call.index === index)) return [...calls, { index, name, input }];
	return calls.map((call) =>
		call.index === index ? { index, name: call.name || name, input: call.input + input } : call,
	);
}
