// The phases of the connection, and what its end means. No I/O, no clock.

const ANYWHERE = { lost: "pausing", offline: "offline", expired: "expired", forgotten: "idle" };

/** phase -> input -> next phase. An input without a row changes nothing. */
export const PHASES = {
	idle: { connect: "connecting", ...ANYWHERE },
	connecting: { welcome: "live", refused: "refused", ...ANYWHERE },
	live: { refused: "refused", ...ANYWHERE },
	pausing: { connect: "connecting", ...ANYWHERE },
	offline: { connect: "connecting", ...ANYWHERE },
	refused: { connect: "connecting", ...ANYWHERE },
	expired: { connect: "connecting", offline: "offline", forgotten: "idle" },
};

export function move(phase, input) {
	return PHASES[phase][input] ?? phase;
}

const CONTINUE = "Streams continue where they stopped.";
const CHECK = "Check the gateway, the proxy's websockets, and gateway.cors_origins.";
const FIRST_MS = 500;
const LONGEST_MS = 15_000;

/** Return what a close code means: connect again ("lost"), with a new identity ("expired"), or do not ("refused"). */
export function verdict(code) {
	if (code === 4401) return "expired";
	if (code === 4408) return "lost"; // the network was too slow for `auth` in time
	if (code >= 4000 || (code >= 1008 && code <= 1010)) return "refused";
	return "lost";
}

/** Return the delay before the next try (ms). With `random` in [0, 1) many pages do not come back at once. */
export function delay(tries, random) {
	const most = Math.min(LONGEST_MS, FIRST_MS * 2 ** Math.min(tries, 10));
	return Math.round((most / 2) * (1 + random));
}

/** Return the words for the header: `{word, tone, detail}`. */
export function describeLink(link, leftMs, canSend) {
	const [word, tone, detail = ""] = wordsOf(link, leftMs, canSend);
	return { word, tone, detail };
}

function wordsOf({ phase, reason, tries }, leftMs, canSend) {
	const when = phase === "pausing" && leftMs >= 500 ? ` in ${Math.ceil(leftMs / 1000)} s` : "";
	switch (phase) {
		case "live":
			return canSend ? ["Live", "done"] : ["Read only", "done", "Enter a key to send prompts."];
		case "connecting":
			if (!tries) return ["Connecting", "wait"];
		// falls through
		case "pausing":
			// A browser does not reveal why a websocket was refused.
			return [`Reconnecting${when}`, "broken", tries < 4 ? `The gateway does not answer. ${CONTINUE}` : CHECK];
		case "offline":
			return ["Offline", "off", `This device has no network. ${CONTINUE}`];
		case "expired":
			if (reason) return ["Not accepted", "failed", reason];
			return ["Token expired", "broken", "Enter a key to go on. The text that you see is kept."];
		case "refused":
			return ["Refused", "failed", reason || "The gateway refuses the connection."];
		default:
			return ["No key", "off", "This gateway asks for an API key."];
	}
}
