// Jobs side by side over one websocket, or one job alone over EventSource.

import { readJob } from "./alone.js";
import { Identity, address, errorOf } from "./api.js";
import { Board } from "./board.js";
import { Figures } from "./figures.js";
import { number } from "./format.js";
import { isOver } from "./job.js";
import { $, announce, setText, showFigures, showLink } from "./header.js";
import { Link } from "./socket.js";
import { Store } from "./store.js";

const TICK_MS = 100;
const AGAIN_MS = 3000;
const COMPLAINT_MS = 10_000;
const UNCONFIRMED = { type: "refused", error: { code: "unconfirmed", message: "the connection was lost" } };

const store = new Store(window);
const identity = new Identity(store, Date.now());
const figures = new Figures();
const board = new Board($("cards"), store, figures, { cancel, again });
const link = new Link(address("v1/ws", "ws"), () => identity.credential(), { phase, live, message }, window);
const ids = () => board.jobs.map((job) => job.jobId).filter(Boolean);
let alone = null; // {key, stop}
let probing = null;
let isAdmitted = false;
let quiet = null;
let complaint = "";

// The answer reveals whether the gateway asks for a key.
async function probe() {
	clearTimeout(probing);
	const response = await identity.get("v1/models").catch(() => null);
	if (response === null || response.status >= 500) {
		link.pause(AGAIN_MS);
		probing = setTimeout(probe, AGAIN_MS);
	} else if (response.status === 401) {
		link.reason = identity.hasKey ? "The gateway does not accept this key." : "";
		link.stop(identity.credential() === null ? "forgotten" : "expired");
	} else {
		if (identity.credential() === null) identity.isRequired = false;
		const { data = [] } = await response.json().catch(() => ({}));
		$("models").replaceChildren(...data.map(({ id }) => new Option(id, id)));
		$("model").value ||= data[0]?.id ?? "";
		isAdmitted = true;
		link.connect();
		if (alone) read();
	}
}

const show = () => showLink(link, identity, complaint);

function phase() {
	if (link.phase === "expired") identity.forget();
	if (link.phase !== "live") for (const { key, state } of board.jobs) if (state === "sending") board.take(key, UNCONFIRMED);
	show();
}

function live() {
	for (const job of board.jobs) if (!job.isAlone) subscribe(job);
	identity.renew(ids);
}

function subscribe(job) {
	if (!job || job.jobId === null || isOver(job)) return;
	const { key, jobId, place, cursor } = job;
	const how = cursor ? { cursor } : { cursor: place ?? undefined, replay: "snapshot" };
	link.send({ type: "subscribe", id: key, job_id: jobId, ...how });
}

function message({ type, id, event, error, cursor, reason, ...rest }) {
	if (type === "event") board.take(id, event, cursor);
	else if (type === "error") refuse(id, error);
	else if (type !== "end") board.take(id, { type, cursor, ...rest });
	else if (reason === "stalled" || reason === "error") setTimeout(() => subscribe(board.get(id)), AGAIN_MS);
	if (type === "submitted") identity.renew(ids);
}

function refuse(id, error) {
	const job = board.get(id);
	if (job === undefined || job.state === "running") complain(error.message);
	else board.take(id, { type: "refused", error });
}

function send() {
	const prompt = $("prompt").value.trim();
	const model = $("model").value.trim();
	if (!prompt || !model) return $(prompt ? "model" : "prompt").focus();
	const times = Math.min(50, Math.max(1, Math.round($("times").valueAsNumber) || 1));
	for (let n = 0; n < times; n += 1) {
		const key = board.add({ model, prompt, at: Date.now() });
		const request = { model, messages: [{ role: "user", content: prompt }] };
		link.send({ type: "submit", id: key, job: { request }, subscribe: true });
	}
	$("prompt").value = "";
	showCount();
	scrollTo({ top: 0 });
}

async function cancel({ key, jobId }) {
	const response = await identity.post(`v1/jobs/${encodeURIComponent(jobId)}/cancel`, { reason: "cancelled on the page" }).catch(() => null);
	if (response?.ok) board.take(key, { type: "cancelling" });
	else complain(response === null ? "The gateway does not answer." : (await errorOf(response)).message);
}

function again({ key, isAlone }) {
	board.take(key, { type: "retried" });
	if (isAlone) read();
	else subscribe(board.get(key));
}

function complain(words) {
	complaint = words;
	show();
	announce(words);
	clearTimeout(quiet);
	quiet = setTimeout(() => show((complaint = "")), COMPLAINT_MS);
}

function route() {
	const id = new URLSearchParams(location.hash.slice(1)).get("job") ?? "";
	if (alone) {
		alone.stop();
		board.remove(alone.key);
	}
	$("all").hidden = $("composer").hidden = id !== "";
	$("alone").hidden = id === "";
	document.title = id ? `${id} · streamworker` : "streamworker";
	const { model, prompt, at = Date.now() } = board.jobs.find((job) => job.jobId === id) ?? {};
	alone = id ? { key: board.add({ jobId: id, model, prompt, at, isAlone: true }, $("alone")), stop: () => {} } : null;
	if (id && isAdmitted) read();
	showCount();
}

async function read() {
	const here = alone;
	here.stop();
	await identity.renew(ids);
	if (here !== alone || isOver(board.get(here.key))) return;
	here.stop = readJob(board.get(here.key), identity, {
		event: (event, cursor) => board.take(here.key, event, cursor),
		live: () => board.take(here.key, { type: "live" }),
		expired: () => (identity.hasKey ? setTimeout(read, AGAIN_MS) : link.stop("expired")),
		refused: (error) => board.take(here.key, { type: "refused", error }),
	});
}

function tick() {
	for (const job of board.jobs) if (!isOver(job)) board.touch(job.key);
	if (link.phase === "pausing") show();
	showCount();
}

function showCount() {
	const shown = board.jobs.filter((job) => !job.isAlone);
	$("nothing").hidden = shown.length > 0;
	$("clear").hidden = !shown.some(isOver);
	setText($("count"), shown.length ? number(shown.length) : "");
}

function on(id, type, act) {
	$(id).addEventListener(type, (event) => {
		event.preventDefault();
		act();
	});
}

on("composer", "submit", send);
on("identity", "submit", () => {
	identity.use($("key").value.trim());
	$("key").value = "";
	link.stop("forgotten");
	probe();
});
on("key-forget", "click", () => {
	identity.forget();
	link.stop("forgotten");
});
on("open", "submit", () => {
	const id = $("open-id").value.trim();
	$("open-id").value = "";
	if (id) location.hash = `job=${encodeURIComponent(id)}`;
});
on("clear", "click", () => {
	for (const job of board.jobs) if (isOver(job)) board.remove(job.key);
	board.save();
	showCount();
});
for (const sample of document.querySelectorAll(".samples button")) {
	sample.addEventListener("click", () => {
		$("prompt").value = sample.textContent;
		$("prompt").focus();
	});
}
document.addEventListener("keydown", (event) => {
	const isWriting = event.target.matches("input, textarea");
	const isCommand = event.ctrlKey || event.metaKey;
	if (event.key === "/" && !isWriting && !isCommand) {
		event.preventDefault();
		location.hash = "";
		route();
		$("prompt").focus();
	} else if (event.key === "Enter" && isCommand && !$("send").disabled && !alone) {
		send();
	} else if (event.key === "Escape") {
		if (isWriting) event.target.blur();
		else location.hash = "";
	}
});
addEventListener("hashchange", route);
addEventListener("offline", () => link.stop("offline"));
addEventListener("online", probe);
addEventListener("pagehide", () => board.save());
// A page from the cache has dead connections.
addEventListener("pageshow", ({ persisted }) => {
	if (persisted) location.reload();
});

if (/Mac|iP/.test(navigator.platform)) document.querySelector("#send kbd").textContent = "⌘ ↵";
for (const saved of store.jobs()) board.add(saved);
setInterval(tick, TICK_MS);
setInterval(() => showFigures(figures.at(performance.now()), board.jobs), 5 * TICK_MS);
route();
show();
probe();
