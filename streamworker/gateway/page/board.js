// The jobs and their cards. Cards change once per animation frame, however many messages came.

import { Card } from "./card.js";
import { announcement } from "./format.js";
import { announce } from "./header.js";
import { isOver, newJob, reduce } from "./job.js";

const MAX_CARDS = 200;
const SAVE_MS = 1000;

export class Board {
	#jobs = new Map(); // key -> job, oldest first
	#cards = new Map();
	#changed = new Set();
	#frame = 0;
	#saving = null;
	#nextKey = 1;

	/** `actions` has `cancel(job)` and `again(job)`. */
	constructor(root, store, figures, actions) {
		Object.assign(this, { root, store, figures, actions });
		this.visible = new IntersectionObserver((entries) => {
			for (const { target, isIntersecting } of entries) {
				const card = this.#cards.get(target.dataset.key);
				if (card) card.isVisible = isIntersecting;
				card?.follow();
			}
		});
		addEventListener("resize", () => this.#cards.forEach((card) => card.follow()));
	}

	get jobs() {
		return [...this.#jobs.values()];
	}

	get(key) {
		return this.#jobs.get(key);
	}

	/** Add a job with a card in front of all others, or in `root`; return its key. */
	add(members, root = this.root) {
		const key = `j${this.#nextKey++}`;
		const card = new Card((name) => this.actions[name](this.get(key)));
		this.#jobs.set(key, newJob({ ...members, key }));
		this.#cards.set(key, card);
		card.root.dataset.key = key;
		this.visible.observe(card.root);
		root[root === this.root ? "prepend" : "append"](card.root);
		this.touch(key);
		this.#trim();
		return key;
	}

	take(key, input, cursor = null) {
		const job = this.get(key);
		const next = job && reduce(job, input, cursor);
		if (next === job) return;
		this.#jobs.set(key, next);
		this.touch(key);
		if (next.isLive) this.#count(job, next, input);
		if (next.state !== job.state || next.attempts !== job.attempts) this.#saving ??= setTimeout(() => this.save(), SAVE_MS);
	}

	#count(job, next, { type }) {
		const now = performance.now();
		if (type === "delta") this.figures.delta(now);
		if (job.firstDeltaMs === null && next.firstDeltaMs !== null) this.figures.first(now, next.firstDeltaMs);
		if (next.state === "ended" && job.state !== "ended") announce(announcement(next));
	}

	// Ended jobs beyond the newest 200 leave the page; jobs that run stay.
	#trim() {
		for (const job of this.#jobs.values()) {
			if (this.#jobs.size <= MAX_CARDS) return;
			if (isOver(job)) this.remove(job.key);
		}
	}

	remove(key) {
		const { root } = this.#cards.get(key);
		this.visible.unobserve(root);
		root.remove();
		for (const all of [this.#cards, this.#jobs, this.#changed]) all.delete(key);
	}

	save() {
		clearTimeout(this.#saving);
		this.#saving = null;
		this.store.saveJobs(this.jobs.filter((job) => !job.isAlone));
	}

	touch(key) {
		this.#changed.add(key);
		this.#frame ||= requestAnimationFrame(() => this.#render());
	}

	#render() {
		this.#frame = 0;
		const due = [...this.#changed].filter((key) => this.#jobs.has(key));
		this.#changed.clear();
		const now = Date.now();
		for (const key of due) if (this.#cards.get(key).render(this.get(key), now)) this.touch(key);
		for (const key of due) this.#cards.get(key).follow();
	}
}
