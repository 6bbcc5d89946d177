import { duration, generatedTokens, number, sourceWord } from "./format.js";
import { describeLink } from "./link.js";

export const $ = (id) => document.getElementById(id);

const shown = new WeakMap();

/** Set a text if it differs: equal text would be laid out and announced again. */
export function setText(node, text) {
	if (shown.get(node) !== text) node.textContent = text;
	shown.set(node, text);
}

export function setIcon(use, tone) {
	if (shown.get(use) !== tone) use.setAttribute("href", `#i-${tone}`);
	shown.set(use, tone);
}

export function showLink(link, identity, complaint) {
	const { phase } = link;
	const { word, tone, detail } = describeLink(link, link.retryAt - Date.now(), identity.canSend);
	document.body.dataset.link = phase;
	$("link").dataset.tone = tone;
	setIcon($("link").querySelector("use"), tone);
	setText($("link").querySelector("span"), word);
	$("strip").dataset.tone = complaint ? "failed" : tone;
	setText($("strip"), complaint || detail);
	$("strip").hidden = !complaint && !detail;
	$("send").disabled = phase !== "live" || !identity.canSend;
	$("identity").hidden = !identity.isRequired || identity.hasKey || !["idle", "live", "expired"].includes(phase);
	$("key-used").hidden = !identity.hasKey;
}

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
	setText($("f-open"), number(open));
	setText($("f-deltas"), number(deltasPerSecond));
	setText($("f-first"), firstDeltaMs === null ? "–" : duration(firstDeltaMs));
	setText($("f-tokens"), [...sums].map(([word, count]) => `${number(count)} ${word}`).join(", ") || "–");
}

export function announce(words) {
	const line = document.createElement("span");
	line.textContent = words;
	$("announcements").append(line);
	setTimeout(() => line.remove(), 5000);
}
