// Read the generated text of a delta. Providers send it under several names.

const objects = (value) => (Array.isArray(value) ? value.filter((item) => item && typeof item === "object") : []);
const string = (value) => (typeof value === "string" ? value : "");

/** Split a delta, or a message, into `{text, reasoning, refusal, calls}`; `calls` are fragments of tool calls. */
export function split(delta) {
	const [text, thinking] = content(delta.content);
	return {
		text,
		reasoning: thinking + reasoning(delta),
		refusal: string(delta.refusal),
		calls: calls(delta),
	};
}

// Mistral sends reasoning as parts of `content`.
function content(value) {
	if (typeof value === "string") return [value, ""];
	let text = "";
	let thinking = "";
	for (const part of objects(value)) {
		text += string(part.text);
		thinking += string(part.thinking);
		for (const piece of objects(part.thinking)) thinking += string(piece.text);
	}
	return [text, thinking];
}

// Some providers send the same reasoning under two names; one is read.
function reasoning(delta) {
	for (const name of ["reasoning_content", "reasoning"]) {
		if (typeof delta[name] === "string") return delta[name];
	}
	return objects(delta.reasoning_details)
		.map((detail) => string(detail.text) || string(detail.summary))
		.join("");
}

function calls(delta) {
	const found = objects(delta.tool_calls).map((call, position) => {
		const what = call.function ?? call.custom ?? {};
		return {
			index: Number.isInteger(call.index) ? call.index : position,
			name: string(what.name),
			input: string(what.arguments) + string(what.input),
		};
	});
	const old = delta.function_call;
	if (old && typeof old === "object") found.push({ index: 0, name: string(old.name), input: string(old.arguments) });
	return found;
}
