// The card of one job. It changes only where its job has changed, and only within an animation frame.

import { age, describe, duration, elapsed, number, restartNote, shortId, tokens } from "./format.js";
import { announce, setIcon, setText } from "./header.js";
import { isOver } from "./job.js";

const VOIDED_MS = 1000;
const NEAR_END_PX = 24;
const BLOCK_CHARACTERS = 800;

const clone = (id) => document.getElementById(id).content.firstElementChild.cloneNode(true);

/** Text that grows at its end, in blocks of whole lines: a browser lays out the last one only. */
class GrowingText {
	#node;
	#shown = 0;
	#last = null;

	constructor(node) {
		this.#node = node;
	}

	grow(text) {
		let added = text.slice(this.#shown);
		this.#shown = text.length;
		while (added) {
			const room = BLOCK_CHARACTERS - (this.#last?.length ?? 0);
			const end = added.indexOf("\n", room) + 1;
			this.#append(end ? added.slice(0, end) : added);
			if (end) this.#last = null;
			added = end ? added.slice(end) : "";
		}
	}

	#append(text) {
		if (this.#last === null) {
			this.#last = document.createTextNode("");
			const block = document.createElement("p");
			block.append(this.#last);
			this.#node.append(block);
		}
		this.#last.appendData(text);
	}
}

class ChoiceView {
	#reasoning;
	#label;
	#texts;
	#calls = new Map();
	#isFolded = false;

	constructor(index) {
		this.index = index;
		this.root = clone("choice");
		const find = (selector) => this.root.querySelector(selector);
		this.#reasoning = find(".reasoning");
		this.#label = find(".label");
		this.#texts = {
			reasoning: new GrowingText(find(".reasoning .text")),
			text: new GrowingText(find(".answer")),
			refusal: new GrowingText(find(".refusal")),
		};
	}

	render(choice, isOneOfSeveral) {
		for (const [name, view] of Object.entries(this.#texts)) view.grow(choice[name]);
		this.#reasoning.hidden = !choice.reasoning;
		this.#label.hidden = !isOneOfSeveral;
		setText(this.#label, `Choice ${choice.index + 1}`);
		if (!this.#isFolded && choice.reasoning && (choice.text || choice.calls.length)) {
			this.#isFolded = true; // once: the reader may open it again
			this.#reasoning.open = false;
			this.#reasoning.classList.add("over");
		}
		for (const call of choice.calls) this.#renderCall(call);
	}

	#renderCall({ index, name, input }) {
		let view = this.#calls.get(index);
		if (view === undefined) {
			const [root, label, code] = ["div", "p", "pre"].map((tag) => document.createElement(tag));
			root.className = "call";
			label.className = "label";
			root.append(label, code);
			this.root.querySelector(".calls").append(root);
			view = { label, text: new GrowingText(code) };
			this.#calls.set(index, view);
		}
		setText(view.label, `Tool call: ${name || "…"}`);
		view.text.grow(input);
	}
}

export class Card {
	#parts = {};
	#choices = new Map();
	#generation = 0;
	#voidedUntil = 0;
	#follows = true;
	#seen = "";
	#label = "";
	isVisible = true;

	/** `act` is called with "cancel" or "again". */
	constructor(act) {
		this.root = clone("card");
		for (const node of this.root.querySelectorAll("[class], use")) {
			this.#parts[[...node.classList].at(-1) ?? "use"] = node;
		}
		const { body, cancel, again, id } = this.#parts;
		body.addEventListener("scroll", () => {
			this.#follows = body.scrollHeight - body.scrollTop - body.clientHeight < NEAR_END_PX;
		});
		cancel.addEventListener("click", () => act("cancel"));
		again.addEventListener("click", () => act("again"));
		id.addEventListener("click", () => this.#copy());
	}

	/** Show the job at `now`; return whether to do so again in the next frame. */
	render(job, now) {
		if (job.generation !== this.#generation) this.#begin(job, now);
		const isVoided = now < this.#voidedUntil && !isOver(job);
		this.root.classList.toggle("voided", isVoided);
		if (!isVoided && this.#voidedUntil) {
			this.#voidedUntil = 0;
			this.#clear();
		}
		this.#renderAge(job, now);
		setText(this.#parts.facts, factsOf(job));
		const state = describe(job, now);
		const seen = [state.word, state.detail, job.attempts, job.jobId, job.model, job.ending === null].join();
		if (this.#seen !== seen) this.#renderState(job, state);
		this.#seen = seen;
		if (!isVoided) this.#renderChoices(job);
		return isVoided;
	}

	/** Scroll to the end unless the reader has scrolled up. Call it after all cards have changed. */
	follow() {
		if (this.#follows && this.isVisible) this.#parts.body.scrollTop = this.#parts.body.scrollHeight;
	}

	// The text of a former attempt stays for a second, greyed.
	#begin(job, now) {
		if (this.#choices.size && job.attempts > 1) this.#voidedUntil = now + VOIDED_MS;
		else this.#clear();
		this.#generation = job.generation;
	}

	#clear() {
		this.#choices.clear();
		this.#parts.choices.replaceChildren();
	}

	#renderAge(job, now) {
		const text = job.ending?.timing ? duration(age(job, now)) : isOver(job) ? "" : elapsed(age(job, now));
		setText(this.#parts.age, text);
	}

	#renderState(job, state) {
		const { use, word, age: when, model, prompt, detail, restart, error, facts } = this.#parts;
		const fault = job.ending?.error ?? job.error;
		this.root.dataset.tone = state.tone;
		setIcon(use, state.tone);
		setText(word, state.word);
		setText(model, job.model);
		setText(prompt, job.prompt);
		const at = new Date(job.at);
		when.title = `Submitted ${at.toLocaleTimeString()} (${at.toISOString()})`;
		model.title = job.model;
		prompt.title = job.prompt;
		setText(restart, restartNote(job));
		restart.hidden = job.attempts < 2;
		setText(detail, state.detail);
		const message = document.createElement("bdi");
		message.textContent = fault?.message;
		if (fault) error.replaceChildren(`${fault.code}: `, message);
		error.title = error.textContent;
		error.hidden = !fault;
		facts.title = job.ending ? `${facts.textContent} ${JSON.stringify(job.ending.usage)}` : "";
		this.#renderActions(job);
	}

	#renderActions(job) {
		const { cancel, again, id, only } = this.#parts;
		cancel.hidden = isOver(job) || job.jobId === null;
		cancel.disabled = job.isCancelling;
		again.hidden = job.state !== "refused" || job.jobId === null;
		if (job.jobId === null || id.title === job.jobId) return;
		id.hidden = only.hidden = false;
		id.title = job.jobId;
		id.textContent = this.#label = job.isAlone ? job.jobId : shortId(job.jobId);
		id.setAttribute("aria-label", `Copy job id ${job.jobId}`);
		only.href = `#job=${encodeURIComponent(job.jobId)}`;
	}

	#renderChoices({ choices }) {
		for (const choice of choices) {
			let view = this.#choices.get(choice.index);
			if (view === undefined) {
				const next = [...this.#choices.values()].find((other) => other.index > choice.index);
				view = new ChoiceView(choice.index);
				this.#choices.set(choice.index, view);
				this.#parts.choices.insertBefore(view.root, next?.root ?? null);
			}
			view.render(choice, choices.length > 1);
		}
	}

	async #copy() {
		const { id } = this.#parts;
		try {
			await navigator.clipboard.writeText(id.title);
			id.textContent = "Copied";
			announce("Job id copied.");
			setTimeout(() => (id.textContent = this.#label), 1200);
		} catch {
			id.textContent = id.title; // no clipboard without TLS: select it
		}
	}
}

function factsOf({ ending, deltas, firstDeltaMs, attempts }) {
	const found = [];
	if (ending) found.push(tokens(ending));
	else if (deltas) found.push(`${number(deltas)} ${deltas === 1 ? "delta" : "deltas"}`);
	if (firstDeltaMs !== null) found.push(`first delta ${duration(firstDeltaMs)}`);
	if (attempts > 1) found.push(`attempt ${attempts}`);
	return found.join(" · ");
}
