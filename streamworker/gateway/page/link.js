// The phases of the websocket connection, and what the end of a connection means. No I/O, no clock.

/** phase -> input -> next phase. An input without a row changes nothing. */
export const PHASES = {
	idle: { connect: "connecting", ...anywhere() },
	connecting: { welcome: "live", refused: "refused", ...anywhere() },
	live: { refused: "refused", ...anywhere() },
	pausing: { connect: "connecting", ...anywhere() },
	offline: { connect: "connecting", ...anywhere() },
	refused: { connect: "connecting", ...anywhere() },
	expired: { connect: "connecting", offline: "offline", forgotten: "idle" },
};

function anywhere() {
	return { lost: "pausing", offline: "offline", expired: "expired", forgotten: "idle" };
}

/** Return the phase after an input. */
export function move(phase, input) {
	return PHASES[phase][input] ?? phase;
}

const CONTINUE = "Streams continue where they stopped.";
const FIRST_MS = 500;
const LONGEST_MS = 15_000;

/** Return what a close code means: "lost" (connect again), "expired" (with a new identity) or "refused" (do not). */
export function verdict(code) {
	if (code === 4401) return "expired";
	if (code === 4408) return "lost"; // the network was too slow for `auth` in time
	if (code >= 4000 || code === 1008 || code === 1009 || code === 1010) return "refused";
	return "lost";
}

/** Return the delay before the next try in ms. `random` is in [0, 1): many pages do not come back at once. */
export function delay(tries, random) {
	const most = Math.min(LONGEST_MS, FIRST_MS * 2 ** Math.min(tries, 10));
	return Math.round(most / 2 + (most / 2) * random);
}

/** Return the words for the header: `{word, tone, detail}`. */
export function describeLink({ phase, reason, tries }, leftMs, canSend) {
	switch (phase) {
		case "live":
			return canSend
				? { word: "Live", tone: "done", detail: "" }
				: { word: "Read only", tone: "done", detail: "Enter a key to send prompts." };
		case "connecting":
			return { word: "Connecting", tone: "wait", detail: "" };
		case "pausing":
			return {
				word: leftMs >= 500 ? `Reconnecting in ${Math.ceil(leftMs / 1000)} s` : "Reconnecting",
				tone: "broken",
				// A browser does not reveal why a websocket was refused.
				detail: tries < 4 ? `The gateway does not answer. ${CONTINUE}` : "Check the gateway, the proxy's websockets, and gateway.cors_origins.",
			};
		case "offline":
			return { word: "Offline", tone: "off", detail: `This device has no network. ${CONTINUE}` };
		case "expired":
			return reason
				? { word: "Not accepted", tone: "failed", detail: reason }
				: { word: "Token expired", tone: "broken", detail: "Enter a key to go on. The text that you see is kept." };
		case "refused":
			return { word: "Refused", tone: "failed", detail: reason || "The gateway refuses the connection." };
		default:
			return { word: "No key", tone: "off", detail: "This gateway asks for an API key." };
	}
}
