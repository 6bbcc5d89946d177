// Figures of the last ten seconds.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Figures } from "../page/figures.js";

test("without deltas there are no figures", () => {
	assert.deepEqual(new Figures().at(50_000), { deltasPerSecond: 0, firstDeltaMs: null });
});

test("deltas per second are counted over the time that they came in, at most ten seconds", () => {
	const figures = new Figures();
	for (let now = 0; now < 4000; now += 50) figures.delta(now);
	assert.equal(figures.at(4000).deltasPerSecond, 20);
	for (let now = 4000; now < 30_000; now += 50) figures.delta(now);
	assert.ok(Math.abs(figures.at(30_000).deltasPerSecond - 20) <= 1);
	assert.equal(figures.at(41_000).deltasPerSecond, 0);
});

test("a burst is not taken for a rate of one instant", () => {
	const figures = new Figures();
	for (let n = 0; n < 100; n += 1) figures.delta(1000);
	assert.equal(figures.at(1001).deltasPerSecond, 100);
});

test("the time to the first delta is the median of ten seconds", () => {
	const figures = new Figures();
	figures.first(0, 9000);
	for (const ms of [300, 100, 200]) figures.first(20_000, ms);
	assert.equal(figures.at(20_500).firstDeltaMs, 200);
	figures.first(20_600, 1000);
	assert.equal(figures.at(20_700).firstDeltaMs, 200);
	assert.equal(figures.at(31_000).firstDeltaMs, null);
});

test("memory does not grow with the number of jobs", () => {
	const figures = new Figures();
	for (let n = 1; n <= 2000; n += 1) figures.first(1, n);
	assert.equal(figures.at(2).firstDeltaMs, 1750);
});
