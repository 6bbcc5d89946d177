// The header: the state of the connection in words, the figures, and the field for the key.

import { duration, generatedTokens, number, sourceWord } from "./format.js";
import { describeLink } from "./link.js";

const byId = (id) => document.getElementById(id);

const shown = new WeakMap();

/** Set the text of an element if it differs: equal text would be laid out and announced again. */
export function setText(node, text) {
	if (shown.get(node) !== text) node.textContent = text;
	shown.set(node, text);
}

export function setIcon(use, tone) {
	if (shown.get(use) !== tone) use.setAttribute("href", `#i-${tone}`);
	shown.set(use, tone);
}

/** Show the state of the link, and which actions it permits. */
export function showLink(link, identity) {
	const { phase } = link;
	const { word, tone, detail } = describeLink(link, link.retryAt - Date.now(), identity.canSend);
	document.body.dataset.link = phase;
	byId("link").dataset.tone = byId("strip").dataset.tone = tone;
	setIcon(byId("link").querySelector("use"), tone);
	setText(byId("link").querySelector("span"), word);
	showStrip(detail);
	byId("send").disabled = phase !== "live" || !identity.canSend;
	byId("identity").hidden = !identity.isRequired || identity.hasKey || !["idle", "live", "expired"].includes(phase);
	byId("key-used").hidden = !identity.hasKey;
}

/** Show a line below the header; an empty text hides it. */
export function showStrip(words) {
	setText(byId("strip"), words);
	byId("strip").hidden = words === "";
}

/** Show the figures of the last ten seconds, and the tokens of the jobs by source. */
export function showFigures({ deltasPerSecond, firstDeltaMs }, jobs) {
	const sums = new Map();
	let open = 0;
	for (const { state, ending } of jobs) {
		if (state === "running") open += 1;
		const tokens = ending && generatedTokens(ending);
		if (!tokens) continue;
		const word = sourceWord(ending.usage_source);
		sums.set(word, (sums.get(word) ?? 0) + tokens);
	}
	setText(byId("f-open"), number(open));
	setText(byId("f-deltas"), number(deltasPerSecond));
	setText(byId("f-first"), firstDeltaMs === null ? "–" : duration(firstDeltaMs));
	setText(byId("f-tokens"), [...sums].map(([word, count]) => `${number(count)} ${word}`).join(", ") || "–");
}

/** Announce words to screen readers. */
export function announce(words) {
	const line = document.createElement("span");
	line.textContent = words;
	byId("announcements").append(line);
	setTimeout(() => line.remove(), 5000);
}
