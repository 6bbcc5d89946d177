const SPAN_MS = 10_000;
const STEP_MS = 500;
const MAX_FIRSTS = 500;

export class Figures {
	#counts = new Map(); // half second -> deltas
	#firsts = [];
	#began = null;

	delta(now) {
		const step = Math.floor(now / STEP_MS);
		this.#began ??= now;
		this.#counts.set(step, (this.#counts.get(step) ?? 0) + 1);
	}

	first(now, ms) {
		this.#firsts = [...this.#firsts.slice(1 - MAX_FIRSTS), { now, ms }];
	}

	/** Return the figures at `now` (ms); `firstDeltaMs` is the median, or null. */
	at(now) {
		let deltas = 0;
		for (const [step, count] of this.#counts) {
			if (step * STEP_MS <= now - SPAN_MS) this.#counts.delete(step);
			else deltas += count;
		}
		if (deltas === 0) this.#began = null;
		const seconds = Math.min(SPAN_MS, Math.max(1000, now - this.#began)) / 1000;
		this.#firsts = this.#firsts.filter((first) => first.now > now - SPAN_MS);
		const sorted = this.#firsts.map(({ ms }) => ms).sort((one, other) => one - other);
		return { deltasPerSecond: deltas / seconds, firstDeltaMs: sorted[(sorted.length - 1) >> 1] ?? null };
	}
}
