// Follow a job with npm's ws; cut the connection after every event, and resume behind its cursor.
// Arguments: the address, the job id, and a key (or nothing). Prints the events as lines of JSON.
const WebSocket = require("ws");

const [, , url, job_id, key] = process.argv;
let cursor;

function connect() {
	const socket = new WebSocket(url, ["streamworker.v1"]);
	let isDone = false;
	socket.on("open", () => {
		if (key) socket.send(JSON.stringify({ type: "auth", token: key }));
	});
	socket.on("error", (error) => {
		if (!isDone) throw error;
	});
	socket.on("message", (text) => {
		const message = JSON.parse(text);
		if (isDone) return;
		if (message.type === "welcome") socket.send(JSON.stringify({ type: "subscribe", id: "1", job_id, cursor }));
		if (message.type === "error") throw new Error(text);
		if (message.type !== "event") return;
		isDone = true;
		cursor = message.cursor;
		console.log(JSON.stringify(message.event));
		socket.terminate();
		if (message.event.type !== "usage") connect();
	});
}

connect();
