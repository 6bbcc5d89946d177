// Read a job's events with npm's eventsource until it stops by itself; print them as lines of JSON.
// Arguments: the address. The last line has the final readyState.
const { EventSource } = require("eventsource");

const source = new EventSource(process.argv[2]);
for (const type of ["started", "delta", "usage", "snapshot", "position", "closing", "message"]) {
	source.addEventListener(type, ({ data, lastEventId }) => console.log(JSON.stringify({ type, id: lastEventId, data })));
}
source.addEventListener("error", () => {
	if (source.readyState !== EventSource.CLOSED) return;
	console.log(JSON.stringify({ readyState: source.readyState }));
});
